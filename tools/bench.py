"""
Side by side with the peers: same weights, texts, precision and threads, in one run.

    python -m tools.bench mlm            # pretraining, against transformers
    python -m tools.bench mntp           # LoRA on a Llama, against transformers + peft
    python -m tools.bench contrastive    # plain and cached, against sentence-transformers
    python -m tools.bench encode         # texts -> vectors, against sentence-transformers
    python -m tools.bench reconstruct    # against four padded forwards of transformers
    python -m tools.bench memory         # of the gradient cache, as the batch grows
    python -m tools.bench real           # the demo's run, LoRA on SmolLM2, against theirs with peft
    python -m tools.bench real_encode    # encode, of SmolLM2
    python -m tools.bench mlm --device=cuda --dtype=both --rounds=20

Each side runs in a process of its own and they take turns: a round is a step of ours, the same step
of each peer and a plain matmul, so that whatever else the machine does meets all of them. Each
round has a new batch. Ratios are medians over the rounds. Memory is a process's peak less what it
held before the model was loaded. The result is written to out/bench_<name>.json.
"""

import argparse
import ctypes
import multiprocessing
import os
import platform
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

import common
import lora
import optim
import train_contrastive
import train_reconstruct
from attention import make_seqs
from data import open_pairs, read_pair
from embedder import Embedder
from formats import write_json
from formats.huggingface import from_pretrained, save_pretrained
from metrics import ranked
from model import from_scratch
from tokenizer import load_tokenizer

LEARNING_RATE = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# how far the first results, of fresh weights, may be apart: losses, or checksums near 1
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
WEIGHTS = train_reconstruct.w_d2q, train_reconstruct.w_q2d
LLAMA = "llama-8x512"
LLAMA_SHAPE = dict(n_layer=8, n_embd=512, n_head=8, n_hidden=1376, vocab_size=32000, tied=False)
# `real`: the run of this config, on pairs of data/pydocs. What is declared beforehand: after it
# the two sides' nDCG@10 on the test pairs is within this many points.
CONFIG, DATA, MARGIN = "configs/contrastive_smollm2_pydocs.py", "data/pydocs", 1.0
NO_LABEL = -100  # what transformers calls a position that no loss looks at


@dataclass
class Batch:
    inputs: list  # the ids and the labels of each text, or the texts or ids of each side
    lengths: list[int]  # of all texts that go through the blocks
    n_labels: int = 0  # how many tokens the head predicts


# ---- sides ----
# A side is a generator. It yields when all is imported, and then what it has computed after each
# step; the first loads its model. `job`: the model's folder, the batches, device, dtype, threads.


def half(job):
    return torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16")


def backward(loss_of, job):
    """-> a function of a batch: forward, loss and backward -> the loss."""

    def step(batch):
        with half(job):
            loss = loss_of(batch)
        loss.backward()
        return loss.item()

    return step


def train(model, step, job):
    """What all training benches do: `step`, which makes gradients, of each batch, then AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    for batch in job.batches:
        loss = step(batch)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def our_model(job):
    model = from_pretrained(job.folder).to(job.device).train()
    model.set_backend("auto", torch.device(job.device), DTYPES[job.dtype])
    return model


def labels_ours(job, rank=0):
    """Packed rows with labels, by ours: masked language modelling, and with a rank MNTP."""
    yield
    model = our_model(job)
    if rank:
        lora.inject(model, rank, 2 * rank, 0.0, "all")

    def loss_of(batch):
        tokens, labels = (torch.tensor(np.concatenate(x)).to(job.device) for x in batch.inputs)
        rows = (labels != NO_LABEL).nonzero()[:, 0]  # [L]
        before = rows - min(rank, 1)  # MNTP predicts from the position before
        seqs = make_seqs(batch.lengths, job.device)
        return model(tokens, seqs, before, labels[rows])[0] / len(rows)  # a mean

    yield from train(model, backward(loss_of, job), job)


def padded(rows, fill, job):
    """-> [B, longest]"""
    return pad_sequence([torch.from_numpy(row) for row in rows], True, fill).to(job.device)


def labels_transformers(job, rank=0, best=False):
    """What Hugging Face's collator and model make of them: rows padded to the longest."""
    if rank:
        from peft import LoraConfig, get_peft_model
    yield
    cls = AutoModelForCausalLM if rank else AutoModelForMaskedLM
    settings = {"attn_implementation": "sdpa", "sparse_prediction": True} if best else {}
    model = cls.from_pretrained(job.folder, **settings).to(job.device).train()
    if rank:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(model, config)

    def loss_of(batch):
        ids, labels = map(padded, batch.inputs, (0, NO_LABEL), (job, job))
        return model(input_ids=ids, labels=labels, attention_mask=(ids > 0).long()).loss

    yield from train(model, backward(loss_of, job), job)


def our_embedder(job):
    tokenizer, dtype = load_tokenizer(job.folder), DTYPES[job.dtype]
    return Embedder(our_model(job), tokenizer, max_length=job.max_length, dtype=dtype)


def our_step(embedder, job, keys):
    """-> a function of a Batch of texts: the script's loss and gradients."""
    s = SimpleNamespace(**keys | dict(
        rank=0, world_size=1, device=embedder.device, autocast=partial(half, job),
        template=embedder.template,
    ))  # fmt: skip

    def step(batch):
        pairs = [
            {"query": query, "known": [text], "passages": [text], "scores": None, "prompt": None}
            for query, text in zip(*batch.inputs)
        ]
        packed = train_contrastive.make_batch(pairs, 0, embedder.tokenizer, s)
        return train_contrastive.cached_step(embedder, packed, 0, s)[0]

    return step


def contrastive_ours(job, device_batch_tokens=10**9):
    yield
    embedder = our_embedder(job).train()
    # what the script has at its top
    keys = vars(train_contrastive) | {"device_batch_tokens": device_batch_tokens}
    yield from train(embedder, our_step(embedder, job, keys), job)


def contrastive_st(job, mini_batch_size=None):
    """mini_batch_size: of its gradient cache; None: without it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import batch_to_device

    yield
    model = SentenceTransformer(job.folder, device=job.device).train()
    scale = 1 / train_contrastive.temperature
    if mini_batch_size:
        cached = losses.CachedMultipleNegativesRankingLoss
        loss = cached(model, scale, mini_batch_size=mini_batch_size)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale)

    def loss_of(batch):
        features = [batch_to_device(model.preprocess(x), job.device) for x in batch.inputs]
        return loss(features, None)

    yield from train(model, backward(loss_of, job), job)


def real_settings(job):
    """The keys of the script, by CONFIG. Theirs has one length for queries and passages."""
    changes = {"query_max_length": job.max_length, "passage_max_length": job.max_length}
    changes |= {"max_steps": len(job.batches) - 1, "stop_step": None}
    return SimpleNamespace(**vars(train_contrastive) | job.config | changes)


def train_real(model, step, encode, job):
    """The config's optimizer and schedule for both; the last batch is the test: its nDCG@10."""
    s, trained = real_settings(job), [p for p in model.parameters() if p.requires_grad]
    optim.set_lengths(s, 1, 1)
    settings = dict(lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=s.adam_eps)
    optimizer = torch.optim.AdamW(trained, **settings, weight_decay=s.weight_decay, fused=True)
    for i, batch in enumerate(job.batches[:-1]):
        loss = step(batch)
        torch.nn.utils.clip_grad_norm_(trained, s.grad_clip)
        optimizer.param_groups[0]["lr"] = optim.learning_rate_at(i, s)
        optimizer.step()
        optimizer.zero_grad()
        if sys.platform == "linux":  # gives back what the step needed, for the other side's turn
            ctypes.CDLL(None).malloc_trim(0)
        yield loss
    queries, passages = map(encode, job.batches[-1].inputs)
    order = np.argsort(-queries @ passages.T, axis=1, kind="stable")[:, :10]
    yield 100 * np.mean([ranked(top, [i])["ndcg"] for i, top in enumerate(order)])


def real_ours(job):
    yield
    s = real_settings(job)
    model = from_pretrained(job.folder, dtype=DTYPES[job.dtype]).to(job.device)
    lora.inject(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets)
    model.train().set_backend("auto", torch.device(job.device), DTYPES[job.dtype])
    tokenizer = load_tokenizer(job.folder)
    embedder = Embedder(model, tokenizer, max_length=job.max_length, dtype=DTYPES[job.dtype])
    yield from train_real(embedder, our_step(embedder, job, vars(s)), embedder.encode, job)


def real_st(job):
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import batch_to_device

    yield
    s, kind = real_settings(job), {"dtype": DTYPES[job.dtype]}  # frozen, as ours are
    model = SentenceTransformer(job.folder, device=job.device, model_kwargs=kind).train()
    model.add_adapter(LoraConfig(
        r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout,
        target_modules=r".*\.(self_attn|mlp)\.\w+_proj"))  # fmt: skip
    for p in model.parameters():  # what trains is fp32, as ours is
        p.data = p.data.float() if p.requires_grad else p.data
    symmetric = losses.MultipleNegativesSymmetricRankingLoss
    kind = symmetric if s.both_directions else losses.MultipleNegativesRankingLoss
    loss = kind(model, 1 / s.temperature)

    def loss_of(batch):
        features = [batch_to_device(model.preprocess(x), job.device) for x in batch.inputs]
        return loss(features, None)

    def encode(texts):
        with half(job):
            return model.encode(texts, show_progress_bar=False)

    yield from train_real(model, backward(loss_of, job), encode, job)


def encode_ours(job):
    yield
    embedder = our_embedder(job)
    for batch in job.batches:
        yield checksum(embedder.encode(batch.inputs[0]))


def encode_st(job, batch_size):
    from sentence_transformers import SentenceTransformer

    yield
    model = SentenceTransformer(job.folder, device=job.device)
    for batch in job.batches:
        with half(job):
            vectors = model.encode(batch.inputs[0], batch_size=batch_size, show_progress_bar=False)
        yield checksum(vectors)


def checksum(vectors):
    """One number that other vectors, or the same in another order, do not have. [N, C]"""
    probe = np.random.default_rng(0).standard_normal(vectors.shape)
    return float(np.square((vectors * probe).sum(1)).mean())


def reconstruct_ours(job):
    """In micro-batches of 8 pairs, as the script accumulates: their sums are those of the batch."""
    yield
    model = train_reconstruct.Reconstruction(our_model(job))

    def step(batch):
        sides = [[(ids, (0, len(ids))) for ids in side] for side in batch.inputs]
        counts = torch.tensor([sum(map(len, side)) for side in batch.inputs])  # of targets
        weights, total = (torch.tensor(WEIGHTS) / counts).to(job.device), 0.0
        backward_of = backward(lambda part: (model(part)[0] * weights).sum(), job)
        for i in range(0, len(sides[0]), 8):
            queries, documents = (side[i : i + 8] for side in sides)
            part = train_reconstruct.pack_pairs(queries + documents, len(queries))
            total += backward_of(part.to(job.device))
        return total

    yield from train(model, step, job)


def reconstruct_transformers(job):
    """Encode queries, encode documents, write queries, write documents: four padded forwards."""
    yield
    model = AutoModelForCausalLM.from_pretrained(job.folder).to(job.device).train()

    def loss_of(batch):
        sides = [padded(side, 0, job) for side in batch.inputs]
        anchors, loss = [], 0.0
        for ids in sides:
            mask = (ids > 0).long()
            hidden = model.model(ids, attention_mask=mask).last_hidden_state
            anchors.append(hidden[torch.arange(len(ids)), mask.sum(1) - 1])  # [B, C]
        for weight, anchor, ids in zip(WEIGHTS, anchors[::-1], sides):
            embeds = torch.cat((anchor[:, None], model.get_input_embeddings()(ids)), 1)
            labels = torch.nn.functional.pad(ids, (1, 0), value=NO_LABEL)  # [B, 1 + longest]
            mask = (labels != 0).long()
            labels = labels.masked_fill(labels == 0, NO_LABEL)
            out = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
            loss = loss + weight * out.loss
        return loss

    yield from train(model, backward(loss_of, job), job)


def matmul(job):
    """What the machine can do at best: flops of large square products."""
    yield
    n = 2048 if job.device == "cpu" else 8192
    x = torch.randn(n, n, dtype=DTYPES[job.dtype], device=job.device)
    while True:
        for _ in range(4):
            torch.mm(x, x)
        yield 4 * 2 * n**3


# ---- batches, and what they cost at least ----


def random_ids(vocab_size, n, rng, lengths):
    """n texts of random ids: speed does not depend on them. 0 to 4 are special, 5 is the mask."""
    lengths = rng.integers(*lengths, n, endpoint=True)
    return [rng.integers(6, vocab_size, length) for length in lengths]


def token_batch(vocab_size, n, rng, lengths, labelled):
    """n texts, a share of whose tokens is labelled and masked, never the first one."""
    texts, labels = random_ids(vocab_size, n, rng, lengths), []
    for ids in texts:
        chosen = rng.random(len(ids)) < labelled
        chosen[0] = False
        labels.append(np.where(chosen, ids, NO_LABEL))
        ids[chosen] = 5
    rows = np.flatnonzero(np.concatenate(labels) != NO_LABEL)
    return Batch([texts, labels], list(map(len, texts)), len(rows))


def text_batch(vocab_size, n, rng, lengths, sides):
    """`sides` lists of n texts of random words, each word a token."""
    ids = [random_ids(vocab_size, n, rng, lengths) for _ in range(sides)]
    texts = [[" ".join(f"w{i}" for i in text) for text in side] for side in ids]
    return Batch(texts, list(map(len, sum(ids, []))))


def real_batches(case, folder, rng):
    """rounds + 1 batches of pairs of DATA/train.jsonl, no text twice in one, then those of
    test.jsonl; for encode the training passages alone."""
    train, test = (open_pairs(f"{DATA}/{split}.jsonl") for split in ("train", "test"))
    batches, tokenizer = [], load_tokenizer(folder)
    for _ in range(case.rounds + 1):
        pairs = {}  # passage: query
        for i in rng.permutation(len(train)):
            pair = read_pair(train, i)
            if len(pairs) < case.n and pair["query"] not in pairs.values():
                pairs.setdefault(pair["pos"][0], pair["query"])
        batches.append([list(pairs.values()), list(pairs)])
    tests = [read_pair(test, i) for i in range(len(test))]
    batches.append([[p["query"] for p in tests], [p["pos"][0] for p in tests]])
    if case.unit == "texts":
        batches = [[passages] for _, passages in batches[:-1]]
    cut = dict(truncation=True, max_length=case.max_length)
    return [Batch(texts, list(map(len, tokenizer(sum(texts, []), **cut)["input_ids"])))
            for texts in batches]  # fmt: skip


def pair_batch(vocab_size, n, rng):
    """n queries of 8 to 64 and documents of 32 to 512 ids: each is read and written."""
    sides = [random_ids(vocab_size, n, rng, lengths) for lengths in ((8, 64), (32, 512))]
    lengths = list(map(len, sum(sides, [])))
    return Batch(sides, lengths + [length + 1 for length in lengths], sum(lengths))


def step_flops(model, batch, passes):
    """Of one step: each token in the blocks, each label in the head."""
    c = model.config
    blocks = sum(n * model.flops_per_token(n) for n in batch.lengths) / 3
    dense = c.n_embd**2 * (c.head == "dense")
    return passes * (blocks + 2 * batch.n_labels * (c.n_embd * c.vocab_size + dense))


# ---- the benches ----


@dataclass
class Case:
    label: str
    n: int  # documents, pairs or texts of a batch
    rounds: int
    unit: str  # what is counted of a batch: tokens, pairs or texts
    passes: int  # of a step, in forwards (backward: 2, of frozen weights 1; the cache: 1)
    make: Callable | None  # (vocab_size, n, rng) -> Batch; None: see real_batches
    sides: dict  # ours first; a peer's name is what the table says
    changes: dict  # fields of ModelConfig
    size: str = "ettin-17m"
    max_length: int = 256  # tokens of a text


def texts_case(label, n, rounds, passes, sides, unit="pairs", lengths=(16, 256)):
    make = partial(text_batch, lengths=lengths, sides=2 if unit == "pairs" else 1)
    changes = {"causal": False, "head": "none"}
    return Case(label, n, rounds, unit, passes, make, sides, changes)


CHUNKS = {"nanoembed, chunks of 4096": partial(contrastive_ours, device_batch_tokens=4096)}
ST = "sentence-transformers"
ENCODE = {"nanoembed": encode_ours} | {
    f"{ST}, batches of {n}": partial(encode_st, batch_size=n) for n in (8, 16, 32)}  # fmt: skip
SMOLLM2 = "models/SmolLM2-135M-Instruct"
BENCHES = {
    "mlm": [Case(
        "mlm", 16, 10, "tokens", 3, partial(token_batch, lengths=(16, 512), labelled=0.3),
        {"nanoembed": labels_ours,
         "transformers, best setting": partial(labels_transformers, best=True),
         "transformers, default": labels_transformers}, {})],
    "mntp": [Case(
        label, n, 10, "tokens", 2, partial(token_batch, lengths=lengths, labelled=0.2),
        {"nanoembed": partial(labels_ours, rank=16),
         "transformers + peft, all logits": partial(labels_transformers, rank=16)},
        {"causal": False}, LLAMA) for label, n, lengths in (("mntp, chunks of 512", 8, (512, 512)),
                                ("mntp, 16 to 512 tokens", 16, (16, 512)))],
    "contrastive": [
        texts_case("contrastive", 64, 6, 3, {
            "nanoembed": contrastive_ours, f"{ST}, MNRL": contrastive_st}),
        texts_case("cached", 512, 2, 4, CHUNKS | {
            f"{ST}, CachedMNRL {n}": partial(contrastive_st, mini_batch_size=n) for n in (4, 16)}),
    ],
    "encode": [texts_case("encode", 5000, 3, 1, ENCODE, "texts")],
    "real": [
        Case("real", 64, 40, "pairs", 2, None, {
            "nanoembed": real_ours, f"{ST} + peft": real_st}, {}, SMOLLM2, 96),
    ],
    "real_encode": [Case("real_encode", 1000, 3, "texts", 1, None, ENCODE, {}, SMOLLM2)],
    "reconstruct": [Case(
        "reconstruct", 16, 6, "pairs", 3, pair_batch,
        {"nanoembed, 2 micro-batches": reconstruct_ours,
         "transformers, four padded forwards": reconstruct_transformers}, {}, LLAMA)],
    "memory": [texts_case("memory", 4096, 0, 4, CHUNKS, lengths=(16, 64))],
}  # fmt: skip

# ---- processes ----


def memory(device):
    """(bytes held now, most bytes so far): tensors on a GPU, else the process (Linux: resident)."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return (common.peak_memory(torch.device(device)),) * 2
    status = Path("/proc/self/status").read_text()  # ru_maxrss is inherited from the parent
    return tuple(1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "VmHWM"))


def serve(pipe, side, job):
    """A side's process: one step for each message, answered by (seconds, result, peak bytes)."""
    torch.set_num_threads(job.threads)
    steps = side(job)
    next(steps)  # imports
    before = memory(job.device)[0]
    for _ in iter(pipe.recv, "end"):
        begin = time.perf_counter()
        result = next(steps)
        if job.device == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - begin, result, memory(job.device)[1] - before))


def take_turns(sides, job):
    """-> {name: [(seconds, result, peak bytes) of each round]}, a round a batch."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, side in sides.items():
        pipes[name], end = context.Pipe()
        context.Process(target=serve, args=(end, side, job), daemon=True).start()
        end.close()  # so that a process that dies ends the wait for it
    turns, names = {name: [] for name in sides}, list(sides)
    for _ in tqdm(job.batches, desc="rounds", unit=""):
        for name in names:
            pipes[name].send("step")
            turns[name].append(pipes[name].recv())
        names.append(names.pop(0))  # each side begins in turn
    for pipe in pipes.values():
        pipe.send("end")
    return turns


def compare(model, job, case, turns=None):
    """One case in one precision, its table printed -> (rows of the json, numbers of each side)."""
    turns = turns or take_turns(case.sides | {"matmul": matmul}, job)
    turns = {side: np.transpose(rounds) for side, rounds in turns.items()}  # [3, rounds] each
    seconds = {side: rounds[0, 1:] for side, rounds in turns.items()}  # the first warms up
    results = {side: rounds[1] for side, rounds in turns.items()}
    batches = job.batches[1:]
    counts = [sum(b.lengths) if case.unit == "tokens" else case.n for b in batches]
    print(f"\n{case.label + ', ' + job.dtype:37} {case.unit + '/s':>9}    memory   ours against it")
    unit, rows, sides = f"{case.unit}_per_s", [], {}
    ours, *peers = case.sides
    for side in case.sides:
        speed, peak = np.median(counts / seconds[side]), turns[side][2, -1]
        sides[side] = {unit: speed, "memory": peak, "results": results[side].tolist()}
        line = f"{side:37} {speed:9,.4g} {peak / 1e6:6,.0f} MB"
        if side in peers:
            low, ratio, high = np.quantile(seconds[side] / seconds[ours], (0.25, 0.5, 0.75))
            memory_ratio = sides[ours]["memory"] / peak
            line += (f"   {ratio:.2f}x the speed (half of the rounds {low:.2f}-{high:.2f}), "
                     f"{memory_ratio:.2f}x the memory")  # fmt: skip
            rows.append({"name": f"{case.label} {job.dtype}: {side}", "ours": sides[ours][unit],
                         "peer": speed, "ratio": ratio, "memory_ratio": memory_ratio})  # fmt: skip
        print(line)

    peaks = results["matmul"][1:] / seconds["matmul"]
    flops = [step_flops(model, batch, case.passes) for batch in batches]
    peak, share = np.median(peaks), np.median(flops / seconds[ours] / peaks)
    sides["matmul"] = {"flops_per_s": peak, "our_share": share}
    print(f"ours reaches {share:.0%} of a large matmul's {peak:.3g} flop/s")
    for side in peers:
        gaps = abs(results[ours] - results[side])
        print(f"{side}: results differ by {gaps[0]:.1e} at first, at most by {max(gaps):.1e}")
        if not gaps[0] <= TOLERANCE[job.dtype]:
            raise SystemExit(f"{side} computed another result than ours: this is no comparison")
    return rows, sides


def compare_real(model, job, case):
    """`compare` of a whole training, and the scores after it, which the last round gives."""
    turns = take_turns(case.sides | {"matmul": matmul}, job)
    ours, peer = scores = [turns[side][-1][1] for side in case.sides]
    job.batches, turns = job.batches[:-1], {side: rounds[:-1] for side, rounds in turns.items()}
    rows, sides = compare(model, job, case, turns)
    for side, score in zip(case.sides, scores):
        sides[side]["ndcg"] = score
    verdict = "within" if abs(ours - peer) <= MARGIN else "NOT within"
    print(f"nDCG@10 on the test pairs: {ours:.2f}, theirs {peer:.2f}: {verdict} {MARGIN} of it")
    return rows, sides


def memory_growth(model, job, case):
    """Peak memory of the same pairs in many or few steps -> (rows, {}): `ours` is what it is above
    the smallest batch's, and `memory_ratio` their ratio, `peer` the bytes of the cached vectors."""
    batches, rows, smallest = job.batches, [], None
    for n in (256, 1024, 4096):
        job.batches = [Batch([side[i : i + n] for side in batch.inputs], [])
                       for batch in batches for i in range(0, case.n, n)]  # fmt: skip
        [turns] = take_turns(case.sides, job).values()
        peak = max(peak for _, _, peak in turns)
        smallest = smallest or peak
        grown, vectors = peak - smallest, 2 * n * model.config.n_embd * 4  # fp32, of both sides
        print(f"batch {n:<6} vectors {vectors / 1e6:5.1f} MB   peak {peak / 1e6:7,.0f} MB"
              f"   {grown / 1e6:+7,.0f} MB")  # fmt: skip
        rows.append({"name": f"batch {n}", "ours": grown, "peer": vectors,
                     "ratio": grown / vectors, "memory_ratio": peak / smallest})  # fmt: skip
    return rows, {}


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # Linux
    names = re.findall("model name.*: (.*)", info.read_text() if info.exists() else "")
    return [*names, platform.processor() or platform.machine()][0]


def make_model(case, folder):
    """Fresh weights, saved; without a head for sentence-transformers, too, each word a token. Or a
    folder's weights, as a bidirectional embedder with mean pooling."""
    if not case.make:
        model = from_pretrained(case.size, "bidirectional")
        model.drop_head()
        Embedder(model, load_tokenizer(case.size), max_length=case.max_length).save(folder)
        return model
    names = ("pad", "bos", "eos", "cls", "sep")  # 0 to 4 here: theirs need a larger vocabulary
    hf = {f"{name}_token_id": i for i, name in enumerate(names)}
    size, shape = ("llama-tiny", LLAMA_SHAPE) if case.size == LLAMA else (case.size, {})
    model = from_scratch(size, out_dropout=0.0, hf=hf, **case.changes, **shape)
    if model.config.head == "none":
        words = {"[PAD]": 0} | {f"w{i}": i for i in range(1, model.config.vocab_size)}
        backend = Tokenizer(models.WordLevel(words, "[PAD]"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
        Embedder(model, tokenizer, max_length=256).save(folder)
    else:
        save_pretrained(model, folder)
    return model


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--size", help="another shape: a name of model.SIZES; real: a folder")
    parser.add_argument("--dtype", default="fp32", choices=[*DTYPES, "both"])
    parser.add_argument("--n", type=int, help="documents, pairs or texts of a batch")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out_dir", default="out")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come
    packages = "torch", "transformers", "peft", "sentence-transformers"
    real = args.name == "real"
    step = f"training by {CONFIG}" if real else f"training: AdamW (fused, lr {LEARNING_RATE})"
    setting = {
        "bench": args.name, "step": f"{step}; no dropout", "threads": args.threads, "precision":
        f"{args.dtype}; bf16 is autocast over {'bf16 frozen' if real else 'fp32'} weights",
        "device": device_name(args.device),
        **{name: version(name) for name in packages if find_spec(name.replace("-", "_"))},
    }  # fmt: skip
    given = {k: v for k, v in vars(args).items() if v and k in ("size", "n", "rounds")}
    run_cases = {"memory": memory_growth, "real": compare_real}
    config = runpy.run_path(CONFIG) if real else {}
    config = {key: value for key, value in config.items() if hasattr(train_contrastive, key)}
    cases, rows, sides = [], [], {}
    for case in BENCHES[args.name]:
        case, rng = replace(case, **given), np.random.default_rng(1337)
        torch.manual_seed(1337)
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(case, folder)
            vocab_size = model.config.vocab_size
            if case.make:
                batches = [case.make(vocab_size, case.n, rng) for _ in range(case.rounds + 1)]
            else:
                batches = real_batches(case, folder, rng)
            tokens = [n for batch in batches for n in batch.lengths]  # of each text
            cases.append({
                "case": case.label, "size": case.size, "vocab_size": vocab_size, "batch": case.n,
                "rounds": case.rounds, "lengths": f"{min(tokens)} to {max(tokens)} tokens"
                + ", uniform" * bool(case.make),
                "tokens": sum(tokens), "labels": sum(batch.n_labels for batch in batches),
            })  # fmt: skip
            for key, value in (setting | cases[-1]).items():
                print(f"{key:21} {value:,}" if type(value) is int else f"{key:21} {value}")
            for dtype in DTYPES if args.dtype == "both" else (args.dtype,):
                more = {"folder": folder, "batches": batches, "dtype": dtype, "config": config}
                job = SimpleNamespace(**vars(args) | more, max_length=case.max_length)
                run_case = run_cases.get(case.label, compare)
                of_case, sides[f"{case.label} {dtype}"] = run_case(model, job, case)
                rows += of_case
    path = f"{args.out_dir}/bench_{args.name}.json"
    write_json({"setting": setting | {"cases": cases}, "rows": rows, "sides": sides}, path)
    print("\nwritten to", path)


if __name__ == "__main__":
    main()
