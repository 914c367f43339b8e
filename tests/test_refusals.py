"""What must not happen silently: values that no key takes, two runs in one out_dir, a checkpoint of
other bytes, a resumed run of other data, errors that end one rank of several."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import redirect_stdout

import pytest
import torch

import checkpoint
import common
import harness
from harness import ROOT, arguments, assert_equal_bits, assert_refused, losses, raises, saved

SCRIPT = "pretrain_mlm.py"
STAGES = ("pretrain_mlm train_mntp train_contrastive train_classifier train_reconstruct "
          "train_token_retrieval").split()  # fmt: skip
OTHERS = ["sample", "eval_mteb", "evals/classifier", "evals/token_retrieval"]


# ---- the values that a key takes ----
# by what a key means, not by what its script says: {value: keys that have no use for it}
WRONG = {
    "0": "max_steps max_tokens num_epochs stop_step batch_size batch_tokens device_batch_size "
         "device_batch_tokens max_seq_len query_max_length passage_max_length max_length "
         "log_interval save_interval temperature distill_temperature adam_eps lora_alpha "
         "group_size queries_per_passage pos_weight rope_theta vocab_size mask_prob label_column "
         "num_samples max_new_tokens num_fills top_p line ratio",
    "-1": "max_steps max_tokens num_epochs stop_step batch_size batch_tokens device_batch_size "
          "device_batch_tokens keep_last grad_clip learning_rate min_lr weight_decay beta1 beta2 "
          "adam_eps warmup_steps warmup_ratio decay_steps decay_ratio eval_interval eval_tokens "
          "eval_lines log_interval save_interval seed lora_rank lora_alpha lora_dropout "
          "distill_weight temperature sampling_alpha projection_dim passage_window window_overlap "
          "w_d2q w_q2d query_flops passage_flops dropout attn_dropout top_k neighbours",
    "1.5": "mask_prob beta1 beta2 warmup_ratio decay_ratio lora_dropout dropout attn_dropout "
           "out_dropout top_p batch_size max_steps seed",
    "1e999": "learning_rate weight_decay adam_eps grad_clip temperature lora_alpha num_epochs "
             "false_negative_margin rope_theta",
    "other": "schedule decay_shape optimizer objective tracker fsdp dtype attention "
             "attention_backend task loss_kind label_position pooling unit reconstruct_side "
             "similarity max_steps learning_rate keep_best",
    "9223372036854775808": "seed", "": "out_dir schedule checkpoint_prefix",
    "a/step": "checkpoint_prefix", "../../evil": "checkpoint_prefix", "st(ep": "checkpoint_prefix",
    "(0,)": "matryoshka_dims ratios", "('a',)": "matryoshka_dims ratios",
    "(1,)": "data query_instruction adapters label_names rank_pairs",
}  # fmt: skip


def cases():
    for script in STAGES + OTHERS:
        with open(f"{ROOT}/{script}.py") as f:
            source = f.read()
        for value, names in WRONG.items():
            for key in names.split():
                starts = (f"\n{key}: tuple",) if "(" in value[:1] else (f"\n{key} = ", f"\n{key}: ")
                greedy = (script, key, value) == ("sample", "temperature", "0")
                if any(start in source for start in starts) and not greedy:
                    yield f"{script}.py", key, value


@pytest.mark.parametrize("script", [f"{s}.py" for s in STAGES + OTHERS])
def test_a_wrong_value_is_refused_by_its_key(script):
    n = 0
    for name, key, value in cases():
        if name == script:
            with pytest.raises(SystemExit) as caught:
                harness.configured(script, "", f"--{key}={value}")
            assert f"--{key}={value}: {key} takes " in str(caught.value), (script, key, value)
            n += 1
    assert n > 4


def test_strings_are_taken_as_they_are():
    text = "'quoted' " + "many (words " * 3000
    assert harness.configured("sample.py", "", f"--text={text}")["text"] == text
    given = harness.configured("train_contrastive.py", "", f"--query_instruction={text}")
    assert given["query_instruction"] == (text,)
    raises(SystemExit, "no UTF-8", harness.configured, "sample.py", "", "--prompt=\udcff")


# ---- errors are one line ----
def ended(*argv):
    """-> (exit status, lines of stderr) of a script in a process of its own"""
    found = subprocess.run([sys.executable, *argv], cwd=ROOT, text=True, capture_output=True)
    return found.returncode, found.stderr.strip().splitlines()


def hooked(do, monkeypatch):
    """-> lines of stderr that our hook prints for what `do` raises"""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(sys, "__stderr__", out)
    try:
        do()
    except Exception:
        common.one_line(*sys.exc_info())
    return out.getvalue().strip().splitlines()


def test_an_error_is_one_line_and_a_bug_is_not(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        f'import sys\nsys.path.insert(0, {ROOT!r})\nimport common, data\n'
        'do = ""\ncommon.configure(globals())\nexec(do)\n')  # fmt: skip
    bad = tmp_path / "x.jsonl"
    bad.write_text('{"query": 3}\n')
    reading = f"data.read_pair(data.open_pairs({str(bad)!r}), 0)"
    line = f"ValueError: {bad} line 1: field 'query' is 3 (expected str)"
    assert ended(str(script), f"--do={reading}") == (1, [line])
    status, lines = ended(str(script), f"--do={reading}", "--traceback=True")
    assert status == 1 and lines[0].startswith("Traceback") and lines[-1] == line
    lines = hooked(lambda: open("no/such/file"), monkeypatch)
    assert len(lines) == 1 and "No such file or directory: 'no/" in lines[0]
    lines = hooked(lambda: int("x"), monkeypatch)
    assert lines[0].startswith("Traceback") and "invalid literal" in lines[-1]


# ---- checkpoints ----
@pytest.fixture(scope="module")
def tiny(toy_tokens, tmp_path_factory):
    return harness.write_config(
        tmp_path_factory.mktemp("config"), data=toy_tokens, model_size="modernbert-tiny",
        vocab_size=512, max_seq_len=64, batch_tokens=384, device_batch_tokens=128, max_steps=6,
        learning_rate=3e-3, warmup_steps=2, eval_interval=3, eval_tokens=64, save_interval=2,
        keep_last=1, log_interval=1, dtype="fp32")  # fmt: skip


def run(tiny, out_dir, *more):
    with redirect_stdout(io.StringIO()) as out:
        harness.run(SCRIPT, tiny, out_dir, *more)
    return out.getvalue()


@pytest.fixture
def copied(unbroken, tmp_path):
    return shutil.copytree(unbroken, tmp_path / "out", symlinks=True)


def test_a_second_run_in_an_out_dir_is_refused_and_a_killed_one_locks_nothing(tiny, tmp_path):
    process = harness.start(1, SCRIPT, tiny, tmp_path, "--max_steps=100000", "--save_interval=3")
    harness.wait_for_step(process, tmp_path, 4)
    before = (tmp_path / "config.py").read_text()
    message = f"{tmp_path} is in use by process {process.pid} on {os.uname().nodename}"
    for more in ([], ["--resume=True"]):
        assert_refused(message, SCRIPT, tiny, tmp_path, *more)
    assert (tmp_path / "config.py").read_text() == before
    harness.kill(process)
    assert "resumed" in run(tiny, tmp_path, "--resume=True", "--max_steps=100000", "--stop_step=1")


def test_bytes_that_were_not_saved_are_not_resumed(tiny, unbroken, copied):
    run(tiny, copied.parent / "two", "--keep_last=2")
    two = copied.parent / "two"
    weights = bytearray((two / "step6" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (two / "step6" / "model.safetensors").write_bytes(weights)
    printed = run(tiny, two, "--keep_last=2", "--resume=True")
    assert "step6 skipped: model.safetensors is not what was saved" in printed
    assert "after step 4" in printed
    assert_equal_bits(two, unbroken)


def test_checkpoints_of_earlier_versions_go_on(tiny, unbroken, copied):
    """complete.json had sizes alone, training_state.pt no config."""
    folder = copied / "step6"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    del state["config"], state["files"]
    torch.save(state, folder / "training_state.pt")
    names = json.loads((folder / "complete.json").read_text())
    sizes = {name: (folder / name).stat().st_size for name in names}
    (folder / "complete.json").write_text(json.dumps(sizes))
    assert "resumed" in run(tiny, copied, "--resume=True", "--max_steps=8")


def test_what_a_run_has_written_stays(tiny, copied):
    """A folder of a higher number, and keep_last=1."""
    (copied / "step6").rename(copied / "step999")
    run(tiny, copied, "--resume=True", "--max_steps=8", "--keep_last=1")
    assert (copied / "step8" / "complete.json").exists()
    assert os.readlink(copied / "final") == "step8"


def test_a_run_that_diverges_leaves_the_good_checkpoint(tiny, unbroken, tmp_path):
    """However often it saves: what was written last may be broken, the one before is not."""
    for interval, left in ((2, {"step4"}), (1, {"step4", "step5"})):
        out_dir = tmp_path / str(interval)
        run(tiny, out_dir, "--stop_step=4")
        more = ["--resume=True", "--learning_rate=1e30", f"--save_interval={interval}"]
        more += ["--schedule=constant", "--max_steps=20", "--warmup_steps=0", "--eval_interval=0"]
        with pytest.raises(SystemExit, match="checkpoints before step5 are good"):
            run(tiny, out_dir, *more)
        assert {name for name in os.listdir(out_dir) if name.startswith("step")} == left
        shutil.rmtree(out_dir / "step5", ignore_errors=True)
        run(tiny, out_dir, "--resume=True")
        assert saved(out_dir, 6) == saved(unbroken, 6)


def test_a_last_step_that_was_skipped_is_not_saved(tmp_path):
    keys = dict(out_dir=str(tmp_path), keep_last=1, keep_best=False, rank=0, files=[], config={})
    s = types.SimpleNamespace(**keys, saved=None, skipped=[], stop_step=3, stream=None)
    for step in (1, 2, 3):
        if step > 1:
            common.bad_step(s, step - 1, float("nan"), 1.0, "")
        context = checkpoint.saving(s, step, {"loss": 1.0, "folder": ""}, [])
        if step == 3:
            raises(SystemExit, "--stop_step=1 ends before", context.__enter__)
        else:
            with context as folder:
                assert (folder is None) == (step == 2)
    assert (tmp_path / "step1").exists() and not (tmp_path / "step2").exists()


# ---- resume compares ----
OTHER = {"batch_tokens": 768, "max_seq_len": 32, "seed": 7, "mask_prob": 0.5, "vocab_size": 600,
         "optimizer": "stable_adamw", "model_size": "qwen3-tiny", "attn_dropout": 0.1,
         "init_from": "out/x", "objective": "clm"}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_a_resumed_run_goes_on_with_what_it_began_with(tiny, copied, key):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert_refused(f"{key}=", SCRIPT, tiny, copied, "--resume=True", f"--{key}={OTHER[key]}")
    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert after == before


def test_other_data_is_refused_or_forced_and_other_rates_are_printed(tiny, copied, toy_tokens):
    data = shutil.copytree(toy_tokens, copied.parent / "data")
    keys = ["--resume=True", f"--data={data}", "--max_steps=8", "--learning_rate=0.5"]
    printed = run(tiny, copied, *keys)  # the same bytes elsewhere
    assert "learning_rate=0.003 -> 0.5" in printed and "max_steps=6 -> 8" in printed
    tokens = bytearray((data / "train.bin").read_bytes())
    tokens[0] ^= 1
    (data / "train.bin").write_bytes(tokens)
    keys[2] = "--max_steps=9"
    assert_refused("began otherwise, data: ", SCRIPT, tiny, copied, *keys)
    printed = run(tiny, copied, *keys, "--force_resume=True", "--seed=3")
    assert "seed=1337 -> 3" in printed and max(losses(copied)) == 9


# ---- several ranks ----
def ends(ranks, argv, seconds=60, killed=False, shell=""):
    """The output of torchrun, which has to fail within `seconds`. killed: rank 1 is, in step 3."""
    command = [*harness.TORCHRUN, f"--nproc_per_node={ranks}", *argv]
    command = ["bash", "-c", f'{shell}exec "$@"', "bash", *command]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        if killed:
            harness.wait_for_step(process, argv[2].removeprefix("--out_dir="), 3)
            children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True)
            os.kill(int(children.split()[1]), signal.SIGKILL)
        began = time.time()
        printed, _ = process.communicate(timeout=seconds + (0 if killed else 60))
        assert process.returncode and time.time() - began < seconds + 60
        assert subprocess.run(["pgrep", "-g", str(process.pid)]).returncode  # nobody is left
        return printed
    finally:
        harness.kill(process)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_end_with_the_one_message(tiny, toy_tokens, folders, tmp_path, ranks):
    more = ["--max_steps=5000", "--schedule=constant", "--device_batch_tokens=64"]
    bad = shutil.copytree(toy_tokens, tmp_path / "data")
    with open(bad / "train.bin", "r+b") as f:  # one id that is none, in the row of one rank
        f.seek(64 * 2 * 5)
        f.write(b"\xff\xff")
    printed = ends(ranks, arguments(SCRIPT, tiny, tmp_path / "bad", *more, f"--data={bad}"))
    assert f"{bad}/train.bin: token 320 is 65535, expected less than" in printed, printed
    assert "prefetch" not in printed  # no traceback of ours
    lines = [json.dumps({"query": f"tan {i}", "pos": ["mos"]}) for i in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:7], "{", *lines[7:]]))
    keys = dict(data=str(tmp_path / "x.jsonl"), eval_data="", init_from=folders["llama"])
    pairs = harness.write_config(tmp_path, **keys, batch_size=6, max_steps=50)
    printed = ends(ranks, arguments("train_contrastive.py", pairs, tmp_path / "line"))
    assert f"{tmp_path}/x.jsonl line 8: not JSON" in printed, printed
    nan = ["--learning_rate=1e30", "--warmup_steps=0"]
    printed = ends(ranks, arguments(SCRIPT, tiny, tmp_path / "nan", *more, *nan))
    assert printed.count("stopped at the 4th such step") == ranks, printed
    printed = ends(ranks, arguments(SCRIPT, tiny, tmp_path / "kill", *more), killed=True)
    assert "SIGKILL" in printed and " ends, for another one has" in printed, printed
    full = ["--save_interval=2", "--eval_interval=0"]
    full = arguments(SCRIPT, tiny, tmp_path / "full", *more, *full)
    printed = ends(ranks, full, shell="ulimit -f 1000; ")
    assert "step2 could not be written, earlier checkpoints are whole" in printed, printed
    assert not [name for name in os.listdir(tmp_path / "full") if name.startswith("step")]
