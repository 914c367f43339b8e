"""evals/ and metrics.py: numbers against plain loops, the script on 1 and 2 ranks."""

import csv
import json
import math
import os
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

import harness
import metrics
import token_scores
from data import open_pairs
from embedder import Embedder
from evals import compare, revisions
from evals.token_retrieval import baseline_scores
from formats import read_json, write_json
from formats.huggingface import from_pretrained
from harness import WORDS, ndcg
from spans import read_spans
from tokenizer import Template, load_tokenizer, tokenize_passage

SCRIPT = "evals/token_retrieval.py"


def test_rankings_by_hand():
    got = metrics.ranked([7, 4, 9, 1], [1, 4])
    assert got == {"acc": 0, "mrr": 0.5, "ndcg": pytest.approx(ndcg([7, 4, 9, 1], {1: 1, 4: 1}))}
    assert metrics.ranked([2], {2, 3, 5}) == {"acc": 1, "mrr": 1, "ndcg": pytest.approx(
        1 / (1 + 1 / math.log2(3) + 1 / 2))}  # fmt: skip
    assert metrics.ranked([2, 3], [9]) == {"acc": 0, "mrr": 0, "ndcg": 0}
    graded = metrics.ndcg([1, 0, 3], [0, 3, 1, 2], k=2)  # the 3 stands too low to count
    assert graded == pytest.approx(1 / (3 + 2 / math.log2(3)))


def test_token_metrics_equal_loops():
    rng = np.random.default_rng(3)
    for trial in range(20):
        words = rng.choice(WORDS, 3 + 5 * trial).tolist()
        passage, ends = "\n ".join(words), np.cumsum([len(w) + 2 for w in words]) - 2
        spans = np.array([[e - len(w), e] for e, w in zip(ends, words)])
        n = len(spans)
        gold = np.sort(rng.choice(n, 1 + trial % 3, replace=False))
        record = {"passage": passage, "spans": spans[gold].tolist(), "answer": None}
        record["answer"] = record["spans"][0] if trial % 2 else None
        scores = rng.normal(size=n)
        got = token_scores.token_metrics(scores, gold, spans, record, (4, 2))
        truth = np.isin(np.arange(n), gold)
        assert got["ap"] == pytest.approx(average_precision_score(truth, scores))
        order = sorted(range(n), key=lambda j: -scores[j])
        assert got["ndcg"] == pytest.approx(ndcg(order, dict.fromkeys(gold, 1)))
        size = [len(w) for w in words]
        for ratio in (4, 2):
            kept = set(order[: -(-n // ratio)])
            assert got[f"recall_{ratio}x"] == pytest.approx(len(kept & set(gold)) / len(gold))
            both = sum(size[j] for j in kept & set(gold))
            precision, recall = (both / sum(size[j] for j in tokens) for tokens in (kept, gold))
            f1 = 2 * precision * recall / (precision + recall) if both else 0.0
            assert got[f"f1_{ratio}x"] == pytest.approx(f1)
            answer = float(gold[0] in kept) if record["answer"] else None
            assert got.get(f"answer_{ratio}x") == answer


def test_baselines_equal_loops(toy_tokens):
    passage = "Tan is a tama. The tan, a tan! Rilo sun\nmos tan_rilo  kema. Rilo? "
    record, tokenizer = {"passage": passage, "query": "Rilo TAN x tan"}, f"{toy_tokens}/tokenizer"
    _, _, spans = tokenize_passage(load_tokenizer(tokenizer), passage, "", Template())
    found = baseline_scores(record, spans, np.random.default_rng(0))
    sentences = "Tan is a tama. |The tan, a tan! |Rilo sun\n|mos tan_rilo  kema. |Rilo? |"
    sentences = sentences.split("|")
    bags = [re.findall(r"\w+", x.lower()) for x in sentences]
    mean, want = sum(map(len, bags)) / len(bags), []
    for bag in bags:
        score = 0.0
        for word in ("rilo", "tan", "x"):
            df = sum(word in b for b in bags)
            idf, tf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5)), bag.count(word)
            score += idf * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(bag) / mean))
        want.append(score)
    assert max(want) > 0.5
    for j, (start, end) in enumerate(spans.tolist()):
        at = 0
        for sentence, score in zip(sentences, want):
            if at <= start < at + len(sentence):
                assert found["bm25"][j] == pytest.approx(score, abs=1e-5)
            at += len(sentence)
        word = next((m for m in re.finditer(r"\w+", passage) if m.start() < end <= m.end()), None)
        shared = word is not None and word[0].lower() in ("tan", "rilo")
        assert found["overlap"][j] == pytest.approx(float(shared), abs=1e-5), passage[start:end]
    assert (np.diff(found["first"]) < 0).all() and len(set(found["random"])) == len(spans)


@pytest.fixture(scope="module")
def config(folders, tmp_path_factory):
    """A config of the script, with a model and a file of 8 passages, 1 to 4 queries each."""
    folder = tmp_path_factory.mktemp("token_retrieval")
    model, tokenizer = from_pretrained(folders["llama"]), load_tokenizer(folders["llama"])
    prompts = {"query": "ask: ", "document": "read: "}
    embedder = Embedder(model, tokenizer, "last", Template("<", ">"), prompts, max_length=24)
    embedder.save(f"{folder}/step1", sentence_transformers=False)
    path = harness.spans_file(f"{folder}/x.jsonl", 8, seed=2)
    return harness.write_config(
        folder, model=str(folder), eval_data=path, ratios=(4, 2), temperature=0.3, dtype="fp32",
        queries_per_passage=3)  # fmt: skip


@pytest.mark.parametrize("window", [0, 12])
def test_token_retrieval_equals_loops(window, config, tmp_path, capsys):
    more = [f"--passage_window={window}", f"--window_overlap={window // 3}"]
    out = harness.run(SCRIPT, config, tmp_path, *more)
    file, folder = open_pairs(out.eval_data), f"{out.model}/step1"
    model, tokenizer = from_pretrained(folder).eval(), load_tokenizer(folder)
    lines, totals = [read_spans(file, i) for i in range(len(file))], {}
    s = SimpleNamespace(template=Template("<", ">"), query_instruction="ask: ",
                        passage_instruction="read: ", passage_window=window,
                        window_overlap=window // 3)  # fmt: skip
    for record in lines:
        with torch.no_grad():
            scores, gold = harness.plain_scores(model, tokenizer, record, s)
        scores = scores.numpy()
        order = sorted(range(len(scores)), key=lambda j: -scores[j])
        logs = scores / 0.3 - np.log(np.exp(scores / 0.3).sum())
        found = {"loss": -logs[gold].mean(), "acc": order[0] in gold}
        found["ap"] = average_precision_score(np.isin(np.arange(len(scores)), gold), scores)
        found["recall_4x"] = len(set(gold) & set(order[: -(-len(order) // 4)])) / len(gold)
        for name, value in found.items():
            totals.setdefault(name, []).append(value)
    saved = json.loads((tmp_path / "results.json").read_text())
    results = saved["results"]
    for name, values in totals.items():
        assert results["model"][name] == pytest.approx(np.mean(values), rel=1e-5), name
    assert list(results) == ["random", "first", "overlap", "bm25", "model"]
    assert set(results["model"]) == {"loss", "acc", *token_scores.names_of((4, 2))}
    assert set(results["bm25"]) == set(token_scores.names_of((4, 2)))
    assert saved["queries"] == len(lines) > 14 and saved["model"] == folder
    table, printed = (tmp_path / "results.md").read_text(), capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("| answer_2x |"))
    assert row.split("|")[2:-1] == [f" {x['answer_2x']:.3f} " for x in results.values()]
    assert table.splitlines()[2] == f"|  | {' | '.join(results)} |" and row in printed
    assert "peak memory" in printed


def test_token_retrieval_on_two_ranks(config, tmp_path):
    arguments = partial(harness.arguments, SCRIPT, config)
    harness.run(SCRIPT, config, tmp_path / "one")
    harness.run_ranks(2, [arguments(tmp_path / "two")])
    one, two = (json.loads((tmp_path / x / "results.json").read_text()) for x in ("one", "two"))
    for order, numbers in one.pop("results").items():
        assert two["results"][order] == pytest.approx(numbers, rel=1e-9), order
    assert one.items() <= two.items()


@pytest.mark.parametrize(("more", "message"), [
    (["--model="], "give --model=... and --eval_data=..."),
    (["--eval_data="], "give --model=... and --eval_data=..."),
    (["--ratios=(16,0.5)"], "ratios takes tuple of int, not (16, 0.5)"),
    (["--queries_per_passage=0"], "queries_per_passage takes >= 1, not 0"),
    (["--passage_window=8", "--window_overlap=8"], "windows of 8 tokens cannot share 8"),
])  # fmt: skip
def test_bad_settings_say_what_is_expected(config, tmp_path, more, message):
    harness.assert_refused(message, SCRIPT, config, tmp_path, *more)


# ---- evals/compare.py ----


def test_bootstrap_equals_a_loop():
    rng = np.random.default_rng(5)
    clusters = np.array([0, 2, 1, 1, 2, 2, 0, 3])
    a, b = rng.random((3, 8)), rng.random((1, 8))
    got = compare.bootstrap(a, b, clusters, np.random.default_rng(1), n=50)
    rng, differences = np.random.default_rng(1), []
    drawn, of_a, of_b = (rng.integers(high, size=(50, high)) for high in (4, 3, 1))
    for i in range(50):
        queries = [q for c in drawn[i] for q in range(8) if clusters[q] == c]
        means = [np.mean([x[s, q] for s in seeds[i] for q in queries])
                 for x, seeds in ((a, of_a), (b, of_b))]  # fmt: skip
        differences.append(means[0] - means[1])
    assert got == pytest.approx(np.percentile(differences, [2.5, 97.5]))
    assert got[0] < got[1]
    assert compare.bootstrap(b, b, clusters, rng).tolist() == [0, 0]  # it is paired
    # queries of one module that go together say less than as many by themselves
    x, none = np.repeat(rng.random(20), 10)[None], np.zeros((1, 200))
    all_alone = np.arange(200)
    widths = [np.ptp(compare.bootstrap(x, none, c, rng)) for c in (all_alone // 10, all_alone)]
    assert widths[0] > 2 * widths[1]


def queries_of(tops, relevant="x", scores=(0.25, 0.75)):
    """Two queries of a run with these rankings."""
    return [{"id": f"q{i}", "text": f"text {i}", "ndcg_at_10": score, "top": list(top),
             "relevant": {relevant: 1, "z": 0}} for i, (top, score) in enumerate(zip(tops, scores))]


def test_fusion_by_hand():
    a, b = queries_of(["yx", "vwx"]), queries_of(["x", ""])
    # x: 1/62 + 1/61, y: 1/61; then x is third of what one run has
    assert compare.fused(a, b) == pytest.approx([1, 1 / math.log2(4)])
    # y and x tie, 1/61 + 1/62 each: as in trec_eval the larger id is first
    tied = compare.fused(queries_of(["yx"]), queries_of(["xy"]))
    assert tied == pytest.approx([1 / math.log2(3)])


def test_compare(tmp_path):
    """Seeds are one system, a run that two files name is one seed, differences are to the
    baseline, queries must be the same."""
    runs = {"out/a-1": queries_of(["x", "x"]), "out/a-2": queries_of(["x", "x"], scores=(0.5, 1)),
            "bm25": queries_of(["y", "x"], scores=(0, 1))}  # fmt: skip
    for folder in ("one", "two"):
        rows = [{"model": "bm25", "task": "sts"}]
        for name, queries in runs.items():
            rows.append({"model": name, "task": "test", "queries": f"queries-{name[-1]}.json"})
            write_json(queries, tmp_path, folder, "scores", rows[-1]["queries"])
        write_json({"rows": rows}, tmp_path, folder, "results.json")
    paths = [tmp_path / folder / "results.json" for folder in ("one", "two")]
    systems = compare.read_runs(paths, {"ours": "out/a-*"})["test"]
    found = compare.compare("test", systems, "bm25", ["ours", "bm25"])
    rows = {row["system"]: row for row in found["rows"]}
    assert list(rows) == ["ours + bm25", "ours", "bm25"]
    assert rows["ours"]["seeds"] == [50, 75] and rows["ours"]["ndcg"] == 62.5
    assert rows["ours"]["difference"] == 12.5 and "difference" not in rows["bm25"]
    # the draws go from the second query alone with the worse seed to the first with the better
    assert rows["ours"]["interval"] == [-25, 50] and found["modules"] == 2
    assert rows["ours + bm25"]["seeds"] == pytest.approx([50 + 50 / math.log2(3)] * 2)
    lines = compare.table(found).splitlines()
    assert "| ours | 62.50 | 50.00 - 75.00 | +12.50 | -25.00 to +50.00 |" in lines
    assert "| bm25 | 50.00 |  |  |  |" in lines
    with pytest.raises(SystemExit, match="test has no b, only ours, bm25"):
        compare.compare("test", systems, "b")
    systems["other"] = {"x": queries_of(["x", "x"], relevant="y")}
    with pytest.raises(SystemExit, match="test: not all runs have the same queries"):
        compare.compare("test", systems, "bm25")
    with pytest.raises(SystemExit, match="no.json: no such file"):
        compare.read_runs(["no.json"], {})


# ---- pseudo-perplexity ----
@pytest.mark.parametrize("family", ["modernbert", "llama"])
def test_pseudo_perplexity_equals_transformers(family, folders, toy_tokens, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    out = harness.run(
        "evals/pseudo_perplexity.py", f"--model={folders[family]}", tmp_path, "--lengths=12,5000",
        f"--data={toy_tokens}", "--n_texts=3", "--n_masks=1000", "--device_batch_tokens=50",
        "--dtype=fp32")  # fmt: skip
    AutoModel = AutoModelForMaskedLM if family == "modernbert" else AutoModelForCausalLM
    model, special = AutoModel.from_pretrained(folders[family]).eval(), out.file.meta["special_ids"]
    drawn = np.flatnonzero(np.diff(out.file.starts) >= 12)
    drawn, losses = np.random.default_rng((1337, 12)).permutation(drawn)[:3], []
    for start in out.file.starts[drawn]:
        ids = torch.from_numpy(out.file.tokens[start : start + 12].astype(np.int64))
        for i in range(12):  # one token at a time
            seen = ids.clone()
            seen[i] = out.tokenizer.mask_token_id
            if family == "llama" and i:
                logits = model(input_ids=ids[None]).logits[0, i - 1]
            elif family == "modernbert" and ids[i] not in special:
                logits = model(input_ids=seen[None]).logits[0, i]
            else:
                continue
            losses.append(-logits.log_softmax(-1)[ids[i]].item())
    row, none = read_json(tmp_path, "results.json")["rows"]
    assert (row["texts"], row["tokens"]) == (3, len(losses)) and none["texts"] == 0
    assert row["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


# ---- an evaluation of all checkpoints ----
def test_revisions_run_an_evaluation_once_for_each_checkpoint(toy_tokens, tmp_path, monkeypatch):
    def in_this_process(argv, check):
        assert argv[:2] == [sys.executable, "-m"] and check
        ran.append(argv)
        harness.execute([os.path.join(harness.ROOT, *argv[2].split(".")) + ".py", *argv[3:]])

    ran = []
    monkeypatch.setattr(revisions.subprocess, "run", in_this_process)
    config = harness.write_config(
        tmp_path, data=toy_tokens, model_size="modernbert-tiny", vocab_size=512, max_seq_len=64,
        batch_tokens=128, device_batch_tokens=128, max_steps=2, eval_interval=0, save_interval=1,
        keep_last=0, dtype="fp32")  # fmt: skip
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    harness.run("pretrain_mlm.py", config, run)
    command = ["evals.pseudo_perplexity", "--lengths=12,", f"--data={toy_tokens}", "--n_texts=2"]
    for _ in range(2):  # the second time there is nothing left to run
        revisions.main([run], out, ["rows:0:value"], command)
    assert len(ran) == 2
    with open(f"{out}/revisions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["step"] for row in rows] == ["1", "2"]
    for row in rows:
        folder = row["checkpoint"].replace(os.sep, "_")
        (want,) = read_json(out, folder, "results.json")["rows"]
        assert float(row["rows:0:value"]) == want["value"] and row["rows:0:length"] == "12"
    assert os.path.getsize(f"{out}/revisions.png") > 5000
    with pytest.raises(SystemExit, match="no rows:9, the results have rows:0:length"):
        revisions.main([run], out, ["rows:9"], command)
