"""scale/streams.py: its rows and how they go on; runs on a stream, whole, killed and resumed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import harness
from harness import WORDS, losses, write_jsonl
from order import permuted
from scale import streams
from tokenizer import load_tokenizer

SCRIPT = "pretrain_mlm.py"
RUN = dict(
    model_size="modernbert-tiny", vocab_size=512, max_seq_len=64, max_steps=8, learning_rate=3e-3,
    batch_tokens=384, device_batch_tokens=192, log_interval=1, eval_interval=4, eval_tokens=640,
    save_interval=4, dtype="fp32", out_dropout=0.0)  # fmt: skip


def documents(n, seed):
    """Texts that all differ, and hold no line end."""
    rng = np.random.default_rng(seed)
    numbers = (" ".join(WORDS[int(d)] for d in f"{seed}{i:04d}") for i in range(n))
    return [f"{i} {' '.join(rng.choice(WORDS, rng.integers(5, 60)))}" for i in numbers]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(a stream of files of each kind, their documents in the order of the files)"""
    import pyarrow
    from pyarrow.parquet import write_table

    root, docs = tmp_path_factory.mktemp("corpus"), [documents(350, seed) for seed in range(6)]
    for i in range(4):
        write_jsonl(root / f"{i}.jsonl", [{"text": text} for doc in docs[i] for text in (doc, " ")])
    write_table(pyarrow.table({"text": docs[4]}), root / "4.parquet", row_group_size=100)
    (root / "5.txt").write_text("\n\n".join(docs[5]) + "\n")
    spec = f"stream:{root}/*.jsonl,{root}/4.parquet,{root}/*.txt"
    return spec, [text for part in docs for text in part]


@pytest.fixture(scope="module")
def tiny(corpus, toy_tokens, tmp_path_factory):
    keys = RUN | dict(data=corpus[0], tokenizer=f"{toy_tokens}/tokenizer")
    return harness.write_config(tmp_path_factory.mktemp("config"), **keys)


@pytest.fixture(scope="module")
def encode(toy_tokens):
    return streams.fast_encode(load_tokenizer(f"{toy_tokens}/tokenizer"))


@pytest.fixture(autouse=True)
def made_once(encode, monkeypatch):
    """To compare two tokenizers takes a second."""
    monkeypatch.setattr(streams, "fast_encode", lambda tokenizer, verbose: encode)


@pytest.fixture
def settings(corpus, toy_tokens, monkeypatch):
    """open(**changes) -> (settings of a stream with small parts, blocks and groups, its file)"""
    for name, value in (("PART_BYTES", 9000), ("BLOCK", (16, 4000)), ("GROUP", (4, 10**6)),
                        ("MAX_LANES", 8)):  # fmt: skip
        monkeypatch.setattr(streams, name, value)

    def opened(**changes):
        keys = dict(data=corpus[0], tokenizer=f"{toy_tokens}/tokenizer", init_from="scratch",
                    num_epochs=None, eval_docs=370, rank=0, world_size=1, seed=5, max_seq_len=64,
                    rows_per_step=12, stop_step=40)  # fmt: skip
        s = SimpleNamespace(**keys | changes)
        return s, streams.open_stream(s)[0].files[0]

    return opened


def plain(rows):
    return [(key, ids.tolist(), lengths) for key, ids, lengths in rows]


def test_ranks_share_the_rows_of_one_and_go_on_where_others_stopped(settings):
    def rows_of(world_size, first=0, lanes=None):
        """{step: its rows} from all ranks, and {step: the lanes as a checkpoint has them}"""
        found, places = {}, {}
        for rank in range(world_size):
            s, _ = settings(rank=rank, world_size=world_size)
            s.stream.lanes |= lanes or {}
            for step, rows in enumerate(streams.rows_of_steps(first, s), first):
                found[step] = sorted(found.get(step, []) + plain(rows))
                now = s.stream.lanes[step + 1].ravel()
                places[step + 1] = np.maximum(now, places.get(step + 1, now)).astype(float).tolist()
        return found, places

    whole, places = rows_of(1)
    numbers = [row[0] for step in whole.values() for row in step]
    assert numbers == [(0, i) for i in range(480)]
    assert {(len(row[1]), sum(row[2])) for step in whole.values() for row in step} == {(64, 64)}
    for ranks in (2, 3):
        assert rows_of(ranks) == (whole, places)
    for first, ranks in ((1, 1), (7, 3), (22, 2), (39, 1)):
        found, later = rows_of(ranks, first, {first: places[first]})
        assert found == {step: whole[step] for step in range(first, 40)}
        assert later == {step: places[step] for step in range(first + 1, 41)}


def test_each_document_comes_once_an_epoch_but_those_held_out(settings, corpus, toy_tokens):
    s, file = settings()
    n_parts, n_lanes = len(s.stream.parts), s.stream.n_lanes
    assert n_parts > 20 and n_lanes == 8
    ids = load_tokenizer(f"{toy_tokens}/tokenizer")(corpus[1])["input_ids"]
    assert file.tokens.tolist() == sum(ids[:370], []) and file.starts[370] == len(file.tokens)
    sizes = np.zeros((2, n_parts), int)  # tokens of a part, by its place in an epoch
    for epoch in (0, 1):
        for place, part in enumerate(permuted(np.arange(n_parts), n_parts, 5, epoch)):
            texts = list(streams.documents_of(s.stream.parts[part]))
            sizes[epoch, place] = sum(map(len, s.stream.encode(texts)))
    seen, sizes = {0: [], 1: []}, sizes.ravel()
    for lane in range(n_lanes):
        rows, tokens = streams.rows_of_lane(lane, (lane, 0, 0), s), []
        for position in range(lane, 2 * n_parts, n_lanes):
            while len(tokens) < sizes[position]:
                tokens += next(rows)[0].tolist()
            seen[position // n_parts] += tokens[: sizes[position]]
            tokens = tokens[sizes[position] :]
    begin = ids[0][0]
    expected = sorted(map(tuple, ids[370:]))
    orders = []
    for epoch in (0, 1):
        starts = [i for i, token in enumerate(seen[epoch]) if token == begin]
        docs = [tuple(seen[epoch][a:b]) for a, b in zip(starts, [*starts[1:], None])]
        assert sorted(docs) == expected
        orders.append(docs)
    assert orders[0] != orders[1]


def test_a_data_set_with_a_split_to_evaluate_on(settings, tmp_path, monkeypatch):
    train, held_out = documents(60, 1), documents(9, 2)
    for i in range(3):
        rows = [{"body": text} for text in train[20 * i : 20 * i + 20]]
        write_jsonl(tmp_path / f"train-{i}.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", [{"body": text} for text in held_out])
    s, file = settings(data=f"hf:{tmp_path}#body", stop_step=2)
    assert file.tokens.tolist() == sum(s.stream.encode(held_out), [])
    found = [text for part in s.stream.parts for text in streams.documents_of(part)]
    assert len(s.stream.parts) == 3 and found == train
    assert [len(rows) for rows in streams.rows_of_steps(0, s)] == [12, 12]
    before = s.stream.fingerprint("")
    assert settings(data=f"hf:{tmp_path}#body")[0].stream.fingerprint("") == before
    with open(tmp_path / "train-2.jsonl", "a") as f:
        f.write('{"body": "more"}\n')
    assert settings(data=f"hf:{tmp_path}#body")[0].stream.fingerprint("") != before
    harness.raises(ValueError, "no column 'text', it has body", settings, data=f"hf:{tmp_path}")
    monkeypatch.setattr(streams, "texts_of", lambda part: [np.arange(3)])  # of an MDS folder
    harness.raises(ValueError, "'text' has token ids, and a stream takes texts", settings)


# ---- runs ----
def test_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (6, 14),
                                                   "--max_steps=20")  # fmt: skip


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_are_bit_equal(tiny, tmp_path):
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (6, 14),
                                                   "--max_steps=20", ranks=2)  # fmt: skip


@pytest.mark.slow
def test_begun_with_one_rank_and_gone_on_with_two(tiny, tmp_path):
    harness.run(SCRIPT, tiny, tmp_path / "one")
    harness.run(SCRIPT, tiny, tmp_path / "both", "--stop_step=4")
    harness.run_ranks(2, [harness.arguments(SCRIPT, tiny, tmp_path / "both", "--resume=True")])
    one, both = losses(tmp_path / "one"), losses(tmp_path / "both")
    assert len(one) == 8 and both == pytest.approx(one, rel=1e-5)


def test_resume_of_a_corpus_that_moved_or_changed_and_its_order(corpus, tiny, tmp_path, capsys):
    """And the order of the data that a run sees."""
    harness.run(SCRIPT, tiny, tmp_path / "a", "--stop_step=2")
    out = capsys.readouterr().out
    assert "7 parts in 4 lanes" in out and "evaluation on 10 rows held out" in out
    moved = tmp_path / "moved"
    root = os.path.dirname(corpus[0].removeprefix("stream:").split(",")[0])
    subprocess.run(["cp", "-r", root, moved], check=True)
    more = [f"--data={corpus[0].replace(root, str(moved))}", "--resume=True"]
    done = harness.run(SCRIPT, tiny, tmp_path / "a", *more, "--stop_step=3")
    with pytest.raises(SystemExit):
        harness.run(SCRIPT, tiny, tmp_path / "b", "--dump_data_order=2,3")
    order = np.load(tmp_path / "b" / "order_2-3_input_ids.npy")
    assert order.shape == (6, 64)
    restored = []
    for batch in done.micro_batches:  # of the last step, the third
        batch.inputs[batch.rows] = batch.targets
        restored += batch.inputs.view(-1, 64).tolist()
    assert restored == order.tolist()
    text = (moved / "5.txt").read_text()
    (moved / "5.txt").write_text(text.replace(text[-9], "z" if text[-9] != "z" else "y"))
    harness.assert_refused("began otherwise, data: ", SCRIPT, tiny, tmp_path / "a", *more)
    harness.run(SCRIPT, tiny, tmp_path / "a", *more, "--stop_step=4", "--force_resume=True")


def test_mntp_on_a_stream(corpus, folders, tmp_path):
    keys = dict(init_from=folders["llama"], data=corpus[0], mask_token="own", max_steps=2,
                max_seq_len=64, batch_tokens=128, device_batch_tokens=64, log_interval=1,
                eval_tokens=128, save_merged=False, dtype="fp32")  # fmt: skip
    config = harness.write_config(tmp_path, **keys)
    done = harness.run("train_mntp.py", config, tmp_path / "a", "--chunks=True")
    assert [batch.seqs.lengths for batch in done.micro_batches] == [[64], [64]]
    assert len(losses(tmp_path / "a")) == 2 and losses(tmp_path / "a", "eval_loss")


@pytest.mark.parametrize(("data", "more", "message"), [
    ("nowhere/*.jsonl", [], "nowhere/*.jsonl: there is no such file"),
    ("{0}/empty.jsonl", [], "has 0 documents that are not blank: eval_docs=1000 keeps"),
    ("{0}/short.jsonl", [], "has 70 documents that are not blank: eval_docs=1000 keeps"),
    ("{0}/short.jsonl", ["--eval_docs=1"], "no row of 64 to evaluate on; eval_interval=0 does"),
    (",", [], "expected stream:PATTERN or hf:NAME"),
    ("{0}/short.jsonl#body", [], "{0}/short.jsonl line 1: field 'body' is missing"),
    ("{0}/short.parquet#body", [], "{0}/short.parquet: no column 'body', it has text"),
    ("{0}/short.csv", [], "expected a .txt, .jsonl or .parquet file"),
    ("", ["--tokenizer="], "a stream needs a tokenizer"),
    ("", ["--num_epochs=1", "--max_steps=None"], "nobody knows how long a stream is"),
    (None, [], "is for a stream")])  # fmt: skip
def test_what_cannot_be_streamed_says_why(data, more, message, tiny, toy_tokens, tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    docs = documents(70, 1)
    write_jsonl(tmp_path / "short.jsonl", [{"text": text} for text in docs])
    write_table(pyarrow.table({"text": docs}), tmp_path / "short.parquet")
    write_jsonl(tmp_path / "empty.jsonl", [{"text": " \n"}])
    (tmp_path / "short.csv").write_text("text")
    if data is None:
        more = [f"--data={toy_tokens}"]
    elif data:
        more = [*more, f"--data=stream:{data.format(tmp_path)}"]
    harness.assert_refused(message.format(tmp_path), SCRIPT, tiny, tmp_path / "a", *more)


def test_a_run_on_token_files_imports_nothing_of_it(toy_tokens, tmp_path):
    """In a process of its own: to its end, a checkpoint saved."""
    config = harness.write_config(tmp_path, **RUN | {"data": toy_tokens, "max_steps": 1})
    argv = harness.arguments(SCRIPT, config, tmp_path / "a")
    code = ("import json, runpy, sys; sys.argv = json.loads(sys.argv[1])\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "names = {name.split('.')[0] for name in sys.modules}\n"
            "print('imported', names & {'scale', 'datasets', 'pyarrow', 'tiktoken'})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, json.dumps(argv)], cwd=harness.ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert "imported set()" in done.stdout and "saved" in done.stdout, done.stderr
