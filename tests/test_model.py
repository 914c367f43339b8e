"""model.py, attention.py and formats/huggingface.py against the truth: transformers, brute force,
fp64 and plain references. --slow adds the real compiler. On a machine with CUDA the attention tests
run every backend that is there."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import attention as A
import common
import formats.huggingface as HF
import model as M
from attention import make_seqs
from formats import read_json, write_json
from harness import raises

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
LENGTHS = [5, 300, 1, 40, 40, 17]  # ragged, one longer than a query block, two equal neighbours
TOLERANCE = 1e-4  # of fp32 logits of size 7, two implementations


def randomize(model, seed=0):
    """Weights that no default hides: norms away from 1, biases away from 0, logits of a few."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(noise * (0.2 if p.dim() == 2 else 0.1))
    return model.eval()


def random_tokens(lengths):
    return torch.randint(3, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(0))


TOKENS = random_tokens(LENGTHS)


def assert_close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# ---- transformers ----
_SMALL = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
              num_attention_heads=4, max_position_embeddings=512)  # fmt: skip
_GQA = _SMALL | dict(num_key_value_heads=2)
_MB = _SMALL | dict(
    local_attention=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
    sep_token_id=2)  # fmt: skip
_LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
_LLAMA3 = dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=64)  # fmt: skip
_YARN = dict(
    rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=128)
_BIASES = dict(attention_bias=True, mlp_bias=True)
_MB_BIASES = _MB | _BIASES | dict(norm_bias=True, classifier_bias=True, tie_word_embeddings=False)


_EVEN = ["full_attention", "sliding_attention"] * 2


def thetas(full, sliding, **scaling):
    rope = dict(rope_type="default") | scaling
    pairs = {"full_attention": full, "sliding_attention": sliding}
    return dict(rope_parameters={k: rope | dict(rope_theta=theta) for k, theta in pairs.items()})


CASES = {  # model_type, config
    "llama": ("llama", _GQA | dict(rms_norm_eps=1e-3)),
    "llama3-tied": (
        "llama", _GQA | dict(tie_word_embeddings=True, head_dim=32, rope_parameters=_LLAMA3)),
    "llama-linear-biases": (
        "llama", _GQA | _BIASES | dict(hidden_act="gelu", rope_parameters=_LINEAR)),
    "mistral": ("mistral", _GQA | dict(sliding_window=9)),
    "mistral-global": ("mistral", _GQA | dict(sliding_window=None)),
    "qwen2": (
        "qwen2", _GQA | dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
    "qwen2-yarn": ("qwen2", _GQA | dict(rope_parameters=_YARN)),
    "qwen3-tied": ("qwen3", _GQA | dict(head_dim=24, tie_word_embeddings=True)),
    "qwen3-untied": ("qwen3", _GQA | dict(head_dim=24, attention_bias=True)),
    "gemma": ("gemma", _GQA | dict(
        hidden_size=72, head_dim=24, hidden_act="gelu", attention_bias=True)),
    "gemma3": (
        "gemma3_text", _GQA | dict(
            head_dim=24, query_pre_attn_scalar=40, sliding_window=8, layer_types=_EVEN,
            **thetas(5e4, 700.0))),
    "gemma3-bidirectional": (
        "gemma3_text", _GQA | dict(use_bidirectional_attention=True, sliding_window=10,
                                   sliding_window_pattern=2, tie_word_embeddings=False)),
    "modernbert": ("modernbert", _MB | thetas(5e4, 700.0)),
    "modernbert-untied-biases": ("modernbert", _MB_BIASES | dict(norm_eps=1e-3)),
    "modernbert-no-decoder-bias": ("modernbert", _MB | dict(decoder_bias=False)),
    "modernbert-decoder": ("modernbert-decoder", _MB | thetas(5e4, 700.0)),
    "modernbert-decoder-untied-biases": ("modernbert-decoder", _MB_BIASES)}  # fmt: skip


ENCODERS = [case for case, (family, keys) in CASES.items()
            if family == "modernbert" or "use_bidirectional_attention" in keys]  # fmt: skip


def theirs(case, causal=None, **changes):
    """transformers' model of a case, randomized."""
    family, settings = CASES[case]
    config = transformers.AutoConfig.for_model(family, **(settings | changes))
    if causal is False and case not in ENCODERS:
        config.is_causal = False
    torch.manual_seed(0)
    return randomize(getattr(transformers, HF.ARCHITECTURES[family][0])(config))


@torch.no_grad()
def their_output(model, field="logits"):
    texts = TOKENS.split(LENGTHS)
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # [B, longest]; no text has a 0
    out = model(input_ids=ids, attention_mask=(ids > 0).long())[field]
    return torch.cat([one[:n] for one, n in zip(out, LENGTHS)])  # [T, V or C]


@torch.no_grad()
def our_hidden(model, tokens=TOKENS, lengths=LENGTHS, rows=None):
    return model.eval()(tokens, make_seqs(lengths), rows)


def our_logits(model, tokens=TOKENS, lengths=LENGTHS):
    return our_hidden(model, tokens, lengths, rows=torch.arange(len(tokens)))


def config_of(folder):
    return read_json(folder, "config.json")


def saved_again(model, folder, cls):
    """transformers' model (of a class) of the folder that ours is saved to."""
    HF.save_pretrained(model, folder)
    return cls.from_pretrained(folder).eval()


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


_MASKS = [(k, c) for k in CASES for c in (True, False) if not c or k not in ENCODERS]


@pytest.mark.parametrize("case, causal", _MASKS)
def test_logits_equal_transformers_and_folders_go_both_ways(case, causal, tmp_path):
    hf = theirs(case, causal)
    hf.save_pretrained(tmp_path)
    ours = HF.from_pretrained(tmp_path)
    assert ours.config.causal == causal
    expected = their_output(hf)
    assert expected.std() > 0.5  # not a comparison of zeros
    assert_close(our_logits(ours), expected)
    if case not in ENCODERS:  # the same weights, the other mask
        turned = HF.from_pretrained(tmp_path, attention="bidirectional" if causal else "causal")
        assert_close(our_logits(turned), their_output(theirs(case, not causal)))

    back = saved_again(ours, tmp_path / "again", type(hf))
    assert_same_weights(back, hf)
    assert torch.equal(their_output(back), expected)
    before, after = config_of(tmp_path), config_of(tmp_path / "again")
    assert after.get("is_causal", not after.get("use_bidirectional_attention")) is causal
    turned = {"layer_types", "sliding_window", "is_causal", "use_bidirectional_attention"}
    for key in before.keys() & after.keys() - turned:
        assert after[key] == before[key], key


@pytest.mark.parametrize("case", [
    "llama3-tied", "qwen3-untied", "modernbert-decoder", "gemma", "gemma3"])  # fmt: skip
def test_injected_vectors_equal_inputs_embeds(case, tmp_path):
    """Vectors in place of the first and another token: logits, and gradients of the vectors and of
    all weights."""
    hf = theirs(case)
    hf.save_pretrained(tmp_path)
    model = HF.from_pretrained(tmp_path).eval()
    lengths, generator = [5, 30], torch.Generator().manual_seed(0)
    tokens, at = random_tokens(lengths), torch.tensor([0, 5, 12])
    vectors = torch.randn(3, model.config.n_embd, generator=generator).requires_grad_()
    rows = torch.arange(len(tokens))
    logits = model(tokens, make_seqs(lengths), rows, vectors=vectors, at=at)
    copies = vectors.detach().clone().requires_grad_()
    embeds = hf.get_input_embeddings()(tokens).index_put((at,), copies)
    expected = torch.cat([hf(inputs_embeds=x[None]).logits[0] for x in embeds.split(lengths)])
    assert (logits - expected).abs().max() < TOLERANCE
    probe = torch.randn(expected.shape, generator=generator)
    ((logits * probe).sum() + (expected * probe).sum()).backward()
    assert (vectors.grad - copies.grad).abs().max() < 1e-3 * copies.grad.abs().max()
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        grad = hf.get_parameter(f"{HF.hf_module(module, model.config.family)}.{leaf}").grad
        assert (p.grad - grad).norm() < 1e-3 * grad.norm(), name
    changed = torch.where(torch.isin(rows, at), 3, tokens)  # what stood there does not matter
    again = model(changed, make_seqs(lengths), rows, vectors=vectors, at=at)
    assert torch.equal(again, logits)


def test_gemma_scales_its_embedding_in_the_type_of_the_weights(tmp_path):
    hf, inputs = theirs("gemma").bfloat16(), []
    hf.save_pretrained(tmp_path)
    model = HF.from_pretrained(tmp_path, dtype=None)
    model.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    our_hidden(model)
    assert torch.equal(inputs[0], hf.get_input_embeddings()(TOKENS))
    exact = model.embed(TOKENS).float() * 72**0.5
    assert not torch.equal(inputs[0], exact.bfloat16())  # sqrt(72) itself is rounded, too


def test_soft_caps_are_refused():
    config = transformers.Gemma2Config().to_dict()
    raises(ValueError, "gemma2.*soft caps", HF.config_from_hf, config)
    config["model_type"] = "gemma3_text"
    raises(ValueError, "soft caps", HF.config_from_hf, config)


@pytest.mark.parametrize("case", [
    "llama", "modernbert", "modernbert-decoder", "qwen3-untied",
    "gemma3-bidirectional"])  # fmt: skip
def test_base_folder_gives_a_model_without_a_head(case, tmp_path):
    hf = theirs(case)
    hf.base_model.save_pretrained(tmp_path)  # what AutoModel saves: no "model." before the names
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert not any(k.startswith("model.") for k in keys)
    ours = HF.from_pretrained(tmp_path)
    assert ours.config.head == "none" and not hasattr(ours, "lm_head")
    assert_close(our_hidden(ours), their_output(hf.base_model, field="last_hidden_state"))
    back = saved_again(ours, tmp_path / "again", transformers.AutoModel)
    assert type(back) is type(hf.base_model)
    assert_same_weights(back, hf.base_model)


def test_sharded_and_old_bin_folders(tmp_path):
    hf, shards, old = theirs("llama"), tmp_path / "shards", tmp_path / "bin"
    hf.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    ours = HF.from_pretrained(shards)
    assert_close(our_logits(ours), their_output(hf))
    HF.save_pretrained(ours, shards)  # saving over the shards leaves none behind
    assert len(list(shards.glob("*.safetensors"))) == 1
    hf.config.save_pretrained(old)
    state = hf.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(state, old / "pytorch_model.bin")
    assert_close(our_logits(HF.from_pretrained(old)), their_output(hf))


_OLD_KEYS = {  # case, today's keys, older files' keys
    "linear": ("llama", dict(rope_parameters=_LINEAR | dict(rope_theta=5e4)), dict(
        rope_theta=5e4, rope_scaling=dict(type="linear", factor=4.0))),
    "llama3": ("llama", dict(rope_parameters=_LLAMA3), dict(
        rope_theta=5e5, rope_scaling={k: _LLAMA3[k] for k in _LLAMA3 if k != "rope_theta"})),
    "yarn": ("llama", dict(rope_parameters=_YARN), dict(rope_theta=1e4, rope_scaling=dict(
        type="yarn", factor=4.0, original_max_position_embeddings=128))),
    "theta": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=3e3)), dict(
        rope_theta=3e3, rope_scaling=None)),
    "window": ("qwen2", dict(use_sliding_window=True), dict(sliding_window=7)),
    "gemma3": ("gemma3", thetas(5e4, 700.0) | dict(layer_types=["sliding_attention"] * 2 + [
        "full_attention", "sliding_attention"]), dict(
            rope_theta=5e4, rope_local_base_freq=700.0, sliding_window_pattern=3)),
    # old files give it unused, too
    "unused window": ("qwen2", dict(use_sliding_window=False), dict(sliding_window=7)),
    # transformers 4: null means the global theta
    **{f"{case}, local {local}": (
        case, thetas(5e4, local or 5e4) | dict(layer_types=_EVEN), dict(
            global_rope_theta=5e4, local_rope_theta=local, global_attn_every_n_layers=2))
       for case in ("modernbert", "modernbert-decoder") for local in (700.0, None)}}  # fmt: skip


@pytest.mark.parametrize("kind", _OLD_KEYS)
def test_keys_of_older_files(kind, tmp_path):
    case, new, old = _OLD_KEYS[kind]
    hf = theirs(case, **new)
    if case == "qwen2":
        assert len(set(hf.config.layer_types)) == 1 + new["use_sliding_window"]
    hf.save_pretrained(tmp_path)
    gone = ("layer_types", "dtype") if case == "qwen2" else (*new, "dtype")
    config = {k: v for k, v in config_of(tmp_path).items() if k not in gone}
    write_json(config | old | {"torch_dtype": "float32"}, tmp_path, "config.json")
    ours = HF.from_pretrained(tmp_path)
    assert_close(our_logits(ours), their_output(hf))
    back = saved_again(ours, tmp_path / "again", type(hf))  # in the new keys, once
    assert torch.equal(their_output(back), their_output(hf))
    gone = {"rope_theta", "rope_scaling", "global_rope_theta", "local_rope_theta", "torch_dtype"}
    assert not gone & config_of(tmp_path / "again").keys()


@pytest.mark.parametrize("case", ["modernbert", "modernbert-untied-biases"])
def test_encoder_read_as_causal_is_a_modernbert_decoder(case, tmp_path):
    hf = theirs(case)
    hf.save_pretrained(tmp_path)
    ours = HF.from_pretrained(tmp_path, attention="causal")
    logits = our_logits(ours)
    decoder = saved_again(ours, tmp_path / "a", transformers.ModernBertDecoderForCausalLM)
    assert_close(logits, their_output(decoder))
    # the same weights, and another mask
    attn = decoder.model.layers[1].attn
    parts = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    assert torch.equal(torch.cat(parts), hf.model.layers[1].attn.Wqkv.weight)
    assert (logits - their_output(hf)).abs().max() > 0.1


@pytest.mark.parametrize("case", ["modernbert-decoder", "modernbert-decoder-untied-biases"])
def test_decoder_read_as_encoder_is_a_modernbert(case, tmp_path):
    hf = theirs(case, causal=False)
    hf.save_pretrained(tmp_path / "decoder")
    ours = HF.from_pretrained(tmp_path / "decoder", attention="encoder")
    HF.save_pretrained(ours, tmp_path / "encoder")
    encoder = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder").eval()
    assert type(encoder) is transformers.ModernBertForMaskedLM
    expected = their_output(hf)
    assert_close(their_output(encoder), expected)
    assert_close(our_logits(ours), expected)
    again = HF.from_pretrained(tmp_path / "encoder", attention="causal")  # and back, bit by bit
    assert_same_weights(saved_again(again, tmp_path / "again", type(hf)), hf)
    state = load_file(tmp_path / "decoder" / "model.safetensors")
    del state["model.layers.1.attn.k_proj.weight"]
    save_file(state, tmp_path / "decoder" / "model.safetensors", metadata={"format": "pt"})
    raises(ValueError, "Wqkv.weight' is missing", HF.from_pretrained, tmp_path / "decoder",
           attention="encoder")  # fmt: skip


def test_overrides_on_reading(tmp_path):
    theirs("modernbert").save_pretrained(tmp_path)
    long = dict(rope_type="linear", factor=2.0)
    ours = HF.from_pretrained(tmp_path, window=4, rope_theta=3e3)
    ours.config.max_seq_len = 999
    for rope in ours.config.rope.values():
        rope["scaling"] = long
    logits = our_logits(ours)
    expected = theirs("modernbert", local_attention=8, **thetas(3e3, 3e3, **long))
    assert_close(logits, their_output(expected))
    assert ours.config.max_seq_len == 999
    back = saved_again(ours, tmp_path / "again", transformers.ModernBertForMaskedLM)
    assert_close(logits, their_output(back))
    assert back.config.max_position_embeddings == 999
    logits = our_logits(HF.from_pretrained(tmp_path, window=0))
    assert_close(logits, their_output(theirs("modernbert", layer_types=["full_attention"] * 4)))


# ---- NeoBERT, against the published layout ----
def neobert_state(n_layer=3, width=32, hidden=64, seed=0):
    """Random weights under the published names: with a head, "model." before the encoder's."""
    g = torch.Generator().manual_seed(seed)

    def w(*shape):
        return torch.randn(shape, generator=g) * 0.2

    state = {"model.encoder.weight": w(VOCAB, width), "model.layer_norm.weight": 1 + w(width)}
    for i in range(n_layer):
        layer = {
            "qkv": w(3 * width, width), "wo": w(width, width), "ffn.w12": w(2 * hidden, width),
            "ffn.w3": w(width, hidden), "attention_norm": 1 + w(width), "ffn_norm": 1 + w(width),
        }  # fmt: skip
        state |= {f"model.transformer_encoder.{i}.{k}.weight": x for k, x in layer.items()}
    return state | {"decoder.weight": w(VOCAB, width), "decoder.bias": w(VOCAB)}


def neobert_reference(state, text, n_layer=3, n_head=4, eps=1e-6):
    """One text [n] -> logits [n, V], written from the published description, without ours."""

    def rms(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w

    x = state["model.encoder.weight"][text]
    n, width = x.shape
    d = width // n_head
    angle = torch.outer(torch.arange(n), 10_000.0 ** (-torch.arange(0, d, 2) / d))  # [n, D/2]
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [n, 1, D/2] complex

    def rope(q):  # a pair of neighbours is one complex number
        q = torch.view_as_complex(q.reshape(n, n_head, d // 2, 2))
        return torch.view_as_real(q * turn).reshape(n, n_head, d)

    for i in range(n_layer):
        start = f"model.transformer_encoder.{i}."
        w = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        h = rms(x, w["attention_norm.weight"])
        # each head has its q, k and v side by side
        q, k, v = (h @ w["qkv.weight"].T).reshape(n, n_head, 3 * d).chunk(3, dim=-1)
        scores = torch.einsum("ihd,jhd->hij", rope(q), rope(k)) / d**0.5
        y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, width)
        x = x + y @ w["wo.weight"].T
        a, b = (rms(x, w["ffn_norm.weight"]) @ w["ffn.w12.weight"].T).chunk(2, dim=-1)
        x = x + (a * torch.sigmoid(a) * b) @ w["ffn.w3.weight"].T
    x = rms(x, state["model.layer_norm.weight"])
    return x @ state["decoder.weight"].T + state["decoder.bias"]


@pytest.mark.parametrize("head", [True, False])
def test_neobert_equals_the_published_layout_and_goes_back_bit_equal(head, tmp_path):
    whole = neobert_state()
    expected = torch.cat([neobert_reference(whole, text) for text in TOKENS.split(LENGTHS)])
    assert expected.std() > 0.5
    state, table = whole, {"model.freqs_cis": torch.ones(4, 4)}
    if not head:
        state = {k.removeprefix("model."): w for k, w in whole.items() if k.startswith("model.")}
        table = {"freqs_cis": torch.ones(4, 4)}  # a name without a dot
    save_file(state | table, tmp_path / "model.safetensors")
    config = dict(
        model_type="neobert", architectures=["NeoBERTLMHead"], vocab_size=VOCAB, hidden_size=32,
        num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, max_length=512,
        norm_eps=1e-6, embedding_init_range=0.02)  # fmt: skip
    write_json(config, tmp_path, "config.json")
    ours = HF.from_pretrained(tmp_path)
    assert (ours.config.head == "none") == (not head)
    if head:
        assert_close(our_logits(ours), expected)
    else:
        logits = our_hidden(ours) @ whole["decoder.weight"].T + whole["decoder.bias"]
        assert_close(logits, expected)

    HF.save_pretrained(ours, tmp_path / "b")
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    config = config_of(tmp_path / "b")
    assert (config["intermediate_size"], config["max_length"]) == (96, 512)
    assert config["embedding_init_range"] == 0.02  # not ours, passed on
    assert torch.equal(our_hidden(HF.from_pretrained(tmp_path / "b")), our_hidden(ours))



@pytest.mark.parametrize("changes", [
    dict(tied=True), dict(head="none"), dict(causal=True, head_bias=False)])  # fmt: skip
def test_transformers_loads_neobert_by_the_code_in_its_folder(changes, tmp_path):
    model = tiny("neobert", **changes)
    model.config.rope["global"]["theta"] = 700.0
    auto, field, output = transformers.AutoModelForMaskedLM, "logits", our_logits
    if model.config.head == "none":
        auto, field, output = transformers.AutoModel, "last_hidden_state", our_hidden
    HF.save_pretrained(model, tmp_path)
    theirs = auto.from_pretrained(tmp_path, trust_remote_code=True)
    assert_close(their_output(theirs, field), output(model))  # with padding
    theirs.save_pretrained(tmp_path / "again")
    again = HF.from_pretrained(tmp_path / "again")
    assert_same_weights(again, model)
    assert again.config.causal == model.config.causal
    if field == "logits":
        text, labels = TOKENS[None, :30], torch.full((1, 30), -100)
        labels[0, ::4] = 5
        loss = theirs(text, labels=labels).loss
        total, _ = model(text[0], make_seqs([30]), torch.arange(0, 30, 4), labels[0, ::4])
        assert loss.item() == pytest.approx(total.item() / 8, rel=1e-5)
    model.config.rope["global"]["scaling"] = dict(rope_type="linear", factor=2.0)
    HF.save_pretrained(model, tmp_path)
    raises(ValueError, "linear.*default", auto.from_pretrained, tmp_path, trust_remote_code=True)


# ---- small models of each family, ours alone ----
_KINDS = ["global", "local", "local", "global"]
_OURS = dict(vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=32, n_hidden=48, max_seq_len=512)
_OURS_MB = _OURS | dict(
    layer_kinds=_KINDS, window=3, norm="layer", embed_norm=True,
    fused_mlp=True, activation="gelu", head="dense", head_bias=True)  # fmt: skip
FAMILIES = {
    "gemma3_text": _OURS | M.DEFAULTS["gemma3_text"] | dict(
        n_kv_head=2, head_dim=16, query_pre_attn_scalar=20, max_seq_len=512, window=4,
        layer_kinds=["local", "local", "global", "local"]),
    "llama": _OURS | dict(n_kv_head=2),
    "mistral": _OURS | dict(n_kv_head=2, layer_kinds=["local"] * 4, window=4, tied=False),
    "qwen2": _OURS | dict(
        n_kv_head=1, qkv_bias=True, layer_kinds=["global", "global", "local", "local"], window=4),
    "qwen3": _OURS | dict(n_kv_head=2, qk_norm=True, head_dim=16),
    "modernbert": _OURS_MB | dict(causal=False, fused_qkv=True, norm_bias=True),
    "modernbert-decoder": _OURS_MB,
    "neobert": _OURS | dict(
        causal=False, rope_pairs="adjacent", fused_qkv=True, fused_mlp=True, tied=False,
        head_bias=True)}  # fmt: skip


def tiny(family, **changes):
    config = M.ModelConfig(**(FAMILIES[family] | dict(family=family) | changes))
    torch.manual_seed(0)
    return randomize(M.Transformer(config))


every_mask = pytest.mark.parametrize("family, causal", [
    (family, causal) for family in FAMILIES for causal in (True, False)
    if not (causal and family in ("modernbert", "neobert"))])  # fmt: skip


def backends():
    """What runs here: (name, device, type of q, k and v, tolerance relative to the largest value).

    bf16 has 8 bits: one rounding is 0.004, and a few of them follow one another.
    """
    out = [("sdpa", "cpu", torch.float32, 1e-5)]
    if torch.cuda.is_available():
        there = {"sdpa": True, "varlen": A.varlen_attn, "flash_attn": A.flash_attn_varlen_func}
        out += [(name, "cuda", torch.bfloat16, 2e-2) for name in there if there[name]]
    marks = {"cpu": [], "cuda": pytest.mark.cuda}
    return [pytest.param(b, id=f"{b[0]}-{b[1]}", marks=marks[b[1]]) for b in out]


@pytest.fixture(params=backends())
def backend(request):
    return request.param


def assert_near(found, expected, tolerance, name=""):
    size = expected.float().abs().max().clamp(min=1)
    error = (found.float() - expected.float()).abs().max() / size
    assert error <= tolerance, f"{name}: off by {error:.1e} of the largest"


# ---- attention ----
def seen(lengths, causal, left, right, device="cpu"):
    """[T, T] bool: which keys a query sees. left and right: -1 for no limit."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    i = torch.arange(len(text), device=device)[:, None]
    left, right = (len(text) if w < 0 else w for w in (left, 0 if causal else right))
    return (text[:, None] == text) & (i.T >= i - left) & (i.T <= i + right)


def brute_force(q, k, v, lengths, causal, window):
    """Masked softmax over the whole T x T square, in fp64. q [T, H, D], k, v [T, H_kv, D]."""
    q, k, v = (x.double().repeat_interleave(q.size(1) // x.size(1), 1) for x in (q, k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.size(-1) ** 0.5
    mask = seen(lengths, causal, *window, q.device)
    probs = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", probs, v)


_W = 16
_ATTENTION = [  # lengths, (left, right)
    ([37], (-1, -1)), ([5, 1, 40, 40, 40, 17], (-1, -1)),
    ([_W, _W + 1, _W + 2, 1, 2, _W - 1], (_W, _W)),  # at the window's edge
    ([_W, _W + 1, _W + 2, 1, 2, _W - 1], (_W - 1, 0)),
    ([256, 257, 700, 700, 1, 300], (_W, _W)),  # past 256: blocks of queries
    ([256, 257, 700, 300], (150, 150)),
    ([600, 31], (290, 290)),  # a window longer than the first block
    ([50, 3], (4, 1)),
    ([300, 3], (0, 0)),  # only itself
]


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths, window", _ATTENTION)
def test_attention_is_the_masked_softmax(lengths, window, causal, n_kv_head, backend):
    window = (window[0], 0) if causal and window[1] != 0 else window
    name, device, dtype, tolerance = backend
    g = torch.Generator().manual_seed(0)
    *qkv, y = (
        torch.randn(sum(lengths), heads, 16, generator=g).to(device, dtype).requires_grad_(i < 3)
        for i, heads in enumerate((4, n_kv_head, n_kv_head, 4)))  # fmt: skip
    out = A.attention(*qkv, make_seqs(lengths, device), causal, window, 0.0, name)
    assert out.shape == (sum(lengths), 4, 16) and out.dtype == dtype
    expected = brute_force(*qkv, lengths, causal, window)
    assert_near(out, expected, tolerance, "output")
    grads = (torch.autograd.grad((o * y).sum(), qkv) for o in (out, expected))
    for name, found, right in zip("qkv", *grads, strict=True):
        assert_near(found, right, tolerance, f"gradient of {name}")


class Made(TorchDispatchMode):
    """The shapes of all tensors that operations make, views aside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = out if isinstance(out, (tuple, list)) else (out,)
            self.shapes += [tuple(x.shape) for x in made if isinstance(x, torch.Tensor)]
        return out

    def largest(self):
        return max(math.prod(shape) for shape in self.shapes)


def test_long_windowed_texts_never_make_a_square():
    """4,096 tokens, 64 back and on: nothing near 4,096 x 4,096 may be made."""
    q = torch.randn(4096, 1, 8, requires_grad=True)
    with Made() as made:
        A.attention(q, q, q, make_seqs([4096]), False, (64, 64)).sum().backward()
    assert made.largest() < 4096 * 64


def test_neighbours_of_equal_length_go_in_one_call(monkeypatch):
    shapes, sdpa = [], F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        shapes.append(q.shape)
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(5 + 3 * 7 + 5, 2, 4)
    A.attention(q, q, q, make_seqs([5, 7, 7, 7, 5]), False, (-1, -1))
    assert shapes == [(1, 2, 5, 4), (3, 2, 7, 4), (1, 2, 5, 4)]  # [texts, H, length, D]


def test_masks_made_in_inference_mode_serve_training():
    seqs, tokens, model = make_seqs([311]), random_tokens([311]), tiny("modernbert")
    with torch.inference_mode():
        model(tokens, seqs)
    model(tokens, seqs).sum().backward()


# ---- packed = each text alone ----
DOCS = [9, 1, 30, 30, 30, 14]
DOC_TOKENS, DOC_SEQS = random_tokens(DOCS), make_seqs(DOCS)


def outputs_and_gradients(model, tokens, lengths, y, backend="sdpa", device="cpu"):
    """Hidden states, and the gradients of sum(logits * y) by parameter name."""
    model.zero_grad()
    model.backend = backend
    seqs, rows = make_seqs(lengths, device), torch.arange(len(tokens), device=device)
    hidden = model(tokens, seqs)
    (model(tokens, seqs, rows=rows) * y).sum().backward()
    return hidden.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}


@every_mask
@pytest.mark.parametrize("precision", ["fp64", "of training"])
def test_packed_equals_each_text_alone(family, causal, precision, backend, monkeypatch):
    """Outputs and gradients of all parameters, of DOCS in one row and of each text alone by sdpa.
    fp64: on the CPU, model.py's `.float()` made `.double()`."""
    name, device, dtype, tolerance = backend
    model, tolerance = tiny(family, causal=causal), 4 * tolerance  # roundings of 4 layers add up
    y = torch.randn(sum(DOCS), VOCAB, generator=torch.Generator().manual_seed(1))
    if precision == "fp64":
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        name, device, dtype, tolerance = "sdpa", "cpu", torch.float64, 1e-11
        model, y = model.double(), y.double()
    model, y, tokens = model.to(device), y.to(device), DOC_TOKENS.to(device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
        hidden, grads = outputs_and_gradients(model, tokens, DOCS, y, name, device)
        alone = [outputs_and_gradients(model, t, [len(t)], y1, "sdpa", device)
                 for t, y1 in zip(tokens.split(DOCS), y.split(DOCS), strict=True)]  # fmt: skip
    expected = torch.cat([h for h, _ in alone])
    if precision == "fp64":
        torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=tolerance)
    assert_near(hidden, expected, tolerance, "hidden")
    for key, grad in grads.items():
        expected = sum(g[key] for _, g in alone)
        assert expected.abs().max() > 0, key
        assert (grad - expected).norm() <= tolerance * expected.norm() + 1e-11, key


def reach(config, lengths):
    """[T, T] bool: which inputs can change which outputs, by the masks of all layers."""
    square = torch.eye(sum(lengths), dtype=torch.bool)
    for kind in config.layer_kinds:
        left = right = -1
        if kind == "local":  # Hugging Face's two meanings of one number
            left, right = config.window - config.causal, config.window
        square = (seen(lengths, config.causal, left, right).float() @ square.float()) > 0
    return square


@pytest.mark.parametrize("lengths", [[20], [20, 1, 20, 20, 7]], ids=["one", "several"])
@every_mask
def test_each_output_depends_on_what_it_may_see_and_on_nothing_else(
    family, causal, lengths, backend
):
    """By gradients: the last token reaches the first where bidirectional, no text another."""
    name, device, dtype, _ = backend
    model = tiny(family, causal=causal).to(device)
    model.backend = name
    inputs = []
    model.embed.register_forward_hook(lambda m, a, out: inputs.append(out) or None)
    with torch.autocast(device, torch.bfloat16, enabled=dtype is not torch.float32):
        hidden = model(random_tokens(lengths).to(device), make_seqs(lengths, device))
    expected = reach(model.config, lengths)
    if max(model.config.window, 1) == 1 or "global" in model.config.layer_kinds:
        assert expected[0, lengths[0] - 1] == (not causal)  # the table itself says what it should
    y = torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(2)).to(device)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [(e - n, e - n // 2 - 1, e - 1) for n, e in zip(lengths, ends, strict=True)]
    for row in set(sum(rows, ())):  # first, middle and last of each text
        (grad,) = torch.autograd.grad((hidden[row] * y).sum(), inputs, retain_graph=True)
        assert torch.equal((grad != 0).any(1).cpu(), expected[row]), f"row {row}"


# ---- the loss over a vocabulary ----
def leaves_of(*shapes, dtype=torch.float32, seed=0):
    """Random tensors that want gradients, and a second set of the same."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]
    return ([x.clone().requires_grad_() for x in leaves] for _ in range(2))


def reference_loss(targets, x, weight, bias=None):
    """Sum and hits by F.cross_entropy, 64 rows at a time to spare memory; gradients by backward."""
    total, hits = 0.0, 0
    for x1, t1 in zip(x.split(64), targets.split(64), strict=True):
        logits = F.linear(x1, weight, bias)
        loss = F.cross_entropy(logits, t1, reduction="sum")
        (loss * 0.37).backward(retain_graph=True)
        total, hits = total + loss.item(), hits + (logits.argmax(1) == t1).sum().item()
    return total, hits


_ROWS = [(1, 50, 1), (333, 101, 1), (256, 2**16, 1), (257, 2**16, 2), (5, 2**22, 2)]
_CASES = [(*row, bias) for row in _ROWS for bias in (True, False) if bias or row[1] < 2**22]


@pytest.mark.parametrize("rows, vocab, chunks, bias", _CASES)
def test_linear_cross_entropy(rows, vocab, chunks, bias):
    width = 3 if vocab > 2**20 else 12
    assert chunks == math.ceil(rows / (2**24 // vocab))  # on the CPU
    shapes = [(rows, width), (vocab, width), (vocab,)][: 3 if bias else 2]
    ours, ref = leaves_of(*shapes, dtype=torch.float64, seed=rows)
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        for x in (ours[0], ref[0]):
            x *= 3
        for i in range(0, rows, 2):  # every other row has its best answer: there are hits to count
            targets[i] = F.linear(ours[0][i], *ours[1:]).argmax()
    loss, hits = M.linear_cross_entropy(*ours[:2], ours[2] if bias else None, targets)
    (loss * 0.37).backward()
    expected, expected_hits = reference_loss(targets, *ref)
    assert loss.dtype == torch.float64 and hits.dtype == torch.int64
    assert loss.item() == pytest.approx(expected, rel=1e-10) and hits.item() == expected_hits
    for name, a, b in zip(("x", "weight", "bias"), ours, ref, strict=False):
        assert (a.grad - b.grad).norm() <= 1e-10 * b.grad.norm(), name


def test_linear_cross_entropy_with_extreme_logits():
    x = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, hits = M.linear_cross_entropy(x, weight, None, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4 and hits.item() == 1 and x.grad.tolist() == [[0.0], [-2.0]]


def test_hits_are_the_best_answers_and_no_near_ones():
    logits = torch.tensor([[1.0, 1.001, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 5.0]])  # x W^T, W = 1
    # of two that are equal the first
    for targets, hits in (([0, 0, 2], 2), ([1, 1, 2], 2), ([2, 2, 0], 0), ([1, 0, 2], 3)):
        found = M.linear_cross_entropy(logits, torch.eye(3), None, torch.tensor(targets))[1]
        assert found.item() == hits


def test_no_labels_give_zero_and_connected_gradients():
    model, none = tiny("modernbert").train(), torch.zeros(0, dtype=torch.long)
    loss, hits = model(DOC_TOKENS, DOC_SEQS, rows=none, targets=none)
    assert loss.item() == 0 and hits.item() == 0
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


@pytest.mark.parametrize("trains", ["x", "bias", "all, in evaluation"])
def test_what_does_not_train_costs_nothing(trains):
    """LoRA: the head does not train, so no [V, C] gradient is made."""
    names, (ours, ref) = ("x", "weight", "bias"), leaves_of((6, 4), (5000, 4), (5000,))
    if trains in names:
        for x, name in zip(ours + ref, names * 2, strict=True):
            x.requires_grad_(name == trains)
    with torch.set_grad_enabled(trains in names), Made() as made:
        loss = M.linear_cross_entropy(*ours, torch.arange(6))[0]
        if trains in names:
            loss.backward()
    assert made.largest() == 6 * 5000 and (5000, 4) not in made.shapes
    expected = F.cross_entropy(F.linear(*ref), torch.arange(6), reduction="sum")
    torch.testing.assert_close(loss.detach(), expected.detach())
    if trains in names:
        expected.backward()
        for x, want in zip(ours, ref, strict=True):
            torch.testing.assert_close(x.grad, want.grad, atol=1e-4, rtol=1e-4)
    else:
        assert not loss.requires_grad and (6, 4) not in made.shapes


def test_no_tensor_of_labels_times_vocabulary_lives():
    rows, vocab = 1024, 2**15  # 2**25 logits, in chunks of 2**24
    (x, weight), _ = leaves_of((rows, 8), (vocab, 8))
    with Made() as made:
        M.linear_cross_entropy(x, weight, None, torch.arange(rows))[0].backward()
    assert made.largest() <= 2**24 < rows * vocab


def test_linear_cross_entropy_in_bf16():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 32, generator=g), torch.randn(500, 32, generator=g) * 0.3
    targets = torch.randint(500, (200,), generator=g)
    ours = [t.bfloat16().requires_grad_() for t in (x, w)]
    ref = [t.detach().float().requires_grad_() for t in ours]
    loss, _ = M.linear_cross_entropy(*ours, None, targets)
    expected = F.cross_entropy(F.linear(*ref), targets, reduction="sum")
    (loss + expected).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=3e-3)
    for a, b in zip(ours, ref, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.float() - b.grad).norm() <= 1e-2 * b.grad.norm()


@pytest.mark.parametrize("family", ["llama", "modernbert", "neobert"])
def test_model_loss_is_the_cross_entropy_of_its_logits(family):
    """Tied and untied: the gradient of the embedding is that of both its uses."""
    model = tiny(family)
    rows, targets = torch.tensor([0, 3, 8, 9, 44, 113]), torch.arange(5, 11)
    parameters = dict(model.named_parameters())
    loss, _ = model(DOC_TOKENS, DOC_SEQS, rows=rows, targets=targets)
    found = torch.autograd.grad(loss, parameters.values())
    logits = model(DOC_TOKENS, DOC_SEQS, rows=rows)
    assert torch.equal(logits, model.logits(model(DOC_TOKENS, DOC_SEQS)[rows]))
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, parameters.values())
    for name, a, b in zip(parameters, found, wanted):
        assert (a - b).norm() <= 1e-5 * b.norm(), name


# ---- checkpointing, compile, dropout ----
def train_gradients(model, seed=0, lengths=DOCS):
    torch.manual_seed(seed)
    model.zero_grad()
    tokens = random_tokens(lengths)
    rows = torch.arange(0, len(tokens), 3)
    loss, _ = model.train()(tokens, make_seqs(lengths), rows=rows, targets=tokens[rows])
    loss.backward()
    return loss.item(), {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_nothing(family, dropout):
    model = tiny(family, attn_dropout=dropout, out_dropout=dropout)
    loss, grads = train_gradients(model)
    model.gradient_checkpointing = True
    again, grads2 = train_gradients(model)
    assert loss == again
    for name in grads:
        assert torch.equal(grads[name], grads2[name]), name
    if dropout:
        assert train_gradients(model, seed=1)[0] != loss


@pytest.mark.parametrize("family, compiler", [
    # the compiler's front half, which needs no C compiler: what is recompiled shows here
    ("modernbert", "aot_eager"), pytest.param("qwen3", "aot_eager", marks=pytest.mark.slow),
    pytest.param("modernbert", "inductor", marks=pytest.mark.slow),
    pytest.param("llama", "inductor", marks=pytest.mark.slow)])  # fmt: skip
def test_compiled_blocks_change_nothing_and_are_compiled_once(family, compiler):
    from torch._dynamo.utils import counters

    try:
        torch.compile(lambda x: x.sin() + 1, backend=compiler)(torch.ones(3))
    except Exception as e:  # whatever is missing on this machine
        assert compiler == "inductor"
        pytest.skip(f"no compiler works here: {type(e).__name__}")
    torch._dynamo.reset()
    model = tiny(family, n_layer=10, layer_kinds=(["global", "local", "local"] * 4)[:10], window=3)
    plain = [train_gradients(model, lengths=n) for n in (DOCS, [114], [57, 57])]
    s = SimpleNamespace(compile=True, compile_backend=compiler, fsdp="", world_size=1)
    common.wrap(model, model.blocks, s)
    # ten blocks of a few kinds: past dynamo's limit of recompiles the rest would run uncompiled
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = [train_gradients(model)]
    graphs = counters["stats"]["unique_graphs"]
    # other texts in a row of the same T: what was compiled serves, or this raises
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [train_gradients(model, lengths=n) for n in ([114], [57, 57])]
    assert counters["stats"]["unique_graphs"] == graphs > 0
    torch._dynamo.reset()
    for a, b in zip(found, plain, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        for name, expected in b[1].items():
            assert (a[1][name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("kind", ["attn", "out"])
@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_dropout_acts_in_training_only_and_is_saved_only_if_the_model_has_it(
    family, kind, tmp_path
):
    plain, changed = tiny(family), tiny(family)
    built = tiny(family, **{f"{kind}_dropout": 0.3})
    changed.set_dropout(**{kind: 0.3})
    with torch.no_grad():
        assert torch.equal(plain.train()(DOC_TOKENS, DOC_SEQS), our_hidden(plain, DOC_TOKENS, DOCS))
        for model in (built, changed):
            assert torch.equal(our_hidden(model, DOC_TOKENS, DOCS), plain(DOC_TOKENS, DOC_SEQS))
            a, b = model.train()(DOC_TOKENS, DOC_SEQS), model(DOC_TOKENS, DOC_SEQS)
            assert not torch.equal(a, b)
    key, values = {"attn": "attention_dropout", "out": "attention_out_dropout"}[kind], []
    for model in (plain, changed, built):
        HF.save_pretrained(model, tmp_path)
        values.append(config_of(tmp_path).get(key, 0.0))
    has_key = kind == "attn" or family == "modernbert"  # Llama's config has no other
    assert values == [0.0, 0.0, 0.3 if has_key else 0.0]


def test_out_dropout_acts_on_the_attention_block_alone():
    """At p = 1 attention adds nothing: each token stays by itself, and the MLP still works."""
    model, tokens = tiny("llama", out_dropout=1.0).train(), random_tokens([12])
    with torch.no_grad():
        together, apart = model(tokens, make_seqs([12])), model(tokens, make_seqs([1] * 12))
        model.embed.weight.zero_()
        assert not torch.equal(together, model(tokens, make_seqs([12])))
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)])
def test_attention_dropout_drops_probabilities_and_keeps_their_mean(window):
    torch.manual_seed(0)
    n, copies, p = 6, 20_000, 0.4
    q, k, v = (torch.randn(n, 1, 4).repeat(copies, 1, 1) for _ in range(3))
    out = A.attention(q, k, v, make_seqs([n] * copies), False, window, p).view(copies, n, 4)
    expected = A.attention(q[:n], k[:n], v[:n], make_seqs([n]), False, window).view(n, 4)
    error = out.std(0) / copies**0.5
    assert ((out.mean(0) - expected).abs() < 5 * error).all() and (out.std(0) > 0.05).all()


# ---- sizes and fresh weights ----
@pytest.mark.parametrize("size", [s for s in M.SIZES if not s.endswith("tiny")])
def test_named_sizes_have_the_named_number_of_parameters(size):
    with torch.device("meta"):
        model = M.Transformer(M.ModelConfig(**M.SIZES[size]))
    n, name = sum(p.numel() for p in model.parameters()), size.rsplit("-", 1)[1]
    assert abs(n / (int(name[:-1]) * {"m": 10**6, "b": 10**9}[name[-1]]) - 1) < 0.1
    assert f"{n / 1e6:.1f}M weights, {n / 1e6:.3f}M trained" in model.describe()


_FRESH = {"llama-tiny": "normal", "qwen3-tiny": "normal", "modernbert-tiny": "megatron",
          "neobert-250m": "uniform"}  # fmt: skip


@pytest.mark.parametrize("size", _FRESH)
def test_fresh_weights(size):
    changes = dict(n_layer=4, n_embd=240, n_hidden=320, vocab_size=2000) if "neo" in size else {}
    torch.manual_seed(0)
    model = M.from_scratch(size, **changes)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            constant = 0.0 if name.endswith(".bias") else 1.0
            assert (p == constant).all(), f"{name} is not {constant}"
            continue
        std, init = 0.02, _FRESH[size]
        out = ("o_proj.weight", "down_proj.weight")  # head.dense is none: it starts like the rest
        if init == "megatron" and name.endswith(out):
            std /= math.sqrt(2 * model.config.n_layer)
        bound, expected = {"normal": (math.inf, std), "uniform": (0.02, 0.02 / math.sqrt(3)),
                           "megatron": (2 * std, 0.8796 * std),  # what a normal cut at 2 sigma has
        }[init]  # fmt: skip
        assert p.abs().max() <= bound, name
        assert p.abs().max() > (3 * std if init == "normal" else 0.95 * bound), name
        few = 5 / math.sqrt(2 * p.numel())  # five standard errors of a standard deviation
        assert p.std().item() == pytest.approx(expected, rel=few), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


def test_from_scratch_takes_changes_and_names_what_it_knows():
    torch.manual_seed(0)
    a = M.from_scratch("modernbert-tiny", vocab_size=50, n_embd=64, n_hidden=32)
    assert a.embed.weight.shape == (50, 64) and not a.config.causal
    assert [a.config.window_of(i) for i in range(3)] == [(-1, -1), (64, 64), (64, 64)]
    b = M.from_scratch("ettin-17m", vocab_size=50, causal=True)
    assert b.config.family == "modernbert-decoder" and hasattr(b.blocks[0].attn, "q_proj")
    assert [b.config.window_of(i) for i in range(3)] == [(-1, 0), (63, 0), (63, 0)]
    raises(ValueError, "ettin-18m.*ettin-17m", M.from_scratch, "ettin-18m")
    raises(TypeError, "n_layers", M.from_scratch, "llama-tiny", n_layers=2)
    with pytest.raises(ValueError, match="3.*6|6.*3"):  # as many layer_kinds as layers
        M.from_scratch("modernbert-tiny", n_layer=3)


@pytest.mark.parametrize("family, window", [
    ("llama", 4), ("neobert", 4), ("mistral", 4), ("modernbert", 0)])  # fmt: skip
def test_windows_that_a_folder_cannot_keep_are_refused(family, window):
    """config.json of Llama and NeoBERT has no windows, Mistral's one for all layers."""
    raises(ValueError, f"{family}.*local", tiny, family, layer_kinds=_KINDS, window=window)


def test_flops_count_what_multiplies():
    model = tiny("llama")
    n = sum(p.numel() for k, p in model.named_parameters() if "proj" in k)
    # causal: half of a text is seen on average; 12 = 2 products x 2 flops x (forward + 2 backward)
    assert model.flops_per_token(128) == 6 * n + 12 * 32 * 4 * 64
    local = tiny("modernbert").flops_per_token(128) - tiny("modernbert").flops_per_token(0)
    assert local == 12 * 32 * (2 * 128 + 2 * 7) - 12 * 32 * 0  # two global layers, two of 3 + 1 + 3


# ---- folders, errors and warnings ----
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama folder, never written to after this."""
    path = tmp_path_factory.mktemp("llama")
    HF.save_pretrained(tiny("llama"), path)
    return path


K_PROJ = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize("family, add, drop, message", [
    ("llama", {}, K_PROJ, rf"{K_PROJ}.*missing"),
    ("llama", {"model.layers.0.extra.weight": (2,)}, "", "layers.0.extra.weight"),
    ("llama", {"score": (2,)}, "", "score"),
    ("llama", {"model.layers.9.mlp.up_proj.weight": (2,)}, "", "layers.9.mlp.up_proj.weight"),
    ("llama", {K_PROJ: (3, 5)}, "", rf"{K_PROJ}.*\(3, 5\).*\(16, 32\)"),
    ("modernbert", {}, "head.dense.weight", "head.dense.weight.*missing"),
    # names with "model." come from a model with a head: without its weights it is broken
    ("mistral", {}, "lm_head.weight", "lm_head.weight.*missing")])  # fmt: skip
def test_wrong_tensors_are_named(family, add, drop, message, tmp_path):
    HF.save_pretrained(tiny(family), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path) | {name: torch.ones(shape) for name, shape in add.items()}
    save_file({name: w for name, w in state.items() if name != drop}, path)
    raises(ValueError, message, HF.from_pretrained, tmp_path)


def test_bad_configs_and_arguments_are_named(folder):
    for change, message in (
        (dict(model_type="gpt9"), "gpt9.*llama"), (dict(hidden_act="relu6"), "relu6.*silu"),
        (dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), "longrope.*yarn")):
        raises(ValueError, message, HF.config_from_hf, config_of(folder) | change)
    raises(ValueError, "sideways.*causal", HF.from_pretrained, folder, attention="sideways")
    with pytest.raises(ValueError, match="window"):  # a Llama has no local layers
        HF.from_pretrained(folder, window=8)
    assert HF.from_pretrained(folder, window=0).config.layer_kinds == ["global"] * 4


def test_names_of_folders_and_of_the_hub(folder, tmp_path, monkeypatch):
    asked = []

    def download(repo, revision, patterns):
        asked.append((repo, revision))
        if repo == "out/missing":
            raise OSError("404")
        return str(folder)

    monkeypatch.setattr(HF, "snapshot", download)
    for name in ("missing", "./missing", "/tmp/missing/model", "a/b/c", "~/missing"):
        raises(FileNotFoundError, name, HF.from_pretrained, name)
    assert not asked  # none of these went to the hub
    HF.from_pretrained("owner/name")
    HF.from_pretrained("owner/name@step599525")
    assert asked == [("owner/name", None), ("owner/name", "step599525")]
    with pytest.raises(OSError, match="out/missing.*no such folder"):  # a mistyped path, perhaps
        HF.from_pretrained("out/missing")
    write_json(config_of(folder), tmp_path, "config.json")
    raises(FileNotFoundError, "no model.*safetensors", HF.from_pretrained, tmp_path)


def test_a_name_is_pinned_to_the_checkpoint_that_it_means_now(tmp_path):
    """`final` is a link that moves on to later checkpoints, and is never the newest by itself."""
    for name in ("step9", "step10"):
        HF.save_pretrained(tiny("llama"), tmp_path / name)
    (tmp_path / "final").symlink_to("step9")
    final, newest = str(tmp_path / "final"), str(tmp_path / "step10")
    assert HF.resolve_folder(str(tmp_path)) == HF.pinned(str(tmp_path)) == newest
    assert HF.resolve_folder(final) == final
    assert HF.pinned(final) == HF.pinned(final + "/") == str(tmp_path / "step9")
    assert HF.pinned(newest) == newest and HF.pinned("owner/name@main") == "owner/name@main"


def fake_varlen(q, k, v, window_size, enable_gqa):
    raise AssertionError("not called")


def ungrouped_varlen(q, k, v, window_size):
    raise AssertionError("not called")


_BOTH, _VARLEN, _UNGROUPED = (fake_varlen,) * 2, (None, fake_varlen), (None, ungrouped_varlen)
_BF16, _GROUPED, _DROPOUT = dict(dtype=torch.bfloat16), dict(gqa=True), dict(dropout_p=0.1)


@pytest.mark.parametrize("installed, wanted, device, settings, outcome", [
    (_BOTH, "auto", "cpu", {}, "sdpa"), (_BOTH, "auto", "cuda", {}, "sdpa"),
    (_BOTH, "flsh", "cpu", {}, "!flsh.*flash_attn.*varlen.*sdpa"),
    (_BOTH, "flash_attn", "cpu", _BF16, "!flash_attn.*CUDA.*cpu"),
    (_BOTH, "varlen", "cpu", _BF16, "!varlen.*CUDA.*cpu"),
    (_BOTH, "flash_attn", "cuda", {}, "!flash_attn.*float32"),
    (_BOTH, "varlen", "cuda", {}, "!varlen.*float32"),
    (_BOTH, "flash_attn", "cuda", _BF16, "flash_attn"), (_BOTH, "varlen", "cuda", _BF16, "varlen"),
    (_BOTH, "auto", "cuda", _BF16 | _DROPOUT, "flash_attn"),  # the first, and it can do dropout
    (_VARLEN, "flash_attn", "cuda", _BF16, "!flash_attn.*not installed"),
    (_VARLEN, "auto", "cuda", _BF16, "varlen"),
    (_VARLEN, "varlen", "cuda", _BF16 | _DROPOUT, "!varlen.*dropout"),
    (_VARLEN, "auto", "cuda", _BF16 | _DROPOUT, "sdpa"),
    # older torch: no grouped heads, no window, nothing at all
    (_UNGROUPED, "varlen", "cuda", _BF16, "varlen"),
    (_UNGROUPED, "varlen", "cuda", _BF16 | _GROUPED, "!varlen.*grouped heads"),
    ((None, None), "varlen", "cuda", _BF16, "!varlen"),
    # heads and GPUs that the kernels would refuse in the first step; flash-attn pads heads
    (_VARLEN, "varlen", "cuda", _BF16 | dict(head_dim=20), "!varlen.*multiple of 8.*20"),
    (_VARLEN, "auto", "cuda", _BF16 | dict(head_dim=20), "sdpa"),
    (_BOTH, "auto", "cuda", _BF16 | dict(head_dim=20), "flash_attn"),
    (_BOTH, "flash_attn", "cuda", _BF16 | dict(head_dim=264), "!flash_attn.*256.*264"),
    (_BOTH, "auto", "cuda", _BF16 | dict(head_dim=264), "sdpa"),
    (_BOTH, "varlen", "cuda", _BF16 | dict(capability=(7, 5)), r"!varlen.*8\.0.*\(7, 5\)"),
    (_BOTH, "auto", "cuda", _BF16 | dict(capability=(7, 5)), "sdpa")])  # fmt: skip
def test_backends_that_cannot_run_say_why(
    installed, wanted, device, settings, outcome, monkeypatch
):
    monkeypatch.setattr(A, "flash_attn_varlen_func", installed[0])
    monkeypatch.setattr(A, "varlen_attn", installed[1])
    device, settings = torch.device(device), dict(dtype=torch.float32) | settings
    capability = settings.pop("capability", (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if outcome.startswith("!"):
        raises(ValueError, outcome[1:], A.choose_backend, wanted, device, **settings)
    else:
        assert A.choose_backend(wanted, device, **settings) == outcome


def test_a_model_that_trains_asks_for_its_dropout(monkeypatch):
    monkeypatch.setattr(A, "flash_attn_varlen_func", None)
    monkeypatch.setattr(A, "varlen_attn", fake_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = tiny("llama", attn_dropout=0.1)
    cases = ((True, 0.1, "sdpa"), (False, 0.1, "varlen"), (True, 0.0, "varlen"))
    for training, dropout, backend in cases:
        model.set_dropout(attn=dropout)
        model.train(training).set_backend("auto", torch.device("cuda"), torch.bfloat16)
        assert f"attention by {backend}" in model.describe()
    model = tiny("llama", head_dim=12)
    model.set_backend("auto", torch.device("cuda"), torch.bfloat16)
    assert model.backend == "sdpa"


def test_one_warning_for_texts_that_are_too_long():
    model = tiny("llama", max_seq_len=1000)
    tokens, seqs = random_tokens([1001]), make_seqs([1001])
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(tokens[:1000], make_seqs([1000]))
        assert not caught
        model(tokens, seqs)
        model(tokens, seqs)
    [warning] = caught
    assert "1,001" in str(warning.message) and "1,000" in str(warning.message)


# ---- new tokens ----
@pytest.mark.parametrize("family", ["llama", "mistral", "modernbert", "neobert"])
def test_resize_vocab(family, tmp_path):
    model = tiny(family)
    tied, bias = model.config.tied, model.config.head_bias
    before = {k: v.clone() for k, v in model.state_dict().items()}
    logits = our_logits(model, DOC_TOKENS, DOCS)
    model.resize_vocab(VOCAB + 3)
    names = ["embed.weight", "lm_head.weight"] + ["lm_head.bias"] * bias
    for name, w in model.state_dict().items():
        assert torch.equal(w[:VOCAB] if name in names else w, before[name]), name
        if name in names:
            assert len(w) == VOCAB + 3
            mean = before[name].double().mean(0).float()
            for row in w[VOCAB:]:
                torch.testing.assert_close(row, mean)
    assert (model.lm_head.weight is model.embed.weight) == tied
    torch.testing.assert_close(our_logits(model, DOC_TOKENS, DOCS)[:, :VOCAB], logits)
    assert all(p.requires_grad for p in model.parameters())
    # a new token trains, in the head too
    new = torch.tensor([VOCAB + 2])
    model(new, make_seqs([1]), rows=torch.tensor([0]), targets=new)[0].backward()
    assert model.embed.weight.grad[VOCAB + 2].any()
    HF.save_pretrained(model, tmp_path)
    again = HF.from_pretrained(tmp_path)
    assert torch.equal(our_logits(again, new, [1]), our_logits(model, new, [1]))
    raises(ValueError, "40.*100", model.resize_vocab, 40)


def test_without_a_head_there_are_no_logits_and_a_frozen_embedding_grows():
    model = tiny("llama", head="none")
    raises(ValueError, "head", model, random_tokens([4]), make_seqs([4]), rows=torch.arange(2))
    model.embed.weight.requires_grad_(False)
    model.resize_vocab(VOCAB + 1)
    assert model.embed.weight.shape == (VOCAB + 1, 32) and not model.embed.weight.requires_grad


def test_weights_gathered_elsewhere_are_what_is_saved(tmp_path):
    """FSDP hands over a full state_dict; a tied head may be in it twice."""
    model = tiny("modernbert")
    state = {k: v + 1 for k, v in model.state_dict().items()}
    HF.save_pretrained(model, tmp_path, state)
    for name, w in HF.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(w, state[name]), name


# ---- bf16 ----
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family):
    model, rows = tiny(family), torch.arange(0, len(DOC_TOKENS), 3)
    hidden = our_hidden(model, DOC_TOKENS, DOCS)
    plain, expected = train_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        near = model(DOC_TOKENS, DOC_SEQS)
        loss, _ = model(DOC_TOKENS, DOC_SEQS, rows=rows, targets=DOC_TOKENS[rows])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain, rel=0.02)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        cosine = F.cosine_similarity(p.grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, f"{name}: {cosine:.3f}"
    size = hidden.norm()
    assert (near - hidden).norm() < 0.03 * size
    model = model.bfloat16()
    with torch.no_grad():
        low, logits = model(DOC_TOKENS, DOC_SEQS), model(DOC_TOKENS, DOC_SEQS, rows=rows)
    assert low.dtype == logits.dtype == torch.bfloat16
    assert (low.float() - hidden).norm() < 0.03 * size


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_work_in_fp32(kind):
    """bf16 in and out, rounded once; the weight of a norm in fp32 is not rounded at all."""
    g, norm = torch.Generator().manual_seed(0), M.Norm(64, kind, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=g))
    x = torch.randn(50, 64, generator=g).bfloat16()
    wide = x.double() - (x.double().mean(1, keepdim=True) if kind == "layer" else 0)
    expected = wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    wrong = (norm(x) != expected.bfloat16()).float().mean()
    assert norm(x).dtype == torch.bfloat16 and wrong < 0.001  # fp32 at the edge of a rounding


def test_folder_in_bf16(tmp_path):
    model = tiny("llama").bfloat16()
    HF.save_pretrained(model, tmp_path)
    assert config_of(tmp_path)["dtype"] == "bfloat16"
    for dtype, expected in ((torch.float32, torch.float32), (None, torch.bfloat16),
                            (torch.bfloat16, torch.bfloat16)):  # fmt: skip
        again = HF.from_pretrained(tmp_path, dtype=dtype)
        assert all(p.dtype == expected and p.requires_grad for p in again.parameters())
    model.norm.float()  # of several types the widest holds them all
    HF.save_pretrained(model, tmp_path)
    assert HF.stored_dtype(tmp_path) == torch.float32
