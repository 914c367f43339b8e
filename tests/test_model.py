"""model.py against the truth: transformers, brute force, fp64 and plain references.

    pytest tests/test_model.py            # 20 seconds on 2 CPU cores
    pytest tests/test_model.py --slow     # and the real compiler

On a machine with CUDA the attention tests run every backend that is there.
"""

import json
import math
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import model as M
from data import make_seqs

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


def random_tokens(lengths, seed=0, low=3):
    return torch.randint(low, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


# ---- transformers ----

_SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4,
)  # fmt: skip
_GQA = _SMALL | dict(num_key_value_heads=2, max_position_embeddings=512)
_MB = _SMALL | dict(
    max_position_embeddings=512, local_attention=12, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=64,
)  # fmt: skip
_YARN = dict(
    rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=128
)
_BIASES = dict(attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True)
_THETAS = dict(
    rope_parameters={
        "full_attention": dict(rope_type="default", rope_theta=50_000.0),
        "sliding_attention": dict(rope_type="default", rope_theta=700.0),
    }
)
_KINDS = ["global", "local", "local", "global"]
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_GQA, rms_norm_eps=1e-3)),
    "llama3-tied": (
        LlamaForCausalLM,
        LlamaConfig(**_GQA, tie_word_embeddings=True, head_dim=32, rope_parameters=_LLAMA3),
    ),
    "llama-linear-biases": (
        LlamaForCausalLM,
        LlamaConfig(
            **_GQA, attention_bias=True, mlp_bias=True, hidden_act="gelu",
            rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0),
        ),  # fmt: skip
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**_GQA, sliding_window=9)),
    "mistral-global": (MistralForCausalLM, MistralConfig(**_GQA, sliding_window=None)),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**_GQA, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    ),
    "qwen2-yarn": (Qwen2ForCausalLM, Qwen2Config(**_GQA, rope_parameters=_YARN)),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config(**_GQA, head_dim=24, tie_word_embeddings=True)),
    "qwen3-untied": (Qwen3ForCausalLM, Qwen3Config(**_GQA, head_dim=24, attention_bias=True)),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig(**_MB, **_THETAS)),
    "modernbert-untied-biases": (
        ModernBertForMaskedLM,
        ModernBertConfig(**_MB, **_BIASES, tie_word_embeddings=False, norm_eps=1e-3),
    ),
    "modernbert-no-decoder-bias": (
        ModernBertForMaskedLM, ModernBertConfig(**_MB, decoder_bias=False)
    ),  # fmt: skip
    "modernbert-decoder": (
        ModernBertDecoderForCausalLM, ModernBertDecoderConfig(**_MB, **_THETAS)
    ),  # fmt: skip
    "modernbert-decoder-untied-biases": (
        ModernBertDecoderForCausalLM,
        ModernBertDecoderConfig(**_MB, **_BIASES, tie_word_embeddings=False),
    ),
}  # fmt: skip


def theirs(case, causal=None, **changes):
    """transformers' model of a case, randomized."""
    cls, config = CASES[case]
    config = type(config)(**(config.to_dict() | changes))
    if causal is False and config.model_type != "modernbert":
        config.is_causal = False
    torch.manual_seed(0)
    return randomize(cls(config))


def padded(tokens, lengths):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)  # [B, longest]
    mask = torch.zeros_like(ids)
    for i, text in enumerate(tokens.split(lengths)):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return dict(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def their_output(model, tokens, lengths=LENGTHS, field="logits"):
    out = getattr(model(**padded(tokens, lengths)), field)
    return torch.cat([out[i, :n] for i, n in enumerate(lengths)])  # [T, V or C]


@torch.no_grad()
def our_logits(model, tokens, lengths=LENGTHS):
    return model.eval()(tokens, make_seqs(lengths), rows=torch.arange(len(tokens)))


@torch.no_grad()
def our_hidden(model, tokens, lengths=LENGTHS):
    return model.eval()(tokens, make_seqs(lengths))


def edit_config(folder, drop=(), **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        config = json.load(f)
    with open(path, "w") as f:
        json.dump({k: v for k, v in config.items() if k not in drop} | changes, f)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


_BOTH = [(case, causal) for case in CASES for causal in (True, False)]
_PARITY = [(k, c) for k, c in _BOTH if not (c and CASES[k][1].model_type == "modernbert")]


@pytest.mark.parametrize("case, causal", _PARITY)
def test_logits_equal_transformers_and_folders_go_both_ways(case, causal, tmp_path):
    hf = theirs(case, causal)
    hf.save_pretrained(tmp_path)
    ours = M.from_pretrained(str(tmp_path))
    assert ours.config.causal == causal
    tokens = random_tokens(LENGTHS)
    want = their_output(hf, tokens)
    assert want.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(our_logits(ours, tokens), want, atol=TOLERANCE, rtol=0)

    ours.save_pretrained(str(tmp_path / "again"))
    back = type(hf).from_pretrained(tmp_path / "again").eval()
    assert_same_weights(back, hf)
    assert torch.equal(their_output(back, tokens), want)
    with open(tmp_path / "config.json") as a, open(tmp_path / "again" / "config.json") as b:
        before, after = json.load(a), json.load(b)
    for key in before.keys() & after.keys() - {"layer_types", "sliding_window", "is_causal"}:
        assert after[key] == before[key], key


@pytest.mark.parametrize("case", ["llama3-tied", "qwen3-untied", "modernbert-decoder"])
def test_injected_vectors_equal_inputs_embeds(case, tmp_path):
    """Vectors in place of the first and another token: logits and the vectors' gradients."""
    other = theirs(case)
    other.save_pretrained(tmp_path)
    model = M.from_pretrained(tmp_path).eval()
    lengths, generator = [5, 30], torch.Generator().manual_seed(0)
    tokens, at = random_tokens(lengths), torch.tensor([0, 5, 12])
    vectors = torch.randn(3, 64, generator=generator).requires_grad_()
    rows = torch.arange(len(tokens))
    logits = model(tokens, make_seqs(lengths), rows, vectors=vectors, at=at)
    embeds = other.get_input_embeddings()(tokens)
    kept = vectors.detach().clone().requires_grad_()
    embeds = torch.stack([kept[at.tolist().index(i)] if i in at else embeds[i] for i in rows])
    want = [other(inputs_embeds=x[None]).logits[0] for x in embeds.split(lengths)]
    want = torch.cat(want)
    assert (logits - want).abs().max() < TOLERANCE
    probe = torch.randn(want.shape, generator=generator)
    ((logits * probe).sum()).backward()
    ((want * probe).sum()).backward()
    assert (vectors.grad - kept.grad).abs().max() < 1e-3 * kept.grad.abs().max()
    changed = torch.where(torch.isin(rows, at), 3, tokens)  # what stood there does not matter
    again = model(changed, make_seqs(lengths), rows, vectors=vectors, at=at)
    assert torch.equal(again, logits)


@pytest.mark.parametrize("case", ["llama", "modernbert", "modernbert-decoder", "qwen3-untied"])
def test_base_folder_gives_a_model_without_a_head(case, tmp_path):
    hf = theirs(case)
    hf.base_model.save_pretrained(tmp_path)  # what AutoModel saves: no "model." before the names
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert not any(k.startswith("model.") for k in keys)
    ours = M.from_pretrained(str(tmp_path))
    assert ours.config.head == "none" and not hasattr(ours, "lm_head")
    tokens = random_tokens(LENGTHS)
    want = their_output(hf.base_model, tokens, field="last_hidden_state")
    torch.testing.assert_close(our_hidden(ours, tokens), want, atol=TOLERANCE, rtol=0)
    ours.save_pretrained(str(tmp_path / "again"))
    back = AutoModel.from_pretrained(tmp_path / "again").eval()
    assert type(back) is type(hf.base_model)
    assert_same_weights(back, hf.base_model)


def test_sharded_and_old_bin_folders(tmp_path):
    hf = theirs("llama")
    tokens = random_tokens(LENGTHS)
    want = their_output(hf, tokens)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ours = M.from_pretrained(str(tmp_path / "shards"))
    torch.testing.assert_close(our_logits(ours, tokens), want, atol=TOLERANCE, rtol=0)
    # saving over the shards leaves none behind
    ours.save_pretrained(str(tmp_path / "shards"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 1

    (tmp_path / "bin").mkdir()
    hf.config.save_pretrained(tmp_path / "bin")
    state = hf.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    ours = M.from_pretrained(str(tmp_path / "bin"))
    torch.testing.assert_close(our_logits(ours, tokens), want, atol=TOLERANCE, rtol=0)


_OLD_ROPE = {  # the keys of older files and what they mean today
    "linear": (
        dict(rope_theta=5e4, rope_scaling=dict(type="linear", factor=4.0)),
        dict(rope_type="linear", rope_theta=5e4, factor=4.0),
    ),
    "llama3": (
        dict(rope_theta=5e5, rope_scaling={k: _LLAMA3[k] for k in _LLAMA3 if k != "rope_theta"}),
        _LLAMA3,
    ),
    "yarn": (
        dict(
            rope_theta=1e4,
            rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=128),
        ),
        _YARN,
    ),
    "none": (dict(rope_theta=3e3, rope_scaling=None), dict(rope_type="default", rope_theta=3e3)),
}


@pytest.mark.parametrize("kind", _OLD_ROPE)
def test_old_rope_keys(kind, tmp_path):
    old, new = _OLD_ROPE[kind]
    hf = theirs("llama", rope_parameters=new)
    hf.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("rope_parameters", "dtype"), torch_dtype="float32", **old)
    ours = M.from_pretrained(str(tmp_path))
    tokens = random_tokens(LENGTHS)
    want = their_output(hf, tokens)
    torch.testing.assert_close(our_logits(ours, tokens), want, atol=TOLERANCE, rtol=0)
    ours.save_pretrained(str(tmp_path / "again"))  # in the new keys, once
    with open(tmp_path / "again" / "config.json") as f:
        config = json.load(f)
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & config.keys()
    back = LlamaForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(their_output(back, tokens), want)


@pytest.mark.parametrize("use", [True, False])
def test_old_qwen2_window_keys(use, tmp_path):
    hf = theirs("qwen2", use_sliding_window=use, layer_types=None)
    assert len(set(hf.config.layer_types)) == 1 + use
    hf.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("layer_types",), sliding_window=7)  # old files give it unused, too
    tokens = random_tokens(LENGTHS)
    got = our_logits(M.from_pretrained(str(tmp_path)), tokens)
    torch.testing.assert_close(got, their_output(hf, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["modernbert", "modernbert-decoder"])
@pytest.mark.parametrize("local", [700.0, None])
def test_old_modernbert_keys(case, local, tmp_path):
    """`local_rope_theta: null` means the global theta (transformers 4's ModernBERT)."""
    rope = {
        "full_attention": dict(rope_type="default", rope_theta=5e4),
        "sliding_attention": dict(rope_type="default", rope_theta=local or 5e4),
    }
    kinds = ["full_attention" if i % 2 == 0 else "sliding_attention" for i in range(4)]
    hf = theirs(case, rope_parameters=rope, layer_types=kinds)
    hf.save_pretrained(tmp_path)
    edit_config(
        tmp_path, drop=("rope_parameters", "layer_types"), global_rope_theta=5e4,
        local_rope_theta=local, global_attn_every_n_layers=2,
    )  # fmt: skip
    tokens = random_tokens(LENGTHS)
    got = our_logits(M.from_pretrained(str(tmp_path)), tokens)
    torch.testing.assert_close(got, their_output(hf, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["modernbert", "modernbert-untied-biases"])
def test_encoder_read_as_causal_is_a_modernbert_decoder(case, tmp_path):
    hf = theirs(case)
    hf.save_pretrained(tmp_path)
    ours = M.from_pretrained(str(tmp_path), attention="causal")
    tokens = random_tokens(LENGTHS)
    got = our_logits(ours, tokens)
    ours.save_pretrained(str(tmp_path / "decoder"))
    decoder = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    torch.testing.assert_close(got, their_output(decoder, tokens), atol=TOLERANCE, rtol=0)
    # the same weights, and another mask
    wqkv = hf.model.layers[1].attn.Wqkv.weight
    attn = decoder.model.layers[1].attn
    parts = (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
    assert torch.equal(torch.cat(parts), wqkv)
    assert (got - their_output(hf, tokens)).abs().max() > 0.1


def test_decoder_read_as_bidirectional(tmp_path):
    theirs("modernbert-decoder").save_pretrained(tmp_path)
    ours = M.from_pretrained(str(tmp_path), attention="bidirectional")
    ours.save_pretrained(str(tmp_path / "both"))
    with open(tmp_path / "both" / "config.json") as f:
        config = json.load(f)
    assert config["is_causal"] is False and config["model_type"] == "modernbert-decoder"
    back = ModernBertDecoderForCausalLM.from_pretrained(tmp_path / "both").eval()
    tokens = random_tokens(LENGTHS)
    want = their_output(back, tokens)
    torch.testing.assert_close(our_logits(ours, tokens), want, atol=TOLERANCE, rtol=0)
    assert M.from_pretrained(str(tmp_path / "both")).config.causal is False


def test_overrides_on_reading(tmp_path):
    hf = theirs("modernbert")
    hf.save_pretrained(tmp_path)
    tokens = random_tokens(LENGTHS)
    long = dict(rope_type="linear", factor=2.0)
    ours = M.from_pretrained(
        str(tmp_path), window=4, rope_theta=3e3, rope_scaling=long, max_seq_len=999
    )
    rope = long | dict(rope_theta=3e3)
    want = theirs(
        "modernbert", local_attention=8,
        rope_parameters={"full_attention": rope, "sliding_attention": dict(rope)},
    )  # fmt: skip
    got = our_logits(ours, tokens)
    torch.testing.assert_close(got, their_output(want, tokens), atol=TOLERANCE, rtol=0)
    assert ours.config.max_seq_len == 999
    ours.save_pretrained(str(tmp_path / "again"))
    back = ModernBertForMaskedLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(got, their_output(back, tokens), atol=TOLERANCE, rtol=0)
    assert back.config.max_position_embeddings == 999

    ours = M.from_pretrained(str(tmp_path), window=0)
    want = theirs("modernbert", layer_types=["full_attention"] * 4)
    got = our_logits(ours, tokens)
    torch.testing.assert_close(got, their_output(want, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "size, causal, cls",
    [
        ("modernbert-tiny", False, ModernBertForMaskedLM),
        ("modernbert-tiny", True, ModernBertDecoderForCausalLM),
        ("llama-tiny", True, LlamaForCausalLM),
        ("llama-tiny", False, LlamaForCausalLM),
        ("qwen3-tiny", True, Qwen3ForCausalLM),
    ],
)
def test_from_scratch_saves_what_transformers_loads(size, causal, cls, tmp_path):
    torch.manual_seed(0)
    ours = randomize(M.from_scratch(size, causal=causal))
    # the tokenizer's, as the scripts do: ModernBERT's own lie beyond a small vocabulary
    ours.config.hf |= {k: _MB[k] for k in _MB if k.endswith("token_id")}
    ours.save_pretrained(str(tmp_path))
    hf = cls.from_pretrained(tmp_path).eval()
    tokens = random_tokens([80, 3])
    want = their_output(hf, tokens, [80, 3])
    # these are wider than the others: logits of 50
    torch.testing.assert_close(our_logits(ours, tokens, [80, 3]), want, atol=1e-3, rtol=1e-4)


# ---- NeoBERT, against the published layout ----


def neobert_state(n_layer=3, width=32, hidden=64, seed=0):
    """Random weights under the published names: with a head, "model." before the encoder's."""
    g = torch.Generator().manual_seed(seed)

    def w(*shape):
        return torch.randn(shape, generator=g) * 0.2

    state = {"model.encoder.weight": w(VOCAB, width), "model.layer_norm.weight": 1 + w(width)}
    for i in range(n_layer):
        state |= {
            f"model.transformer_encoder.{i}.{name}": tensor
            for name, tensor in {
                "qkv.weight": w(3 * width, width),
                "wo.weight": w(width, width),
                "ffn.w12.weight": w(2 * hidden, width),
                "ffn.w3.weight": w(width, hidden),
                "attention_norm.weight": 1 + w(width),
                "ffn_norm.weight": 1 + w(width),
            }.items()
        }
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
        w = {
            k.split(f".{i}.", 1)[1]: v
            for k, v in state.items()
            if k.startswith(f"model.transformer_encoder.{i}.")
        }
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


def neobert_folder(folder, state):
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    config = dict(
        model_type="neobert", architectures=["NeoBERTLMHead"], vocab_size=VOCAB, hidden_size=32,
        num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, max_length=512,
        norm_eps=1e-6, embedding_init_range=0.02,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_neobert_equals_the_published_layout_and_goes_back_bit_equal(tmp_path):
    state = neobert_state()
    table = {"model.freqs_cis": torch.ones(4, 4)}
    ours = M.from_pretrained(neobert_folder(tmp_path / "a", state | table))
    tokens = random_tokens(LENGTHS)
    want = torch.cat([neobert_reference(state, t) for t in tokens.split(LENGTHS)])
    assert want.std() > 0.5
    torch.testing.assert_close(our_logits(ours, tokens), want, atol=TOLERANCE, rtol=0)

    ours.save_pretrained(str(tmp_path / "b"))
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert back.keys() == state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key
    with open(tmp_path / "b" / "config.json") as f:
        config = json.load(f)
    assert (config["intermediate_size"], config["max_length"]) == (96, 512)
    assert config["embedding_init_range"] == 0.02  # not ours, passed on
    again = M.from_pretrained(str(tmp_path / "b"))
    assert torch.equal(our_logits(again, tokens), our_logits(ours, tokens))


def test_neobert_base_folder(tmp_path):
    state = neobert_state()
    base = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    table = {"freqs_cis": torch.ones(4, 4)}  # a name without a dot
    ours = M.from_pretrained(neobert_folder(tmp_path / "a", base | table))
    assert ours.config.head == "none"
    tokens = random_tokens(LENGTHS)
    logits = our_hidden(ours, tokens) @ state["decoder.weight"].T + state["decoder.bias"]
    want = torch.cat([neobert_reference(state, t) for t in tokens.split(LENGTHS)])
    torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)
    ours.save_pretrained(str(tmp_path / "b"))
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert back.keys() == base.keys() and all(torch.equal(back[k], base[k]) for k in base)


# ---- small models of each family, ours alone ----

_OURS = dict(vocab_size=VOCAB, n_layer=4, n_head=4, n_embd=32, n_hidden=48, max_seq_len=512)
_OURS_MB = _OURS | dict(
    layer_kinds=_KINDS, window=3, norm="layer", embed_norm=True,
    fused_mlp=True, activation="gelu", head="dense", head_bias=True,
)  # fmt: skip
FAMILIES = {
    "llama": _OURS | dict(n_kv_head=2),
    "mistral": _OURS | dict(n_kv_head=2, layer_kinds=["local"] * 4, window=4, tied=False),
    "qwen2": _OURS | dict(
        n_kv_head=1, qkv_bias=True, layer_kinds=["global", "global", "local", "local"], window=4),
    "qwen3": _OURS | dict(n_kv_head=2, qk_norm=True, head_dim=16),
    "modernbert": _OURS_MB | dict(causal=False, fused_qkv=True, norm_bias=True),
    "modernbert-decoder": _OURS_MB,
    "neobert": _OURS | dict(
        causal=False, rope_pairs="adjacent", fused_qkv=True, fused_mlp=True, tied=False,
        head_bias=True),
}  # fmt: skip


def tiny(family, **changes):
    config = M.ModelConfig(**(FAMILIES[family] | dict(family=family) | changes))
    torch.manual_seed(0)
    return randomize(M.Transformer(config))


_MASKS = [(f, c) for f in FAMILIES for c in (True, False)]
_MASKS = [(f, c) for f, c in _MASKS if not (c and f in ("modernbert", "neobert"))]


def backends():
    """What runs here: (name, device, type of q, k and v, tolerance relative to the largest value).

    bf16 has 8 bits: one rounding is 0.004, and a few of them follow one another.
    """
    out = [("sdpa", "cpu", torch.float32, 1e-5)]
    if torch.cuda.is_available():
        there = {"sdpa": True, "varlen": M.varlen_attn, "flash_attn": M.flash_attn_varlen_func}
        out += [(name, "cuda", torch.bfloat16, 2e-2) for name in there if there[name]]
    return out


@pytest.fixture(params=backends(), ids=lambda b: f"{b[0]}-{b[1]}")
def backend(request):
    return request.param


@pytest.mark.skipif(torch.cuda.is_available(), reason="they have run")
def test_cuda_backends():
    pytest.skip("no CUDA: varlen, flash_attn and sdpa in bf16 are not tested on this machine")


def assert_near(got, want, tolerance, name=""):
    error = (got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1)
    assert error <= tolerance, f"{name}: off by {error:.1e} of the largest"


# ---- attention ----


def brute_force(q, k, v, lengths, causal, window):
    """Masked softmax over the whole T x T square, in fp64. q [T, H, D], k, v [T, H_kv, D]."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    i = torch.arange(len(text), device=q.device)[:, None]
    j = i.T
    seen = text[:, None] == text[None]
    if causal:
        seen &= j <= i
    if window[0] >= 0:
        seen &= j >= i - window[0]
    if window[1] >= 0:
        seen &= j <= i + window[1]
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.size(-1) ** 0.5
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", probs, v)


_W = 16
_ATTENTION = [  # lengths, (left, right)
    ([37], (-1, -1)),
    ([5, 1, 40, 40, 40, 17], (-1, -1)),
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
    if causal and window[1] != 0:
        window = (window[0], 0)
    name, device, dtype, tolerance = backend
    g = torch.Generator().manual_seed(0)
    heads = (4, n_kv_head, n_kv_head)
    qkv = [torch.randn(sum(lengths), h, 16, generator=g).to(device, dtype) for h in heads]
    for x in qkv:
        x.requires_grad_(True)
    y = torch.randn(sum(lengths), 4, 16, generator=g).to(device, dtype)
    out = M.attention(*qkv, make_seqs(lengths, device), causal, window, 0.0, name)
    assert out.shape == (sum(lengths), 4, 16) and out.dtype == dtype
    got = torch.autograd.grad((out * y).sum(), qkv)
    ref = brute_force(*qkv, lengths, causal, window)
    want = torch.autograd.grad((ref * y).sum(), qkv)
    assert_near(out, ref, tolerance, "output")
    for name, a, b in zip("qkv", got, want, strict=True):
        assert_near(a, b, tolerance, f"gradient of {name}")


def test_long_windowed_texts_never_make_a_square():
    """4,096 tokens, 64 back and on: nothing near 4,096 x 4,096 may be made."""
    q = torch.randn(4096, 1, 8, requires_grad=True)
    with Made() as made:
        M.attention(q, q, q, make_seqs([4096]), False, (64, 64)).sum().backward()
    assert made.largest() < 4096 * 64


def test_neighbours_of_equal_length_go_in_one_call(monkeypatch):
    shapes, sdpa = [], F.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        shapes.append(q.shape)
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(5 + 3 * 7 + 5, 2, 4)
    M.attention(q, q, q, make_seqs([5, 7, 7, 7, 5]), False, (-1, -1))
    assert shapes == [(1, 2, 5, 4), (3, 2, 7, 4), (1, 2, 5, 4)]  # [texts, H, length, D]


def test_masks_made_in_inference_mode_serve_training():
    seqs, tokens, model = make_seqs([311]), random_tokens([311]), tiny("modernbert")
    with torch.inference_mode():
        model(tokens, seqs)
    model(tokens, seqs).sum().backward()


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


# ---- packed = each text alone ----

DOCS = [9, 1, 30, 30, 30, 14]


def outputs_and_gradients(model, tokens, lengths, y, backend="sdpa", device="cpu"):
    """Hidden states, and the gradients of sum(logits * y) by parameter name."""
    model.zero_grad()
    model.backend = backend
    seqs = make_seqs(lengths, device)
    rows = torch.arange(len(tokens), device=device)
    hidden = model(tokens, seqs)
    (model(tokens, seqs, rows=rows) * y).sum().backward()
    return hidden.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize("family, causal", _MASKS)
def test_packed_equals_each_text_alone(family, causal, monkeypatch):
    """Outputs and gradients of all parameters, in fp64: model.py's `.float()` made `.double()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = tiny(family, causal=causal).double()
    tokens, y = random_tokens(DOCS), torch.randn(sum(DOCS), VOCAB, dtype=torch.float64)
    hidden, grads = outputs_and_gradients(model, tokens, DOCS, y)
    alone = [
        outputs_and_gradients(model, t, [len(t)], y1)
        for t, y1 in zip(tokens.split(DOCS), y.split(DOCS), strict=True)
    ]
    torch.testing.assert_close(hidden, torch.cat([h for h, _ in alone]), atol=1e-11, rtol=1e-11)
    for name, grad in grads.items():
        want = sum(g[name] for _, g in alone)
        assert want.abs().max() > 0, name
        assert (grad - want).norm() <= 1e-11 * want.norm() + 1e-11, name


@pytest.mark.parametrize("family, causal", _MASKS)
def test_packed_equals_each_text_alone_on_every_backend(family, causal, backend):
    """In the precision of training; the texts alone always by sdpa."""
    name, device, dtype, tolerance = backend
    half = dtype is not torch.float32
    model = tiny(family, causal=causal).to(device)
    tokens = random_tokens(DOCS).to(device)
    y = torch.randn(sum(DOCS), VOCAB, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=half):
        hidden, grads = outputs_and_gradients(model, tokens, DOCS, y, name, device)
        alone = [
            outputs_and_gradients(model, t, [len(t)], y1, "sdpa", device)
            for t, y1 in zip(tokens.split(DOCS), y.split(DOCS), strict=True)
        ]
    # roundings add up over 4 layers
    assert_near(hidden, torch.cat([h for h, _ in alone]), 4 * tolerance, "hidden")
    for key, grad in grads.items():
        want = sum(g[key] for _, g in alone)
        assert (grad - want).norm() <= 4 * tolerance * want.norm(), key


def reach(config, lengths):
    """[T, T] bool: which inputs can change which outputs, by the masks of all layers."""
    square = torch.eye(sum(lengths), dtype=torch.bool)
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(len(text))[:, None], torch.arange(len(text))[None]
    for kind in config.layer_kinds:
        seen = text[:, None] == text[None]
        if config.causal:
            seen &= j <= i
        if kind == "local":  # Hugging Face's two meanings of one number
            seen &= (i - j < config.window) if config.causal else (i - j).abs() <= config.window
        square = (seen.float() @ square.float()) > 0
    return square


@pytest.mark.parametrize("lengths", [[20], [20, 1, 20, 20, 7]], ids=["one", "several"])
@pytest.mark.parametrize("family, causal", _MASKS)
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
    want = reach(model.config, lengths)
    if max(model.config.window, 1) == 1 or "global" in model.config.layer_kinds:
        assert want[0, lengths[0] - 1] == (not causal)  # the table itself says what it should
    y = torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(2)).to(device)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [(e - n, e - n // 2 - 1, e - 1) for n, e in zip(lengths, ends, strict=True)]
    for row in set(sum(rows, ())):  # first, middle and last of each text
        (grad,) = torch.autograd.grad((hidden[row] * y).sum(), inputs, retain_graph=True)
        assert torch.equal((grad != 0).any(1).cpu(), want[row]), f"row {row}"


@pytest.mark.parametrize("family, causal", _MASKS)
def test_a_changed_text_leaves_the_others_bit_equal(family, causal, backend):
    name, device, dtype, _ = backend
    model = tiny(family, causal=causal).to(device)
    model.backend = name
    tokens = random_tokens(DOCS).to(device)
    others = tokens.clone()
    start = sum(DOCS[:3])
    others[start : start + DOCS[3]] = random_tokens(DOCS[3:4], seed=1).to(device)
    half = dtype is not torch.float32
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        a, b = (model(t, make_seqs(DOCS, device)) for t in (tokens, others))
    changed = torch.zeros(len(tokens), dtype=torch.bool)
    changed[start : start + DOCS[3]] = True
    assert torch.equal(a[~changed], b[~changed])
    assert not torch.equal(a[changed], b[changed])


# ---- the loss over a vocabulary ----


def reference_loss(x, weight, bias, targets):
    """Sum and hits by F.cross_entropy, 64 rows at a time to spare memory; gradients by backward."""
    total, hits = 0.0, 0
    for x1, t1 in zip(x.split(64), targets.split(64), strict=True):
        logits = F.linear(x1, weight, bias)
        loss = F.cross_entropy(logits, t1, reduction="sum")
        (loss * 0.37).backward(retain_graph=True)
        total, hits = total + loss.item(), hits + (logits.argmax(1) == t1).sum().item()
    return total, hits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rows, vocab, chunks",
    [(1, 50, 1), (333, 101, 1), (256, 2**16, 1), (257, 2**16, 2), (9, 2**22, 3)],
)
def test_linear_cross_entropy(rows, vocab, chunks, bias):
    width = 3 if vocab > 2**20 else 12
    assert chunks == math.ceil(rows / (2**24 // vocab))  # on the CPU
    g = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (vocab, width), (vocab,)][: 3 if bias else 2]
    leaves = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    leaves[0] *= 3
    targets = torch.randint(vocab, (rows,), generator=g)
    # every other row gets its best answer, so that there are hits to count
    with torch.no_grad():
        for i in range(0, rows, 2):
            targets[i] = F.linear(leaves[0][i], *leaves[1:]).argmax()
    ours = [x.clone().requires_grad_(True) for x in leaves]
    ref = [x.clone().requires_grad_(True) for x in leaves]
    loss, hits = M.linear_cross_entropy(*ours[:2], ours[2] if bias else None, targets)
    (loss * 0.37).backward()
    want, want_hits = reference_loss(*ref[:2], ref[2] if bias else None, targets)
    assert loss.dtype == torch.float64 and hits.dtype == torch.int64
    assert loss.item() == pytest.approx(want, rel=1e-10) and hits.item() == want_hits
    for name, a, b in zip(("x", "weight", "bias"), ours, ref, strict=False):
        assert (a.grad - b.grad).norm() <= 1e-10 * b.grad.norm(), name


def test_linear_cross_entropy_with_extreme_logits():
    x = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, hits = M.linear_cross_entropy(x, weight, None, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4 and hits.item() == 1
    assert x.grad.tolist() == [[0.0], [-2.0]]


def test_hits_are_the_best_answers_and_no_near_ones():
    logits = torch.tensor([[1.0, 1.001, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 5.0]])  # x W^T, W = 1
    for targets, hits in (([0, 0, 2], 2), ([1, 1, 2], 3), ([2, 2, 0], 0)):  # a tie counts
        got = M.linear_cross_entropy(logits, torch.eye(3), None, torch.tensor(targets))[1]
        assert got.item() == hits


def test_no_labels_give_zero_and_connected_gradients():
    model = tiny("modernbert").train()
    none = torch.zeros(0, dtype=torch.long)
    loss, hits = model(random_tokens(DOCS), make_seqs(DOCS), rows=none, targets=none)
    assert loss.item() == 0 and hits.item() == 0
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


def test_frozen_weights_cost_nothing():
    """LoRA: the head does not train, so no [V, C] gradient is made."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, requires_grad=True)
    weight, bias = torch.randn(5000, 4), torch.randn(5000)
    targets = torch.arange(6)
    with Made() as made:
        M.linear_cross_entropy(x, weight, bias, targets)[0].backward()
    assert made.largest() == 6 * 5000 and (5000, 4) not in made.shapes
    want = x.detach().clone().requires_grad_(True)
    F.cross_entropy(F.linear(want, weight, bias), targets, reduction="sum").backward()
    torch.testing.assert_close(x.grad, want.grad, atol=1e-4, rtol=1e-4)


def test_a_trained_bias_over_a_frozen_weight_gets_its_gradient():
    x, weight = torch.randn(6, 4), torch.randn(50, 4)
    bias = torch.randn(50, requires_grad=True)
    targets = torch.arange(6)
    M.linear_cross_entropy(x, weight, bias, targets)[0].backward()
    want = bias.detach().clone().requires_grad_(True)
    F.cross_entropy(F.linear(x, weight, want), targets, reduction="sum").backward()
    torch.testing.assert_close(bias.grad, want.grad)


def test_without_gradients_only_the_loss_is_made():
    x = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    with torch.no_grad(), Made() as made:
        loss, _ = M.linear_cross_entropy(x, weight, None, torch.arange(8))
    assert not loss.requires_grad
    assert (8, 1000) in made.shapes
    assert (8, 4) not in made.shapes and (1000, 4) not in made.shapes
    want = F.cross_entropy(x @ weight.t(), torch.arange(8), reduction="sum")
    torch.testing.assert_close(loss, want.detach())


def test_no_tensor_of_labels_times_vocabulary_lives():
    rows, vocab = 1024, 2**15  # 2**25 logits, in chunks of 2**24
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    with Made() as made:
        M.linear_cross_entropy(x, weight, None, torch.arange(rows))[0].backward()
    assert made.largest() <= 2**24 < rows * vocab


def test_linear_cross_entropy_in_bf16():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 32, generator=g), torch.randn(500, 32, generator=g) * 0.3
    targets = torch.randint(500, (200,), generator=g)
    ours = [t.bfloat16().requires_grad_(True) for t in (x, w)]
    ref = [t.bfloat16().float().requires_grad_(True) for t in (x, w)]
    loss, _ = M.linear_cross_entropy(*ours, None, targets)
    loss.backward()
    want = F.cross_entropy(ref[0] @ ref[1].t(), targets, reduction="sum")
    want.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=3e-3)
    for a, b in zip(ours, ref, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.float() - b.grad).norm() <= 1e-2 * b.grad.norm()


@pytest.mark.parametrize("family", ["llama", "modernbert", "neobert"])
def test_model_loss_is_the_cross_entropy_of_its_logits(family):
    """Tied and untied: the gradient of the embedding is that of both its uses."""
    model = tiny(family)
    tokens, seqs = random_tokens(DOCS), make_seqs(DOCS)
    rows = torch.tensor([0, 3, 8, 9, 44, 113])
    targets = torch.tensor([5, 6, 7, 8, 9, 10])
    loss, _ = model(tokens, seqs, rows=rows, targets=targets)
    loss.backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    want = F.cross_entropy(model(tokens, seqs, rows=rows), targets, reduction="sum")
    want.backward()
    torch.testing.assert_close(loss, want)
    for name, p in model.named_parameters():
        assert (got[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


# ---- checkpointing, compile, dropout ----


def train_gradients(model, seed=0, lengths=DOCS):
    torch.manual_seed(seed)
    model.zero_grad()
    tokens = random_tokens(lengths)
    rows = torch.arange(0, len(tokens), 3)
    loss, _ = model.train()(tokens, make_seqs(lengths), rows=rows, targets=tokens[rows])
    loss.backward()
    return loss.item(), {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_same_gradients(a, b):
    assert a[0] == b[0]
    for name in a[1]:
        assert torch.equal(a[1][name], b[1][name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_nothing(family, dropout):
    model = tiny(family, attn_dropout=dropout, out_dropout=dropout)
    plain = train_gradients(model)
    model.gradient_checkpointing = True
    assert_same_gradients(train_gradients(model), plain)
    if dropout:
        assert train_gradients(model, seed=1)[0] != plain[0]


def compile_blocks(family, backend):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = tiny(family, n_layer=10, layer_kinds=(["global", "local", "local"] * 4)[:10], window=3)
    plain = [train_gradients(model, lengths=n) for n in (DOCS, [114], [57, 57])]
    for block in model.blocks:
        block.compile(backend=backend)
    # ten blocks of a few kinds: past dynamo's limit of recompiles the rest would run uncompiled
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        got = [train_gradients(model)]
    graphs = counters["stats"]["unique_graphs"]
    # other texts in a row of the same T: what was compiled serves, or this raises
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += [train_gradients(model, lengths=n) for n in ([114], [57, 57])]
    assert counters["stats"]["unique_graphs"] == graphs > 0
    torch._dynamo.reset()
    for a, b in zip(got, plain, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-5)
        for name, want in b[1].items():
            assert (a[1][name] - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_compiled_blocks_change_nothing_and_are_compiled_once(family):
    """By the compiler's front half, which needs no C compiler: what is recompiled shows here."""
    compile_blocks(family, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["modernbert", "llama"])
def test_compiled_code_changes_nothing(family):
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception as e:  # whatever is missing on this machine
        pytest.skip(f"no compiler works here: {type(e).__name__}")
    compile_blocks(family, "inductor")


@pytest.mark.parametrize("kind", ["attn_dropout", "out_dropout"])
@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_dropout_acts_in_training_only(family, kind):
    model, without = tiny(family, **{kind: 0.3}), tiny(family)
    tokens, seqs = random_tokens(DOCS), make_seqs(DOCS)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens, seqs), without(tokens, seqs))
        a, b = model.train()(tokens, seqs), model(tokens, seqs)
        assert not torch.equal(a, b)
        assert torch.equal(without.train()(tokens, seqs), without.eval()(tokens, seqs))


def test_out_dropout_acts_on_the_attention_block_alone():
    """At p = 1 attention adds nothing: each token stays by itself, and the MLP still works."""
    model = tiny("llama", out_dropout=1.0).train()
    tokens = random_tokens([12])
    with torch.no_grad():
        together = model(tokens, make_seqs([12]))
        apart = model(tokens, make_seqs([1] * 12))
        model.embed.weight.zero_()
        assert not torch.equal(together, model(tokens, make_seqs([12])))
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("window", [(-1, -1), (3, 3)])
def test_attention_dropout_drops_probabilities_and_keeps_their_mean(window):
    torch.manual_seed(0)
    n, copies, p = 6, 20_000, 0.4
    q, k, v = (torch.randn(n, 1, 4).repeat(copies, 1, 1) for _ in range(3))
    out = M.attention(q, k, v, make_seqs([n] * copies), False, window, p).view(copies, n, 4)
    want = M.attention(q[:n], k[:n], v[:n], make_seqs([n]), False, window).view(n, 4)
    error = out.std(0) / copies**0.5
    assert ((out.mean(0) - want).abs() < 5 * error).all()
    assert (out.std(0) > 0.05).all()


# ---- sizes and fresh weights ----


@pytest.mark.parametrize("size", [s for s in M.SIZES if not s.endswith("tiny")])
def test_named_sizes_have_the_named_number_of_parameters(size):
    with torch.device("meta"):
        model = M.Transformer(M.ModelConfig(**M.SIZES[size]))
    n = sum(p.numel() for p in model.parameters())
    name = size.rsplit("-", 1)[1]
    said = int(name[:-1]) * {"m": 10**6, "b": 10**9}[name[-1]]
    print(f"{size}: {n / 1e6:.1f}M")
    assert abs(n / said - 1) < 0.1


_FRESH = {
    "llama-tiny": "normal",
    "qwen3-tiny": "normal",
    "modernbert-tiny": "megatron",
    "neobert-250m": "uniform",
}


@pytest.mark.parametrize("size", _FRESH)
def test_fresh_weights(size):
    changes = dict(n_layer=4, n_embd=240, n_hidden=320, vocab_size=2000) if "neo" in size else {}
    torch.manual_seed(0)
    model = M.from_scratch(size, **changes)
    n_layer = model.config.n_layer
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            want = 0.0 if name.endswith(".bias") else 1.0
            assert (p == want).all(), f"{name} is not {want}"
            continue
        std = 0.02
        out = ("o_proj.weight", "down_proj.weight", "head.dense.weight")
        if _FRESH[size] == "megatron" and name.endswith(out):
            std /= math.sqrt(2 * n_layer)
        if _FRESH[size] == "normal":
            assert p.max() > 3 * std, name  # not cut
            bound, expected = math.inf, std
        elif _FRESH[size] == "uniform":
            bound, expected = 0.02, 0.02 / math.sqrt(3)
        else:  # a normal cut at 2 sigma has 0.8796 of its standard deviation
            bound, expected = 2 * std, 0.8796 * std
        assert p.abs().max() <= bound, name
        assert p.abs().max() > 0.95 * bound or _FRESH[size] == "normal", name
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
    with pytest.raises(ValueError, match="ettin-18m.*ettin-17m"):
        M.from_scratch("ettin-18m")
    with pytest.raises(TypeError, match="n_layers"):
        M.from_scratch("llama-tiny", n_layers=2)


def test_as_many_layer_kinds_as_layers():
    with pytest.raises(ValueError, match="3.*6|6.*3"):
        M.from_scratch("modernbert-tiny", n_layer=3)


def test_flops_count_what_multiplies():
    model = tiny("llama")
    n = sum(p.numel() for k, p in model.named_parameters() if "proj" in k)
    # causal: half of a text is seen on average; 12 = 2 products x 2 flops x (forward + 2 backward)
    assert model.flops_per_token(128) == 6 * n + 12 * 32 * 4 * 64
    local = tiny("modernbert").flops_per_token(128) - tiny("modernbert").flops_per_token(0)
    assert local == 12 * 32 * (2 * 128 + 2 * 7) - 12 * 32 * 0  # two global layers, two of 3 + 1 + 3


# ---- errors and warnings ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama folder, never written to after this."""
    path = tmp_path_factory.mktemp("llama")
    tiny("llama").save_pretrained(str(path))
    return path


def copied(folder, to, change):
    """The folder with its tensors changed by `change(state)`."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return str(to)


NAME = "model.layers.2.self_attn.k_proj.weight"


def test_a_missing_tensor_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.k_proj\.weight.*missing"):
        M.from_pretrained(copied(folder, tmp_path, lambda s: s.pop(NAME)))


def test_an_unexpected_tensor_is_named(folder, tmp_path):
    for name in ("model.layers.0.extra.weight", "score", "model.layers.9.mlp.up_proj.weight"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            M.from_pretrained(
                copied(folder, tmp_path, lambda s, name=name: s.update({name: torch.ones(2)}))
            )


def test_a_misshapen_tensor_is_named_with_both_shapes(folder, tmp_path):
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.k_proj.*\(3, 5\).*\(16, 32\)"):
        M.from_pretrained(copied(folder, tmp_path, lambda s: s.update({NAME: torch.ones(3, 5)})))


def test_an_untied_head_must_be_there_whole(tmp_path):
    model = tiny("modernbert")
    model.save_pretrained(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    broken = copied(tmp_path / "a", tmp_path / "b", lambda s: s.pop("head.dense.weight"))
    with pytest.raises(ValueError, match=r"head\.dense\.weight"):
        M.from_pretrained(broken)


def test_bad_configs_are_named(folder, tmp_path):
    path = copied(folder, tmp_path, lambda s: None)
    edit_config(path, model_type="gpt9")
    with pytest.raises(ValueError, match="gpt9.*llama"):
        M.from_pretrained(path)
    edit_config(path, model_type="llama", hidden_act="relu6")
    with pytest.raises(ValueError, match="relu6.*silu"):
        M.from_pretrained(path)
    edit_config(path, hidden_act="silu", rope_parameters=dict(rope_type="longrope", factor=2.0))
    with pytest.raises(ValueError, match="longrope.*yarn"):
        M.from_pretrained(path)(torch.arange(3), make_seqs([3]))


def test_bad_arguments_are_named(folder):
    with pytest.raises(ValueError, match="sideways.*causal"):
        M.from_pretrained(str(folder), attention="sideways")


def test_a_window_needs_local_layers(folder):
    """A Llama has none: a window that would do nothing is an error, not a silence."""
    with pytest.raises(ValueError, match="window"):
        M.from_pretrained(str(folder), window=8)
    assert M.from_pretrained(str(folder), window=0).config.layer_kinds == ["global"] * 4


def test_names_of_folders_and_of_the_hub(folder, tmp_path, monkeypatch):
    asked = []

    def download(repo, revision=None, allow_patterns=None):
        asked.append((repo, revision))
        if repo == "out/missing":
            raise OSError("404")
        return str(folder)

    monkeypatch.setattr(M, "snapshot_download", download)
    for name in ("missing", "./missing", "/tmp/missing/model", "a/b/c", "~/missing"):
        with pytest.raises(FileNotFoundError, match=name):
            M.from_pretrained(name)
    assert not asked  # none of these went to the hub
    M.from_pretrained("owner/name")
    M.from_pretrained("owner/name@step599525")
    assert asked == [("owner/name", None), ("owner/name", "step599525")]
    with pytest.raises(OSError, match="out/missing.*no such folder"):  # a mistyped path, perhaps
        M.from_pretrained("out/missing")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no model.*safetensors"):
        M.from_pretrained(str(tmp_path))


def test_backends_that_cannot_run_say_why(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    bf16, fp32 = torch.bfloat16, torch.float32
    assert M.choose_backend("auto", cpu, fp32) == "sdpa"
    assert M.choose_backend("auto", cuda, fp32) == "sdpa"
    with pytest.raises(ValueError, match="flsh.*flash_attn.*varlen.*sdpa"):
        M.choose_backend("flsh", cpu, fp32)
    for name in ("flash_attn", "varlen"):
        function = {"flash_attn": "flash_attn_varlen_func", "varlen": "varlen_attn"}[name]
        monkeypatch.setattr(M, function, fake_varlen)
        with pytest.raises(ValueError, match=f"{name}.*CUDA.*cpu"):
            M.choose_backend(name, cpu, bf16)
        with pytest.raises(ValueError, match=f"{name}.*float32"):
            M.choose_backend(name, cuda, fp32)
        assert M.choose_backend(name, cuda, bf16) == name
    # flash_attn first, and it can do dropout
    assert M.choose_backend("auto", cuda, bf16, dropout_p=0.1) == "flash_attn"
    monkeypatch.setattr(M, "flash_attn_varlen_func", None)
    with pytest.raises(ValueError, match="flash_attn.*not installed"):
        M.choose_backend("flash_attn", cuda, bf16)
    assert M.choose_backend("auto", cuda, bf16) == "varlen"
    with pytest.raises(ValueError, match="varlen.*dropout"):
        M.choose_backend("varlen", cuda, bf16, dropout_p=0.1)
    assert M.choose_backend("auto", cuda, bf16, dropout_p=0.1) == "sdpa"
    # older torch: no grouped heads, no window, nothing at all
    monkeypatch.setattr(M, "varlen_attn", lambda q, k, v, window_size: None)
    assert M.choose_backend("varlen", cuda, bf16) == "varlen"
    with pytest.raises(ValueError, match="varlen.*grouped heads"):
        M.choose_backend("varlen", cuda, bf16, gqa=True)
    monkeypatch.setattr(M, "varlen_attn", None)
    with pytest.raises(ValueError, match="varlen"):
        M.choose_backend("varlen", cuda, bf16)


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, -1), enable_gqa=False):
    raise AssertionError("not called")


def test_one_warning_for_texts_that_are_too_long():
    model = tiny("llama", max_seq_len=1000)
    tokens, seqs = random_tokens([1001]), make_seqs([1001])
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(tokens[:1000], make_seqs([1000]))
        assert not caught
        model(tokens, seqs)
        model(tokens, seqs)
    assert len(caught) == 1
    assert "1,001" in str(caught[0].message) and "1,000" in str(caught[0].message)


def test_logits_of_a_model_without_a_head_are_an_error():
    model = tiny("llama", head="none")
    with pytest.raises(ValueError, match="head"):
        model(random_tokens([4]), make_seqs([4]), rows=torch.arange(2))


# ---- new tokens ----


@pytest.mark.parametrize("family", ["llama", "mistral", "modernbert", "neobert"])
def test_resize_vocab(family, tmp_path):
    model = tiny(family)
    tied, bias = model.config.tied, model.config.head_bias
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tokens = random_tokens(DOCS)
    logits = our_logits(model, tokens, DOCS)
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
    torch.testing.assert_close(our_logits(model, tokens, DOCS)[:, :VOCAB], logits)
    assert all(p.requires_grad for p in model.parameters())
    # a new token trains, in the head too
    new = torch.tensor([VOCAB + 2])
    model(new, make_seqs([1]), rows=torch.tensor([0]), targets=new)[0].backward()
    assert model.embed.weight.grad[VOCAB + 2].any()
    model.save_pretrained(str(tmp_path))
    again = M.from_pretrained(str(tmp_path))
    assert torch.equal(our_logits(again, new, [1]), our_logits(model, new, [1]))
    with pytest.raises(ValueError, match="40.*100"):
        model.resize_vocab(40)


def test_resize_vocab_without_a_head_and_frozen():
    model = tiny("llama", head="none")
    model.embed.weight.requires_grad_(False)
    model.resize_vocab(VOCAB + 1)
    assert model.embed.weight.shape == (VOCAB + 1, 32)
    assert not model.embed.weight.requires_grad


def test_weights_gathered_elsewhere_are_what_is_saved(tmp_path):
    """FSDP hands over a full state_dict; a tied head may be in it twice."""
    model = tiny("modernbert")
    state = {k: v + 1 for k, v in model.state_dict().items()}
    model.save_pretrained(str(tmp_path), state)
    for name, w in M.from_pretrained(str(tmp_path)).state_dict().items():
        assert torch.equal(w, state[name]), name


# ---- bf16 ----


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family):
    model = tiny(family)
    tokens, seqs = random_tokens(DOCS), make_seqs(DOCS)
    rows = torch.arange(0, len(tokens), 2)
    hidden = our_hidden(model, tokens, DOCS)
    plain, want = train_gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        near = model(tokens, seqs)
        loss, _ = model(tokens, seqs, rows=torch.arange(0, len(tokens), 3), targets=tokens[::3])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain, rel=0.02)
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32, name
        cosine = F.cosine_similarity(p.grad.flatten(), want[name].flatten(), dim=0)
        assert cosine > 0.98, f"{name}: {cosine:.3f}"
    size = hidden.norm()
    assert (near - hidden).norm() < 0.03 * size
    model = model.bfloat16()
    with torch.no_grad():
        low, logits = model(tokens, seqs), model(tokens, seqs, rows=rows)
    assert low.dtype == logits.dtype == torch.bfloat16
    assert (low.float() - hidden).norm() < 0.03 * size


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_work_in_fp32(kind):
    """bf16 in and out, rounded once; the weight of a norm in fp32 is not rounded at all."""
    g = torch.Generator().manual_seed(0)
    norm = M.Norm(64, kind, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=g))
    x = torch.randn(50, 64, generator=g).bfloat16()
    wide = x.double() - (x.double().mean(1, keepdim=True) if kind == "layer" else 0)
    want = wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    wrong = (norm(x) != want.bfloat16()).float().mean()
    assert norm(x).dtype == torch.bfloat16 and wrong < 0.001  # fp32 at the edge of a rounding


def test_folder_in_bf16(tmp_path):
    tiny("llama").bfloat16().save_pretrained(str(tmp_path))
    with open(tmp_path / "config.json") as f:
        assert json.load(f)["dtype"] == "bfloat16"
    model = M.from_pretrained(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model = M.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
# To append to tests/test_model.py (section "errors and warnings") once model.py has the two checks.


@pytest.mark.parametrize(
    "family, kinds, window",
    [(family, _KINDS, 4) for family in ("llama", "neobert", "mistral")]
    + [("modernbert", _KINDS, 0)],
)
def test_windows_that_a_folder_cannot_keep_are_refused(family, kinds, window):
    """config.json of Llama and NeoBERT has no windows, Mistral's one for all layers."""
    with pytest.raises(ValueError, match=f"{family}.*local"):
        tiny(family, layer_kinds=kinds, window=window)


def test_a_lost_head_is_missing_and_a_base_folder_has_none(tmp_path):
    """Names with "model." come from a model with a head: without its weights the file is broken."""
    (tmp_path / "a").mkdir()
    tiny("llama", tied=False).save_pretrained(str(tmp_path / "whole"))
    broken = copied(tmp_path / "whole", tmp_path / "a", lambda s: s.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight.*missing"):
        M.from_pretrained(broken)
