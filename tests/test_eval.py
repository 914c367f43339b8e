"""eval_mteb.py: its scores against plain loops, its prompts, its errors. No network.

python -m pytest tests/test_eval.py
"""

import json
import math
import os
import subprocess
import sys

import mteb
import numpy as np
import pytest

from conftest import ROOT
from data import load_tokenizer
from embedder import Embedder, Template
from eval_mteb import (
    BM25,
    Encoder,
    evaluate,
    load_encoder,
    local_tasks,
    named_tasks,
    random_vectors,
    table,
    task_prompts,
)
from model import from_scratch

RNG = np.random.default_rng(0)
WORDS = [f"{a}{b}" for a in ("ta", "mo", "ri", "su", "ke") for b in ("n", "lo", "ma", "s")]


def sentence(rng, n=5):
    return " ".join(rng.choice(WORDS, n))


def counts(text):
    """Words as integer vectors: dot products are exact and have many ties."""
    return np.array([text.split().count(w) for w in WORDS], np.float32)


def word_encoder(scores="dot", own=None, calls=None):
    def embed(texts, prompt):
        if calls is not None:
            calls.append((prompt, texts))
        return np.stack([counts(text) for text in texts])

    return Encoder("words", embed, scores, own or {}, len(WORDS), "words")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scores_of(encoder, path, tmp_path, instructions="model", **options):
    """{task: all of mteb's scores} of a local task or several, as the script gets them."""
    tasks = local_tasks(path, **options)
    encoder.prompts = task_prompts(tasks, instructions, "{instruction}", encoder.own_prompts)
    rows = evaluate(encoder, tasks, tmp_path / "scores")
    found = {}
    for row in rows:
        (file,) = (tmp_path / "scores").glob(f"{row['task']}-*.json")
        (by_split,) = json.loads(file.read_text())["scores"].values()
        found[row["task"]] = by_split[0]
        main = by_split[0]["main_score"]  # in the file it is rounded
        assert main == by_split[0][row["metric"]] == pytest.approx(row["score"], abs=1e-6)
        file.unlink()
    return found


# ---- scores against loops ----


def ranks(values):
    """1.. from the smallest; equal values share the mean of their ranks."""
    return [
        sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values
    ]  # fmt: skip


def test_sts(tmp_path):
    rng = np.random.default_rng(1)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(s)}
            for s in rng.integers(0, 5, 30)]  # fmt: skip
    rows[3]["sentence1"] = '"a quoted word'  # a tsv has no quoting
    rows[4]["sentence1"] = rows[3]["sentence1"] + " ta"
    for row in rows:
        row["sentence1"] += " tan"
    write(tmp_path / "a" / "json" / "sts.jsonl", rows)
    lines = ["\t".join(map(str, row.values())) for row in [{k: k for k in rows[0]}, *rows]]
    (tmp_path / "a" / "tab").mkdir()
    (tmp_path / "a" / "tab" / "sts.tsv").write_text("\n".join(lines) + "\n")
    got = scores_of(word_encoder(), tmp_path / "a", tmp_path)
    assert list(got) == ["json", "tab"]

    gold = ranks([row["score"] for row in rows])
    a, b = ([counts(row[f"sentence{i}"]) for row in rows] for i in (1, 2))
    dots = ranks([float(x @ y) for x, y in zip(a, b, strict=True)])  # with ties
    for name in got:
        expected = np.corrcoef(dots, gold)[0, 1]
        assert got[name]["spearman"] == pytest.approx(expected, abs=1e-6)
    # and the main score, of vectors whose cosines are all different
    random = Encoder("random", random_vectors, "dot", {}, 64, "")
    got = scores_of(random, tmp_path / "a", tmp_path)["tab"]
    a, b = (random_vectors([row[f"sentence{i}"] for row in rows], "") for i in (1, 2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = np.corrcoef(ranks((a * b).sum(1)), gold)[0, 1]
    assert got["cosine_spearman"] == pytest.approx(expected, abs=1e-6) != got["spearman"]


def ndcg(ranked, grades, k=10):
    gain = sum(grades.get(d, 0) / math.log2(i + 2) for i, d in enumerate(ranked[:k]))
    best = sorted(grades.values(), reverse=True)[:k]
    return gain / sum(g / math.log2(i + 2) for i, g in enumerate(best))


def write_beir(folder, rng, n_docs=60, n_queries=8):
    docs = [{"_id": f"d{i}", "title": WORDS[i % 20], "text": sentence(rng)} for i in range(n_docs)]
    queries = [{"_id": f"q{i}", "text": sentence(rng, 2)} for i in range(n_queries + 1)]
    grades = {f"q{i}": {f"d{j}": int(rng.integers(1, 4)) for j in rng.choice(n_docs, 5, False)}
              for i in range(n_queries)}  # fmt: skip  # the last query has none: it is left out
    write(folder / "corpus.jsonl", docs)
    write(folder / "queries.jsonl", queries)
    lines = [f"{q}\t{d}\t{g}" for q in grades for d, g in grades[q].items()]
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
    )
    return docs, queries, grades


def test_retrieval(tmp_path):
    docs, queries, grades = write_beir(tmp_path / "beir", np.random.default_rng(2))
    got = scores_of(word_encoder(), tmp_path / "beir", tmp_path)["beir"]
    expected = []
    for q in queries[:-1]:
        scored = [(float(counts(q["text"]) @ counts(f"{d['title']} {d['text']}")), d["_id"])
                  for d in docs]  # fmt: skip
        # trec_eval: among equal scores the larger id comes first
        ranked = [d for _, d in sorted(scored, reverse=True)]
        expected.append(ndcg(ranked, grades[q["_id"]]))
    assert 0 < np.mean(expected) < 1
    assert got["ndcg_at_10"] == pytest.approx(np.mean(expected), abs=1e-5)  # mteb rounds to 5


def test_training_pairs_are_a_retrieval_task(tmp_path):
    rows = [{"query": "tan", "pos": ["tan ris", "kes"], "neg": ["tan tan"]},
            {"query": "ris", "pos": ["ris"]},
            {"query": "tan", "pos": ["tan tan tan"]}]  # fmt: skip
    write(tmp_path / "test.jsonl", rows)
    calls = []
    got = scores_of(word_encoder(calls=calls), tmp_path / "test.jsonl", tmp_path)["test"]
    assert sorted(len(texts) for _, texts in calls) == [2, 5]  # equal texts are one
    # tan: "tan tan tan" (positive), "tan tan", "tan ris" (positive), then "kes" by its id a1 or
    # behind the equal "ris" a3; ris: "tan ris" and "ris" tie, the larger id a3 = "ris" comes first
    dcg = 1 + 1 / math.log2(4) + 1 / math.log2(6)
    first = dcg / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    assert got["ndcg_at_10"] == pytest.approx((first + 1) / 2, abs=1e-5)


def test_a_lines_prompt_goes_before_its_query(tmp_path):
    rows = [{"query": "tan", "pos": ["ris kes"], "prompt": "ris "}, {"query": "su", "pos": ["su"]}]
    write(tmp_path / "test.jsonl", rows)
    calls = []
    scores_of(word_encoder(calls=calls), tmp_path / "test.jsonl", tmp_path)
    assert ["ris tan", "su"] in [sorted(texts) for _, texts in calls]


def test_reranking_and_ties(tmp_path):
    rng = np.random.default_rng(3)
    rows = [{"query": sentence(rng, 2), "positive": [sentence(rng) for _ in range(3)],
             "negative": [sentence(rng) for _ in range(12)]} for _ in range(9)]  # fmt: skip
    write(tmp_path / "r" / "reranking.jsonl", rows)
    got = scores_of(word_encoder(), tmp_path / "r", tmp_path)["r"]
    expected = []
    for row in rows:
        query = counts(row["query"])
        # negatives before positives among equals; of equal ones the order does not matter
        scored = sorted(
            [(-float(query @ counts(t)), 1) for t in row["positive"]]
            + [(-float(query @ counts(t)), 0) for t in row["negative"]]
        )
        hits, total = 0, 0.0
        for i, (_, hit) in enumerate(scored):
            hits += hit
            total += hit * hits / (i + 1)
        expected.append(total / 3)
    assert got["map_at_1000"] == pytest.approx(np.mean(expected), abs=1e-5)
    # who gives all texts one score gets the worst order, not the best
    same = Encoder("same", lambda texts, _: np.ones((len(texts), 2), "f4"), "dot", {}, 2, "")
    worst = np.mean([1 / 13, 2 / 14, 3 / 15])
    assert scores_of(same, tmp_path / "r", tmp_path)["r"]["map_at_1000"] == pytest.approx(
        worst, abs=1e-5
    )


def test_pairs(tmp_path):
    rng = np.random.default_rng(4)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "label": int(rng.integers(2))}
            for _ in range(40)]  # fmt: skip
    write(tmp_path / "p" / "pairs.jsonl", rows)
    got = scores_of(word_encoder(), tmp_path / "p", tmp_path)["p"]
    scored = [(float(counts(r["sentence1"]) @ counts(r["sentence2"])), r["label"]) for r in rows]
    total = positives = seen = 0  # average precision, equal scores as one step
    for value in sorted({s for s, _ in scored}, reverse=True):
        group = [label for s, label in scored if s == value]
        positives, seen = positives + sum(group), seen + len(group)
        total += sum(group) * positives / seen
    assert got["dot_ap"] == pytest.approx(total / sum(r["label"] for r in rows), abs=1e-6)
    assert got["max_ap"] >= got["dot_ap"]


def test_classification_and_clustering(tmp_path):
    rng = np.random.default_rng(5)
    topics = {"a": WORDS[:8], "b": WORDS[6:14], "c": WORDS[12:]}  # neighbours share two words
    rows = [{"text": " ".join(rng.choice(topics[t], 5)), "label": t} for t in "abc" * 40]
    write(tmp_path / "x" / "topics" / "train.jsonl", rows[:60])
    write(tmp_path / "x" / "topics" / "dev.jsonl", rows[60:])
    write(tmp_path / "x" / "groups" / "clustering.jsonl", rows)
    got = [scores_of(word_encoder(), tmp_path / "x", tmp_path, split="dev") for _ in range(2)]
    random = Encoder("random", random_vectors, "cosine", {}, 64, "")
    floor = scores_of(random, tmp_path / "x", tmp_path, split="dev")
    assert got[0]["topics"]["accuracy"] > 0.8 and floor["topics"]["accuracy"] < 0.55
    assert len(got[0]["topics"]["scores_per_experiment"]) == 10
    assert got[0]["groups"]["v_measure"] > 0.4 and floor["groups"]["v_measure"] < 0.1
    for name in got[0]:  # new tasks, same draws
        assert got[0][name]["main_score"] == got[1][name]["main_score"]
    # topics that share no word: the clusters are the labels
    rows = [{"text": f"{WORDS[i % 3]} {WORDS[i % 3]}", "label": i % 3} for i in range(60)]
    write(tmp_path / "y" / "clustering.jsonl", rows)
    assert scores_of(word_encoder(), tmp_path / "y", tmp_path)["y"]["v_measure"] == pytest.approx(1)


def test_max_sim(tmp_path):
    """Multi-vector models: retrieval by the sum over query tokens of the best document token."""
    docs, queries, grades = write_beir(tmp_path / "beir", np.random.default_rng(6))
    write(tmp_path / "sts" / "sts.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])

    def tokens(text):
        rng = [np.random.default_rng(WORDS.index(w)) for w in text.split()]
        return np.stack([r.random(16, np.float32) for r in rng])

    encoder = Encoder("many", lambda t, _: [tokens(x) for x in t], "MaxSim", {}, 16, "")
    got = scores_of(encoder, tmp_path, tmp_path)
    assert list(got) == ["beir"]  # there is no similarity for pairs
    expected = []
    for q in queries[:-1]:
        each = [tokens(q["text"]) @ tokens(f"{d['title']} {d['text']}").T for d in docs]
        scored = [(x.max(1).sum(), d["_id"]) for x, d in zip(each, docs, strict=True)]
        ranked = [d for _, d in sorted(scored, reverse=True)]
        expected.append(ndcg(ranked, grades[q["_id"]]))
    assert got["beir"]["ndcg_at_10"] == pytest.approx(np.mean(expected), abs=1e-4)


# ---- BM25 ----


def test_bm25_by_hand(tmp_path):
    from datasets import Dataset

    docs = {"x": "The cat sat.", "y": "the CAT, the dog", "z": "a bird", "w": ""}
    bm25 = BM25()
    bm25.index(Dataset.from_dict({"id": list(docs), "text": list(docs.values())}))
    queries = Dataset.from_dict({"id": ["1", "2"], "text": ["Cat dog unknown", "the the"]})
    got = bm25.search(queries, top_k=10)
    # lengths 3, 4, 2, 0: mean 2.25. cat in 2 of 4 documents, dog in 1, the in 2
    idf = {n: math.log(1 + (4 - n + 0.5) / (n + 0.5)) for n in (1, 2)}
    k3, k4 = (1.2 * (0.25 + 0.75 * n / 2.25) for n in (3, 4))
    x, y = idf[2] / (1 + k3), idf[2] / (1 + k4) + idf[1] / (1 + k4)
    assert got["1"] == pytest.approx({"y": y, "x": x}, rel=1e-6)  # z and w share no word
    assert got["2"] == pytest.approx({"y": 2 * idf[2] * 2 / (2 + k4), "x": 2 * x}, rel=1e-6)
    assert list(bm25.search(queries, top_k=1)["1"]) == ["y"]
    titled = {"id": list(docs), "title": ["The", "the CAT", "", ""],
              "text": ["cat sat.", "the dog", "a bird", ""]}  # fmt: skip
    other = BM25()
    other.index(Dataset.from_dict(titled))
    assert other.search(queries, top_k=10) == got
    again = bm25.search(queries, top_k=10, top_ranked={"1": ["z", "x"], "2": ["w"]})
    assert again == {"1": {"z": 0.0, "x": pytest.approx(x)}, "2": {"w": 0.0}}


def test_bm25_in_mteb(tmp_path):
    """Documents with their titles, queries without prompts; no row where nothing is searched."""
    docs, queries, grades = write_beir(tmp_path / "beir", np.random.default_rng(7))
    docs[0]["text"] = "solitary"
    write(tmp_path / "beir" / "corpus.jsonl", docs)
    row = {"query": "tan kes", "positive": ["tan kes ris"], "negative": ["ris", "ris mos"]}
    write(tmp_path / "re" / "reranking.jsonl", [row])
    write(tmp_path / "sts" / "sts.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    bm25 = BM25()
    got = scores_of(bm25, tmp_path, tmp_path)
    assert list(got) == ["beir", "re"] and got["re"]["map_at_1000"] == 1
    from datasets import Dataset

    bm25.index(Dataset.from_list([{"id": d["_id"], **d} for d in docs]))
    found = bm25.search(Dataset.from_list([{"id": q["_id"], **q} for q in queries]), top_k=100)
    expected = [
        ndcg(sorted(found[q], key=lambda d: (found[q][d], d), reverse=True), grades[q])  # noqa: B023
        for q in grades
    ]
    assert got["beir"]["ndcg_at_10"] == pytest.approx(np.mean(expected), abs=1e-5)


# ---- prompts ----


def test_each_side_gets_its_prompt(tmp_path):
    write_beir(tmp_path / "beir", np.random.default_rng(8), 12, 2)
    write(tmp_path / "re" / "reranking.jsonl",
          [{"query": "tan kes", "positive": ["tan"], "negative": ["ris"]}])  # fmt: skip
    write(tmp_path / "sts" / "sts.jsonl",
          [{"sentence1": f"tan {w}", "sentence2": f"ris {w}", "score": i % 3}
           for i, w in enumerate(WORDS[:5])])  # fmt: skip
    calls, own = [], {"query": "Q: ", "document": "D: ", "STS": "S: "}
    scores_of(word_encoder(own=own, calls=calls), tmp_path, tmp_path)
    sides = {text: prompt for prompt, texts in calls for text in texts}
    assert sides["tan kes"] == "Q: " and sides["tan"] == "D: "
    assert sides["tan tan"] == sides["ris tan"] == "S: " and sides["ris"] == "D: "
    assert [prompt for prompt, _ in calls] == ["Q: ", "D: ", "Q: ", "D: ", "S: ", "S: "]
    beir = json.loads((tmp_path / "beir" / "queries.jsonl").read_text().splitlines()[0])
    assert sides[beir["text"]] == "Q: "

    calls.clear()
    file = tmp_path / "file.json"
    lines = {"beir": "Find it", "re": {"query": "q", "document": "d"}, "sts": ""}
    file.write_text(json.dumps(lines))
    encoder = word_encoder(own=own, calls=calls)
    scores_of(encoder, tmp_path, tmp_path, str(file))
    assert [prompt for prompt, _ in calls] == ["Find it", "D: ", "q", "d", "", ""]


def test_task_prompts(tmp_path):
    tasks = named_tasks("STSBenchmark,SciFact,CQADupstackRetrieval")
    own = {"query": "Q: ", "document": "D: ", "SciFact": "own"}
    template = "Instruct: {instruction}\\nQuery: "
    got = task_prompts(tasks, "mteb", template, {"query": "not this", "document": "D: "})
    scifact = "Given a scientific claim, retrieve documents that support or refute the claim"
    assert got["SciFact"] == {"query": f"Instruct: {scifact}\nQuery: ", "document": "D: "}
    assert got["STSBenchmark"]["query"] == (
        "Instruct: Retrieve semantically similar text.\nQuery: "  # of the type: the task has none
    )
    assert len(got) == 2 + 12 and "CQADupstackRetrieval" not in got
    got = task_prompts(tasks, "model", template, own)  # as they are: no template
    assert got["SciFact"] == {"query": "own", "document": "D: "}
    assert got["STSBenchmark"] == {"query": "Q: ", "document": "D: "}

    file = tmp_path / "instructions.json"
    lines = {"STSBenchmark": "", "SciFact": {"query": "a", "document": "b"}}
    file.write_text(json.dumps(lines | {"CQADupstackRetrieval": "c"}))
    got = task_prompts(tasks, str(file), "{instruction}: ", {})
    assert got["STSBenchmark"] == {"query": "", "document": ""}  # an empty one gets no template
    assert got["SciFact"] == {"query": "a: ", "document": "b"}
    assert got["CQADupstackAndroidRetrieval"] == {"query": "c: ", "document": ""}
    file.write_text(json.dumps(lines))
    with pytest.raises(SystemExit, match="instructions.json has no line for CQADupstackAndroid"):
        task_prompts(tasks, str(file), "{instruction}", {})


# ---- results are never another model's ----


def test_same_path_other_model(tmp_path, toy_tokens):
    """What is reused belongs to these very weights, this template, these prompts."""
    tokenizer = load_tokenizer(f"{toy_tokens}/tokenizer")
    docs = write_beir(tmp_path / "beir", np.random.default_rng(9))[0]

    def save(seed, prompts):
        import torch

        torch.manual_seed(seed)
        net = from_scratch("modernbert-tiny", n_layer=1, n_embd=32, n_head=2, n_hidden=32,
                           layer_kinds=["global"], vocab_size=512, max_seq_len=64)  # fmt: skip
        torch.nn.init.normal_(net.embed.weight)
        e = Embedder(net, tokenizer, prompts=prompts)
        e.save(tmp_path / "model", sentence_transformers=False)

    def run(similarity=None):
        tasks = local_tasks(tmp_path / "beir")
        encoder = load_encoder(str(tmp_path / "model"), "cpu", dtype="fp32", similarity=similarity)
        encoder.prompts = task_prompts(tasks, "model", "", encoder.own_prompts)
        (row,) = evaluate(encoder, tasks, tmp_path / "scores", reuse=True)
        return row["score"], row["how"].startswith("from")

    save(0, {"query": "", "document": ""})
    first = run()
    assert run() == (first[0], True) and not first[1]
    save(1, {"query": "", "document": ""})
    second = run()
    assert second[0] != first[0] and not second[1]
    save(1, {"query": "tan ", "document": ""})
    assert not run()[1]
    save(0, {"query": "", "document": ""})
    assert run() == (first[0], True)
    assert not run("dot")[1]
    # the scores are those of the embedder
    e = Embedder.load(str(tmp_path / "model"), dtype="fp32", device="cpu")
    texts = [f"{d['title']} {d['text']}" for d in docs]
    got = load_encoder(str(tmp_path / "model"), "cpu", dtype="fp32").embed(texts, "tan ")
    np.testing.assert_array_equal(got, e.encode(texts, "tan "))
    e.template = Template("ris ", " su")
    wrapped = load_encoder(str(tmp_path / "model"), "cpu", dtype="fp32", template=e.template)
    np.testing.assert_array_equal(wrapped.embed(texts, "tan "), e.encode(texts, "tan "))
    assert wrapped.embed(texts, "").tolist() != got.tolist()


# ---- by name ----


def test_named_tasks():
    tasks = named_tasks("STSBenchmark, SciFact")
    assert [t.metadata.name for t in tasks] == ["STSBenchmark", "SciFact"]
    assert len(named_tasks("", "MTEB(eng, v2)")) == 41
    assert named_tasks("STS17", languages="eng")[0].hf_subsets == ["en-en"]
    with pytest.raises(SystemExit, match="STSBenchmrk.*Did you mean: 'STSBenchmark'"):
        named_tasks("STSBenchmrk")
    with pytest.raises(SystemExit, match="Did you mean"):
        named_tasks("", "MTEB(en, v2)")
    with pytest.raises(SystemExit, match="GermanSTSBenchmark: nothing in these languages: eng"):
        named_tasks("GermanSTSBenchmark,STS17", languages="eng")


def test_data_that_cannot_be_loaded(tmp_path, monkeypatch):
    def no_network(self, **_):
        raise ConnectionError("Couldn't reach 'mteb/stsbenchmark-sts' on the Hub")

    tasks = named_tasks("STSBenchmark")
    monkeypatch.setattr(type(tasks[0]), "load_data", no_network)
    encoder = word_encoder()
    encoder.prompts = task_prompts(tasks, "model", "", {})
    with pytest.raises(SystemExit, match="STSBenchmark: cannot load mteb/stsbenchmark-sts: Conn"):
        evaluate(encoder, tasks, tmp_path)


@pytest.mark.parametrize("file, text, message", [
    ("sts.jsonl", '{"sentence1": "a", "sentence2": "b"}', "sts.jsonl line 1: field 'score'"),
    ("sts.tsv", "sentence1\tsentence2\tscore\na\tb\t1\na\tb\tx", "sts.tsv line 3: field 'score'"),
    ("pairs.tsv", "sentence1\tsentence2\na\tb", "pairs.tsv line 2: field 'label' is missing"),
    ("pairs.tsv", "sentence1\tsentence2\tlabel\na\tb\t2", "labels are 0 and 1"),
    ("clustering.jsonl", "\n", "has no rows"),
    ("train.jsonl", '{"text": "a", "label": 1}', "test.jsonl"),
    ("reranking.jsonl", '{"query": "a", "positive": "b", "negative": []}', "list of str"),
    ("corpus.jsonl", '{"_id": 1, "text": "a"}', "corpus.jsonl line 1: field '_id' is 1"),
])  # fmt: skip
def test_broken_files(tmp_path, file, text, message):
    (tmp_path / file).write_text(text + "\n")
    tasks = local_tasks(tmp_path)
    encoder = word_encoder()
    encoder.prompts = task_prompts(tasks, "model", "", {})
    with pytest.raises(SystemExit, match=message):
        evaluate(encoder, tasks, tmp_path / "scores")


def test_other_broken_folders(tmp_path):
    write_beir(tmp_path / "beir", np.random.default_rng(0), 12, 2)
    with open(tmp_path / "beir" / "qrels" / "test.tsv", "a") as f:
        f.write("q0\tno\t1\n")
    with pytest.raises(ValueError, match="test.tsv: there is no text for corpus-id 'no'"):
        local_tasks(tmp_path)[0].load_data()
    with pytest.raises(SystemExit, match="a task's folder"):
        local_tasks(tmp_path / "nothing")
    (tmp_path / "beir" / "sts.jsonl").write_text("")
    with pytest.raises(SystemExit, match="with one file of"):
        local_tasks(tmp_path)


# ---- the table ----


def test_table():
    def row(model, task, kind, score):
        return {"model": model, "task": task, "type": kind, "metric": "m", "score": score}

    rows = [row("x", "a", "STS", 0.5), row("x", "b", "STS", 0.7), row("x", "c", "Retrieval", 0.2),
            row("bm25", "c", "Retrieval", 0.25)]  # fmt: skip
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table(rows).splitlines()]
    assert lines[0] == ["task", "type", "metric", "x", "bm25"]
    assert lines[2:] == [
        ["a", "STS", "m", "50.00", ""], ["b", "STS", "m", "70.00", ""],
        ["c", "Retrieval", "m", "20.00", "25.00"], ["mean over tasks", "", "", "46.67", ""],
        ["mean over types", "", "", "40.00", ""],
    ]  # fmt: skip
    assert len({len(line) for line in table(rows).splitlines()}) == 1
    assert len(table(rows[2:]).splitlines()) == 3  # one task has no mean


def test_script(tmp_path):
    """The command, with a sentence-transformers model made here; also what a wrong one says."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, "?"])}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = RNG.standard_normal((21, 32)).astype(np.float32)
    st = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=vectors)])
    st.save(str(tmp_path / "st"))
    docs, queries, grades = write_beir(tmp_path / "beir", np.random.default_rng(10))
    command = [sys.executable, os.path.join(ROOT, "eval_mteb.py"), f"--out_dir={tmp_path}/out",
               f"--model=st:{tmp_path}/st"]  # fmt: skip
    run = [*command, f"--local={tmp_path}/beir"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == [f"st:{tmp_path}/st", "bm25", "random"]
    assert results["mteb"] == mteb.__version__
    assert (tmp_path / "out" / "results.md").read_text() in done.stdout
    q, d = (st.encode([x["text"] if x in queries else f"{x['title']} {x['text']}" for x in many])
            for many in (queries, docs))  # fmt: skip
    q, d = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d))
    expected = [ndcg([docs[j]["_id"] for j in np.argsort(-(q[i] @ d.T))], grades[f"q{i}"])
                for i in range(8)]  # fmt: skip
    assert results["rows"][0]["score"] == pytest.approx(np.mean(expected), abs=1e-4)
