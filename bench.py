"""
Side by side with the peers: same weights, documents, precision and threads, in one run.

    python bench.py mlm                                # CPU, fp32; writes out/bench_mlm.json
    python bench.py mlm --dtype=both --rounds=20
    python bench.py mlm --device=cuda --dtype=bf16

Each side runs in a process of its own and they take turns, a step of ours, a step of each peer and
a plain matmul, so that whatever else the machine does meets all of them; ratios are medians over
the rounds. Memory is a process's peak less what it held before the model was loaded.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

import torch

from common import peak_memory
from data import make_seqs
from model import choose_backend, from_pretrained, from_scratch

SHORTEST, LONGEST, MASK_PROB, LEARNING_RATE = 16, 512, 0.3, 1e-3

# ---- sides ----
# A side is a generator. It yields when all is imported, when its model is loaded, and then what it
# has computed after each step. `job` is what main() made: see there.


def train(model, loss_of, job):
    """The step all training benches share: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    yield
    while True:
        with torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bf16"):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def mlm_ours(job):
    yield
    device, dtype = torch.device(job["device"]), getattr(torch, DTYPES[job["dtype"]])
    model = from_pretrained(job["folder"]).to(device).train()
    model.backend = choose_backend("auto", device, dtype)
    packed = (torch.tensor(job[key], device=device) for key in ("ids", "rows", "targets"))
    tokens, rows, targets = packed  # [T], [L], [L]
    seqs = make_seqs(job["lengths"], device)
    yield from train(model, lambda m: m(tokens, seqs, rows, targets)[0] / len(rows), job)


def mlm_transformers(job, **settings):
    from transformers import ModernBertForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield
    device = torch.device(job["device"])
    model = ModernBertForMaskedLM.from_pretrained(job["folder"], **settings).to(device).train()
    # what Hugging Face's collator makes: padded to the longest, -100 where nothing is to be told
    labels = torch.full((len(job["ids"]),), -100)  # [T]
    labels[job["rows"]] = torch.tensor(job["targets"])
    ones = torch.ones(len(labels), dtype=torch.int64)
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(x.split(job["lengths"]), True, fill).to(device)
        for name, x, fill in (  # each [T] -> [B, longest]
            ("input_ids", torch.tensor(job["ids"]), 0),
            ("attention_mask", ones, 0),
            ("labels", labels, -100),
        )
    }
    yield from train(model, lambda m: m(**batch).loss, job)


def mlm_transformers_best(job):
    yield from mlm_transformers(job, attn_implementation="sdpa", sparse_prediction=True)


def matmul(job):
    """What the machine can do at best: flops of large square products."""
    n, times = (2048, 4) if job["device"] == "cpu" else (8192, 16)
    yield
    x = torch.randn(n, n, dtype=getattr(torch, DTYPES[job["dtype"]]), device=job["device"])
    out = torch.empty_like(x)
    yield
    while True:
        for _ in range(times):
            torch.mm(x, x, out=out)
        yield 2 * n**3 * times


# our side first; the name of a peer is what the table says
SIDES = {
    "mlm": {
        "nanoembed": mlm_ours,
        "transformers, best setting": mlm_transformers_best,
        "transformers, default": mlm_transformers,
    },
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# of the losses, first step and last; bf16 rounds logits near 11 to steps of 1/16
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}

# ---- processes ----


def memory(device):
    """(bytes held now, most bytes so far): tensors on a GPU, else the process (Linux: resident)."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return (peak_memory(torch.device(device)),) * 2
    with open("/proc/self/status") as f:  # not ru_maxrss, which a child inherits from its parent
        status = dict(line.split(":", 1) for line in f)
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def serve(pipe, side, job):
    """A side's process: one step for each message, answered by (seconds, result, peak bytes)."""
    torch.set_num_threads(job["threads"])
    steps = side(job)
    next(steps)  # imports
    before, _ = memory(job["device"])
    next(steps)  # loads
    pipe.send("ready")
    while pipe.recv():
        begin = time.perf_counter()
        result = next(steps)
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - begin, result, memory(job["device"])[1] - before))


def take_turns(sides, job, rounds):
    """{name: [(seconds, result, peak bytes) of each round]}; round 0 warms up."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, job), daemon=True).start()
        theirs.close()  # so that a process that dies ends the wait for it
    for pipe in pipes.values():
        pipe.recv()
    out, names = {name: [] for name in sides}, list(sides)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # each side begins in turn
            pipes[name].send(True)
            out[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    return out


# ---- the benches ----


def mlm_job(model, n_docs):
    """Documents of random ids (speed does not depend on them) and the masked ones' true ids."""
    rng, vocab_size = random.Random(1337), model.config.vocab_size
    lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(n_docs)]
    true = [rng.randrange(5, vocab_size) for _ in range(sum(lengths))]
    rows = [i for i in range(len(true)) if rng.random() < MASK_PROB]
    ids, mask_id = list(true), 4
    for i in rows:
        ids[i] = mask_id
    return {"ids": ids, "lengths": lengths, "rows": rows, "targets": [true[i] for i in rows]}


def mlm_flops(model, job):
    """Of one training step: each token in the blocks, each label in the head."""
    c = model.config
    blocks = sum(n * model.flops_per_token(n) for n in job["lengths"])
    return blocks + 6 * len(job["rows"]) * (c.n_embd * c.vocab_size + c.n_embd**2)


JOBS = {"mlm": (mlm_job, mlm_flops)}


def cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def compare(name, model, job, rounds):
    """Run one precision, print its table -> (rows, {side: its numbers}, share of matmul peak)."""
    runs = take_turns(SIDES[name] | {"matmul": matmul}, job, rounds)
    timed = {side: run[1:] for side, run in runs.items()}
    peak_run, tokens = timed.pop("matmul"), sum(job["lengths"])
    ours, *peers = timed

    work = JOBS[name][1](model, job)
    share = statistics.median(
        (work / seconds) / (flops / peak_seconds)
        for (seconds, _, _), (peak_seconds, flops, _) in zip(timed[ours], peak_run, strict=True)
    )
    peak = statistics.median(flops / seconds for seconds, flops, _ in peak_run)
    sides, rows = {}, []
    print(f"\n{job['dtype']:27} {'tokens/s':>9} {'s/step':>7} {'memory':>9}   ours against it")
    for side, run in timed.items():
        seconds = statistics.median(s for s, _, _ in run)
        sides[side] = {
            "tokens_per_s": tokens / seconds, "seconds": seconds, "memory": run[-1][2],
            "first_loss": runs[side][0][1], "last_loss": run[-1][1],
        }  # fmt: skip
        line = f"{side:27} {tokens / seconds:9,.0f} {seconds:7.3f} {run[-1][2] / 1e6:6,.0f} MB"
        if side in peers:
            ratios = [b[0] / a[0] for a, b in zip(timed[ours], run, strict=True)]
            ratio, memory_ratio = statistics.median(ratios), timed[ours][-1][2] / run[-1][2]
            low, _, high = statistics.quantiles(ratios, n=4)
            line += f"   {ratio:.2f}x the speed (half of the rounds {low:.2f}-{high:.2f}), "
            line += f"{memory_ratio:.2f}x the memory"
            rows.append({
                "name": f"{name} {job['dtype']}: {side}", "ours": sides[ours]["tokens_per_s"],
                "peer": tokens / seconds, "ratio": ratio, "memory_ratio": memory_ratio,
            })  # fmt: skip
        print(line)
    print(f"our share of the matmul peak, {peak / 1e9:,.0f} Gflop/s: {share:.1%}")
    for side in peers:
        gaps = [abs(sides[side][k] - sides[ours][k]) for k in ("first_loss", "last_loss")]
        print(f"loss {sides[ours]['first_loss']:.4f} -> {sides[ours]['last_loss']:.4f}, "
              f"{side}: differs by {gaps[0]:.1e} -> {gaps[1]:.1e}")  # fmt: skip
        if not gaps[0] <= TOLERANCE[job["dtype"]]:
            raise SystemExit(f"{side} computed another loss than ours: this is no comparison")
    return rows, sides, {"flops_per_step": work, "peak_flops_per_s": peak, "share_of_peak": share}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(SIDES))
    parser.add_argument("--size", default="ettin-17m", help="a ModernBERT of model.SIZES")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "both"])
    parser.add_argument("--docs", type=int, default=16, help="documents of a batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out_dir", default="out")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for medians")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the processes to come

    torch.manual_seed(1337)
    model = from_scratch(args.size, out_dropout=0.0)
    job = JOBS[args.name][0](model, args.docs)
    n, longest = len(job["lengths"]), max(job["lengths"])
    setting = {
        "bench": args.name, "size": args.size, "documents": n, "lengths": job["lengths"],
        "tokens": sum(job["lengths"]), "padded_tokens": n * longest, "labels": len(job["rows"]),
        "vocab_size": model.config.vocab_size, "rounds": args.rounds, "threads": args.threads,
        "step": f"forward, loss, backward, AdamW (fused, lr {LEARNING_RATE}); no dropout",
        "precision": "bf16 is autocast over fp32 weights", "cpu": cpu_name(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__, "transformers": version("transformers"),
    }  # fmt: skip
    for key, value in setting.items():
        print(f"{key:13} {value:,}" if type(value) is int else f"{key:13} {value}")

    rows, sides, matmuls = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        job |= {"folder": folder, "threads": args.threads, "device": args.device}
        for dtype in ("fp32", "bf16") if args.dtype == "both" else (args.dtype,):
            job["dtype"] = dtype
            new, sides[dtype], matmuls[dtype] = compare(args.name, model, job, args.rounds)
            rows += new
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, f"bench_{args.name}.json")
    with open(path, "w") as f:
        out = {"setting": setting, "rows": rows, "sides": sides, "matmul": matmuls}
        json.dump(out, f, indent=1)
    print("\nwritten to", path)


if __name__ == "__main__":
    main()
