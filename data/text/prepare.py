"""
Token files from any text: local .txt, .jsonl and .parquet files, MDS folders, or a data set of the
hub; one train.bin, or shards of about --shard_tokens each.

    python data/text/prepare.py --input 'corpus/*.jsonl' --tokenizer data/pydocs/tokenizer \\
        --out data/corpus
    python data/text/prepare.py --dataset HuggingFaceFW/fineweb-edu --config sample-10BT \\
        --tokenizer gpt2 --out data/fineweb --workers 16

Three passes. (1) The input is planned as parts of about 32 MB, or 50,000 rows. (2) Workers tokenize
parts; each document gets a random key, a hash of (seed, part, place in the part), and those of a
part are written sorted by it. (3) Workers write the shards, each a range of keys, which is one
slice of every part, sorted in memory. So the order of the corpus is that of the keys: it depends
neither on the number of workers nor on that of shards. What is finished is not made again: a run
that was killed goes on when it is started again. Time is linear in the corpus. Memory of a worker:
in pass 2 at most 128M tokens, in pass 3 a shard. Disk: the tokens twice, until the end.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from bisect import bisect, insort
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from formats.texts import eval_split_of, parts_of_dataset, parts_of_files, texts_of  # noqa: E402
from formats.tiktoken_bpe import fast_encode  # noqa: E402
from order import mix  # noqa: E402
from tokenizer import load_tokenizer, vocab_size_of  # noqa: E402
from tokens import token_dtype, write_meta, write_tokens  # noqa: E402

RUN_TOKENS = 128 << 20  # a run is what pass 2 sorts at once: at most about so many tokens
# Large corpora have some parts in a run, so that the slices that pass 3 reads of them stay long.
MAX_RUNS = 4096
KEY_END = 1 << 63  # keys are below, see order.mix
PACK_DOCS = 1000  # documents that wait to be packed into rows
RESULT = re.compile(r"(train|val)(_\d{5})?\.(bin|idx|rows)")


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


# ---- pass 2: tokens of parts, sorted by key ----


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


def ids_of(part: dict):
    """Yield the ids of each document of a part, none for a blank one."""

    def encoded(texts):
        return (ids if text else [] for text, ids in zip(texts, encode(texts)))

    texts, size = [], 0
    for text in texts_of(part):
        if not isinstance(text, str):  # ids already
            if text.size and not 0 <= text.min() <= text.max() < vocab_size:
                found = f"ids {text.min()}..{text.max()}, expected some in 0..{vocab_size - 1}"
                raise ValueError(f"{part['path']}: a document has {found}: another tokenizer?")
            yield text.ravel()
            continue
        texts.append(text if text.strip() else "")
        size += len(text)
        if size > 1 << 20:
            yield from encoded(texts)
            texts, size = [], 0
    yield from encoded(texts)


def make_runs(folder: str, name: str, parts: list, args):
    """Write {name}.0.bin, .idx and .key, and {name}.1.bin and so on where there is too much for one
    run: the documents of `parts`, [(number, part)], each run sorted by key; and {name}.left, the
    keys of those that are too short or too long, sorted."""
    counts = {"runs": 0, "docs": 0, "tokens": 0, "empty": 0, "short": 0, "long": 0}
    dtype, docs, seeds, left, n_tokens = token_dtype(vocab_size), [], [], [], 0

    def write_run():
        keys, run = mix(np.array(seeds, np.uint64)), f"{name}.{counts['runs']}"
        order = np.argsort(keys, kind="stable")
        written = write_tokens(folder, run, (docs[i] for i in order), vocab_size)
        write_whole(os.path.join(folder, run + ".key"), keys[order].astype("<u8"))
        for key, n in {"runs": 1, **written}.items():
            counts[key] += n

    for number, part in parts:
        first = int(np.random.SeedSequence([args.seed, number]).generate_state(1, np.uint64)[0])
        for place, ids in enumerate(ids_of(part)):
            n, key_seed = len(ids), (first + place) % 2**64
            if not n or n < args.min_tokens or n > args.max_tokens > 0:
                counts["long" if n > args.min_tokens else "short" if n else "empty"] += 1
                left += [key_seed] if n else []
                continue
            docs.append(np.asarray(ids, dtype))
            seeds.append(key_seed)
            n_tokens += n
            if n_tokens >= RUN_TOKENS:
                write_run()
                docs, seeds, n_tokens = [], [], 0
    if docs:
        write_run()
    keys = np.sort(mix(np.array(left, np.uint64)))
    write_whole(os.path.join(folder, name + ".left"), keys.astype("<u8"))
    return counts


# ---- pass 3: documents in the order of their keys ----


def key_at(folder: str, names: list[str], n: int) -> int:
    """The n-th smallest key, from 0, in all these files; KEY_END where they are fewer."""
    paths = [os.path.join(folder, name) for name in names]
    keys = np.sort(np.concatenate([np.fromfile(path, "<u8", n + 1) for path in paths]))
    return int(keys[n]) if n < len(keys) else KEY_END


def make_shard(folder: str, name: str, runs: list[str], first: int, end: int, args):
    """Write {name}.bin and .idx, with --whole also .rows: documents with keys in first..end-1."""
    keys, docs, dtype = [], [], np.dtype(token_dtype(vocab_size)).newbyteorder("<")
    for run in runs:
        path = os.path.join(folder, run)
        run_keys = np.memmap(path + ".key", "<u8", "r")
        a, b = np.searchsorted(run_keys, np.array([first, end], np.uint64)).tolist()
        keys.append(np.array(run_keys[a:b]))
        starts = np.fromfile(path + ".idx", "<i8", b - a + 1, offset=8 * a).tolist()
        size, offset = starts[-1] - starts[0], starts[0] * dtype.itemsize
        tokens = np.fromfile(path + ".bin", dtype, size, offset=offset)
        docs += [tokens[i - starts[0] : j - starts[0]] for i, j in zip(starts[:-1], starts[1:])]
    docs = [docs[i] for i in np.argsort(np.concatenate(keys), kind="stable")]
    if not args.whole:
        return write_tokens(folder, name, docs, vocab_size)
    docs = [doc[i : i + args.whole] for doc in docs for i in range(0, len(doc), args.whole)]
    rows = list(packed([len(doc) for doc in docs], args.whole))
    borders = np.cumsum([0, *(sum(len(docs[i]) for i in row) for row in rows)])
    write_whole(os.path.join(folder, name + ".rows"), borders.astype("<i8"))
    counts = write_tokens(folder, name, (docs[i] for row in rows for i in row), vocab_size)
    return {**counts, "rows": len(rows)}


def packed(lengths: list[int], row_tokens: int):
    """Yield rows, lists of places in `lengths` that sum to at most row_tokens. A row begins with
    the document that has waited longest, and takes of PACK_DOCS the longest that still fits, again
    and again (best fit)."""
    waiting, coming = [], 0  # [(length, place)] sorted, the next place
    is_packed = [False] * len(lengths)
    for first, length in enumerate(lengths):
        while coming < len(lengths) and len(waiting) < PACK_DOCS:
            insort(waiting, (lengths[coming], coming))
            coming += 1
        if is_packed[first]:
            continue
        del waiting[bisect(waiting, (length, first)) - 1]
        row, room = [first], row_tokens - length
        while n := bisect(waiting, (room, len(lengths))):  # so many fit
            length, place = waiting.pop(n - 1)
            row.append(place)
            is_packed[place], room = True, room - length
        yield row


# ---- all three ----


def write_whole(path: str, data):
    tmp = f"{path}.tmp{os.getpid()}"
    with open(tmp, "wb") as f:
        f.write(data)
    os.replace(tmp, path)


def is_other(path: str, digest: bytes) -> bool:
    """Whether an earlier run has noted other settings there."""
    if not os.path.exists(path):
        return False
    with open(path, "rb") as f:
        return f.read() != digest


def digest_of(settings: list) -> bytes:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest().encode()


def make(function, folder: str, name: str, *args):
    """A task of a pass -> seconds of CPU. The .json comes last: it says that all is whole."""
    start = time.process_time()
    counts = function(folder, name, *args)
    write_whole(os.path.join(folder, name + ".json"), json.dumps(counts).encode())
    return time.process_time() - start


def run_pass(what: str, pool, function, folder: str, tasks: dict, args) -> dict:
    """Do {name: arguments of function} where it has not been done. -> {name: its counts}."""
    paths = {name: os.path.join(folder, name + ".json") for name in tasks}
    todo = {name: task for name, task in tasks.items() if not os.path.exists(paths[name])}
    if len(todo) < len(tasks):
        print(f"{len(tasks) - len(todo)} of {len(tasks)} {what} are there already")
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc=what, unit="") as bar:
        calls, seconds = [(function, folder, name, *task, args) for name, task in todo.items()], 0.0
        if args.workers == 1:
            for call in calls:
                seconds += make(*call)
                bar.update()
        else:
            try:
                for future in as_completed([pool.submit(make, *call) for call in calls]):
                    seconds += future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    counts = {}
    for name, path in paths.items():
        with open(path) as f:
            counts[name] = json.load(f)
    if todo:
        n = sum(counts[name]["tokens"] for name in todo)
        print(f"{what}: {n:,} tokens, {n / max(seconds, 0.001):,.0f} a second of a core")
    return counts


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", help="patterns (** too): .txt, .jsonl, .parquet, MDS folders")
    add("--txt", choices=["blank", "line"], default="blank", help="what ends a document in a .txt")
    add("--dataset", help="name on the hub, or a local folder that `datasets` can read")
    add("--config", help="of the data set")
    add("--split", default="train", help='of the data set; "train[:1%%]" works')
    add("--streaming", action="store_true", help="read the data set without storing it")
    add("--field", default="text", help="where the text is in JSON, in columns; in MDS also ids")
    add("--tokenizer", required=True, help="folder, or owner/name[@revision] on the hub")
    add("--out", required=True, help="folder for train.bin and so on")
    add("--val_docs", type=int, default=1000, help="documents for val.bin; 0: none")
    add("--min_tokens", type=int, default=0, help="leave out documents of fewer")
    add("--max_tokens", type=int, default=0, help="leave out documents of more; 0: none")
    add("--whole", type=int, default=0, help="rows of whole documents, of at most so many tokens")
    add("--shard_tokens", type=int, default=100_000_000, help="of a train_00000.bin, about")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--seed", type=int, default=0, help="of the order of documents")
    args = parser.parse_args(argv)
    least_of = {"workers": 1, "shard_tokens": 1, "val_docs": 0, "whole": 0, "seed": 0}
    for name, least in least_of.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected {least} or more")
    return args


def main(args):
    if (args.input is None) == (args.dataset is None):
        raise SystemExit("give one of --input and --dataset")
    if args.workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core for each worker
    tokenizer, plan = set_up(args, None), plan_of(args)
    # spawn: threads of the libraries in this process do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, context, set_up, (args, os.getpid()))

    # what an earlier run has left is good if it had the same plan
    folder = os.path.join(args.out, "parts")
    shutil.rmtree(folder + ".done", ignore_errors=True)
    os.makedirs(folder, exist_ok=True)
    of_parts, of_shards = (os.path.join(folder, f"{what}.plan") for what in ("parts", "shards"))
    settings = [args.seed, args.min_tokens, args.max_tokens]
    digest = digest_of([*settings, tokenizer.backend_tokenizer.to_str(), plan])
    if is_other(of_parts, digest):
        raise SystemExit(f"{folder} is of a run with other input or settings: remove it")
    write_whole(of_parts, digest)
    digest = digest_of([args.val_docs, args.whole, args.shard_tokens])
    if is_other(of_shards, digest):  # the parts stay good
        for name in os.listdir(folder):
            if name.startswith(("train", "val")):
                os.remove(os.path.join(folder, name))
    write_whole(of_shards, digest)

    tasks, names, group = {}, {"train": {}, "val": {}}, -(-len(plan) // MAX_RUNS)
    for number, (split, part) in enumerate(plan):
        name = names[split].setdefault(number // group, f"{number:06d}")
        tasks.setdefault(name, ([],))[0].append((number, part))
    made = run_pass("parts", pool, make_runs, folder, tasks, args)
    parts = {split: {name: made[name] for name in names[split].values()} for split in names}
    runs = {s: [f"{n}.{i}" for n, c in parts[s].items() for i in range(c["runs"])] for s in parts}
    n_docs, n_tokens = (sum(c[key] for c in parts["train"].values()) for key in ("docs", "tokens"))

    # val is the documents with the smallest keys: of the data set's own split, or of all. Those
    # that are left out count, too: what is val in one set is train in none that differs in length.
    source, first = "val" if parts["val"] else "train", 0
    tasks, reserved = {}, args.val_docs if source == "train" else 0
    if n_docs <= reserved:
        raise SystemExit(f"{n_docs} documents, and --val_docs {reserved} are kept for val: none is "
                         "left for training. Run it again with fewer")  # fmt: skip
    if args.val_docs and runs[source]:
        keys = [f"{run}.key" for run in runs[source]] + [f"{name}.left" for name in parts[source]]
        end = key_at(folder, keys, args.val_docs)
        tasks["val"], first = (runs[source], 0, end), end if reserved else 0
    # 32 documents or more in a shard on average, so that none is empty
    n = max(1, min(-(-n_tokens // args.shard_tokens), n_docs // 32))
    borders = [first + (KEY_END - first) * i // n for i in range(n + 1)]
    train = [f"train_{i:05d}" for i in range(n)] if n > 1 else ["train"]
    tasks |= {name: (runs["train"], *borders[i : i + 2]) for i, name in enumerate(train)}
    counts = run_pass("shards", pool, make_shard, folder, tasks, args)
    pool.shutdown()

    if os.path.exists(meta := os.path.join(args.out, "meta.json")):
        os.remove(meta)  # an earlier result is no longer whole
    kinds = ["bin", "idx", "rows"] if args.whole else ["bin", "idx"]
    if "val" in counts and not counts["val"]["docs"]:
        del counts["val"]
        print("no document is left for val")
    names = {f"{name}.{kind}" for name in counts for kind in kinds}
    for name in names:  # those that a killed run has moved are there already
        if os.path.exists(path := os.path.join(folder, name)):
            os.replace(path, os.path.join(args.out, name))
    for name in set(os.listdir(args.out)) - names:
        if RESULT.fullmatch(name):  # of an earlier result with more shards
            os.remove(os.path.join(args.out, name))
    shards = [counts[name] for name in train]
    splits = {"train": {key: sum(c[key] for c in shards) for key in shards[0]}}
    splits["train"] |= {"shards": shards} if n > 1 else {}
    splits |= {"val": counts["val"]} if "val" in counts else {}
    write_meta(args.out, tokenizer, args.tokenizer, splits, row_tokens=args.whole)
    os.replace(folder, folder + ".done")  # a half removed one must not look like a run to go on
    shutil.rmtree(folder + ".done")
    for split, of in splits.items():
        shards = f" in {n} shards" if "shards" in of else ""
        print(f"{split}: {of['docs']:,} documents, {of['tokens']:,} tokens{shards}")
        if args.whole:
            print(f"  {of['rows']:,} rows, {of['tokens'] / of['rows'] / args.whole:.1%} full")
    empty, short, long = (sum(c[key] for c in made.values()) for key in ("empty", "short", "long"))
    print(f"{empty:,} empty, {short:,} short and {long:,} long documents were left out")


if __name__ == "__main__":
    main(arguments())
