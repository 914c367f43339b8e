"""Every stage on 1 and 2 ranks, killed a hundred times in all at random moments and resumed: what
is logged and saved is that of the unbroken run. KILLS_SEED=... draws again what a test printed."""

import multiprocessing
import os
import random
import runpy
import socket
import sys
import time

import numpy as np
import pytest

import harness
from harness import WORDS, write_jsonl

STEPS = 30
COMMON = dict(max_steps=STEPS, warmup_steps=2, log_interval=1, eval_interval=20, save_interval=2,
              keep_last=2, learning_rate=1e-3, dtype="fp32")  # fmt: skip
TOKENS = dict(max_seq_len=64, batch_tokens=256, device_batch_tokens=64, eval_tokens=256)
TEXTS = dict(init_from="llama", batch_size=4)
STAGES = {
    "pretrain_mlm": TOKENS | dict(init_from="modernbert", attn_dropout=0.1),
    "train_mntp": TOKENS | dict(init_from="llama", mask_token="own", lora_rank=4),
    "train_contrastive": TEXTS | dict(data="pairs", attn_dropout=0.1, device_batch_tokens=100),
    "train_reconstruct": TEXTS
    | dict(
        data="pairs", device_batch_size=2, eval_lines=9, query_max_length=24, passage_max_length=48
    ),
    "train_token_retrieval": TEXTS | dict(data="spans", device_batch_tokens=100, lora_rank=4),
    "train_classifier": TEXTS | dict(data="labels", task="texts", device_batch_size=2, dropout=0.1),
}


@pytest.fixture(scope="module")
def files(folders, toy_tokens, tmp_path_factory):
    """{name in STAGES: its folder or file}"""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    texts = [[" ".join(rng.choice(WORDS, n)) for n in rng.integers(2, 20, 3)] for _ in range(40)]
    pairs = [{"query": q, "pos": [p], "neg": [n]} for q, p, n in texts]
    labels = [{"text": text, "label": text[0]} for text, *_ in texts]
    return {"llama": folders["llama"], "modernbert": folders["modernbert"], "tokens": toy_tokens,
            "pairs": write_jsonl(root / "pairs.jsonl", pairs),
            "labels": write_jsonl(root / "labels.jsonl", labels),
            "spans": harness.spans_file(root / "spans.jsonl")}  # fmt: skip


def run_rank(argv, out, **env):
    """One rank of a script, in a process that has its imports already."""
    os.environ |= env
    sys.argv, sys.stdout = argv, open(out, "a", buffering=1)
    sys.stderr = sys.stdout
    runpy.run_path(argv[0], run_name="__main__")


def start(ranks, script, config, out_dir):
    """-> the processes of a run, which goes on from what there is"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*STAGES, "transformers", "pytest"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    argv, processes = harness.arguments(script, config, out_dir, "--resume=True"), []
    for rank in range(ranks):
        env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        of_rank = env if ranks > 1 else {}
        process = context.Process(target=run_rank, args=(argv, f"{out_dir}.txt"), kwargs=of_rank)
        process.start()
        processes.append(process)
    return processes


def ended(processes, out_dir):
    """-> their exit codes. As torchrun does: where one fails, the others are told to end."""
    deadline = time.time() + 60
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
        assert time.time() < deadline, [process.kill() for process in processes]
        time.sleep(0.1)
    return [process.exitcode for process in processes]


def log_of(out_dir):
    path = out_dir / "log.csv"
    return path.read_bytes() if path.exists() else b""


def finish(ranks, script, config, out_dir):
    codes = ended(start(ranks, script, config, out_dir), out_dir)
    assert not any(codes), open(f"{out_dir}.txt").read()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, n", [(1, 9), (2, 8)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_is_bit_equal(stage, ranks, n, files, tmp_path):
    seed = int(os.environ.get("KILLS_SEED", random.randrange(10**6)))
    print("KILLS_SEED", seed)
    rng, kills, began = random.Random(seed), [], time.time()
    keys = COMMON | {"data": "tokens"} | STAGES[stage]
    keys |= {key: files[keys[key]] for key in ("data", "init_from") if key in keys}
    keys |= {} if "eval_tokens" in keys else {"eval_data": keys["data"]}
    script, config = f"{stage}.py", harness.write_config(tmp_path, **keys)
    finish(ranks, script, config, tmp_path / "whole")
    seconds = 0.3 * (time.time() - began)
    for out_dir in (tmp_path / str(i) for i in range(n)):  # of a run that has ended another follows
        out_dir.mkdir()
        while len(kills) < n and not (out_dir / f"step{STEPS}").exists():
            before, late = log_of(out_dir), rng.random() < 0.8  # late: a step has been logged
            processes = start(ranks, script, config, out_dir)
            while late and processes[0].is_alive() and log_of(out_dir) == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds))
            how, struck = rng.choice(["all", "one", "TERM"]), rng.choice(processes)
            is_running = all(process.is_alive() for process in processes)
            for process in processes if how == "all" else [struck]:
                process.terminate() if how == "TERM" else process.kill()
            codes = ended(processes, out_dir)
            if is_running:
                kills.append((how, codes, sorted(os.listdir(out_dir))))
        finish(ranks, script, config, out_dir)
        harness.assert_equal_bits(out_dir, tmp_path / "whole")
        if len(kills) == n:
            break
    assert len(kills) == n
    print(f"{len(kills)} kills in {time.time() - began:.0f} s", *kills, sep="\n")
