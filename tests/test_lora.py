"""LoRA against its formula and against peft.

TOL: fp32 logits of size 5 to 10 computed in another order, against transformers' and peft's."""

import functools
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from attention import make_seqs
from formats.huggingface import from_pretrained, save_pretrained
from formats.peft import pinned_chain
from harness import raises
from model import from_scratch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore", "error:Found missing adapter keys")
in_peft = peft.PeftModel.from_pretrained  # (transformers' model, adapter) -> peft's model

TOL = 2e-5
LENGTHS = [5, 30, 1]
TOKENS = torch.randint(3, 97, (36,), generator=torch.Generator().manual_seed(0))
SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(SMALL, num_key_value_heads=2, max_position_embeddings=512)
MODERN = dict(
    SMALL, max_position_embeddings=512, local_attention=12, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2)  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-tied": ("LlamaForCausalLM", dict(DECODER, tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", dict(DECODER, sliding_window=9)),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", dict(DECODER, head_dim=24, tie_word_embeddings=True)),
    "gemma3": ("Gemma3ForCausalLM", dict(
        DECODER, head_dim=24, sliding_window=9, sliding_window_pattern=2)),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "modernbert-untied": ("ModernBertForMaskedLM", dict(
        MODERN, tie_word_embeddings=False, norm_bias=True, attention_bias=True, mlp_bias=True,
        classifier_bias=True)),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", MODERN)}  # fmt: skip
SEQS, ROWS = make_seqs(LENGTHS), torch.arange(sum(LENGTHS))


def shake(model, names=None):
    """Adds noise, so that no norm is 1, no bias and no B is 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names is None or name in names:
                p.add_(torch.randn(p.shape).to(p.dtype) * 0.1)
    return model


def ours_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens, SEQS, rows=ROWS)


def hf_logits(model, tokens=TOKENS):
    with torch.no_grad():
        texts = tokens.split(LENGTHS)
        return torch.cat([model.eval()(input_ids=text[None]).logits[0] for text in texts])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(name, causal=True, dtype=fp32) -> (class, folder of a transformers model with random
    weights)."""

    @functools.cache
    def make(name, causal=True, dtype=torch.float32):
        cls = getattr(transformers, FAMILIES[name][0])
        config = cls.config_class(**FAMILIES[name][1])
        if not causal:
            config.is_causal = False
        torch.manual_seed(1)
        folder = str(tmp_path_factory.mktemp(name))
        shake(cls(config)).to(dtype).save_pretrained(folder)
        return cls, folder

    return make


def adapted(folder, grow=0, seed=2, **changes):
    """A model with an adapter whose every trained number is random."""
    torch.manual_seed(seed)
    model = from_pretrained(folder)
    if grow:
        model.resize_vocab(model.config.vocab_size + grow)
    lora.inject(model, **(dict(rank=4, alpha=12, dropout=0.1, targets="all") | changes))
    return shake(model, lora.trained_names(model))


def in_transformers(cls, base, vocab=0):
    model = cls.from_pretrained(base, dtype=torch.float32)
    if vocab:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    return model


def make_peft(cls, base, vocab=0, **changes):
    """A peft model with random adapter weights: init_lora_weights=False makes B random."""
    torch.manual_seed(3)
    config = dict(r=4, lora_alpha=12, lora_dropout=0.1, init_lora_weights=False) | changes
    model = peft.get_peft_model(in_transformers(cls, base, vocab), peft.LoraConfig(**config))
    return shake(model, {n for n, p in model.named_parameters() if p.requires_grad})


def close(a, b, limit=TOL):
    assert a.shape == b.shape and (a - b).abs().max().item() < limit


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(model, tokens=TOKENS):
    return model(tokens, SEQS, rows=ROWS, targets=tokens.roll(1))[0] / len(tokens)


# ---- the layer, merging ----
@pytest.mark.parametrize("rslora", [False, True])
def test_formula(rslora):
    torch.manual_seed(0)
    base = nn.Linear(24, 40)
    layer = lora.LoRALinear(base, rank=4, alpha=6, dropout=0.5, rslora=rslora)
    a, b, x = layer.lora_A, layer.lora_B, torch.randn(9, 24)
    assert torch.equal(layer.eval()(x), base(x))  # B is zero
    assert 0.5 / math.sqrt(24) < a.abs().max() <= 1 / math.sqrt(24)  # kaiming, a = sqrt(5)
    nn.init.normal_(b)
    scale = 6 / 2 if rslora else 6 / 4
    torch.testing.assert_close(layer(x), base(x) + scale * x @ a.T @ b.T)
    assert torch.autograd.gradcheck(layer.double(), x[:2].double().requires_grad_())
    parts = dict(layer.named_parameters())  # the numerical derivative by A and by B
    for name in ("lora_A", "lora_B"):
        assert torch.autograd.gradcheck(
            lambda p, name=name: torch.func.functional_call(
                layer, parts | {name: p}, x[:2].double()), parts[name].detach().requires_grad_())
    layer.float()
    # dropout touches the adapter's branch alone
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(y, base(x) + scale * F.dropout(x, 0.5) @ a.T @ b.T)
    assert (y - layer.eval()(x)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(base, dtype):
    torch.manual_seed(0)
    model = from_pretrained(base("modernbert-untied")[1], dtype=dtype)
    plain = ours_logits(model)
    lora.inject(model, rank=4, alpha=8, dropout=0.1, targets="all", train_also="norm")
    if dtype == torch.float32:
        assert torch.equal(ours_logits(model), plain)  # B is zero
    shake(model, lora.trained_names(model))
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, ours_logits(model)
    names = lora.trained_names(model)
    assert (want - plain).abs().max() > 0.5

    state, kept = lora.merged_state(model, before), lora.merge(model)
    assert lora.merged_state(model, before) is before and same(model.state_dict(), state)
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    w = before["blocks.1.mlp.down_proj.base.weight"]
    a, b = (before[f"blocks.1.mlp.down_proj.lora_{side}"] for side in "AB")
    merged = model.blocks[1].mlp.down_proj.weight
    assert torch.equal(merged, (w.float() + 2 * (b @ a)).to(dtype))  # added in fp32, rounded once
    if dtype == torch.float32:
        close(ours_logits(model), want, 5 * TOL)
    else:  # two roundings of each weight: as far apart as bf16 is from fp32
        assert (ours_logits(model) - want).float().norm() < 0.03 * want.float().norm()

    lora.unmerge(model, kept)
    assert lora.trained_names(model) == names
    assert same(model.state_dict(), before) and torch.equal(ours_logits(model), want)


# ---- training ----
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_trains_in_fp32(base, autocast):
    torch.manual_seed(0)
    model = from_pretrained(base("llama-tied")[1], dtype=torch.bfloat16)
    lora.inject(model, rank=4, alpha=8, dropout=0.0, targets="all", train_also="norm")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    names = lora.trained_names(model)
    assert any("q_norm" not in n and "norm" in n for n in names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model.train())
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (name in names), name
            assert name not in names or p.dtype == p.grad.dtype == torch.float32, name
            assert name not in names or step == 0 or p.grad.abs().sum() > 0, name  # B was zero
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    layer = model.blocks[0].attn.q_proj
    assert layer(torch.zeros(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---- ours -> peft ----
def test_targets(base, tmp_path):
    """Some of the layers: ModernBERT calls two of them Wo."""
    cls, folder = base("modernbert")
    model = adapted(folder, targets="qkv_proj, o_proj")
    assert {n.split(".", 2)[2] for n in lora.lora_layers(model)} == {"attn.qkv_proj", "attn.o_proj"}
    lora.save_adapter(model, str(tmp_path), folder)
    config = json.load(open(tmp_path / "adapter_config.json"))
    assert config["target_modules"] == ["attn.Wo", "attn.Wqkv"]
    assert config["base_model_name_or_path"] == folder
    close(hf_logits(in_peft(in_transformers(cls, folder), str(tmp_path))), ours_logits(model))


def test_card_has_the_class_and_the_mask(base, tmp_path, monkeypatch):
    """A base that is causal, an adapter that is not: the card's code gives our outputs."""
    _, folder = base("llama")
    model = from_pretrained(folder, "bidirectional")
    lora.inject(model, rank=4, alpha=12, dropout=0.1, targets="all")
    shake(model, lora.trained_names(model))
    lora.save_adapter(model, str(tmp_path), folder)
    code = (tmp_path / "README.md").read_text().split("```")[1].removeprefix("python")
    monkeypatch.chdir(tmp_path)
    exec(code, space := {})
    close(hf_logits(space["model"]), ours_logits(model))


ALSO = [("llama", "embed,norm,head"), ("llama", "head"), ("llama-tied", "embed,norm"),
        ("qwen3", "norm"), ("qwen3", "embed"), ("modernbert", "embed,norm,head"),
        ("modernbert", "embed"), ("modernbert", "head"), ("modernbert-untied", "embed,norm,head"),
        ("modernbert-untied", "norm"), ("modernbert-decoder", "embed,norm,head")]
GROWN = [("llama", ""), ("llama", "embed,norm,head"), ("llama-tied", ""), ("llama-tied", "embed"),
         ("modernbert", ""), ("modernbert", "embed,head"), ("modernbert-untied", "embed")]
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "modernbert-decoder"]
CASES = [(*case, 0, True) for case in ALSO] + [(*case, 4, True) for case in GROWN]
CASES += [(name, "", 0, causal) for name in DECODERS for causal in (True, False)]


@pytest.mark.parametrize("name,also,grow,causal", [*CASES, ("modernbert", "", 0, True)])
def test_all_that_trained_is_saved(base, tmp_path, name, also, grow, causal):
    """Three real steps; what they changed is in the folder, for us bit by bit, for peft too."""
    cls, folder = base(name, causal)
    tokens = TOKENS + grow  # the new rows are used
    model = adapted(folder, grow=grow, train_also=also, rslora=not causal)
    assert model.config.causal == (causal and name not in ("modernbert", "modernbert-untied"))
    if not grow:
        assert (ours_logits(model) - ours_logits(from_pretrained(folder))).abs().max() > 0.5
    start = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model.train(), tokens).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    changed = {n for n in after if not torch.equal(after[n], start[n])}
    assert changed == set(lora.trained_names(model))
    for group, kind in (("embed", "embed."), ("norm", "norm."), ("head", "lm_head.")):
        shared = kind == "lm_head." and model.config.tied and not model.config.head_bias
        assert any(kind in n for n in changed) == (group in also) or shared
    want = ours_logits(model, tokens)
    lora.save_adapter(model, str(tmp_path), folder)

    for trainable in (False, True):
        again = from_pretrained(folder)
        lora.load_adapter(again, str(tmp_path), trainable=trainable)
        assert torch.equal(ours_logits(again, tokens), want)
        assert same(dict(again.named_parameters()), after)
        assert lora.trained_names(again) == (lora.trained_names(model) if trainable else [])
        lora.save_adapter(again, str(tmp_path / "again"), folder)  # frozen or not: saved whole
        for name in ("config.json", "model.safetensors"):
            path = tmp_path / f"adapter_{name}"
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert again.config.tied == model.config.tied

    theirs = in_peft(in_transformers(cls, folder, 101 if grow else 0), str(tmp_path))
    close(hf_logits(theirs, tokens), want)
    if name == "llama-tied":  # in peft, too, one matrix trains on
        embed, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
        assert embed.weight is head.weight
    close(hf_logits(theirs.merge_and_unload(), tokens), want, 5 * TOL)


@pytest.mark.parametrize("head", [True, False])
def test_auto_model(base, tmp_path, head):
    """transformers' own way to an adapter folder, without a head: what sentence-transformers does.
    A base without a head (LlamaModel) has other names in peft's files."""
    cls, folder = base("llama")
    if not head:
        cls.from_pretrained(folder).model.save_pretrained(tmp_path / "inner")
        folder = str(tmp_path / "inner")
    model = adapted(folder, train_also="embed,norm")
    assert model.config.head == ("linear" if head else "none")
    lora.save_adapter(model, str(tmp_path / "adapter"), folder)
    with torch.no_grad():
        want = model.eval()(TOKENS, SEQS)
        theirs = transformers.AutoModel.from_pretrained(str(tmp_path / "adapter")).eval()
        texts = [theirs(input_ids=text[None]) for text in TOKENS.split(LENGTHS)]
        close(torch.cat([text.last_hidden_state[0] for text in texts]), want)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    for _ in range(2):
        again = from_pretrained(folder)
        lora.load_adapter(again, str(tmp_path / "adapter"))
        with torch.no_grad():
            assert torch.equal(again.eval()(TOKENS, SEQS), want)
        if path.exists():  # an adapter of old has a .bin
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()


# ---- peft -> ours ----
QKV = ["q_proj", "k_proj", "v_proj"]
PEFT = [
    ("llama", True, dict(target_modules=QKV + ["o_proj", "gate_proj", "up_proj", "down_proj"])),
    ("llama", False, dict(target_modules=QKV, use_rslora=True,
                          modules_to_save=["norm", "lm_head"])),
    ("mistral", True, dict(target_modules=r".*\.layers\.\d+\.(self_attn|mlp)\.[qud].*_proj")),
    ("mistral", False, dict(target_modules=["o_proj"], layers_to_transform=[1])),
    ("qwen2", True, dict(target_modules="all-linear", exclude_modules=["up_proj"])),
    ("qwen2", False, dict(target_modules=QKV, rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 3},
                          alpha_pattern={"k_proj": 7, "v_proj": 5})),
    ("qwen3", True, dict(target_modules=QKV, modules_to_save=["embed_tokens"])),  # unties
    ("qwen3", False, dict(target_modules=QKV, modules_to_save=["embed_tokens"],
                          ensure_weight_tying=True)),
    ("modernbert", True, dict(target_modules="all-linear")),  # head.dense, too
    ("modernbert", True, dict(target_modules=["Wqkv"], modules_to_save=["head", "decoder"])),
    ("modernbert-decoder", True, dict(target_modules=["q_proj", "Wo"])),
    ("modernbert-decoder", False, dict(target_modules=["Wi"],
                                       modules_to_save=["tok_embeddings", "final_norm"])),
    *[(name, True, dict(target_modules="all-linear", vocab=101))
      for name in ("llama", "llama-tied", "modernbert")]]  # fmt: skip


@pytest.mark.parametrize("name,causal,changes", PEFT)
def test_peft_in_ours(base, tmp_path, name, causal, changes):
    cls, folder = base(name, causal)
    theirs, vocab = make_peft(cls, folder, **changes), changes.get("vocab", 0)
    tokens = TOKENS + (4 if vocab else 0)  # the new rows are used
    want = hf_logits(theirs, tokens)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=bool(vocab))
    model = from_pretrained(folder)
    lora.load_adapter(model, str(tmp_path / "theirs"), trainable=True)
    close(ours_logits(model, tokens), want)
    if vocab:
        assert model.config.vocab_size == vocab and model.config.tied == (name != "llama")
        assert not model.embed.weight.requires_grad  # it grew and did not train
    # and back: patterns, layers, untied heads and new rows survive
    lora.save_adapter(model, str(tmp_path / "ours"), folder)
    theirs = in_peft(in_transformers(cls, folder, vocab), str(tmp_path / "ours"))
    close(hf_logits(theirs, tokens), want)
    lora.merge(model)
    close(ours_logits(model, tokens), want, 5 * TOL)  # W + BA rounded once for each weight


def test_neobert(tmp_path):
    """Not in transformers: our own round trip, and B's rows lie as the published weights' do."""
    torch.manual_seed(0)
    small = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, vocab_size=97, max_seq_len=64)
    save_pretrained(shake(from_scratch("neobert-250m", **small)), tmp_path / "base")
    model = adapted(str(tmp_path / "base"), grow=3, train_also="embed,norm,head", rslora=True)
    want = ours_logits(model, TOKENS + 3)
    lora.save_adapter(model, str(tmp_path / "adapter"), "owner/name@main")
    again = from_pretrained(str(tmp_path / "base"))
    lora.load_adapter(again, str(tmp_path / "adapter"))
    assert torch.equal(ours_logits(again, TOKENS + 3), want)
    config = json.load(open(tmp_path / "adapter" / "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "main")

    lora.merge(again)
    save_pretrained(again, tmp_path / "merged")
    w = [load_file(tmp_path / f / "model.safetensors") for f in ("base", "merged")]
    ab = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "model.transformer_encoder.1.qkv"
    a, b = (ab[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
    delta = 12 / math.sqrt(4) * (b @ a)
    torch.testing.assert_close(w[1][f"{key}.weight"] - w[0][f"{key}.weight"], delta)


# ---- models for training, merged models ----
def run_settings(**changes):
    usual = dict(lora_rank=4, lora_alpha=12, lora_dropout=0.0, lora_targets="all")
    return SimpleNamespace(**usual | dict(train_also="", compute_dtype=torch.bfloat16) | changes)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name,also,before,grow,headless", [
    ("llama", "norm", "", 0, False), ("llama", "", "embed,norm", 4, True),
    ("llama-tied", "embed,norm", "norm", 4, False), ("llama-tied", "", "", 4, False),
    ("modernbert", "embed,head", "", 0, False), ("modernbert", "norm", "head", 0, False),
    ("modernbert-untied", "", "", 4, True)])  # fmt: skip
def test_merged_once_as_peft(base, tmp_path, stored, name, also, before, grow, headless):
    """Trained in bf16, the base's files in fp32 or bf16: what is saved is peft's fp32 merge of the
    whole chain rounded once, every bit. before: what the adapter merged earlier trained along."""
    cls, folder = base(name, causal=False, dtype=stored)
    adapters = [str(tmp_path / "first")] if before else []
    if before:  # its rows are new ones, if there are any
        lora.save_adapter(adapted(folder, grow, train_also=before), adapters[0], folder)
    s = run_settings(init_from=folder, adapters=adapters, train_also=also)
    model, *_ = lora.load_for_training(s)
    want = lora.load_merged(folder, adapters).to(torch.bfloat16).state_dict()  # rounded once
    assert same(model.state_dict(), want)
    assert model.stream_dtype == model.embed.weight.dtype == torch.bfloat16
    assert model.config.causal is False  # without being told
    if headless:
        model.drop_head()
    if grow and not before:
        model.resize_vocab(97 + grow)
    lora.add_lora(model, s, None)
    shake(model, lora.trained_names(model))
    second, state, random = str(tmp_path / "2"), model.state_dict(), torch.get_rng_state()
    save_pretrained(model, tmp_path, lora.merged_state(model, state, folder, adapters))
    assert torch.equal(torch.get_rng_state(), random)
    lora.save_adapter(model, second, folder, state, adapters)
    assert pinned_chain(second) == [folder, *adapters, second]

    again = lora.load_merged(folder, adapters, "bidirectional", torch.bfloat16)
    if headless and not before:  # where nothing grows, a model with a head takes the inner names
        again.drop_head()
    lora.load_adapter(again, second)
    loaded = dict(again.named_parameters())
    for key, p in model.named_parameters():
        assert loaded[key].dtype == p.dtype and torch.equal(loaded[key], p), key
    assert again.config.tied == model.config.tied
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.eval()(TOKENS + grow, SEQS), model.eval()(TOKENS + grow, SEQS))
    with torch.no_grad():  # without autocast, and an fp32 embedding before bf16 layers
        assert again(TOKENS, SEQS).isfinite().all()

    theirs = in_transformers(cls, folder, 97 + grow)
    for adapter in adapters:
        theirs = in_peft(theirs, adapter).merge_and_unload()
    theirs = theirs.model if headless else theirs
    theirs = in_peft(theirs, second).merge_and_unload().to(stored).state_dict()
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() >= theirs.keys() - {"lm_head.weight", "decoder.weight"}
    for key, tensor in ours.items():
        assert tensor.dtype == stored and torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("place", ["adapter", "."])  # in a checkpoint: contrastive's, MNTP's
def test_base_and_adapters_are_pinned(base, tmp_path, place):
    """A resumed run goes on with what it began with, though the out_dirs that its base and its
    adapters came from have newer checkpoints by then."""
    source = from_pretrained(base("llama")[1])

    def checkpoints(step):
        folder, adapter = f"{tmp_path}/base/step{step}", f"{tmp_path}/mntp/step{step}"
        save_pretrained(shake(source), folder)
        lora.save_adapter(adapted(folder, seed=step), adapter, folder)
        return [folder, [adapter]]

    first = checkpoints(1)
    s = run_settings(init_from=f"{tmp_path}/base", adapters=(f"{tmp_path}/mntp",))
    model, *names = lora.load_for_training(s)
    lora.add_lora(model, s, None)
    shake(model, lora.trained_names(model))
    second, last = checkpoints(2), f"{tmp_path}/run/step5"
    lora.save_adapter(model, os.path.join(last, place), names[0], merged=names[1])
    again, *resumed = lora.load_for_training(s, last)
    lora.add_lora(again, s, last)
    assert names == resumed == first and torch.equal(ours_logits(again), ours_logits(model))
    assert lora.trained_names(again) == lora.trained_names(model)
    assert lora.load_for_training(s)[1:] == tuple(second)


def test_load_for_training(base, tmp_path):
    folder, first, last = base("llama")[1], str(tmp_path / "1"), str(tmp_path / "step5")
    lora.save_adapter(adapted(folder), first, folder)
    lora.save_adapter(adapted(folder), str(tmp_path / "2"), folder, merged=[first])
    s = run_settings(init_from=str(tmp_path / "2"), lora_rank=0, attn_dropout=0.3, max_seq_len=600)
    model, *names = lora.load_for_training(s, None, "causal")
    assert names == [folder, [first, str(tmp_path / "2")]]  # init_from may be an adapter
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert (model.blocks[1].attn.attn_dropout, model.config.attn_dropout) == (0.3, 0.0)
    assert model.config.max_seq_len == 600
    lora.add_lora(model, s, None)
    assert not lora.lora_layers(model)
    # without LoRA a checkpoint has all weights
    save_pretrained(shake(model), last)
    for init_from, expected in ((s.init_from, names), ("scratch", [last, []])):
        s = run_settings(init_from=init_from, lora_rank=0)
        again, *resumed = lora.load_for_training(s, last)
        assert resumed == expected and torch.equal(again.embed.weight, model.embed.weight)
    s = run_settings(init_from=folder, lora_rank=0, freeze_backbone=True)
    assert lora.load_for_training(s)[0].embed.weight.dtype == torch.bfloat16


# ---- errors ----
@pytest.mark.parametrize("name,message,changes", [
    ("modernbert", "'q_proj'.*'qkv_proj', 'o_proj', 'gate_up_proj'", dict(targets="q_proj")),
    ("modernbert", "targets=''", dict(targets="")),
    ("modernbert", "'norms'.*'embed', 'norm', 'head'", dict(train_also="norms")),
    ("qwen3", "'head'.*'embed', 'norm'", dict(train_also="head")),  # tied, no bias
])  # fmt: skip
def test_inject_errors(base, name, message, changes):
    model = from_pretrained(base(name)[1])
    with pytest.raises(ValueError, match=message):
        lora.inject(model, **(dict(rank=4, alpha=8, dropout=0.0, targets="all") | changes))
    assert all(p.requires_grad for p in model.parameters())  # nothing has happened yet


def test_errors(base):
    model = from_pretrained(base("llama")[1])
    raises(ValueError, "no adapter", lora.save_adapter, model, "nowhere", "base")
    model = adapted(base("llama")[1])
    raises(ValueError, "merge it first", lora.inject, model, 4, 8, 0.0, "all")
    model.classifier = nn.Linear(64, 3)
    raises(KeyError, "classifier", lora.save_adapter, model, "nowhere", "base")


INNER = "base_model.model.model."
Q = INNER + "layers.1.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
EMBED = INNER + "embed_tokens.weight"


@pytest.mark.parametrize("message,changes", [
    ("use_dora = True: not supported", dict(use_dora=True)),
    ("bias = 'all': not supported", dict(bias="all")),
    ("init_lora_weights = 'pissa': not supported", dict(init_lora_weights="pissa")),
    ("some_new_key = 1: not supported", dict(some_new_key=1)),
    ("peft_type = 'IA3': not supported", dict(peft_type="IA3")),
    ("missing.*blocks.1.attn.q_proj.lora_B", dict(drop=[B])),
    ("missing.*q_proj.lora_A", dict(drop=[A, B])),
    # a regular expression over an inner class's names
    ("missing.*q_proj.lora_A", dict(drop=[A, B], target_modules=r"layers\.\d\.self_attn\..*")),
    ("missing.*: norm.weight", dict(drop=[INNER + "norm.weight"])),
    ("missing.*: lm_head.weight", dict(modules_to_save=["lm_head"])),
    ("unexpected.*classifier", dict(add={"base_model.model.classifier.weight": torch.ones(3)})),
    ("unexpected.*magnitude", dict(add={f"{Q}.lora_magnitude_vector": torch.ones(64)})),
    ("unexpected.*layers.7", dict(add={A.replace("1", "7"): torch.ones(3)})),
    (r"lora_A is \(4, 65\), the model's is \(4, 64\)", dict(add={A: torch.ones(4, 65)})),
    (r"embed.weight is \(96, 64\)", dict(add={EMBED: torch.ones(96, 64)})),
    # new rows for the embedding alone
    ("missing.*: lm_head.weight", dict(add={EMBED: torch.ones(99, 64)}))])  # fmt: skip
def test_load_errors(base, tmp_path, message, changes):
    folder, changes = base("llama")[1], dict(changes)
    lora.save_adapter(adapted(folder, train_also="norm"), str(tmp_path), folder)
    path, drop = tmp_path / "adapter_model.safetensors", changes.pop("drop", ())
    state = {key: tensor for key, tensor in load_file(path).items() if key not in drop}
    save_file(state | changes.pop("add", {}), path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    raises(ValueError, message, lora.load_adapter, from_pretrained(folder), str(tmp_path))


def test_peft_dora(base, tmp_path):
    cls, folder = base("llama")
    make_peft(cls, folder, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora = True: not supported"):
        lora.load_adapter(from_pretrained(folder), str(tmp_path))
