"""
Labelled words and labelled texts, for classifiers.
"""

import math

from data import open_pairs, read_jsonl, read_pair, require


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
    """Examples {"words", "labels", "lines"} of a .jsonl file of {"words": [..], field: [..]}, or of
    a CoNLL file, the word in its first column and the label in `column`."""
    examples = []
    if path.endswith((".json", ".conllu")):
        raise ValueError(f"{path}: expected .jsonl or columns; data/ud/prepare.py reads CoNLL-U")
    if path.endswith((".jsonl", ".jsonl.gz")):
        for line, record in read_jsonl(path):
            words, labels = (require(record, key, [str], path, line) for key in ("words", field))
            if not words or len(words) != len(labels):
                raise ValueError(
                    f"{path} line {line}: {len(words)} words and {len(labels)} in '{field}', "
                    "expected as many, and at least one"
                )
            examples.append({"words": words, "labels": labels, "lines": [line] * len(words)})
    else:
        for sentence in read_columns(path):
            for line, columns in sentence:
                if not -len(columns) < column < len(columns):
                    raise ValueError(
                        f"{path} line {line}: {len(columns)} columns, no label in {column}"
                    )
            words, labels = ([row[i] for _, row in sentence] for i in (0, column))
            lines = [line for line, _ in sentence]
            examples.append({"words": words, "labels": labels, "lines": lines})
    if not examples:
        raise ValueError(f"{path}: there is no sentence in it")
    return examples


def read_texts(path, kind):
    """Examples {"text", "pair", "label", "lines"} of a file of {"text", "text_pair", "label"},
    text_pair optional. label: a str or int for softmax, a number, for bce from 0 to 1. For bce also
    lines of pairs, see read_pair: the query with each of its passages, 1 for pos, 0 for neg."""
    _, first = next(read_jsonl(path), (0, {}))
    examples = []
    if kind == "bce" and "label" not in first:
        file = open_pairs(path)
        for i in range(len(file)):
            pair, lines = read_pair(file, i), [int(file.numbers[i])]
            query = (pair["prompt"] or "") + pair["query"]
            for label, passages in ((1.0, pair["pos"]), (0.0, pair["neg"])):
                for text in passages:
                    examples.append({"text": query, "pair": text, "label": label, "lines": lines})
        return examples
    for line, record in read_jsonl(path):
        text, other = require(record, "text", str, path, line), None
        if record.get("text_pair") is not None:
            other = require(record, "text_pair", str, path, line)
        if kind == "softmax":
            type_ = int if type(record.get("label")) is int else str
            label = str(require(record, "label", type_, path, line))
        else:
            label = float(require(record, "label", float, path, line))
            if not math.isfinite(label) or (kind == "bce" and not 0 <= label <= 1):
                expected = "from 0 to 1" if kind == "bce" else "that is finite"
                raise ValueError(f"{path} line {line}: label {label}, expected one {expected}")
        examples.append({"text": text, "pair": other, "label": label, "lines": [line]})
    if not examples:
        raise ValueError(f"{path}: there is no line in it, expected JSONL")
    return examples


def labels_of(example):
    return example["labels"] if "labels" in example else [example["label"]]


def label_set(examples):
    """All labels, sorted; whole numbers by their value, so that 0, 1, .. are their outputs."""
    names = {label for example in examples for label in labels_of(example)}
    number = {name: int(name) for name in names if name.lstrip("-").isdecimal()}
    return sorted(names, key=lambda name: (name not in number, number.get(name, 0), name))


def number_labels(examples, names, path):
    """Adds "targets", the labels' numbers, to each example. ValueError for a label that is not in
    names, with its file and line."""
    number = {name: i for i, name in enumerate(names)}
    for example in examples:
        for label, line in zip(labels_of(example), example["lines"], strict=True):
            if label not in number:
                raise ValueError(
                    f"{path} line {line}: label {label!r} is none of the {len(names)} labels: "
                    f"{', '.join(names[:50])}"
                )
        example["targets"] = [number[label] for label in labels_of(example)]
