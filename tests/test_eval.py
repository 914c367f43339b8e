"""eval_mteb.py: its scores against plain loops, its prompts, its errors. No network."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import bm25s
import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset

import eval_mteb
from bm25 import BM25, stems_of, words_of
from embedder import Embedder
from eval_mteb import Encoder, evaluate, local_tasks, named_tasks, random_vectors, task_prompts
from harness import ROOT, WORDS, ndcg, raises, write_jsonl
from model import from_scratch
from tokenizer import Template, load_tokenizer, tokenize

RNG = np.random.default_rng(0)


def sentence(rng, n=5):
    return " ".join(rng.choice(WORDS, n))


def sentence_pairs(rng, n, field, high):
    """Rows of two sentences and a number below `high`."""
    return [{"sentence1": sentence(rng), "sentence2": sentence(rng), field: int(rng.integers(high))}
            for _ in range(n)]  # fmt: skip


def counts(text):
    """Words as integer vectors: dot products are exact and have many ties."""
    return np.array([text.split().count(w) for w in WORDS], np.float32)


def word_encoder(saved=None, calls=None):
    def embed(texts, prompt):
        if calls is not None:
            calls.append((prompt, texts))
        return np.stack([counts(text) for text in texts])

    return Encoder("words", embed, "dot", saved or {}, len(WORDS), "words")


def random_encoder(scores):
    return Encoder("random", random_vectors, scores, {}, 64, "")


def scores_of(encoder, path, tmp_path, **options):
    """{task: all of mteb's scores} of a local task or several, as the script gets them."""
    tasks = path if isinstance(path, list) else local_tasks(path, **options)
    encoder.prompts = task_prompts(tasks, "model", "", encoder.saved)
    rows, found = evaluate(encoder, tasks, tmp_path / "scores"), {}
    for row in rows:
        (file,) = (tmp_path / "scores").glob(f"{row['task']}-*.json")
        (by_split,) = json.loads(file.read_text())["scores"].values()
        found[row["task"]] = by_split[0]
        main = by_split[0]["main_score"]  # in the file it is rounded
        assert main == by_split[0][row["metric"]] == pytest.approx(row["score"], abs=1e-6)
        file.unlink()
        if row["type"] in ("Retrieval", "Reranking"):
            queries = json.loads((tmp_path / "scores" / row["queries"]).read_text())
            mean = np.mean([query["ndcg_at_10"] for query in queries])
            assert by_split[0]["ndcg_at_10"] == pytest.approx(mean, abs=1e-5)
    return found


def ranks(values):
    """1.. from the smallest; equal values share the mean of their ranks."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def test_sts(tmp_path):
    rows = sentence_pairs(np.random.default_rng(1), 30, "score", 5)
    rows[3]["sentence1"] = '"a quoted word'  # a tsv has no quoting
    rows[4]["sentence1"] = rows[3]["sentence1"] + " ta"
    write_jsonl(tmp_path / "a" / "json" / "sts.jsonl", rows)
    lines = ["\t".join(map(str, row.values())) for row in [{k: k for k in rows[0]}, *rows]]
    (tmp_path / "a" / "tab").mkdir()
    (tmp_path / "a" / "tab" / "sts.tsv").write_text("\n".join(lines) + "\n")
    got = scores_of(word_encoder(), tmp_path / "a", tmp_path)
    gold = ranks([row["score"] for row in rows])
    a, b = ([counts(row[f"sentence{i}"]) for row in rows] for i in (1, 2))
    dots = ranks([float(x @ y) for x, y in zip(a, b)])  # with ties
    expected = pytest.approx(np.corrcoef(dots, gold)[0, 1], abs=1e-6)
    assert {name: x["spearman"] for name, x in got.items()} == {"json": expected, "tab": expected}
    # and the main score, of vectors whose cosines are all different
    got = scores_of(random_encoder("dot"), tmp_path / "a", tmp_path)["tab"]
    a, b = (random_vectors([row[f"sentence{i}"] for row in rows], "") for i in (1, 2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = np.corrcoef(ranks((a * b).sum(1)), gold)[0, 1]
    assert got["cosine_spearman"] == pytest.approx(expected, abs=1e-6) != got["spearman"]


def write_beir(folder, rng, n_docs=60, n_queries=8):
    docs = [{"_id": f"d{i}", "title": WORDS[i % 20], "text": sentence(rng)} for i in range(n_docs)]
    queries = [{"_id": f"q{i}", "text": sentence(rng, 2)} for i in range(n_queries + 1)]
    grades = {f"q{i}": {f"d{j}": int(rng.integers(1, 4)) for j in rng.choice(n_docs, 5, False)}
              for i in range(n_queries)}  # fmt: skip  # the last query has none: it is left out
    write_jsonl(folder / "corpus.jsonl", docs)
    write_jsonl(folder / "queries.jsonl", queries)
    lines = [f"{q}\t{d}\t{g}\n" for q in grades for d, g in grades[q].items()]
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return docs, queries, grades


def beir_ndcg(docs, queries, grades, score):
    """The mean nDCG@10 of an order by score(query, title and text of a document)."""
    found = []
    for q in queries[:-1]:
        scored = [(score(q["text"], f"{d['title']} {d['text']}"), d["_id"]) for d in docs]
        # trec_eval: among equal scores the larger id comes first
        ranked = [d for _, d in sorted(scored, reverse=True)]
        found.append(ndcg(ranked, grades[q["_id"]], 10))
    return np.mean(found)


def tokens(text):
    """A vector for each word."""
    rng = [np.random.default_rng(WORDS.index(word)) for word in text.split()]
    return np.stack([r.random(16, np.float32) for r in rng])


@pytest.mark.parametrize("kind", ["words", "MaxSim", "bm25"])
def test_retrieval(kind, tmp_path):
    """By dot products; of multi-vector models by the sum over the query's tokens of the best
    document token; by BM25. Documents have their titles before them."""
    beir = write_beir(tmp_path / "beir", np.random.default_rng(2))
    write_jsonl(tmp_path / "sts" / "sts.jsonl", sentence_pairs(RNG, 5, "score", 9))
    if kind == "words":
        encoder, score = word_encoder(), lambda q, d: float(counts(q) @ counts(d))
    elif kind == "MaxSim":
        encoder = Encoder("many", lambda t, _: [tokens(x) for x in t], "MaxSim", {}, 16, "")
        score = lambda q, d: (tokens(q) @ tokens(d).T).max(1).sum()  # noqa: E731
    else:
        documents = [f"{d['title']} {d['text']}" for d in beir[0]]
        encoder, index = eval_mteb.BM25Search(), BM25(documents)
        score = lambda q, d: index.scores(q)[documents.index(d)]  # noqa: E731
    got = scores_of(encoder, tmp_path, tmp_path)
    assert list(got) == ["beir", "sts"][: 1 + (kind == "words")]  # no similarity for pairs
    expected = beir_ndcg(*beir, score)
    assert 0 < expected < 1  # mteb rounds to 5 digits
    tolerance = 1e-4 if kind == "MaxSim" else 1e-5
    assert got["beir"]["ndcg_at_10"] == pytest.approx(expected, abs=tolerance)


def test_training_pairs_are_a_retrieval_task(tmp_path):
    rows = [{"query": "tan", "pos": ["tan ris", "kes"], "neg": ["tan tan"]},
            {"query": "ris", "pos": ["ris"]}, {"query": "tan", "pos": ["tan tan tan"]}]  # fmt: skip
    write_jsonl(tmp_path / "test.jsonl", rows)
    calls = []
    got = scores_of(word_encoder(calls=calls), tmp_path / "test.jsonl", tmp_path)["test"]
    assert sorted(len(texts) for _, texts in calls) == [2, 5]  # equal texts are one
    # tan: "tan tan tan" (positive), "tan tan", "tan ris" (positive), then "kes" by its id a1 or
    # behind the equal "ris" a3; ris: "tan ris" and "ris" tie, the larger id a3 = "ris" comes first
    dcg = 1 + 1 / math.log2(4) + 1 / math.log2(6)
    first = dcg / (1 + 1 / math.log2(3) + 1 / math.log2(4))
    assert got["ndcg_at_10"] == pytest.approx((first + 1) / 2, abs=1e-5)
    # a line's prompt goes before its query
    rows = [{"query": "tan", "pos": ["ris kes"], "prompt": "ris "}, {"query": "su", "pos": ["su"]}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    scores_of(word_encoder(calls=calls), tmp_path / "test.jsonl", tmp_path)
    assert ["ris tan", "su"] in [sorted(texts) for _, texts in calls]


def test_more_passages_and_modules(tmp_path):
    """Passages of other files are ranked, too; what is kept of each query."""
    rows = [{"query": "tan", "pos": ["tan ris"], "module": "a"}, {"query": "sun", "pos": ["sun"]}]
    more = [{"query": "x", "pos": ["tan tan", "sun"], "neg": ["tan tan tan"]}]
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", x) for n, x in (("test", rows), ("more", more))]
    tasks = local_tasks(paths[0], corpus=(paths[1], paths[0]))
    got = scores_of(word_encoder(), tasks, tmp_path)["test+more+test"]
    assert got["ndcg_at_10"] == pytest.approx((1 / math.log2(4) + 1) / 2, abs=1e-5)
    (file,) = (tmp_path / "scores").glob("queries-*.json")
    tan, sun = json.loads(file.read_text())
    assert tan == {"id": "q0", "text": "tan", "module": "a", "ndcg_at_10": 0.5,
                   "top": ["b3", "b2", "a0", "a1"], "relevant": {"a0": 1}}  # fmt: skip
    assert (sun["module"], sun["top"][0], sun["relevant"]) == ("", "a1", {"a1": 1})
    with pytest.raises(SystemExit, match="corpus goes with a file of pairs"):
        write_beir(tmp_path / "beir", np.random.default_rng(0), 12, 2)
        local_tasks(tmp_path / "beir", corpus=(paths[1],))


def test_reranking_and_ties(tmp_path):
    rng = np.random.default_rng(3)
    rows = [{"query": sentence(rng, 2), "positive": [sentence(rng) for _ in range(3)],
             "negative": [sentence(rng) for _ in range(12)]} for _ in range(9)]  # fmt: skip
    write_jsonl(tmp_path / "r" / "reranking.jsonl", rows)
    got, expected = scores_of(word_encoder(), tmp_path / "r", tmp_path)["r"], []
    for row in rows:
        query = counts(row["query"])
        # negatives before positives among equals; of equal ones the order does not matter
        scored = sorted((-float(query @ counts(text)), side == "positive")
                        for side in ("positive", "negative") for text in row[side])  # fmt: skip
        hits, total = 0, 0.0
        for i, (_, hit) in enumerate(scored):
            hits += hit
            total += hit * hits / (i + 1)
        expected.append(total / 3)
    assert got["map_at_1000"] == pytest.approx(np.mean(expected), abs=1e-5)
    # who gives all texts one score gets the worst order, not the best
    same = Encoder("same", lambda texts, _: np.ones((len(texts), 2), "f4"), "dot", {}, 2, "")
    got = scores_of(same, tmp_path / "r", tmp_path)["r"]["map_at_1000"]
    assert got == pytest.approx(np.mean([1 / 13, 2 / 14, 3 / 15]), abs=1e-5)
    row = {"query": "tan kes", "positive": ["tan kes ris"], "negative": ["ris", "ris mos"]}
    write_jsonl(tmp_path / "one" / "reranking.jsonl", [row])
    assert scores_of(eval_mteb.BM25Search(), tmp_path / "one", tmp_path)["one"]["map_at_1000"] == 1


def test_pairs(tmp_path):
    rows = sentence_pairs(np.random.default_rng(4), 40, "label", 2)
    write_jsonl(tmp_path / "p" / "pairs.jsonl", rows)
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
    write_jsonl(tmp_path / "x" / "topics" / "train.jsonl", rows[:60])
    write_jsonl(tmp_path / "x" / "topics" / "dev.jsonl", rows[60:])
    write_jsonl(tmp_path / "x" / "groups" / "clustering.jsonl", rows)
    got = [scores_of(word_encoder(), tmp_path / "x", tmp_path, split="dev") for _ in range(2)]
    floor = scores_of(random_encoder("cosine"), tmp_path / "x", tmp_path, split="dev")
    assert got[0]["topics"]["accuracy"] > 0.8 and floor["topics"]["accuracy"] < 0.55
    assert len(got[0]["topics"]["scores_per_experiment"]) == 10
    assert got[0]["groups"]["v_measure"] > 0.4 and floor["groups"]["v_measure"] < 0.1
    for name in got[0]:  # new tasks, same draws
        assert got[0][name]["main_score"] == got[1][name]["main_score"]
    # topics that share no word: the clusters are the labels
    rows = [{"text": f"{WORDS[i % 3]} {WORDS[i % 3]}", "label": i % 3} for i in range(60)]
    write_jsonl(tmp_path / "y" / "clustering.jsonl", rows)
    assert scores_of(word_encoder(), tmp_path / "y", tmp_path)["y"]["v_measure"] == pytest.approx(1)


def test_bm25_by_hand():
    bm25, titled = eval_mteb.BM25Search(), eval_mteb.BM25Search()
    texts = ["The cat sat.", "the CAT, the dog", "a bird", ""]
    bm25.index(Dataset.from_dict({"id": list("xyzw"), "text": texts}))
    queries = Dataset.from_dict({"id": ["1", "2"], "text": ["Cat dog unknown", "the the"]})
    got = bm25.search(queries, top_k=10)
    # lengths 3, 4, 2, 0: mean 2.25. cat in 2 of 4 documents, dog in 1, the in 2
    idf = {n: math.log(1 + (4 - n + 0.5) / (n + 0.5)) for n in (1, 2)}
    k3, k4 = (1.2 * (0.25 + 0.75 * n / 2.25) for n in (3, 4))
    x, y = idf[2] / (1 + k3), idf[2] / (1 + k4) + idf[1] / (1 + k4)
    assert got["1"] == pytest.approx({"y": y, "x": x}, rel=1e-6)  # z and w share no word
    assert got["2"] == pytest.approx({"y": 2 * idf[2] * 2 / (2 + k4), "x": 2 * x}, rel=1e-6)
    assert list(bm25.search(queries, top_k=1)["1"]) == ["y"]
    rest = {"title": ["The", "the CAT", "", None], "text": ["cat sat.", "the dog", "a bird", ""]}
    titled.index(Dataset.from_dict({"id": list("xyzw")} | rest))
    assert titled.search(queries, top_k=10) == got
    again = bm25.search(queries, top_k=10, top_ranked={"1": ["z", "x"], "2": ["w"]})
    assert again == {"1": {"z": 0.0, "x": pytest.approx(x)}, "2": {"w": 0.0}}


def test_bm25_equals_a_library():
    """bm25s (Lu 2024, arXiv 2407.03618), its method "lucene" with the idf of Lucene."""
    rng = np.random.default_rng(6)
    vocabulary = [*WORDS, "read_csv", "readCSV", "HTTPServer", "Splitting", "splits", "of.a.path"]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 40))) for _ in range(80)]
    queries = [" ".join(rng.choice([*vocabulary, "unknown"], 6)) for _ in range(20)]
    for k1, b, words in ((1.2, 0.75, words_of), (2.3, 0.4, stems_of), (0.6, 1.0, stems_of)):
        ours = BM25(texts, k1, b, words)
        theirs = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64")
        theirs.index([words(text) for text in texts], show_progress=False)
        for query in queries:
            want = theirs.get_scores(words(query))
            np.testing.assert_allclose(ours.scores(query), want, rtol=1e-12, atol=1e-12)
            assert want.max() > 1


def test_bm25_by_its_name():
    got = stems_of("read_csv readCSV HTTPServer Splits")
    assert got == ["read", "csv", "read", "csv", "http", "server", "split"]
    index = eval_mteb.BM25Search("bm25:stem:k1=0.9:b=0.4")
    assert index.settings == (0.9, 0.4, stems_of)
    assert eval_mteb.BM25Search("bm25:b=0.4").settings == (1.2, 0.4, words_of)
    for wrong in ("bm25:k1=x", "bm25:b=0.4:k1=1", "bm25stem", "bm25:cut"):
        with pytest.raises(SystemExit, match=f"{wrong}: expected bm25 or such as bm25:stem:k1=0.9"):
            eval_mteb.BM25Search(wrong)
    with pytest.raises(SystemExit, match="bm25:cut=8: cut counts the tokens of the first --model"):
        load_encoder("bm25:cut=8", model="")


def test_bm25_cuts_as_the_embedder(toy_tokens, monkeypatch):
    """It reads what is left of a text that the embedder's tokenizer cuts, and nothing else."""
    tokenizer = load_tokenizer(f"{toy_tokens}/tokenizer")
    index = eval_mteb.BM25Search("bm25:cut=9", tokenizer)
    long = [" ".join(RNG.choice([*WORDS, "naïve", "😀"], 30)) for _ in range(20)]
    for text, (ids, _) in zip(long, tokenize(tokenizer, long, "", Template(), 9)):
        part = index.begin(text)
        assert text.startswith(part) and 0 < len(part) < len(text) and len(ids) == 9
        assert set(tokenizer(part)["input_ids"]) >= set(ids) or "\ufffd" in tokenizer.decode(ids)
    assert index.begin("tan ris") == "tan ris"
    index.index(Dataset.from_dict({"id": ["x"], "text": [" ".join(["tan"] * 20 + ["ris"])]}))
    texts = ["ris", " ".join(["su"] * 20 + ["tan"])]
    queries = Dataset.from_dict({"id": ["1", "2"], "text": texts})
    assert index.search(queries, top_k=5) == {"1": {}, "2": {}}
    monkeypatch.setattr(eval_mteb, "resolve_folder", lambda name: f"{toy_tokens}/{name}")
    same = load_encoder("bm25:cut=9", model="tokenizer,other")
    assert same.begin(long[0]) == index.begin(long[0])


def test_each_side_gets_its_prompt(tmp_path):
    queries = write_beir(tmp_path / "beir", np.random.default_rng(8), 12, 2)[1]
    rows = [{"query": "tan kes", "positive": ["tan"], "negative": ["ris"]}]
    write_jsonl(tmp_path / "re" / "reranking.jsonl", rows)
    rows = [{"sentence1": f"tan {w}", "sentence2": f"ris {w}", "score": i}
            for i, w in enumerate(WORDS[:3])]  # fmt: skip
    write_jsonl(tmp_path / "sts" / "sts.jsonl", rows)
    calls, saved = [], {"query": "Q: ", "document": "D: ", "STS": "S: "}
    scores_of(word_encoder(saved, calls), tmp_path, tmp_path)
    sides = {text: prompt for prompt, texts in calls for text in texts}
    assert sides["tan kes"] == "Q: " and sides["tan"] == "D: "
    assert sides["tan tan"] == sides["ris tan"] == "S: " and sides["ris"] == "D: "
    assert [prompt for prompt, _ in calls] == ["Q: ", "D: ", "Q: ", "D: ", "S: ", "S: "]
    assert sides[queries[0]["text"]] == "Q: "


def test_task_prompts(tmp_path, capsys):
    tasks = named_tasks("STSBenchmark,SciFact,CQADupstackRetrieval")
    saved = {"query": "Q: ", "document": "D: ", "SciFact": "own"}
    template = "Instruct: {instruction}\\nQuery: "
    got = task_prompts(tasks, "mteb", template, {"query": "not this", "document": "D: "})
    scifact = "Given a scientific claim, retrieve documents that support or refute the claim"
    assert got["SciFact"] == {"query": f"Instruct: {scifact}\nQuery: ", "document": "D: "}
    of_type = "Retrieve semantically similar text."  # the task has none
    assert got["STSBenchmark"]["query"] == f"Instruct: {of_type}\nQuery: "
    assert len(got) == 2 + 12 and "CQADupstackRetrieval" not in got
    assert "has none" not in capsys.readouterr().out
    got = task_prompts(tasks, "model", template, {"sci_fact": "own", "query": ""})
    assert got["SciFact"]["query"] == "own" and got["STSBenchmark"]["query"] == ""
    assert "(sci_fact) and has none for STSBenchmark, CQADupst" in capsys.readouterr().out
    got = task_prompts(tasks, "model", template, saved)  # as they are: no template
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


def test_llm2vec_has_an_instruction_for_every_task():
    for benchmark in ("MTEB(eng, v1)", "MTEB(eng, v2)"):
        prompts = task_prompts(named_tasks("", benchmark), "llm2vec", "{instruction}", {})
        assert all(p["query"].endswith(":") and p["document"] == "" for p in prompts.values())
    assert prompts["HotpotQAHardNegatives"]["query"].startswith("Given a multi-hop question")
    assert prompts["STS22.v2"] == prompts["STS12"]


def load_encoder(name, **changes):
    """As the script loads it, by its defaults."""
    config = {k: v for k, v in vars(eval_mteb).items() if not k.startswith("_")}
    settings = SimpleNamespace(**(config | {"model": str(name), "dtype": "fp32"} | changes))
    return eval_mteb.load_encoder(str(name), settings, torch.device("cpu"))


def test_same_path_other_model(tmp_path, toy_tokens):
    """What is reused belongs to these very weights, this template, these prompts."""
    tokenizer = load_tokenizer(f"{toy_tokens}/tokenizer")
    docs, path = write_beir(tmp_path / "beir", np.random.default_rng(9))[0], tmp_path / "model"

    def save(seed, query):
        torch.manual_seed(seed)
        net = from_scratch("modernbert-tiny", n_layer=1, n_embd=32, n_head=2, n_hidden=32,
                           layer_kinds=["global"], vocab_size=512, max_seq_len=64)  # fmt: skip
        torch.nn.init.normal_(net.embed.weight)
        e = Embedder(net, tokenizer, prompts={"query": query, "document": ""})
        e.save(path, sentence_transformers=False)

    def run(similarity=None):
        tasks, encoder = local_tasks(tmp_path / "beir"), load_encoder(path, similarity=similarity)
        encoder.prompts = task_prompts(tasks, "model", "", encoder.saved)
        (row,) = evaluate(encoder, tasks, tmp_path / "scores", reuse=True)
        return row["score"], row["how"].startswith("from")

    save(0, "")
    first = run()
    assert run() == (first[0], True) and not first[1]
    save(1, "")
    second = run()
    assert second[0] != first[0] and not second[1]
    save(1, "tan ")
    assert not run()[1]
    save(0, "")
    assert run() == (first[0], True) and not run("dot")[1]
    # the scores are those of the embedder
    e = Embedder.load(str(path), dtype="fp32", device="cpu")
    texts = [f"{d['title']} {d['text']}" for d in docs]
    got = load_encoder(path).embed(texts, "tan ")
    np.testing.assert_array_equal(got, e.encode(texts, "tan "))
    e.template = Template("ris\n", " su")
    wrapped = load_encoder(path, prefix="ris\\n", suffix=" su")
    np.testing.assert_array_equal(wrapped.embed(texts, "tan "), e.encode(texts, "tan "))
    assert wrapped.embed(texts, "").tolist() != got.tolist()


def test_named_tasks():
    tasks = named_tasks("STSBenchmark, SciFact")
    assert [t.metadata.name for t in tasks] == ["STSBenchmark", "SciFact"]
    assert len(named_tasks("", "MTEB(eng, v2)")) == 41
    assert named_tasks("STS17", languages="eng")[0].hf_subsets == ["en-en"]
    raises(SystemExit, "STSBenchmrk.*Did you mean: 'STSBenchmark'", named_tasks, "STSBenchmrk")
    raises(SystemExit, "Did you mean", named_tasks, "", "MTEB(en, v2)")
    with pytest.raises(SystemExit, match="GermanSTSBenchmark: nothing in these languages: eng"):
        named_tasks("GermanSTSBenchmark,STS17", languages="eng")


def test_data_that_cannot_be_loaded(tmp_path, monkeypatch):
    def no_network(self, **_):
        raise ConnectionError("Couldn't reach 'mteb/stsbenchmark-sts' on the Hub")

    tasks = named_tasks("STSBenchmark")
    monkeypatch.setattr(type(tasks[0]), "load_data", no_network)
    with pytest.raises(SystemExit, match="STSBenchmark: cannot load mteb/stsbenchmark-sts: Conn"):
        scores_of(word_encoder(), tasks, tmp_path)


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
    raises(SystemExit, message, scores_of, word_encoder(), tmp_path, tmp_path)


def test_other_broken_folders(tmp_path, capsys):
    write_beir(tmp_path / "beir", np.random.default_rng(0), 12, 2)
    write_jsonl(tmp_path / "odd" / "stsb.jsonl", [{}])  # no task's name: said, not passed over
    assert [task.metadata.name for task in local_tasks(tmp_path)] == ["beir"]
    assert f"skipped {tmp_path}/odd: no task's folder, it has no corpus" in capsys.readouterr().out
    assert local_tasks(tmp_path / "beir") and not capsys.readouterr().out  # its qrels are its own
    with open(tmp_path / "beir" / "qrels" / "test.tsv", "a") as f:
        f.write("q0\tno\t1\n")
    with pytest.raises(ValueError, match="test.tsv: there is no text for corpus-id 'no'"):
        local_tasks(tmp_path)[0].load_data()
    raises(SystemExit, "a task's folder", local_tasks, tmp_path / "nothing")
    (tmp_path / "beir" / "sts.jsonl").write_text("")
    raises(SystemExit, "with one file of", local_tasks, tmp_path)


def test_table():
    def row(model, task, kind, score):
        return {"model": model, "task": task, "type": kind, "metric": "m", "score": score}

    rows = [row("x", "a", "STS", 0.5), row("x", "b", "STS", 0.7), row("x", "c", "Retrieval", 0.2),
            row("bm25", "c", "Retrieval", 0.25)]  # fmt: skip
    printed = eval_mteb.table(rows).splitlines()
    assert printed == """\
| task            | type      | metric |     x |  bm25 |
| --------------- | --------- | ------ | ----: | ----: |
| a               | STS       | m      | 50.00 |       |
| b               | STS       | m      | 70.00 |       |
| c               | Retrieval | m      | 20.00 | 25.00 |
| mean over tasks |           |        | 46.67 |       |
| mean over types |           |        | 40.00 |       |""".splitlines()
    assert len(eval_mteb.table(rows[2:]).splitlines()) == 3  # one task has no mean


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
    beir = write_beir(tmp_path / "beir", np.random.default_rng(10))
    run = [sys.executable, os.path.join(ROOT, "eval_mteb.py"), f"--out_dir={tmp_path}/out",
           f"--model=st:{tmp_path}/st", f"--local={tmp_path}/beir"]  # fmt: skip
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    done = subprocess.Popen(run, text=True, cwd=tmp_path, **pipes)
    expected = beir_ndcg(*beir, lambda q, d: float(st.similarity(*st.encode([q, d]))))
    printed, error = done.communicate()
    assert done.returncode == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == [f"st:{tmp_path}/st", "bm25", "random"]
    assert results["mteb"] == mteb.__version__
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"| st:{tmp_path}/st |" in table and table not in printed  # too wide for a screen
    assert f"A: st:{tmp_path}/st\nB: bm25\nC: random\n| task | metric " in printed
    cells = re.search(r"\| \w+ +\| ndcg_at_10 \|.*", printed)[0].split()
    assert cells[5::2] == [f"{100 * row['score']:.2f}" for row in results["rows"]]
    assert results["rows"][0]["score"] == pytest.approx(expected, abs=1e-4)
    # and what compares several runs
    paths = [f"{tmp_path}/out/results.json"] * 2
    run = [sys.executable, "-m", "evals.compare", *paths, f"--seeds=ours=st:{tmp_path}/*",
           "--fuse=ours,bm25", f"--out_dir={tmp_path}/compare"]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "compare" / "compare.md").read_text() in done.stdout
    (found,) = json.loads((tmp_path / "compare" / "compare.json").read_text())
    rows = {row["system"]: row for row in found["rows"]}
    assert set(rows) == {"ours", "bm25", "random", "ours + bm25"}
    assert rows["ours"]["ndcg"] == pytest.approx(100 * expected, abs=1e-2)
    assert len(rows["ours"]["seeds"]) == 1 and found["queries"] == found["modules"] == 8
