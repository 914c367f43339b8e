"""bench.py: a tiny run of it, its arithmetic on made-up times, its count of operations.

    python -m pytest tests/test_bench.py
"""

import json
import os
import random
import subprocess
import sys

import bench
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import make_seqs
from model import from_scratch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_bench(name, out_dir, *more):
    command = [sys.executable, os.path.join(ROOT, "bench.py"), name, f"--out_dir={out_dir}"]
    command += ["--rounds=2", "--threads=1", *more]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    with open(os.path.join(out_dir, f"bench_{name}.json")) as f:
        return json.load(f)


TINY = [("mlm", "modernbert-tiny", 2), ("reconstruct", "llama-tiny", 2)]
SLOW = [("mntp", "llama-tiny", 1), ("contrastive", "modernbert-tiny", 3),
        ("encode", "modernbert-tiny", 20)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "n"), TINY + [pytest.param(*run, marks=pytest.mark.slow) for run in SLOW]
)
def test_tiny_run(name, size, n, tmp_path):
    """Real processes: the file's fields, and sides that computed the same results."""
    out = run_bench(name, tmp_path, f"--size={size}", f"--n={n}")
    cases = bench.BENCHES[name]
    assert [case["size"] for case in out["setting"]["cases"]] == [size] * len(cases)
    assert len(out["rows"]) == sum(len(case["sides"]) - 1 for case in cases)
    for row in out["rows"]:
        assert set(row) == {"name", "ours", "peer", "ratio", "memory_ratio"}
        assert row["peer"] > 0 and row["ratio"] > 0 and row["memory_ratio"] > 0
    for case in cases:
        numbers = out["sides"][f"{case['label']} fp32"]
        results = [numbers[side]["results"] for side in case["sides"]]
        for other in results:  # fresh weights, then, but for LoRA's, which are drawn, AdamW's
            assert other[0] == pytest.approx(results[0][0], abs=1e-3)
            assert case["rank"] or other == pytest.approx(results[0], abs=1e-3)
        assert name in ("encode", "contrastive") or 8 < results[0][0] < 12


@pytest.mark.slow
def test_memory(tmp_path):
    out = run_bench("memory", tmp_path, "--size=modernbert-tiny", "--n=8")
    assert [row["peer"] for row in out["rows"]] == [2 * n * 256 * 4 for n in (256, 1024, 4096)]
    assert [row["ours"] for row in out["rows"]][0] == 0


MLM = bench.BENCHES["mlm"][0] | {"n": 2}


def turns(peer_result):
    """Three rounds, the first to be left out: ours 1 s, the peers 2 and 3 s, then 4 and 9 s."""
    ours, best, default = MLM["sides"]
    return {
        ours: [(99.0, 9.0, 1e6), (1.0, 9.0, 2e6), (1.0, 9.0, 2e6)],
        best: [(99.0, peer_result, 1e6), (2.0, 9.0, 4e6), (4.0, 9.0, 4e6)],
        default: [(99.0, 9.0, 1e6), (3.0, 9.0, 8e6), (9.0, 9.0, 8e6)],
        "matmul": [(99.0, 1e9, 0), (1.0, 1e9, 0), (0.5, 1e9, 0)],
    }


def test_ratios(monkeypatch):
    model = from_scratch("modernbert-tiny")
    batches = [MLM["make"](model.config, 2, rng=random.Random(i)) for i in range(3)]
    job = {"batches": batches, "dtype": "fp32"}
    monkeypatch.setattr(bench, "take_turns", lambda sides, job: turns(9.0 + 1e-4))
    rows, sides = bench.compare(model, job, MLM)
    assert [row["ratio"] for row in rows] == [3.0, 6.0]  # medians of 2, 4 and of 3, 9
    assert [row["memory_ratio"] for row in rows] == [0.5, 0.25]
    tokens = sorted(sum(b["lengths"]) for b in batches[1:])
    assert rows[0]["ours"] == sum(tokens) / 2  # per second, the median of two
    flops = [bench.step_flops(model, b, MLM) for b in batches[1:]]
    assert sides["matmul"]["our_share"] == pytest.approx((flops[0] / 1e9 + flops[1] / 2e9) / 2)

    monkeypatch.setattr(bench, "take_turns", lambda sides, job: turns(9.01))
    with pytest.raises(SystemExit, match="another result"):
        bench.compare(model, job, MLM)


def test_flops_are_those_torch_counts():
    """All products of a step but attention's, which torch's counter does not know on the CPU."""
    # bf16: in fp32 the loss writes its products in place, which the counter does not see
    model = from_scratch("modernbert-tiny", out_dropout=0.0).bfloat16()
    batch = MLM["make"](model.config, 2, rng=random.Random(0))
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
    assert counted - bias == pytest.approx(bench.step_flops(model, batch, MLM) - attention)
