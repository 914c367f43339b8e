"""
Side by side with the peers: same weights, documents, precision and threads, in one run.

    python bench.py mlm                                # CPU, fp32; writes out/bench_mlm.json
    python bench.py mlm --dtype=both --rounds=20
    python bench.py mlm --device=cuda --dtype=bf16

Each side runs in a process of its own and they take turns: a round is a step of ours, the same step
of each peer and a plain matmul, so that whatever else the machine does meets all of them. Each
round has a new batch. Ratios are medians over the rounds. Memory is a process's peak less what it
held before the model was loaded.
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
from torch.nn.utils.rnn import pad_sequence

from common import peak_memory
from data import make_seqs
from model import choose_backend, from_pretrained, from_scratch

SHORTEST, LONGEST, MASK_PROB, LEARNING_RATE = 16, 512, 0.3, 1e-3  # tokens of a document
FIELDS = ("ids", "rows", "targets")  # of a batch: [T], where the L labels are, what they are

# ---- sides ----
# A side is a generator. It yields when all is imported, when its model is loaded, and then what it
# has computed after each step. `job` is what main() made: see there.


def train(model, loss_of, batches, job):
    """The step all training benches share: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    yield
    for batch in batches:
        with torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bf16"):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def mlm_ours(job):
    yield
    device, dtype = torch.device(job["device"]), getattr(torch, DTYPES[job["dtype"]])
    model = from_pretrained(job["folder"]).to(device).train()
    model.backend = choose_backend("auto", device, dtype)
    batches = []
    for b in job["batches"]:
        tokens, rows, targets = (torch.tensor(b[k], device=device) for k in FIELDS)
        batches.append((tokens, make_seqs(b["lengths"], device), rows, targets))

    def loss_of(batch):
        return model(*batch)[0] / len(batch[2])  # the sum over the labels / their number

    yield from train(model, loss_of, batches, job)


def mlm_transformers(job, **settings):
    from transformers import ModernBertForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield
    device, batches = torch.device(job["device"]), []
    model = ModernBertForMaskedLM.from_pretrained(job["folder"], **settings).to(device).train()
    for b in job["batches"]:  # what Hugging Face's collator makes: padded to the longest
        tokens = torch.tensor(b["ids"])  # [T]
        labels = torch.full_like(tokens, -100)
        labels[b["rows"]] = torch.tensor(b["targets"])
        flat = {"input_ids": (tokens, 0), "labels": (labels, -100)}
        flat["attention_mask"] = torch.ones_like(tokens), 0
        batches.append({
            name: pad_sequence(x.split(b["lengths"]), True, fill).to(device)  # [B, longest]
            for name, (x, fill) in flat.items()
        })  # fmt: skip
    yield from train(model, lambda batch: model(**batch).loss, batches, job)


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
# of the first measured loss, near 11
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
    for _ in iter(pipe.recv, "end"):
        begin = time.perf_counter()
        result = next(steps)
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - begin, result, memory(job["device"])[1] - before))


def take_turns(sides, job):
    """{name: [(seconds, result, peak bytes) of each round]}, a round a batch."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, job), daemon=True).start()
        theirs.close()  # so that a process that dies ends the wait for it
    for pipe in pipes.values():
        pipe.recv()
    out, names = {name: [] for name in sides}, list(sides)
    for i in range(len(job["batches"])):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # each side begins in turn
            pipes[name].send("step")
            out[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send("end")
    return out


# ---- the benches ----


def mlm_batch(model, n_docs, rng):
    """Documents of random ids (speed does not depend on them), 30 % masked."""
    lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(n_docs)]
    ids = [rng.randrange(6, model.config.vocab_size) for _ in range(sum(lengths))]
    rows = [i for i in range(len(ids)) if rng.random() < MASK_PROB]
    targets = [ids[i] for i in rows]
    for i in rows:
        ids[i] = 5  # the mask
    return {"ids": ids, "lengths": lengths, "rows": rows, "targets": targets}


def mlm_flops(model, batch):
    """Of one training step: each token in the blocks, each label in the head."""
    c = model.config
    blocks = sum(n * model.flops_per_token(n) for n in batch["lengths"])
    return blocks + 6 * len(batch["rows"]) * (c.n_embd * c.vocab_size + c.n_embd**2)


WORK = {"mlm": (mlm_batch, mlm_flops)}


def cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def compare(name, model, job):
    """Run one precision, print its table -> (rows of the json, numbers of each side)."""
    try:
        runs = take_turns(SIDES[name] | {"matmul": matmul}, job)
    except EOFError:
        raise SystemExit("a side's process has died: its error stands above") from None
    batches, runs = job["batches"][1:], {side: run[1:] for side, run in runs.items()}  # 0 warms up
    ours, *peers = SIDES[name]
    sides, rows = {}, []
    print(f"\n{job['dtype']:27} {'tokens/s':>9} {'memory':>9}   ours against it")
    for side in (ours, *peers):
        speeds = [sum(b["lengths"]) / r[0] for b, r in zip(batches, runs[side], strict=True)]
        sides[side] = {
            "tokens_per_s": statistics.median(speeds), "memory": runs[side][-1][2],
            "losses": [loss for _, loss, _ in runs[side]],
        }  # fmt: skip
        line = f"{side:27} {sides[side]['tokens_per_s']:9,.0f} {runs[side][-1][2] / 1e6:6,.0f} MB"
        if side in peers:
            ratios = [theirs[0] / o[0] for o, theirs in zip(runs[ours], runs[side], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            memory_ratio = sides[ours]["memory"] / sides[side]["memory"]
            line += f"   {ratio:.2f}x the speed (half of the rounds {low:.2f}-{high:.2f}), "
            line += f"{memory_ratio:.2f}x the memory"
            rows.append({
                "name": f"{name} {job['dtype']}: {side}", "ours": sides[ours]["tokens_per_s"],
                "peer": sides[side]["tokens_per_s"], "ratio": ratio, "memory_ratio": memory_ratio,
            })  # fmt: skip
        print(line)

    peaks = [flops / seconds for seconds, flops, _ in runs["matmul"]]
    reached = [WORK[name][1](model, b) / r[0] for b, r in zip(batches, runs[ours], strict=True)]
    share = statistics.median(r / p for r, p in zip(reached, peaks, strict=True))
    sides["matmul"] = {"flops_per_s": statistics.median(peaks), "our_share": share}
    print(f"ours reaches {share:.0%} of a large matmul's {statistics.median(peaks):.3g} flop/s")
    for side in peers:
        pairs = zip(sides[ours]["losses"], sides[side]["losses"], strict=True)
        gaps = [abs(a - b) for a, b in pairs]
        print(f"{side}: losses differ by {gaps[0]:.1e} at first, at most by {max(gaps):.1e}")
        if not gaps[0] <= TOLERANCE[job["dtype"]]:
            raise SystemExit(f"{side} computed another loss than ours: this is no comparison")
    return rows, sides


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
    names = ("pad", "bos", "eos", "cls", "sep")  # 0 to 4 here: theirs need a larger vocabulary
    ids = {f"{name}_token_id": i for i, name in enumerate(names)}
    model = from_scratch(args.size, out_dropout=0.0, hf=ids)
    rng = random.Random(1337)
    batches = [WORK[args.name][0](model, args.docs, rng) for _ in range(args.rounds + 1)]
    setting = {
        "bench": args.name, "size": args.size, "vocab_size": model.config.vocab_size,
        "documents": f"{args.docs} a batch, {SHORTEST} to {LONGEST} tokens, uniform",
        "tokens": sum(sum(b["lengths"]) for b in batches[1:]),
        "padded_tokens": sum(args.docs * max(b["lengths"]) for b in batches[1:]),
        "labels": sum(len(b["rows"]) for b in batches[1:]), "rounds": args.rounds,
        "step": f"forward, loss, backward, AdamW (fused, lr {LEARNING_RATE}); no dropout",
        "precision": f"{args.dtype}; bf16 is autocast over fp32 weights", "threads": args.threads,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "torch": torch.__version__, "transformers": version("transformers"),
    }  # fmt: skip
    for key, value in setting.items():
        print(f"{key:13} {value:,}" if type(value) is int else f"{key:13} {value}")

    rows, sides = [], {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        job = {"folder": folder, "batches": batches, "device": args.device, "threads": args.threads}
        for dtype in ("fp32", "bf16") if args.dtype == "both" else (args.dtype,):
            new, sides[dtype] = compare(args.name, model, job | {"dtype": dtype})
            rows += new
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, f"bench_{args.name}.json")
    with open(path, "w") as f:
        json.dump({"setting": setting, "rows": rows, "sides": sides}, f, indent=1)
    print("\nwritten to", path)


if __name__ == "__main__":
    main()
