"""evals/ and metrics.py: numbers against plain loops, the script on 1 and 2 ranks."""

import json
import math
import re
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
from evals.token_retrieval import baseline_scores
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
    for order, numbers in results.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {order} |"))
        assert f"{numbers['answer_2x']:.3f} |" in row and row in printed
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
