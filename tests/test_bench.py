"""bench.py: a tiny run of it, its arithmetic on made-up times, its count of operations.

    python -m pytest tests/test_bench.py
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from data import make_seqs
from model import from_scratch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_tiny_run(tmp_path):
    """Real processes: the file's fields, and three sides that computed the same losses."""
    command = [sys.executable, os.path.join(ROOT, "bench.py"), "mlm", f"--out_dir={tmp_path}"]
    command += ["--size=modernbert-tiny", "--docs=2", "--rounds=2", "--threads=1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    out = json.loads((tmp_path / "bench_mlm.json").read_text())
    assert out["setting"]["padded_tokens"] > out["setting"]["tokens"] > out["setting"]["labels"]
    assert [set(row) for row in out["rows"]] == [
        {"name", "ours", "peer", "ratio", "memory_ratio"}
    ] * 2
    for row in out["rows"]:
        side = out["sides"]["fp32"][row["name"].removeprefix("mlm fp32: ")]
        assert row["peer"] == side["tokens_per_s"] > 0 and side["memory"] > 0 and row["ratio"] > 0
    sides = [side["losses"] for side in out["sides"]["fp32"].values() if "losses" in side]
    assert len(sides) == 3 and all(len(losses) == 2 for losses in sides)
    for losses in sides:  # of a second and a third step, on new documents, after AdamW's
        assert losses == pytest.approx(sides[0], abs=1e-4) and 8 < losses[0] < 10


def turns(job, peer_loss):
    """Three rounds, the first to be left out: ours 1 s, the peers 2 and 3 s, then 4 and 9 s."""
    ours, best, default = bench.SIDES["mlm"]
    return {
        ours: [(99.0, 9.0, 1e6), (1.0, 9.0, 2e6), (1.0, 9.0, 2e6)],
        best: [(99.0, 9.0, 1e6), (2.0, peer_loss, 4e6), (4.0, 9.0, 4e6)],
        default: [(99.0, 9.0, 1e6), (3.0, 9.0, 8e6), (9.0, 9.0, 8e6)],
        "matmul": [(99.0, 1e9, 0), (1.0, 1e9, 0), (0.5, 1e9, 0)],
    }


def test_ratios(monkeypatch, capsys):
    model = from_scratch("modernbert-tiny")
    batches = [bench.mlm_batch(model, 2, random.Random(i)) for i in range(3)]
    job = {"batches": batches, "dtype": "fp32"}
    monkeypatch.setattr(bench, "take_turns", lambda sides, job: turns(job, 9.0 + 1e-4))
    rows, sides = bench.compare("mlm", model, job)
    assert [row["ratio"] for row in rows] == [3.0, 6.0]  # medians of 2, 4 and of 3, 9
    assert [row["memory_ratio"] for row in rows] == [0.5, 0.25]
    tokens = sorted(sum(b["lengths"]) for b in batches[1:])
    assert rows[0]["ours"] == sum(tokens) / 2  # per second, the median of two
    flops = [bench.mlm_flops(model, b) for b in batches[1:]]
    assert sides["matmul"]["our_share"] == pytest.approx((flops[0] / 1e9 + flops[1] / 2e9) / 2)

    monkeypatch.setattr(bench, "take_turns", lambda sides, job: turns(job, 9.01))
    with pytest.raises(SystemExit, match="another loss"):
        bench.compare("mlm", model, job)


def test_flops_are_those_torch_counts():
    """All products of a step but attention's, which torch's counter does not know on the CPU."""
    # bf16: in fp32 the loss writes its products in place, which the counter does not see
    model = from_scratch("modernbert-tiny", out_dropout=0.0).bfloat16()
    batch = bench.mlm_batch(model, 2, random.Random(0))
    tokens, rows, targets = (torch.tensor(batch[key]) for key in bench.FIELDS)
    with FlopCounterMode(display=False) as counter:
        model(tokens, make_seqs(batch["lengths"]), rows, targets)[0].backward()
    counted = counter.get_total_flops()
    c = model.config
    attention = 0
    for n in batch["lengths"]:
        for i in range(c.n_layer):
            left, right = c.window_of(i)
            seen = n if left < 0 else min(n, left + right + 1)
            attention += n * 12 * c.n_head * c.head_dim * seen
    bias = 2 * len(batch["rows"]) * c.vocab_size  # its gradient, which bench.py leaves out
    assert counted - bias == bench.mlm_flops(model, batch) - attention
