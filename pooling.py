"""
Packed rows of tokenized texts, and their hidden states to vectors.

Shapes: B texts, T tokens of the packed row, P pooled tokens, C n_embd, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from attention import make_seqs, move


@dataclass
class Pool:
    """Which tokens of a packed row make which vector."""

    text: torch.Tensor  # [T] int64, the text of each token
    place: torch.Tensor  # [T] int64, 1.. within what is pooled of that text, 0 for what is not
    rows: torch.Tensor  # [P] int64, the pooled tokens
    first: torch.Tensor  # [B] int64, the first pooled token of each text
    last: torch.Tensor  # [B] int64, the last one
    count: torch.Tensor  # [B] int64, pooled tokens of each text; 0 gives the zero vector
    lengths: list[int]  # the same on the host


def pack(encoded, device):
    """What `tokenize` returned -> (tokens [T] int64, seqs, pool): built on the CPU, moved once."""
    lengths = [len(ids) for ids, _ in encoded]
    starts = np.cumsum([0, *lengths[:-1]])  # [B], where each text begins in the row
    first, end = starts + np.array([span for _, span in encoded]).T  # [B] each
    text = np.repeat(np.arange(len(encoded)), lengths)  # [T]
    count, place = end - first, np.arange(len(text)) - first[text] + 1
    place *= (place > 0) & (place <= count[text])
    # a text of which nothing is pooled gives any token as first and last, which then counts 0
    first, last = np.minimum(first, starts + lengths - 1), np.maximum(end - 1, 0)
    tokens = np.concatenate([ids for ids, _ in encoded]).astype(np.int64)
    arrays = (tokens, text, place, np.flatnonzero(place), first, last, count)
    tokens, *parts = move([torch.from_numpy(x) for x in arrays], device)
    return tokens, make_seqs(lengths, device), Pool(*parts, count.tolist())


def pool(hidden, pooled, pooling):
    """hidden [T, C], pooled: the Pool of this row -> [B, C], in fp32 (fp64 if hidden is).
    pooling: "mean", "weighted_mean" (weights 1, 2, 3, .. over the pooled tokens), "last", "cls",
    which is the first, or "tokens", which are all that are pooled: [P, C]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if pooling == "tokens":
        return hidden[pooled.rows].to(wide)
    if pooling in ("cls", "last"):
        rows = pooled.first if pooling == "cls" else pooled.last
        return hidden[rows].to(wide) * (pooled.count > 0)[:, None]
    weights = pooled.place.clamp(max=1) if pooling == "mean" else pooled.place
    weights, n = weights.to(wide), len(pooled.lengths)  # [T], B
    sums = hidden.new_zeros(n, hidden.size(1), dtype=wide)
    sums = sums.index_add(0, pooled.text, hidden.to(wide) * weights[:, None])  # [B, C]
    total = weights.new_zeros(n).index_add(0, pooled.text, weights)  # [B]
    return sums / total.clamp(min=1)[:, None]


def splade(model, hidden, pooled):
    """hidden [T, C] -> [B, V] fp32: max over a text's tokens of log(1 + relu(logit)), SPLADE v2
    (Formal et al. 2021, arXiv 2109.10086, eq. 6). log(1 + relu) only grows, so the max is taken
    first. The logits exist for a few texts at a time; the backward pass makes them again."""

    def largest(x, counts):  # x [P, C] of whole texts, counts [b] -> [b, V]
        logits = model.logits(x)
        return torch.segment_reduce(logits, "max", lengths=counts, unsafe=True, initial=0)

    limit = 2 ** (25 if hidden.device.type == "cpu" else 28) // model.config.vocab_size
    texts = groups(pooled.lengths, limit)
    rows = pooled.rows.split([sum(pooled.lengths[i] for i in group) for group in texts])
    counts = pooled.count.split([len(group) for group in texts])
    parts = [checkpoint(largest, hidden[r], n, use_reentrant=False) for r, n in zip(rows, counts)]
    weights = torch.cat(parts)
    return weights.to(torch.promote_types(weights.dtype, torch.float32)).relu().log1p()


def groups(lengths, limit):
    """Neighbouring indices in lists of at most `limit` tokens together, at least one in each."""
    parts, total = [], limit
    for i, n in enumerate(lengths):
        if total + n > limit:
            parts.append([])
            total = 0
        parts[-1].append(i)
        total += n
    return parts
