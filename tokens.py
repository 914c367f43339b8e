"""
Token files, a folder that a data/<name>/prepare.py writes:

    train.bin val.bin   little-endian uint16 (vocabulary <= 65536) or uint32 ids, end to end
    train.idx val.idx   int64 starts of the documents, then the number of tokens
    train.rows val.rows int64 starts of rows of whole documents, then likewise; only where made so
    meta.json           dtype, vocabulary, tokenizer and its hash, special ids, counts
    tokenizer/          the tokenizer itself

A large train is in shards, each a file of its own: train_00000.bin and .idx, train_00001.bin, ...
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import require
from formats import read_json
from tokenizer import load_tokenizer, vocab_size_of


@dataclass(eq=False)  # a file is a key of mapped
class TokenFile:
    path: str  # of the .bin
    counts: dict  # "docs" and "tokens" in it, "rows" where it has rows of whole documents
    meta: dict  # of its folder

    @property
    def tokens(self):
        """[n_tokens] uint16 or uint32, mapped from the file as what follows."""
        return mapped(self, "bin")

    @property
    def starts(self):
        """[n_docs + 1] int64"""
        return mapped(self, "idx")

    def n_rows(self, row_size):
        return self.counts.get("rows", self.counts["tokens"] // row_size)


@lru_cache(256)  # a map holds a file open, and a process may often have no more than 1,024 of them
def mapped(file, kind):
    """The array in a TokenFile's .bin, .idx or .rows. ValueError for one of another size."""
    count = {"bin": "tokens", "idx": "docs", "rows": "rows"}[kind]
    n = file.counts[count] + (kind != "bin")  # n items have n + 1 starts
    dtype = np.dtype(file.meta["dtype"] if kind == "bin" else "int64").newbyteorder("<")
    path = file.path.removesuffix("bin") + kind
    size, expected = os.path.getsize(path), n * dtype.itemsize  # errors name the path
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, by {file.meta.where} it should have "
            f"{n} x {dtype.itemsize} = {expected}"
        )
    # asarray: a plain view of the map, which is much faster to slice than a np.memmap
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 65536 else "uint32"


def write_tokens(folder: str, split: str, docs, vocab_size: int) -> dict:
    """Write {split}.bin and .idx from `docs`, an iterable of id sequences, in constant memory.

    Files are renamed into place when whole. Returns {"docs": n, "tokens": n}, for `write_meta`.
    ValueError for a document without tokens or with an id outside the vocabulary.
    """
    path, idx_path = (os.path.join(folder, f"{split}.{kind}") for kind in ("bin", "idx"))
    dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
    n_docs = n_tokens = 0
    with open(path + ".tmp", "wb") as bin_file, open(idx_path + ".tmp", "wb") as idx_file:
        for ids in docs:
            ids = np.asarray(ids, np.int64)
            if not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
                got = f"ids {ids.min()}..{ids.max()}" if ids.size else "no tokens"
                raise ValueError(
                    f"{path}: document {n_docs} has {got}, expected some in 0..{vocab_size - 1}"
                )
            idx_file.write(n_tokens.to_bytes(8, "little"))
            bin_file.write(ids.astype(dtype).tobytes())
            n_docs, n_tokens = n_docs + 1, n_tokens + ids.size
        idx_file.write(n_tokens.to_bytes(8, "little"))
    for written in (path, idx_path):
        os.replace(written + ".tmp", written)
    return {"docs": n_docs, "tokens": n_tokens}


def write_meta(folder: str, tokenizer, name: str, splits: dict, order: dict | None = None):
    """Save the tokenizer in folder/tokenizer and then, as the sign of a whole folder, meta.json.

    `name` says where the tokenizer is from; `splits` is {split: what write_tokens returned}; order:
    {"max_seq_len", "rows_per_step"} where the rows are those of a run, in its order.
    """
    tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
    meta = _facts(tokenizer, folder) | {"tokenizer": name, "splits": splits}
    meta |= {"order": order} if order else {}
    path = os.path.join(folder, "meta.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=1)
    os.replace(path + ".tmp", path)


def _facts(tokenizer, folder):
    """What meta.json says of the tokenizer that is saved in folder/tokenizer."""
    saved = Path(folder, "tokenizer", "tokenizer.json").read_bytes()
    return dict(
        dtype=token_dtype(vocab_size_of(tokenizer)), vocab_size=vocab_size_of(tokenizer),
        tokenizer_sha256=hashlib.sha256(saved).hexdigest(),
        special_ids=sorted(tokenizer.all_special_ids), mask_id=tokenizer.mask_token_id,
    )  # fmt: skip


def tokenizer_of(folder: str):
    """The tokenizer of a folder of token files. ValueError where meta.json is of another."""
    path, meta = os.path.join(folder, "tokenizer"), read_json(folder, "meta.json")
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path}: no such folder, expected the data's tokenizer")
    tokenizer = load_tokenizer(path)
    for key, value in _facts(tokenizer, folder).items():
        if meta[key] not in (value, ""):  # "": unknown
            raise ValueError(f"{meta.where}: {key} is {meta[key]}, that of {path} is {value}")
    return tokenizer


def open_tokens(folder: str, split: str) -> TokenFile:
    """Open a split that is one file, as val is. Errors: as of open_shards."""
    files = open_shards(folder, split)
    if len(files) > 1:
        raise ValueError(f"{folder}: {split} is in {len(files)} shards, expected one file")
    return files[0]


def open_shards(folder: str, split: str) -> list[TokenFile]:
    """Open a split's files. FileNotFoundError or ValueError name the file and what was expected."""
    meta_path = os.path.join(folder, "meta.json")
    if not os.path.exists(meta_path):
        script = os.path.join(folder, "prepare.py")
        advice = f"run: python {script}" if os.path.exists(script) else "see data/*/prepare.py"
        raise FileNotFoundError(f"{meta_path} is missing, so there are no tokens to read; {advice}")
    meta = read_json(meta_path)
    for key, kind in {"dtype": str, "vocab_size": int, "splits": dict}.items():
        require(meta, key, kind, meta_path, 0)
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{meta_path}: dtype {meta['dtype']!r}, expected 'uint16' or 'uint32'")
    if split not in meta["splits"]:
        raise ValueError(f"{meta_path}: no split {split!r}, it has {', '.join(meta['splits'])}")
    counts = require(meta["splits"], split, dict, meta_path, 0)
    shards, files = {f"{split}.bin": counts}, []
    if "shards" in counts:
        shards = require(counts, "shards", [dict], meta_path, 0, filled=True)
        shards = {f"{split}_{i:05d}.bin": counts for i, counts in enumerate(shards)}
    for name, counts in shards.items():
        docs, tokens = (require(counts, key, int, meta_path, 0) for key in ("docs", "tokens"))
        files.append(file := TokenFile(os.path.join(folder, name), counts, meta))
        mapped(file, "bin")
        _check_starts(file, "idx", docs, tokens, tokens)
        if "rows" in counts:
            n = require(counts, "rows", int, meta_path, 0)
            _check_starts(file, "rows", n, tokens, require(meta, "row_tokens", int, meta_path, 0))
    return files


def _check_starts(file, kind, n, total, longest):
    """ValueError unless n + 1 numbers rise from 0 to total, in steps of at most `longest`."""
    path, starts = file.path.removesuffix("bin") + kind, mapped(file, kind)
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"{path}: starts run {starts[0]}..{starts[-1]}, expected 0..{total}")
    for i in range(0, n, 1 << 24):  # in parts: the starts of 1e9 documents are 8 GB
        lengths = np.diff(starts[i : i + (1 << 24) + 1])
        if lengths.min() <= 0 or lengths.max() > longest:
            n = i + ((lengths <= 0) | (lengths > longest)).argmax()
            raise ValueError(
                f"{path}: entries {n}, {n + 1} are {starts[n]}, {starts[n + 1]}, expected "
                f"increasing by at most {longest}"
            )


def read_row(file: TokenFile, row: int, row_size: int):
    """(ids int64 [n], lengths): a slice of the file, and its pieces of documents in order. n is
    row_size; a row of whole documents may have fewer tokens.

    A document that is cut by a row continues in the next one as a new one. ValueError for an id
    outside the vocabulary.
    """
    if not 0 <= row < file.n_rows(row_size):
        total = file.counts["tokens"]
        raise IndexError(
            f"{file.path}: no row {row} of {row_size} tokens, the file has {total} tokens"
        )
    start, end = row * row_size, (row + 1) * row_size
    if "rows" in file.counts:
        start, end = mapped(file, "rows")[row : row + 2]
    ids, vocab_size = file.tokens[start:end].astype(np.int64), file.meta["vocab_size"]
    if ids.max() >= vocab_size:
        raise ValueError(
            f"{file.path}: token {start + ids.argmax()} is {ids.max()}, expected less than "
            f"{vocab_size}"
        )
    starts = file.starts
    first = np.searchsorted(starts, start, side="right")
    last = np.searchsorted(starts, end, side="left")
    return ids, np.diff([start, *starts[first:last], end]).tolist()
