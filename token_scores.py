"""
How much each token of a passage matters for a query: the cosine of the query's embedding and of the
token's hidden state, which train_token_retrieval.py trains; embedder.score_tokens is for use. A
passage longer than memory goes in windows: slices of the whole's ids, so that no token and no
character moves.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from metrics import ndcg
from spans import covered


def windows_of(n, window, overlap, causal):
    """n tokens in windows of `window` -> [(start, stop, first, last), ..], ends exclusive.

    Tokens start..stop are encoded together; the hidden states of first..last are taken from there.
    Neighbours share `overlap` tokens, the last two perhaps more. A shared token is taken from the
    window where it sees most: if causal the earlier one, else the one whose border is further away.
    """
    if window and not 0 <= overlap < window:
        raise ValueError(f"windows of {window} tokens cannot share {overlap}")
    if not window or n <= window:
        return [(0, n, 0, n)]
    starts = [*range(0, n - window, window - overlap), n - window]  # the last one is full, too
    windows, first = [], 0
    for start, following in zip(starts, [*starts[1:], None]):
        stop = start + window
        last = n if following is None else stop if causal else (following + stop) // 2
        windows.append((start, stop, first, last))
        first = last
    return windows


def cosines(queries, hidden, block=8192):
    """queries [Q, C] of length 1, hidden [n, C] of any type -> [Q, n] fp32 (fp64 if hidden is):

        s_j = q . t_j / |t_j|

    The normalised tokens exist for a block at a time; the backward pass makes them again.
    """

    def of_block(queries, block):
        return queries @ F.normalize(block.to(queries.dtype), dim=-1).t()

    with torch.autocast(hidden.device.type, enabled=False):
        blocks = hidden.split(block)
        if torch.is_grad_enabled():
            parts = [checkpoint(of_block, queries, x, use_reentrant=False) for x in blocks]
        else:
            parts = [of_block(queries, x) for x in blocks]
    return torch.cat(parts, dim=1)


def names_of(ratios):
    """The names in what token_metrics returns, where a line has an answer."""
    return ["ap", "ndcg"] + [f"{kind}_{r}x" for kind in ("recall", "f1", "answer") for r in ratios]


def token_metrics(scores, gold, spans, record, ratios):
    """What an order of a passage's n tokens is worth for one query -> {name: number}

    scores [n]; gold: indices of the gold tokens; spans [n, 2]: the characters of each token.
    ap and ndcg are of the whole order, gains 0 and 1. The others are of the best ceil(n / r)
    tokens: recall_rx is the share of the gold tokens that is kept; f1_rx compares the characters
    that are kept with those of the spans, spaces aside; answer_rx is 1 where every character of
    the answer is kept.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.isin(order, gold)  # [n] from the best token down
    ranks = np.flatnonzero(hits) + 1
    precisions = np.arange(1, len(gold) + 1) / ranks
    out = {"ap": precisions.mean(), "ndcg": ndcg(hits, np.ones(len(gold)))}
    passage = record["passage"]
    written = np.array([not c.isspace() for c in passage])
    wanted = covered(record["spans"], len(passage)) & written
    for r in ratios:
        n_kept = math.ceil(len(order) / r)
        kept = covered(spans[order[:n_kept]], len(passage)) & written  # [characters]
        out[f"recall_{r}x"] = hits[:n_kept].sum() / len(gold)
        out[f"f1_{r}x"] = 2 * (kept & wanted).sum() / (kept.sum() + wanted.sum())
        if record["answer"]:
            start, end = record["answer"]
            out[f"answer_{r}x"] = float((kept | ~written)[start:end].all())
    return out
