"""
Text and tokens on disk, and the order in which training sees them. Nothing here knows a model.

    make_seqs                                          where the texts of a packed row lie
    permuted, rows_of_step                             the seeded order of rows
    write_tokens, write_meta, open_tokens, read_row    token files
    load_tokenizer, check_tokenizer, fast_encode       tokenizers
    read_jsonl, require                                JSONL; complaints name file and line
    open_pairs, read_line, read_pair                   pairs for contrastive training
    join_spans, trim_span                              spans of characters, for token retrieval
    prefetch                                           read ahead in a thread

Token files are a folder that a data/<name>/prepare.py writes:

    train.bin val.bin   little-endian uint16 (vocabulary <= 65536) or uint32 ids, end to end
    train.idx val.idx   int64 starts of the documents, then the number of tokens
    meta.json           dtype, vocabulary, tokenizer and its hash, special ids, counts
    tokenizer/          the tokenizer itself
"""

import gzip
import hashlib
import json
import mmap
import os
import queue
import re
import threading
from dataclasses import dataclass

import numpy as np
import torch

# ---- packed rows ----


def make_seqs(lengths: list[int], device="cpu"):
    """A model.Seqs: where B texts of these lengths (in tokens) lie in a packed row of T tokens.

    Built on the CPU and moved once. cu_seqlens [B+1] int32; positions [T] int64, from 0 in each
    text. ValueError for an empty text.
    """
    from model import Seqs  # here: workers of a prepare.py start in half the time without models

    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row holds texts of at least 1 token, got lengths {lengths}")
    ends = np.cumsum([0, *lengths])  # [B+1]
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)  # [T]
    return Seqs(
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)).to(device, non_blocking=True),
        lengths=list(lengths),
        positions=torch.from_numpy(positions).to(device, non_blocking=True),
        max_seqlen=max(lengths),
    )


# ---- the seeded order ----


def mix(x):
    """A hash of each uint64 (the finalizer of splitmix64), of 63 bits: adding to it cannot wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def permuted(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The places of a permutation of 0..n-1, keyed by (seed, epoch): int64, shaped like `index`.

    A Feistel network: a number is two digits (a, b) of base ~sqrt(n), and each round adds to one of
    them a hash of the other. That can be undone, so it is a permutation. Digits can spell a little
    more than n; such numbers go through again until they fall below n ("cycle walking").
    No table is kept: 1e9 rows cost no more than ten, and any part can be asked for by itself.
    """
    index = np.asarray(index, np.int64)
    if index.size and not 0 <= index.min() <= index.max() < n:
        raise ValueError(f"indices {index.min()}..{index.max()} are not all in 0..{n - 1}")
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    base_a = np.uint64(np.ceil(np.sqrt(n)))
    base_b = np.uint64(-(-n // int(base_a)))

    def network(x):
        a, b = x // base_b, x % base_b
        for i in range(0, len(keys), 2):
            a = (a + mix(b ^ keys[i])) % base_a
            b = (b + mix(a ^ keys[i + 1])) % base_b
        return a * base_b + b

    out = network(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def rows_of_step(step: int, rows_per_step: int, n_rows: int, seed: int):
    """(epoch, row) of the global batch of `step`, which counts from 0: int64 [rows_per_step] each.

    The endless sequence is epoch 0's permutation of the rows, then epoch 1's, and so on; each step
    takes the next `rows_per_step`, and each rank its slice of them: any number of ranks, one order.
    """
    if n_rows < 1:
        raise ValueError("not one whole row of tokens: lower max_seq_len or prepare more text")
    position = step * rows_per_step + np.arange(rows_per_step, dtype=np.int64)
    epoch, row = np.divmod(position, n_rows)
    for e in range(int(epoch[0]), int(epoch[-1]) + 1):
        row[epoch == e] = permuted(row[epoch == e], n_rows, seed, e)
    return epoch, row


# ---- token files ----


@dataclass
class TokenFile:
    path: str  # of the .bin, for messages
    tokens: np.ndarray  # [n_tokens] uint16 or uint32, mapped from the file
    starts: np.ndarray  # [n_docs + 1] int64, likewise
    meta: dict


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 65536 else "uint32"


def write_tokens(folder: str, split: str, docs, vocab_size: int) -> dict:
    """Write {split}.bin and .idx from `docs`, an iterable of id sequences, in constant memory.

    Files are renamed into place when whole. Returns {"docs": n, "tokens": n}, for `write_meta`.
    ValueError for a document without tokens or with an id outside the vocabulary.
    """
    paths = [os.path.join(folder, f"{split}.{kind}") for kind in ("bin", "idx")]
    dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
    n_docs = n_tokens = 0
    with open(paths[0] + ".tmp", "wb") as bin_file, open(paths[1] + ".tmp", "wb") as idx_file:
        for ids in docs:
            ids = np.asarray(ids, np.int64)
            if not ids.size or ids.min() < 0 or ids.max() >= vocab_size:
                got = f"ids {ids.min()}..{ids.max()}" if ids.size else "no tokens"
                expected = f"expected some in 0..{vocab_size - 1}"
                raise ValueError(f"{paths[0]}: document {n_docs} has {got}, {expected}")
            idx_file.write(n_tokens.to_bytes(8, "little"))
            bin_file.write(ids.astype(dtype).tobytes())
            n_docs, n_tokens = n_docs + 1, n_tokens + ids.size
        idx_file.write(n_tokens.to_bytes(8, "little"))
    for path in paths:
        os.replace(path + ".tmp", path)
    return {"docs": n_docs, "tokens": n_tokens}


def write_meta(folder: str, tokenizer, name: str, splits: dict):
    """Save the tokenizer in folder/tokenizer and then, as the sign of a whole folder, meta.json.

    `name` says where the tokenizer is from; `splits` is {split: what write_tokens returned}.
    """
    tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
    with open(os.path.join(folder, "tokenizer", "tokenizer.json"), "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    meta = {
        "dtype": token_dtype(vocab_size_of(tokenizer)),
        "vocab_size": vocab_size_of(tokenizer),
        "tokenizer": name,
        "tokenizer_sha256": digest,
        "special_ids": sorted(tokenizer.all_special_ids),
        "mask_id": tokenizer.mask_token_id,
        "splits": splits,
    }
    path = os.path.join(folder, "meta.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(meta, f, indent=1)
    os.replace(path + ".tmp", path)


def open_tokens(folder: str, split: str) -> TokenFile:
    """Map a split's files. FileNotFoundError or ValueError name the file and what was expected."""
    meta_path = os.path.join(folder, "meta.json")
    if not os.path.exists(meta_path):
        script = os.path.join(folder, "prepare.py")
        how = f"run: python {script}" if os.path.exists(script) else "see data/*/prepare.py"
        raise FileNotFoundError(f"{meta_path} is missing, so there are no tokens to read; {how}")
    with open(meta_path, encoding="utf-8") as f:
        meta = json.load(f)
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{meta_path}: dtype {meta['dtype']!r}, expected 'uint16' or 'uint32'")
    if split not in meta["splits"]:
        raise ValueError(f"{meta_path}: no split {split!r}, it has {', '.join(meta['splits'])}")
    docs, total = meta["splits"][split]["docs"], meta["splits"][split]["tokens"]

    def mapped(path, dtype, expected):
        dtype = np.dtype(dtype).newbyteorder("<")
        size = os.path.getsize(path)  # FileNotFoundError names the path
        if size != expected * dtype.itemsize:
            numbers = f"{expected} x {dtype.itemsize} = {expected * dtype.itemsize}"
            raise ValueError(f"{path} has {size} bytes, by {meta_path} it should have {numbers}")
        # asarray: a plain view of the map, which is much faster to slice than a np.memmap
        return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)

    path, idx_path = (os.path.join(folder, f"{split}.{kind}") for kind in ("bin", "idx"))
    tokens, starts = mapped(path, meta["dtype"], total), mapped(idx_path, "int64", docs + 1)
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"{idx_path}: starts run {starts[0]}..{starts[-1]}, expected 0..{total}")
    for i in range(0, docs, 1 << 24):  # in parts: the starts of 1e9 documents are 8 GB
        part = starts[i : i + (1 << 24) + 1]
        if (wrong := np.flatnonzero(part[1:] <= part[:-1])).size:
            at = i + wrong[0] + 1
            pair = f"{starts[at - 1]}, {starts[at]}"
            raise ValueError(f"{idx_path}: entries {at - 1}, {at} are {pair}, expected increasing")
    return TokenFile(path, tokens, starts, meta)


def read_row(file: TokenFile, row: int, row_size: int):
    """(ids int64 [row_size], lengths): a slice of the file, and its pieces of documents in order.

    A document that is cut by a row continues in the next one as a new one. ValueError for an id
    outside the vocabulary.
    """
    start, end = row * row_size, (row + 1) * row_size
    if not 0 <= start <= end <= len(file.tokens):
        have = f"{len(file.tokens)} tokens"
        raise IndexError(f"{file.path}: no row {row} of {row_size} tokens, the file has {have}")
    ids = file.tokens[start:end].astype(np.int64)
    if ids.max() >= file.meta["vocab_size"]:
        got = f"token {start + ids.argmax()} is {ids.max()}"
        raise ValueError(f"{file.path}: {got}, expected less than {file.meta['vocab_size']}")
    first = np.searchsorted(file.starts, start, side="right")
    last = np.searchsorted(file.starts, end, side="left")
    borders = [start, *file.starts[first:last].tolist(), end]
    return ids, [b - a for a, b in zip(borders[:-1], borders[1:], strict=True)]


# ---- tokenizers ----


def load_tokenizer(path_or_name: str, revision: str | None = None):
    """A Hugging Face fast tokenizer, from a folder or the hub. In a folder of `Embedder.save` the
    template's suffix stands in the tokenizer's post-processor, for sentence-transformers: here it
    is as it was before, for who adds the suffix himself."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    is_path = path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") > 1
    if is_path and not os.path.isdir(path_or_name):
        raise FileNotFoundError(f"tokenizer {path_or_name}: no such folder; was it prepared?")
    tokenizer = AutoTokenizer.from_pretrained(path_or_name, revision=revision or "main")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {path_or_name} is a slow one; offsets need a tokenizer.json")
    saved = os.path.join(path_or_name, "nanoembed.json")
    if os.path.exists(saved):
        with open(saved, encoding="utf-8") as f:
            post_processor = json.load(f).get("post_processor")
        blank = json.loads(Tokenizer(models.BPE()).to_str()) | {"post_processor": post_processor}
        blank = Tokenizer.from_str(json.dumps(blank))
        tokenizer.backend_tokenizer.post_processor = blank.post_processor
    return tokenizer


def vocab_size_of(tokenizer) -> int:
    """The largest id + 1, which is more than len(tokenizer) where the ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(tokenizer, model_vocab_size: int):
    """ValueError where a tokenizer, or the meta of a TokenFile, has ids that the model has not."""
    needed = tokenizer["vocab_size"] if isinstance(tokenizer, dict) else vocab_size_of(tokenizer)
    if needed > model_vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {needed - 1}, the model's vocab_size is "
            f"{model_vocab_size}: take the model's own tokenizer, or a vocab_size >= {needed}"
        )


def fast_encode(tokenizer, verbose: bool = True):
    """A function from a list of texts to a list of lists of ids, specials included, for bulk work.

    Byte-level BPE runs in `tiktoken` where its ids are equal (see `tiktoken_for`), everything else
    in the tokenizer itself. Measured with GPT-2's vocabulary on 3 MB of speeches: the tokenizer
    4.5 MB/s on one core and 7.5 on two, tiktoken 34 on one; data/text/prepare.py gives each of its
    workers one.
    """

    def plain(texts):
        if not texts:
            return []
        # verbose: no warning about texts longer than the model; token files hold them whole
        call = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return tokenizer(texts, **call)["input_ids"]

    encoding, equal = tiktoken_for(tokenizer), False
    if encoding is not None:
        # What stands around any text; and which texts spell an added token: these are left to the
        # tokenizer, which has rules of its own for them (strip, single word). So are texts with
        # long runs of space: tiktoken's regular expression overflows its stack on enough of it.
        bare, full = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        head, tail = full[:at], full[at + len(bare) :]
        added = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
        spells = re.compile("|".join(added) or "(?!)").search
        blank = re.compile(r"\s{1000}").search
        normalizer = tokenizer.backend_tokenizer.normalizer  # None or NFC, which keeps ASCII

        def fast(texts):
            left = [bool(spells(text) or blank(text)) for text in texts]
            slow = iter(plain([text for text, is_left in zip(texts, left, strict=True) if is_left]))
            ids = []
            for text, is_left in zip(texts, left, strict=True):
                if normalizer and not text.isascii():
                    text = normalizer.normalize_str(text)
                ids.append(
                    next(slow) if is_left else [*head, *encoding.encode_ordinary(text), *tail]
                )
            return ids

        equal = fast(PROBES) == plain(PROBES)
    if verbose:
        print("tokenizing with", "tiktoken" if equal else "the tokenizer itself (not tiktoken)")
    return fast if equal else plain


# Texts that tell two byte-level tokenizers apart: all kinds of space, digits, contractions, code,
# scripts, joined emoji, spelled special tokens, long runs, every character of the basic plane.
PROBES = [
    *("", " ", "  ", "\n", "\t\t x", "a  b   c\n\n\n  d \r\n e\xa0\u2003\u3000f\x85g\u180eh\x1ci "),
    "I'll they've we're it's don't I'M HE'LL 'tis ''s it\u2019s x'y O'Reilly's -- (a).b; c... $5%",
    "1 12 123 1234 12345678901234567890 3.14e-10 1,000,000 0x1F \u0663\u0664 \xbd\xb2 \u2167",
    "def f(x: int = 3, *a) -> str:\n\treturn f'{x!r:>10}'  # why?\n\n    if x != y: x <<= 2;",
    "na\xefve cafe\u0301 \u1e9b\u0323 \ufb01 \u212b \u0130 \u01c5 \u4f60\u597d\u3002\u3053\uc548",
    "\u041f\u0440 \u0645\u0631 \u0928\u092e\u0947 \u0e01\u0e34 \u2764\ufe0f \U0001f468\u200d\u2640",
    "[CLS] [SEP][MASK] [PAD] <s></s> <|endoftext|> <|im_start|>user <mask> <|begin_of_text|>",
    "a" * 3000 + " " * 900 + "\n" * 300 + "!?" * 300 + "12" * 300 + "aB" * 300 + "\U0010ffff\0",
    "".join(f"{chr(c)}a{chr(c)} {chr(c)}" for c in range(0x10000) if not 0xD800 <= c < 0xE000),
]


def tiktoken_for(tokenizer):
    """A tiktoken.Encoding that merges like this tokenizer's byte-level BPE; None where none does.

    Both merge first the pair that stands earliest in a list. tiktoken's list is the vocabulary: it
    joins any two tokens that spell a third, in the order of ids. The results are equal where (1)
    the merges make tokens in the order of their ids and (2) each token, spelled out, merges back to
    itself. For then, once all earlier merges are done, its spelling has become the two halves of
    its own merge; as that does not depend on the text around, no other two tokens that spell it are
    ever neighbours. How text is cut into words before is a regular expression, run by another
    library: for that, `fast_encode` compares ids on PROBES.
    """
    try:
        import tiktoken
        from tokenizers import Tokenizer
    except ImportError:
        return None
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, cut = spec["model"], spec["pre_tokenizer"] or {}
    cut = cut.get("pretokenizers", [cut])
    if bpe["type"] != "BPE" or cut[-1].get("type") != "ByteLevel" or cut[-1]["add_prefix_space"]:
        return None
    if bpe["dropout"] or bpe["continuing_subword_prefix"] or bpe["end_of_word_suffix"]:
        return None
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if len(cut) == 1 and cut[0]["use_regex"]:  # GPT-2's
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    elif len(cut) == 2 and "Regex" in cut[0].get("pattern", {}) and not cut[1]["use_regex"]:
        pattern = cut[0]["pattern"]["Regex"]
    else:
        return None

    added = {token["content"] for token in spec["added_tokens"]}
    vocab = {token: i for token, i in bpe["vocab"].items() if token not in added}
    merges = [m if isinstance(m, list) else m.split(" ") for m in bpe["merges"]]
    made = [vocab.get(a + b, -1) for a, b in merges]
    bpe["ignore_merges"] = False  # Llama 3 first looks a whole word up, as tiktoken always does
    merge = Tokenizer.from_str(json.dumps(spec)).model.tokenize
    # GPT-2's spelling of bytes: printable Latin-1 is itself, the others are moved to 256 and on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    if made != sorted(made) or not byte_of.keys() <= vocab.keys():
        return None
    if any(len(merge(token)) != 1 for token in vocab):
        return None
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}
    return tiktoken.Encoding("bulk", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# ---- JSONL ----


def read_jsonl(path: str):
    """Yield (line number from 1, dict) for each line of a file, which may be a .gz; blank lines are
    passed over."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise ValueError(f"{path} line {number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise ValueError(f"{path} line {number}: a {kind}, expected an object: {{...}}")
            yield number, record


_SURROGATE = re.compile("[\ud800-\udfff]")


def require(record: dict, field: str, kind, path: str, line: int):
    """record[field], checked. `kind` is str, int, float (takes ints), bool, list, or [str] and such
    for a list of them. ValueError names file, line and field, and what was expected."""
    one = kind[0] if isinstance(kind, list) else kind
    expected = f"list of {one.__name__}" if isinstance(kind, list) else one.__name__
    if field not in record:
        raise ValueError(f"{path} line {line}: field '{field}' is missing (expected {expected})")
    value = record[field]
    values = value if isinstance(kind, list) else [value]
    types = (int, float) if one is float else (one,)
    # type(x), not isinstance: True is no int here
    good = isinstance(values, list) and all(type(x) in types for x in values)
    if good and one is str and any(_SURROGATE.search(x) for x in values):
        raise ValueError(f"{path} line {line}: field '{field}' has half a character (a surrogate)")
    if not good:
        shown = repr(value)[:60]
        raise ValueError(f"{path} line {line}: field '{field}' is {shown} (expected {expected})")
    return value


# ---- pairs ----


@dataclass
class PairFile:
    """A JSONL file of pairs whose lines are read when they are asked for: len(file), read_pair."""

    path: str
    text: object  # the mapped bytes
    starts: np.ndarray  # [n] int64, where each line that is not blank begins
    numbers: np.ndarray  # [n] int64, its line number from 1, for messages

    def __len__(self):
        return len(self.starts)


def open_pairs(path: str) -> PairFile:
    """Index a JSONL file: 16 bytes of memory a line. ValueError for a file without lines."""
    starts, at = [], 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                starts.append((at, number))
            at += len(line)
        if not starts:
            raise ValueError(f"{path}: there is no line in it, expected JSONL")
        text = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return PairFile(path, text, *np.array(starts, dtype=np.int64).T)


def read_line(file: PairFile, i: int) -> tuple[dict, int]:
    """(the object of the i-th line, its line number). ValueError where it is none."""
    start, line = int(file.starts[i]), int(file.numbers[i])
    end = file.text.find(b"\n", start)
    raw = file.text[start : end if end >= 0 else len(file.text)]
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{file.path} line {line}: not JSON: {error}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"{file.path} line {line}: a {kind}, expected an object: {{...}}")
    return record, line


def read_pair(file: PairFile, i: int) -> dict:
    """{"query": str, "pos": [str, ..], "neg": [str, ..], "pos_scores", "neg_scores": [float, ..] or
    None, "prompt": str or None} of the i-th line, from any of the three forms:

        {"query", "pos": [..], "neg": [..], "pos_scores": [..], "neg_scores": [..], "prompt"}
        {"query" or "anchor", "positive", "negative"}    one of each, the negative may be missing
        {"text"}                                         SimCSE: its own positive

    ValueError names file, line and field.
    """
    record, line = read_line(file, i)

    def get(field, kind, default=None):
        missing = default is not None and record.get(field) is None
        return default if missing else require(record, field, kind, file.path, line)

    if "text" in record:
        query, pos, neg = get("text", str), [get("text", str)], []
    elif "positive" in record:
        query = get("anchor" if "anchor" in record else "query", str)
        pos = [get("positive", str)]
        neg = [get("negative", str)] if record.get("negative") is not None else []
    else:
        query, pos, neg = get("query", str), get("pos", [str]), get("neg", [str], [])
    if not pos:
        raise ValueError(f"{file.path} line {line}: field 'pos' is empty, expected a text or more")
    scores = {}
    for field, texts in (("pos_scores", pos), ("neg_scores", neg)):
        scores[field] = get(field, [float], []) or None
        if scores[field] and len(scores[field]) != len(texts):
            raise ValueError(
                f"{file.path} line {line}: field '{field}' has {len(scores[field])} numbers for "
                f"{len(texts)} texts"
            )
    prompt = get("prompt", str, "") or None
    return {"query": query, "pos": pos, "neg": neg, "prompt": prompt} | scores


def is_held_out(query: str, share: float) -> bool:
    """By a hash: a query that comes twice is on one side both times."""
    digest = hashlib.sha256(query.encode("utf-8", "replace")).hexdigest()
    return int(digest[:8], 16) < share * 2**32


# ---- spans ----


def join_spans(spans) -> list[list[int]]:
    """[start, end) spans in order; those that overlap or touch become one."""
    out = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


def trim_span(text: str, span) -> list[int]:
    """A span of `text` without the spaces at its ends."""
    start, end = span
    inside = text[start:end]
    return [start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())]


# ---- reading ahead ----


def prefetch(iterable, depth: int = 2):
    """Yield from `iterable`, which a thread runs up to `depth` items ahead.

    Its exceptions are raised here. The thread ends with it, or when the consumer stops.
    """
    ready, room, stop = queue.SimpleQueue(), threading.Semaphore(depth), threading.Event()

    def work():
        iterator = iter(iterable)
        try:
            while True:
                room.acquire()
                if stop.is_set():
                    return
                ready.put((next(iterator), None))
        except BaseException as error:  # StopIteration too: it is the end
            ready.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
        thread.join()
