"""train_mntp.py: what it masks and asks, and tiny runs, whole, killed and resumed, on ranks."""

import copy
import json
import os
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors

import harness
import lora
import optim
import sample
import token_rows
import train_mntp
from attention import make_seqs
from checkpoint import latest_checkpoint
from embedder import Embedder
from formats import read_json
from formats.huggingface import from_pretrained, save_pretrained
from harness import assert_close, assert_equal_bits, configured, losses, raises, write_config
from model import Transformer
from tokenizer import load_tokenizer, vocab_size_of
from tokens import open_tokens, read_row, write_meta

TINY = dict(
    mask_token="own", max_seq_len=64, batch_tokens=512, device_batch_tokens=256, max_steps=8,
    lora_rank=4, lora_alpha=8.0, learning_rate=1e-2, log_interval=1, eval_interval=4,
    eval_tokens=640, save_interval=4, dtype="fp32")  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "modernbert-decoder")
SCRIPT = "train_mntp.py"
arguments = partial(harness.arguments, SCRIPT)


@pytest.fixture(scope="module")
def tiny(toy_tokens, folders, tmp_path_factory):
    """A config file for the smallest run."""
    keys = TINY | dict(data=toy_tokens, init_from=folders["qwen3"])
    return write_config(tmp_path_factory.mktemp("config"), **keys)


def run(config, out_dir, *more):
    harness.run(SCRIPT, config, out_dir, *more)
    return losses(out_dir)


def settings(**changes):
    return SimpleNamespace(**dict(max_seq_len=64, mask_prob=0.3, mask_all=False, mask_id=3, seed=5,
                                  ordinary=np.arange(4, 300)) | changes)  # fmt: skip


# ---- what is asked of the model ----
@pytest.mark.parametrize("mask_all", [False, True])
def test_masking_counts_and_spares_special_tokens(mask_all):
    rng = np.random.default_rng(0)
    s = settings(mask_all=mask_all, ordinary=np.arange(5, 100))  # 0-4 are special
    ids, lengths = rng.integers(0, 100, 200_000), [50] * 4000
    inputs, rows, targets = train_mntp.mask_next(ids, lengths, rng, s)
    assert ((rows + 1) % 50 > 0).all()  # never a text's first token
    n = (ids[np.arange(len(ids)) % 50 > 0] >= 5).sum()
    harness.assert_masked(ids, inputs, rows + 1, targets, n, s)


@pytest.mark.parametrize("chunks", [False, True])
def test_targets_are_those_of_a_plain_loop(toy_tokens, chunks):
    """Where documents have borders, and where they run on."""
    documents, s = open_tokens(toy_tokens, "train"), settings(mask_all=True)
    tokens = token_rows.open_rows(toy_tokens, "train", 64, chunks)

    def make_batch(rows, epochs):
        rows = token_rows.read_rows(tokens, epochs, rows)
        return token_rows.make_batch(rows, train_mntp.mask_next, s)

    batch = make_batch([3, 7], [0, 1])
    expected, first, firsts = [], 0, set()
    for row in (3, 7):
        ids, lengths = read_row(documents, row, 64)
        for n in [64] if chunks else lengths:
            for i in range(n):  # token i of a text, masked, is asked for at i - 1
                if batch.inputs[first + i] == 3:
                    expected.append((first + i - 1, int(ids[first % 64 + i])))
            firsts.add(first)
            first += n
    assert batch.seqs.lengths == ([64, 64] if chunks else batch.seqs.lengths)
    assert list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert len(expected) > 20 and (chunks or len(firsts) > 4)
    assert not any(batch.inputs[i] == 3 for i in firsts)
    again = make_batch([7], [1])
    assert torch.equal(again.inputs, batch.inputs[64:])  # a function of (seed, epoch, row) alone
    assert not torch.equal(make_batch([7], [0]).inputs, batch.inputs[64:])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers_document_by_document(
    family, folders, toy_tokens
):
    from transformers import AutoConfig, AutoModelForCausalLM

    s, tokens = settings(), token_rows.open_rows(toy_tokens, "train", 64)
    rows = token_rows.read_rows(tokens, [0, 0], [2, 9])
    batch = token_rows.make_batch(rows, train_mntp.mask_next, s)
    ours = from_pretrained(folders[family], "bidirectional", dtype=torch.float64).eval()
    loss, _ = ours(*batch.to("cpu"))
    loss.backward()

    config = AutoConfig.from_pretrained(folders[family], is_causal=False)
    theirs = AutoModelForCausalLM.from_pretrained(folders[family], config=config)
    theirs = theirs.double().eval()
    want, first = 0.0, 0
    answers = dict(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))
    for n in batch.seqs.lengths:
        logits = theirs(input_ids=batch.inputs[None, first : first + n]).logits[0]
        for i in range(n):
            if first + i in answers:
                want = want + F.cross_entropy(logits[i], torch.tensor(answers[first + i]))
        first += n
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    got, want = ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad
    assert want.norm() > 0.1 and (got - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize(("schedule", "shares"), [  # from min_lr up, in each of eight steps
    ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),  # the decay begins with the warmup's end
    ("wsd", [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),  # the decay ends with the run
])  # fmt: skip
def test_decay_steps_by_schedule_and_stop_step(schedule, shares, tiny, tmp_path):
    more = [f"--schedule={schedule}", "--decay_shape=linear", "--warmup_steps=2", "--decay_steps=4"]
    run(tiny, tmp_path / "a", *more, "--learning_rate=1e-3", "--eval_interval=0")
    rates = losses(tmp_path / "a", "lr")
    assert list(rates.values()) == pytest.approx([1e-3 * share for share in shares])
    # ends before the horizon, on the way there
    run(tiny, tmp_path / "b", *more, "--learning_rate=1e-3", "--eval_interval=0", "--stop_step=6")
    for column in ("loss", "gnorm", "lr"):
        whole = losses(tmp_path / "a", column)
        assert losses(tmp_path / "b", column) == {step: whole[step] for step in range(1, 7)}
    assert os.path.exists(tmp_path / "b/step6") and os.path.exists(tmp_path / "b/merged")


# ---- bidirectional, in training and after ----
def early_change(model):
    """How much the first state depends on the last token: a text, and the same with another end."""
    first, ids = [], torch.arange(5, 17)
    for ids[-1] in (16, 100):
        with torch.no_grad():
            if isinstance(model, Transformer):
                first.append(model(ids, make_seqs([12]))[0])
            else:
                first.append(model(ids[None], output_hidden_states=True).hidden_states[-1][0, 0])
    return (first[0] - first[1]).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_bidirectional_and_stays_so(family, tiny, folders, tmp_path):
    from transformers import AutoModelForCausalLM

    base, merged, ids = folders[family], str(tmp_path / "merged"), torch.arange(20, 60)
    assert early_change(from_pretrained(base).eval()) == 0  # it was causal
    done = harness.run(SCRIPT, tiny, tmp_path, f"--init_from={base}", "--max_steps=3")
    trained = done.model.eval()
    assert early_change(trained) > 1e-3
    assert early_change(from_pretrained(merged).eval()) > 1e-3  # nobody says it
    assert os.readlink(tmp_path / "final") == "merged"

    # transformers' own eager attention of this family fails without an attention mask
    for kind in ["sdpa"] + ["eager"] * (family != "modernbert-decoder"):
        theirs = AutoModelForCausalLM.from_pretrained(merged, attn_implementation=kind).eval()
        for batch in (1, 3):
            with torch.no_grad():
                want = trained(ids, make_seqs([40]), rows=torch.arange(40))
                got = theirs(input_ids=ids.expand(batch, -1)).logits[-1]
            assert (got - want).abs().max() < 1e-4, (kind, batch)
        assert early_change(theirs) > 1e-3, kind

    # an out_dir, base + adapter, the merged folder: the same vectors, bidirectional unsaid
    texts, adapter = ["tan mon rin", "sulo kema"], str(tmp_path / "step3")
    load = partial(Embedder.load, device="cpu", dtype="fp32")
    want = load(merged).encode(texts)
    for same in (load(str(tmp_path)), load(base, adapters=(adapter,)),
                 load(base, adapters=(adapter,), attention="bidirectional")):  # fmt: skip
        assert np.abs(same.encode(texts) - want).max() < 1e-6
    assert np.abs(load(base).encode(texts) - want).max() > 1e-3
    with pytest.raises(ValueError, match="belongs to a bidirectional model, this one is causal"):
        lora.load_adapter(from_pretrained(base), adapter)


def test_positions_grow_and_the_base_keeps_its_precision(tiny, folders, tmp_path):
    """Rows longer than the model's 128 positions; the merged model is rounded once, from fp32."""
    base = str(tmp_path / "base")
    save_pretrained(from_pretrained(folders["llama"], dtype=torch.bfloat16), base)
    load_tokenizer(folders["llama"]).save_pretrained(base)
    more = ["--max_seq_len=256", "--device_batch_tokens=512", "--max_steps=2", "--dtype=bf16"]
    run(tiny, tmp_path / "out", f"--init_from={base}", *more)
    merged = from_pretrained(str(tmp_path / "out/merged"), dtype=None)
    assert merged.config.max_seq_len == 256
    want = lora.load_merged(base, [str(tmp_path / "out/step2")], dtype=torch.bfloat16)
    for name, tensor in want.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name


# ---- the mask's token ----
def test_mask_tokens(tiny, folders, tmp_path):
    tokenizer, same = load_tokenizer(folders["qwen3"]), ["a_b tan_mon", "tan mon [MASK]"]
    ids, vocab = tokenizer(same)["input_ids"], tokenizer.get_vocab()
    expected = {"_": vocab["_"], "eos": tokenizer.eos_token_id, "own": tokenizer.mask_token_id}
    for word, mask_id in expected.items():
        assert train_mntp.choose_mask(tokenizer, word) == mask_id
    run(tiny, tmp_path, "--mask_token=_", "--max_steps=1")
    for name in ("step1", "merged"):  # noted; and the tokenizer reads texts as before
        assert json.loads((tmp_path / name / "mntp.json").read_text()) == {
            "mask": "_", "mask_id": vocab["_"], "at": -1}  # fmt: skip
        kept = load_tokenizer(str(tmp_path / name))
        assert kept(same)["input_ids"] == ids and kept.mask_token == "[MASK]"

    tokenizer.mask_token = None
    raises(SystemExit, "the tokenizer has none", train_mntp.choose_mask, tokenizer, "own")


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_mask_token_trains_and_is_saved(tied, tiny, folders, tmp_path):
    """Its row is in the adapter and in the merged folder; whole, and stopped and resumed."""
    base, plain = str(tmp_path / "base"), from_pretrained(folders["llama"])
    tokenizer = load_tokenizer(folders["llama"])
    n = plain.config.vocab_size = vocab_size_of(tokenizer)
    plain.embed.weight.data = plain.embed.weight.data[:n].clone()
    if not tied:
        plain.config.tied = False
        plain.lm_head.weight = torch.nn.Parameter(plain.embed.weight.flip(0))
    save_pretrained(plain, base)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(base)
    more = [f"--init_from={base}", "--mask_token=new"]
    raises(SystemExit, "train_also='embed'", run, tiny, tmp_path / "a", *more)
    more += ["--train_also=embed", "--schedule=constant"]
    done = harness.run(SCRIPT, tiny, tmp_path / "a", *more)
    row = done.model.embed.weight[n].detach()
    assert done.s.mask_id == n and len(done.model.embed.weight) == n + 1
    assert (row - plain.embed.weight.detach().mean(0)).abs().max() > 1e-3  # it has moved
    harness.stopped_and_resumed(SCRIPT, tiny, tmp_path / "b", 3, *more)
    assert_equal_bits(tmp_path / "b", tmp_path / "a")
    texts = ["tan mon<mask> rin", "sulo kema"]
    load = partial(Embedder.load, device="cpu", dtype="fp32")
    vectors = [load(str(tmp_path / path)).encode(texts) for path in ("a", "a/merged")]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6
    assert torch.equal(from_pretrained(str(tmp_path / "a/merged")).embed.weight[n], row)
    assert load_tokenizer(str(tmp_path / "a/merged")).mask_token_id == n


def test_sample_reads_one_place_before(unbroken):
    for name in ("step8", "merged"):  # an adapter, and a model
        net, tokenizer, folder = sample.load(f"{unbroken}/{name}")
        notes = sample.read_json(folder, "mntp.json")
        assert notes == {"mask": "[MASK]", "mask_id": tokenizer.mask_token_id, "at": -1}
        assert not net.config.causal
        bare = copy.deepcopy(tokenizer)  # as a decoder's: another token was its mask
        bare.mask_token = None
        for reader, mask_id in ((tokenizer, tokenizer.mask_token_id), (bare, 99)):
            notes["mask_id"] = mask_id
            [(ids, places, p, _)] = sample.fill(net, reader, ["tan mon[MASK] rin"], 5, notes)
            ids = torch.tensor(ids)
            ids[places] = mask_id
            with torch.no_grad():
                logits = net(ids, make_seqs([len(ids)]), torch.tensor(places) - 1)
            assert torch.allclose(p, logits.softmax(-1).topk(5).values)
    plain = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = plain
    with pytest.raises(SystemExit, match="nothing stands before"):
        sample.fill(net, tokenizer, ["[MASK] mon"], 5, notes)


# ---- whole runs ----
def test_a_run_learns_and_evaluates_on_fixed_masks(tiny, unbroken, folders, tmp_path):
    curve = losses(unbroken)
    assert list(curve) == list(range(1, 9)) and curve[8] < curve[1] - 0.2
    evals = losses(unbroken, "eval_loss")
    assert sorted(evals) == sorted(losses(unbroken, "eval_acc")) == [4, 8] and evals[8] < evals[4]
    run(tiny, tmp_path, "--learning_rate=1e-30", "--eval_interval=2", "--max_steps=4")
    assert len(set(losses(tmp_path, "eval_loss").values())) == 1  # the same masks

    back, base = from_pretrained(str(unbroken / "merged")), from_pretrained(folders["qwen3"])
    assert torch.equal(back.lm_head.weight, base.lm_head.weight)  # the head is frozen
    changed = [n for n, p in back.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert len(changed) == 3 * 7 and all("proj" in name for name in changed)


def test_every_weight_trains_and_the_folder_has_them(tiny, tmp_path):
    more = ["--optimizer=stable_adamw", "--out_dropout=0.1", "--chunks=True", "--max_steps=2"]
    done = harness.run(SCRIPT, tiny, tmp_path, "--lora_rank=0", *more)
    assert [type(optimizer).__name__ for optimizer in done.optimizers] == ["StableAdamW"]
    assert {block.attn.out_dropout for block in done.model.blocks} == {0.1}
    assert all(p.requires_grad for p in done.model.parameters())
    for rows in (done.train, done.val):
        assert [x[2] for x in token_rows.read_rows(rows, [0, 0], [0, 3])] == [[64], [64]]
    back = from_pretrained(str(tmp_path / "step2"))
    assert not back.config.causal and not os.path.exists(tmp_path / "merged")
    for name, p in done.model.named_parameters():
        assert torch.equal(back.get_parameter(name), p), name
    first = from_pretrained(done.init_from)
    assert not torch.equal(back.get_parameter("norm.weight"), first.get_parameter("norm.weight"))


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (6, 14),
                                                   "--max_steps=20")  # fmt: skip


def test_two_ranks_equal_one(tiny, tmp_path):
    """DDP and FSDP in micro-batches, each whole and in two halves: the losses and the adapter of
    one rank that takes the step's rows at once."""
    more = ["--lora_dropout=0.0", "--device_batch_tokens=128", "--learning_rate=1e-3"]
    run(tiny, tmp_path / "one", *more, "--device_batch_tokens=512")
    kinds, argvs = {"ddp": [], "fsdp": ["--fsdp=full"]}, []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *more, *flags))
        # halves, with dropout: resumed is bit-equal on ranks, too
        other = [*more, *flags, "--schedule=constant", "--lora_dropout=0.1"]
        argvs.append(arguments(tiny, tmp_path / (kind + "-constant"), *other))
        half = arguments(tiny, tmp_path / (kind + "-half"), *other)
        argvs += [half + ["--max_steps=4"], half + ["--resume=True"]]
    argvs.append(arguments(tiny, tmp_path / "bf16", "--fsdp=full", "--dtype=bf16", "--max_steps=2",
                           "--train_also=norm"))  # fmt: skip
    harness.run_ranks(2, argvs)
    for kind in kinds:
        assert_close(tmp_path / kind, tmp_path / "one", "merged", weights=1e-4, loss=1e-5,
                     eval_loss=1e-5, gnorm=1e-4)  # fmt: skip
        whole, half = tmp_path / (kind + "-constant"), tmp_path / (kind + "-half")
        assert losses(whole) != losses(tmp_path / kind)
        assert_equal_bits(half, whole)
    assert sorted(losses(tmp_path / "bf16")) == [1, 2]


def test_show_batch_and_dry_run(tiny, unbroken, tmp_path):
    shown, dry = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path)
    assert "--- text 1:" in shown and "[MASK]" in shown and "\033[7m" in shown
    assert re.search(r"(?s)s/step, [\d,.]+ tok/s, peak .* device_batch_tokens up to .* fits", dry)


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path):
    keys = ["--learning_rate=1e30", "--schedule=constant"]
    out = harness.printed_before_the_4th_bad_step(SCRIPT, tiny, tmp_path, *keys)
    assert re.search(r"step 2: loss (nan|inf)", out) and "Rows of" in out
    assert latest_checkpoint(str(tmp_path), "step")


@pytest.mark.parametrize(("more", "message"), [
    (["--batch_tokens=700"], "batch_tokens=700 must be k x device_batch_tokens=256"),
    (["--device_batch_tokens=32"], "device_batch_tokens=32 must be a multiple of max_seq_len"),
    (["--data=data/pydocs"], "data/pydocs"), (["--mask_prob=0"], "takes > 0 and <= 1, not 0.0"),
    (["--init_from=nowhere/at/all"], "no such folder"),
    (["--num_epochs=3"], "max_steps=8, num_epochs=3.0; expected one of"),
    (["--mask_token=<msk>"], "mask_token='<msk>': expected a token of the vocabulary"),
    (["--mask_token=new", "--train_also=embed"], "has '[MASK]' already"),
    (["--lora_targets=query"], "query"), (["--eval_tokens=63"], "no row of 64 to evaluate on"),
    (["--init_from={tmp}/bare"], "no language modelling head"),
    (["--init_from={encoder}"], "is an encoder, and fills masks"),
    (["--data={tmp}/data"], "has another tokenizer than")])  # fmt: skip
def test_bad_settings_say_what_is_expected(tiny, toy_tokens, folders, tmp_path, more, message):
    base = folders["llama-bidirectional"]  # the head of a tied one cannot be missing
    model, tokenizer = from_pretrained(base), load_tokenizer(base)
    model.drop_head()
    save_pretrained(model, str(tmp_path / "bare"))
    tokenizer.save_pretrained(tmp_path / "bare")
    shutil.copytree(toy_tokens, tmp_path / "data")
    tokenizer.add_tokens(["more"])
    write_meta(tmp_path / "data", tokenizer, "", read_json(toy_tokens, "meta.json")["splits"])
    more = [x.format(tmp=tmp_path, encoder=folders["modernbert"]) for x in more]
    harness.assert_refused(message, SCRIPT, tiny, tmp_path / "out", *more)


# ---- configs and data ----
def test_ettins_schedule():
    """3B tokens up, the last 10B of 50B on a line down to 2 %."""
    s = SimpleNamespace(**configured(SCRIPT, "mntp_ettin_cross"))
    optim.set_lengths(s, 10**11, s.batch_tokens)
    assert (s.max_steps, s.warmup, s.decay) == (19534, 1172, 3907)
    rates = [optim.learning_rate_at(step, s) for step in (1171, 15627, 19534)]
    assert rates == pytest.approx([4e-4, 4e-4, 8e-6])


def test_wikitext_articles(toy_tokens, tmp_path, capsys):
    prepare = harness.script("data/wikitext103/prepare.py")
    text = "\n = One = \n\n A , b @-@ c . \n\n = = Part = = \n\n D . \n = f ( x ) = \n E . \n\n"
    text += " = Two = \n\n F g . \n"
    for name in ("wiki.train.raw", "wiki.valid.raw"):
        (tmp_path / name).write_text(text)
    found = list(prepare.articles(iter(text.split("\n")[:-1])))
    assert [t.split("\n")[0 if i else 1] for i, (t, _, _) in enumerate(found)] == [
        " = One = ", " = Two = "]  # fmt: skip
    assert sum(n for _, n, _ in found) == text.count("\n")
    assert sum(n for _, _, n in found) == len(text.split())
    argv = ["--tokenizer", os.path.join(toy_tokens, "tokenizer"), "--input", str(tmp_path)]
    prepare.main([*argv, "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert re.search(rf"train +2 articles +{len(text.split()) + text.count(chr(10))} words", out)
    tokens = open_tokens(str(tmp_path / "out"), "val")
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    assert tokens.tokens[: tokens.starts[1]].tolist() == tokenizer(found[0][0])["input_ids"]
