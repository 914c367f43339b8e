"""
Streams: training on texts as they are, tokenized on the way, without token files.

    data="stream:corpus/*.jsonl,more/**/*.parquet"    files that formats/texts.py reads
    data="stream:corpus/*.jsonl#body"                 where the field or column is not "text"
    data="hf:owner/name:config"                       a data set of the hub, not stored; or a folder

The corpus is cut into parts, and read in L lanes. The parts form an endless sequence, each epoch a
permutation keyed by (seed, epoch); lane l takes those at l, l + L, l + 2L .. of it. The documents
of a part come in blocks, each shuffled by a generator keyed by (seed, epoch, part, block). A lane
is one endless text of tokens that is cut into rows, and row i of the run is the next one of lane
i mod L: the order does not depend on the number of ranks. Where a lane is are three numbers, its
place: the position of its part in the sequence, the group of documents in the part, and the tokens
of this group that are taken. A checkpoint holds them; the rest is made again from the files.
"""

import hashlib
import json
import math
from itertools import chain, count, islice
from types import SimpleNamespace

import numpy as np

from checkpoint import hash_samples
from formats.huggingface import resolve_folder
from formats.texts import eval_split_of, parts_of_dataset, parts_of_files, texts_of
from formats.tiktoken_bpe import fast_encode
from order import permuted, shares_of
from token_rows import Rows
from tokenizer import load_tokenizer, vocab_size_of
from tokens import token_dtype

MAX_LANES = 64  # a power of 2, as the number of ranks often is: each holds lanes of its own then
PART_BYTES = 4 << 20
BLOCK = 1024, 1 << 20  # documents that are shuffled together, or fewer with as many characters
GROUP = 32, 1 << 16  # documents that are tokenized together, or fewer with as many characters
HELD_OUT = 1 << 22  # at most so many characters of documents are evaluated on


def open_stream(s, chunks=False):
    """-> (Rows of the texts to evaluate on, which are in memory, and the tokenizer). Adds to the
    settings s.stream: the parts to train on, the number of lanes, encode(texts), rows_of_steps,
    what checkpoint.find calls as fingerprint(data), and {step: the places of the lanes before it}.
    SystemExit or ValueError for what cannot be streamed.

    The texts to evaluate on are those of the data set's own split for it, or else the first ones,
    which no run trains on: whether and how often a run is evaluated does not change its order."""
    if s.num_epochs is not None:
        raise SystemExit(f"num_epochs={s.num_epochs}: nobody knows how long a stream is, give "
                         "max_steps or max_tokens")  # fmt: skip
    if not s.tokenizer and s.init_from == "scratch":
        raise SystemExit(f"{s.data}: a stream needs a tokenizer, a folder or an id of the hub")
    tokenizer = load_tokenizer(s.tokenizer or resolve_folder(s.init_from))
    parts, eval_parts = parts_of(s.data)
    held_out = take(chain.from_iterable(map(documents_of, eval_parts)), s.eval_docs, HELD_OUT)
    first, parts = split_off(parts, 0 if held_out else s.eval_docs, HELD_OUT, s.data)
    encode = fast_encode(tokenizer, verbose=s.rank == 0)
    docs = [ids for ids in encode(held_out or first) if ids]
    s.stream = SimpleNamespace(
        parts=parts, encode=encode, n_lanes=2 ** (min(len(parts), MAX_LANES).bit_length() - 1),
        fingerprint=lambda data: fingerprint(parts, tokenizer), lanes={}, chunks=chunks,
        rows_of_steps=rows_of_steps,
    )  # fmt: skip
    vocab_size, n_tokens = vocab_size_of(tokenizer), sum(map(len, docs))
    n_rows = n_tokens // s.max_seq_len
    meta = {"dtype": token_dtype(vocab_size), "vocab_size": vocab_size,
            "splits": ["val"] if docs else [], "mask_id": tokenizer.mask_token_id,
            "special_ids": tokenizer.all_special_ids}
    file = SimpleNamespace(  # what a TokenFile has
        path=s.data, meta=meta, counts={"docs": len(docs), "tokens": n_tokens},
        tokens=np.fromiter(chain.from_iterable(docs), np.int64),
        starts=np.cumsum([0, *map(len, docs)]), n_rows=lambda row_size: n_rows,
    )  # fmt: skip
    return Rows(
        [file], firsts=np.array([0, n_rows]), row_size=s.max_seq_len, weights={s.data: 1.0},
        metas=[meta], n_rows=[n_rows], shares=shares_of([1.0]), chunks=chunks,
    ), tokenizer  # fmt: skip


# ---- parts and documents ----


def parts_of(data):
    """-> the parts of a stream, and those of the data set's own split to evaluate on, or []."""
    kind, _, name = data.partition(":")
    name, _, field = name.partition("#")
    field, patterns = field or "text", [pattern.strip() for pattern in name.split(",")]
    if not all(patterns):
        raise ValueError(f"data={data!r}: expected stream:PATTERN or hf:NAME")
    if kind == "stream":
        return parts_of_files(patterns, field, part_bytes=PART_BYTES), []
    name, _, config = name.partition(":")
    splits = ["train", eval_split_of(name, config or None, "train")]
    train, held_out = (
        parts_of_dataset(name, config or None, split, field, streaming=True) if split else []
        for split in splits
    )
    return train, held_out


def documents_of(part):
    """The texts of a part that are not blank, without those that are held out. ValueError for ids,
    which MDS folders may have."""

    def texts():
        for text in texts_of(part):
            if not isinstance(text, str):
                raise ValueError(f"{part['path']}: '{part['field']}' has token ids, and a stream "
                                 "takes texts; data/text/prepare.py takes both")  # fmt: skip
            if text.strip():
                yield text

    return islice(texts(), part.get("held_out", 0), None)


def take(texts, n, n_characters):
    """The next n of an iterator of texts, or fewer that have n_characters together."""
    taken = []
    while len(taken) < n and n_characters > 0 and (text := next(texts, None)):
        taken.append(text)
        n_characters -= len(text)
    return taken


def split_off(parts, n, n_characters, data):
    """-> the first documents, as `take` takes them, and the parts without them. ValueError where
    nothing is left."""
    taken = []
    for i, part in enumerate(parts):
        documents = documents_of(part)
        found = take(documents, n - len(taken), n_characters - sum(map(len, taken)))
        taken += found
        if next(documents, None):
            return taken, [{**part, "held_out": len(found)}, *parts[i + 1 :]]
    raise ValueError(f"{data} has {len(taken):,} documents that are not blank: eval_docs={n} keeps "
                     "the first for evaluation, and none is left to train on")  # fmt: skip


def groups_of(part, seed):
    """The documents of a part in their shuffled order, a group at a time."""
    documents = documents_of(part)
    for number in count():
        if not (block := take(documents, *BLOCK)):
            return
        order = np.random.default_rng((*seed, number)).permutation(len(block))
        shuffled = (block[i] for i in order)
        while group := take(shuffled, *GROUP):
            yield group


def fingerprint(parts, tokenizer):
    """Of what a stream gives: its parts, their size, samples of the files or what `datasets` says
    of their version, and the tokenizer. Not of paths: a corpus may move."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for part in parts:
        facts = {key: part[key] for key in sorted(part.keys() - {"path", "changed", "shard"})}
        digest.update(json.dumps(facts).encode())
    if parts[0]["kind"] == "hub":
        from datasets import load_dataset_builder

        digest.update(load_dataset_builder(parts[0]["path"], parts[0]["config"]).hash.encode())
    else:  # each file once, in their order
        hash_samples(digest, list(dict.fromkeys(part["path"] for part in parts)))
    return f"{len(parts):,} parts with sha256 {digest.hexdigest()[:16]}"


# ---- lanes and rows ----


def rows_of_lane(lane, place, s):
    """Yield without end (ids int64 [max_seq_len], lengths of the texts in it, the place behind it):
    the rows of a lane from a place on."""
    stream, n, chunks = s.stream, s.max_seq_len, s.stream.chunks
    pieces, room = [], n
    first, first_group, at = map(int, place)
    for position in count(first, stream.n_lanes):
        epoch, part = divmod(position, len(stream.parts))
        part = int(permuted([part], len(stream.parts), s.seed, epoch)[0])
        for group, texts in enumerate(groups_of(stream.parts[part], (s.seed, epoch, part))):
            if position == first and group < first_group:
                continue
            docs = stream.encode(texts)
            ids = np.fromiter(chain.from_iterable(docs), np.int64)
            for end in np.cumsum([len(doc) for doc in docs]):
                while at < end:
                    pieces.append(ids[at : min(at + room, end)])
                    at, room = at + len(pieces[-1]), room - len(pieces[-1])
                    if room == 0:
                        lengths = [n] if chunks else [*map(len, pieces)]
                        yield np.concatenate(pieces), lengths, (position, group, at)
                        pieces, room = [], n
            at = 0


def rows_of_steps(first_step, s):
    """Yield for each step the rows of this rank, ((0, number), ids, lengths) each, and note in
    s.stream.lanes where the lanes are behind them: place [L, 3], -1 for lanes of other ranks."""
    lanes, n_lanes = s.stream.lanes, s.stream.n_lanes
    n_shares = math.gcd(s.world_size, n_lanes)  # a rank makes the rows of lanes that it needs
    mine = np.arange(s.rank % n_shares, n_lanes, n_shares)
    begin = [[lane, 0, 0] for lane in range(n_lanes)]
    places = np.full((n_lanes, 3), -1)
    places[mine] = np.reshape(lanes.get(first_step, begin), (n_lanes, 3))[mine]
    lanes[first_step] = places
    readers = {int(lane): rows_of_lane(lane, places[lane], s) for lane in mine}
    for step in range(first_step, s.stop_step):
        rows, places = [], places.copy()
        for number in range(step * s.rows_per_step, (step + 1) * s.rows_per_step):
            if (lane := number % n_lanes) in readers:
                ids, lengths, places[lane] = next(readers[lane])
                if number % s.world_size == s.rank:
                    rows.append(((0, number), ids, lengths))
        lanes[step + 1] = places
        lanes.pop(step - 8, None)  # what is read ahead is less
        yield rows
