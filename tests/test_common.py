"""common.py, checkpoint.py, optim.py and tools/plot.py. The checks at the end run inside two gloo
ranks, which run this file as a script."""

import copy
import csv
import hashlib
import json
import os
import runpy
import shlex
import signal
import sys
import time
import types
import unittest.mock
from collections import OrderedDict
from functools import partial
from unittest.mock import call

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

import checkpoint
import common
import optim
from formats import write_json
from harness import ROOT, raises, run_ranks
from tools import plot

# ---- config ----
SCRIPT = '''"""Train a thing.

    python script.py x.py
"""
from math import pi, sqrt
from os import path

# ---- defaults ----
# the length
max_steps = 1000  # optimizer steps
warmup_steps = 100
learning_rate = 3e-4
scale: float = 2
betas = (0.9, 0.98)
layers = (1, 2)
compile = False
out_dir = "out"
clip: float | None = None
revision: str | None = "main"
data: tuple[str, ...] = ("x",)
_hidden = 3
table = {"a": 1}
# ---- functions ----
def helper():
    inside = 3
    return inside
if __name__ == "__main__":
    from common import configure
    local = 5
    config = configure(globals())
    after = 7
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("--key=value", ..., "x.py") -> the script's globals; files = {name: text}."""
    monkeypatch.chdir(tmp_path)

    def run_script(*args, files=()):
        for name, text in dict({"script.py": SCRIPT}, **dict(files)).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(sys, "argv", ["script.py", *args])
        return runpy.run_path("script.py", run_name="__main__")

    return run_script


def test_keys_are_the_scripts_own_defaults(run):
    config = run()["config"]
    assert config == dict(
        max_steps=1000, warmup_steps=100, learning_rate=3e-4, scale=2.0, betas=(0.9, 0.98),
        layers=(1, 2), compile=False, out_dir="out", clip=None, revision="main", data=("x",),
    )  # fmt: skip
    assert type(config["scale"]) is float


VALUES = {
    "max_steps=200": 200, "max_steps=1_000": 1000, "learning_rate=1": 1.0,
    "learning_rate=1e-5": 1e-5, "compile=True": True, "clip=1": 1.0, "clip=None": None,
    "betas=(0.9,0.95)": (0.9, 0.95), "betas=[0.9,0.95]": (0.9, 0.95), "layers=(3,)": (3,),
    "out_dir=out/x=y": "out/x=y", "out_dir=123": "123", "out_dir='a b'": "'a b'", "out_dir=": "",
    "revision=None": None, "revision=1e5": "1e5", "data=a.jsonl": ("a.jsonl",),
    "data=('a','b')": ("a", "b")}  # fmt: skip


@pytest.mark.parametrize("arg", VALUES)
def test_command_line_value(run, arg):
    got, value = run(f"--{arg}"), VALUES[arg]
    key = arg.partition("=")[0]
    assert got[key] == value and type(got[key]) is type(value) and got["config"][key] == value


def test_a_default_of_none_needs_an_annotation(run):
    with pytest.raises(TypeError, match="clip = None needs a type"):
        run(files={"script.py": SCRIPT.replace("clip: float | None", "clip")})


def test_files_run_in_order_base_first(run):
    files = {
        "configs/x.py": 'base = "../base.py"\nimport math\n_n = 3\nmax_steps = int(math.pi * _n)\n'
        "learning_rate = _base_rate * 2\nclip = 1\n",
        "base.py": "_base_rate = 5.0\nmax_steps = 7\nwarmup_steps = max_steps * 2\n"
        "compile = True\n", "y.py": "warmup_steps += 1\n"}  # fmt: skip
    config = run("configs/x.py", "y.py", files=files)["config"]
    assert (config["max_steps"], config["warmup_steps"], config["compile"]) == (9, 15, True)
    assert config["learning_rate"] == 10.0 and config["clip"] == 1.0
    assert type(config["clip"]) is float and config["out_dir"] == "out"


@pytest.mark.parametrize("order", [("--max_steps=200", "x.py"), ("x.py", "--max_steps=200")])
def test_command_line_holds_while_the_file_runs(run, order):
    text = ("max_steps = 5000\nmax_steps += 1\nwarmup_steps = max_steps // 10\n"
            "def _half():\n    return max_steps / 2\n"
            "learning_rate = _half()\nlayers = [max_steps + i for i in (1, 2)]\n")  # fmt: skip
    config = run(*order, files={"x.py": text})["config"]
    assert (config["max_steps"], config["warmup_steps"]) == (200, 20)
    assert config["learning_rate"] == 100.0 and config["layers"] == (201, 202)
    assert run("x.py", files={"x.py": text})["config"]["warmup_steps"] == 500


NO_KEYS = ("pi", "local", "_hidden", "table", "inside")
REFUSED = {"--max_step=1": "unknown key 'max_step', did you mean 'max_steps'?",
           "--max-steps=1": "did you mean 'max_steps'?",
           "--zzzzzz=1": "unknown key 'zzzzzz', see --help",
           **{f"--{key}=3": f"unknown key '{key}'" for key in NO_KEYS}, "--compile": "--key=value",
           "--compile=1": "compile takes bool, not 1",
           "--compile=true": "compile takes bool, not 'true'",
           "--max_steps=True": "max_steps takes int, not True",
           "--max_steps=1e5": "max_steps takes int, not 100000.0",
           "--max_steps=abc": "max_steps takes int, not 'abc'",
           "--max_steps=None": "max_steps takes int, not None",
           "--learning_rate=True": "learning_rate takes float, not True",
           "--out_dir=None": "out_dir takes str, not None",
           "--clip='a'": "clip takes float or None, not 'a'",
           "--betas=0.9": "betas takes tuple, not 0.9",
           "configs/none.py": "configs/none.py: No such file or directory"}  # fmt: skip
REFUSED_FILES = {"\nmax_stepz = 3\n": "x.py:2: unknown key 'max_stepz', did you mean 'max_steps'?",
                 "max_steps = 1\n\nmax_steps = 2.5\n": "x.py:3: max_steps takes int, not 2.5",
                 "compile = 1\n": "x.py:1: compile takes bool, not 1",
                 "for i in range(3):\n    pass\n": "x.py:1: unknown key 'i'",
                 "_a = 1\n_b = _a / 0\n": "x.py:2: ZeroDivisionError",
                 "def _f():\n    return 1 / 0\n\n_f()\n": "x.py:2: ZeroDivisionError",
                 "_a = 1\nmax_steps = = 3\n": "x.py:2: invalid syntax",
                 "base = 3\n": "x.py:1: base takes a quoted path",
                 "base = 'no.py'\n": "x.py -> no.py: No such file",
                 "base = 'x.py'\n": "x.py:1: base x.py leads back to itself",
                 "base = 'b.py'\n": "b.py:3: unknown key 'nope'"}  # fmt: skip


@pytest.mark.parametrize("arg, text, message", [(arg, "", x) for arg, x in REFUSED.items()]
                         + [("x.py", text, x) for text, x in REFUSED_FILES.items()])  # fmt: skip
def test_refusal(run, arg, text, message):
    with pytest.raises(SystemExit) as caught:
        run(arg, files={"x.py": text, "b.py": "\n\nnope = 1\n"})
    assert message in str(caught.value) and (text or arg in str(caught.value))


def test_help_prints_docstring_and_defaults(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.startswith("Train a thing.")
    assert "# the length\nmax_steps = 1000  # optimizer steps\n" in text
    assert "helper" not in text and "---" not in text and "import" not in text


def test_saved_config_runs_again(run, tmp_path, capsys):
    args = ["--out_dir=it's", "--clip=0.5", "--betas=(0.1, 1e-30)", "--compile=True", "--scale=3"]
    config = run(*args)["config"]
    printed = capsys.readouterr().out  # what is not the default, and nothing else
    assert "compile=True" in printed and "max_steps" not in printed
    common.save_config(config, tmp_path / "saved.py")
    assert run("saved.py")["config"] == config
    assert run("saved.py", "--scale=4")["config"] == config | {"scale": 4.0}


# ---- devices and seeds ----
def test_dtype_of(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert common.dtype_of("bf16", cpu) is torch.bfloat16
    assert common.dtype_of("fp32", cpu) is torch.float32
    for capability, dtype in [((7, 5), torch.float32), ((8, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert common.dtype_of("auto", cuda) is dtype
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    for fast, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda x=fast: x, raising=False)
        assert common.dtype_of("auto", cpu) is dtype
        assert common.dtype_of("auto", torch.device("mps")) is torch.float32
    raises(SystemExit, "not 'fp16'", common.dtype_of, "fp16", cpu)


def test_peak_flops(monkeypatch):
    names = {
        "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100-SXM4-80GB": 312e12, "H200": 989e12,
        "L4": 121e12, "L40S": 362e12, "GeForce RTX 4090": 165e12, "H20": None, "Tesla T4": None,
    }  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, n=name: f"NVIDIA {n}")
        assert common.peak_flops(torch.device("cuda", 0)) == peak, name
    assert common.peak_flops(torch.device("cpu")) is None


def test_seed_step_is_a_function_of_seed_step_and_rank():
    def draw(*key):
        common.seed_step(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(s, t, r) for s in range(8) for t in range(32) for r in range(4)]
    draws = {key: draw(*key) for key in keys}
    assert len(set(draws.values())) == len(keys)  # (0, 1, 0), (1, 0, 0) and (0, 0, 1) differ, too
    assert draws[3, 17, 2] == draw(3, 17, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_a_second_ctrl_c_ends(number):
    stop_requested = common.catch_stop(types.SimpleNamespace(dry_run=False))
    try:
        assert stop_requested() is False
        os.kill(os.getpid(), number)
        assert stop_requested() is True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_signal_ends_a_dry_run_which_has_nothing_to_save():
    common.catch_stop(types.SimpleNamespace(dry_run=True))
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_command_that_resumes_is_quoted_for_the_shell(monkeypatch):
    argv = ["train.py", "--query_instruction=a 'b' $c", "--n=1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("RANK", raising=False)
    assert shlex.split(common.resume_command()) == ["python", *argv, "--resume=True"]


# ---- checkpoints ----
def write_checkpoint(out_dir, name, text="weights"):
    tmp = checkpoint.begin_checkpoint(out_dir, name)
    os.makedirs(os.path.join(tmp, "1_Pooling"))
    for file in ("model.safetensors", "1_Pooling/config.json", "training_state.pt"):
        with open(os.path.join(tmp, file), "w") as f:
            f.write(text)
    return checkpoint.commit_checkpoint(tmp)


def names(out_dir):
    return sorted(set(os.listdir(out_dir)) - {"final"})


def test_checkpoint_is_listed_and_found(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert checkpoint.latest_checkpoint(out, "step") is None
    for name in ("step9", "step10", "ext99", "stepx"):
        path = write_checkpoint(out, name)
    assert path == os.path.join(out, "stepx") and "step10" in names(out)
    facts = [7, hashlib.sha256(b"weights").hexdigest()]
    assert json.load(open(f"{out}/step10/complete.json")) == {
        "1_Pooling/config.json": facts, "model.safetensors": facts,
        "training_state.pt": facts}  # fmt: skip
    assert checkpoint.latest_checkpoint(out, "step") == os.path.join(out, "step10")  # by number
    assert checkpoint.latest_checkpoint(out, "ext") == os.path.join(out, "ext99")
    assert checkpoint.latest_checkpoint(out, "decay") is None and capsys.readouterr().out == ""


def test_checkpoint_replaces_one_of_the_same_name_and_final_leads_to_it(tmp_path):
    for name in ("step1", "step10", "step9"):
        path = write_checkpoint(tmp_path, name)
        assert os.path.realpath(tmp_path / "final") == os.path.realpath(path)
    stale = tmp_path / "step9" / "old_file"
    stale.write_text("x")
    assert (tmp_path / checkpoint.begin_checkpoint(tmp_path, "step9")).is_dir()
    assert checkpoint.latest_checkpoint(tmp_path, "step") == str(tmp_path / "step10")
    write_checkpoint(tmp_path, "step9", "newer weights")
    assert not stale.exists() and names(tmp_path) == ["step1", "step10", "step9"]
    assert os.readlink(tmp_path / "final") == "step9"  # a moved out_dir keeps it
    assert (tmp_path / "final" / "model.safetensors").read_text() == "newer weights"
    os.symlink("step9", tmp_path / "final.new")  # left by a save that was killed at its last line
    write_checkpoint(tmp_path, "step11")
    assert os.readlink(tmp_path / "final") == "step11"


def test_a_folder_named_final_does_not_end_a_save(tmp_path, capsys):
    (tmp_path / "final").mkdir()
    path = write_checkpoint(tmp_path, "step5")
    assert os.path.isfile(os.path.join(path, "complete.json"))
    assert "final does not lead to step5: " in capsys.readouterr().out


@pytest.mark.parametrize("file, text, reason", [
    ("complete.json", None, "complete.json is missing or broken (FileNotFoundError)"),
    ("complete.json", '{"model.sa', "complete.json is missing or broken (JSONDecodeError)"),
    ("complete.json", "[1]", "complete.json is missing or broken (TypeError)"),
    ("model.safetensors", "weight", "model.safetensors should have 7 bytes, found 6"),
    ("model.safetensors", "garbage", "model.safetensors is not what was saved, by its sha256"),
    ("1_Pooling/config.json", None, "1_Pooling/config.json should have 7 bytes, found no file"),
])  # fmt: skip
def test_torn_checkpoint_is_skipped(tmp_path, capsys, file, text, reason):
    write_checkpoint(tmp_path, "step1")
    path = os.path.join(write_checkpoint(tmp_path, "step2"), file)
    os.remove(path)
    if text:
        with open(path, "w") as f:
            f.write(text)
    assert checkpoint.latest_checkpoint(tmp_path, "step") == str(tmp_path / "step1")
    assert capsys.readouterr().out == f"checkpoint {tmp_path / 'step2'} skipped: {reason}\n"
    # the torn one does not count as one
    checkpoint.prune_checkpoints(tmp_path, "step", 1, 0, 0, str(tmp_path / "step1"))
    assert names(tmp_path) == ["step1", "step2"]


def test_killed_before_the_rename(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, "step2", "old")
    monkeypatch.setattr(os, "rename", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, "step2", "new")
    monkeypatch.undo()
    assert names(tmp_path) == [".tmp-step2"]  # the worst moment: the old one is gone
    checkpoint.begin_checkpoint(tmp_path, "step3")  # and one killed while it was written
    assert checkpoint.latest_checkpoint(tmp_path, "step") == str(tmp_path / "step2")
    assert (tmp_path / "step2" / "model.safetensors").read_text() == "new"
    checkpoint.prune_checkpoints(tmp_path, "step", 0, 0, 0)
    assert names(tmp_path) == ["step2"]


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step in (1, 2, 3, 10, 20):
        write_checkpoint(tmp_path, f"step{step}")
    write_checkpoint(tmp_path, "ext1")
    checkpoint.prune_checkpoints(tmp_path, "step", 0, 0, 0)
    assert len(names(tmp_path)) == 6
    checkpoint.prune_checkpoints(tmp_path, "step", 2, 0, 0, "step2")
    assert names(tmp_path) == ["ext1", "step10", "step2", "step20"]
    checkpoint.prune_checkpoints(tmp_path, "step", 1, 0, 0, str(tmp_path / "step2"))
    assert names(tmp_path) == ["ext1", "step2", "step20"]
    checkpoint.prune_checkpoints(tmp_path, "step", 1, 0, 0)
    assert names(tmp_path) == ["ext1", "step20"]


def test_prune_can_keep_models(tmp_path, capsys):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, f"step{step}")
    checkpoint.prune_checkpoints(tmp_path, "step", 1, 1, 0, "step1")
    assert names(tmp_path / "step2") == ["1_Pooling", "complete.json", "model.safetensors"]
    assert "training_state.pt" in names(tmp_path / "step1")
    (tmp_path / "step3" / "complete.json").unlink()
    assert checkpoint.latest_checkpoint(tmp_path, "step") == str(tmp_path / "step1")
    assert "step2 skipped: a model only" in capsys.readouterr().out
    checkpoint.prune_checkpoints(tmp_path, "step", 1, 1, 0)  # models stay whatever their number
    assert names(tmp_path) == ["step1", "step2", "step3"]


def test_prune_keeps_models_and_states_at_their_intervals(tmp_path):
    for step in range(10, 100, 10):
        write_checkpoint(tmp_path, f"step{step}")
    checkpoint.prune_checkpoints(tmp_path, "step", 2, 20, 30)
    there = {name: "training_state.pt" in names(tmp_path / name) for name in names(tmp_path)}
    assert there == {"step20": False, "step30": True, "step40": False, "step60": True,
                     "step80": True, "step90": True}  # fmt: skip


# ---- the log ----
def open_log(out_dir, columns, stop_step, start_step=0, tracker=""):
    keys = dict(out_dir=str(out_dir), stop_step=stop_step, tracker=tracker, dry_run=False)
    keys |= dict(keep_best=False, patience=0, save_interval=1)
    s = types.SimpleNamespace(**keys, config=keys, rank=common.get_rank())
    return common.open_log(s, columns, start_step)


def rows_of(folder):
    with open(os.path.join(folder, "log.csv")) as f:
        return list(csv.DictReader(f))


def test_log_line_and_csv(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 101.0, 102.0, 104.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    columns = ["loss", "acc", "gnorm", "lr", "tok_s", "mfu", "eval_loss"]
    log = open_log(tmp_path, columns, 1000)
    line = dict(loss=2.3456, acc=0.412, gnorm=1.0299, lr=3e-4, tok_s=128000, mfu=0.412)
    log(110, line | {"mfu": None})
    log(120, line)
    log(120, {"eval_loss": 1 / 3})
    first, second, third = capsys.readouterr().out.splitlines()
    assert "eta" not in first and "mfu" not in first
    assert second == (
        "step   120/1000 | loss 2.3456 | acc 0.412 | gnorm 1.03 | lr 3.00e-04 | 128,000 tok/s "
        "| mfu 41.2% | eta 1m28s")  # fmt: skip
    assert third == "step   120/1000 | eval_loss 0.3333"
    one, two, three = rows_of(tmp_path)
    assert list(one) == ["step", *columns, "eta"]
    assert float(two["loss"]) == 2.3456 and two["eval_loss"] == "" and float(two["eta"]) == 88.0
    assert float(three["eval_loss"]) == 1 / 3 and three["loss"] == "" and one["mfu"] == ""
    raises(KeyError, "los", log, 121, {"los": 1.0})


def test_what_a_run_will_not_do_is_said(tmp_path, capsys):
    s = dict(out_dir=str(tmp_path), stop_step=9, tracker="", dry_run=False, patience=0, rank=0)
    for data, interval in (("", 5), ("val.jsonl", 0), ("val.jsonl", 5)):
        given = dict(keep_best=True, save_interval=10, eval_interval=interval, eval_data=data)
        common.open_log(types.SimpleNamespace(**s, **given, config=given), ["loss"])
        said = capsys.readouterr().out
        assert ("keep_best and patience do nothing" in said) == (not data or not interval)
        assert "save_interval=10 is beyond this run" in said


def test_errors_about_what_is_missing_say_what_makes_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path, said in {
        "data/pydocs/train.jsonl": "First: python data/pydocs/prepare.py",
        "models/SmolLM2-135M-Instruct": "First: python data/smollm2/prepare.py",
        "out/clm_pydocs_tiny/step3": "The first lines of configs/clm_pydocs_tiny.py",
        "my/train.jsonl": "the form of its lines",
    }.items():
        assert said in common.made_by(path)
    assert common.made_by("nowhere/model") == ""


def test_loading_code_computes_in_fp32(tmp_path):
    write_json({"model_type": "SentenceTransformer"}, tmp_path / "final",
               "config_sentence_transformers.json")  # fmt: skip
    for dtype, more in (("float32", ""), ("bfloat16", ", model_kwargs={'dtype': 'float32'}")):
        write_json({"dtype": dtype}, tmp_path / "final", "config.json")
        assert common.loading_code(str(tmp_path)).endswith(f"'{tmp_path}/final'{more})")


def test_resumed_log_is_cut_back(tmp_path):
    log = open_log(tmp_path, ["loss", "old"], 200)
    for step in (5, 10, 15, 100):
        log(step, {"loss": step / 3, "old": 1})
    with open(tmp_path / "log.csv", "a") as f:
        f.write("1")  # killed while writing 105: this is not step 1
    log = open_log(tmp_path, ["loss", "new"], 200, start_step=10)
    log(15, {"loss": 7, "new": 8})
    rows = rows_of(tmp_path)
    assert [int(r["step"]) for r in rows] == [5, 10, 15]
    assert [float(r["loss"]) for r in rows] == [5 / 3, 10 / 3, 7]  # every bit
    assert [(r["new"], r["old"]) for r in rows] == [("", "1.0"), ("", "1.0"), ("8.0", "")]
    open_log(tmp_path, ["loss"], 200)  # a fresh run starts a fresh file
    assert rows_of(tmp_path) == []


def test_log_is_rank_0s(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    open_log(tmp_path / "x", ["loss"], 10)(1, {"loss": 1.0})
    assert not (tmp_path / "x").exists() and capsys.readouterr().out == ""


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    board = fake.SummaryWriter = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    open_log(tmp_path, ["loss"], 10, 4, "tensorboard")(5, {"loss": 2})
    board.assert_called_once_with(str(tmp_path), purge_step=5)
    assert board.return_value.method_calls == [call.add_scalar("loss", 2.0, 5), call.flush()]


def test_format_time():
    times = [common.format_time(s) for s in (0.4, 59.6, 192, 7500, 90061)]
    assert times == ["0s", "1m00s", "3m12s", "2h05m", "25h01m"]


def test_plot_writes_a_png(tmp_path, monkeypatch):
    for run in "ab":
        log = open_log(tmp_path / run, ["loss", "lr", "eval_loss"], 50)
        for step in range(1, 51):
            log(step, {"loss": 1 / step, "lr": 0.1})
        log(50, {"eval_loss": 0.5})
    command, curves = ["plot.py", f"{tmp_path}/a", f"{tmp_path}/b"], tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", [*command, "--keys=loss,eval_loss,lr", f"--out={curves}"])
    runpy.run_path(f"{ROOT}/tools/plot.py", run_name="__main__")
    assert curves.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", [*command, "--keys=acc"])
    with pytest.raises(SystemExit, match="no column 'acc', only step, loss, lr, eval_loss, eta"):
        runpy.run_path(f"{ROOT}/tools/plot.py", run_name="__main__")


def test_smooth_averages_and_does_not_lag():
    falling = [-0.3 * i for i in range(300)]
    assert plot.smooth(falling) == pytest.approx(falling)
    assert plot.smooth([5.0, 1.0]) == [5.0, 1.0]  # too short to smooth
    noisy = plot.smooth([(-1.0) ** i for i in range(300)])
    assert noisy[0] == 1.0 and max(map(abs, noisy[10:-10])) < 0.1


# ---- lengths and the learning rate ----
def lengths(per_epoch=1000, per_step=10, **keys):
    usual = dict.fromkeys(("max_steps", "max_tokens", "num_epochs", "stop_step"))
    usual |= dict(learning_rate=1.0, min_lr=0.1, schedule="linear", decay_shape="linear")
    s = types.SimpleNamespace(**usual | keys)
    optim.set_lengths(s, per_epoch, per_step)
    return s


@pytest.mark.parametrize("keys, message", [
    ({}, "nothing; expected one of max_steps, max_tokens or num_epochs"),
    ({"max_steps": 5, "num_epochs": 1}, "max_steps=5, num_epochs=1; expected one of"),
    ({"max_tokens": 5, "max_steps": 5}, "max_steps=5, max_tokens=5; expected one of"),
    ({"max_steps": 5, "stop_step": 6}, "stop_step=6 lies behind the horizon of 5"),
    ({"max_steps": 5, "warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps.*give one of"),
    ({"max_steps": 5, "decay_steps": 1, "decay_tokens": 10}, "decay_steps.*give one of"),
])  # fmt: skip
def test_lengths_are_given_once(keys, message):
    raises(SystemExit, message, lengths, **keys)


def test_horizon_warmup_and_decay_in_steps():
    s = lengths(num_epochs=1.5, warmup_ratio=0.1, decay_tokens=200)
    assert (s.max_steps, s.stop_step, s.warmup, s.decay) == (150, 150, 15, 20)
    s = lengths(max_tokens=1001, warmup_tokens=50, stop_step=7)
    assert (s.max_steps, s.stop_step, s.warmup, s.decay) == (101, 7, 5, 96)
    assert lengths(max_steps=50, schedule="wsd").decay == 5


def test_a_decay_begins_after_the_warmup_or_ends_with_the_horizon():
    def rates(**keys):
        s = lengths(max_steps=10, warmup_steps=2, decay_steps=4, **keys)
        return [round(optim.learning_rate_at(step, s), 3) for step in range(10)]

    falling = [1.0, 0.775, 0.55, 0.325]
    assert rates() == [0.5, 1.0, *falling, 0.1, 0.1, 0.1, 0.1]
    assert rates(schedule="wsd") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *falling]
    # a run that stops early has the rates of the whole one
    assert rates(stop_step=5) == rates()


# ---- StableAdamW ----
def stable_adamw_by_loop(params, grads_of_steps, lr, betas, eps, weight_decay):
    """The update of the paper, a tensor at a time. -> (params, how often an update was clipped)"""
    theta = [p.clone() for p in params]
    m, v, clipped = [0.0] * len(theta), [0.0] * len(theta), 0
    for t, grads in enumerate(grads_of_steps, 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
        for i, g in enumerate(grads):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            rms = (g * g / torch.clamp(v[i], min=eps**2)).mean().sqrt().item()
            clipped += rms > 1.001
            lr_t = lr / max(1.0, rms)
            theta[i] = theta[i] * (1 - lr_t * weight_decay)
            theta[i] = theta[i] - lr_t * m[i] / (v[i].sqrt() + eps)
    return theta, clipped


def test_stable_adamw_is_the_papers_loop():
    torch.manual_seed(0)
    sizes = {(7, 5): 1e-7, (3,): 1.0, (1, 4): 1e-3, (2, 3, 2): 1.0}  # the first is below eps
    start = [torch.randn(shape, dtype=torch.float64) for shape in sizes]
    grads = [[torch.randn(shape, dtype=torch.float64) * size * (50 if t == 3 else 1)
              for shape, size in sizes.items()] for t in range(8)]  # fmt: skip
    how = dict(lr=0.05, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    expected, clipped = stable_adamw_by_loop(start, grads, **how)
    params, frozen = [nn.Parameter(p.clone()) for p in start], nn.Parameter(torch.ones(2))
    optimizer = optim.StableAdamW([*params, frozen], **how)
    for now in grads:
        for p, g in zip(params, now, strict=True):
            p.grad = g.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, now, strict=True))
    assert 3 < clipped < 32 - 3  # both sides of the clipping were met
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(frozen, torch.ones(2)) and not optimizer.state[frozen]


def test_hyperparameters_stay_the_scripts_on_resume():
    p = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    old = torch.optim.AdamW(p, lr=1.0, weight_decay=0.5)
    for q in p:
        q.grad = torch.ones_like(q)
    old.step()
    new = torch.optim.AdamW(p, lr=2.0, weight_decay=0.25)
    checkpoint.load_optimizer_state([new], checkpoint.optimizer_state([old]))
    assert new.param_groups[0]["lr"] == 2.0 and new.param_groups[0]["weight_decay"] == 0.25
    assert torch.equal(new.state[p[0]]["exp_avg"], old.state[p[0]]["exp_avg"])
    other = torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:]}])
    with pytest.raises(ValueError, match=r"AdamW: tensors per group \[2\], not \[1, 1\]"):
        checkpoint.load_optimizer_state([other], checkpoint.optimizer_state([old]))


# ---- two ranks: check_* run in both ----
def toy(seed, weights=None):
    """7 and 1 rows do not divide by two: ranks hold uneven shards, and an empty one."""
    torch.manual_seed(seed)
    layers = dict(first=nn.Linear(5, 7), tanh=nn.Tanh(), second=nn.Linear(7, 1))
    model = nn.Sequential(OrderedDict(layers)).double()
    if weights:
        model.load_state_dict(weights)
    return model


def toy_batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=g, dtype=torch.float64)
    return x, x.sum(1, keepdim=True) * (200 if step == 3 else 1)  # a jump, so that RMS > 1


def toy_train(model, optimizer, steps, ranks=slice(None)):
    for step in steps:
        x, y = (t[ranks] for t in toy_batch(step))
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model, optimizer):
    plain = getattr(model, "module", model)  # without DDP
    return checkpoint.full_state_dict(plain), checkpoint.optimizer_state([optimizer])


KINDS = ("ddp-adamw", "ddp-stable", "zero-stable", "fsdp-adamw", "fsdp-stable", "hsdp-stable")


def optimizer_of(model, kind):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    cls = torch.optim.AdamW if "adamw" in kind else optim.StableAdamW
    if kind.startswith("zero"):
        cls = partial(ZeroRedundancyOptimizer, optimizer_class=cls)
    return cls(groups, lr=0.02, weight_decay=0.1)


def wrap(model, kind):
    layers = (model.first, model.second)
    if kind.startswith("hsdp"):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for part in (*layers, model):
            fully_shard(part, mesh=mesh)
    else:
        fsdp, device = "full" if "fsdp" in kind else "", torch.device("cpu")
        s = types.SimpleNamespace(compile=False, fsdp=fsdp, world_size=2, device=device)
        model = common.wrap(model, layers, s)
    return model, optimizer_of(model, kind)


def check_setup():
    cores, os.cpu_count = os.cpu_count, lambda: 6
    rank, world_size, local_rank, device = common.setup_distributed()
    assert (rank, world_size, local_rank) == (int(os.environ["RANK"]), 2, rank)
    assert device == torch.device("cpu") and dist.get_backend() == "gloo"
    assert torch.get_num_threads() == 3  # the cores over the ranks, not torchrun's one
    os.cpu_count = cores
    torch.set_num_threads(1)
    tiny = 2.0**-40  # lost in float32
    assert common.all_reduce_sum([rank + 1, rank * 0.5, 1 + rank * tiny]) == [3.0, 0.5, 2 + tiny]


def check_checkpoint_is_one_answer(folder):
    out = os.path.join(folder, "plain")
    tmp = checkpoint.begin_checkpoint(out, "step4")
    assert os.path.isdir(tmp)
    if dist.get_rank() == 0:
        with open(os.path.join(tmp, "training_state.pt"), "w") as f:
            f.write("x")
    rename = os.rename
    os.rename = lambda *names: (time.sleep(0.3), rename(*names))  # the other rank waits for it
    path = checkpoint.commit_checkpoint(tmp)
    os.rename = rename
    assert os.path.isdir(path)
    assert path == os.path.join(out, "step4") == checkpoint.latest_checkpoint(out, "step")
    checkpoint.prune_checkpoints(out, "step", 1, 0, 0)
    assert names(out) == ["step4"]


def check_resume(folder, kind):
    """Three steps, a checkpoint, two more; a fresh start from the checkpoint gives the same bits.
    And one process with all of the batch, from the same start and from the checkpoint, agrees."""
    rank, steps = dist.get_rank(), range(5)
    half = slice(4 * rank, 4 * rank + 4)
    model, optimizer = wrap(toy(0), kind)
    start = copy.deepcopy(state_of(model, optimizer)[0])
    toy_train(model, optimizer, steps[:3], half)
    weights, states = state_of(model, optimizer)
    assert bool(weights) == bool(states) == (rank == 0)
    tmp = checkpoint.begin_checkpoint(os.path.join(folder, kind), "step3")
    if rank == 0:
        assert set(weights) == set(toy(0).state_dict())
        torch.save(weights, os.path.join(tmp, "weights.pt"))
        torch.save({"step": 3, "optimizers": states}, os.path.join(tmp, "training_state.pt"))
    checkpoint.commit_checkpoint(tmp)
    toy_train(model, optimizer, steps[3:], half)
    unbroken, unbroken_optim = state_of(model, optimizer)

    last = checkpoint.latest_checkpoint(os.path.join(folder, kind), "step")
    saved = torch.load(f"{last}/weights.pt", weights_only=True)
    state = torch.load(f"{last}/training_state.pt", weights_only=True, mmap=True)
    model, optimizer = wrap(toy(1, saved), kind)
    checkpoint.load_optimizer_state([optimizer], copy.deepcopy(state["optimizers"]))
    toy_train(model, optimizer, steps[state["step"] :], half)
    resumed, resumed_optim = state_of(model, optimizer)
    torch.testing.assert_close(unbroken, resumed, rtol=0, atol=0)
    if rank == 0:
        for one, two in zip(unbroken_optim, resumed_optim, strict=True):
            assert one["param_groups"] == two["param_groups"]
            assert [len(values) for values in one["state"].values()] == [3] * 4
            torch.testing.assert_close(one["state"], two["state"], rtol=0, atol=0)
        # alone: plain modules and optimizers, the checkpoint's format is the same
        for weights, states, todo in [(start, [], steps), (saved, state["optimizers"], steps[3:])]:
            alone = toy(2, weights)
            optimizer = optimizer_of(alone, kind.removeprefix("zero"))
            if states:
                checkpoint.load_optimizer_state([optimizer], states)
            toy_train(alone, optimizer, todo)
            torch.testing.assert_close(alone.state_dict(), resumed, rtol=1e-10, atol=1e-12)


def check_names_of_compiled_blocks():
    model = toy(0)
    model.first.compile()
    for wrapped in (model, torch.compile(toy(0))):
        state = checkpoint.full_state_dict(wrapped)
        if dist.get_rank() == 0:
            assert set(state) == set(toy(0).state_dict())


def check_clipping_on_shards():
    """clip_grad_norm_ of torch does for fully_shard: the norm is global."""
    half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    sharded, _ = wrap(toy(0), "fsdp-adamw")
    alone = toy(0)
    for model, ranks in ((sharded, half), (alone, slice(None))):
        x, y = (t[ranks] for t in toy_batch(0))
        F.mse_loss(model(x), y).backward()
    norm = optim.clip_gradients(sharded.parameters(), 0.1)
    expected = nn.utils.clip_grad_norm_(alone.parameters(), 0.1).item()
    assert norm == pytest.approx(expected, rel=1e-12)
    for p, q in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-10)


def test_in_two_ranks(tmp_path):
    run_ranks(2, [[__file__, str(tmp_path)]])


if __name__ == "__main__":  # one rank
    check_setup()
    check_checkpoint_is_one_answer(sys.argv[1])
    for kind in KINDS:
        check_resume(sys.argv[1], kind)
    check_names_of_compiled_blocks()
    check_clipping_on_shards()
    dist.destroy_process_group()
