"""train_mntp.py: what it masks and asks, and tiny runs of it, whole, killed and resumed, on ranks.

python -m pytest tests/test_mntp.py
"""

import copy
import glob
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import processors

import common
import harness
import lora
import sample
import train_mntp
from data import load_tokenizer, make_seqs, open_tokens, read_row, vocab_size_of
from embedder import Embedder
from harness import ROOT, kill_at_step, losses, run_ranks, start, wait_for_step
from model import ModelConfig, Transformer, from_pretrained, init_weights

TINY = """
mask_token = "own"
max_seq_len = 64
batch_size = 512  # 8 rows
device_batch_size = 256
max_steps = 8
lora_rank = 4
lora_alpha = 8.0
learning_rate = 1e-2
log_interval = 1
eval_interval = 4
eval_tokens = 640
save_interval = 4
dtype = "fp32"
"""
_SHAPE = dict(n_layer=3, n_head=4, n_embd=32, n_hidden=48, max_seq_len=128)
FAMILIES = {
    "llama": _SHAPE | dict(n_kv_head=2),
    "mistral": _SHAPE | dict(n_kv_head=2, layer_kinds=["local"] * 3, window=16, tied=False),
    "qwen2": _SHAPE | dict(n_kv_head=1, qkv_bias=True, tied=False),
    "qwen3": _SHAPE | dict(n_kv_head=2, qk_norm=True, head_dim=16),
    "modernbert-decoder": _SHAPE | dict(
        layer_kinds=["global", "local", "local"], window=16, norm="layer", embed_norm=True,
        fused_mlp=True, activation="gelu", head="dense", head_bias=True),
}  # fmt: skip
SCRIPT = "train_mntp.py"
arguments = partial(harness.arguments, SCRIPT)


@pytest.fixture(scope="module")
def folder_of(toy_tokens, tmp_path_factory):
    """The folder of a small causal decoder of a family, with the tokenizer of toy_tokens."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
            n = vocab_size_of(tokenizer) + (family == "qwen2")  # transformers adds <|endoftext|>
            shape = FAMILIES[family] | dict(vocab_size=n, hf=dict(pad_token_id=2))
            torch.manual_seed(0)
            model = init_weights(Transformer(ModelConfig(family=family, **shape)))
            with torch.no_grad():
                for p in model.parameters():  # so that what attention does is to be seen
                    p.add_(torch.randn_like(p) * 0.1)
            model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="module")
def tiny(toy_tokens, folder_of, tmp_path_factory):
    """A config file for the smallest run."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY + f"data_dir = {toy_tokens!r}\ninit_from = {folder_of('qwen3')!r}\n")
    return str(path)


def run(config, out_dir, *more):
    harness.run(SCRIPT, config, out_dir, *more)
    return losses(out_dir)


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """The run on one rank that others are compared with."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    run(tiny, out_dir)
    return out_dir


def assert_same_tensors(a, b):
    """Bit by bit. (Not the files: the order of notes in an adapter's header is not fixed.)"""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def settings_of(**changes):
    return dict(chunks=False, max_seq_len=64, mask_prob=0.3, mask_all=False, mask_id=3, seed=5,
                ordinary=np.arange(4, 300), n_rows=40, rows_per_step=12) | changes  # fmt: skip


# ---- what is asked of the model ----


@pytest.mark.parametrize("mask_all", [False, True])
def test_masking_counts_and_spares_special_tokens(mask_all):
    rng = np.random.default_rng(0)
    ids, ordinary = rng.integers(0, 100, 200_000), np.arange(5, 100)  # 0-4 are special
    lengths = [50] * 4000
    inputs, rows, targets = train_mntp.mask_next(ids, lengths, rng, 0.3, mask_all, 3, ordinary)
    masked = rows + 1
    assert (ids[masked] == targets).all() and (targets >= 5).all()
    assert (masked % 50 > 0).all()  # never a text's first token
    untouched = np.setdiff1d(np.arange(len(ids)), masked)
    assert (inputs[untouched] == ids[untouched]).all()
    n = (ids[np.arange(len(ids)) % 50 > 0] >= 5).sum()
    assert abs(len(rows) / n - 0.3) < 0.005
    hidden, kept = (inputs[masked] == 3).mean(), (inputs[masked] == targets).mean()
    if mask_all:
        assert hidden == 1
    else:
        assert abs(hidden - 0.8) < 0.01 and abs(kept - (0.1 + 0.1 / 95)) < 0.01
        swapped = inputs[masked][(inputs[masked] != 3) & (inputs[masked] != targets)]
        assert (swapped >= 5).all()


@pytest.mark.parametrize("chunks", [False, True])
def test_targets_are_those_of_a_plain_loop(toy_tokens, chunks):
    """Where documents have borders, and where they run on."""
    tokens = open_tokens(toy_tokens, "train")
    s = settings_of(chunks=chunks, mask_all=True)
    inputs, seqs, rows, targets = train_mntp.make_batch(tokens, [3, 7], [0, 1], s)
    expected, at, firsts = [], 0, set()
    for row in (3, 7):
        ids, lengths = read_row(tokens, row, 64)
        for n in [64] if chunks else lengths:
            for i in range(n):  # token i of a text, masked, is asked for at i - 1
                if inputs[at + i] == 3:
                    expected.append((at + i - 1, int(ids[at % 64 + i])))
            firsts.add(at)
            at += n
    assert seqs.lengths == ([64, 64] if chunks else seqs.lengths) and len(expected) > 20
    assert list(zip(rows.tolist(), targets.tolist(), strict=True)) == expected
    assert not any(inputs[i] == 3 for i in firsts) and (chunks or len(firsts) > 4)
    again = train_mntp.make_batch(tokens, [7], [1], s)
    assert torch.equal(again[0], inputs[64:])  # a function of (seed, epoch, row) alone
    assert not torch.equal(train_mntp.make_batch(tokens, [7], [0], s)[0], inputs[64:])


def test_ranks_share_the_rows_and_masks_of_one_rank(toy_tokens):
    tokens = open_tokens(toy_tokens, "train")

    def rows_of(world_size):
        found = {}
        for rank in range(world_size):
            s = settings_of(rank=rank, world_size=world_size, rows_per_batch=2)
            for step, batches in enumerate(train_mntp.train_batches(tokens, 0, 3, s)):
                for inputs, _, rows, targets in batches:
                    for i, row in enumerate(inputs.view(-1, 64)):
                        here = (rows >= i * 64) & (rows < i * 64 + 64)
                        labels = (rows[here] - i * 64).tolist(), targets[here].tolist()
                        found[step, tuple(row.tolist())] = labels
        return found

    assert rows_of(1) == rows_of(2) == rows_of(3)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers_document_by_document(
    family, folder_of, toy_tokens
):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = open_tokens(toy_tokens, "train")
    inputs, seqs, rows, targets = train_mntp.make_batch(tokens, [2, 9], [0, 0], settings_of())
    ours = from_pretrained(folder_of(family), "bidirectional", dtype=torch.float64).eval()
    loss, _ = ours(inputs, seqs, rows, targets)
    loss.backward()

    config = AutoConfig.from_pretrained(folder_of(family), is_causal=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder_of(family), config=config)
    theirs = theirs.double().eval()
    want, start = 0.0, 0
    asked = dict(zip(rows.tolist(), targets.tolist(), strict=True))
    for n in seqs.lengths:
        logits = theirs(input_ids=inputs[None, start : start + n]).logits[0]
        for i in range(n):
            if start + i in asked:
                want = want + F.cross_entropy(logits[i], torch.tensor(asked[start + i]))
        start += n
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    got, want = ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad
    assert want.norm() > 0.1 and (got - want).norm() < 1e-6 * want.norm()


def test_learning_rates():
    rate = partial(train_mntp.learning_rate_at, peak=1.0, floor=0.1, warmup=10)
    assert rate(0, 100, schedule="linear", decay=90) == 0.1
    assert rate(9, 100, schedule="linear", decay=90) == 1.0
    assert rate(55, 100, schedule="linear", decay=90) == pytest.approx(0.55)
    assert rate(55, 100, schedule="cosine", decay=90) == pytest.approx(0.55)
    assert rate(100, 100, schedule="linear", decay=90) == pytest.approx(0.1)  # the horizon
    assert rate(99, 100, schedule="constant", decay=90) == 1.0
    assert rate(79, 100, schedule="linear", decay=20) == 1.0
    assert rate(90, 100, schedule="linear", decay=20) == pytest.approx(0.55)


# ---- bidirectional, in training and after ----


def early_change(forward, n=12):
    """How much the first state depends on the last token: a text, and the same with another end."""
    ids = torch.arange(5, 5 + n)
    other = ids.clone()
    other[-1] = 100
    with torch.no_grad():
        return (forward(ids)[0] - forward(other)[0]).abs().max().item()


def their_states(model, ids):
    return model(ids[None], output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_bidirectional_and_stays_so(family, tiny, folder_of, tmp_path):
    from transformers import AutoModelForCausalLM

    base = folder_of(family)
    states = lambda model: lambda ids: model(ids, make_seqs([len(ids)]))  # noqa: E731
    assert early_change(states(from_pretrained(base).eval())) == 0  # it was causal
    done = harness.run(SCRIPT, tiny, tmp_path, f"--init_from={base}", "--max_steps=3")
    trained = done.raw.eval()
    assert early_change(states(trained)) > 1e-3

    merged = str(tmp_path / "merged")
    ids = torch.arange(20, 60)
    with torch.no_grad():
        ours = trained(ids, make_seqs([40]), rows=torch.arange(40))
        again = from_pretrained(merged).eval()  # nobody says bidirectional
        # transformers' own eager attention of this family fails without an attention mask
        eager = [] if family == "modernbert-decoder" else ["eager"]
        for implementation in ["sdpa", *eager]:
            theirs = AutoModelForCausalLM.from_pretrained(
                merged, attn_implementation=implementation
            ).eval()
            for batch in (1, 3):
                got = theirs(input_ids=ids.expand(batch, -1)).logits[-1]
                assert (got - ours).abs().max() < 1e-4, (implementation, batch)
            assert early_change(partial(their_states, theirs)) > 1e-3, implementation
    assert early_change(states(again)) > 1e-3

    # an out_dir, base + adapter, the merged folder: the same vectors, bidirectional unsaid
    texts = ["tan mon rin", "sulo kema"]
    load = partial(Embedder.load, device="cpu", dtype="fp32")
    want = load(merged).encode(texts)
    assert np.abs(load(str(tmp_path)).encode(texts) - want).max() < 1e-6
    adapter = str(tmp_path / "step3")
    chained = load(base, adapters=(adapter,), attention="bidirectional")
    assert np.abs(chained.encode(texts) - want).max() < 1e-6
    assert np.abs(load(base, adapters=(adapter,)).encode(texts) - want).max() < 1e-6
    assert np.abs(load(base).encode(texts) - want).max() > 1e-3
    with pytest.raises(ValueError, match="belongs to a bidirectional model, this one is causal"):
        lora.load_adapter(from_pretrained(base), adapter)


def test_adapter_chain_equals_peft(unbroken, folder_of, tmp_path):
    """Base + merged MNTP + a new LoRA: LLM2Vec's next stage."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    base, adapter = folder_of("qwen3"), str(unbroken / "step8")
    for start_from in ("adapter", "merged"):
        if start_from == "adapter":
            model = from_pretrained(base, "bidirectional")
            lora.load_adapter(model, adapter)
            lora.merge(model)
        else:
            model = from_pretrained(str(unbroken / "merged"))
        torch.manual_seed(1)
        lora.inject(model, 4, 8.0, 0.0, "all")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.normal_(0, 0.1)
        second = str(tmp_path / start_from)
        lora.save_adapter(model, second, base)

        config = AutoConfig.from_pretrained(base, is_causal=False)
        theirs = AutoModelForCausalLM.from_pretrained(base, config=config)
        theirs = PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
        theirs = PeftModel.from_pretrained(theirs, second).eval()
        ids = torch.arange(20, 60)
        with torch.no_grad():
            ours = model.eval()(ids, make_seqs([40]), rows=torch.arange(40))
            want = theirs(input_ids=ids[None]).logits[0]
        assert (ours - want).abs().max() < 1e-4
        with theirs.disable_adapter(), torch.no_grad():
            assert (theirs(input_ids=ids[None]).logits[0] - want).abs().max() > 0.01


# ---- the mask's token ----


def test_mask_tokens(tiny, unbroken, folder_of, tmp_path, capsys):
    tokenizer = load_tokenizer(folder_of("qwen3"))
    same = ["a_b tan_mon", "tan mon [MASK]"]
    ids = tokenizer(same)["input_ids"]
    vocab = tokenizer.get_vocab()
    expected = {"_": vocab["_"], "eos": tokenizer.eos_token_id, "own": tokenizer.mask_token_id}
    for word, mask_id in expected.items():
        assert train_mntp.choose_mask(tokenizer, word) == mask_id
    run(tiny, tmp_path, "--mask_token=_", "--max_steps=1")
    for name in ("step1", "merged"):  # noted; and the tokenizer reads texts as before
        with open(tmp_path / name / "mntp.json") as f:
            assert json.load(f) == {"mask": "_", "mask_id": vocab["_"], "at": -1}
        kept = load_tokenizer(str(tmp_path / name))
        assert kept(same)["input_ids"] == ids and kept.mask_token == "[MASK]"

    tokenizer.mask_token = None
    with pytest.raises(SystemExit, match="the tokenizer has none"):
        train_mntp.choose_mask(tokenizer, "own")
    with pytest.raises(SystemExit, match="expected a token of the vocabulary"):
        train_mntp.choose_mask(tokenizer, "<msk>")


@pytest.mark.parametrize("family", ["llama", "mistral"])  # a tied head, and one of its own
def test_a_new_mask_token_trains_and_is_saved(family, tiny, folder_of, tmp_path):
    """Its row is in the adapter and in the merged folder; whole, and resumed."""
    base = str(tmp_path / "base")
    from_pretrained(folder_of(family)).save_pretrained(base)
    tokenizer = load_tokenizer(folder_of(family))
    tokenizer.mask_token = None
    tokenizer.save_pretrained(base)
    more = [f"--init_from={base}", "--mask_token=new"]
    with pytest.raises(SystemExit, match="train_also='embed'"):
        run(tiny, tmp_path / "a", *more)
    more += ["--train_also=embed", "--schedule=constant"]
    done = harness.run(SCRIPT, tiny, tmp_path / "a", *more)
    start_row = from_pretrained(folder_of(family)).embed.weight.detach().mean(0)
    n = vocab_size_of(load_tokenizer(folder_of(family)))
    row = done.raw.embed.weight[n].detach()
    assert done.mask_id == n and len(done.raw.embed.weight) == n + 1
    assert (row - start_row).abs().max() > 1e-3  # it has moved
    run(tiny, tmp_path / "b", *more, "--max_steps=4")
    assert run(tiny, tmp_path / "b", *more, "--resume=True") == losses(tmp_path / "a")
    assert_same_tensors(*(tmp_path / x / "step8/adapter_model.safetensors" for x in "ab"))
    texts = ["tan mon<mask> rin", "sulo kema"]
    load = partial(Embedder.load, device="cpu", dtype="fp32")
    vectors = [load(str(tmp_path / path)).encode(texts) for path in ("a", "a/merged")]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6
    assert torch.equal(from_pretrained(str(tmp_path / "a/merged")).embed.weight[n], row)
    assert load_tokenizer(str(tmp_path / "a/merged")).mask_token_id == n


def test_sample_reads_one_place_before(unbroken):
    for name in ("step8", "merged"):  # an adapter, and a model
        net, tokenizer, folder = sample.load(
            str(unbroken / name), torch.device("cpu"), torch.float32
        )
        assert not net.config.causal and os.path.exists(os.path.join(folder, "mntp.json"))
        notes = sample.read_notes(folder)
        assert notes == {"mask": "[MASK]", "mask_id": tokenizer.mask_token_id, "at": -1}
        bare = copy.deepcopy(tokenizer)  # as a decoder's: another token was its mask
        bare.mask_token = None
        for asked, mask_id in ((tokenizer, tokenizer.mask_token_id), (bare, 99)):
            notes = notes | {"mask_id": mask_id}
            [(ids, places, p, _)] = sample.fill(net, asked, ["tan mon[MASK] rin"], 5, notes)
            ids = torch.tensor(ids)
            ids[places] = mask_id
            with torch.no_grad():
                logits = net(ids, make_seqs([len(ids)]), torch.tensor(places) - 1)
            assert torch.allclose(p, logits.softmax(-1).topk(5).values)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    with pytest.raises(SystemExit, match="nothing stands before"):
        sample.fill(net, tokenizer, ["[MASK] mon"], 5, notes)


# ---- whole runs ----


def test_a_run_learns_and_evaluates_on_fixed_masks(tiny, unbroken, tmp_path):
    curve = losses(unbroken)
    assert list(curve) == list(range(1, 9)) and curve[8] < curve[1] - 0.2
    evals = losses(unbroken, "eval_loss")
    assert sorted(evals) == [4, 8] and evals[8] < evals[4]
    assert sorted(losses(unbroken, "eval_acc")) == [4, 8]
    still = ["--learning_rate=1e-30", "--eval_interval=2", "--max_steps=4"]
    run(tiny, tmp_path, *still)
    assert len(set(losses(tmp_path, "eval_loss").values())) == 1  # the same masks


def test_every_weight_trains_and_the_folder_has_them(tiny, tmp_path):
    done = harness.run(SCRIPT, tiny, tmp_path, "--lora_rank=0", "--chunks=True", "--max_steps=2")
    assert all(p.requires_grad for p in done.raw.parameters())
    back = from_pretrained(str(tmp_path / "step2"))
    assert not back.config.causal and not os.path.exists(tmp_path / "merged")
    for name, p in done.raw.named_parameters():
        assert torch.equal(back.get_parameter(name), p), name
    first = from_pretrained(done.init_from)
    assert not torch.equal(back.get_parameter("norm.weight"), first.get_parameter("norm.weight"))


def test_the_head_is_frozen_under_lora(unbroken, folder_of):
    back, base = from_pretrained(str(unbroken / "merged")), from_pretrained(folder_of("qwen3"))
    assert torch.equal(back.lm_head.weight, base.lm_head.weight)
    changed = [n for n, p in back.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(changed) == 3 * 7 and all("proj" in name for name in changed)


def test_accumulation_equals_one_batch(tiny, tmp_path):
    more = ["--lora_dropout=0.0", "--max_steps=3"]
    whole = run(tiny, tmp_path, *more, "--device_batch_size=512")
    parts = run(tiny, tmp_path / "b", *more, "--device_batch_size=64")
    assert whole == pytest.approx(parts, rel=1e-5)


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path, capsys):
    whole = run(tiny, tmp_path / "whole", "--max_steps=20")
    process = start(1, SCRIPT, tiny, tmp_path / "broken", "--max_steps=20")
    kill_at_step(process, tmp_path / "broken", random.randint(6, 14))
    capsys.readouterr()
    resumed = run(tiny, tmp_path / "broken", "--max_steps=20", "--resume=True")
    step = int(re.search(r"resumed .*, after step (\d+)", capsys.readouterr().out)[1])
    assert step < 20 and resumed == whole
    evals = [losses(tmp_path / name, "eval_loss") for name in ("whole", "broken")]
    assert evals[0] == evals[1] and sorted(evals[0]) == [4, 8, 12, 16, 20]
    for name in ("step20/adapter_model.safetensors", "merged/model.safetensors"):
        assert_same_tensors(tmp_path / "whole" / name, tmp_path / "broken" / name)


def test_sigterm_saves_and_exits(tiny, tmp_path):
    process = start(1, SCRIPT, tiny, tmp_path, "--save_interval=1000", "--max_steps=9999")
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert f"saved {tmp_path}/step{max(losses(tmp_path))}" in out
    assert not os.path.exists(tmp_path / "merged")  # training is not over


def test_two_ranks_equal_one(tiny, tmp_path):
    """DDP and FSDP, each whole and in two halves: the losses and the adapter of one rank."""
    more = ["--lora_dropout=0.0", "--device_batch_size=128", "--learning_rate=1e-3"]
    one = run(tiny, tmp_path / "one", *more)
    kinds, argvs = {"ddp": [], "fsdp": ["--fsdp=True"]}, []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *more, *flags))
        # halves, with dropout: resumed is bit-equal on ranks, too
        other = [*more, *flags, "--schedule=constant", "--lora_dropout=0.1"]
        argvs.append(arguments(tiny, tmp_path / (kind + "-constant"), *other))
        half = arguments(tiny, tmp_path / (kind + "-half"), *other)
        argvs += [half + ["--max_steps=4"], half + ["--resume=True"]]
    argvs.append(arguments(tiny, tmp_path / "bf16", "--fsdp=True", "--dtype=bf16", "--max_steps=2",
                           "--train_also=norm"))  # fmt: skip
    run_ranks(2, argvs)
    want = from_pretrained(str(tmp_path / "one" / "merged")).state_dict()
    for kind in kinds:
        assert losses(tmp_path / kind) == pytest.approx(one, rel=1e-5), kind
        assert losses(tmp_path / kind, "eval_loss") == pytest.approx(
            losses(tmp_path / "one", "eval_loss"), rel=1e-5
        )
        assert losses(tmp_path / kind, "gnorm") == pytest.approx(
            losses(tmp_path / "one", "gnorm"), rel=1e-4
        )
        have = from_pretrained(str(tmp_path / kind / "merged")).state_dict()
        for name in want:
            assert (have[name] - want[name]).norm() <= 1e-4 * want[name].norm(), (kind, name)
        whole, half = tmp_path / (kind + "-constant"), tmp_path / (kind + "-half")
        assert losses(half) == losses(whole) and losses(whole) != losses(tmp_path / kind)
        name = "step8/adapter_model.safetensors"
        assert_same_tensors(whole / name, half / name)
    assert sorted(losses(tmp_path / "bf16")) == [1, 2]


def test_show_batch_and_dry_run(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, "--show_batch=True")
    shown = capsys.readouterr().out
    assert "--- text 1:" in shown and "[MASK]" in shown and "\033[7m" in shown
    assert not os.listdir(tmp_path)
    harness.run(SCRIPT, tiny, tmp_path / "dry", "--dry_run=True")
    out = capsys.readouterr().out
    assert re.search(r"dry run: [\d.]+ s/step, [\d,]+ tok/s, peak memory [\d.]+ GB", out)
    assert not os.path.exists(tmp_path / "dry")


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit, match="4th such step"):
        run(tiny, tmp_path, "--learning_rate=1e30", "--schedule=constant", "--save_interval=1")
    out = capsys.readouterr().out
    assert re.search(r"step 2: loss (nan|inf)", out) and "Rows of" in out
    assert common.latest_checkpoint(str(tmp_path), "step")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size=700"], "batch_size=700 must be k x device_batch_size=256"),
        (["--device_batch_size=100"], "device_batch_size=100 must be a multiple of max_seq_len=64"),
        (["--data_dir=nowhere"], "nowhere"),
        (["--data_dir=data/pydocs"], "data/pydocs"),
        (["--schedule=cosin"], "schedule='cosin': expected linear, cosine or constant"),
        (["--init_from=nowhere/at/all"], "no such folder"),
        (["--num_epochs=3"], "max_steps=8, num_epochs=3.0; expected one of them"),
        (["--mask_token=<msk>"], "mask_token='<msk>': expected a token of the vocabulary"),
        (["--mask_token=new", "--train_also=embed"], "has '[MASK]' already"),
        (["--fsdp=True"], "start with torchrun"),
        (["--lora_targets=query"], "query"),
        (["--max_seq_len=256", "--batch_size=256"], "trained for 128 positions"),
    ],
)
def test_bad_settings_say_what_is_expected(tiny, tmp_path, more, message):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        run(tiny, tmp_path, *more)
    assert message in str(error.value)


def test_refusals(tiny, unbroken, toy_tokens, folder_of, tmp_path):
    with pytest.raises(SystemExit, match="--resume=True goes on"):
        run(tiny, unbroken)
    model = from_pretrained(folder_of("mistral"))
    model.drop_head()
    model.save_pretrained(str(tmp_path / "bare"))
    tokenizer = load_tokenizer(folder_of("mistral"))
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(SystemExit, match="no language modelling head"):
        run(tiny, tmp_path / "out", f"--init_from={tmp_path / 'bare'}")
    data = tmp_path / "data"
    shutil.copytree(toy_tokens, data)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(str(data / "tokenizer"))
    with pytest.raises(SystemExit, match="has another tokenizer than"):
        run(tiny, tmp_path / "out", f"--data_dir={data}")


# ---- configs and data ----


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "configs", "mntp_*.py"))))
def test_configs_name_keys_and_divide(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_mntp.py", path])
    space = {k: v for k, v in vars(train_mntp).items() if not k.startswith("__")}
    space |= {"__file__": train_mntp.__file__, "__doc__": ""}
    config = common.configure(space)
    assert config["device_batch_size"] % config["max_seq_len"] == 0
    assert config["batch_size"] % config["device_batch_size"] == 0
    if path.endswith("mntp_llm2vec.py"):
        for name, mask in {
            "x/Mistral-7B-Instruct-v0.2": (0.8, True), "x/Llama-2-7b-chat-hf": (0.2, False),
            "x/Meta-Llama-3.1-8B-Instruct": (0.2, False), "x/Qwen3-0.6B": (0.2, False),
        }.items():  # fmt: skip
            monkeypatch.setattr(sys, "argv", ["train_mntp.py", path, f"--init_from={name}"])
            config = common.configure(dict(space))
            assert (config["mask_prob"], config["mask_all"]) == mask


def test_wikitext_articles(toy_tokens, tmp_path, capsys):
    prepare = runpy.run_path(os.path.join(ROOT, "data", "wikitext103", "prepare.py"))
    text = "\n = One = \n\n A , b @-@ c . \n\n = = Part = = \n\n D . \n = f ( x ) = \n E . \n\n"
    text += " = Two = \n\n F g . \n"
    for name in ("wiki.train.raw", "wiki.valid.raw"):
        (tmp_path / name).write_text(text)
    found = list(prepare["articles"](iter(text.split("\n")[:-1])))
    assert [t.split("\n")[0 if i else 1] for i, (t, _, _) in enumerate(found)] == [
        " = One = ", " = Two = "]  # fmt: skip
    assert sum(n for _, n, _ in found) == text.count("\n")
    assert sum(n for _, _, n in found) == len(text.split())
    argv = ["--tokenizer", os.path.join(toy_tokens, "tokenizer"), "--input", str(tmp_path)]
    prepare["main"]([*argv, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert re.search(rf"train +2 articles +{len(text.split()) + text.count(chr(10))} words", out)
    tokens = open_tokens(str(tmp_path / "out"), "val")
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    assert tokens.tokens[: tokens.starts[1]].tolist() == tokenizer(found[0][0])["input_ids"]
