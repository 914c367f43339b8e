"""
Pairs and triplets in the form that sentence-transformers uses, from the hub or from local files.

    python data/st_triplets/prepare.py --dataset sentence-transformers/all-nli --config triplet \\
        --out data/st_triplets/all-nli.jsonl
    python data/st_triplets/prepare.py --input 'mine/*.jsonl' --columns question,answer \\
        --out data/st_triplets/mine.jsonl --val_share 0.01

Columns are read in their order, as sentence-transformers does: anchor, positive, negatives. A cell
is a text or a list of texts. Rows of the older form {"set": [anchor, positive]} and
{"set": {"query", "pos", "neg"}} are read, too. Constant memory. See readme.md.
"""

import argparse
import glob
import json
import os
import sys

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from data import is_held_out, read_jsonl, require  # noqa: E402

NO_TEXTS = ("score", "scores", "label", "labels")  # columns that sentence-transformers passes over


def rows_of(args):
    """(file or data set, line or row from 1, record) of the whole input."""
    if args.input:
        for pattern in args.input:
            paths = sorted(glob.glob(pattern, recursive=True))
            if not paths:
                raise FileNotFoundError(f"--input {pattern}: there is no such file")
            for path in paths:
                for number, record in read_jsonl(path):
                    yield path, number, record
    else:
        from datasets import load_dataset

        rows = load_dataset(args.dataset, args.config, split=args.split, streaming=True)
        for number, record in enumerate(rows, 1):
            yield args.dataset, number, record


def unpacked(record: dict) -> dict:
    """A row of the older form, as columns."""
    inner = record.get("set")
    if isinstance(inner, list):
        return {f"set[{i}]": text for i, text in enumerate(inner)}
    return inner if isinstance(inner, dict) else record


def texts_of(record: dict, column: str, path: str, line: int) -> list[str]:
    if isinstance(record.get(column), list):
        return require(record, column, [str], path, line)
    return [require(record, column, str, path, line)]


def pair_of(record: dict, columns: list[str], path: str, line: int) -> dict | None:
    """Our line; None without an anchor or a positive. ValueError names file, line and field."""
    query = require(record, columns[0], str, path, line)
    pos = [t for t in texts_of(record, columns[1], path, line) if t.strip()]
    neg = [t for column in columns[2:] for t in texts_of(record, column, path, line) if t.strip()]
    pos, neg = list(dict.fromkeys(pos)), list(dict.fromkeys(neg))  # each text once
    neg = [text for text in neg if text not in pos]
    return {"query": query, "pos": pos, "neg": neg} if query.strip() and pos else None


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", help="JSONL files or patterns")
    add("--dataset", help="name on the hub, or a local folder that `datasets` can read")
    add("--config", help="of the data set: pair, triplet, triplet-hard, ..")
    add("--split", default="train")
    add("--columns", help="anchor,positive,negative,..: names, where their order is another")
    add("--min_score", type=float, help="leave out rows whose column 'score' is less")
    add("--max_rows", type=int, help="read no more than these")
    add("--out", required=True, help="the .jsonl to write")
    add("--val_share", type=float, default=0.0, help="of the rows, by query, for OUT.val.jsonl")
    args = parser.parse_args(argv)
    if (args.input is None) == (args.dataset is None):
        raise SystemExit("give one of --input and --dataset")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    paths = [args.out, args.out.removesuffix(".jsonl") + ".val.jsonl"]
    columns = args.columns.split(",") if args.columns else None
    lines, empty, low = [0, 0], 0, 0
    with open(paths[0] + ".tmp", "wb") as train, open(paths[1] + ".tmp", "wb") as val:
        for path, number, record in tqdm(rows_of(args), "rows", args.max_rows, unit=" rows"):
            record = unpacked(record)
            if columns is None:
                columns = [name for name in record if name not in NO_TEXTS]
            if len(columns) < 2:
                raise ValueError(f"{path} line {number}: columns {columns}, expected 2 or more")
            if args.min_score and require(record, "score", float, path, number) < args.min_score:
                low += 1
            elif (pair := pair_of(record, columns, path, number)) is None:
                empty += 1
            else:
                if not sum(lines):
                    print(f"anchor, positive, negatives are columns {', '.join(columns)}")
                to = is_held_out(pair["query"], args.val_share)
                text = json.dumps(pair, ensure_ascii=False) + "\n"
                (train, val)[to].write(text.encode("utf-8", "replace"))
                lines[to] += 1
            if sum(lines) + empty + low == args.max_rows:
                break
    os.replace(paths[0] + ".tmp", paths[0])
    if lines[1]:
        os.replace(paths[1] + ".tmp", paths[1])
    else:
        os.remove(paths[1] + ".tmp")
    for path, n in zip(paths, lines, strict=True):
        if n:
            print(f"{path}: {n:,} lines")
    print(f"left out: {empty:,} without anchor or positive, {low:,} below --min_score")


if __name__ == "__main__":
    main()
