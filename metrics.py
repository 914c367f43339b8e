"""
What a ranking is worth. Metrics of tokens stand in token_scores.py, those of labels in labels.py.
"""

import numpy as np


def ndcg(gains, ideal, k=None):
    """The discounted gain of the k best items over that of the best order (None: of all items):

        DCG = sum over ranks r = 1, 2, .. of gain_r / log2(r + 1)

    gains [n]: of a ranking's items, the best first; ideal [m]: of all that may be found.
    """
    gains, best = np.asarray(gains)[:k], np.sort(ideal)[::-1][:k]
    discount = 1 / np.log2(np.arange(2, 2 + max(len(gains), len(best))))
    return (gains * discount[: len(gains)]).sum() / (best * discount[: len(best)]).sum()


def ranked(top, relevant):
    """top: up to 10 indices of a ranking, the best first; relevant: indices of the right items ->
    {"acc": the first is right, "mrr": 1 / rank of the first that is right, or 0, "ndcg"}, @10."""
    gains = np.array([i in relevant for i in top], dtype=float)
    reciprocal = 1 / (1 + gains.argmax()) if gains.any() else 0.0
    return {"acc": gains[0], "mrr": reciprocal, "ndcg": ndcg(gains, np.ones(len(relevant)), 10)}
