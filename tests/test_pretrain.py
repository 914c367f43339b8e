"""pretrain_mlm.py: what it masks, and tiny runs of it, whole, killed and resumed, on 1-3 ranks."""

import json
import math
import os
import re
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import harness
import pretrain_mlm
from attention import make_seqs
from formats.huggingface import from_pretrained
from harness import assert_close, assert_equal_bits, losses, saved, start, wait_for_step
from pretrain_mlm import corrupt
from token_rows import open_rows, train_batches
from tokens import open_tokens, read_row

SCRIPT = "pretrain_mlm.py"
arguments = partial(harness.arguments, SCRIPT)
TINY = dict(
    model_size="modernbert-tiny", vocab_size=512, max_seq_len=64, max_steps=8, learning_rate=3e-3,
    batch_tokens=384, device_batch_tokens=128,  # 6 rows: divisible by 1, 2 and 3 ranks
    log_interval=1, eval_interval=4, eval_tokens=640, save_interval=4, dtype="fp32")  # fmt: skip


@pytest.fixture(scope="module")
def tiny(toy_tokens, tmp_path_factory):
    """A config file for the smallest run."""
    return harness.write_config(tmp_path_factory.mktemp("config"), **TINY, data=toy_tokens)


def run(config, out_dir, *more):
    harness.run(SCRIPT, config, out_dir, *more)
    return losses(out_dir)


# ---- what is asked of the model ----
def test_masking_counts_and_spares_special_tokens():
    ids = np.random.default_rng(0).integers(0, 100, 200_000)
    for share, mask_all in ((0.3, False), (0.2, True)):
        s = settings(mask_prob=share, mask_all=mask_all, ordinary=np.arange(5, 100))
        inputs, rows, targets = pretrain_mlm.mask_tokens(ids, np.random.default_rng(1), s)
        harness.assert_masked(ids, inputs, rows, targets, (ids >= 5).sum(), s)


def test_next_tokens_stop_at_the_end_of_each_document():
    lengths, ids = [3, 1, 4], np.arange(10, 18)
    rows, targets = pretrain_mlm.next_tokens(ids, lengths)
    expected, first = [], 0
    for n in lengths:  # the plain loop
        expected += [(first + i, ids[first + i + 1]) for i in range(n - 1)]
        first += n
    assert list(zip(rows, targets, strict=True)) == expected


def settings(**changes):
    keys = dict(objective="mlm", max_seq_len=64, mask_prob=0.3, mask_all=False, mask_id=3, seed=5,
                ordinary=np.arange(4, 512), rows_per_step=4, rows_per_batch=4, rank=0,
                world_size=1, stop_step=3, stream=None)  # fmt: skip
    s = SimpleNamespace(**keys | changes)
    s.order_seed = s.seed
    return s


def test_ranks_share_the_rows_and_masks_of_one_rank(toy_tokens):
    tokens = open_rows(toy_tokens, "train", 64)
    keys = dict(rows_per_step=12, rows_per_batch=2)

    def rows_of(world_size):
        found = {}
        for rank in range(world_size):
            s = settings(**keys, rank=rank, world_size=world_size)
            for step, batches in enumerate(train_batches(tokens, 0, corrupt, s)):
                for batch in batches:
                    for i, row in enumerate(batch.inputs.view(-1, 64)):
                        here = (batch.rows >= i * 64) & (batch.rows < i * 64 + 64)
                        labels = (batch.rows[here] - i * 64).tolist(), batch.targets[here].tolist()
                        found[step, tuple(row.tolist())] = labels
        return found

    assert rows_of(1) == rows_of(2) == rows_of(3)


def test_encoder_and_decoder_see_the_same_tokens(toy_tokens):
    tokens = open_rows(toy_tokens, "train", 64)
    mlm, clm = (next(train_batches(tokens, 2, corrupt, settings(objective=objective)))[0]
                for objective in ("mlm", "clm"))  # fmt: skip
    restored = mlm.inputs.clone()
    restored[mlm.rows] = mlm.targets
    assert torch.equal(restored, clm.inputs) and mlm.seqs.lengths == clm.seqs.lengths


# ---- whole runs ----
def test_a_run_learns_and_its_folder_loads_in_transformers(unbroken, toy_tokens):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    curve = losses(unbroken)
    assert list(curve) == list(range(1, 9)) and curve[8] < curve[1] - 0.3
    assert sorted(losses(unbroken, "eval_loss")) == [4, 8]
    folder = os.path.join(unbroken, "step8")
    ids = read_row(open_tokens(toy_tokens, "val"), 0, 64)[0]
    theirs = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ours = from_pretrained(folder).eval()
    with torch.no_grad():
        a = ours(torch.from_numpy(ids), make_seqs([64]), rows=torch.arange(64))
        b = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0]
    assert (a - b).abs().max() < 1e-4
    final = os.path.join(unbroken, "final")  # a stable name of the newest
    assert AutoTokenizer.from_pretrained(final).mask_token == "[MASK]"
    again = AutoModelForMaskedLM.from_pretrained(final)
    assert torch.equal(again.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_accumulation_equals_one_batch(tiny, unbroken, tmp_path):
    more = ["--out_dropout=0.0", "--stop_step=4"]
    whole = run(tiny, tmp_path, *more, "--device_batch_tokens=384")
    parts = run(tiny, tmp_path / "b", *more, "--device_batch_tokens=64")
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole != losses(unbroken)  # dropout acts


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (6, 14),
                                                   "--max_steps=20")  # fmt: skip


def test_a_stopped_run_saves_and_says_how_to_go_on(tiny, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    more = ["--save_interval=1000", "--max_steps=9999"]
    processes = [start(1, SCRIPT, tiny, tmp_path / n.name, *more) for n in numbers]
    for number, process in zip(numbers, processes, strict=True):
        wait_for_step(process, tmp_path / number.name, 3)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        last = max(losses(tmp_path / number.name))
        assert f"saved {tmp_path}/{number.name}/step{last}" in out
        command = out.splitlines()[-1].partition("this goes on: ")[2].split()
        assert command[0] == "python" and command[1:] == [*process.args[1:], "--resume=True"]


def test_patience_ends_a_run_that_gets_worse(tiny, tmp_path, capsys):
    """A learning rate that ruins the model; the end says what is saved, and code that loads it."""
    run(tiny, tmp_path, "--learning_rate=1.0", "--eval_interval=1", "--max_steps=20",
        "--patience=2", "--keep_best=True", "--save_interval=100")  # fmt: skip
    evals, out = losses(tmp_path, "eval_loss"), capsys.readouterr().out
    best = min(evals, key=evals.get)
    assert max(evals) == best + 2 < 20 and "save_interval=100 is beyond" in out
    assert {p.name for p in tmp_path.glob("step*")} == {f"step{best}", f"step{best + 2}"}
    exec(out.partition("to use it:\n")[2].splitlines()[0], space := {})
    assert type(space["model"]).__name__ == "ModernBertForMaskedLM"


def test_a_torn_checkpoint_is_skipped(tiny, unbroken, tmp_path, capsys):
    shutil.copytree(unbroken, tmp_path, symlinks=True, dirs_exist_ok=True)
    weights = tmp_path / "step8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run(tiny, tmp_path, "--resume=True")
    out = capsys.readouterr().out
    assert "step8 skipped" in out and "after step 4" in out
    assert_equal_bits(tmp_path, unbroken)


@pytest.mark.slow
def test_three_ranks_killed_and_resumed_are_bit_equal(tiny, tmp_path):
    # Qwen's gradients arrive in another order than its parameters are listed: DDP reorders its
    # buckets after the first backward
    more = ["--max_steps=14", "--attn_dropout=0.1", "--model_size=qwen3-tiny"]
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (5, 9), *more, ranks=3)


def test_two_ranks_equal_one(tiny, folders, tmp_path):
    """DDP, FSDP and ZeRO-1, each whole and in two halves: the losses and weights of one rank."""
    more = ["--out_dropout=0.0", "--optimizer=stable_adamw", "--device_batch_tokens=64"]
    fresh = [*more, "--stop_step=2", "--eval_interval=0"]
    scratch = run(tiny, tmp_path / "scratch-one", *fresh)
    argvs = [arguments(tiny, tmp_path / "scratch", *fresh, "--fsdp=full")]
    more += [f"--init_from={folders['modernbert']}"]
    run(tiny, tmp_path / "one", *more)
    adamw = run(tiny, tmp_path / "adamw", *more, "--optimizer=adamw")
    kinds = {"ddp": [], "fsdp": ["--fsdp=full"], "zero1": ["--zero1=True", "--optimizer=adamw"]}
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *more, *flags))
        half = arguments(tiny, tmp_path / (kind + "-half"), *more, *flags)
        argvs += [half + ["--stop_step=4"], half + ["--resume=True"]]
    harness.run_ranks(2, argvs)
    assert losses(tmp_path / "scratch") == pytest.approx(scratch, rel=1e-5)
    for kind in ("ddp", "fsdp"):
        assert_close(tmp_path / kind, tmp_path / "one", "step8", loss=1e-5, gnorm=1e-4)
    assert losses(tmp_path / "zero1") == pytest.approx(adamw, rel=1e-5)
    for kind in kinds:
        assert_equal_bits(tmp_path / (kind + "-half"), tmp_path / kind)


def test_other_objective_lora_and_muon(tiny, folders, tmp_path):
    """Encoder -> decoder (Ettin's cross-objective), continued with LoRA, resumed; Muon."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    more = ["--objective=clm", "--max_steps=4", "--optimizer=muon", "--attn_dropout=0.25"]
    run(tiny, tmp_path / "clm", f"--init_from={folders['modernbert']}", *more)
    decoder, ids = str(tmp_path / "clm" / "step4"), torch.arange(5, 45)
    ours = from_pretrained(decoder).eval()
    assert ours.config.attn_dropout == 0.0  # the model's own: the next stage chooses for itself
    theirs = AutoModelForCausalLM.from_pretrained(decoder).eval()
    assert ours.config.family == "modernbert-decoder" and ours.config.causal
    with torch.no_grad():
        a = ours(ids, make_seqs([40]), rows=torch.arange(40))
        assert (a - theirs(input_ids=ids[None]).logits[0]).abs().max() < 1e-4

    # and back: a ModernBERT again, as it was loaded
    run(tiny, tmp_path / "mlm", f"--init_from={decoder}", "--learning_rate=0", "--max_steps=4")
    encoder = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm" / "step4").eval()
    ours = from_pretrained(decoder, attention="bidirectional").eval()
    with torch.no_grad():
        a = ours(ids, make_seqs([40]), rows=torch.arange(40))
        assert (a - encoder(input_ids=ids[None]).logits[0]).abs().max() < 1e-4

    # the base is the checkpoint that the run began with, whatever its out_dir gains meanwhile
    keys = [f"--init_from={tmp_path / 'clm'}", "--objective=clm", "--lora_rank=4"]
    keys += ["--train_also=norm"]
    run(tiny, tmp_path / "lora", *keys)
    run(tiny, tmp_path / "half", *keys, "--stop_step=4")
    newer = shutil.copytree(decoder, tmp_path / "clm" / "step5")
    weights = load_file(newer / "model.safetensors")
    moved = {k: w + 0.1 for k, w in weights.items()}
    save_file(moved, newer / "model.safetensors", {"format": "pt"})
    run(tiny, tmp_path / "half", *keys, "--resume=True")
    assert_equal_bits(tmp_path / "half", tmp_path / "lora")
    config = json.loads(saved(tmp_path / "half", 8, "adapter_config.json"))
    assert config["base_model_name_or_path"] == decoder


def test_local_theta_decay_of_all_and_another_mask_in_evaluation(tiny, tmp_path):
    keys = ["--learning_rate=0.0", "--weight_decay=0.5", "--max_steps=1"]
    more = ["--rope_theta=160000.0", "--local_rope_theta=5000.0", "--decay_all=True"]
    first = harness.run(SCRIPT, tiny, tmp_path / "a", *keys, *more, "--eval_mask_prob=0.15")
    groups = first.optimizers[0].param_groups
    assert len(groups) == 2 and [group["weight_decay"] for group in groups] == [0.5, 0.5]
    rope = json.loads(saved(tmp_path / "a", 1, "config.json"))["rope_parameters"]
    thetas = {kind: rope[f"{kind}_attention"]["rope_theta"] for kind in ("full", "sliding")}
    assert thetas == {"full": 160000.0, "sliding": 5000.0}
    # a step at rate 0 later, from its folder: evaluation has the masks of a run with .15
    keys += [f"--init_from={tmp_path / 'a'}"]
    second = harness.run(SCRIPT, tiny, tmp_path / "b", *keys, "--mask_prob=0.15")
    assert second.model.config.rope["local"]["theta"] == 5000.0
    assert [group["weight_decay"] for group in second.optimizers[0].param_groups] == [0.5, 0.0]
    want = losses(tmp_path / "b", "eval_loss")
    assert losses(tmp_path / "a", "eval_loss") == pytest.approx(want, rel=1e-6)
    run(tiny, tmp_path / "c", *keys)
    assert losses(tmp_path / "c", "eval_loss")[1] != pytest.approx(want[1], rel=1e-4)


def test_a_phase_begins_with_the_moments_of_the_last(tiny, tmp_path):
    """From step 4 of a run that went on to 8, which keep_states kept: m = .9 m_old + .1 g."""
    run(tiny, tmp_path / "a", "--save_interval=2", "--keep_last=1", "--keep_models=2",
        "--keep_states=4")  # fmt: skip
    begin, moments = f"--init_from={tmp_path / 'a' / 'step4'}", []
    for name, more in (("b", ["--init_state=True"]), ("c", [])):  # one step at rate 0
        done = harness.run(SCRIPT, tiny, tmp_path / name, begin, "--learning_rate=0.0",
                           "--max_steps=1", *more)  # fmt: skip
        moments.append([state["exp_avg"] for state in done.optimizers[0].state.values()])
        assert {int(x["step"]) for x in done.optimizers[0].state.values()} == {5 if more else 1}
    old = torch.load(tmp_path / "a" / "step4" / "training_state.pt")["optimizers"][0]["state"]
    for carried, fresh, state in zip(*moments, old.values(), strict=True):
        torch.testing.assert_close(carried, 0.9 * state["exp_avg"] + fresh)
    for more, message in (([], "training_state.pt is missing: this checkpoint has no optimizer's"),
                          (["--optimizer=muon"], "has adamw's state, not muon's")):  # fmt: skip
        begin = f"--init_from={tmp_path / 'a' / ('step4' if more else 'step6')}"
        harness.assert_refused(message, SCRIPT, tiny, tmp_path / "d", begin, "--init_state=True",
                               *more)  # fmt: skip


def test_bad_steps_are_forgiven_in_time(capsys):
    s = SimpleNamespace(skipped=[])
    for step in (10, 500, 900, 1011, 1600):
        common.bad_step(s, step, math.nan, 1.0, "")
    with pytest.raises(SystemExit, match="4th such step; checkpoints before step1650 are good"):
        common.bad_step(s, 1650, math.nan, 1.0, "")  # 900, 1011, 1600


def test_data_order_is_what_the_run_sees(tiny, toy_tokens, tmp_path, capsys):
    for span in ("0,5", "5,8"):
        with pytest.raises(SystemExit):
            run(tiny, tmp_path, f"--dump_data_order={span}")
    ids, steps = (np.concatenate([np.load(tmp_path / f"order_{span}_{name}.npy")
                  for span in ("0-5", "5-8")]) for name in ("input_ids", "step"))  # fmt: skip
    assert steps.tolist() == [step for step in range(8) for _ in range(6)]
    tokens = open_rows(toy_tokens, "train", 64)
    s = settings(objective="clm", seed=1337, rows_per_step=6, stop_step=8)
    for step, batches in enumerate(train_batches(tokens, 0, corrupt, s)):
        seen = torch.cat([batch.inputs for batch in batches]).view(6, 64)
        assert (ids[steps == step] == seen.numpy()).all()
    harness.assert_refused("expected (from, to) of steps, 0 <= from < to <= 8", SCRIPT, tiny,
                           tmp_path, "--dump_data_order=5,9")  # fmt: skip

    # token files of that order, ours and as parquet: the batches of the run, its texts' borders too
    import pyarrow
    from pyarrow.parquet import write_table

    rows = pyarrow.table({"input_ids": ids.tolist(), "step": steps})
    write_table(rows, tmp_path / "rows.parquet")
    for name, pattern in (("a", "order_*_input_ids.npy"), ("b", "rows.parquet")):
        harness.execute([os.path.join(harness.ROOT, "data", "order", "prepare.py"), "--input",
                         str(tmp_path / pattern), "--tokenizer", f"{toy_tokens}/tokenizer",
                         "--out", str(tmp_path / name)])  # fmt: skip
        kept, t = open_rows(str(tmp_path / name), "train", 64), SimpleNamespace(**vars(s))
        t.order_seed = None
        assert kept.n_rows == [48]
        for ours, theirs in zip(train_batches(tokens, 0, corrupt, s),
                                train_batches(kept, 0, corrupt, t), strict=True):  # fmt: skip
            assert torch.equal(ours[0].inputs, theirs[0].inputs)
            assert ours[0].seqs.lengths == theirs[0].seqs.lengths
    keys = [f"--data={tmp_path / 'a'}", "--max_steps=2", "--eval_interval=0", "--objective=clm"]
    done = harness.run(SCRIPT, tiny, tmp_path / "run", *keys)
    assert done.s.order_seed is None and done.s.n_rows == 48
    harness.assert_refused("the order of a run with {'max_seq_len': 64, 'rows_per_step': 6}",
                           SCRIPT, tiny, tmp_path / "x", *keys, "--batch_tokens=768")  # fmt: skip


def test_show_batch_and_dry_run(tiny, unbroken, tmp_path):
    shown, dry = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path)
    assert "--- text 0:" in shown and "[MASK]" in shown
    assert re.search(r"(?s)s/step, [\d,.]+ tok/s, peak .* device_batch_tokens up to .* fits", dry)


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path):
    keys = ["--learning_rate=1e30", "--schedule=constant"]
    out = harness.printed_before_the_4th_bad_step(SCRIPT, tiny, tmp_path, *keys)
    assert "step 2: loss nan" in out and "Rows of" in out


@pytest.mark.parametrize(("more", "message"), [
    (["--batch_tokens=700"], "batch_tokens=700 must be k x device_batch_tokens=128"),
    (["--device_batch_tokens=96"], "device_batch_tokens=96 must be a multiple of max_seq_len"),
    (["--vocab_size=100"], "100"), (["--model_size=bert"], "model_size='bert'"),
    (["--data=nowhere"], "nowhere"),
    (["--data_dir=nowhere"], "'data_dir' is now called 'data'"),
    (["--batch_size=768"], "'batch_size' is now called 'batch_tokens'"),
    (["--objective=rtd"], "objective takes one of mlm, clm, not 'rtd'"),
    (["--schedule=cosin"], "schedule"), (["--init_from=nowhere/at/all"], "no such folder"),
    (["--num_epochs=3"], "max_steps=8, num_epochs=3.0; expected one"),
    (["--lora_rank=4"], "LoRA needs a base"), (["--init_state=True"], "needs a checkpoint in init"),
    (["--keep_models=6"], "keep_models=6 is no multiple of save_interval=4"),
    (["--train_also=norm"], "train_also='norm' goes with LoRA"),
    (["--zero1=True"], "start with torchrun"), (["--fsdp=full"], "start with torchrun"),
    (["--fsdp=True"], "fsdp takes one of \"\", full, not 'True'"),
    (["--eval_tokens=60"], "no row of 64 to evaluate on"),
    (["--max_seq_len=100000", "--batch_tokens=100000", "--device_batch_tokens=100000"],
     "no row")])  # fmt: skip
def test_bad_settings_say_what_is_expected(tiny, tmp_path, more, message):
    harness.assert_refused(message, SCRIPT, tiny, tmp_path, *more)


def test_muon_under_fsdp_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # by torchrun, as fsdp wants it: refused before any group forms
    monkeypatch.setattr("common.setup_distributed", lambda: (0, 2, 0, torch.device("cpu")))
    with pytest.raises(SystemExit, match="muon.* does not go with fsdp"):
        run(tiny, tmp_path, "--optimizer=muon", "--fsdp=full")
