"""
MS MARCO with hard negatives, from the data of bge-multilingual-gemma2: for AceRAG's first stage.

    python data/bge_msmarco/prepare.py                         # from the hub, streamed
    python data/bge_msmarco/prepare.py --input 'msmarco/*.jsonl'

Rows {"query", "pos": [..], "neg": [..], "pos_scores"?, "neg_scores"?, "prompt"?, "type"?} become
our pairs: texts that come twice are dropped, above all positives among the negatives. Written
beside this file (or in --out): train.jsonl and val.jsonl, see readme.md. Constant memory.
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

        rows = load_dataset(args.dataset, args.config, split="train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield args.dataset, number, record


def pair_of(record: dict, path: str, line: int, separator: str, counts: dict) -> dict | None:
    """Our line, or None without a query or a positive. ValueError names file, line and field."""
    query = require(record, "query", str, path, line)
    pair = {"query": query}
    seen = {""}
    for side in ("pos", "neg"):
        given = record.get(side) is not None
        texts = require(record, side, [str], path, line) if given or side == "pos" else []
        scores = record.get(f"{side}_scores")
        if scores:
            require(record, f"{side}_scores", [float], path, line)
            if len(scores) != len(texts):
                raise ValueError(
                    f"{path} line {line}: field '{side}_scores' has {len(scores)} numbers for "
                    f"{len(texts)} texts"
                )
        kept = []
        for i, text in enumerate(texts):
            if text.strip() in seen:
                counts[f"{side} dropped"] += 1
            else:
                kept.append(i)
                seen.add(text.strip())
        pair[side] = [texts[i] for i in kept]
        if scores:
            pair[f"{side}_scores"] = [scores[i] for i in kept]
    if record.get("prompt"):
        pair["prompt"] = require(record, "prompt", str, path, line) + separator
    return pair if query.strip() and pair["pos"] else None


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", help="JSONL files or patterns; without it the data set is streamed")
    add("--dataset", default="hanhainebula/bge-multilingual-gemma2-data", help="hub name or folder")
    add("--config", default="en_msmarco", help='of the data set; "default" for a local folder')
    add("--out", default=HERE, help="folder for train.jsonl and val.jsonl")
    add("--separator", default="\n", help="between a row's prompt, where it has one, and the query")
    add("--val_share", type=float, default=0.002, help="of the rows, by query, for val.jsonl")
    args = parser.parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    paths = [os.path.join(args.out, f"{split}.jsonl") for split in ("train", "val")]
    counts = {"empty": 0, "pos dropped": 0, "neg dropped": 0}
    lines, negatives = [0, 0], 0
    with open(paths[0] + ".tmp", "wb") as train, open(paths[1] + ".tmp", "wb") as val:
        for path, number, record in tqdm(rows_of(args), "rows", unit=" rows"):
            pair = pair_of(record, path, number, args.separator, counts)
            if pair is None:
                counts["empty"] += 1
                continue
            to = is_held_out(pair["query"], args.val_share)
            text = json.dumps(pair, ensure_ascii=False) + "\n"
            (train, val)[to].write(text.encode("utf-8", "replace"))
            lines[to] += 1
            negatives += len(pair["neg"])
    for path in paths:
        os.replace(path + ".tmp", path)
    print(f"train.jsonl {lines[0]:,} lines, val.jsonl {lines[1]:,}")
    print(f"{sum(lines):,} lines in all. Expected: 486K (the figure of AceRAG)")
    print(f"{negatives / max(sum(lines), 1):.1f} negatives a query")
    print(", ".join(f"{what}: {n:,}" for what, n in counts.items()))


if __name__ == "__main__":
    main()
