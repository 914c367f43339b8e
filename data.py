"""
JSONL files: of any records, and of pairs, whose lines are read when they are asked for. What is
wrong in a line is said with file, line and field.
"""

import dataclasses
import difflib
import gzip
import hashlib
import mmap
import re
import zlib
from dataclasses import dataclass

import numpy as np

from formats import Object, parse_json

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes
# fields of a pair, of which one form goes with extras; see read_pair
FORMS = "query pos neg", "query positive negative", "anchor positive negative", "text"
FORMS = [set(form.split()) for form in FORMS]
TEXTS, EXTRAS = set().union(*FORMS), {"prompt", "pos_scores", "neg_scores", "module", "name"}


def parse_line(text, path, line):
    """The object of one line, as a dict. ValueError where it holds none."""
    return parse_json(text, f"{path} line {line}")


def read_lines(path):
    """Yield (line number from 1, bytes) of a file, maybe a .gz."""
    line = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            for line, text in enumerate(f, 1):
                yield line, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} behind line {line}: no whole .gz: {error}") from None


def text_lines(path):
    """Yield (line number from 1, text) for each line of UTF-8 that is not blank."""
    for line, text in read_lines(path):
        try:
            text = text.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} line {line}: {error}") from None
        if text.strip():
            yield line, text


def read_jsonl(path):
    """Yield (line number from 1, dict) for each line that is not blank of a file, maybe a .gz."""
    for line, text in read_lines(path):
        if text.strip():
            yield line, parse_line(text, path, line)


def require(record, field, kind, path, line, filled=False):
    """record[field], checked. `kind` is str, int, float (takes ints; finite), bool, dict, list, or
    [str] and such for a list of them. filled: neither blank texts nor an empty list. ValueError
    names file, line (0: none) and field, and what was expected."""
    where = f"{path} line {line}" if line else path
    is_list = isinstance(kind, list)
    one = kind[0] if is_list else kind
    expected = f"list of {one.__name__}" if is_list else one.__name__
    value = record.get(field)
    values = value if is_list else [value]
    types = {float: (int, float), dict: (dict, Object)}.get(one, (one,))
    # type(x), not isinstance: True is no int here
    if not isinstance(values, list) or any(type(x) not in types for x in values):
        found = repr(value)[:60] if field in record else "missing"
        raise ValueError(f"{where}: field '{field}' is {found} (expected {expected})")
    if one is str and any(SURROGATE.search(x) for x in values):
        raise ValueError(f"{where}: field '{field}' has half a character (a surrogate)")
    if one is float and not all(-3e38 < x < 3e38 for x in values):  # what fp32 holds
        raise ValueError(f"{where}: field '{field}' is {value!r:.60}, expected finite numbers")
    if filled and not values:
        raise ValueError(f"{where}: field '{field}' is empty, expected one {one.__name__} or more")
    if filled and one is str and not all(x.strip() for x in values):
        problem = "has an empty text" if is_list else "is empty"
        raise ValueError(f"{where}: field '{field}' {problem}")
    return value


@dataclass
class PairFile:
    """A JSONL file of pairs whose lines are read when they are asked for: len(file), read_pair."""

    path: str
    text: mmap.mmap  # the bytes of the file
    starts: np.ndarray  # [n + 1] int64, where each line that is not blank begins, then the end
    numbers: np.ndarray  # [n] int64, its line number from 1, for messages
    unread: set = dataclasses.field(default_factory=set)  # fields of pairs that mean nothing to us

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

    ValueError for fields of two forms, and for one that is nearly a name of these ("negatives").
    Other fields are not read, and named once a file.
    """
    record, line = read_line(file, i)
    names = {name for name, x in record.items() if x is not None}
    if not any(names & TEXTS <= form for form in FORMS):
        found = ", ".join(f"'{name}'" for name in sorted(names & TEXTS))
        raise ValueError(f"{file.path} line {line}: fields {found} are not of one form of pairs")
    for name in sorted(names - TEXTS - EXTRAS - file.unread):
        if near := difflib.get_close_matches(name.lower(), TEXTS | EXTRAS, 1, 0.85):
            raise ValueError(f"{file.path} line {line}: field '{name}': did you mean '{near[0]}'?")
        from common import print0  # torch is slow to load: most prepare.py do without

        print0(f"{file.path} line {line}: field '{name}' is not read")
        file.unread.add(name)

    def get(field, kind, default=None):
        missing = default is not None and record.get(field) in (None, [], "")
        return default if missing else require(record, field, kind, file.path, line, filled=True)

    if "text" in names:
        query, pos, neg = get("text", str), [get("text", str)], []
    elif "positive" in names:
        query = get("anchor" if "anchor" in names else "query", str)
        pos = [get("positive", str)]
        neg = [get("negative", str)] if record.get("negative") is not None else []
    else:
        query, pos, neg = get("query", str), get("pos", [str]), get("neg", [str], [])
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
