"""Prepare scripts of pairs, hard negatives, configs."""

import glob
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset

import harness
from bm25 import BM25
from data import open_pairs, read_pair
from embedder import Embedder
from harness import ROOT, raises, read_jsonl, script, write_jsonl
from model import from_scratch
from tokenizer import load_tokenizer

echo, bge, wiki1m, st_triplets = (
    script(f"data/{name}/prepare.py") for name in ("echo", "bge_msmarco", "wiki1m", "st_triplets"))
mining = script("data/mine_negatives.py")


def pairs_of(path):
    """As training reads them."""
    file = open_pairs(str(path))
    return [read_pair(file, i) for i in range(len(file))]


# ---- echo ----
def echo_lines(n):
    return [{"query": f"q{i}", "positive": f"p{i} 你好", "negative": f"n{i}"} for i in range(n)]


def test_echo(tmp_path, capsys):
    for name in ("allnli", "squad"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", echo_lines(5))
    argv = ["--input", str(tmp_path / "in"), "--out", str(tmp_path), "--val_share", "0"]
    echo.main([*argv, "--datasets", "squad", "allnli"])
    first, second = (pairs_of(tmp_path / f"allnli_split{i}.jsonl") for i in (1, 2))
    assert [p["query"] for p in first] == ["q0", "q2", "q4"]
    assert [p["query"] for p in second] == ["q1", "q3"]
    entailed = "Given a premise, retrieve a hypothesis that is entailed by the premise; "
    assert {p["prompt"] for p in first} == {entailed}
    assert {p["prompt"] for p in second} == {"Retrieve semantically similar text; "}
    squad = pairs_of(tmp_path / "squad.jsonl")
    assert len(squad) == 5 and squad[3]["pos"] == ["p3 你好"] and squad[3]["neg"] == ["n3"]
    assert squad[0]["prompt"] == "Retrieve Wikipedia passages that answer the question; "
    printed = capsys.readouterr().out
    assert "10 lines in all" in printed and re.search(r"squad.jsonl +5 lines", printed)
    assert not glob.glob(str(tmp_path / "*.tmp"))


def test_echo_val_and_rules(tmp_path, capsys):
    lines = echo_lines(400) * 2  # each query twice
    odd = [(" ", "p", "n"), ("same", "p", "p"), ("none", "p", "")]
    lines += [dict(zip(("query", "positive", "negative"), x, strict=True)) for x in odd]
    for name in ("nq", "quora_duplicates"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", lines)
    argv = ["--input", str(tmp_path / "in"), "--out", str(tmp_path), "--separator", "\n"]
    echo.main([*argv, "--datasets", "nq", "quora_duplicates", "--val_share", "0.25"])
    train, val = pairs_of(tmp_path / "nq.jsonl"), pairs_of(tmp_path / "val.jsonl")
    assert len(train) + len(val) == 802 and 120 < len(val) < 280
    assert {p["query"] for p in train}.isdisjoint(p["query"] for p in val)
    assert {p["prompt"] for p in val} == {echo.WIKIPEDIA + "\n"}  # no symmetric task
    bare = [p for p in train + val if p["query"] in ("same", "none")]
    assert [p["neg"] for p in bare] == [[], []]
    symmetric = [pairs_of(tmp_path / f"quora_duplicates_split{i}.jsonl") for i in (1, 2)]
    assert sum(map(len, symmetric)) == 802
    printed = capsys.readouterr().out
    assert "empty: 2; kept without negative: 4" in printed  # of both files


def test_echo_complains(tmp_path):
    path, argv = tmp_path / "in" / "nq.jsonl", ["--input", f"{tmp_path}/in", "--out", f"{tmp_path}"]
    write_jsonl(path, [*echo_lines(2), {"query": "q", "positive": ["p"], "negative": "n"}])
    with pytest.raises(ValueError, match=r"nq.jsonl line 3: field 'positive' .*expected str"):
        echo.main([*argv, "--datasets", "nq"])
    write_jsonl(path, echo_lines(2))
    path.write_text(path.read_text() + '{"query": "q"\n')
    raises(ValueError, r"nq.jsonl line 3: not JSON", echo.main, [*argv, "--datasets", "nq"])
    assert not os.path.exists(tmp_path / "nq.jsonl")  # nothing half written
    raises(SystemExit, "has no squad.jsonl", echo.main, [*argv, "--datasets", "nq", "squad"])


def test_prepare_runs_as_a_script_from_anywhere(tmp_path):
    write_jsonl(tmp_path / "in" / "fever.jsonl", echo_lines(3))
    path = os.path.join(ROOT, "data", "echo", "prepare.py")
    argv = ["--input", "in", "--out", "out", "--datasets", "fever", "--val_share", "0"]
    subprocess.run([sys.executable, path, *argv], cwd=tmp_path, check=True, capture_output=True)
    assert len(read_jsonl(tmp_path / "out" / "fever.jsonl")) == 3


# ---- bge ms marco ----
MSMARCO = [{"query": "a", "pos": ["p", "p"], "neg": ["n", "p", "n", "m", ""], "type": "normal"},
           {"query": "b", "pos": ["p"], "neg": ["x", "p", "y"], "pos_scores": [0.9],
            "neg_scores": [0.5, 0.4, 1], "prompt": "Find it"},
           {"query": "c", "pos": ["p"], "neg": None},
           {"query": "d", "pos": [" "], "neg": ["n"]}]  # fmt: skip


def test_bge_msmarco(tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", MSMARCO)
    bge.main(["--input", path, "--out", str(tmp_path), "--val_share", "0"])
    assert read_jsonl(tmp_path / "train.jsonl") == [
        {"query": "a", "pos": ["p"], "neg": ["n", "m"]},
        {"query": "b", "pos": ["p"], "neg": ["x", "y"], "pos_scores": [0.9],
         "neg_scores": [0.5, 1], "prompt": "Find it\n"},
        {"query": "c", "pos": ["p"], "neg": []}]  # fmt: skip
    assert pairs_of(tmp_path / "train.jsonl")[2]["neg"] == []
    printed = capsys.readouterr().out
    assert "3 lines in all" in printed and "empty: 1, pos dropped: 2, neg dropped: 4" in printed


def test_bge_msmarco_complains(tmp_path):
    for row, message in [({"query": "q", "pos": "p"}, "line 2: field 'pos' is 'p' .*list of str"),
                         ({"query": 3, "pos": ["p"]}, "line 2: field 'query' is 3"),
                         ({"query": "q"}, "line 2: field 'pos' is missing"),
                         ({"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1, 2]},
                          "line 2: field 'neg_scores' has 2 numbers for 1 texts")]:  # fmt: skip
        path = write_jsonl(tmp_path / "in.jsonl", [MSMARCO[0], row])
        with pytest.raises(ValueError, match="in.jsonl " + message):
            bge.main(["--input", path, "--out", str(tmp_path)])


def test_hub_rows_are_read_by_datasets(tmp_path):
    """A local folder of parquet stands for the hub: the same call reads both."""
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}"]} for i in range(10)]
    Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "a.parquet")
    argv = ["--dataset", str(tmp_path / "hub"), "--config", "default"]
    bge.main([*argv, "--out", str(tmp_path), "--val_share", "0"])
    assert read_jsonl(tmp_path / "train.jsonl") == rows
    st_triplets.main([*argv, "--out", str(tmp_path / "st.jsonl"), "--max_rows", "4"])
    assert read_jsonl(tmp_path / "st.jsonl") == rows[:4]


# ---- wiki1m ----
def test_wiki1m(tmp_path, capsys):
    path = tmp_path / "wiki.txt"
    path.write_bytes('One "quoted" sentence.\r\n\n  Naïve.  \nlast\n'.encode())
    out = str(tmp_path / "train.jsonl")
    wiki1m.main(["--input", str(path), "--out", out])
    assert read_jsonl(out) == [{"text": t} for t in ('One "quoted" sentence.', "Naïve.", "last")]
    assert pairs_of(out)[1]["pos"] == ["Naïve."]
    assert "3 sentences, 1 empty" in capsys.readouterr().out
    wiki1m.main(["--input", str(path), "--out", out, "--max_lines", "2"])
    assert len(read_jsonl(out)) == 2
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"wiki.txt line 2: not UTF-8"):
        wiki1m.main(["--input", str(path), "--out", out])


# ---- sentence-transformers ----
def st(tmp_path, rows, *argv):
    path, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    st_triplets.main(["--input", path, "--out", str(out), *argv])
    return read_jsonl(out)


def test_st_triplets_forms(tmp_path):
    for row, pos, neg in [
        ({"anchor": "a", "positive": "p", "negative": "n", "label": 1}, ["p"], ["n"]),
        ({"query": "a", "answer": "p", "score": 0.5}, ["p"], []),
        ({"question": "a", "answer": "p", "negative_1": "n", "negative_2": "p", "n3": "n"},
         ["p"], ["n"]),
        ({"set": ["a", "p"]}, ["p"], []),
        ({"set": {"query": "a", "pos": ["p"], "neg": ["n", "m"]}}, ["p"], ["n", "m"])]:  # fmt: skip
        assert st(tmp_path, [row]) == [{"query": "a", "pos": pos, "neg": neg}]
    lists = [{"positive": ["p", "r"], "negative": ["n", "m"], "query": "a"}]
    named = st(tmp_path, lists, "--columns", "query,positive,negative")
    assert named == [{"query": "a", "pos": ["p", "r"], "neg": ["n", "m"]}]


def test_st_triplets_leaves_out(tmp_path, capsys):
    rows = [{"a": f"a{i}", "b": f"b{i}", "score": i} for i in range(6)]
    rows.append({"a": "a", "b": " ", "score": 9})
    kept = st(tmp_path, rows, "--min_score", "4")
    assert [r["query"] for r in kept] == ["a4", "a5"]
    printed = capsys.readouterr().out
    assert "columns a, b\n" in printed and "1 without anchor or positive, 4 below" in printed
    rows = [{"a": f"a{i}", "b": "b"} for i in range(300)]
    train, val = st(tmp_path, rows, "--val_share", "0.3"), read_jsonl(tmp_path / "out.val.jsonl")
    assert len(train) + len(val) == 300 and 50 < len(val) < 130


def test_st_triplets_complains(tmp_path):
    rows = [{"anchor": "a", "positive": "p"}, {"anchor": "a", "positiv": "p"}]
    raises(ValueError, r"in.jsonl line 2: field 'positive' is missing", st, tmp_path, rows)
    with pytest.raises(ValueError, match=r"in.jsonl line 1: columns \['text'\], expected 2"):
        st(tmp_path, [{"text": "a", "label": 1}])
    out = ["--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        st_triplets.main(["--input", str(tmp_path / "nothing.jsonl"), *out])
    raises(SystemExit, "one of --input and --dataset", st_triplets.main, out)


# ---- hard negatives ----
def made_up(rng, n_lines, n_texts, width):
    """Lines over numbered texts with repeated queries, and small whole vectors: ties everywhere,
    and sums that are exact in any order."""
    lines = []
    for i in range(n_lines):
        pos = [f"t{t}" for t in rng.choice(n_texts, rng.integers(1, 3), replace=False)]
        neg = [f"t{t}" for t in rng.choice(n_texts, 2, replace=False) if f"t{t}" not in pos]
        query = f"q{i % (n_lines - 3)}" if i else "t0"  # the first query is a text of the corpus
        prompt = "say: " if i % 2 else None
        lines.append({"query": query, "pos": pos, "neg": neg, "prompt": prompt})
    texts = {f"t{t}": t for t in range(n_texts)}
    queries, corpus = (rng.integers(-2, 3, (n, width)).astype("f4") for n in (n_lines, n_texts))
    return lines, texts, queries, corpus


def mined_by_loops(lines, texts, queries, corpus, lo, hi, n, margin, keep, seed):
    text_at, out = list(texts), []
    for i, line in enumerate(lines):
        score = [float(sum(a * b for a, b in zip(queries[i], c, strict=True))) for c in corpus]
        same = [other["pos"] for other in lines if other["query"] == line["query"]]
        known = {line["query"]}.union(*same)
        kept = line["neg"] if keep else []
        places = [t for t in range(len(corpus)) if text_at[t] not in known | set(kept)]
        places.sort(key=lambda t: (-score[t], t))
        pos_scores = [score[texts[t]] for t in line["pos"]]
        limit = min(pos_scores) - margin if margin is not None else float("inf")
        fits = [p for p in range(lo, min(hi, len(places))) if score[places[p]] <= limit]
        rng = np.random.default_rng((seed, i))
        drawn = sorted(rng.choice(np.array(fits, int), min(n, len(fits)), replace=False))
        negs = kept + [text_at[places[p]] for p in drawn]
        pair = {"query": line["query"], "pos": line["pos"], "neg": negs, "pos_scores": pos_scores,
                "neg_scores": [score[texts[t]] for t in negs]}  # fmt: skip
        out.append(pair | ({"prompt": line["prompt"]} if line["prompt"] else {}))
    return out


@pytest.mark.parametrize("margin, keep", [(None, False), (1.0, False), (-2.0, True)])
def test_mining_equals_loops(margin, keep, monkeypatch):
    in_blocks = partial(mining.ranked, query_block=7, corpus_block=11)  # they divide nothing
    monkeypatch.setattr(mining, "ranked", in_blocks)
    for seed in range(3):
        made = made_up(np.random.default_rng(seed), 40, 60, 4)
        for lo, hi, n in [(0, 1, 1), (2, 12, 3), (5, 100, 7)]:
            rule = lo, hi, n, margin, keep, seed
            assert list(mining.mine(*made, *rule)) == mined_by_loops(*made, *rule)


def test_mining_with_too_few_texts():
    lines = [{"query": "q", "pos": ["t0"], "neg": [], "prompt": None}]
    made = lines, {"t0": 0, "t1": 1}, np.eye(1, 2, dtype="f4"), np.eye(2, dtype="f4")
    [pair] = mining.mine(*made, 0, 10, 5, None, False, 0)
    assert (pair["neg"], pair["pos_scores"], pair["neg_scores"]) == (["t1"], [1.0], [0.0])
    [pair] = mining.mine(*made, 1, 10, 5, None, False, 0)
    assert pair["neg"] == []  # the place before is passed over, nothing is left


def test_mining_by_bm25(tmp_path, capsys):
    lines = [{"query": "red fox", "pos": ["a red fox"], "neg": ["the blue sky"], "prompt": "p: "},
             {"query": "blue", "pos": ["blue whale, blue sea", "a fox at sea"]}]  # fmt: skip
    corpus = [{"text": text} for text in ("one fox", "RED or red", "red fox", "green")]
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", x) for i, x in enumerate((lines, corpus))]
    out = tmp_path / "out" / "mined.jsonl"
    argv = ["--model=bm25", f"--pairs={paths[0]}", f"--corpus={paths[1]}", f"--out={out}"]
    mining.main([*argv, "--range=0:3", "--negatives=3", "--keep"])
    texts = ["a red fox", "the blue sky", "blue whale, blue sea", "a fox at sea",
             *(line["text"] for line in corpus)]  # fmt: skip
    first, second = read_jsonl(out)
    assert first["prompt"] == "p: " and first["neg"][0] == "the blue sky"
    # not the query itself, and not its positive; the shortest with the rarest word first
    assert first["neg"][1:] == ["RED or red", "one fox", "a fox at sea"]
    assert second["neg"][0] == "the blue sky" and second["neg_scores"][1:] == [0, 0]
    for pair in (first, second):
        want = dict(zip(texts, BM25(texts).scores(pair["query"])))
        for side in ("pos", "neg"):
            np.testing.assert_allclose(pair[f"{side}_scores"], [want[t] for t in pair[side]], 1e-6)
    assert min(*first["pos_scores"], *first["neg_scores"][1:]) > 0.2
    with pytest.raises(SystemExit):
        mining.main([*argv, "--query_instruction=find: "])


def test_mining_script(tmp_path, toy_tokens, capsys):
    """End to end with a real embedder, whose instructions must reach queries and passages."""
    torch.manual_seed(0)
    model = from_scratch("modernbert-tiny", vocab_size=512)
    for p in model.parameters():  # far from its start, where all texts look alike
        p.data.add_(torch.randn_like(p), alpha=0.1)
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    prompts = {"query": "find: ", "document": "text: "}
    Embedder(model, tokenizer, prompts=prompts).save(tmp_path / "m", sentence_transformers=False)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [
        {"query": "tan", "pos": ["mon rin", "sun"], "prompt": "other: "},
        {"anchor": "tan", "positive": "ken ken"},
        {"query": "tälo", "pos": ["mos"], "neg": ["kema"]}])  # fmt: skip
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "rilo"}, {"text": "mos"}])
    out = tmp_path / "out" / "mined.jsonl"
    argv = [f"--pairs={pairs}", f"--out={out}", f"--corpus={corpus}", f"--model={tmp_path / 'm'}"]
    mining.main([*argv, "--range=0:9", "--negatives=9"])
    mined = read_jsonl(out)
    assert [set(pair["neg"]) for pair in mined] == [
        {"mos", "kema", "rilo"}, {"mos", "kema", "rilo"},
        {"mon rin", "sun", "ken ken", "kema", "rilo"}]  # fmt: skip
    embedder = Embedder.load(str(tmp_path / "m"), device="cpu")
    for pair, instruction in zip(mined, ("other: ", "find: ", "find: "), strict=True):
        query = embedder.encode([pair["query"]], instruction)[0]
        for side in ("pos", "neg"):
            scores = embedder.encode(pair[side], "text: ") @ query
            np.testing.assert_allclose(pair[f"{side}_scores"], scores, atol=1e-5)
        assert pair["neg_scores"] == sorted(pair["neg_scores"], reverse=True)
        assert len(set(np.round(pair["neg_scores"], 3))) > 1
    assert mined[0]["prompt"] == "other: " and "prompt" not in mined[1]
    assert pairs_of(out)[2]["neg_scores"] == mined[2]["neg_scores"]
    assert "3 lines with fewer than 9" in capsys.readouterr().out

    mining.main([*argv, "--range=0:9", "--negatives=0", "--keep", "--query_instruction="])
    scored = read_jsonl(out)
    assert [pair["neg"] for pair in scored] == [[], [], ["kema"]]
    bare = embedder.encode(["tälo"])[0] @ embedder.encode(["kema"], "text: ")[0]
    np.testing.assert_allclose(scored[2]["neg_scores"], [bare], atol=1e-5)
    assert os.listdir(tmp_path / "out") == ["mined.jsonl"]  # the file of vectors is gone
    for wrong in ("--range=5:5", "--negatives=-1", f"--out={pairs}"):
        with pytest.raises(SystemExit):
            mining.main([*argv, wrong])


# ---- configs ----
def test_echo_configs_fit_the_prepared_files():
    """The config's passage instructions are the ones of the symmetric tasks, file by file."""
    c, expected = harness.configured("train_contrastive.py", "contrastive_echo_data"), {}
    for name in echo.DATASETS:
        for file, prompt, both in echo.outputs(name, "; "):
            expected[f"data/echo/{file}.jsonl"] = prompt if both else ""
    assert dict(zip(c["data"], c["passage_instruction"], strict=True)) == expected
    assert c["passage_instruction"][0] == ""  # the saved model's, for passages
