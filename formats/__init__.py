"""Folders and files of other libraries: a file each, no computation."""

import json
from collections import Counter
from pathlib import Path


class Object(dict):
    """An object of a JSON file, which is named where a key is asked for that it lacks."""

    def __missing__(self, key):
        raise ValueError(f"{self.where}: no key {key!r}")


def parse_json(text, where, kind=dict):
    """The object, or list, of a JSON text (str, bytes). ValueError says where it holds none."""

    def make(pairs):
        value = Object(pairs)
        value.where = where
        if len(value) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {name!r} comes twice")
        return value

    try:
        value = json.loads(text, object_pairs_hook=make)
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, deep nesting
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else kind.__name__
        raise ValueError(f"{where}: a {type(value).__name__}, expected an {expected}")
    return value


def read_json(*path, kind=dict):
    """{} where there is no such file."""
    path = Path(*path)
    return parse_json(path.read_bytes(), path, kind) if path.exists() else {}


def write_json(value, *path):
    path = Path(*path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), "utf-8")
