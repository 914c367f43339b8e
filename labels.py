"""
Labelled words and labelled texts, for classifiers. An example is a dictionary:

    words   {"words", "labels", "lines"}, a label and a line for each word
    texts   {"text", "pair" or None, "label", "lines"}

read_examples adds "targets" to both, the labels as numbers.
"""

import math

from data import open_pairs, read_jsonl, read_pair, require
from tokenizer import whole_backend


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
    if s.loss_kind == "softmax" and not s.labels:
        s.labels = label_set(examples)
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
    words = []
    with open(path, encoding="utf-8") as f:
        for line, text in enumerate([*f, ""], 1):
            columns = text.rstrip("\r\n").split("\t") if "\t" in text else text.split()
            if columns and columns[0] != "-DOCSTART-":
                words.append((line, columns))
            elif words:
                yield words
                words = []


def read_words(path, field, column):
    """The examples of a .jsonl file of {"words": [..], field: [..]}, or of a CoNLL file, the word
    in its first column and the label in `column`."""
    if path.endswith((".json", ".conllu")):
        raise ValueError(f"{path}: expected .jsonl or columns; data/ud/prepare.py reads CoNLL-U")
    examples = []
    if path.endswith((".jsonl", ".jsonl.gz")):
        for line, record in read_jsonl(path):
            words, labels = (require(record, key, [str], path, line) for key in ("words", field))
            if not words or len(words) != len(labels):
                found = f"{len(words)} words and {len(labels)} in '{field}'"
                raise ValueError(f"{path} line {line}: {found}, expected as many, at least one")
            examples.append({"words": words, "labels": labels, "lines": [line] * len(words)})
        return examples
    for sentence in read_columns(path):
        for line, row in sentence:
            if not -len(row) < column < len(row):
                raise ValueError(f"{path} line {line}: {len(row)} columns, no label in {column}")
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
    low, high = (0, 1) if kind == "bce" else (-3e38, 3e38)  # what fp32 holds
    for line, record in read_jsonl(path):
        text, pair = require(record, "text", str, path, line), record.get("text_pair")
        if pair is not None:
            require(record, "text_pair", str, path, line)
        type_ = float if kind != "softmax" else int if type(record.get("label")) is int else str
        label = require(record, "label", type_, path, line)
        label = str(label) if kind == "softmax" else float(label)
        if kind != "softmax" and not low <= label <= high:
            raise ValueError(f"{path} line {line}: label {label}: expected {low} to {high}")
        examples.append({"text": text, "pair": pair, "label": label, "lines": [line]})
    return examples


def join_texts(examples, tokenizer, s):
    """text, or text + separator + pair. What is too long loses the last tokens of the first, which
    keeps half of the room; then `tokenize` cuts the second."""
    backend, joined = whole_backend(tokenizer), []
    room = s.max_length - len(backend.encode(s.prefix + s.separator + s.suffix))
    for example in examples:
        text, pair = example["text"], example["pair"]
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
