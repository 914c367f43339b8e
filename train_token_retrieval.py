"""
Token-level retrieval: for a query, the tokens of a long passage that matter. Keeping the best ones
compresses the passage 4x to 16x before another model reads it.

    python train_token_retrieval.py configs/token_retrieval_pydocs_tiny.py   # one GPU, Mac or CPU
    torchrun --standalone --nproc_per_node=8 train_token_retrieval.py \\
        configs/token_retrieval_acerag.py
    python train_token_retrieval.py configs/x.py --resume=True       # go on where it stopped
    python train_token_retrieval.py configs/x.py --eval_only=True    # against the baselines

Lines are {"query", "passage", "spans": [[start, end], ..]}, characters of the raw passage, end
exclusive. Following lines with the same passage are trained together: it is encoded once. Stage 1
is passage retrieval, train_contrastive.py. TacZip / AceRAG (VectorSpaceLab).
"""

import itertools
import json
import math
import os
import re
import time
from collections import Counter
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import common
import lora
from data import load_tokenizer, make_seqs, open_pairs, permuted, prefetch, read_line, require
from embedder import Embedder, Template, cosines, groups, tokenize, tokenize_passage, windows_of
from model import choose_backend, config_from_hf, from_pretrained, resolve_folder

# ---- defaults ----
out_dir = "out/token_retrieval"
# model
init_from = ""  # a model folder, an out_dir (stage 1's), or a hub id owner/name[@revision]
adapters: tuple = ()  # PEFT folders or hub ids merged into it first, in order
attention: str | None = None  # causal or bidirectional; None: the model's own
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
max_seq_len: int | None = None  # positions the model is trained for; None: its own
rope_scaling: tuple = ()  # ("yarn", 2.5) or ("linear", 2.5): stretches the base's own positions
lora_rank = 0  # 0: every weight trains
lora_alpha = 32.0
lora_dropout = 0.05
lora_targets = "all"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# embedding: a query's is its last token's hidden state
prefix = ""  # the template: prefix + instruction + text + suffix, saved with the model
suffix = ""
query_instruction = ""
passage_instruction = ""
query_max_length = 512
# passages
passage_max_length: int | None = None  # tokens of a passage in training, the rest is cut; None: all
passage_window = 0  # tokens encoded at a time; 0: the whole. Larger than memory: see train_step
window_overlap = 0  # tokens that neighbouring windows share
# data: JSONL files
data = "data/pydocs/spans_train.jsonl"
eval_data = "data/pydocs/spans_val.jsonl"  # "": none
queries_per_passage = 8  # most following lines with the same passage that are trained together
# loss
temperature = 0.02
# batch
batch_size = 64  # queries of one step, over all ranks and micro-batches
chunk_tokens = 16384  # of one forward on one device, but a passage may have more: see pack_passages
# length
max_steps: int | None = None
num_epochs: float | None = 1.0
# optimizer
learning_rate = 2e-4
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0
schedule = "linear"  # linear, cosine or constant, after the warmup
warmup_steps: int | None = None
warmup_ratio = 0.1
# evaluation and checkpoints
eval_only = False  # out_dir's newest checkpoint, or init_from, and the baselines: results.json, .md
eval_lines = 1000  # of eval_data, from its start; 0: all
ratios: tuple = (16, 8, 4)  # evaluation keeps 1/16, 1/8 and 1/4 of a passage's tokens
eval_interval = 200  # steps; 0: never
log_interval = 10
save_interval = 1000  # steps; the last step is always saved
keep_last = 1
keep_best = False
resume = False
tracker = ""
# device
dtype = "auto"  # bf16 (autocast, trained weights in fp32), fp32, or what the device is good at
compile = False
gradient_checkpointing = False
fsdp = False
deterministic = False
seed = 1337
# look, and do not train
dry_run = False
show_batch = False


# ---- the batch ----


def read_spans(file, i):
    """{"query", "passage", "spans": [[start, end], ..], "answer": [start, end] or None, "where",
    "line"} of the i-th line. ValueError names file, line and field."""
    record, line = read_line(file, i)
    where = f"{file.path} line {line}"
    query, passage = (require(record, key, str, file.path, line) for key in ("query", "passage"))
    spans, answer = require(record, "spans", [list], file.path, line), record.get("answer")
    if not query.strip():
        raise ValueError(f"{where}: field 'query' is empty")
    if not spans:
        raise ValueError(f"{where}: field 'spans' is empty, expected a [start, end] or more")
    for field, span in [("spans", span) for span in spans] + [("answer", answer)] * bool(answer):
        pair = isinstance(span, list) and [type(x) for x in span] == [int, int]
        if not pair or not 0 <= span[0] < span[1] <= len(passage):
            raise ValueError(
                f"{where}: field '{field}' has {span}, expected [start, end] with 0 <= start < end "
                f"<= {len(passage)}, the passage's characters"
            )
        if not passage[span[0] : span[1]].strip():
            raise ValueError(f"{where}: field '{field}' has {span}, spaces alone")
    keys = dict(query=query, passage=passage, spans=spans, answer=answer)
    return keys | dict(where=where, line=line)


def find_runs(file, most, max_lines=0):
    """Following lines that share a passage, at most `most` a run -> int64 [R, 2]: the first line,
    and how many. Reads, and so checks, every line."""
    runs, before = [], None
    for i in range(min(max_lines or len(file), len(file))):
        passage = read_spans(file, i)["passage"]
        if passage == before and runs[-1][1] < most:
            runs[-1][1] += 1
        else:
            runs.append([i, 1])
        before = passage
    return np.array(runs, dtype=np.int64)


def lines_of_step(step, batch_size, runs, seed):
    """The lines of a step's batch [batch_size], a function of (seed, step): an epoch is the runs in
    a seeded order, each with its lines together. A run that a batch cuts goes on in the next."""
    n_lines, lines = int(runs[:, 1].sum()), []
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size), n_lines)
    for e in np.unique(epoch):
        first, count = runs[permuted(np.arange(len(runs)), len(runs), seed, int(e))].T
        ends, here = count.cumsum(), place[epoch == e]
        run = np.searchsorted(ends, here, side="right")
        lines.append(first[run] + here - (ends - count)[run])
    return np.concatenate(lines)


def share_out(passages, world_size):
    """Which passages each rank takes: the longest first, each to the rank that has the least text.
    -> a list of indices for each rank. The loss does not depend on it."""
    shares, load = [[] for _ in range(world_size)], [0] * world_size
    for i in sorted(range(len(passages)), key=lambda i: -len(passages[i])):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += len(passages[i])
    return shares


def squeezed(text):
    return "".join(text.split()).lower()


def gold_tokens(record, token_spans, spell=None):
    """The tokens that hold a character of a span, a list of indices [g] for each span.

    Back from the tokens must come the span's text, or ValueError names file and line; spaces at its
    ends, which tokenizers may leave out, do not count. spell: indices -> what these tokens decode
    to, which finds offsets that have moved; None where the tokenizer changes its text.
    """
    passage, out = record["passage"], []
    for start, end in record["spans"]:
        inside = np.flatnonzero((token_spans[:, 0] < end) & (token_spans[:, 1] > start))
        text, back = passage[start:end].strip(), ""
        if len(inside):
            back = passage[token_spans[inside, 0].min() : token_spans[inside, 1].max()]
        said = spell(inside) if spell else text
        moved = squeezed(text) not in squeezed(said) and "\ufffd" not in said  # half a character
        if not text or text not in back or moved:
            back = said if moved else back
            shown = f"[{start}, {end}], {text[:60]!r}, comes back from its tokens as {back[:60]!r}"
            raise ValueError(f"{record['where']}: span {shown}")
        out.append(inside)
    return out


def encode_passage(records, tokenizer, settings, max_length=None):
    """The lines of one passage as ids -> a dictionary:

    texts: windows of the passage, then the queries, lists of ids; windowed: are there several
    rows [n], asked [Q]: where the passage's tokens and the queries' last ones lie in these
    which, token, count [G]: token `token` is one of the `count` gold tokens of query `which`
    records [Q]: the lines; spans [n, 2]: the characters of each token; lost: (queries, spans)

    max_length cuts the passage's last tokens, never the template's. A query that so loses all of
    its spans is left out.
    """
    s, passage = settings, records[0]["passage"]
    ids, rows, spans = tokenize_passage(tokenizer, passage, s["instructions"][1], s["template"])
    own = np.array(ids)[rows]

    def spell(tokens=slice(None)):
        return tokenizer.decode(own[tokens])

    faithful = squeezed(spell()) == squeezed(passage)
    gold = [gold_tokens(record, spans, spell if faithful else None) for record in records]
    n = len(rows)
    if max_length and len(ids) > max_length:
        tail = ids[rows[-1] + 1 :]
        room = max_length - len(tail)
        if room <= rows[0]:
            raise ValueError(f"passage_max_length={max_length} leaves no room for the passage")
        n, ids = int((rows < room).sum()), ids[:room] + tail
    kept = [i for i, parts in enumerate(gold) if any(part[0] < n for part in parts)]
    lost = len(gold) - len(kept), sum(part[0] >= n for parts in gold for part in parts)
    gold = [np.unique(np.concatenate(gold[i])) for i in kept]
    gold = [g[g < n] for g in gold]

    windows = windows_of(len(ids), s["window"], s["overlap"], s["causal"])
    place, at = np.empty(len(ids), dtype=np.int64), 0
    for start, stop, first, last in windows:
        place[first:last] = np.arange(first, last) - start + at
        at += stop - start
    how = s["instructions"][0], s["template"], s["query_max_length"]
    queries = [ids for ids, _ in tokenize(tokenizer, [records[i]["query"] for i in kept], *how)]
    counts = [len(g) for g in gold]
    return {
        "texts": [ids[start:stop] for start, stop, _, _ in windows] + queries,
        "windowed": len(windows) > 1,
        "rows": place[rows[:n]],
        "asked": at + np.cumsum([len(ids) for ids in queries], dtype=np.int64) - 1,
        "which": np.repeat(np.arange(len(gold)), counts),
        "token": np.concatenate([*gold, np.empty(0, np.int64)]),
        "count": np.repeat(counts, counts).astype(np.int64),
        "records": [records[i] for i in kept], "spans": spans[:n], "lost": lost,
    }  # fmt: skip


def pack_texts(texts):
    """Lists of ids, end to end -> (tokens [T] int64, seqs)"""
    tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    return tokens, make_seqs([len(ids) for ids in texts])


def pack_passages(passages, chunk_tokens):
    """What encode_passage returned -> micro-batches [(parts, units), ..] on the CPU, of at most
    chunk_tokens tokens where a passage has no more.

    parts: packed rows (tokens [T], seqs), one forward each. One alone, but for a passage in windows
    that are more than chunk_tokens together. units: of each passage [rows [n], asked [Q], which,
    token, count [G]], rows and asked counted over the hidden states of the parts end to end.
    """
    out = []
    for group in groups([sum(map(len, p["texts"])) for p in passages], chunk_tokens):
        units, texts, at = [], [], 0
        for p in (passages[i] for i in group):
            arrays = p["rows"] + at, p["asked"] + at, p["which"], p["token"], p["count"]
            units.append([torch.from_numpy(x) for x in arrays])
            texts += p["texts"]
            at += sum(map(len, p["texts"]))
        limit = chunk_tokens if passages[group[0]]["windowed"] else at
        parts = groups([len(ids) for ids in texts], limit)
        out.append(([pack_texts([texts[i] for i in part]) for part in parts], units))
    return out


def train_batches(file, runs, first_step, last_step, tokenizer, settings):
    """For each step this rank's micro-batches and (queries, queries lost, spans lost, tokens)."""
    s = settings
    for step in range(first_step, last_step):
        lines = lines_of_step(step, s["batch_size"], runs, s["seed"])
        same = itertools.groupby((read_spans(file, i) for i in lines), lambda r: r["passage"])
        same = [list(records) for _, records in same]
        own = share_out([records[0]["passage"] for records in same], s["world_size"])[s["rank"]]
        encoded = [encode_passage(same[i], tokenizer, s, s["passage_max_length"]) for i in own]
        lost = [sum(p["lost"][k] for p in encoded) for k in (0, 1)]
        encoded = [p for p in encoded if p["records"]]
        n_queries = sum(len(p["records"]) for p in encoded)
        n_tokens = sum(len(ids) for p in encoded for ids in p["texts"])
        yield pack_passages(encoded, s["chunk_tokens"]), (n_queries, *lost, n_tokens)


# ---- the loss ----


def token_scores(hidden, unit):
    """Cosines [Q, n], fp32, of a passage's queries and tokens, from hidden states [T, C]."""
    rows, asked = unit[:2]
    queries = hidden[asked]  # [Q, C]
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    return cosines(F.normalize(queries, dim=-1), hidden[rows])


def token_loss(scores, which, token, count, temperature):
    """The sum over queries of

        -1/|gold| sum over j in gold of log( exp(s_j / tau) / sum over k of exp(s_k / tau) )

    where k are all tokens of the query's passage; and for how many queries a gold token was first.
    scores [Q, n]; which, token, count [G]: see encode_passage. No less than log |gold| a query.
    """
    logits = scores / temperature
    losses = logits.logsumexp(dim=1).sum() - (logits[which, token] / count).sum()
    return losses, (logits.argmax(dim=1)[which] == token).sum()


def to_device(part, device):
    tokens, seqs = part
    seqs.cu_seqlens, seqs.positions = seqs.cu_seqlens.to(device), seqs.positions.to(device)
    return tokens.to(device), seqs


def most_of_any_rank(numbers, s):
    """The largest of each number over the ranks."""
    rows = [x * (r == s["rank"]) for r in range(s["world_size"]) for x in numbers]
    rows = np.array(common.all_reduce_sum(rows)).reshape(s["world_size"], -1)
    return [int(x) for x in rows.max(axis=0)]


def train_step(wrapped, micro_batches, n_queries, step, s):
    """Gradients of one step's loss, the mean over all ranks' n_queries -> this rank's (sum of
    losses, hits).

    wrapped: the model, as DDP or fully_shard wrapped it. A micro-batch is one forward and one
    backward. Where the windows of a passage are too many for that, the softmax still runs over all
    of them: hidden states are computed without a graph, the loss gives their gradient, and each
    part runs again with its own gradient (the gradient cache of train_contrastive.py). Memory holds
    the activations of chunk_tokens tokens, and of the passage the last hidden states alone.
    """
    device, world_size, fsdp = s["device"], s["world_size"], s["fsdp"]
    n_micro = max(1, len(micro_batches))  # a rank without a passage gives a gradient of zeros
    n_parts = max([len(parts) for parts, _ in micro_batches], default=1)
    if fsdp:  # each forward is collective: as many on every rank
        n_micro, n_parts = most_of_any_rank([n_micro, n_parts], s)
    total = torch.zeros(2, device=device)

    def forward(i, k):
        parts = micro_batches[i][0] if i < len(micro_batches) else []
        part = to_device(parts[k] if k < len(parts) else pack_texts([[0]]), device)
        common.seed_step(s["seed"], step, s["rank"], 1000 * i + k)  # dropout: the same in a replay
        with s["autocast"]():
            return wrapped(*part)  # [T, C]

    def meet(now):  # gradients meet once a step, at the last backward
        if fsdp:
            wrapped.set_requires_gradient_sync(now)
        elif world_size > 1:
            wrapped.require_backward_grad_sync = now

    for i in range(n_micro):
        parts, units = micro_batches[i] if i < len(micro_batches) else ([None], [])
        n, last = n_parts if fsdp else len(parts), i == n_micro - 1
        if n == 1:
            meet(last)
            hidden = forward(i, 0)
        else:
            with torch.no_grad():
                hidden = torch.cat([forward(i, k) for k in range(n)])
            hidden.requires_grad_()
        loss = hidden.sum() * 0.0
        for unit in units:
            unit = [x.to(device) for x in unit]
            sums, hits = token_loss(token_scores(hidden, unit), *unit[2:], s["temperature"])
            loss = loss + sums
            total += torch.stack((sums.detach(), hits))
        # the mean over all queries; DDP and FSDP divide by the ranks
        (loss * (world_size / max(n_queries, 1))).backward()
        if n > 1:
            at, d_hidden = 0, hidden.grad
            for k in range(n):
                meet(last and k == n - 1)
                out = forward(i, k)
                out.backward(d_hidden[at : at + len(out)])
                at += len(out)
    return total.tolist()


def learning_rate_at(step, max_steps, peak, floor, schedule, warmup):
    """A linear warmup, then linear, cosine or constant from peak to floor at max_steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(max_steps - warmup, 1)
    kept = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[schedule]
    return floor + (peak - floor) * kept


# ---- evaluation ----


def covered(spans, n):
    """Which of n characters lie in one of the spans [k, 2] -> bool [n]"""
    steps, spans = np.zeros(n + 1, dtype=np.int64), np.reshape(spans, (-1, 2)).astype(np.int64)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return steps[:n].cumsum() > 0


def names_of(ratios):
    return ["ap", "ndcg"] + [f"{kind}_{r}x" for kind in ("recall", "f1", "answer") for r in ratios]


def token_metrics(scores, gold, spans, record, ratios):
    """What an order of a passage's n tokens is worth for one query -> {name: number}

    scores [n]; gold: indices of the gold tokens; spans [n, 2]: the characters of each token.
    ap and ndcg are of the whole order, gains 0 and 1. The others of the best ceil(n / r) tokens:
    recall_rx, the share of the gold tokens that is kept; f1_rx, of the characters that are kept and
    those of the spans, spaces aside; answer_rx, 1 where every character of the answer is kept.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.isin(order, gold)  # [n] from the best token down
    ranks = np.flatnonzero(hits) + 1
    found = np.arange(1, len(gold) + 1)
    ndcg = (1 / np.log2(ranks + 1)).sum() / (1 / np.log2(found + 1)).sum()
    out = {"ap": (found / ranks).mean(), "ndcg": ndcg}
    passage = record["passage"]
    written = np.array([not c.isspace() for c in passage])
    wanted = covered(record["spans"], len(passage)) & written
    for r in ratios:
        kept = order[: math.ceil(len(order) / r)]
        there = covered(spans[kept], len(passage)) & written
        out[f"recall_{r}x"] = hits[: len(kept)].mean() * len(kept) / len(gold)
        out[f"f1_{r}x"] = 2 * (there & wanted).sum() / (there.sum() + wanted.sum())
        if record["answer"]:
            start, end = record["answer"]
            out[f"answer_{r}x"] = float((there | ~written)[start:end].all())
    return out


def baseline_scores(record, spans, rng):
    """{name: scores [n]} of orders that learn nothing:

    random; first: from the passage's start; overlap: the tokens of words that the query has, too;
    bm25: a token has its sentence's BM25 score for the query (k1 1.2, b 0.75), the collection being
    the passage's sentences. Words and sentences that tie come in random order.
    """
    passage = record["passage"]
    asked = set(re.findall(r"\w+", record["query"].lower()))
    words = [(m.start(), m.group().lower()) for m in re.finditer(r"\w+", passage)]
    starts = [start for start, _ in words]
    word_of = np.searchsorted(starts, spans[:, 1], side="left") - 1  # -1: before the first word
    shared = covered([(a, a + len(w)) for a, w in words if w in asked], len(passage))
    overlap = shared[spans[:, 1] - 1] + 1e-6 * rng.random(len(words) + 1)[word_of]

    cuts = [m.end() for m in re.finditer(r"[.!?]\s+|\n+", passage)]
    sentences = [Counter() for _ in range(len(cuts) + 1)]
    for start, word in words:
        sentences[np.searchsorted(cuts, start, side="right")][word] += 1
    sizes = np.array([bag.total() for bag in sentences])
    bm25 = 1e-6 * rng.random(len(sentences))
    for word in sorted(asked):
        tf = np.array([bag[word] for bag in sentences])
        df = (tf > 0).sum()
        idf = math.log(1 + (len(sentences) - df + 0.5) / (df + 0.5))
        bm25 += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * sizes / max(sizes.mean(), 1)))
    sentence_of = np.searchsorted(cuts, spans[:, 0], side="right")
    return {
        "random": rng.random(len(spans)), "first": -np.arange(len(spans)),
        "overlap": overlap, "bm25": bm25[sentence_of],
    }  # fmt: skip


@torch.no_grad()
def evaluate(wrapped, file, runs, tokenizer, s, baselines=False):
    """Means over the queries of the runs, whose passages are not cut; every rank takes its share.
    -> {"model": {"loss", "acc" (a gold token is first), and all of token_metrics}}, with baselines
    {"random": token_metrics, ..} before it."""
    ways = ["random", "first", "overlap", "bm25"] if baselines else []
    names = ["loss", "acc", *names_of(s["ratios"])]
    totals = {(way, name): [0.0, 0] for way in [*ways, "model"] for name in names}
    wrapped.eval()

    def add(way, found):
        for name, x in found.items():
            totals[way, name][0] += x
            totals[way, name][1] += 1

    def forward(part):
        with s["autocast"]():
            return wrapped(*to_device(part, s["device"]))

    block = 16 * s["world_size"]  # passages held at a time
    bar = tqdm(range(0, len(runs), block), "evaluate", disable=not baselines or s["rank"] > 0)
    for b in bar:
        own = runs[b : b + block][s["rank"] :: s["world_size"]].tolist()
        lines = [[read_spans(file, i) for i in range(first, first + n)] for first, n in own]
        encoded = [encode_passage(records, tokenizer, s) for records in lines]
        packed, passages = pack_passages(encoded, s["chunk_tokens"]), iter(encoded)
        n, idle = sum(len(parts) for parts, _ in packed), 0
        if s["fsdp"]:  # as many forwards on every rank
            idle = most_of_any_rank([n], s)[0] - n
        for parts, units in packed:
            hidden = torch.cat([forward(part) for part in parts])
            for unit, p in zip(units, passages, strict=False):
                unit = [x.to(s["device"]) for x in unit]
                all_scores = token_scores(hidden, unit)  # [Q, n]
                for i, record in enumerate(p["records"]):
                    mine, scores = unit[2] == i, all_scores[i : i + 1]
                    keys = unit[2][mine] * 0, unit[3][mine], unit[4][mine]
                    loss, hits = token_loss(scores, *keys, s["temperature"])
                    add("model", {"loss": loss.item(), "acc": hits.item()})
                    rng = np.random.default_rng((s["seed"], record["line"]))
                    orders = baseline_scores(record, p["spans"], rng) if baselines else {}
                    orders["model"] = scores[0].cpu().numpy()
                    for way, x in orders.items():
                        gold = keys[1].cpu().numpy()
                        add(way, token_metrics(x, gold, p["spans"], record, s["ratios"]))
        for _ in range(idle):
            forward(pack_texts([[0]]))
    wrapped.train()
    sums = common.all_reduce_sum([x for pair in totals.values() for x in pair])
    out = {way: {} for way, _ in totals}
    for (way, name), total, count in zip(totals, sums[::2], sums[1::2], strict=True):
        if count:  # baselines have no loss, lines may have no answer
            out[way][name] = total / count
    return out


def write_results(found, folder, facts):
    """results.json and results.md in the folder; prints the table."""
    names = [name for name in found["model"] if name not in ("loss", "acc")]
    rows = [["", *names]] + [[way, *(f"{x[n]:.3f}" for n in names)] for way, x in found.items()]
    rows.insert(1, ["---"] * len(rows[0]))
    table = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "results.json"), "w", encoding="utf-8") as f:
        json.dump(facts | {"results": found}, f, indent=1)
    with open(os.path.join(folder, "results.md"), "w", encoding="utf-8") as f:
        f.write(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n\n" + table)
    print(table)


def describe_batch(lines, file, tokenizer, settings):
    """The first passages and queries as a reader wants them; gold tokens stand inverted."""
    for i in lines:
        record = read_spans(file, i)
        p = encode_passage([record], tokenizer, settings, settings["passage_max_length"])
        n, n_spans = len(p["spans"]), len(record["spans"])
        print(f"--- {record['where']}: {n} tokens of the passage, {len(p['token'])} gold, "
              f"{n_spans - p['lost'][1]} of {n_spans} spans")  # fmt: skip
        end, text = int(p["spans"][:, 1].max()), record["passage"]
        gold = covered(p["spans"][p["token"]], end)
        edges = [0, *(np.flatnonzero(np.diff(gold)) + 1), end]
        for start, stop in itertools.pairwise(edges):
            part = text[start:stop]
            print(f"\033[7m{part}\033[0m" if gold[start] else part, end="")
        print(f"\n--- query: {tokenizer.decode(p['texts'][-1])}" if p["records"] else "\n--- lost")


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    if schedule not in ("linear", "cosine", "constant"):
        raise SystemExit(f"schedule={schedule!r}: expected linear, cosine or constant")
    if rope_scaling and (len(rope_scaling) != 2 or rope_scaling[0] not in ("linear", "yarn")):
        raise SystemExit(f"{rope_scaling=}: expected ('linear', factor) or ('yarn', factor)")
    if eval_only and (not eval_data or show_batch):
        raise SystemExit("eval_only=True needs a file in eval_data, and shows no batch")
    if any(type(r) is not int or r < 1 for r in ratios):
        raise SystemExit(f"{ratios=}: expected whole numbers, 16 keeps 1/16 of the tokens")
    if train_also and not lora_rank:
        raise SystemExit(f"{train_also=} goes with LoRA; lora_rank=0 trains every weight")
    if queries_per_passage < 1:
        raise SystemExit(f"{queries_per_passage=}: expected 1 or more")

    # ---- distributed and seed ----
    rank, world_size, local_rank, device = common.setup_distributed()
    print0 = common.print0
    if deterministic:
        common.set_deterministic()
    torch.manual_seed(seed)
    compute_dtype = common.dtype_of(dtype, device)

    def autocast():
        on = compute_dtype != torch.float32
        return torch.autocast(device.type, compute_dtype) if on else nullcontext()

    # ---- data ----
    eval_file = eval_runs = None
    if eval_data and (eval_interval or eval_only):
        eval_file = open_pairs(eval_data)
        eval_runs = find_runs(eval_file, queries_per_passage, eval_lines)
        print0(f"{eval_data}: {eval_runs[:, 1].sum():,} lines for evaluation")
    if not eval_only:
        file = open_pairs(data)
        runs = find_runs(file, queries_per_passage)
        if max_steps is None:
            max_steps = math.ceil(num_epochs * len(file) / batch_size)
        warmup = warmup_steps if warmup_steps is not None else round(warmup_ratio * max_steps)
        print0(
            f"{data}: {len(file):,} lines, {len(runs):,} runs of up to {queries_per_passage} with "
            f"the same passage\na step: {batch_size} queries over {world_size} ranks, about "
            f"{batch_size * len(runs) / len(file):,.0f} passages, in micro-batches of "
            f"{chunk_tokens:,} tokens\n{max_steps:,} steps = "
            f"{max_steps * batch_size / len(file):.2f} epochs; warmup {warmup:,} steps"
        )

    # ---- model (+ LoRA) ----
    last = common.latest_checkpoint(out_dir, "step")
    if last and not (resume or dry_run or eval_only):
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    last = last if (resume or eval_only) and not dry_run else None
    weights_type = compute_dtype if lora_rank else torch.float32  # what trains is fp32
    base = resolve_folder(init_from)  # of an out_dir its newest checkpoint
    if lora_rank and last and not eval_only:  # on what it began with, not a newer checkpoint
        base, *adapters = lora.adapter_chain(os.path.join(last, "adapter"))[:-1]
    source = last if last and (eval_only or not lora_rank) else base
    scaling = None
    if rope_scaling:
        with open(os.path.join(base, "config.json"), encoding="utf-8") as f:
            scaling = dict(
                rope_type=rope_scaling[0], factor=float(rope_scaling[1]),
                original_max_position_embeddings=config_from_hf(json.load(f)).max_seq_len,
            )  # fmt: skip
    model = from_pretrained(
        source, attention, max_seq_len=max_seq_len, rope_scaling=scaling, dtype=weights_type
    )
    tokenizer = load_tokenizer(base)
    for adapter in adapters if source == base else ():
        lora.load_adapter(model, adapter)
        lora.merge(model)
    model.drop_head()
    if lora_rank and last and not eval_only:
        lora.load_adapter(model, os.path.join(last, "adapter"), trainable=True)
    elif lora_rank and not eval_only:
        lora.inject(model, lora_rank, lora_alpha, lora_dropout, lora_targets, train_also=train_also)
    model.gradient_checkpointing = gradient_checkpointing
    c = model.config
    gqa = c.n_head != c.n_kv_head
    model.backend = choose_backend(attention_backend, device, compute_dtype, c.attn_dropout, gqa)
    prompts = {"query": query_instruction, "document": passage_instruction}
    embedder = Embedder(
        model, tokenizer, "last", Template(prefix, suffix), prompts, max_length=query_max_length,
        dtype=compute_dtype,
    ).to(device).train()  # fmt: skip
    settings = dict(
        batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, fsdp=fsdp,
        template=embedder.template, instructions=(query_instruction, passage_instruction),
        query_max_length=query_max_length, passage_max_length=passage_max_length,
        window=passage_window, overlap=window_overlap, causal=c.causal, chunk_tokens=chunk_tokens,
        temperature=temperature, ratios=ratios, device=device, autocast=autocast,
    )  # fmt: skip
    windows_of(0, passage_window, window_overlap, c.causal)  # complains of impossible windows
    if passage_window:
        print0(f"the folder does not say it: score_tokens(.., window={passage_window}, "
               f"overlap={window_overlap}) gives the scores that are trained")  # fmt: skip
    if problem := embedder.st_problem():
        print0(f"saved for nanoembed alone; sentence-transformers would differ: {problem}")
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(
        f"{c.family}, {'causal' if c.causal else 'bidirectional'}, {n_all / 1e6:.1f}M weights, "
        f"{n_trained / 1e6:.1f}M trained; attention by {model.backend}, {compute_dtype} on {device}"
    )
    if show_batch:
        describe_batch(lines_of_step(0, batch_size, runs, seed)[:3], file, tokenizer, settings)
        raise SystemExit

    # ---- compile, FSDP/DDP ----
    wrapped = model
    if compile:
        for block in model.blocks:
            block.compile()
    if fsdp:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif world_size > 1:
        wrapped = DDP(model, device_ids=[local_rank] if device.type == "cuda" else None)

    if eval_only:
        found = evaluate(wrapped, eval_file, eval_runs, tokenizer, settings, baselines=True)
        facts = {"model": source, "eval_data": eval_data, "queries": int(eval_runs[:, 1].sum())}
        if rank == 0:
            write_results(found, out_dir, facts)
        print0(f"peak memory {common.peak_memory(device) / 1e9:.2f} GB")
        if dist.is_initialized():
            dist.destroy_process_group()
        raise SystemExit

    # ---- optimizer, resume ----
    trained = [p for p in model.parameters() if p.requires_grad]
    groups_of = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups_of if g["params"]], learning_rate, (beta1, beta2), adam_eps,
        fused=device.type in ("cuda", "cpu"),
    )  # fmt: skip
    step, best = 0, {"loss": math.inf, "folder": ""}
    if last:
        path = os.path.join(last, "training_state.pt")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        common.load_optimizer_state([optimizer], state["optimizers"])
        step, best = state["step"], state["best"]
        print0(f"resumed {last}, after step {step}")

    def save():
        weights, optim = common.full_state_dict(model), common.optimizer_state([optimizer])
        folder = common.begin_checkpoint(out_dir, f"step{step}")
        if rank == 0:
            embedder.save(folder, not problem, weights)  # LoRA merged
            if lora_rank:
                adapter, name = os.path.join(folder, "adapter"), init_from.rstrip("/")
                name = base if os.path.isdir(name) else name
                lora.save_adapter(model, adapter, name, weights, adapters)
                embedder.save_settings(adapter)
            state = {"step": step, "best": best, "optimizers": optim}
            torch.save(state, os.path.join(folder, "training_state.pt"))
        print0(f"saved {common.commit_checkpoint(folder)}")
        kept = best["folder"] if keep_best else None
        common.prune_checkpoints(out_dir, "step", keep_last, False, kept)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "queries_s", "tok_s", "eval_loss", "eval_acc"]
    columns += [f"eval_{name}" for name in names_of(ratios)]
    if dry_run:  # leaves nothing behind
        log = lambda step, values: None  # noqa: E731
    else:
        log = common.open_log(out_dir, columns, max_steps, step, tracker, config)
        common.save_config(config, os.path.join(out_dir, "config.py"))
    stop_requested = common.catch_sigterm()
    bad_steps, since, tokens_seen, seconds, lost = 0, 0, 0, 0.0, np.zeros(2)
    batches = prefetch(train_batches(file, runs, step, max_steps, tokenizer, settings))
    if isinstance(wrapped, DDP):
        # DDP orders its buckets anew after the first backward, and with them the sums over ranks:
        # one backward that counts for nothing lets a resumed run sum as the unbroken one does.
        with autocast():
            wrapped(*to_device(pack_texts([[0, 0]]), device)).sum().backward()
        model.zero_grad(set_to_none=True)

    while step < max_steps:
        start = time.perf_counter()
        micro_batches, counts = next(batches)
        lr = learning_rate_at(step, max_steps, learning_rate, min_lr, schedule, warmup)
        counts = common.all_reduce_sum([stop_requested(), *counts])
        stopping, n_queries, *lost_now, n_tokens = counts
        if stopping:
            save()
            break

        sums = train_step(wrapped, micro_batches, n_queries, step, settings)
        gnorm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
        gnorm = gnorm.full_tensor().item() if fsdp else gnorm.item()
        loss, hits = (x / max(n_queries, 1) for x in common.all_reduce_sum(sums))

        if not math.isfinite(loss + gnorm):
            bad_steps += 1
            lines = file.numbers[lines_of_step(step, batch_size, runs, seed)]
            print0(
                f"step {step + 1}: loss {loss}, gradient norm {gnorm}: skipped. Lines of {data}: "
                f"{lines[:8].tolist()}{'...' if len(lines) > 8 else ''}"
            )
            if bad_steps > 3:
                raise SystemExit("stopped at the 4th such step; the last checkpoint is good")
        else:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        since, tokens_seen, lost = since + n_queries, tokens_seen + n_tokens, lost + lost_now
        seconds += time.perf_counter() - start

        if dry_run and step == min(2, max_steps):  # the first was slow: allocation, compilation
            spent, peak = time.perf_counter() - start, common.peak_memory(device) / 1e9
            print0(
                f"dry run: {spent:.2f} s/step, {n_queries / spent:,.1f} queries/s, "
                f"{n_tokens / spent:,.0f} tok/s, {len(micro_batches)} micro-batches, peak memory "
                f"{peak:.2f} GB; the whole run takes {common.format_time(spent * max_steps)} "
                "without evaluation"
            )
            break
        last_step = step == max_steps
        if step % log_interval == 0 or last_step:
            line = {"loss": loss, "acc": hits, "gnorm": gnorm, "lr": lr}
            log(step, line | {"queries_s": since / seconds, "tok_s": tokens_seen / seconds})
            since, tokens_seen, seconds = 0, 0, 0.0
        if eval_file and (step % eval_interval == 0 or last_step):
            found = evaluate(wrapped, eval_file, eval_runs, tokenizer, settings)["model"]
            log(step, {f"eval_{name}": x for name, x in found.items()})
            if found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
                if keep_best and not last_step and step % save_interval:
                    save()
        if step % save_interval == 0 or last_step:
            save()
    print0(
        f"peak memory {common.peak_memory(device) / 1e9:.2f} GB; left out because of "
        f"passage_max_length: {lost[0]:.0f} queries, {lost[1]:.0f} spans"
    )

    # ---- clean-up ----
    batches.close()
    if dist.is_initialized():
        dist.destroy_process_group()
