"""Runs of the scripts for tests: in this process, in one to be killed, on several ranks."""

import csv
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types

import common

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def arguments(script, config, out_dir, *more):
    return [os.path.join(ROOT, script), config, f"--out_dir={out_dir}", *more]


def run(script, config, out_dir, *more):
    """The script in this process, as `python script config` runs it -> its globals."""
    old, sys.argv = sys.argv, arguments(script, config, out_dir, *more)
    try:
        return types.SimpleNamespace(**runpy.run_path(sys.argv[0], run_name="__main__"))
    finally:
        sys.argv = old
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(ranks, script, config, out_dir, *more):
    """The script in processes of its own group, to be waited for or killed."""
    launch = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    return subprocess.Popen(
        launch + arguments(script, config, out_dir, *more), cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_ranks(ranks, argvs):
    """Several runs (lists from `arguments`) one after another on the same ranks: see run_many.py"""
    launch = [*TORCHRUN, f"--nproc_per_node={ranks}", os.path.join(ROOT, "tests", "run_many.py")]
    with subprocess.Popen(
        launch + [json.dumps(argvs)], cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            out, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:  # ranks that wait for each other
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, out[-6000:]


def losses(out_dir, column="loss"):
    """{step: value} of log.csv, every bit of it."""
    with open(os.path.join(out_dir, "log.csv"), newline="") as f:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(f) if row[column]}


def saved(out_dir, step, name="model.safetensors"):
    with open(os.path.join(out_dir, f"step{step}", name), "rb") as f:
        return f.read()


def wait_for_step(process, out_dir, step):
    """Until log.csv has the step; fails if the process ends before."""
    path, deadline = os.path.join(out_dir, "log.csv"), time.time() + 120
    while not os.path.exists(path) or step not in losses(out_dir):
        assert process.poll() is None and time.time() < deadline, process.stdout.read()[-3000:]
        time.sleep(0.005)


def kill_at_step(process, out_dir, step):
    """SIGKILL to the process, and to torchrun's ranks, at that step or a little later."""
    wait_for_step(process, out_dir, step)
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)])
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def script(path):
    """A script that is no module of the project, such as data/echo/prepare.py, as a module."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_jsonl(path, records):
    """One line for each record; folders that lack are made -> the path as str."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return str(path)


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# ---- small models of each family ----

_SMALL = dict(n_embd=64, n_hidden=96, n_head=4, n_layer=3, vocab_size=512, max_seq_len=256)
_LOCAL = dict(layer_kinds=["global", "local", "local"], window=6)
FAMILIES = {
    "llama": ("llama-tiny", dict(n_kv_head=2)),
    "llama-bidirectional": ("llama-tiny", dict(causal=False, tied=False)),
    "mistral": ("llama-tiny", dict(family="mistral", layer_kinds=["local"] * 3, window=9)),
    "qwen2": ("llama-tiny", dict(family="qwen2", qkv_bias=True)),
    "qwen3": ("qwen3-tiny", {}),
    "modernbert": ("modernbert-tiny", _LOCAL),
    "modernbert-decoder": ("modernbert-tiny", _LOCAL | dict(causal=True)),
    "modernbert-headless": ("modernbert-tiny", _LOCAL | dict(head="none")),
    "neobert": ("neobert-250m", {}),
}


def model_folder(folder, family, tokenizer):
    """A folder of a small model with random weights, as the training scripts write it -> str."""
    import torch

    from formats.huggingface import save_pretrained
    from model import from_scratch

    size, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = from_scratch(size, **(_SMALL | changes))
    with torch.no_grad():
        for p in model.parameters():  # no norm is 1, no bias 0, and logits of a few
            p.add_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.1))
    names = ("pad", "bos", "eos", "cls", "sep", "mask")
    model.config.hf = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in names}
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_config(folder, **keys):
    """A config file with these keys -> its path."""
    path = os.path.join(folder, "config.py")
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{key} = {value!r}\n" for key, value in keys.items())
    return path


def configured(script, name, *argv):
    """The resolved config of configs/<name>.py, by the defaults of the script."""
    path = os.path.join(ROOT, script)
    with open(path, encoding="utf-8") as f:
        space = {"__file__": path, "__doc__": ""}
        defaults = re.split(r"(?m)^# ---- ", f.read())[1]
        exec(compile("# " + defaults, path, "exec"), space)
    old, sys.argv = sys.argv, [script, os.path.join(ROOT, "configs", f"{name}.py"), *argv]
    try:
        return common.configure(space)
    finally:
        sys.argv = old
