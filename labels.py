"""
Labelled words and labelled texts, for classifiers. An example is a dictionary:

    words   {"words", "labels", "lines"}, a label and a line for each word
    texts   {"text", "pair" or None, "label", "lines"}

read_examples adds "targets" to both, the labels as numbers.
"""

import math

import numpy as np

from data import open_pairs, read_jsonl, read_pair, require, text_lines
from metrics import ndcg
from tokenizer import whole_backend, without_middle


def read_examples(path, s, n_lines=0):
    """The examples of a file, or of its first n_lines lines, numbered by s.labels. Where these are
    [], softmax takes the labels of the examples."""
    if s.task == "words":
        examples = read_words(path, s.label_field, s.label_column)
    else:
        examples = read_texts(path, s.loss_kind)
    examples = [e for e in examples if e["lines"][0] <= (n_lines or math.inf)]
    if not examples:
        raise ValueError(f"{path}, {n_lines or 'all'} lines: there is no example in them")
    found = {label for e in examples for label in labels_of(e)}
    if len(found) < 2 and not s.labels:
        raise ValueError(f"{path}: every label is {found.pop()!r}, expected two or more")
    if s.loss_kind == "softmax" and not s.labels:
        s.labels = label_set(examples)
    if len(set(s.labels)) < len(s.labels) or "" in s.labels:
        raise ValueError(f"label_names={s.labels}: expected different names, none empty")
    number = {name: i for i, name in enumerate(s.labels)}
    for example in examples:
        labels = labels_of(example)
        for label, line in zip(labels, example["lines"]):
            if number and label not in number:
                known = f"none of the {len(number)} labels: {', '.join(s.labels[:50])}"
                raise ValueError(f"{path} line {line}: label {label!r} is {known}")
        example["targets"] = [number.get(label, label) for label in labels]
    return examples


def read_columns(path):
    """Yield each sentence of a CoNLL file, a list of (line number, columns) of its words: a word a
    line, columns apart by spaces or tabs, an empty line or a -DOCSTART- after each sentence."""
    words, before = [], 0
    for line, text in text_lines(path):
        columns = text.split("\t") if "\t" in text else text.split()
        if words and (line > before + 1 or columns[0] == "-DOCSTART-"):
            yield words
            words = []
        if columns[0] != "-DOCSTART-":
            words.append((line, columns))
        before = line
    if words:
        yield words


def read_words(path, field, column):
    """The examples of a .jsonl file of {"words": [..], field: [..]}, or of a CoNLL file, the word
    in its first column and the label in `column`."""
    if path.endswith((".json", ".conllu")):
        raise ValueError(f"{path}: expected .jsonl or columns; data/ud/prepare.py reads CoNLL-U")
    examples = []
    if path.endswith((".jsonl", ".jsonl.gz")):
        for line, record in read_jsonl(path):
            words = require(record, "words", [str], path, line)
            labels = require(record, field, [str], path, line, filled=True)
            if len(words) != len(labels):
                found = f"{len(words)} words and {len(labels)} in '{field}'"
                raise ValueError(f"{path} line {line}: {found}, expected as many, at least one")
            examples.append({"words": words, "labels": labels, "lines": [line] * len(words)})
        return examples
    width = 0
    for sentence in read_columns(path):
        for line, row in sentence:
            width = width or len(row)
            if len(row) != width:
                raise ValueError(f"{path} line {line}: {len(row)} columns, the first has {width}")
            if column == 0 or not -width < column < width or not row[column].strip():
                raise ValueError(f"{path} line {line}: {width} columns, no label in {column}")
        lines, rows = zip(*sentence)
        words, labels = ([row[i] for row in rows] for i in (0, column))
        examples.append({"words": words, "labels": labels, "lines": list(lines)})
    return examples


def read_texts(path, kind):
    """The examples of a file of {"text", "text_pair", "label"}, text_pair optional. label: a str or
    int for softmax, a number, for bce from 0 to 1. For bce also lines of pairs, see read_pair: the
    query with each of its passages, 1 for pos, 0 for neg."""
    examples = []
    _, first = next(read_jsonl(path), (0, {}))
    if kind == "bce" and "text" not in first:
        file = open_pairs(path)
        for i, line in enumerate(file.numbers.tolist()):
            pair = read_pair(file, i)
            query = (pair["prompt"] or "") + pair["query"]
            for side, label in (("pos", 1.0), ("neg", 0.0)):
                for text in pair[side]:
                    examples.append({"text": query, "pair": text, "label": label, "lines": [line]})
        return examples
    for line, record in read_jsonl(path):
        text = require(record, "text", str, path, line, filled=True)
        pair = record.get("text_pair")
        if pair is not None:
            require(record, "text_pair", str, path, line, filled=True)
        type_ = float if kind != "softmax" else int if type(record.get("label")) is int else str
        label = require(record, "label", type_, path, line, filled=True)
        label = str(label) if kind == "softmax" else float(label)
        if kind == "bce" and not 0 <= label <= 1:
            raise ValueError(f"{path} line {line}: label {label}: expected 0 to 1")
        examples.append({"text": text, "pair": pair, "label": label, "lines": [line]})
    return examples


def join_texts(examples, tokenizer, s):
    """text, or text + separator + pair. What is too long loses the last tokens of the first, which
    keeps half of the room; then `tokenize` cuts the second."""
    backend, joined = whole_backend(tokenizer), []
    room = s.max_length - len(backend.encode(s.prefix + s.separator + s.suffix))
    for example in examples:
        both = example["text"], example["pair"]
        text, pair = (x and without_middle(backend, x, s.max_length) for x in both)
        if pair is not None:
            first, second = (backend.encode(x, add_special_tokens=False) for x in (text, pair))
            keep = max(room - len(second), room // 2)
            if len(first) > keep > 0:
                text = text[: first.offsets[keep - 1][1]]
            text += s.separator + pair
        joined.append(text)
    return joined


def labels_of(example):
    return example.get("labels") or [example["label"]]


def label_set(examples):
    """All labels, sorted; whole numbers by their value, so that 0, 1, .. are their outputs."""

    def place(name):
        return (0, int(name), name) if name.removeprefix("-").isdecimal() else (1, 0, name)

    return sorted({label for example in examples for label in labels_of(example)}, key=place)


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
