"""
Token files from any text: local .txt, .jsonl and .parquet files, or a data set of the hub.

    python data/text/prepare.py --input 'corpus/*.jsonl' --tokenizer data/pydocs/tokenizer \\
        --out data/corpus
    python data/text/prepare.py --dataset HuggingFaceFW/fineweb-edu --config sample-10BT \\
        --tokenizer gpt2 --out data/fineweb --workers 16

Three passes. (1) The input is planned as parts of about 32 MB, or 50,000 rows. (2) Workers tokenize
parts, each into a shard of its own; a shard that is there is not made again, so a run that was
killed goes on when it is started again. (3) Documents are gathered from the shards in one seeded
permutation. Neither the result nor its order depends on the number of workers. Memory: one part's
documents in a worker; in pass 3 about 64M tokens at a time. Disk: the tokens twice, until the end.
Pass 3 reads at random: fast on an SSD or where the shards fit the page cache.
"""

import argparse
import glob
import hashlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project, for data.py
from data import (  # noqa: E402
    fast_encode,
    load_tokenizer,
    permuted,
    read_jsonl,
    require,
    token_dtype,
    vocab_size_of,
    write_meta,
    write_tokens,
)

PART_BYTES = 32 << 20
PART_ROWS = 50_000
GATHER_TOKENS = 64 << 20
EVAL_SPLITS = ("validation", "valid", "val", "eval", "test", "dev")  # the first that a data set has


# ---- pass 1: the plan, a list of parts that say where their texts are ----


def plan_of_files(patterns: list[str], txt: str) -> list[dict]:
    parts = []
    for pattern in patterns:
        paths = sorted(glob.glob(pattern, recursive=True)) or [pattern]
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"--input {pattern}: there is no such file")
            kind = os.path.splitext(path)[1][1:]
            if kind == "parquet":
                import pyarrow.parquet as parquet

                groups = parquet.ParquetFile(path).metadata.num_row_groups
                borders = range(groups + 1)
            elif kind in ("txt", "jsonl"):
                borders = cuts_of(path, blank_line=kind == "txt" and txt == "blank")
            else:
                raise ValueError(f"{path}: expected a .txt, .jsonl or .parquet file")
            stat = {"size": os.path.getsize(path), "changed": os.stat(path).st_mtime_ns}
            for start, end in zip(borders[:-1], borders[1:], strict=True):
                where = {"kind": kind, "path": path, "start": start, "end": end}
                parts.append({"split": "train", **where, **stat})
    return parts


def cuts_of(path: str, blank_line: bool) -> list[int]:
    """Byte offsets that cut a file about every PART_BYTES, after a line or after a blank line."""
    cuts, size = [0], os.path.getsize(path)
    with open(path, "rb") as f:
        while cuts[-1] + PART_BYTES < size:
            f.seek(cuts[-1] + PART_BYTES)
            line = f.readline()  # the rest of one
            while blank_line and line:
                line = f.readline()
                if not line.strip():
                    break
            cuts.append(f.tell())
    return [*cuts, size] if cuts[-1] < size else cuts


def hub_dataset(args, split: str):
    from datasets import load_dataset

    return load_dataset(args.dataset, args.config, split=split, streaming=args.streaming)


def plan_of_dataset(args) -> list[dict]:
    from datasets import get_dataset_split_names

    names = get_dataset_split_names(args.dataset, args.config)
    own = args.split.split("[")[0]  # of "train[:1%]"
    if own not in names:
        raise ValueError(f"{args.dataset} has no split {own!r}, only {', '.join(names)}")
    held_out = next((name for name in EVAL_SPLITS if name in names and name != own), None)
    wanted = {"train": args.split}
    if held_out and args.val_docs:
        print(f"val is the data set's own split {held_out!r}")
        wanted["val"] = held_out
    parts = []
    for split, name in wanted.items():
        dataset = hub_dataset(args, name)
        if args.streaming:  # cut by its files
            borders = range(dataset.num_shards + 1)
        else:
            borders = [*range(0, len(dataset), PART_ROWS), len(dataset)]
        for start, end in zip(borders[:-1], borders[1:], strict=True):
            of = {"kind": "hub", "hub_split": name, "start": start, "end": end}
            parts.append({"split": split, **of, "shards": borders[-1]})
    return parts


# ---- pass 2: tokens of a part ----


def texts_of(part: dict, args):
    """Yield the texts of a part. ValueError names the file and line of what is not one."""
    if part["kind"] == "hub":
        dataset = hub_dataset(args, part["hub_split"])
        if args.streaming:
            dataset = dataset.shard(part["shards"], part["start"])
        else:
            dataset = dataset.select(range(part["start"], part["end"]))
        for row in dataset:
            yield require(row, args.field, str, f"{args.dataset} {part['hub_split']}", part["start"])
    elif part["kind"] == "parquet":
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(part["path"])
        if args.field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{part['path']}: no column '{args.field}', it has {names}")
        for batch in file.iter_batches(1024, [part["start"]], [args.field]):
            for i, text in enumerate(batch.column(0).to_pylist()):
                if not isinstance(text, str):
                    where = f"row {i} of a batch in row group {part['start']}"
                    raise ValueError(f"{part['path']}, {where}: {text!r:.60} is not a text")
                yield text
    else:
        with open(part["path"], "rb") as f:
            f.seek(part["start"])
            blank = part["kind"] == "txt" and args.txt == "blank"
            text = b""
            while f.tell() < part["end"]:
                line = f.readline()
                if blank and line.strip():
                    text += line
                    continue
                yield decoded(text if blank else line, part, args)
                text = b""
            if text:
                yield decoded(text, part, args)


def decoded(line: bytes, part: dict, args) -> str:
    if part["kind"] == "txt":
        try:
            return line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{part['path']}: not UTF-8: {error}, in {line[:60]!r}") from None
    if not line.strip():
        return ""
    try:
        return require(json.loads(line), args.field, str, "", 0)
    except (ValueError, TypeError) as error:
        # A part does not know its line numbers: find the broken line from the top of the file.
        for number, record in read_jsonl(part["path"]):
            require(record, args.field, str, part["path"], number)
        raise error


def set_up(args, parent: int):
    """Once a worker: the tokenizer, and a watch on the parent, so that no worker outlives it."""
    global encode, vocab_size, settings

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if parent:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
        threading.Thread(target=watch, daemon=True).start()
    tokenizer = load_tokenizer(args.tokenizer, args.revision)
    encode, vocab_size, settings = fast_encode(tokenizer, verbose=False), vocab_size_of(tokenizer), args


def make_shard(folder: str, number: int, part: dict):
    """Tokenize a part into shard files; the .json with its counts comes last and says it is whole."""
    empty = 0

    def docs():
        nonlocal empty
        texts, size = [], 0
        for text in texts_of(part, settings):
            if not text.strip():
                empty += 1
                continue
            texts.append(text)
            size += len(text)
            if size > 1 << 20:
                yield from encode(texts)
                texts, size = [], 0
        yield from encode(texts)

    counts = write_tokens(folder, f"{number:06d}", docs(), vocab_size)
    path = os.path.join(folder, f"{number:06d}.json")
    with open(path + ".tmp", "w") as f:
        json.dump({**counts, "empty": empty}, f)
    os.replace(path + ".tmp", path)


# ---- pass 3: documents in a seeded order ----


def gathered(folder: str, shards: list[tuple[int, dict]], first: int, last: int, seed: int):
    """Yield documents first..last-1 of a permutation of all documents in `shards` [(number, counts)]."""
    ends = np.cumsum([counts["docs"] for _, counts in shards])
    n_docs, n_tokens = int(ends[-1]), sum(counts["tokens"] for _, counts in shards)
    block = max(1, GATHER_TOKENS * n_docs // n_tokens)  # documents
    for start in range(first, last, block):
        doc = permuted(np.arange(start, min(start + block, last)), n_docs, seed, 0)
        order = np.argsort(doc)  # read in the order of the shards, give in the order of the permutation
        shard = np.searchsorted(ends, doc[order], side="right")
        out = [None] * len(doc)
        for s in np.unique(shard):
            name = os.path.join(folder, f"{shards[s][0]:06d}")
            tokens = np.memmap(name + ".bin", token_dtype(vocab_size), "r")
            starts = np.memmap(name + ".idx", "int64", "r")
            base = ends[s] - shards[s][1]["docs"]
            for place in order[shard == s]:
                i = doc[place] - base
                out[place] = np.array(tokens[starts[i] : starts[i + 1]])
        yield from out


# ----


def main(args):
    if (args.input is None) == (args.dataset is None):
        raise SystemExit("give one of --input and --dataset")
    tokenizer = load_tokenizer(args.tokenizer, args.revision)
    fast_encode(tokenizer)  # says which way it goes
    parts = plan_of_dataset(args) if args.dataset else plan_of_files(args.input, args.txt)

    # The shards of an earlier run are good where it had the same plan.
    folder = os.path.join(args.out, "shards")
    os.makedirs(folder, exist_ok=True)
    text = json.dumps({"vocab": tokenizer.backend_tokenizer.to_str(), "field": args.field, "txt": args.txt,
                       "dataset": [args.dataset, args.config], "parts": parts}, sort_keys=True)
    plan, path = hashlib.sha256(text.encode()).hexdigest(), os.path.join(folder, "plan")
    if os.path.exists(path) and open(path).read() != plan:
        raise SystemExit(f"{folder} is of a run with other input or settings: remove it, or take another --out")
    with open(path, "w") as f:
        f.write(plan)
    names = [os.path.join(folder, f"{i:06d}.json") for i in range(len(parts))]
    todo = [i for i, name in enumerate(names) if not os.path.exists(name)]
    if len(todo) < len(parts):
        print(f"{len(parts) - len(todo)} of {len(parts)} shards are there already")

    bar = tqdm(total=len(parts), initial=len(parts) - len(todo), desc="tokenizing", unit="shard")
    if args.workers == 1:
        set_up(args, 0)
        for i in todo:
            make_shard(folder, i, parts[i])
            bar.update()
    bar.close()
