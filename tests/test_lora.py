"""LoRA against its formula and against peft. Run: python -m pytest tests/test_lora.py

TOL: fp32 logits of size 5 to 10 computed in another order, ours against transformers' and peft's.
"""

import itertools
import json
import math
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import model as M

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Input and output embed")

TOL = 2e-5
LENGTHS = [5, 30, 1]
TOKENS = torch.randint(3, 97, (36,), generator=torch.Generator().manual_seed(0))
SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
DECODER = dict(SMALL, num_key_value_heads=2, max_position_embeddings=512)
MODERN = dict(
    SMALL, max_position_embeddings=512, local_attention=12, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-tied": ("LlamaForCausalLM", dict(DECODER, tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", dict(DECODER, sliding_window=9)),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", dict(DECODER, head_dim=24, tie_word_embeddings=True)),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "modernbert-untied": ("ModernBertForMaskedLM", dict(
        MODERN, tie_word_embeddings=False, norm_bias=True, attention_bias=True, mlp_bias=True,
        classifier_bias=True)),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", MODERN),
}  # fmt: skip


def make_seqs(lengths):
    cu = torch.tensor([0] + list(itertools.accumulate(lengths)), dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return M.Seqs(cu, list(lengths), positions, max(lengths))


SEQS, ROWS = make_seqs(LENGTHS), torch.arange(sum(LENGTHS))


def shake(model, names=None, size=0.1):
    """Adds noise, so that no norm is 1, no bias and no B is 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names is None or name in names:
                p.add_(torch.randn(p.shape).to(p.dtype) * size)
    return model


def ours_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens, SEQS, rows=ROWS)


def hf_logits(model, tokens=TOKENS):
    model.eval()
    with torch.no_grad():
        texts = tokens.split(LENGTHS)
        return torch.cat([model(input_ids=text[None]).logits[0] for text in texts])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(name, causal=True) -> (class, folder of a transformers model with random weights)."""
    made = {}

    def make(name, causal=True):
        if (name, causal) not in made:
            cls = getattr(transformers, FAMILIES[name][0])
            config = cls.config_class(**FAMILIES[name][1])
            if not causal:
                config.is_causal = False
            torch.manual_seed(1)
            folder = str(tmp_path_factory.mktemp(name))
            shake(cls(config)).save_pretrained(folder)
            made[name, causal] = cls, folder
        return made[name, causal]

    return make


def adapted(folder, grow=0, seed=2, **changes):
    """A model with an adapter whose every trained number is random."""
    torch.manual_seed(seed)
    model = M.from_pretrained(folder)
    if grow:
        model.resize_vocab(model.config.vocab_size + grow)
    lora.inject(model, **(dict(rank=4, alpha=12, dropout=0.1, targets="all") | changes))
    return shake(model, lora.trained_names(model))


def in_peft(cls, base, adapter, vocab=0):
    model = cls.from_pretrained(base)
    if vocab:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*")
        warnings.filterwarnings("error", "Found missing adapter keys")  # this filter comes first
        return peft.PeftModel.from_pretrained(model, adapter)


def make_peft(cls, base, vocab=0, **changes):
    """A peft model with random adapter weights: init_lora_weights=False makes B random."""
    torch.manual_seed(3)
    model = cls.from_pretrained(base)
    if vocab:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    config = dict(r=4, lora_alpha=12, lora_dropout=0.1, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**(config | changes)))
    return shake(model, {n for n, p in model.named_parameters() if p.requires_grad})


def close(a, b, limit=TOL):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < limit


def contents(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with safe_open(path, "pt") as f:
        return {key: f.get_tensor(key).tolist() for key in f.keys()} | f.metadata()


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
    # dropout touches the adapter's branch alone
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(y, base(x) + scale * F.dropout(x, 0.5) @ a.T @ b.T)
    assert (y - layer.eval()(x)).abs().max() > 0.1


def test_zero_at_start(base):
    model = M.from_pretrained(base("llama")[1])
    want = ours_logits(model)
    lora.inject(model, rank=4, alpha=8, dropout=0.1, targets="all", train_also="norm,head")
    assert torch.equal(ours_logits(model), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(base, dtype):
    torch.manual_seed(0)
    model = M.from_pretrained(base("modernbert-untied")[1], dtype=dtype)
    plain = ours_logits(model)
    lora.inject(model, rank=4, alpha=8, dropout=0.1, targets="all", train_also="norm")
    shake(model, lora.trained_names(model))
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, ours_logits(model)
    names = lora.trained_names(model)
    assert (want - plain).abs().max() > 0.5

    kept = lora.merge(model, keep=True)
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert {type(m) for m in model.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    w = before["blocks.1.mlp.down_proj.base.weight"]
    a, b = (before[f"blocks.1.mlp.down_proj.lora_{side}"] for side in "AB")
    exact = w.double() + 2 * (b.double() @ a.double())
    merged = model.blocks[1].mlp.down_proj.weight
    assert torch.equal(merged, (w.float() + 2 * (b @ a)).to(dtype))  # added in fp32
    limit = 1e-6 if dtype == torch.float32 else 2**-8  # half a step of bf16, of the largest weight
    assert (merged.double() - exact).abs().max() < limit * exact.abs().max()
    if dtype == torch.float32:
        close(ours_logits(model), want, 5 * TOL)
    else:  # two roundings of each weight: as far apart as bf16 is from fp32
        assert (ours_logits(model) - want).float().norm() < 0.03 * want.float().norm()

    lora.unmerge(model, kept)
    assert lora.trained_names(model) == names
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(ours_logits(model), want)
    assert lora.merge(model) is None


# ---- training ----


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_trains_in_fp32(base, autocast):
    torch.manual_seed(0)
    model = M.from_pretrained(base("llama-tied")[1], dtype=torch.bfloat16)
    lora.inject(model, rank=4, alpha=8, dropout=0.0, targets="q_proj,down_proj", train_also="norm")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    names = lora.trained_names(model)
    assert any("q_norm" not in n and "norm" in n for n in names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model.train())
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (name in names), name
            assert name not in names or p.dtype == p.grad.dtype == torch.float32, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    layer = model.blocks[0].attn.q_proj
    assert layer(torch.zeros(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_reach_the_adapter_alone(base):
    model = adapted(base("qwen3")[1], dropout=0.0)
    loss_of(model.train()).backward()
    for name, p in model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            assert p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None and not p.requires_grad, name
    # the gradient is the derivative: a small step along it, against the change of the loss
    g = sum(p.grad.square().sum() for p in model.parameters() if p.requires_grad)
    before, step = loss_of(model).item(), 1e-3 / g.item()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= step * p.grad
    assert (before - loss_of(model).item()) / 1e-3 == pytest.approx(1, rel=0.1)


# ---- ours -> peft ----

CAUSAL = [("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True),
          ("modernbert-decoder", True), ("modernbert", True)]  # fmt: skip
BIDIRECTIONAL = [(name, False) for name, _ in CAUSAL if name != "modernbert"]


@pytest.mark.parametrize("name,causal", CAUSAL + BIDIRECTIONAL)
def test_ours_in_peft(base, tmp_path, name, causal):
    cls, folder = base(name, causal)
    model = adapted(folder, rslora=not causal)
    assert model.config.causal == (causal and name != "modernbert")
    want = ours_logits(model)
    assert (want - ours_logits(M.from_pretrained(folder))).abs().max() > 0.5
    lora.save_adapter(model, str(tmp_path), folder)
    theirs = in_peft(cls, folder, str(tmp_path))
    close(hf_logits(theirs), want)
    close(hf_logits(theirs.merge_and_unload()), want, 5 * TOL)


def test_targets(base, tmp_path):
    """Some of the layers: ModernBERT calls two of them Wo."""
    cls, folder = base("modernbert")
    model = adapted(folder, targets="qkv_proj, o_proj")
    assert {n.split(".", 2)[2] for n in lora.lora_layers(model)} == {"attn.qkv_proj", "attn.o_proj"}
    lora.save_adapter(model, str(tmp_path), folder)
    config = json.load(open(tmp_path / "adapter_config.json"))
    assert config["target_modules"] == ["attn.Wo", "attn.Wqkv"]
    assert config["base_model_name_or_path"] == folder
    close(hf_logits(in_peft(cls, folder, str(tmp_path))), ours_logits(model))


ALSO = [("llama", "embed,norm,head"), ("llama", "head"), ("llama-tied", "embed,norm"),
        ("qwen3", "norm"), ("qwen3", "embed"), ("modernbert", "embed,norm,head"),
        ("modernbert", "embed"), ("modernbert", "head"), ("modernbert-untied", "embed,norm,head"),
        ("modernbert-untied", "norm"), ("modernbert-decoder", "embed,norm,head")]  # fmt: skip


@pytest.mark.parametrize("name,also,grow", [(*a, 0) for a in ALSO] + [
    ("llama", "", 4), ("llama", "embed,norm,head", 4), ("llama-tied", "", 4),
    ("llama-tied", "embed", 4), ("modernbert", "", 4), ("modernbert", "embed,head", 4),
    ("modernbert-untied", "embed", 4)])  # fmt: skip
def test_all_that_trained_is_saved(base, tmp_path, name, also, grow):
    """Three real steps; what they changed is in the folder, for us bit by bit, for peft too."""
    cls, folder = base(name)
    tokens = TOKENS + grow  # the new rows are used
    model = adapted(folder, grow=grow, train_also=also)
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
        again = M.from_pretrained(folder)
        lora.load_adapter(again, str(tmp_path), trainable=trainable)
        assert torch.equal(ours_logits(again, tokens), want)
        loaded = dict(again.named_parameters())
        assert loaded.keys() == after.keys()
        assert all(torch.equal(loaded[n], after[n]) for n in after)
        assert lora.trained_names(again) == (lora.trained_names(model) if trainable else [])
        lora.save_adapter(again, str(tmp_path / "again"), folder)  # frozen or not: saved whole
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert contents(tmp_path / file) == contents(tmp_path / "again" / file)
    assert again.config.tied == model.config.tied

    theirs = in_peft(cls, folder, str(tmp_path), model.config.vocab_size if grow else 0)
    close(hf_logits(theirs, tokens), want)
    if name == "llama-tied":  # in peft, too, one matrix trains on
        embed, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
        assert embed.weight is head.weight
    close(hf_logits(theirs.merge_and_unload(), tokens), want, 5 * TOL)


@pytest.mark.parametrize("also", ["norm", "embed,head"])
def test_bf16_base_reload(base, tmp_path, also):
    folder = base("modernbert")[1]
    torch.manual_seed(0)
    model = M.from_pretrained(folder, dtype=torch.bfloat16)
    lora.inject(model, rank=4, alpha=8, dropout=0.0, targets="all", train_also=also)
    shake(model, lora.trained_names(model))
    lora.save_adapter(model, str(tmp_path), folder)
    again = M.from_pretrained(folder, dtype=torch.bfloat16)
    lora.load_adapter(again, str(tmp_path))
    want = dict(model.named_parameters())
    for name, p in again.named_parameters():
        assert p.dtype == want[name].dtype and torch.equal(p, want[name]), name
    assert again.config.tied
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours_logits(again), ours_logits(model))
    with torch.no_grad():  # without autocast, and an fp32 embedding before bf16 layers
        assert again(TOKENS, SEQS).isfinite().all()


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
        theirs = [transformers.AutoModel.from_pretrained(str(tmp_path / "adapter"))]
        if not head:
            cls = transformers.LlamaModel
            theirs.append(in_peft(cls, folder, str(tmp_path / "adapter")))
        for m in theirs:
            texts = [m.eval()(input_ids=text[None]) for text in TOKENS.split(LENGTHS)]
            close(torch.cat([t.last_hidden_state[0] for t in texts]), want)
    again = M.from_pretrained(folder)
    lora.load_adapter(again, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.eval()(TOKENS, SEQS), want)


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
]  # fmt: skip


@pytest.mark.parametrize("name,causal,changes", PEFT)
def test_peft_in_ours(base, tmp_path, name, causal, changes):
    cls, folder = base(name, causal)
    theirs = make_peft(cls, folder, **changes)
    want = hf_logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = M.from_pretrained(folder)
    lora.load_adapter(model, str(tmp_path / "theirs"), trainable=True)
    close(ours_logits(model), want)
    # and back: patterns, layers and untied heads survive
    lora.save_adapter(model, str(tmp_path / "ours"), folder)
    close(hf_logits(in_peft(cls, folder, str(tmp_path / "ours"))), want)
    lora.merge(model)
    close(ours_logits(model), want, 5 * TOL)  # W + BA rounded once for each weight


@pytest.mark.parametrize("name", ["llama", "llama-tied", "modernbert"])
def test_peft_resized_vocabulary(base, tmp_path, name):
    cls, folder = base(name)
    theirs = make_peft(cls, folder, vocab=101, target_modules="all-linear")
    want = hf_logits(theirs, TOKENS + 4)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = M.from_pretrained(folder)
    lora.load_adapter(model, str(tmp_path), trainable=True)
    assert model.config.vocab_size == 101 and model.config.tied == (name != "llama")
    assert not model.embed.weight.requires_grad  # it grew and did not train
    close(ours_logits(model, TOKENS + 4), want)


def test_llm2vec_names(base, tmp_path):
    """Adapters trained on inner classes: "base_model.model.layers...", no second "model."."""
    folder = base("llama")[1]
    model = adapted(folder, train_also="norm")
    lora.save_adapter(model, str(tmp_path), folder)
    path = str(tmp_path / "adapter_model.safetensors")
    state = load_file(path)
    inner = {k.replace("base_model.model.model.", "base_model.model."): v for k, v in state.items()}
    assert inner.keys().isdisjoint(state)
    save_file(inner, path)
    again = M.from_pretrained(folder)
    lora.load_adapter(again, str(tmp_path))
    assert torch.equal(ours_logits(again), ours_logits(model))
    # an adapter of old has a .bin
    os.remove(path)
    torch.save(inner, tmp_path / "adapter_model.bin")
    again = M.from_pretrained(folder)
    lora.load_adapter(again, str(tmp_path))
    assert torch.equal(ours_logits(again), ours_logits(model))


def test_chain(base, tmp_path):
    """LLM2Vec: base + merged adapter 1 (embeddings, norms and new rows trained) + adapter 2."""
    cls, folder = base("llama", causal=False)
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    model = adapted(folder, grow=4, train_also="embed,norm")
    lora.save_adapter(model, first, folder)
    lora.merge(model)
    middle = ours_logits(model, TOKENS + 4)
    lora.inject(model, rank=2, alpha=4, dropout=0.1, targets="q_proj,v_proj")
    shake(model, lora.trained_names(model))
    want = ours_logits(model, TOKENS + 4)
    assert (want - middle).abs().max() > 0.1
    lora.save_adapter(model, second, folder)
    assert contents(tmp_path / "2" / "adapter_config.json")["modules_to_save"] is None

    again = M.from_pretrained(folder)
    lora.load_adapter(again, first)
    lora.merge(again)
    lora.load_adapter(again, second)
    assert torch.equal(ours_logits(again, TOKENS + 4), want)

    theirs = in_peft(cls, folder, first, vocab=101).merge_and_unload()
    close(hf_logits(theirs, TOKENS + 4), middle)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*")
        theirs = peft.PeftModel.from_pretrained(theirs, second)
    close(hf_logits(theirs, TOKENS + 4), want)


def test_neobert(tmp_path):
    """Not in transformers: our own round trip, and B's rows lie as the published weights' do."""
    torch.manual_seed(0)
    small = dict(n_layer=2, n_head=4, n_embd=64, n_hidden=96, vocab_size=97, max_seq_len=64)
    shake(M.from_scratch("neobert-250m", **small)).save_pretrained(tmp_path / "base")
    model = adapted(str(tmp_path / "base"), grow=3, train_also="embed,norm,head", rslora=True)
    want = ours_logits(model, TOKENS + 3)
    lora.save_adapter(model, str(tmp_path / "adapter"), "owner/name@main")
    again = M.from_pretrained(str(tmp_path / "base"))
    lora.load_adapter(again, str(tmp_path / "adapter"))
    assert torch.equal(ours_logits(again, TOKENS + 3), want)
    config = json.load(open(tmp_path / "adapter" / "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "main")

    lora.merge(again)
    again.save_pretrained(tmp_path / "merged")
    w = [load_file(tmp_path / f / "model.safetensors") for f in ("base", "merged")]
    ab = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "model.transformer_encoder.1.qkv"
    a, b = (ab[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
    delta = 12 / math.sqrt(4) * (b @ a)
    torch.testing.assert_close(w[1][f"{key}.weight"] - w[0][f"{key}.weight"], delta)


# ---- errors ----


def edit(folder, drop=(), add=None, **config):
    path = os.path.join(folder, "adapter_model.safetensors")
    state = {k: v for k, v in load_file(path).items() if k not in drop} | (add or {})
    save_file(state, path)
    path = os.path.join(folder, "adapter_config.json")
    changed = json.load(open(path)) | config
    json.dump(changed, open(path, "w"))


def test_inject_errors(base):
    model = M.from_pretrained(base("modernbert")[1])
    everything = dict(rank=4, alpha=8, dropout=0.0)
    with pytest.raises(ValueError, match="'q_proj'.*'qkv_proj', 'o_proj', 'gate_up_proj'"):
        lora.inject(model, targets="q_proj,o_proj", **everything)
    with pytest.raises(ValueError, match="targets=''"):
        lora.inject(model, targets="", **everything)
    with pytest.raises(ValueError, match="'norms'.*'embed', 'norm', 'head'"):
        lora.inject(model, targets="all", train_also="norms", **everything)
    with pytest.raises(ValueError, match="'head'.*'embed', 'norm'"):  # tied, no bias
        lora.inject(M.from_pretrained(base("qwen3")[1]), targets="all", train_also="head",
                    **everything)  # fmt: skip
    with pytest.raises(ValueError, match="rank 0"):
        lora.inject(model, rank=0, alpha=8, dropout=0.0, targets="all")
    assert all(p.requires_grad for p in model.parameters())  # nothing has happened yet
    with pytest.raises(ValueError, match="no adapter"):
        lora.merge(model)
    with pytest.raises(ValueError, match="no adapter"):
        lora.save_adapter(model, "nowhere", "base")
    lora.inject(model, targets="all", **everything)
    with pytest.raises(ValueError, match="merge it first"):
        lora.inject(model, targets="all", **everything)


def test_save_error(base, tmp_path):
    model = adapted(base("llama")[1])
    model.classifier = nn.Linear(64, 3)
    with pytest.raises(ValueError, match="'classifier'"):
        lora.save_adapter(model, str(tmp_path), "base")


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "message,changes",
    [
        ("use_dora = True: not supported", dict(use_dora=True)),
        ("bias = 'all': not supported", dict(bias="all")),
        ("init_lora_weights = 'pissa': not supported", dict(init_lora_weights="pissa")),
        ("some_new_key = 1: not supported", dict(some_new_key=1)),
        ("'IA3', expected LORA", dict(peft_type="IA3")),
        ("missing.*blocks.1.attn.q_proj.lora_B", dict(drop=[f"{Q}.lora_B.weight"])),
        ("missing.*q_proj.lora_A", dict(drop=[f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"])),
        ("missing.*q_proj.lora_A", dict(  # a regular expression over an inner class's names
            drop=[f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"],
            target_modules=r"layers\.\d\.self_attn\..*")),
        ("missing.*: norm.weight", dict(drop=["base_model.model.model.norm.weight"])),
        ("missing.*: lm_head.weight", dict(modules_to_save=["lm_head"])),
        ("unexpected.*classifier", dict(add={"base_model.model.classifier.weight": torch.ones(3)})),
        ("unexpected.*magnitude", dict(add={f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        ("unexpected.*layers.7", dict(add={Q.replace("1", "7") + ".lora_A.weight": torch.ones(3)})),
        (r"lora_A is \(4, 65\), the model's is \(4, 64\)",
         dict(add={f"{Q}.lora_A.weight": torch.ones(4, 65)})),
        (r"embed.weight is \(96, 64\)",
         dict(add={"base_model.model.model.embed_tokens.weight": torch.ones(96, 64)})),
        ("missing.*: lm_head.weight",  # new rows for the embedding alone
         dict(add={"base_model.model.model.embed_tokens.weight": torch.ones(99, 64)})),
    ],
)  # fmt: skip
def test_load_errors(base, tmp_path, message, changes):
    folder = base("llama")[1]
    lora.save_adapter(adapted(folder, train_also="norm"), str(tmp_path), folder)
    edit(str(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        lora.load_adapter(M.from_pretrained(folder), str(tmp_path))


def test_peft_dora(base, tmp_path):
    cls, folder = base("llama")
    make_peft(cls, folder, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora"):
        lora.load_adapter(M.from_pretrained(folder), str(tmp_path))
