"""data.py, tokens.py, data/pydocs and data/text."""

import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import order
import pairs
import tokens
from attention import make_seqs
from conftest import ROOT
from formats.mds import read_index, read_shard
from formats.texts import parts_of_files, texts_of
from formats.tiktoken_bpe import fast_encode, tiktoken_for
from harness import execute, raises, read_jsonl, script, write_jsonl
from tokenizer import check_tokenizer, load_tokenizer

pydocs, text = script("data/pydocs/prepare.py"), script("data/text/prepare.py")


@pytest.fixture(scope="module")
def tokenizer():
    return pydocs.train_tokenizer([doc["body"] for doc in pydocs.topics()[:20]])


# ---- packed rows, order ----
def test_make_seqs():
    seqs = make_seqs([3, 1, 4])
    assert seqs.cu_seqlens.tolist() == [0, 3, 4, 8] and seqs.cu_seqlens.dtype == torch.int32
    assert seqs.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert seqs.positions.dtype == torch.int64
    assert seqs.lengths == [3, 1, 4] and seqs.max_seqlen == 4
    raises(ValueError, r"at least 1 token.*\[2, 0\]", make_seqs, [2, 0])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_permutation_is_a_bijection(n):
    orders = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        places = order.permuted(np.arange(n), n, seed, epoch)
        assert sorted(places.tolist()) == list(range(n))
        orders.add(tuple(places.tolist()))
    assert len(orders) == 9 if n > 60 else len(orders) > 1 or n == 1


def test_permutation_is_even():
    n, epochs = 7, 4000
    places = np.zeros((n, n))
    for epoch in range(epochs):
        places[np.arange(n), order.permuted(np.arange(n), n, 5, epoch)] += 1
    # 36 degrees of freedom: chi-square is 36 on average and above 80 once in 30,000 times
    assert ((places - epochs / n) ** 2 / (epochs / n)).sum() < 80


def test_permutation_of_many_rows_in_parts():
    n, index = 1_700_000_000, np.array([1_699_999_999, 0, 12345])
    whole = order.permuted(index, n, 0, 0)
    assert ((0 <= whole) & (whole < n)).all()
    assert [order.permuted(index[i : i + 1], n, 0, 0)[0] for i in range(3)] == whole.tolist()
    raises(ValueError, "not all in 0..6", order.permuted, np.array([7]), 7, 0, 0)


def test_order_is_endless_without_replacement_and_the_same_for_any_batch():
    n_rows, total, sequences = 10, 60, []
    for size in (1, 4, 6, 20, 60):
        steps = [order.rows_of_step(step, size, n_rows, 3) for step in range(total // size)]
        sequences.append(np.concatenate(steps, axis=1).tolist())
    assert all(sequence == sequences[0] for sequence in sequences)
    epoch, row = np.array(sequences[0]).reshape(2, 6, n_rows)
    assert (epoch == np.arange(6)[:, None]).all() and (np.sort(row) == np.arange(n_rows)).all()
    assert len({tuple(places) for places in row.tolist()}) == 6
    raises(ValueError, "not one whole row", order.rows_of_step, 0, 4, 0, 3)


def test_each_step_reads_the_next_batch_of_one_file(tmp_path):
    sizes = (7, 30, 11)
    files = [data.open_pairs(write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "x"}] * n))
             for n in sizes]  # fmt: skip
    choices = pairs.choose_files(files, 60, 1.0, 5)
    drawn = [[], [], []]  # of each file
    for step in range(60):
        which, lines = pairs.lines_of_step(files, step, choices, 8, 5)
        assert which == choices[step] and len(lines) == 8
        drawn[which] += lines
    for which, (n, lines) in enumerate(zip(sizes, drawn, strict=True)):
        epochs, rows = order.rows_of_step(0, len(lines), n, 5 + which)  # a seed of its own
        assert lines == list(zip(epochs.tolist(), rows.tolist(), strict=True))
    assert len(drawn[1]) > len(drawn[2]) > len(drawn[0]) > 0  # by their number of lines
    runs = [pairs.lines_of_step([files[1]], step, np.zeros(9, int), 8, 5, 4) for step in range(7)]
    runs = np.array([lines for _, lines in runs]).reshape(14, 4, 2)  # two epochs of 7 runs of 4
    assert (np.diff(runs[..., 1]) % 30 == 1).all() and (runs[..., 0] == [[0]] * 7 + [[1]] * 7).all()
    assert all(len(np.unique(epoch[..., 1])) == 28 for epoch in np.split(runs, 2))
    even = pairs.choose_files(files, 3000, 0.0, 5)
    assert all(900 < n < 1100 for n in np.bincount(even))


# ---- token files ----
def write_folder(folder, docs, vocab_size=100, split="train"):
    counts = tokens.write_tokens(str(folder), split, docs, vocab_size)
    meta = {"dtype": tokens.token_dtype(vocab_size), "vocab_size": vocab_size}
    (folder / "meta.json").write_text(json.dumps({**meta, "splits": {split: counts}}))


def test_read_row_equals_a_walk_over_documents(tmp_path):
    rng = random.Random(0)
    lengths = [1, 1, 8, 30, 7, 1, 16, *(rng.randint(1, 20) for _ in range(200))]
    docs = [[rng.randrange(100) for _ in range(n)] for n in lengths]
    write_folder(tmp_path, docs)
    file = tokens.open_tokens(str(tmp_path), "train")
    walk = [(token, d) for d, doc in enumerate(docs) for token in doc]
    for size in (1, 8, 13, 100):
        rows = [walk[i : i + size] for i in range(0, len(walk) - size + 1, size)]
        for i, row in enumerate(rows):
            ids, lengths = tokens.read_row(file, i, size)
            assert ids.dtype == np.int64 and ids.tolist() == [token for token, _ in row]
            pieces = itertools.groupby(row, lambda pair: pair[1])
            assert lengths == [len(list(piece)) for _, piece in pieces]
        raises(IndexError, "train.bin", tokens.read_row, file, len(rows), size)


@pytest.mark.parametrize("vocab_size, bytes_each", [(65536, 2), (65537, 4)])
def test_ids_use_all_of_their_type(tmp_path, vocab_size, bytes_each):
    write_folder(tmp_path, [[0, vocab_size - 1], [5]], vocab_size)
    assert (tmp_path / "train.bin").stat().st_size == 3 * bytes_each
    file = tokens.open_tokens(str(tmp_path), "train")
    assert file.tokens.tolist() == [0, vocab_size - 1, 5] and file.starts.tolist() == [0, 2, 3]


def test_writing_refuses_bad_documents(tmp_path):
    for bad, told in ([], "no tokens"), ([3, 100], "3..100"), ([-1], "-1..-1"):
        with pytest.raises(ValueError, match=rf"train.bin: document 1 has .*{told}.*0..99"):
            tokens.write_tokens(str(tmp_path), "train", [[1], bad], 100)
    assert not (tmp_path / "train.bin").exists()


SPOILED = [  # a file, what is written instead of its bytes, what is told
    ("train.bin", lambda b: b[:-1], r"train\.bin has 19 bytes.*10 x 2 = 20"),
    ("train.bin", lambda b: b[:-2], r"train\.bin has 18 bytes.*10 x 2 = 20"),
    ("train.idx", lambda b: b[:-8], r"train\.idx has 32 bytes.*5 x 8 = 40"),
    ("train.idx", lambda b: b[:-8] + (7).to_bytes(8, "little"),
     r"train\.idx: starts run 0\.\.7, expected 0\.\.10"),
    ("train.idx", lambda b: b[:8] + b[16:24] + b[8:16] + b[24:],
     r"train\.idx: entries 1, 2 are 5, 2, expected increasing"),
    ("train.idx", lambda b: b[:16] + b[8:16] + b[24:],
     r"train\.idx: entries 1, 2 are 2, 2, expected increasing"),
    ("meta.json", lambda b: b.replace(b"uint16", b"float16"),
     r"meta\.json: dtype 'float16', expected 'uint16' or 'uint32'"),
    ("train.bin", None, r"train\.bin"), ("meta.json", None, r"meta\.json is missing.*prepare\.py"),
    ("meta.json", lambda b: b.replace(b'"vocab_size": 100', b'"vocab_size": 9'),
     r"train\.bin: token 9 is 9, expected less than 9")]  # fmt: skip


@pytest.mark.parametrize("name, change, told", SPOILED)
def test_spoiled_files_are_named(tmp_path, name, change, told):
    write_folder(tmp_path, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]])
    tokens.read_row(tokens.open_tokens(str(tmp_path), "train"), 0, 10)
    before = (tmp_path / name).read_bytes()
    os.remove(tmp_path / name)
    if change:
        assert change(before) != before
        (tmp_path / name).write_bytes(change(before))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        tokens.read_row(tokens.open_tokens(str(tmp_path), "train"), 0, 10)


def test_unknown_split_and_unprepared_folder(tmp_path):
    write_folder(tmp_path, [[1]])
    raises(ValueError, "no split 'val', it has train", tokens.open_tokens, str(tmp_path), "val")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "prepare.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"run: python .*new.prepare\.py"):
        tokens.open_tokens(str(tmp_path / "new"), "train")


# ---- tokenizers ----
AWKWARD = [
    "", "plain words, and it's 12345 of them:\n\n\tdef f(x): return x**2  # don't   ",
    "\xa0caf\xe9 cafe\u0301 \U0001f468\u200d\U0001f469 \u4f60\u597d \u0e01\u0e34\r\n\x85\x1c\x00",
    "say [MASK] or[SEP] twice [CLS] <|endoftext|> [mask]", " " * 5000 + "x" + "\n" * 2000,
    "ab" * 4000]  # fmt: skip
LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


def random_texts():
    rng = random.Random(1)
    ranges = [(32, 127), (0, 0x250), (0x370, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    for _ in range(300):
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 60)))
        yield rng.choice(["", " ", "the ", "\n\n"]).join(text)


def byte_bpe(merges, ids_in_order=True, nfc=False, pattern=None):
    """A byte-level BPE of the 256 bytes and the results of `merges`; with a pattern, as Llama 3."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = ["".join(m) for m in merges][:: 1 if ids_in_order else -1]
    vocab = {t: i for i, t in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *made])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pattern is not None))
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pattern and pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, step]) if pattern else step
    if nfc:
        backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tiktoken_gives_the_ids_of_the_tokenizer(tokenizer, capsys):
    pytest.importorskip("tiktoken")
    texts = [*AWKWARD, *random_texts(), *(doc["body"] for doc in pydocs.topics()[:30])]
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("\u00c3", "\u00a9"), ("1", "2")]
    gpt2, llama = byte_bpe(merges, nfc=True), byte_bpe(merges, pattern=LLAMA)
    gpt2.add_tokens(["   "])  # ModernBERT has runs of space as added tokens
    for each in (tokenizer, gpt2, llama):
        encode = fast_encode(each)
        assert capsys.readouterr().out == "tokenizing with tiktoken\n"
        assert encode(texts) == each(texts)["input_ids"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.cls_token_id  # specials were compared too
    blank = [" " * 1_000_000]  # tiktoken itself panics at this
    assert encode(blank) == each(blank)["input_ids"]


def test_tiktoken_is_refused_where_its_ids_would_differ(capsys):
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    # abc is a bc; by the order of ids it would be ab c, or, in the second, a merge never reached
    for tokenizer in (byte_bpe(merges[:2], ids_in_order=False), byte_bpe(merges)):
        assert tiktoken_for(tokenizer) is None
        encode = fast_encode(tokenizer)
        assert "the tokenizer itself" in capsys.readouterr().out
        ids = encode(["abc abc"])
        assert ids == tokenizer(["abc abc"])["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[0]) == ["a", "bc", "\u0120", "a", "bc"]


def test_other_tokenizers_run_themselves():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 7, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert fast_encode(tokenizer)(["a b", "c"]) == [[0, 7], [1]]
    assert fast_encode(tokenizer)([]) == []
    check_tokenizer(tokenizer, 8)  # the largest id counts, not the 3 tokens
    raises(ValueError, "ids up to 7.*vocab_size is 7", check_tokenizer, tokenizer, 7)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    docs = fast_encode(tokenizer)(["a text"])
    counts = tokens.write_tokens(str(tmp_path), "train", docs, 8192)
    tokens.write_meta(str(tmp_path), tokenizer, "here", {"train": counts})
    again = load_tokenizer(str(tmp_path / "tokenizer"))
    ids = again("a text")["input_ids"]
    assert ids == tokens.open_tokens(str(tmp_path), "train").tokens.tolist()
    assert again.convert_ids_to_tokens(ids)[:: len(ids) - 1] == ["[CLS]", "[SEP]"]
    assert (again.bos_token, again.eos_token) == ("[CLS]", "[SEP]")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["mask_id"] == again.mask_token_id and meta["special_ids"] == [0, 1, 2, 3]
    assert meta["vocab_size"] == len(again)
    with pytest.raises(FileNotFoundError, match="data/nowhere/tokenizer: no such folder"):
        load_tokenizer("data/nowhere/tokenizer")


# ---- JSONL, reading ahead ----
def test_lines_are_read_by_number_and_broken_ones_are_named(tmp_path):
    """In a walk, and each by itself: blank lines between, and a last line without its end."""
    path, good = tmp_path / "pairs.jsonl", b'\n{"text": "a"}\n\n  \n{"text": "\xc3\xa9"} \r\n'
    path.write_bytes(good + b'{"text": 3}')
    lines, file = list(data.read_jsonl(str(path))), data.open_pairs(str(path))
    assert lines == [(2, {"text": "a"}), (5, {"text": "\xe9"}), (6, {"text": 3})]
    assert [data.read_line(file, i)[::-1] for i in range(len(file))] == lines
    raises(ValueError, r"pairs\.jsonl line 6: field 'text' is 3", data.read_pair, file, 2)
    for line, told in [
        (b'{"query": "x"', "not JSON: Expecting ',' delimiter"),
        (b'{"query": "\xff"}', "not JSON: 'utf-8' codec"), (b'["query"]', "a list, expected an"),
    ]:  # fmt: skip
        path.write_bytes(good + line + b'\n{"text": "b"}')
        walk, file = data.read_jsonl(str(path)), data.open_pairs(str(path))
        assert next(walk) == lines[0] and next(walk) == lines[1] and len(file) == 4
        for read in (lambda: next(walk), lambda: data.read_line(file, 2)):  # noqa: B023
            raises(ValueError, rf"pairs\.jsonl line 6: {told}", read)
    path.write_text(" \n\n")
    raises(ValueError, r"pairs\.jsonl: there is no line in it", data.open_pairs, str(path))


def test_require():
    record = {"s": "x", "i": 3, "f": 0.5, "b": True, "l": ["x", "y"], "m": ["x", 1]}
    record |= json.loads('{"smile": "\\ud83d\\ude42", "half": "a \\ud800 b"}')
    good = [("s", str), ("i", int), ("i", float), ("f", float), ("b", bool), ("l", [str])]
    for field, kind in [*good, ("smile", str)]:
        assert data.require(record, field, kind, "p.jsonl", 17) == record[field]
    for field, kind, told in [
        ("query", str, r"is missing \(expected str\)$"), ("s", int, "is 'x' .expected int"),
        ("b", int, "is True .expected int"), ("f", int, "is 0.5 .expected int"),
        ("s", [str], "is 'x' .expected list of str"), ("half", str, "has half a character"),
        ("m", [str], r"is \['x', 1\] .expected list of str")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^p.jsonl line 17: field '{field}' {told}"):
            data.require(record, field, kind, "p.jsonl", 17)


def test_prefetch():
    assert list(common.prefetch(range(100))) == list(range(100))
    items = common.prefetch(1 // (2 - i) for i in itertools.count())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)

    taken, before = [], threading.active_count()
    items = common.prefetch((taken.append(i) or i for i in itertools.count()), depth=2)
    assert next(items) == 0
    deadline = time.time() + 5
    while len(taken) < 3 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert taken == [0, 1, 2]  # one was used, two are ready
    items.close()
    assert threading.active_count() == before


# ---- data/text/prepare.py ----
WORDS = "the a model text token of in is row and packs reads every long short\n".split(" ")


def make_corpus(folder, files, docs_a_file):
    """.txt, .jsonl and .parquet files by turns; their texts, those of all .txt first and so on."""
    import pyarrow
    from pyarrow.parquet import write_table

    rng, texts = random.Random(0), ([], [], [])
    for i in range(files):
        docs = [f"{i}.{j} {' '.join(rng.choices(WORDS, k=40))}".strip() for j in range(docs_a_file)]
        texts[i % 3].extend(docs)
        path = folder / f"{i:03d}{('.txt', '.jsonl', '.parquet')[i % 3]}"
        if i % 3 == 0:
            path.write_text("\n\n \n".join(docs))
        elif i % 3 == 1:
            write_jsonl(path, [{"text": doc, "id": i} for doc in [*docs, " "]])
        else:
            table = pyarrow.table({"id": range(docs_a_file + 1), "text": [*docs, None]})
            write_table(table, path, row_group_size=docs_a_file // 2)
    return sum(texts, [])


def prepare_text(out, *args):
    command = [sys.executable, os.path.join(ROOT, "data", "text", "prepare.py"), "--out", str(out)]
    env, output = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out) + ".hf"}, subprocess.PIPE
    return subprocess.Popen([*command, *args], env=env, stdout=output, stderr=output, text=True)


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def documents(folder, split, tokenizer):
    file = tokens.open_tokens(str(folder), split)
    ends = zip(file.starts[:-1], file.starts[1:], strict=True)
    return [tokenizer.decode(file.tokens[a:b], skip_special_tokens=True) for a, b in ends]


def written(folder, split, tokenizer):
    """Texts of the documents of a split, one file or shards, and the tokens of each row (.rows)."""
    counts = json.loads((folder / "meta.json").read_text())["splits"][split]
    texts, rows, shards = [], [], counts.get("shards")
    names = [f"{split}_{i:05d}" for i in range(len(shards))] if shards else [split]
    for name, count in zip(names, shards or [counts], strict=True):
        ids = np.fromfile(folder / f"{name}.bin", "<u2")
        starts = np.fromfile(folder / f"{name}.idx", "<i8")
        assert starts[0] == 0 and starts[-1] == len(ids) == count["tokens"]
        assert len(starts) - 1 == count["docs"] > 0
        docs = np.split(ids, starts[1:-1])
        texts += [tokenizer.decode(doc, skip_special_tokens=True) for doc in docs]
        if "rows" in count:
            borders = np.fromfile(folder / f"{name}.rows", "<i8")
            assert len(borders) - 1 == count["rows"] and set(borders) <= set(starts)
            assert borders[0] == 0 and borders[-1] == starts[-1]
            rows += np.diff(borders).tolist()
    for key, values in {"docs": texts, "rows": rows}.items():
        assert counts.get(key, 0) == len(values)
    return texts, rows


def in_order_of_keys(places, seed=0):
    """The texts of [(part, place in it, text)] by the hash of (seed, part, place)."""
    def key(part, place):
        first = np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)
        return order.mix(first + np.uint64(place))[0]

    return [text for *_, text in sorted(places, key=lambda x: key(*x[:2]))]


@pytest.mark.slow
def test_text_killed_and_resumed_is_text_unbroken(tmp_path, tokenizer, capsys):
    """Killed in pass 2 and in pass 3: the same bytes, and the documents in the order of keys."""
    (tmp_path / "in").mkdir()
    texts = make_corpus(tmp_path / "in", files=60, docs_a_file=100)
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    args = ["--tokenizer", str(tmp_path / "tok"), "--val_docs", "50", "--input"]
    args += [str(tmp_path / "in" / f"*.{kind}") for kind in ("txt", "jsonl", "parquet")]
    args += ["--shard_tokens", "4000", "--seed", "3"]
    parts, n_parts, done = tmp_path / "b" / "parts", 20 + 20 + 20 * 3, []  # .parquet: 3 row groups
    for pattern, workers in ("0000[0-9][2-9].json", "1"), ("train_0000[2-9].json", "2"):
        killed = prepare_text(tmp_path / "b", *args, "--workers", workers)
        while not list(parts.glob(pattern)):
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.001)
        killed.kill()
        killed.communicate()
        done.append(len(list(parts.glob(pattern[0] + "*.json"))))
        if pattern[0] == "t":
            assert len(list(parts.glob("0*.json"))) == n_parts
    assert 1 <= done[0] < n_parts and 1 <= done[1] < 30
    assert not (tmp_path / "b" / "meta.json").exists()
    other = text.arguments([*args, "--out", str(tmp_path / "b"), "--min_tokens", "9"])
    raises(SystemExit, "is of a run with other input or settings", text.main, other)

    resumed = prepare_text(tmp_path / "b", *args, "--workers", "2")
    text.main(text.arguments([*args, "--out", str(tmp_path / "a"), "--workers", "1"]))
    assert "40 empty, 0 short and 0 long documents were left out" in capsys.readouterr().out
    out = finished(resumed)
    assert f"{n_parts} of {n_parts} parts are there already" in out
    assert "shards are there already" in out
    names = sorted(os.listdir(tmp_path / "a"))
    assert len(names) > 60 and names == sorted(os.listdir(tmp_path / "b"))
    for name in set(names) - {"tokenizer"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    train, val = (written(tmp_path / "a", split, tokenizer)[0] for split in ("train", "val"))
    parts = text.plan_of(text.arguments([*args, "--out", "x"]))
    places = [(i, j, t) for i, (_, part) in enumerate(parts) for j, t in enumerate(texts_of(part))]
    places = [place for place in places if place[2].strip()]
    assert [t for *_, t in places] == texts
    assert len(val) == 50 and val + train == in_order_of_keys(places, 3)


def test_text_in_shards_by_length_and_in_rows_of_whole_documents(tmp_path, tokenizer, monkeypatch):
    """Of 5 parts that share 2 groups, with several runs in each."""
    monkeypatch.setattr(text, "MAX_RUNS", 2)
    monkeypatch.setattr(text, "RUN_TOKENS", 3000)
    rng = random.Random(0)
    texts = [f"{i} {' '.join(rng.choices(WORDS[:-1], k=int(rng.lognormvariate(3, 1))))}".strip()
             for i in range(900)]  # fmt: skip
    for i in range(5):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": t} for t in texts[180 * i : 180 * (i + 1)]])
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    args = ["--input", str(tmp_path / "*.jsonl"), "--tokenizer", str(tmp_path / "tok")]
    args += ["--workers", "1", "--val_docs", "30", "--out", str(tmp_path / "out")]
    lengths = {t: len(ids) for t, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True)}
    keyed = in_order_of_keys([(i // 180, i % 180, t) for i, t in enumerate(texts)])

    def prepared(*more):
        text.main(text.arguments([*args, *more]))
        assert not (tmp_path / "out/parts").exists()
        return [written(tmp_path / "out", split, tokenizer) for split in ("val", "train")]

    size = ["--shard_tokens", str(-(-sum(lengths.values()) // 7))]
    for more in ([], size):
        (val, _), (train, _) = prepared(*more)
        assert (tmp_path / "out/train_00006.bin").exists() == bool(more) and len(val) == 30
        assert val + train == keyed
    assert not (tmp_path / "out/train_00007.bin").exists()
    (val, _), (train, _) = prepared("--min_tokens", "20", "--max_tokens", "50")
    # the rest, as it stood; what is val of all documents is not trained on
    for found, of in ((val, keyed[:30]), (train, keyed[30:])):
        assert found == [t for t in of if 20 <= lengths[t] <= 50] != []

    pieces = [lengths[t] for t in keyed[30:]]
    pieces = sorted(min(100, n - i) for n in pieces for i in range(0, n, 100))
    for more in ([], size):
        (_, val_rows), (train, rows) = prepared("--whole", "100", *more)
        assert json.loads((tmp_path / "out/meta.json").read_text())["row_tokens"] == 100
        names = sorted((tmp_path / "out").glob("train_*.idx" if more else "train.idx"))
        assert sorted(n for name in names for n in np.diff(np.fromfile(name, "<i8"))) == pieces
        fits = [t for t in keyed[30:] if lengths[t] <= 100]
        assert set(fits) <= set(train) and train != fits
        for each in (rows, val_rows):
            assert max(each) <= 100
        assert sum(rows) == sum(pieces) and sum(rows) / len(rows) > 95


def test_text_from_a_dataset_takes_its_own_validation(tmp_path, tokenizer):
    for split, n in ("train", 30), ("test", 10):
        lines = [{"body": f"{split} document {i}"} for i in range(n)]
        write_jsonl(tmp_path / "in" / f"{split}.jsonl", lines)
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    args = ["--tokenizer", str(tmp_path / "tok"), "--dataset", str(tmp_path / "in"), "--streaming"]
    args += ["--field", "body", "--val_docs", "4", "--workers", "1"]
    process = prepare_text(tmp_path / "out", *args)
    assert "own split 'test'" in finished(process)
    train, val = (written(tmp_path / "out", split, tokenizer)[0] for split in ("train", "val"))
    assert sorted(train) == sorted(f"train document {i}" for i in range(30))
    tests = [(1, i, f"test document {i}") for i in range(10)]  # part 0 is that of train
    assert val == in_order_of_keys(tests)[:4]


@pytest.mark.parametrize("kind, txt", [("txt", "blank"), ("txt", "line"), ("jsonl", "blank")])
def test_parts_of_a_file_are_the_file(tmp_path, kind, txt):
    rng, path = random.Random(0), tmp_path / f"a.{kind}"
    docs = ["\n".join(["caf\u00e9 " * rng.randint(1, 30)] * rng.randint(1, 3)) for _ in range(100)]
    docs = [f"{i} {doc.strip()}" for i, doc in enumerate(docs)]
    lines = [json.dumps({"text": doc}) for doc in docs]
    written = "\n".join(lines) if kind == "jsonl" else "\n\n".join(docs)
    path.write_text(written, encoding="utf-8")
    if txt == "line":
        docs = [line.strip() for line in written.split("\n") if line]
    for size in (1 << 20, 1000, 50, 7):
        parts = parts_of_files([str(path)], txt=txt, part_bytes=size)
        assert len(parts) > 5 or size > 1000
        assert [t for part in parts for t in texts_of(part) if t] == docs


def test_text_names_the_line_in_a_later_part(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    lines = [{"text": f"document {i}"} for i in range(40)] + [{"txt": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    parts = parts_of_files([path], part_bytes=100)
    with pytest.raises(ValueError, match=r"a\.jsonl line 41: field 'text' is missing"):
        [t for part in parts[1:] for t in texts_of(part)]
    with pytest.raises(FileNotFoundError, match="nothing.txt: there is no such file"):
        parts_of_files([str(tmp_path / "nothing.txt")])
    write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: no column 'text', it has body"):
        list(texts_of(*parts_of_files([str(tmp_path / "a.parquet")])))


MDS = Path(ROOT, "tests", "mds")


def test_text_killed_while_files_are_moved_loses_none(tmp_path, tokenizer, monkeypatch):
    """Before some results get their place, and before meta.json does. Then other shards are asked
    for, of the same parts."""
    docs = [f"{i} {' '.join(WORDS[:-1])}" for i in range(300)]
    path, out = write_jsonl(tmp_path / "a.jsonl", [{"text": doc} for doc in docs]), tmp_path / "out"
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    args = ["--tokenizer", str(tmp_path / "tok"), "--input", path, "--out", str(out)]
    args += ["--workers", "1", "--val_docs", "20", "--shard_tokens"]
    replace, deadly = os.replace, ["val.idx", "train_00001.bin", "meta.json"]

    def dies(source, target):
        if os.path.dirname(target) == str(out) and os.path.basename(target) in deadly:
            deadly.remove(os.path.basename(target))
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(text.os, "replace", dies)
    for n_left in (2, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            text.main(text.arguments([*args, "1500"]))
        assert len(deadly) == n_left
        monkeypatch.setattr(text, "make_runs", None)  # no part is made again
    many = len(list(out.glob("train_*.bin")))
    text.main(text.arguments([*args, "2500"]))
    found = [written(out, split, tokenizer)[0] for split in ("val", "train")]
    assert len(found[0]) == 20 and sorted(sum(found, [])) == sorted(docs)
    assert many > len(list(out.glob("train_*.bin"))) > 2 and not (out / "parts").exists()


@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_mds_is_what_its_library_reads(kind):
    """tests/mds/make.py wrote both, with mosaicml-streaming 0.13.0, and what it reads from them."""
    expected = json.loads((MDS / "samples.json").read_text())["zstd"]
    shards = read_index(MDS / kind)
    assert len(shards) > 1
    columns = sorted(expected[0])
    got = [dict(zip(columns, values)) for s in shards for values in read_shard(s, columns)]
    for sample in got:
        for key, value in sample.items():
            if isinstance(value, np.ndarray):
                sample[key] = [value.dtype.name, value.tolist()]
            elif isinstance(value, bytes):
                sample[key] = list(value)
    assert got == expected


def test_text_and_order_from_mds(tmp_path, tokenizer):
    """A folder of such folders, of texts and of ids; rows of ids with their steps."""
    tokenizer.save_pretrained(str(tmp_path / "tok"))
    expected = json.loads((MDS / "samples.json").read_text())
    args = ["--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "order")]
    execute([os.path.join(ROOT, "data/order/prepare.py"), "--input", str(MDS / "order"), *args])
    rows = np.fromfile(tmp_path / "order" / "train.bin", "<u2").reshape(6, 4)
    assert rows.tolist() == [sample["input_ids"][1] for sample in expected["order"]]
    meta = json.loads((tmp_path / "order" / "meta.json").read_text())
    assert meta["order"] == {"max_seq_len": 4, "rows_per_step": 2}

    for kind in ("plain", "zstd"):
        shutil.copytree(MDS / kind, tmp_path / "in" / kind)
    for field in ("text", "ids"):
        args = ["--input", str(tmp_path / "in"), "--field", field, "--val_docs", "0", "--tokenizer"]
        args += [str(tmp_path / "tok"), "--workers", "1", "--out", str(tmp_path / field)]
        text.main(text.arguments(args))
        ids, starts = (np.fromfile(tmp_path / field / f"train.{kind}", dtype)
                       for kind, dtype in (("bin", "<u2"), ("idx", "<i8")))  # fmt: skip
        values = [s["ids"][1] if field == "ids" else tokenizer(s["text"])["input_ids"]
                  for s in expected["zstd"] if field == "ids" or s["text"]] * 2  # fmt: skip
        docs = [doc.tolist() for doc in np.split(ids, starts[1:-1])]
        assert docs != values and sorted(docs) == sorted(values)
    args = text.arguments([*args[:3], "input_ids", *args[4:]])
    raises(ValueError, "mds: column 'input_ids' has array.*float16.*a text or token ids",
           text.main, args)  # fmt: skip
    toy = script("data/text/prepare.py")
    toy.set_up(args, None)
    toy.vocab_size = 50
    part = next(p for p in parts_of_files([str(MDS / "plain")], "ids"))
    with pytest.raises(ValueError, match=r"mds: a document has ids .*expected some in 0\.\.49"):
        list(toy.ids_of(part))


def test_bad_mds_is_named(tmp_path):
    def spoiled(change, file="shard.00000.mds", kind="plain", column="text"):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(MDS / kind, tmp_path / "x")
        old = (tmp_path / "x" / file).read_bytes()
        new = change(old)
        assert new != old
        (tmp_path / "x" / file).write_bytes(new)
        return [v for shard in read_index(tmp_path / "x") for v in read_shard(shard, [column])]

    raises(FileNotFoundError, "no index.json in it or below", parts_of_files, [str(tmp_path)])
    index = "index.json"
    for told, change, *more in [
        (r"mds has \d+ bytes, by .*index.json it should have", lambda b: b[:-1]),
        (r"zstd has \d+ bytes, by .*it should", lambda b: b[:-1], "shard.00000.mds.zstd", "zstd"),
        ("not .* bytes by zstd", lambda b: b"\0" * 9 + b[9:], "shard.00000.mds.zstd", "zstd"),
        ("00000.mds: no column 'body', it has grid, ids",
         lambda b: b + b" ", "index.json", "plain", "body"),
        ("column 'text' of pil: this encoding", lambda b: b.replace(b'"str"', b'"pil"'), index),
        ("samples, by index.json it", lambda b: b.replace(b'samples": ', b'samples": 1'), index),
        (r"sample 0 has .* bytes of values at", lambda b: b[:4] + b"\xff" + b[5:]),
        ("compression 'br', expected", lambda b: b.replace(b'"zstd"', b'"br"'), index, "zstd"),
        ("a shard of .*'json'", lambda b: b.replace(b'"mds"', b'"json"'), "index.json"),
        ("sample 0, column 'grid' of ndarray:int16:2,4: cannot reshape",
         lambda b: b.replace(b":2,3", b":2,4"), "index.json", "plain", "grid"),
        ("index.json: not JSON", lambda b: b[:-3], "index.json"),
    ]:  # fmt: skip
        raises(ValueError, told, spoiled, change, *more)


# ---- data/pydocs/prepare.py ----
SOURCE = '''
"""The module for tests of prepare, which says in enough words what it is and why it is there for
all to read.

Its body has more than one sentence. There are words in it, so that it is long enough for a pair."""
class Box:
    """A box that holds things of one kind. It is not a list, as what is in it has no order.

    Parameters
    ----------
    size : int
        How many things there are in the box, at most; with ``size=0`` it is :class:`~mod.Empty`.

    Examples
    --------
    >>> Box(3)
    Box(size=3)
    """
    def __init__(self, size: int, kind=None, *, names=("a very long default", "of two strings")):
        """Short."""
    @staticmethod
    def of(thing: object):
        """Make a box of a thing.

        .. math::
            x = \\\\frac{a}{b}

        The box that is returned has the thing in it, and it can be used as any other of its size
        that was made by hand::

            box = Box(1)
            box.put(thing)

        .. note:: It is *not* copied, so that a change of the thing is seen in `box` as well.
        """
args = parse_kwargs("""
    input (Tensor): the input tensor
        of any shape.
    out (Tensor, optional): the output tensor.
""")
add_docstr(torch.fill, r"""
fill(input, value, *, out=None) -> Tensor

Fills a tensor with a value that is given, so that all of its elements are the same.

Args:
    {input}
    value (float): what is to be written to each of the elements of the tensor in {{brackets}}
""".format(**args))
'''


def test_docstrings_become_english(tmp_path):
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    for name in ("mod.py", "tests/other.py", "test_mod.py"):
        (tmp_path / "pkg" / name).write_text(SOURCE)
    (tmp_path / "pkg" / "__init__.py").write_text("broken (")
    files = pydocs.source_files(str(tmp_path / "pkg"), "pkg")
    assert [module for module, _ in files] == ["pkg", "pkg.mod"]
    assert pydocs.docs_of_file(files[0]) == []
    module, box, of, fill = pydocs.docs_of_file(files[1])

    assert module["name"] == "pkg.mod" and module["summary"].endswith("there for all to read.")
    assert (box["signature"], box["summary"]) == (
        "Box(size, kind=None, *, names=...)", "A box that holds things of one kind.")  # fmt: skip
    assert box["body"] == (
        "It is not a list, as what is in it has no order.\nParameters\nsize : int\n"
        "How many things there are in the box, at most; with size=0 it is Empty.")  # fmt: skip
    assert of["signature"] == "Box.of(thing)"
    assert of["body"] == (
        "The box that is returned has the thing in it, and it can be used as any other of its size "
        "that was made by hand:\n"
        "Note: It is not copied, so that a change of the thing is seen in box as well.")
    assert fill["signature"] == "fill(input, value, *, out=None)"
    assert fill["body"] == (
        "Args:\ninput (Tensor): the input tensor of any shape.\n"
        "value (float): what is to be written to each of the elements of the tensor in {brackets}")
    pair = pydocs.pair_of(box)
    assert pair["query"] == f"{box['signature']}: {box['summary']}" and pair["pos"] == [box["body"]]
    repeats = {**box, "body": f"{box['body']} And again: {box['summary']}"}
    assert pydocs.pair_of(repeats) is None  # its query would be in its positive


def test_splits_share_no_module_and_no_text(tmp_path):
    root = importlib.util.find_spec("numpy").submodule_search_locations[0]
    docs = [doc for file in pydocs.source_files(root, "numpy") for doc in pydocs.docs_of_file(file)]
    copies = [{**doc, "module": f"copied.{i}", "body": doc["body"] + " A few words more."}
              for i, doc in enumerate(docs[::10])]  # fmt: skip
    kept = pydocs.without_repeats(docs + copies)
    for doc, copy in zip(docs[::10], copies, strict=True):
        splits = {pydocs.split_of(doc["module"]), pydocs.split_of(copy["module"])}
        assert splits == {"train"} or not (doc in kept and copy in kept)
    counts = pydocs.write_all(kept, str(tmp_path))
    pairs = {split: read_jsonl(tmp_path / f"{split}.jsonl") for split in ("train", "val", "test")}
    modules = {s: {".".join(p["module"].split(".")[:3]) for p in pairs[s]} for s in pairs}
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    trained = " ".join(documents(tmp_path, "train", tokenizer))
    for a, b in itertools.combinations(pairs, 2):
        assert not modules[a] & modules[b]
        for field in ("query", "pos"):
            assert not {str(p[field]) for p in pairs[a]} & {str(p[field]) for p in pairs[b]}
    for split, lines in pairs.items():
        positives = [p["pos"][0] for p in lines]
        assert len(set(positives)) == len(lines) == counts[f"{split} pairs"] > 15
        assert {p in trained for p in positives} == {split == "train"}
    for split in ("val", "test"):
        by_summary = read_jsonl(tmp_path / f"{split}_summary.jsonl")
        assert len(by_summary) == counts[f"{split}_summary pairs"] > 10
        of = {pair["pos"][0]: pair for pair in pairs[split]}
        for pair in by_summary:
            whole = of[pair["pos"][0]]
            assert whole["query"].endswith(f": {pair['query']}") and whole | pair == pair


def test_summaries_that_are_queries():
    def pair(name, summary):
        return {"query": f"{name}: {summary}", "pos": ["b"], "name": name, "summary": summary}

    of_test = [pair("a.split", "Split a text."), pair("DataLoader", "A DataLoader of rows."),
               pair("b", "Say what is there."), pair("x.read_csv", "Read by x.read_csv."),
               pair("Box", "A Box of things."), pair("c", "Done twice."), pair("d", "done twice")]
    pairs = {"train": [pair("y", "say what is there!")], "test": of_test}
    got = pydocs.by_summary(pairs, "test")
    assert [(x["name"], x["query"]) for x in got] == [
        ("a.split", "Split a text."), ("Box", "A Box of things.")]  # fmt: skip


def test_manifest_is_compared():
    manifest = json.loads(Path(ROOT, "data/pydocs/manifest.json").read_text())
    assert pydocs.compare(manifest, manifest) == "equal to manifest.json"
    other = json.loads(json.dumps(manifest))
    other["versions"]["python"] = "3.99.0"
    other["counts"]["train pairs"] += 1
    other["sha256"]["train.bin"] = "0"
    told = pydocs.compare(other, manifest)
    assert f"python 3.99.0, in manifest.json {manifest['versions']['python']}" in told
    assert "train pairs: " in told and "val pairs" not in told
    assert told.endswith("files that differ: train.bin")
