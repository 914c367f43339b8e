"""
JSONL files: of any records, and of pairs, whose lines are read when they are asked for. What is
wrong in a line is said with file, line and field.
"""

import gzip
import hashlib
import json
import mmap
import re
from dataclasses import dataclass

import numpy as np


def parse_line(text, path, line):
    """The object of one line, as a dict. ValueError where it holds none."""
    try:
        record = json.loads(text)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} line {line}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} line {line}: a {type(record).__name__}, expected an object")
    return record


def read_jsonl(path):
    """Yield (line number from 1, dict) for each line that is not blank of a file, maybe a .gz."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
        for line, text in enumerate(f, 1):
            if text.strip():
                yield line, parse_line(text, path, line)


def require(record, field, kind, path, line):
    """record[field], checked. `kind` is str, int, float (takes ints), bool, list, or [str] and such
    for a list of them. ValueError names file, line and field, and what was expected."""
    is_list = isinstance(kind, list)
    one = kind[0] if is_list else kind
    expected = f"list of {one.__name__}" if is_list else one.__name__
    value = record.get(field)
    values = value if is_list else [value]
    types = (int, float) if one is float else (one,)
    # type(x), not isinstance: True is no int here
    if not isinstance(values, list) or any(type(x) not in types for x in values):
        found = repr(value)[:60] if field in record else "missing"
        raise ValueError(f"{path} line {line}: field '{field}' is {found} (expected {expected})")
    if one is str and any(re.search("[\ud800-\udfff]", x) for x in values):
        raise ValueError(f"{path} line {line}: field '{field}' has half a character (a surrogate)")
    return value


@dataclass
class PairFile:
    """A JSONL file of pairs whose lines are read when they are asked for: len(file), read_pair."""

    path: str
    text: mmap.mmap  # the bytes of the file
    starts: np.ndarray  # [n + 1] int64, where each line that is not blank begins, then the end
    numbers: np.ndarray  # [n] int64, its line number from 1, for messages

    def __len__(self):
        return len(self.numbers)


def open_pairs(path):
    """-> PairFile, which takes 16 bytes of memory a line. ValueError for a file without lines."""
    starts, numbers, end = [], [], 0
    with open(path, "rb") as f:
        for line, text in enumerate(f, 1):
            if text.strip():
                starts.append(end)
                numbers.append(line)
            end += len(text)
        if not starts:
            raise ValueError(f"{path}: there is no line in it, expected JSONL")
        text = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return PairFile(path, text, np.array([*starts, end]), np.array(numbers))


def read_line(file, i):
    """(the object of the i-th line, its line number). ValueError where it holds none."""
    start, end = file.starts[i : i + 2]  # blank lines that follow it do no harm
    line = int(file.numbers[i])
    return parse_line(file.text[start:end], file.path, line), line


def read_pair(file, i):
    """{"query": str, "pos": [str, ..], "neg": [str, ..], "pos_scores", "neg_scores": [float, ..] or
    None, "prompt": str or None} of the i-th line, from any of the three forms:

        {"query", "pos": [..], "neg": [..], "pos_scores": [..], "neg_scores": [..], "prompt"}
        {"query" or "anchor", "positive", "negative"}    one of each, the negative may be missing
        {"text"}                                         SimCSE: its own positive
    """
    record, line = read_line(file, i)

    def get(field, kind, default=None):
        missing = default is not None and record.get(field) is None
        return default if missing else require(record, field, kind, file.path, line)

    if "text" in record:
        query, pos, neg = get("text", str), [get("text", str)], []
    elif "positive" in record:
        query = get("anchor" if "anchor" in record else "query", str)
        pos = [get("positive", str)]
        neg = [get("negative", str)] if record.get("negative") is not None else []
    else:
        query, pos, neg = get("query", str), get("pos", [str]), get("neg", [str], [])
    if not pos:
        raise ValueError(f"{file.path} line {line}: field 'pos' is empty, expected a text or more")
    pair = {"query": query, "pos": pos, "neg": neg, "prompt": get("prompt", str, "") or None}
    for field, texts in (("pos_scores", pos), ("neg_scores", neg)):
        pair[field] = scores = get(field, [float], []) or None
        if scores and len(scores) != len(texts):
            counts = f"{len(scores)} numbers for {len(texts)} texts"
            raise ValueError(f"{file.path} line {line}: field '{field}' has {counts}")
    return pair


def is_held_out(query, share):
    """Decided by a hash of the query: one that comes twice is on one side both times."""
    digest = hashlib.sha256(query.encode("utf-8", "replace")).hexdigest()
    return int(digest[:8], 16) < share * 2**32
