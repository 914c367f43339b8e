"""
Side by side with the peers: same weights, texts, precision and threads, in one run.

    python -m tools.bench mlm            # pretraining, against transformers
    python -m tools.bench mntp           # LoRA on a Llama, against transformers + peft
    python -m tools.bench contrastive    # plain and cached, against sentence-transformers
    python -m tools.bench encode         # texts -> vectors, against sentence-transformers
    python -m tools.bench reconstruct    # against four padded forwards of transformers
    python -m tools.bench memory         # of the gradient cache, as the batch grows
    python -m tools.bench mlm --dtype=both --rounds=20
    python -m tools.bench mlm --device=cuda --dtype=bf16

Each side runs in a process of its own and they take turns: a round is a step of ours, the same step
of each peer and a plain matmul, so that whatever else the machine does meets all of them. Each
round has a new batch. Ratios are medians over the rounds. Memory is a process's peak less what it
held before the model was loaded. The result is written to out/bench_<name>.json.
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
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

import common
import lora
import train_contrastive
import train_reconstruct
from attention import make_seqs
from embedder import Embedder
from formats.huggingface import from_pretrained, save_pretrained
from model import from_scratch
from tokenizer import Template, load_tokenizer

LEARNING_RATE, TEMPERATURE, WEIGHTS = 1e-3, 0.05, (0.8, 0.2)  # of d2q and q2d
FIELDS = ("ids", "rows", "targets")  # of a batch: [T], where the L labels are, what they are

# ---- sides ----
# A side is a generator. It yields when all is imported, when its model is loaded, and then what it
# has computed after each step. `job` is what main() made: see there.


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)


def half(job):
    return torch.autocast(job["device"], torch.bfloat16, enabled=job["dtype"] == "bf16")


def train(model, step_of, batches, job):
    """The step all training benches share: forward, loss, backward, AdamW."""
    optimizer = adamw(model)
    yield
    for batch in batches:
        with half(job):
            loss = step_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def our_model(job):
    device, dtype = torch.device(job["device"]), getattr(torch, DTYPES[job["dtype"]])
    model = from_pretrained(job["folder"]).to(device).train()
    model.set_backend("auto", device, dtype)
    return model


def labels_ours(job):
    """Packed rows with labels, by ours: masked language modelling and MNTP."""
    yield
    model, device, batches = our_model(job), job["device"], []
    if job["rank"]:
        lora.inject(model, job["rank"], 2 * job["rank"], 0.0, "all")
        model.to(device)
    for b in job["batches"]:
        tokens, rows, targets = (torch.tensor(b[k], device=device) for k in FIELDS)
        rows = rows - 1 if job["rank"] else rows  # MNTP: from the position before
        batches.append((tokens, make_seqs(b["lengths"], device), rows, targets))

    def loss_of(batch):
        return model(*batch)[0] / len(batch[2])  # the sum over the labels / their number

    yield from train(model, loss_of, batches, job)


def labels_transformers(job, **settings):
    """What Hugging Face's collator and model make of them: rows padded to the longest."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if job["rank"]:
        from peft import LoraConfig, get_peft_model
    yield
    device, batches = torch.device(job["device"]), []
    cls = AutoModelForCausalLM if job["rank"] else AutoModelForMaskedLM
    model = cls.from_pretrained(job["folder"], **settings).to(device).train()
    if job["rank"]:
        config = LoraConfig(
            r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0.0,
            target_modules="all-linear", task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(model, config)
    for b in job["batches"]:
        tokens = torch.tensor(b["ids"])  # [T]
        labels = torch.full_like(tokens, -100)
        labels[b["rows"]] = torch.tensor(b["targets"])  # a causal model's class shifts them itself
        flat = {"input_ids": (tokens, 0), "labels": (labels, -100)}
        flat["attention_mask"] = torch.ones_like(tokens), 0
        batches.append({
            name: pad_sequence(x.split(b["lengths"]), True, fill).to(device)  # [B, longest]
            for name, (x, fill) in flat.items()
        })  # fmt: skip
    yield from train(model, lambda batch: model(**batch).loss, batches, job)


BEST = {"attn_implementation": "sdpa", "sparse_prediction": True}


def our_embedder(job):
    dtype = getattr(torch, DTYPES[job["dtype"]])
    return Embedder(our_model(job), load_tokenizer(job["folder"]), max_length=256, dtype=dtype)


def contrastive_ours(job, device_batch_tokens=10**9, n=None):
    """n: the batch's texts in steps of n pairs."""
    yield
    embedder, C = our_embedder(job).train(), train_contrastive
    defaults = {k: v for k, v in vars(C).items() if type(v) in common.KINDS.values()}
    s = SimpleNamespace(**defaults | dict(
        rank=0, world_size=1, device=torch.device(job["device"]), autocast=partial(half, job),
        template=Template(), query_max_length=256, passage_max_length=256,
        temperature=TEMPERATURE, device_batch_tokens=device_batch_tokens,
    ))  # fmt: skip
    optimizer = adamw(embedder)
    yield
    for batch in job["batches"]:
        whole = list(zip(*batch["texts"], strict=True))
        for step in range(0, len(whole), n or len(whole)):
            pairs = [
                {"query": q, "known": [p], "passages": [p], "scores": None, "prompt": None}
                for q, p in whole[step : step + (n or len(whole))]
            ]
            loss, _ = C.cached_step(embedder, C.make_batch(pairs, 0, embedder.tokenizer, s), step, s)
            optimizer.step()
            optimizer.zero_grad()
        yield loss


def contrastive_st(job, cached=False, **settings):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield
    model = SentenceTransformer(job["st_folder"], device=job["device"]).train()
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    loss = getattr(losses, name)(model, scale=1 / TEMPERATURE, **settings)

    def loss_of(batch):
        texts = [model.preprocess(list(texts)) for texts in batch["texts"]]
        features = [{k: v.to(job["device"]) for k, v in x.items() if torch.is_tensor(v)}
                    for x in texts]  # fmt: skip
        return loss(features, None)

    yield from train(model, loss_of, job["batches"], job)


def encode_ours(job):
    yield
    embedder = our_embedder(job)
    yield
    for batch in job["batches"]:
        yield checksum(embedder.encode(batch["texts"][0]))


def encode_st(job, batch_size):
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield
    model = SentenceTransformer(job["st_folder"], device=job["device"])
    yield
    for batch in job["batches"]:
        with half(job):
            vectors = model.encode(
                batch["texts"][0], batch_size=batch_size, show_progress_bar=False
            )
        yield checksum(vectors)


def checksum(vectors):
    """One number that other vectors, or the same in another order, do not have. [N, C]"""
    probe = torch.randn(*vectors.shape, generator=torch.Generator().manual_seed(0))
    return float((torch.from_numpy(vectors) * probe).sum(1).square().mean())


def reconstruct_ours(job, n=8):
    """In micro-batches of n pairs, as the script accumulates: their sums are those of the batch."""
    yield
    model, device = train_reconstruct.Reconstruction(our_model(job)), torch.device(job["device"])
    optimizer, batches = adamw(model), []
    for b in job["batches"]:
        queries, documents = ([(ids, (0, len(ids))) for ids in side] for side in b["pairs"])
        parts = [queries[i : i + n] + documents[i : i + n] for i in range(0, len(queries), n)]
        packed = [train_reconstruct.pack_pairs(x, len(x) // 2).to(device) for x in parts]
        counts = torch.tensor([part.n_targets for part in packed], device=device).sum(0)
        weights = torch.tensor(WEIGHTS, device=device) / counts
        batches.append((packed, weights))
    yield
    for packed, weights in batches:
        total = 0.0
        for part in packed:
            with half(job):
                loss = (model(part)[0] * weights).sum()
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        yield total


def reconstruct_transformers(job):
    """Encode queries, encode documents, write queries, write documents: four padded forwards."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    yield
    device, batches = torch.device(job["device"]), []
    model = AutoModelForCausalLM.from_pretrained(job["folder"]).to(device).train()
    for b in job["batches"]:
        sides = []
        for side in b["pairs"]:
            ids = pad_sequence([torch.tensor(ids) for ids in side], True, 0)  # [B, longest]
            n = torch.tensor([len(ids) for ids in side])
            mask = (torch.arange(ids.size(1)) < n[:, None]).long()
            sides.append([x.to(device) for x in (ids, mask, n - 1)])
        batches.append(sides)

    def loss_of(sides):
        anchors = []
        for ids, mask, last in sides:
            hidden = model.model(ids, attention_mask=mask).last_hidden_state
            anchors.append(hidden[torch.arange(len(ids)), last])  # [B, C]
        loss = 0.0
        for weight, anchor, (ids, mask, _) in zip(WEIGHTS, anchors[::-1], sides, strict=True):
            embeds = torch.cat((anchor[:, None], model.get_input_embeddings()(ids)), 1)
            one = torch.ones_like(mask[:, :1])
            labels = torch.cat((-100 * one, ids.masked_fill(mask == 0, -100)), 1)
            mask = torch.cat((one, mask), 1)
            out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
            loss = loss + weight * out.loss
        return loss

    yield from train(model, loss_of, batches, job)


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


# ---- batches, and what they cost at least ----


def token_batch(config, n, lengths, labelled, rng):
    """Documents of random ids (speed does not depend on them), a share of them labelled and masked,
    never a document's first."""
    lengths = [rng.randint(*lengths) for _ in range(n)]
    ids = [rng.randrange(6, config.vocab_size) for _ in range(sum(lengths))]
    firsts = {sum(lengths[:i]) for i in range(n)}
    rows = [i for i in range(len(ids)) if i not in firsts and rng.random() < labelled]
    targets = [ids[i] for i in rows]
    for i in rows:
        ids[i] = 5  # the mask
    return {"ids": ids, "lengths": lengths, "rows": rows, "targets": targets}


def text_batch(config, n, lengths, sides, rng):
    """`sides` lists of n texts of random words, each word a token."""
    counts = [[rng.randint(*lengths) for _ in range(n)] for _ in range(sides)]
    words = range(2, config.vocab_size)
    texts = [[" ".join(f"w{i}" for i in rng.choices(words, k=k)) for k in side] for side in counts]
    return {"texts": texts, "lengths": [k for side in counts for k in side]}


def pair_batch(config, n, rng):
    """n queries of 8 to 64 and documents of 32 to 512 random ids: each is read and written."""
    pairs = [
        [[rng.randrange(6, config.vocab_size) for _ in range(rng.randint(*length))]
         for _ in range(n)]
        for length in ((8, 64), (32, 512))
    ]  # fmt: skip
    lengths = [len(ids) for side in pairs for ids in side]
    return {"pairs": pairs, "lengths": lengths + [n + 1 for n in lengths],
            "rows": range(sum(lengths))}  # fmt: skip


def step_flops(model, batch, case):
    """Of one step: each token in the blocks, each label in the head; `passes` in units of a forward
    (3: with its backward; 2: with frozen weights; 4: the cache's extra forward)."""
    c = model.config
    blocks = sum(n * model.flops_per_token(n) for n in batch["lengths"]) / 3
    labels = len(batch.get("rows", ()))
    dense = c.n_embd**2 if c.head == "dense" else 0
    return case["passes"] * (blocks + 2 * labels * (c.n_embd * c.vocab_size + dense))


# ---- the benches: cases, our side first; the name of a peer is what the table says ----

HF = "transformers"
ST = "sentence-transformers"


def labels_case(label, size, causal, rank, n, lengths, labelled, passes, peers):
    make = partial(token_batch, lengths=lengths, labelled=labelled)
    return dict(label=label, size=size, causal=causal, rank=rank, n=n, rounds=10, passes=passes,
                unit="tokens", make=make, sides={"nanoembed": labels_ours} | peers)  # fmt: skip


def mntp_case(label, lengths, n):
    peers = {"transformers + peft, all logits": labels_transformers}
    return labels_case(label, "llama-8x512", False, 16, n, lengths, 0.2, 2, peers)


def texts_case(label, n, rounds, passes, sides, unit="pairs", lengths=(16, 256)):
    make = partial(text_batch, lengths=lengths, sides=2 if unit == "pairs" else 1)
    return dict(label=label, size="ettin-17m", causal=False, rank=0, n=n, rounds=rounds,
                passes=passes, unit=unit, make=make, sides=sides)  # fmt: skip


BENCHES = {
    "mlm": [labels_case(
        "mlm", "ettin-17m", False, 0, 16, (16, 512), 0.3, 3,
        {f"{HF}, best setting": partial(labels_transformers, **BEST),
         f"{HF}, default": labels_transformers},
    )],
    "mntp": [
        mntp_case("mntp, chunks of 512", (512, 512), 8),
        mntp_case("mntp, 16 to 512 tokens", (16, 512), 16),
    ],
    "contrastive": [
        texts_case("contrastive", 64, 6, 3, {
            "nanoembed": contrastive_ours, f"{ST}, MNRL": contrastive_st}),
        texts_case("cached", 512, 2, 4, {
            "nanoembed, chunks of 4096": partial(contrastive_ours, device_batch_tokens=4096),
            **{f"{ST}, CachedMNRL {n}":
               partial(contrastive_st, cached=True, mini_batch_size=n) for n in (4, 16)}}),
    ],
    "encode": [texts_case("encode", 5000, 3, 1, {
        "nanoembed": encode_ours,
        **{f"{ST}, batches of {n}": partial(encode_st, batch_size=n) for n in (8, 16, 32)},
    }, "texts")],
    "reconstruct": [dict(
        label="reconstruct", size="llama-8x512", causal=True, rank=0, n=16, rounds=6, passes=3,
        unit="pairs", make=pair_batch,
        sides={"nanoembed, 2 micro-batches": reconstruct_ours,
               "transformers, four padded forwards": reconstruct_transformers},
    )],
    "memory": [texts_case("memory", 4096, 1, 4, {
        f"batch {n}": partial(contrastive_ours, device_batch_tokens=4096, n=n)
        for n in (256, 1024, 4096)}, lengths=(16, 64))],
}  # fmt: skip
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# of the first result, of fresh weights: a loss, or a checksum near 1
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}

# ---- processes ----


def memory(device):
    """(bytes held now, most bytes so far): tensors on a GPU, else the process (Linux: resident)."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return (common.peak_memory(torch.device(device)),) * 2
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


def cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def compare(model, job, case):
    """One case in one precision, its table printed -> (rows of the json, numbers of each side)."""
    try:
        runs = take_turns(case["sides"] | {"matmul": matmul}, job)
    except EOFError:
        raise SystemExit("a side's process has died: its error stands above") from None
    ours, *peers = case["sides"]
    results = {side: [result for _, result, _ in runs[side]] for side in case["sides"]}
    batches, runs = job["batches"][1:], {side: run[1:] for side, run in runs.items()}  # 0 warms up
    unit, sides, rows = case["unit"] + "_per_s", {}, []
    head = f"{case['label'] + ', ' + job['dtype']:37} {case['unit'] + '/s':>9} {'memory':>9}"
    print(f"\n{head}   ours against it")
    for side in (ours, *peers):
        speeds = [count(b, case) / r[0] for b, r in zip(batches, runs[side], strict=True)]
        sides[side] = {
            unit: statistics.median(speeds), "memory": runs[side][-1][2],
            "results": results[side],
        }  # fmt: skip
        line = f"{side:37} {sides[side][unit]:9,.4g} {runs[side][-1][2] / 1e6:6,.0f} MB"
        if side in peers:
            ratios = [theirs[0] / o[0] for o, theirs in zip(runs[ours], runs[side], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            memory_ratio = sides[ours]["memory"] / sides[side]["memory"]
            line += f"   {ratio:.2f}x the speed (half of the rounds {low:.2f}-{high:.2f}), "
            line += f"{memory_ratio:.2f}x the memory"
            rows.append({
                "name": f"{case['label']} {job['dtype']}: {side}", "ours": sides[ours][unit],
                "peer": sides[side][unit], "ratio": ratio, "memory_ratio": memory_ratio,
            })  # fmt: skip
        print(line)

    peaks = [flops / seconds for seconds, flops, _ in runs["matmul"]]
    reached = [step_flops(model, b, case) / r[0] for b, r in zip(batches, runs[ours], strict=True)]
    share = statistics.median(r / p for r, p in zip(reached, peaks, strict=True))
    sides["matmul"] = {"flops_per_s": statistics.median(peaks), "our_share": share}
    print(f"ours reaches {share:.0%} of a large matmul's {statistics.median(peaks):.3g} flop/s")
    for side in peers:
        gaps = [abs(a - b) for a, b in zip(results[ours], results[side], strict=True)]
        print(f"{side}: results differ by {gaps[0]:.1e} at first, at most by {max(gaps):.1e}")
        if not gaps[0] <= TOLERANCE[job["dtype"]]:
            raise SystemExit(f"{side} computed another result than ours: this is no comparison")
    return rows, sides


def count(batch, case):
    """What is counted of a batch: tokens, pairs or texts."""
    return sum(batch["lengths"]) if case["unit"] == "tokens" else case["n"]


def memory_growth(job, case):
    """Peak memory against the batch, of the same pairs in many or few steps -> rows: growth over
    the smallest batch as `ours`, the bytes of the cached vectors as `peer`, `memory_ratio` the peak
    over the smallest's."""
    runs = take_turns(case["sides"], job)
    sizes = [side.keywords["n"] for side in case["sides"].values()]
    peaks = [run[-1][2] for run in runs.values()]
    vectors = [2 * n * job["dim"] * 4 for n in sizes]  # a query and a passage each, fp32
    rows = []
    for name, n_bytes, peak in zip(runs, vectors, peaks, strict=True):
        grown = peak - peaks[0]
        print(f"{name:12} vectors {n_bytes / 1e6:5.1f} MB   peak {peak / 1e6:7,.0f} MB"
              f"   {grown / 1e6:+7,.0f} MB")  # fmt: skip
        rows.append({"name": name, "ours": grown, "peer": n_bytes, "ratio": grown / n_bytes,
                     "memory_ratio": peak / peaks[0]})  # fmt: skip
    return rows, {}


def fresh_model(size, causal):
    changes = {"out_dropout": 0.0, "causal": causal}
    if size == "llama-8x512":
        size, more = "llama-tiny", dict(n_layer=8, n_embd=512, n_head=8, n_hidden=1376)
        changes |= more | dict(vocab_size=32000, tied=False)
    names = ("pad", "bos", "eos", "cls", "sep")  # 0 to 4 here: theirs need a larger vocabulary
    return from_scratch(size, hf={f"{name}_token_id": i for i, name in enumerate(names)}, **changes)


def save_model(model, folder, texts):
    """The model's folder; with texts, a tokenizer of words and a sentence-transformers folder."""
    if texts:
        model.drop_head()
    save_pretrained(model, folder)
    if not texts:
        return
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    Embedder(model, tokenizer, max_length=256).save(os.path.join(folder, "st"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(BENCHES))
    parser.add_argument("--size", help="another shape: a name of model.SIZES")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "both"])
    parser.add_argument("--n", type=int, help="documents, pairs or texts of a batch")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out_dir", default="out")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error("--rounds: at least 2, for medians")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the processes to come

    packages = ("transformers", "peft", "sentence-transformers")
    setting = {
        "bench": args.name, "step": f"training: AdamW (fused, lr {LEARNING_RATE}); no dropout",
        "precision": f"{args.dtype}; bf16 is autocast over fp32 weights", "threads": args.threads,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "torch": torch.__version__, **{name: version(name) for name in packages}, "cases": [],
    }  # fmt: skip
    rows, sides = [], {}
    for case in BENCHES[args.name]:
        given = {"size": args.size, "n": args.n, "rounds": args.rounds}
        case = case | {key: value for key, value in given.items() if value}
        torch.manual_seed(1337)
        rng, model = random.Random(1337), fresh_model(case["size"], case["causal"])
        n_batches = 1 if args.name == "memory" else case["rounds"] + 1
        batches = [case["make"](model.config, case["n"], rng=rng) for _ in range(n_batches)]
        lengths = [n for b in batches for n in b["lengths"]]
        about = {
            "case": case["label"], "size": case["size"], "vocab_size": model.config.vocab_size,
            "batch": case["n"], "rounds": case["rounds"],
            "lengths": f"{min(lengths)} to {max(lengths)} tokens, uniform", "tokens": sum(lengths),
            "labels": sum(len(b.get("rows", ())) for b in batches),
        }  # fmt: skip
        setting["cases"].append(about)
        for key, value in (setting | about).items():
            if key != "cases":
                print(f"{key:21} {value:,}" if type(value) is int else f"{key:21} {value}")
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, folder, "texts" in batches[0])
            job = {"folder": folder, "batches": batches, "device": args.device,
                   "threads": args.threads, "rank": case["rank"], "dim": model.config.n_embd,
                   "st_folder": os.path.join(folder, "st")}  # fmt: skip
            for dtype in ("fp32", "bf16") if args.dtype == "both" else (args.dtype,):
                job["dtype"] = dtype
                if args.name == "memory":
                    new, numbers = memory_growth(job, case)
                else:
                    new, numbers = compare(model, job, case)
                rows += new
                sides[f"{case['label']} {dtype}"] = numbers
    os.makedirs(args.out_dir, exist_ok=True)
    path = os.path.join(args.out_dir, f"bench_{args.name}.json")
    with open(path, "w") as f:
        json.dump({"setting": setting, "rows": rows, "sides": sides}, f, indent=1)
    print("\nwritten to", path)


if __name__ == "__main__":
    main()
