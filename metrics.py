"""
Numbers from arrays: what a ranking, the kept part of a passage, or a classifier's output is worth.

    ndcg, ranked                                a ranking's items, the best first
    BM25                                        the scores of texts for a query, by their words
    token_metrics, baseline_scores              an order of a passage's tokens, see evals/
    score_words, score_texts                    labels of words, labels or scores of texts
"""

import math
import re
from array import array
from collections import Counter

import numpy as np

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


def words_of(text):
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


class BM25:
    """An index of N texts by their words, in the form of Lucene:

        score(q, d) = sum over w in q of log(1 + (N - n_w + 0.5) / (n_w + 0.5)) tf / (tf + K)
        K = k1 (1 - b + b |d| / mean |d|)

    where n_w texts have the word w, and tf is how often d has it. A word that the query has twice
    counts twice. No stemming, no stop words.
    """

    def __init__(self, texts, k1=1.2, b=0.75):
        self.number, self.n = {}, 0  # {word: its number}, N
        doc, word, count = array("i"), array("i"), array("f")
        for i, text in enumerate(texts):
            self.n = i + 1
            for w, tf in Counter(words_of(text)).items():
                doc.append(i)
                word.append(self.number.setdefault(w, len(self.number)))
                count.append(tf)
        doc, word, count = map(np.asarray, (doc, word, count))  # [P], pairs of a text and a word
        lengths = np.bincount(doc, count, self.n)  # [N], in words
        n_texts = np.bincount(word, minlength=len(self.number))
        idf = np.log(1 + (self.n - n_texts + 0.5) / (n_texts + 0.5))
        k = k1 * (1 - b + b * lengths / max(lengths.mean(), 1))
        order = np.argsort(word, kind="stable")  # a word's texts stand together
        self.doc, self.weight = doc[order], (idf[word] * count / (count + k[doc]))[order]
        self.starts = np.append(0, n_texts.cumsum())

    def scores(self, query):
        """-> float64 [N]"""
        out = np.zeros(self.n)
        for w in words_of(query):
            if (i := self.number.get(w)) is not None:
                part = slice(*self.starts[i : i + 2])
                out[self.doc[part]] += self.weight[part]
        return out


# ---- tokens of a passage ----


def covered(spans, n):
    """Which of n characters lie in one of the spans [k, 2] -> bool [n]"""
    steps, spans = np.zeros(n + 1, dtype=np.int64), np.reshape(spans, (-1, 2)).astype(np.int64)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return steps[:n].cumsum() > 0


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
    out = {"ap": (np.arange(1, len(gold) + 1) / ranks).mean()}
    out["ndcg"] = ndcg(hits, np.ones(len(gold)))
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


def baseline_scores(record, spans, rng):
    """{name: scores [n]} of orders that learn nothing:

    random; first: from the passage's start; overlap: the tokens of words that the query has, too;
    bm25: a token has its sentence's BM25 score for the query's different words, the texts being
    the passage's sentences. Words and sentences that tie come in random order.
    """
    passage, asked = record["passage"], sorted(set(words_of(record["query"])))
    words = [m.span() for m in re.finditer(r"\w+", passage)]
    starts = [start for start, _ in words]
    word_of = np.searchsorted(starts, spans[:, 1], side="left") - 1  # -1: before the first word
    shared = [(start, end) for start, end in words if passage[start:end].lower() in asked]
    shared = covered(shared, len(passage))[spans[:, 1] - 1]  # [n]
    overlap = shared + 1e-6 * rng.random(len(words) + 1)[word_of]

    cuts = [m.end() for m in re.finditer(r"[.!?]\s+|\n+", passage)]
    sentences = [passage[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    bm25 = 1e-6 * rng.random(len(sentences)) + 2.2 * BM25(sentences).scores(" ".join(asked))
    bm25 = bm25[np.searchsorted(cuts, spans[:, 0], side="right")]  # [n]
    return {
        "random": rng.random(len(spans)), "first": -np.arange(len(spans)),
        "overlap": overlap, "bm25": bm25,
    }  # fmt: skip


# ---- classifiers ----


def score_words(examples, found, names):
    """found: for each example the numbers of its words' labels, -1 for a word without a token: that
    is counted wrong, and is outside of all entities. -> (metrics, how many such words)."""
    gold = [example["labels"] for example in examples]
    guesses = [[names[i] if i >= 0 else None for i in labels] for labels in found]
    pairs = [pair for rows in zip(gold, guesses, strict=True) for pair in zip(*rows, strict=True)]
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

    if kind == "softmax":
        gold, guess = [e["targets"][0] for e in examples], logits.argmax(1)
        f1, mcc = f1_score(gold, guess, average="macro"), matthews_corrcoef(gold, guess)
        return {"acc": float((guess == gold).mean()), "f1": float(f1), "mcc": float(mcc)}
    gold, scores = np.array([e["label"] for e in examples]), logits[:, 0]
    if kind == "mse":
        pearson, spearman = pearsonr(gold, scores)[0], spearmanr(gold, scores)[0]
        return {"pearson": float(pearson), "spearman": float(spearman)}
    yes, guess = gold > 0.5, scores > 0
    metrics = {"acc": float((yes == guess).mean()), "f1": float(f1_score(yes, guess))}
    queries = {}  # {query: the rows of its candidates}
    for i, example in enumerate(examples):
        queries.setdefault(example["text"], []).append(i)
    values = []
    for rows in map(np.array, queries.values()):
        if len(set(gold[rows])) > 1:
            _, place, count = np.unique(-scores[rows], return_inverse=True, return_counts=True)
            gains = np.bincount(place, gold[rows]) / count  # the mean gain of each score
            values.append(ndcg(gains[np.sort(place)], gold[rows], 10))
    return metrics | ({"ndcg": float(np.mean(values))} if values else {})
