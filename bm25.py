"""
BM25: the scores of texts for a query, by their words. A baseline of eval_mteb.py and evals/.
"""

import re
from collections import Counter

import numpy as np
from sklearn.feature_extraction import DictVectorizer

K1, B = 1.2, 0.75


def words_of(text):
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def stems_of(text):
    """The stems of words, by the English stemmer of Snowball (the package PyStemmer); read_csv,
    readCSV and ReadCSV are two words, read and csv."""
    import Stemmer

    parts = re.sub(r"_|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return Stemmer.Stemmer("english").stemWords(words_of(parts))


class BM25:
    """An index of N texts by their words, in the form of Lucene:

        score(q, d) = sum over w in q of log(1 + (N - n_w + 0.5) / (n_w + 0.5)) tf / (tf + K)
        K = k1 (1 - b + b |d| / mean |d|)

    where n_w texts have the word w, and tf is how often d has it. A word that the query has twice
    counts twice. `words` makes words of a text: words_of or stems_of. No stop words.
    """

    def __init__(self, texts, k1=K1, b=B, words=words_of):
        self.words, self.vectorizer = words, DictVectorizer()
        tf = self.vectorizer.fit_transform(Counter(words(text)) for text in texts).tocoo()
        n, n_words = tf.shape  # tf [N, words], sparse
        lengths = np.bincount(tf.row, tf.data, n)  # [N], in words
        n_texts = np.bincount(tf.col, minlength=n_words)
        idf = np.log(1 + (n - n_texts + 0.5) / (n_texts + 0.5))
        k = k1 * (1 - b + b * lengths / max(lengths.mean(), 1))
        tf.data *= idf[tf.col] / (tf.data + k[tf.row])
        self.weights = tf.T.tocsr()  # [words, N]: only the rows of a query's words are read

    def rows(self, queries):
        """How often each has the words of the index -> sparse [Q, words]"""
        return self.vectorizer.transform(Counter(self.words(query)) for query in queries)

    def scores(self, query):
        """-> float64 [N]"""
        return (self.rows([query]) @ self.weights).toarray()[0]
