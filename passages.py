"""
Passages with their queries, as the packed micro-batches that train_token_retrieval.py trains on.

    train_batches, eval_batches     the micro-batches of each step, of evaluation
    pad_batch                       those that a rank lacks under FSDP
    encode_passage, pack_passages   lines of one passage -> ids, windows, gold tokens -> packed rows
    show_lines                      passages and queries as a reader wants them

T tokens of a packed row, n tokens of a passage, Q queries of it, G gold tokens of all of them.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch

from attention import Seqs, make_seqs, move
from common import all_reduce_max
from order import permuted
from pooling import groups
from spans import covered, gold_tokens, join_spans, read_spans, speller
from token_scores import windows_of
from tokenizer import tokenize, tokenize_passage


@dataclass
class Passage:
    """A passage of n tokens as ids, with its Q queries and their G gold tokens. Rows are those of
    the texts end to end; token gold[g] is one of the count[g] gold tokens of query query[g]."""

    texts: list[list[int]]  # the passage's windows, then the queries
    tokens: torch.Tensor  # [n] int64, the rows of the passage's tokens
    ends: torch.Tensor  # [Q] int64, the row of each query's last token
    query: torch.Tensor  # [G] int64, in 0..Q-1
    gold: torch.Tensor  # [G] int64, in 0..n-1
    count: torch.Tensor  # [G] int64
    records: list[dict]  # [Q], the lines of the queries
    spans: np.ndarray  # [n, 2] int64, the characters of each token
    lost: np.ndarray  # [2], queries and spans that lie behind the cut


@dataclass
class MicroBatch:
    """What has one loss and one backward: packed rows, each of one forward, and passages whose rows
    are those of all parts end to end."""

    parts: list[tuple[torch.Tensor, Seqs]]  # tokens [T] int64
    passages: list[Passage]

    def to(self, device):
        return move(self, device)


def lines_of_batch(step, runs, s):
    """The lines of a step [batch_size], a function of (seed, step): an epoch is the runs in a
    seeded order, each with its lines together. A run that a batch cuts goes on in the next."""
    n_lines, parts = int(runs[:, 1].sum()), []
    epoch, place = np.divmod(step * s.batch_size + np.arange(s.batch_size), n_lines)
    for e in np.unique(epoch):
        first, count = runs[permuted(np.arange(len(runs)), len(runs), s.seed, int(e))].T
        lines = np.arange(n_lines) + np.repeat(first - count.cumsum() + count, count)  # of epoch e
        parts.append(lines[place[epoch == e]])
    return np.concatenate(parts)


def share_out(passages, world_size):
    """Which passages each rank takes: the longest first, each to the rank that has the least text.
    -> a list of indices for each rank. The loss does not depend on it."""
    shares, load = [[] for _ in range(world_size)], [0] * world_size
    for i in sorted(range(len(passages)), key=lambda i: -len(passages[i])):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += len(passages[i])
    return shares


def encode_passage(records, tokenizer, s, max_length=None):
    """The lines of one passage -> Passage. max_length cuts the passage's last tokens, never the
    template's. A query that so loses all of its spans is left out."""
    text = records[0]["passage"]
    ids, rows, spans = tokenize_passage(tokenizer, text, s.passage_instruction, s.template)
    spell = speller(tokenizer, np.array(ids)[rows], text)
    gold = [gold_tokens(record, spans, spell) for record in records]
    n = len(rows)  # tokens of the passage that stay
    if max_length and len(ids) > max_length:
        tail = ids[rows[-1] + 1 :]  # the template's suffix, an EOS or SEP
        room = max_length - len(tail)
        if room <= rows[0]:
            raise ValueError(f"passage_max_length={max_length} leaves no room for the passage")
        n, ids = int((rows < room).sum()), ids[:room] + tail
    # gold tokens behind the cut are lost, with them spans that have no other, and so their queries
    gold = [[part[part < n] for part in parts] for parts in gold]
    lost_spans = sum(len(part) == 0 for parts in gold for part in parts)
    gold = [np.unique(np.concatenate(parts)) for parts in gold]  # of each line
    lost = np.array([sum(len(g) == 0 for g in gold), lost_spans])
    records = [record for record, g in zip(records, gold) if len(g)]  # [Q]

    windows = windows_of(len(ids), s.passage_window, s.window_overlap, s.causal)
    asked = [record["query"] for record in records]
    queries = tokenize(tokenizer, asked, s.query_instruction, s.template, s.query_max_length)
    texts = [ids[start:stop] for start, stop, _, _ in windows] + [ids for ids, _ in queries]
    ends = np.cumsum([len(ids) for ids in texts])  # [windows + Q]
    place = [  # of each of the passage's ids in the texts end to end
        np.arange(first - stop, last - stop) + end
        for (_, stop, first, last), end in zip(windows, ends)
    ]
    count = torch.tensor([len(g) for g in gold if len(g)], dtype=torch.int64)  # [Q]
    query = torch.repeat_interleave(count)  # [G]
    return Passage(
        texts, torch.from_numpy(np.concatenate(place)[rows[:n]]),
        torch.from_numpy(ends[len(windows) :] - 1), query, torch.from_numpy(np.concatenate(gold)),
        count[query], records, spans[:n], lost,
    )  # fmt: skip


def pack_texts(texts):
    """Lists of ids, end to end -> (tokens [T] int64, seqs)"""
    tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    return tokens, make_seqs([len(ids) for ids in texts])


def pack_passages(passages, device_batch_tokens):
    """-> micro-batches on the CPU, of at most device_batch_tokens tokens where a passage has no
    more. Each has one part, but for a passage whose windows together have more tokens than that."""
    sizes, batch = [sum(map(len, p.texts)) for p in passages], []
    for group in groups(sizes, device_batch_tokens):
        texts, packed, total = [], [], 0
        for p in (passages[i] for i in group):  # their rows move behind those of the ones before
            packed.append(replace(p, tokens=p.tokens + total, ends=p.ends + total))
            texts += p.texts
            total = sum(map(len, texts))
        windowed = len(texts) > 1 + len(p.records)  # of a passage alone; several are one part
        parts = groups([len(ids) for ids in texts], device_batch_tokens if windowed else total)
        parts = [pack_texts([texts[i] for i in part]) for part in parts]
        batch.append(MicroBatch(parts, packed))
    return batch


def pad_batch(batch, s):
    """A rank's micro-batches, at least one. Under FSDP, where each forward is collective, as many
    on every rank, with as many parts: what lacks is a text of one token that nothing asks for."""
    dummy = pack_texts([[0]])
    most = all_reduce_max if s.fsdp else int
    missing = max(1, most(len(batch))) - len(batch)
    batch = batch + [MicroBatch([dummy], []) for _ in range(missing)]
    for micro_batch in batch:
        n_parts = len(micro_batch.parts)
        micro_batch.parts += [dummy] * (most(n_parts) - n_parts)
    return batch


def train_batches(file, runs, first_step, tokenizer, s):
    """For each step this rank's micro-batches and (queries, queries lost, spans lost, tokens)."""
    for step in range(first_step, s.stop_step):
        records = [read_spans(file, i) for i in lines_of_batch(step, runs, s)]
        grouped = itertools.groupby(records, lambda record: record["passage"])
        grouped = [list(group) for _, group in grouped]  # the lines of each passage
        share = share_out([group[0]["passage"] for group in grouped], s.world_size)[s.rank]
        passages = [encode_passage(grouped[i], tokenizer, s, s.passage_max_length) for i in share]
        lost = sum((p.lost for p in passages), np.zeros(2))
        passages = [p for p in passages if p.records]  # some have lost all their queries
        n_queries = sum(len(p.records) for p in passages)
        n_tokens = sum(len(ids) for p in passages for ids in p.texts)
        yield pack_passages(passages, s.device_batch_tokens), (n_queries, *lost, n_tokens)


def eval_batches(file, runs, tokenizer, s):
    """The micro-batches of this rank's share of the runs, whose passages are not cut."""
    block = 16 * s.world_size  # passages held at a time
    for begin in range(0, len(runs), block):
        share = runs[begin : begin + block][s.rank :: s.world_size].tolist()
        grouped = [[read_spans(file, i) for i in range(first, first + n)] for first, n in share]
        passages = [encode_passage(records, tokenizer, s) for records in grouped]
        yield from pad_batch(pack_passages(passages, s.device_batch_tokens), s)


def show_lines(lines, file, tokenizer, s):
    """Passages and queries as a reader wants them; gold tokens stand inverted."""
    for i in lines:
        record = read_spans(file, i)
        p = encode_passage([record], tokenizer, s, s.passage_max_length)
        n_spans, n_gold = len(record["spans"]), len(p.gold)
        print(f"--- {record['where']}: {len(p.spans)} tokens of the passage, {n_gold} gold, "
              f"{n_spans - p.lost[1]} of {n_spans} spans")  # fmt: skip
        spans = p.spans[p.gold.numpy()].tolist()
        words = (record["passage"][a:b].strip() for a, b in join_spans(spans))
        print("--- gold:", " | ".join(words))
        gold = covered(spans, p.spans[:, 1].max())  # [characters]
        for is_gold, group in itertools.groupby(zip(gold, record["passage"]), lambda pair: pair[0]):
            part = "".join(character for _, character in group)
            print(f"\033[7m{part}\033[0m" if is_gold else part, end="")
        print(f"\n--- query: {tokenizer.decode(p.texts[-1])}" if p.records else "\n--- lost")
