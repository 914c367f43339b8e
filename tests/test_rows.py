"""Shards, mixtures and rows of whole documents: what token_rows.py reads, and runs on them."""

import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import harness
import order
import token_rows
from harness import losses, raises
from pretrain_mlm import corrupt
from token_rows import open_rows
from tokens import open_tokens, tokenizer_of, write_meta, write_tokens

SCRIPT = "pretrain_mlm.py"


def write_folder(folder, tokenizer, files, row_tokens=None):
    """Token files {name: documents, or for rows of whole documents, lists of them}, of train_...
    and val -> the folder."""
    splits = {}
    os.makedirs(folder)
    for name, docs in files.items():
        rows = docs if row_tokens else [docs]
        docs = [doc for row in rows for doc in row]
        counts = write_tokens(str(folder), name, docs, len(tokenizer))
        if row_tokens:
            ends = np.cumsum([0, *(sum(map(len, row)) for row in rows)])
            ends.astype("<i8").tofile(os.path.join(folder, f"{name}.rows"))
            counts["rows"] = len(rows)
        if name.startswith("train_"):
            splits.setdefault("train", {"shards": []})["shards"].append(counts)
        else:
            splits[name] = counts
    write_meta(str(folder), tokenizer, "toy", splits)
    if row_tokens:
        path = os.path.join(folder, "meta.json")
        with open(path) as f:
            meta = json.load(f) | {"row_tokens": row_tokens}
        with open(path, "w") as f:
            json.dump(meta, f)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(toy_tokens, tmp_path_factory):
    """Of one tokenizer: the documents, the folders "one" (toy_tokens), "shards" (the same, cut at
    borders of rows of 64), "small" (50 documents, no val) and "whole" (rows of whole documents)."""
    tokenizer, root = tokenizer_of(toy_tokens), tmp_path_factory.mktemp("corpus")
    one, val = (open_tokens(toy_tokens, split) for split in ("train", "val"))
    docs, val = (np.split(x.tokens, x.starts[1:-1]) for x in (one, val))
    cuts = [0, 64, 64 * 20, 64 * 21, 64 * 50, one.starts[-1]]
    parts = {"val": val}
    for i, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        inner = one.starts[(start < one.starts) & (one.starts < end)] - start
        parts[f"train_{i:05d}"] = np.split(one.tokens[start:end], inner)
    rows, short = [[]], [doc[:64] for doc in docs]
    for doc in short:  # as they come
        if sum(map(len, rows[-1])) + len(doc) > 64:
            rows.append([])
        rows[-1].append(doc)
    whole = {"train_00000": rows[:30], "train_00001": rows[30:], "val": rows[:20]}
    return SimpleNamespace(
        docs=docs, rows=rows, tokenizer=tokenizer, one=toy_tokens,
        shards=write_folder(root / "shards", tokenizer, parts),
        small=write_folder(root / "small", tokenizer, {"train": docs[:50]}),
        whole=write_folder(root / "whole", tokenizer, whole, 64))  # fmt: skip


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    """The smallest run, on a mixture of one file and shards."""
    return harness.write_config(
        tmp_path_factory.mktemp("config"), model_size="modernbert-tiny", vocab_size=512,
        max_seq_len=64, max_steps=4, learning_rate=3e-3, batch_tokens=384, device_batch_tokens=128,
        log_interval=1, eval_interval=4, eval_tokens=640, save_interval=4, dtype="fp32",
        data={corpus.small: 1, corpus.shards: 3.0})  # fmt: skip


def settings(**changes):
    keys = dict(objective="mlm", mask_prob=0.3, mask_all=False, mask_id=3, seed=5, order_seed=5,
                ordinary=np.arange(4, 300), rows_per_step=12, rows_per_batch=12, rank=0,
                world_size=1, stop_step=3, max_seq_len=64, stream=None)  # fmt: skip
    return SimpleNamespace(**keys | changes)


def test_shards_give_the_rows_and_masks_of_one_file(corpus):
    one, shards = (open_rows(folder, "train", 64) for folder in (corpus.one, corpus.shards))
    assert len(shards.files) == 5 and shards.n_rows == one.n_rows and shards.n_rows[0] > 100
    s = settings(stop_step=2 * one.n_rows[0] // 12)  # two epochs
    for a, b in zip(*(token_rows.train_batches(x, 0, corrupt, s) for x in (one, shards)),
                    strict=True):  # fmt: skip
        for name in ("inputs", "rows", "targets"):
            assert torch.equal(getattr(a[0], name), getattr(b[0], name))
        assert a[0].seqs.lengths == b[0].seqs.lengths
    assert open_rows({corpus.one: 7}, "train", 64).n_rows == one.n_rows  # a mixture of one
    raises(ValueError, "train is in 5 shards, expected one", open_tokens, corpus.shards, "train")


def test_mixture_has_exact_shares_and_each_source_goes_through_its_epochs():
    n_rows, shares = [700, 9_000_000, 12_345], order.shares_of([1, 5.0, 1])
    assert shares.tolist() == [1429, 7143, 1428]  # 1428.57, 7142.86, 1428.57
    get = partial(order.rows_of_mixture, n_rows=n_rows, shares=shares, seed=3)
    epoch, row = get(0, 3 * order.BLOCK)
    small = [get(step, 40) for step in range(750)]  # the same, whatever a step takes
    assert np.array_equal(np.concatenate(small, axis=1), (epoch, row))
    source = np.searchsorted(np.cumsum(n_rows), row, side="right")
    for block in np.split(source, 3):
        assert np.bincount(block).tolist() == shares.tolist()
        assert abs(np.bincount(block[:1000])[1] - 714) < 80  # mixed, not one after the other
    for i, n in enumerate(n_rows):
        e, r = epoch[source == i], row[source == i] - sum(n_rows[:i])
        assert len(set(zip(e.tolist(), r.tolist(), strict=True))) == 3 * shares[i]
        whole, rest = divmod(3 * shares[i], n)  # each row once an epoch
        assert np.bincount(e).tolist() == [n] * whole + [rest] and 0 <= r.min() <= r.max() < n


def test_ranks_share_the_rows_of_a_mixture(corpus):
    rows = open_rows({corpus.small: 1, corpus.shards: 3}, "train", 64)

    def steps(world_size):
        ranks = (token_rows.train_batches(rows, 1, corrupt, settings(rank=r, world_size=world_size))
                 for r in range(world_size))  # fmt: skip
        return [sorted(row.tolist() for [batch] in step for row in batch.inputs.view(-1, 64))
                for step in zip(*ranks, strict=True)]  # fmt: skip

    assert steps(1) == steps(2) == steps(3) and len(steps(1)) == 2


def test_rows_of_whole_documents_are_their_documents(corpus):
    rows = open_rows(corpus.whole, "train", 100)
    found = list(token_rows.read_rows(rows, [0] * len(corpus.rows), range(len(corpus.rows))))
    assert rows.n_rows == [len(corpus.rows)] and len(rows.files) == 2
    for (_, ids, lengths), docs in zip(found, corpus.rows, strict=True):
        assert ids.tolist() == np.concatenate(docs).tolist()
        assert lengths == [len(doc) for doc in docs]
    batch = token_rows.make_batch(found[:5], corrupt, settings(max_seq_len=100, mask_all=True))
    flat = np.concatenate([ids for _, ids, _ in found[:5]])
    assert len(flat) < 5 * 64 and (flat[batch.rows] == batch.targets.numpy()).all()
    assert (batch.inputs[batch.rows] == 3).all() and len(batch.rows) > 50
    told = "rows of whole documents, of up to 64 tokens: they take max_seq_len=64 or more"
    raises(SystemExit, told, open_rows, corpus.whole, "train", 63)
    raises(SystemExit, "and no chunks", open_rows, corpus.whole, "train", 64, chunks=True)


@pytest.mark.slow
def test_a_mixture_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (6, 14),
                                                   "--max_steps=20")  # fmt: skip


@pytest.mark.slow
def test_compiled_run_of_whole_documents(tiny, corpus, tmp_path):
    """T is another at each step: the code of a block is made for any."""
    keys = [f"--data={corpus.whole}", "--out_dropout=0.0", "--max_steps=3", "--eval_interval=0"]
    compiled = ["--compile=True", "--compile_backend=aot_eager"]
    for name, more in (("plain", []), ("compiled", compiled)):
        harness.run(SCRIPT, tiny, tmp_path / name, *keys, *more)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    harness.assert_refused("has rows of whole documents, of many lengths", SCRIPT, tiny,
                           tmp_path / "x", *keys, "--dump_data_order=0,2")  # fmt: skip


def test_the_data_order_bad_steps_and_evaluation_of_a_mixture(tiny, corpus, tmp_path):
    data = f"--data={{{corpus.small!r}: 1, {corpus.shards!r}: 3}}"  # as in the shell
    with pytest.raises(SystemExit):
        harness.run(SCRIPT, tiny, tmp_path, data, "--dump_data_order=0,4")
    done = harness.run(SCRIPT, tiny, tmp_path / "run", data)
    assert done.data == {corpus.small: 1, corpus.shards: 3} and done.s.order_seed == 1337
    ids = np.load(tmp_path / "order_0-4_input_ids.npy")
    s = SimpleNamespace(**vars(done.s) | {"objective": "clm"})
    batches = token_rows.train_batches(done.train, 0, corrupt, s)
    seen = torch.cat([batch.inputs for step in batches for batch in step])
    assert (ids == seen.view(-1, 64).numpy()).all()
    number = token_rows.rows_of(done.train, 2, 6, s)[1][0]
    file, row = token_rows.locate(done.train, number)
    named = token_rows.name_rows(done.train, 2, s)
    assert named.startswith(f"Rows of train: ['{file.path} {row}', ")
    # small has no val.bin: all is of shards; of both by weights where both have one
    assert list(done.val.weights) == [corpus.shards] and done.eval_rows == list(range(10))
    both = open_rows({corpus.one: 1, corpus.shards: 3}, "train", 64)
    val, numbers = token_rows.open_val(both, done.s)
    assert numbers == [0, 1, *range(val.n_rows[0], val.n_rows[0] + 7)]


def changed(corpus, tmp_path, name, change):
    """A copy of the shards with one file changed, {} for none."""
    folder = shutil.copytree(corpus.shards, tmp_path / "copy")
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(data))
    return str(folder)


@pytest.mark.parametrize(("name", "change", "told"), [
    ("train_00003.bin", None, "train_00003.bin"), ("train_00002.idx", None, "train_00002.idx"),
    ("train_00003.bin", lambda b: b[:-2], r"train_00003\.bin has \d+ bytes, .*should have"),
    ("train_00001.idx", lambda b: b[:8] + b[:8] + b[16:], r"train_00001\.idx: entries 0, 1 are"),
    ("meta.json", lambda b: b.replace(b'"shards": [', b'"shards": [5, '), "'shards' is"),
])  # fmt: skip
def test_spoiled_shards_are_named(corpus, tmp_path, name, change, told):
    folder = changed(corpus, tmp_path, name, change)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_rows(folder, "train", 64)


def test_what_makes_no_mixture_is_told(corpus, tmp_path):
    other = shutil.copytree(corpus.small, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0" * 64}))
    ordered = shutil.copytree(corpus.small, tmp_path / "ordered")
    (ordered / "meta.json").write_text(json.dumps(meta | {"order": {"max_seq_len": 64}}))
    for data, told in (
        ({corpus.one: 1, str(other): 1}, "other has another tokenizer than"),
        ({corpus.one: 1, str(ordered): 1}, "ordered has the order of a run"),
        ({corpus.one: 1, corpus.small: 1e-5}, "small has not one row in 10,000"),
        ({corpus.one: 1, corpus.small: 0}, "expected weights above 0"),
        ({corpus.one: 1, corpus.small: -1.0}, "expected weights above 0"),
        ({corpus.one: 1, corpus.small: "1"}, "expected weights above 0"),
        ({corpus.one: float("nan")}, "expected weights above 0"), ({}, "expected weights above 0"),
    ):  # fmt: skip
        raises(SystemExit, told, open_rows, data, "train", 64)


def test_changed_shards_and_weights_are_found_when_a_run_goes_on(tiny, corpus, tmp_path):
    folder = shutil.copytree(corpus.shards, tmp_path / "data")
    more = ["--max_steps=2", "--eval_interval=0", "--save_interval=1"]
    data = f'--data={{"{folder}": 3, "{corpus.small}": 1}}'
    go_on = [SCRIPT, tiny, tmp_path / "run", *more, "--resume=True"]
    harness.run(*go_on[:3], *more, "--stop_step=1", data)
    harness.assert_refused("began otherwise, data: 3 x", *go_on, data.replace('": 3', '": 2'))
    path = folder / "train_00004.bin"
    path.write_bytes(path.read_bytes()[::-1])
    harness.assert_refused("began otherwise, data: 3 x", *go_on, data)
    path.write_bytes(path.read_bytes()[::-1])
    harness.run(*go_on, data)
