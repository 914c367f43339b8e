"""
Token files that keep the order of a run that has been: rows of input_ids with their steps.

    python data/order/prepare.py --input 'order/*.parquet' --tokenizer owner/name --out data/y
    python data/order/prepare.py --input 'out/x/*_ids.npy' --tokenizer data/x/tokenizer --out data/y

A .parquet and an MDS folder have the columns input_ids and step, an input_ids.npy its step.npy
beside it. Files are taken in the order of their steps. Training on --out takes the rows as they
stand, and wants the same max_seq_len and rows a step.
"""

import argparse
import os
import sys
from glob import glob

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from formats.mds import mds_folders, read_index, read_shard  # noqa: E402
from tokenizer import load_tokenizer, vocab_size_of  # noqa: E402
from tokens import write_meta, write_tokens  # noqa: E402


def parts_of(path):
    """Yield (input_ids [n, max_seq_len], step [n]) of a file, some rows at a time."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        if missing := {"input_ids", "step"} - set(file.schema_arrow.names):
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
        for batch in file.iter_batches(1024, columns=["input_ids", "step"]):
            rows = batch.to_pydict()
            yield rows_and_steps(path, rows["input_ids"], rows["step"])
    elif os.path.isdir(path):
        for shard in (shard for folder in mds_folders(path) for shard in read_index(folder)):
            samples = list(read_shard(shard, ["input_ids", "step"]))
            yield rows_and_steps(shard["path"], *zip(*samples))
    elif path.endswith("input_ids.npy"):
        ids = np.load(path, mmap_mode="r")
        steps = np.load(path.removesuffix("input_ids.npy") + "step.npy")
        if ids.ndim != 2 or steps.shape != ids.shape[:1]:
            raise ValueError(f"{path}: {ids.shape} ids and {steps.shape} steps, one a row expected")
        for i in range(0, len(ids), 1024):
            yield ids[i : i + 1024], steps[i : i + 1024]
    else:
        raise ValueError(f"{path}: expected a .parquet, an input_ids.npy or an MDS folder")


def rows_and_steps(path, rows, steps):
    if len(lengths := {len(row) for row in rows}) > 1:
        raise ValueError(f"{path}: rows of {sorted(lengths)} tokens, expected one length")
    return np.array(rows), np.array(steps)


def rows_of(paths, seen):
    """Yield each row [max_seq_len]. `seen` is filled with {"max_seq_len", "steps": {step: rows}}.
    ValueError where steps or lengths are not those that one run has."""
    starts = {}
    for path in paths:
        if not len(first := next(parts_of(path), ([], []))[1]):
            raise ValueError(f"{path}: no rows")
        starts[path] = first[0]
    for path in sorted(paths, key=starts.get):
        for ids, steps in parts_of(path):
            for row, step in zip(ids, steps.tolist()):
                length = seen.setdefault("max_seq_len", len(row))
                last = next(reversed(seen["steps"]), step)
                if len(row) != length:
                    raise ValueError(f"{path}: a row of {len(row)} tokens, the first has {length}")
                if step not in (last, last + 1):
                    raise ValueError(f"{path}: step {step} behind step {last}")
                seen["steps"][step] = seen["steps"].get(step, 0) + 1
                yield row


def documents(rows, first_id):
    """Yield the documents of each row: what begins with first_id (None: the whole row is one)."""
    for row in rows:
        cuts = np.flatnonzero(row == first_id) if first_id is not None else []
        yield from np.split(row, [i for i in cuts if i])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--tokenizer", required=True, help="folder, or owner/name on the hub")
    parser.add_argument("--out", required=True, help="folder for train.bin and so on")
    args = parser.parse_args()
    paths = [path for pattern in args.input for path in sorted(glob(pattern))]
    if not paths:
        raise SystemExit(f"{' '.join(args.input)}: no such file")
    tokenizer = load_tokenizer(args.tokenizer)
    ids = tokenizer("a")["input_ids"]
    first_id = ids[0] if ids[0] in tokenizer.all_special_ids else None
    os.makedirs(args.out, exist_ok=True)
    seen = {"steps": {}}
    docs = documents(rows_of(paths, seen), first_id)
    counts = write_tokens(args.out, "train", docs, vocab_size_of(tokenizer))
    per_step = set(seen["steps"].values())
    if len(per_step) > 1:
        raise SystemExit(f"steps of {sorted(per_step)} rows, expected one number")
    order = {"max_seq_len": seen["max_seq_len"], "rows_per_step": per_step.pop()}
    write_meta(args.out, tokenizer, args.tokenizer, {"train": counts}, order)
    print(f"{len(seen['steps']):,} steps of {order['rows_per_step']:,} rows of "
          f"{order['max_seq_len']:,} tokens, {counts['docs']:,} documents")  # fmt: skip
