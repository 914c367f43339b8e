"""
What only a GPU can show, in nine minutes on one: kernels, compiled blocks, bits, speed, memory.

    python -m tools.gpu_check                       # -> out/gpu_check/report.md and report.json
    python -m tools.gpu_check --minutes=4           # smaller sizes, and rows that stay open
    python -m tools.gpu_check --only=resume,bench   # rows whose names begin like this

Each row is commands in processes of their own, with a limit of time: one that fails is a line of
the report, and the others go on. Nothing is downloaded; rows that need a package that is not
installed stay open. Without CUDA the rows run at a tiny size, on what stands in for the kernels,
and those that only a GPU can close are named. All that the commands print is in log.txt.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.autograd import DeviceType

import common
from formats import read_json, write_json
from model import from_scratch
from tokenizer import load_tokenizer
from tokens import write_meta, write_tokens
from tools import bench

TINY = "modernbert-tiny"
PACKAGES = "torch", "triton", "flash-attn", "transformers", "sentence-transformers", "peft"
DOCUMENT = 400  # tokens on average, see make_data


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- checks ----
# Each takes the settings `s` -> {"figure": what the report says, more numbers}. s: device, small
# (little time, or a CPU), work (a temporary folder), out_dir, and `ends`, the end of its time.


def run(s, *argv, **env):
    """A command of this project -> what it printed. RuntimeError with the line that says why."""
    env = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"} | env
    process = subprocess.Popen(
        [sys.executable, *argv], text=True, env=env, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    late = False
    try:
        out = process.communicate(timeout=max(1, s.ends - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        late = True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # it and what it started
            out = process.communicate()[0]
    with open(f"{s.out_dir}/log.txt", "a", encoding="utf-8") as f:
        print("$", *argv, f"\n{out}", file=f)
    if late:
        raise RuntimeError(f"no time was left for {' '.join(argv)[:60]}")
    if process.returncode:
        errors = re.findall(r"(?m)^(?:[\w.]*(?:Error|Exit|Exception): |FAIL).*", out)
        raise RuntimeError("; ".join(errors[-2:]) or (out.strip().splitlines() or ["silence"])[-1])
    return out


def tests(s):
    """Attention, backends and one graph a block: marked cuda, or with stand-ins."""
    kind, *more = ("cuda", "tests/test_model.py") if s.device.type == "cuda" else ("not cuda",)
    options = "-q", "-p", "no:cacheprovider", "-k", "not gpu_check", "-m", kind
    out = run(s, "-m", "pytest", *options, "tests/test_kernels.py", *more)
    return {"figure": out.splitlines()[-1]}


def verify(s, size):
    return {"figure": run(s, "-m", "tools.verify", f"{s.work}/{size}").splitlines()[-1]}


def pretrain(s, out, *more, size=TINY, tokens=512, **env):
    step = tokens * (2 if s.device.type == "cpu" else 4)
    return run(s, "pretrain_mlm.py", f"--data={s.work}/tokens", f"--out_dir={s.work}/{out}",
               f"--model_size={size}", f"--device_batch_tokens={tokens}", "--eval_interval=0",
               f"--batch_tokens={step}", "--max_steps=8", *more, **env)  # fmt: skip


def numbers(s, size, out):
    """What --dry_run=True printed."""
    found = re.search(r"dry run: .* ([\d.,]+) tok/s, peak memory ([\d.]+) GB", out)
    found = {"tok_s": float(found[1].replace(",", "")), "memory": float(found[2])}
    return found | {"figure": f"{size}: {found['tok_s']:,.0f} tok/s, {found['memory']:.2f} GB"}


def dry(s, compiled, tokens):
    """Masked language modelling, with `tokens` in a forward pass."""
    size, length = "ettin-17m" if s.small else "ettin-150m", 1024
    if s.device.type == "cpu":
        size, length, tokens = TINY, 512, 512
    options = "--dry_run=True", f"--compile={compiled}", f"--max_seq_len={length}"
    found = numbers(s, size, pretrain(s, "dry", *options, size=size, tokens=tokens))
    if peak := common.peak_flops(s.device):
        with torch.device("meta"):
            flops_per_token = from_scratch(size).flops_per_token(DOCUMENT)
        found["mfu"] = found["tok_s"] * flops_per_token / peak
        found["figure"] += f", mfu {found['mfu']:.1%}"
    return found


def resume(s):
    """Eight steps, and four and a new process for the others: the same bits?"""
    more = "--deterministic=True", "--log_interval=1"
    for out, *rest in (("whole",), ("parts", "--stop_step=4"), ("parts", "--resume=True")):
        pretrain(s, out, *more, *rest)
    folders = f"{s.work}/whole", f"{s.work}/parts"
    for step in range(1, 9):
        a, b = (common.logged(folder, step)["loss"] for folder in folders)
        if a != b:
            raise RuntimeError(f"step {step}: loss {a} unbroken, {b} resumed")
    a, b = (Path(folder, "step8", "model.safetensors").read_bytes() for folder in folders)
    if a != b:
        raise RuntimeError("equal losses, other weights")
    return {"figure": "8 losses, and the weights after them, are bit-equal to 4 + resume"}


def one_rank(s, more):
    """As torchrun starts it: a process group of one."""
    env = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    options = "--dry_run=True", "--compile=True", "--gradient_checkpointing=True", more
    return numbers(s, TINY, pretrain(s, "one_rank", *options, **env))


def contrastive(s):
    cuda = s.device.type == "cuda"
    size, n = ("ettin-150m", 256) if cuda else (TINY, 4)
    return numbers(s, size, run(
        s, "train_contrastive.py", f"--init_from={s.work}/{size}-embedder", "--eval_data=",
        f"--data={s.work}/pairs.jsonl", "--lora_rank=16", "--gradient_checkpointing=True",
        f"--batch_size={n}", f"--device_batch_tokens={16 * n}", f"--compile={cuda}",
        f"--out_dir={s.work}/pairs", "--max_steps=4", "--dry_run=True"))  # fmt: skip


def beside(s, name, n):
    size = [] if s.small or name == "mntp" else ["--size=ettin-150m"]  # mntp is of a Llama
    run(s, "-m", "tools.bench", name, "--device=cuda", "--dtype=bf16", "--rounds=3", f"--n={n}",
        f"--out_dir={s.out_dir}", *size)  # fmt: skip
    rows = read_json(s.out_dir, f"bench_{name}.json")["rows"]
    figures = (f"{row['ratio']:.2f}x the speed and {row['memory_ratio']:.2f}x the memory of "
               f"{row['name'].partition(': ')[2]}" for row in rows)  # fmt: skip
    return {"figure": "; ".join(figures), "rows": rows}


def profile(s):
    """In a process of its own, too: what it prints last is the result."""
    small = ["--small"] if s.small else []
    return json.loads(run(s, "-m", "tools.gpu_check", "--profile", *small).splitlines()[-1])


def profiled(device, small):
    """Three steps of masked language modelling without a compiler: what took their time."""
    cuda = device.type == "cuda"
    size, n = ("ettin-17m" if small else "ettin-150m", 64) if cuda else (TINY, 1)
    case, rng = replace(bench.BENCHES["mlm"][0], size=size), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = bench.make_model(case, folder).config.vocab_size
        batches = [case.make(vocab_size, n, rng) for _ in range(5)]
        steps = bench.labels_ours(SimpleNamespace(
            folder=folder, batches=batches, device=device.type, dtype="bf16" if cuda else "fp32"))
        for _ in range(3):  # imports, two steps to warm up
            next(steps)
    begin = time.perf_counter()
    with torch.profiler.profile() as found:
        for _ in range(3):
            next(steps)  # it reads the loss: the step before is done
    seconds = time.perf_counter() - begin
    key = "self_device_time_total" if cuda else "self_cpu_time_total"  # microseconds
    events = [e for e in found.key_averages() if (e.device_type == DeviceType.CUDA) == cuda]
    times = sorted(((getattr(e, key), e.key) for e in events), reverse=True)
    total = sum(t for t, _ in times)
    kernels = [[name[:90], t / 3e3, t / total] for t, name in times[:15]]
    figure = f"{size}: busy {total / 1e6 / seconds:.0%} of the time, {kernels[0][2]:.0%} of it in "
    return {"figure": figure + kernels[0][0][:40], "kernels": kernels}


@dataclass
class Row:
    name: str
    seconds: int  # its limit; most need a third of it
    check: Callable
    on_cpu: bool = False  # whether something stands in for it
    needs: str = "torch"  # a package


ST = "sentence-transformers"
ROWS = [
    Row("kernels", 120, tests, True, "pytest"),
    Row("verify ModernBERT", 40, partial(verify, size=TINY), True),
    Row("verify Qwen3", 40, partial(verify, size="qwen3-tiny"), True),
    Row("dry run 32768", 40, partial(dry, compiled=False, tokens=32768), True),
    Row("dry run 32768, compiled", 120, partial(dry, compiled=True, tokens=32768)),
    Row("resume", 60, resume, True),
    Row("one rank, FSDP", 60, partial(one_rank, more="--fsdp=full")),
    Row("one rank, ZeRO-1", 45, partial(one_rank, more="--zero1=True")),
    Row("one rank, Muon", 45, partial(one_rank, more="--optimizer=muon")),
    Row("contrastive, LoRA", 90, contrastive, True),
    Row("bench mlm", 60, partial(beside, name="mlm", n=32)),
    Row("bench contrastive", 75, partial(beside, name="contrastive", n=128), needs=ST),
    Row("bench encode", 60, partial(beside, name="encode", n=2000), needs=ST),
    Row("bench mntp", 60, partial(beside, name="mntp", n=16), needs="peft"),
    Row("profile", 45, profile, True),
    Row("dry run 8192", 40, partial(dry, compiled=False, tokens=8192)),
    Row("dry run 8192, compiled", 60, partial(dry, compiled=True, tokens=8192)),
    Row("dry run 65536", 40, partial(dry, compiled=False, tokens=65536)),
    Row("dry run 65536, compiled", 60, partial(dry, compiled=True, tokens=65536)),
]


# ---- the report ----


def make_data(s):
    """Fresh models, token files of a million tokens and pairs, all in s.work."""
    mlm, pairs = (bench.BENCHES[name][0] for name in ("mlm", "contrastive"))
    rng = np.random.default_rng(0)
    for size in (TINY, "qwen3-tiny"):
        bench.make_model(replace(mlm, size=size), f"{s.work}/{size}")
    for size in (TINY, "ettin-150m") if s.device.type == "cuda" else (TINY,):
        bench.make_model(replace(pairs, size=size), f"{s.work}/{size}-embedder")
    tokenizer = load_tokenizer(f"{s.work}/{TINY}-embedder")  # each word is a token
    tokenizer.mask_token, vocab_size = "w5", len(tokenizer)
    os.makedirs(f"{s.work}/tokens")
    docs = bench.random_ids(vocab_size, 2500, rng, (DOCUMENT // 4, DOCUMENT * 7 // 4))
    splits = {"train": write_tokens(f"{s.work}/tokens", "train", docs, vocab_size)}
    write_meta(f"{s.work}/tokens", tokenizer, "words", splits)
    with open(f"{s.work}/pairs.jsonl", "w", encoding="utf-8") as f:
        for query, passage in zip(*pairs.make(vocab_size, 2000, rng).inputs):
            print(json.dumps({"query": query, "pos": [passage]}), file=f)


def verdict_of(row, s):
    """-> what the report says of a row: {"verdict": pass, FAIL or open, "figure", ..}"""
    left = s.deadline - time.monotonic()
    s.small = s.device.type == "cpu" or left < row.seconds
    s.ends = time.monotonic() + min(left, row.seconds)
    if s.device.type == "cpu" and not row.on_cpu:
        return {"verdict": "open", "figure": "needs CUDA"}
    if not installed(row.needs):
        return {"verdict": "open", "figure": f"needs {row.needs}, which is not installed"}
    if left < 15:
        return {"verdict": "open", "figure": "no time was left"}
    try:
        return {"verdict": "pass", "small": s.small, **row.check(s)}
    except Exception as error:  # the other rows still tell something
        return {"verdict": "FAIL", "figure": " ".join(f"{type(error).__name__}: {error}".split())}


def write_report(machine, rows, s):
    """-> its last line"""
    write_json({"machine": machine, "rows": rows}, s.out_dir, "report.json")
    lines = [", ".join(f"{name} {x}" for name, x in machine.items()), ""]
    lines += ["| check | verdict | what was found | seconds |", "| --- | --- | --- | --- |"]
    for row in rows:
        figure = row["figure"].replace("|", "/") + " (small)" * row.get("small", False)
        lines.append(f"| {row['name']} | {row['verdict']} | {figure} | {row['seconds']:.0f} |")
    kernels = [kernel for row in rows for kernel in row.get("kernels", ())]
    lines += [""] + [f"- {ms:.2f} ms a step, {share:.1%}: {name}" for name, ms, share in kernels]
    is_open = [row["name"] for row in rows if row["verdict"] == "open"]
    lines += ["", f"Still open: {'; '.join(is_open) or 'nothing'}"]
    Path(s.out_dir, "report.md").write_text("\n".join(lines) + "\n", "utf-8")
    return lines[-1]


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="beginnings of rows' names, by commas")
    parser.add_argument("--out_dir", default="out/gpu_check")
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args, begin, rows = parser.parse_args(), time.monotonic(), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.profile:
        return print(json.dumps(profiled(device, args.small)))
    chosen = [row for row in ROWS if row.name.startswith(tuple(args.only.split(",")))]
    if not chosen:
        parser.error(f"--only={args.only}: the rows are {', '.join(row.name for row in ROWS)}")
    s = SimpleNamespace(device=device, out_dir=args.out_dir, deadline=begin + 60 * args.minutes)
    os.makedirs(s.out_dir, exist_ok=True)
    Path(s.out_dir, "log.txt").write_text("", "utf-8")
    machine = {"device": bench.device_name(device.type)}
    if device.type == "cuda":
        machine["capability"] = torch.cuda.get_device_capability(device)
    machine |= {name: installed(name) or "absent" for name in PACKAGES}
    print(machine, flush=True)
    with tempfile.TemporaryDirectory() as s.work:
        make_data(s)
        for row in chosen:
            start, left = time.monotonic(), s.deadline - time.monotonic()
            print(f"{row.name} (up to {row.seconds} s of {left:.0f} s): ", end="", flush=True)
            found = verdict_of(row, s)
            rows.append({"name": row.name, "seconds": time.monotonic() - start, **found})
            print(found["verdict"], found["figure"], flush=True)
            last = write_report(machine, rows, s)  # as far as it is known
    print(f"{last}\nwritten to {s.out_dir}/report.md")
    return any(row["verdict"] == "FAIL" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
