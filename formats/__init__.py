"""Folders and files of other libraries: a file each, no computation."""

import json
from pathlib import Path


def read_json(*path):
    """{} where there is no such file."""
    path = Path(*path)
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_json(value, *path):
    path = Path(*path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), "utf-8")
