"""
BM25: the scores of texts for a query, by their words. A baseline of eval_mteb.py and evals/.
"""

import re
from array import array
from collections import Counter

import numpy as np

K1, B = 1.2, 0.75


def words_of(text):
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def stems_of(text):
    """The stems of words, by the English stemmer of Snowball; read_csv, readCSV and ReadCSV are two
    words, read and csv. The package is PyStemmer."""
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
        self.words, self.number, self.n = words, {}, 0  # {word: its number}, N
        doc, word, count = array("i"), array("i"), array("f")
        for text in texts:
            for w, tf in Counter(words(text)).items():
                doc.append(self.n)
                word.append(self.number.setdefault(w, len(self.number)))
                count.append(tf)
            self.n += 1
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
        for i in (self.number[w] for w in self.words(query) if w in self.number):
            part = slice(*self.starts[i : i + 2])
            out[self.doc[part]] += self.weight[part]
        return out
