"""
Token files from any text: local .txt, .jsonl and .parquet files, or a data set of the hub.

    python data/text/prepare.py --input 'corpus/*.jsonl' --tokenizer data/pydocs/tokenizer \\
        --out data/corpus
    python data/text/prepare.py --dataset HuggingFaceFW/fineweb-edu --config sample-10BT \\
        --tokenizer gpt2 --out data/fineweb --workers 16

Three passes. (1) The input is planned as parts of about 32 MB, or 50,000 rows. (2) Workers tokenize
parts, each into a shard of its own; a shard that is there is not made again, so a run that was
killed goes on when it is started again. (3) Documents are gathered from the shards in one seeded
permutation. Neither the result nor its order depends on the number of workers. Memory: about 1 MB
of text in a worker, about 64M tokens in pass 3. Disk: the tokens twice, until the end. Pass 3 reads
at random: fast on an SSD, or where the shards fit the page cache.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from formats.texts import eval_split_of, parts_of_dataset, parts_of_files, texts_of  # noqa: E402
from formats.tiktoken_bpe import fast_encode  # noqa: E402
from order import permuted  # noqa: E402
from tokenizer import load_tokenizer, vocab_size_of  # noqa: E402
from tokens import write_meta, write_tokens  # noqa: E402

GATHER_TOKENS = 64 << 20


# ---- pass 1: the plan, a list of parts that say where their texts are ----


def plan_of(args):
    """-> [(split, part)]."""
    if args.input:
        return [("train", part) for part in parts_of_files(args.input, args.field, args.txt)]
    splits, held_out = {"train": args.split}, eval_split_of(args.dataset, args.config, args.split)
    if held_out and args.val_docs:
        print(f"val is the data set's own split {held_out!r}")
        splits["val"] = held_out
    return [
        (split, part)
        for split, name in splits.items()
        for part in parts_of_dataset(args.dataset, args.config, name, args.field, args.streaming)
    ]


# ---- pass 2: tokens of a part ----


def set_up(args, parent: int | None):
    """Once a process: the tokenizer; in a worker also a watch, so that it ends with `parent`."""
    global encode, vocab_size

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
    tokenizer = load_tokenizer(args.tokenizer)
    encode = fast_encode(tokenizer, verbose=parent is None)
    vocab_size = vocab_size_of(tokenizer)
    return tokenizer


def make_shard(folder: str, number: int, part: dict):
    """Tokenize a part. The .json with its counts comes last: it says that the shard is whole."""
    empty = 0

    def docs():
        nonlocal empty
        texts, size = [], 0
        for text in texts_of(part):
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
    """Yield the ids of documents first..last-1 of a permutation of the documents in `shards`, which
    are (number, counts)."""
    ends = np.cumsum([counts["docs"] for _, counts in shards])
    tokens_a_doc = sum(counts["tokens"] for _, counts in shards) / ends[-1]
    block = max(1, int(GATHER_TOKENS / tokens_a_doc))  # documents
    for start in range(first, last, block):
        doc = permuted(np.arange(start, min(start + block, last)), int(ends[-1]), seed, 0)
        order = np.argsort(doc)  # they are read in the order of the files
        shard = np.searchsorted(ends, doc[order], side="right")
        out = [None] * len(doc)
        for s in np.unique(shard):
            number, counts = shards[s]
            path = os.path.join(folder, f"{number:06d}")
            tokens = np.memmap(path + ".bin", "<u2" if vocab_size <= 65536 else "<u4", "r")
            starts = np.memmap(path + ".idx", "<i8", "r")
            for place in order[shard == s]:
                i = doc[place] - (ends[s] - counts["docs"])
                out[place] = np.array(tokens[starts[i] : starts[i + 1]])
        yield from out


# ---- all three ----


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", help="files or patterns (** too): .txt, .jsonl, .parquet")
    add("--txt", choices=["blank", "line"], default="blank", help="what ends a document in a .txt")
    add("--dataset", help="name on the hub, or a local folder that `datasets` can read")
    add("--config", help="of the data set")
    add("--split", default="train", help='of the data set; "train[:1%%]" works')
    add("--streaming", action="store_true", help="read the data set without storing it")
    add("--field", default="text", help="where the text is in JSON, in columns")
    add("--tokenizer", required=True, help="folder, or owner/name[@revision] on the hub")
    add("--out", required=True, help="folder for train.bin and so on")
    add("--val_docs", type=int, default=1000, help="documents for val.bin; 0: none")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--seed", type=int, default=0, help="of the order of documents")
    return parser.parse_args(argv)


def main(args):
    if (args.input is None) == (args.dataset is None):
        raise SystemExit("give one of --input and --dataset")
    if args.workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core for each worker
    tokenizer = set_up(args, None)
    splits_of, parts = zip(*plan_of(args), strict=True)

    # shards that an earlier run has left are good if it had the same plan
    folder = os.path.join(args.out, "shards")
    os.makedirs(folder, exist_ok=True)
    plan = json.dumps([tokenizer.backend_tokenizer.to_str(), splits_of, parts])
    plan = hashlib.sha256(plan.encode()).hexdigest()
    plan_path = os.path.join(folder, "plan.txt")
    if os.path.exists(plan_path):
        with open(plan_path) as f:
            if f.read() != plan:
                raise SystemExit(f"{folder} is of a run with other input or settings: remove it")
    with open(plan_path, "w") as f:
        f.write(plan)
    paths = [os.path.join(folder, f"{i:06d}.json") for i in range(len(parts))]
    todo = [i for i in range(len(parts)) if not os.path.exists(paths[i])]
    if len(todo) < len(parts):
        print(f"{len(parts) - len(todo)} of {len(parts)} shards are there already")

    with tqdm(total=len(parts), initial=len(parts) - len(todo), unit="shard") as bar:
        if args.workers == 1:
            for i in todo:
                make_shard(folder, i, parts[i])
                bar.update()
        else:
            # spawn: threads of the libraries in this process do not survive a fork
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(args.workers, context, set_up, (args, os.getpid()))
            try:
                made = [pool.submit(make_shard, folder, i, parts[i]) for i in todo]
                for future in as_completed(made):
                    future.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)

    shards = {"train": [], "val": []}
    empty = 0
    for i, path in enumerate(paths):
        with open(path) as f:
            counts = json.load(f)
        shards[splits_of[i]].append((i, counts))
        empty += counts["empty"]
    n_docs = {split: sum(c["docs"] for _, c in shards[split]) for split in shards}
    if shards["val"]:
        plans = {"train": ("train", 0, n_docs["train"])}
        plans["val"] = ("val", 0, min(args.val_docs, n_docs["val"]))
    else:  # the first documents of the permutation are kept from training
        plans = {"train": ("train", args.val_docs, n_docs["train"])}
        plans["val"] = ("train", 0, args.val_docs)
    if n_docs["train"] <= plans["train"][1]:
        counts = f"{n_docs['train']} documents, {args.val_docs} of them for val"
        raise SystemExit(f"{counts}: none is left for training")
    splits = {}
    for split, (source, first, last) in plans.items():
        if last > first:
            docs = gathered(folder, shards[source], first, last, args.seed)
            docs = tqdm(docs, f"writing {split}", last - first, unit="doc")
            splits[split] = write_tokens(args.out, split, docs, vocab_size)
    write_meta(args.out, tokenizer, args.tokenizer, splits)
    shutil.rmtree(folder)
    for split, counts in splits.items():
        print(f"{split}: {counts['docs']:,} documents, {counts['tokens']:,} tokens")
    print(f"{empty:,} empty documents were left out")


if __name__ == "__main__":
    main(arguments())
