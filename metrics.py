"""
Numbers from arrays: what a ranking, the kept part of a passage, or a classifier's output is worth.

    ndcg, ranked                 a ranking's items, the best first
    names_of, token_metrics      an order of a passage's tokens
    score_words, score_texts     labels of words, labels or scores of texts
"""

import math

import numpy as np

from spans import covered

# ---- rankings ----


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


# ---- tokens of a passage ----


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


# ---- classifiers ----


def score_words(examples, found, names):
    """found: for each example the numbers of its words' labels, -1 for a word without a token: that
    is counted wrong, and is outside of all entities. -> (metrics, how many such words)."""
    gold = [example["labels"] for example in examples]
    guesses = [[names[i] if i >= 0 else None for i in labels] for labels in found]
    pairs = [pair for rows in zip(gold, guesses) for pair in zip(*rows)]
    metrics = {"acc": sum(label == guess for label, guess in pairs) / len(pairs)}
    if any(name[:2] in ("B-", "I-") for name in names):
        from seqeval.metrics import f1_score, precision_score, recall_score

        inside = [["O" if guess is None else guess for guess in row] for row in guesses]
        scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        metrics |= {name: float(f(gold, inside, zero_division=0)) for name, f in scores.items()}
    return metrics, sum(guess is None for _, guess in pairs)


def score_texts(examples, logits, kind):
    """logits [n, K] of all examples -> metrics: accuracy, macro F1 and Matthews; for bce F1 of the
    1s at threshold 0 and nDCG@10 of the texts that share their "text" (a query's candidates, 2 or
    more, not all of one label; equal scores share their gain); for mse Pearson and Spearman."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    scores = logits[:, 0]
    if kind == "softmax":
        gold, guess = [e["targets"][0] for e in examples], logits.argmax(1)
        f1, mcc = f1_score(gold, guess, average="macro"), matthews_corrcoef(gold, guess)
        metrics = {"acc": (guess == gold).mean(), "f1": f1, "mcc": mcc}
    elif kind == "mse":
        gold = [e["label"] for e in examples]
        metrics = {"pearson": pearsonr(gold, scores)[0], "spearman": spearmanr(gold, scores)[0]}
    else:
        gold, queries, values = np.array([e["label"] for e in examples]), {}, []
        yes, guess = gold > 0.5, scores > 0
        metrics = {"acc": (yes == guess).mean(), "f1": f1_score(yes, guess)}
        for i, example in enumerate(examples):
            queries.setdefault(example["text"], []).append(i)
        for rows in queries.values():  # of a query's candidates
            if len(set(gold[rows])) > 1:
                _, place, count = np.unique(-scores[rows], return_inverse=True, return_counts=True)
                gains = np.bincount(place, gold[rows]) / count  # the mean gain of each score
                values.append(ndcg(gains[np.sort(place)], gold[rows], 10))
        if values:
            metrics["ndcg"] = np.mean(values)
    return {name: float(value) for name, value in metrics.items()}
