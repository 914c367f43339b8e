"""
BM25: the scores of texts for a query, by their words. A baseline of eval_mteb.py and evals/.
"""

import re
from collections import Counter

import numpy as np
from sklearn.feature_extraction import DictVectorizer

K1, B = 1.2, 0.75


def words_of(text):
    """How often each word is in a text: runs of letters and digits, in lower case."""
    return Counter(re.findall(r"\w+", text.lower()))


class BM25:
    """An index of N texts by their words, in the form of Lucene:

        score(q, d) = sum over w in q of log(1 + (N - n_w + 0.5) / (n_w + 0.5)) tf / (tf + K)
        K = k1 (1 - b + b |d| / mean |d|)

    where n_w texts have the word w, and tf is how often d has it. A word that the query has twice
    counts twice. No stemming, no stop words.
    """

    def __init__(self, texts):
        self.words = DictVectorizer()
        tf = self.words.fit_transform(map(words_of, texts)).tocoo()  # [N, words], sparse
        n, n_words = tf.shape
        lengths = np.bincount(tf.row, tf.data, n)  # [N], in words
        n_texts = np.bincount(tf.col, minlength=n_words)
        idf = np.log(1 + (n - n_texts + 0.5) / (n_texts + 0.5))
        k = K1 * (1 - B + B * lengths / max(lengths.mean(), 1))
        tf.data *= idf[tf.col] / (tf.data + k[tf.row])
        self.weights = tf.T.tocsr()  # [words, N]: only the rows of a query's words are read

    def scores(self, query):
        """-> float64 [N]"""
        return (self.words.transform(words_of(query)) @ self.weights).toarray()[0]
