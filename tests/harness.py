"""Runs of the scripts for tests: in this process, in one to be killed, on several ranks."""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import types

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
