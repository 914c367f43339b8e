"""train_classifier.py and evals/classifier.py: words and texts against loops and transformers, tiny
runs, whole, killed and resumed, on 1 and 2 ranks; data/ud and data/conll2003."""

import json
import os
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sklearn.metrics import ndcg_score
from tokenizers import normalizers

import harness
import train_classifier as T
from attention import make_seqs
from formats.classifier import read_classifier, save_classifier, transformers_class
from formats.huggingface import from_pretrained
from harness import WORDS, assert_equal_bits, losses, read_jsonl, write_jsonl
from labels import label_set, read_examples, read_texts, read_words, score_texts, score_words
from pooling import pool
from tokenizer import load_tokenizer


def settings(**changes):
    """What the main block gives to the functions, for one rank on the CPU."""
    plain = dict(labels=["A", "B", "C"], separator="[SEP]", max_length=64, dropout=0.0, rank=0,
                 world_size=1, device=torch.device("cpu"), autocast=nullcontext)  # fmt: skip
    s = SimpleNamespace(**(vars(T) | plain | changes))
    s.labels = s.labels if s.loss_kind == "softmax" else []
    return s


def make_classifier(folder, s):
    torch.manual_seed(0)
    model = from_pretrained(folder)
    model.set_dropout(0.0, 0.0)
    head = model.head
    model.drop_head()
    classifier = T.Classifier(model, head, s)
    for p in classifier.last_layers["linear"].parameters():
        p.data.normal_(0, 0.3)
    return classifier


@pytest.fixture
def tokenizer(toy_tokens):
    return load_tokenizer(os.path.join(toy_tokens, "tokenizer"))


@pytest.fixture(scope="module")
def model_folder(folders, tmp_path_factory):
    """An encoder without dropout of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer(folders["modernbert"])
    return harness.model_folder(folder, "modernbert", tokenizer, out_dropout=0.0)


def sentences(n, seed=0, longest=9, syllables=3):
    """1 to 8 words of 1 to 3 syllables; the first letter makes the label."""
    rng, out = np.random.default_rng(seed), []
    for line in range(1, n + 1):
        words = ["".join(rng.choice(WORDS, rng.integers(1, syllables + 1)))
                 for _ in range(rng.integers(1, longest))]  # fmt: skip
        targets = ["tmrsk".index(word[0]) % 3 for word in words]
        out.append({"words": words, "labels": ["ABC"[i] for i in targets], "targets": targets,
                    "lines": [line] * len(words)})  # fmt: skip
    return out


# ---- words ----
def plain_words(tokenizer, words, max_length):
    """(ids, for each word its tokens' positions), by characters, one at a time."""
    owner = [i for i, word in enumerate(words) for _ in (" " if i else "") + word]
    full = tokenizer(" ".join(words), return_offsets_mapping=True)
    ids, spans = full["input_ids"], full["offset_mapping"]
    assert ids[0] == 0 and ids[-1] == 1  # [CLS], [SEP]
    if len(ids) > max_length:
        ids, spans = ids[: max_length - 1] + [1], spans[: max_length - 1]
    held = [owner[end - 1] if end > begin else None for begin, end in spans]
    return ids, [[i for i, word in enumerate(held) if word == w] for w in range(len(words))]


HARD = [["tan", "motasukes", "na\xefve", "\u4f60\u597d", "don't", "!?"], ["[SEP]", "tan"], ["tan"],
        ["tanmorisukelo" * 3, "tan", "mos", "tan", "rilotama"], ["", "tan", "", "\t", "ris"],
        ["\xad", "tan", "mo\xads"]]  # fmt: skip


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("position", ["same_token", "next_token"])
def test_word_vectors_equal_loops(position, merge, tokenizer):
    """With words that tokenize to nothing (a soft hyphen at the start) and some that are cut."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\xad", "")
    all_words = HARD + [e["words"] for e in sentences(12)]
    examples = [{"words": words, "targets": [0] * len(words)} for words in all_words]
    s = settings(label_position=position, merge_subwords=merge, max_length=14)
    batch = T.make_batch(examples, tokenizer, s)
    hidden = torch.randn(len(batch.tokens), 8, generator=torch.Generator().manual_seed(0)).double()
    got = pool(hidden[batch.units.rows], batch.units, T.pooling_of(s))
    want, kept, missing, n, start = [], [], [], 0, 0
    for i, words in enumerate(all_words):
        ids, positions = plain_words(tokenizer, words, 14)
        assert batch.tokens[start : start + len(ids)].tolist() == ids
        for w, places in enumerate(positions):
            if places:
                rows = [start + place - (position == "next_token") for place in places]
                want.append(hidden[rows if merge else rows[:1]].mean(0))
                kept.append(n + w)
            else:
                missing.append((i, w))
        start, n = start + len(ids), n + len(words)
    assert batch.kept.tolist() == kept and len(batch.targets) == len(kept)
    assert start == len(batch.tokens) == sum(batch.seqs.lengths) and max(batch.seqs.lengths) == 14
    assert (5, 0) in missing and (3, 4) in missing
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_a_first_token_without_bos_is_read_where_it_stands():
    encoded = [([5, 6, 7], np.arange(3), np.array([0, 0, 1])), ([8], np.arange(1), np.arange(1))]
    examples = [{"words": ["a", "b"]}, {"words": ["c"]}]
    units, kept = T.pack_words(encoded, examples, settings(label_position="next_token"))
    assert units.rows.tolist() == [0, 0, 1, 3] and units.count.tolist() == [2, 1, 1]
    assert kept.tolist() == [0, 1, 2]


def test_entity_scores_equal_loops():
    """A word without a token, -1, is counted wrong and belongs to no entity."""
    rng, kinds = np.random.default_rng(0), ["O", "B-P", "I-P", "B-L", "I-L"]
    numbers, found = rng.integers(0, 5, (30, 12)), rng.integers(-1, 5, (30, 12))
    examples = [{"labels": [kinds[i] for i in row]} for row in numbers]

    def entities(row):  # (kind, begin, end): I- after another kind begins one, as conlleval has
        row = "".join(".PpLl."[i] for i in row)
        return {(m[0][0].upper(), *m.span()) for m in re.finditer("Pp*|p+|Ll*|l+", row)}

    gold, guess = ([entities(row) for row in rows] for rows in (numbers, found))
    both = [a & b for a, b in zip(gold, guess)]
    n_gold, n_guess, right = (sum(map(len, rows)) for rows in (gold, guess, both))
    metrics, missing = score_words(examples, found, kinds)
    assert missing == np.sum(found == -1) > 30 and metrics["acc"] == np.mean(numbers == found)
    assert metrics["precision"] == pytest.approx(right / n_guess)
    assert metrics["recall"] == pytest.approx(right / n_gold)
    assert metrics["f1"] == pytest.approx(2 * right / (n_gold + n_guess)) and right > 5


# ---- losses and gradients ----
TEXTS = [{"text": "tan mos", "pair": "ris tan kelo", "label": 1.0, "targets": [2], "lines": [1]},
         {"text": "", "pair": None, "label": 0.0, "targets": [0], "lines": [2]},
         {"text": "suma tan " * 9, "pair": "ris", "label": 0.25, "targets": [1], "lines": [3]},
         {"text": "ris", "pair": None, "label": 1.0, "targets": [1], "lines": [4]}]  # fmt: skip


def examples_for(s):
    if s.task == "words":
        return sentences(5)
    return TEXTS if s.loss_kind == "softmax" else [e | {"targets": [e["label"]]} for e in TEXTS]


def plain_pool(h, pooling):
    if pooling in ("cls", "last"):
        return h[0] if pooling == "cls" else h[-1]
    w = [1.0] * len(h) if pooling == "mean" else [i + 1.0 for i in range(len(h))]
    return sum(x * y for x, y in zip(h, w)) / sum(w)


def plain_loss(z, y, kind, pos_weight):
    if kind == "softmax":
        return -(z[y] - z.exp().sum().log())
    if kind == "mse":
        return (z[0] - y) ** 2
    p = 1 / (1 + torch.exp(-z[0]))
    return -(pos_weight * y * p.log() + (1 - y) * (1 - p).log())


CASES = [dict(), dict(label_position="next_token", prediction_head=True),
         dict(merge_subwords=False), dict(task="texts", pooling="cls", prediction_head=True),
         dict(task="texts", pooling="last", loss_kind="bce", pos_weight=3.0),
         dict(task="texts", pooling="weighted_mean", loss_kind="mse"),
         dict(task="texts", pooling="mean", prefix="tan: ", suffix="!", max_length=20)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_each_text_alone(case, tokenizer, folders, monkeypatch):
    """In fp64: a packed batch against every text by itself, with losses written out."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    s = settings(**case)
    classifier, examples = make_classifier(folders["modernbert"], s).double(), examples_for(s)
    batch = T.make_batch(examples, tokenizer, s)
    if s.loss_kind != "softmax":
        batch.targets = batch.targets.double()
    loss, hits, logits = classifier(*batch.to("cpu"))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in classifier.named_parameters()}
    classifier.zero_grad()
    want = want_hits = n = 0
    head, linear = classifier.last_layers.values()
    for example in examples:
        if s.task == "words":
            ids, positions = plain_words(tokenizer, example["words"], s.max_length)
        else:
            [text] = T.join_texts([example], tokenizer, s)  # has a test of its own
            ids = tokenizer(s.prefix + text + s.suffix)["input_ids"]
            assert len(ids) <= s.max_length
        h = classifier.model(torch.tensor(ids), make_seqs([len(ids)]))
        rows = [head(plain_pool(h, s.pooling))]
        if s.task == "words":
            shift = s.label_position == "next_token"
            places = [p if s.merge_subwords else p[:1] for p in positions]
            rows = [sum(head(h[i - shift]) for i in p) / len(p) for p in places]
        for row, label in zip(rows, example["targets"], strict=True):
            z = linear(row)
            torch.testing.assert_close(logits[n], z.detach(), rtol=1e-10, atol=1e-10)
            want = want + plain_loss(z, label, s.loss_kind, s.pos_weight)
            n += 1
            if s.loss_kind != "mse":
                best = z.argmax() if s.loss_kind == "softmax" else z.item() > 0
                want_hits += int(best) == (label if s.loss_kind == "softmax" else label > 0.5)
    assert n == len(logits) and not logits.requires_grad
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-10) and hits == want_hits
    for name, p in classifier.named_parameters():
        assert p.grad.norm() > 1e-9, name
        assert (grads[name] - p.grad).norm() <= 1e-9 * p.grad.norm(), name


def test_text_metrics_equal_loops():
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 3, 60), rng.normal(size=(60, 3))
    guess, found = z.argmax(1), score_texts([{"targets": [int(i)]} for i in y], z, "softmax")
    assert found["acc"] == pytest.approx(np.mean(y == guess))
    f1 = [2 * np.sum((y == k) & (guess == k)) / np.sum([y == k, guess == k]) for k in range(3)]
    assert found["f1"] == pytest.approx(np.mean(f1))
    a, b = (np.eye(3)[x] - np.eye(3)[x].mean(0) for x in (y, guess))  # Matthews: their correlation
    assert found["mcc"] == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    y, z = rng.random(40) < 0.4, rng.normal(size=(40, 1))
    y[:5] = True  # a query without a wrong candidate is left out
    examples = [{"text": f"q{i // 5}", "label": float(label)} for i, label in enumerate(y)]
    found, hits = score_texts(examples, z, "bce"), np.sum(y & (z[:, 0] > 0))
    assert found["f1"] == pytest.approx(2 * hits / (np.sum(y) + np.sum(z > 0)))
    queries = [slice(q, q + 5) for q in range(0, 40, 5) if 0 < y[q : q + 5].sum() < 5]
    want = [ndcg_score([y[q]], [z[q, 0]], k=10) for q in queries]
    assert len(want) > 3 and found["ndcg"] == pytest.approx(np.mean(want))

    y, z = rng.normal(size=30), rng.normal(size=(30, 1))
    found = score_texts([{"label": i} for i in y], z, "mse")
    assert found["pearson"] == pytest.approx(np.corrcoef(y, z[:, 0])[0, 1])
    ranks = y.argsort().argsort(), z[:, 0].argsort().argsort()
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


# ---- folders ----
FOLDERS = [  # family, settings, why transformers has no such class
    ("modernbert", dict(prediction_head=True), None), ("llama", dict(), None),
    ("llama-bidirectional", dict(), None),
    ("modernbert", dict(task="texts", pooling="cls", prediction_head=True), None),
    ("modernbert", dict(task="texts", prediction_head=True, loss_kind="mse"), None),
    ("modernbert-decoder", dict(task="texts", pooling="last", prediction_head=True), None),
    ("llama", dict(task="texts", pooling="last", loss_kind="bce"), None),
    ("mistral", dict(task="texts", pooling="last"), None),
    ("qwen3", dict(task="texts", pooling="last"), None),
    ("llama", dict(label_position="next_token"), "not one before"),
    ("modernbert", dict(), "prediction_head=True"),
    ("gemma3", dict(task="texts", pooling="last"), None), ("gemma3", dict(), "labels no tokens"),
    ("modernbert-decoder", dict(), "labels no tokens"), ("llama", dict(task="texts"), "pool last"),
    ("neobert", dict(task="texts", pooling="cls"), "no such class")]  # fmt: skip


@pytest.mark.parametrize(("family", "case", "reason"), FOLDERS, ids=str)
def test_saved_folders_are_transformers_or_ours(family, case, reason, folders, tokenizer, tmp_path):
    s = settings(**case, dropout=0.2)
    classifier = make_classifier(folders[family], s).eval()
    if family in ("llama", "mistral"):  # their tokenizers have no padding
        tokenizer.pad_token = None
    weights, layers = classifier.model.state_dict(), classifier.last_layers.state_dict()
    save_classifier(str(tmp_path), classifier.model.config, tokenizer, s, weights, layers)
    again = from_pretrained(str(tmp_path))  # what an embedder or another stage starts from
    assert again.config.head == "none"
    assert all(torch.equal(p, weights[key]) for key, p in again.state_dict().items())
    notes, last_layers = read_classifier(str(tmp_path))
    assert last_layers.keys() == layers.keys()
    assert all(torch.equal(last_layers[key], p) for key, p in layers.items())
    path = tmp_path / "nanoembed_classifier.json"  # what earlier versions wrote is read, too
    path.write_text(path.read_text().replace("max_length", "max_seq_len"))
    assert read_classifier(str(tmp_path))[0]["max_length"] == notes["max_length"] == 64
    name, problem = transformers_class(classifier.model.config, s)
    assert [notes["transformers"], notes["problem"]] == [name, problem]
    if reason:
        assert name is None and reason in problem
        auto = "token-classification" if s.task == "words" else "text-classification"
        error = "no file named model.safetensors" if family != "neobert" else "Unrecognized"
        with pytest.raises((OSError, ValueError), match=error):  # no random last layer
            transformers.pipeline(auto, str(tmp_path), trust_remote_code=True)
        assert "linear.weight" in load_file(tmp_path / "nanoembed.safetensors")
        return

    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="sdpa")  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == classifier.last_layers["linear"].out_features
    auto = "Token" if s.task == "words" else "Sequence"
    auto = getattr(transformers, f"AutoModelFor{auto}Classification").from_pretrained(tmp_path)
    assert type(auto) is type(theirs)
    if s.loss_kind == "softmax":
        assert theirs.config.id2label == {0: "A", 1: "B", 2: "C"}
    examples, words = examples_for(s), s.task == "words"
    texts = [" ".join(e["words"]) for e in examples] if words else None
    with torch.no_grad():
        batch = T.make_batch(examples, tokenizer, s)
        logits = classifier(*batch.to("cpu"))[2]
        texts = texts or T.join_texts(examples, tokenizer, s)
        padded = load_tokenizer(str(tmp_path))(texts, padding=True, return_tensors="pt")
        there = theirs(**{k: padded[k] for k in ("input_ids", "attention_mask")}).logits
    if words:  # the mean of the logits of a word's tokens
        flat = torch.cat([x[m > 0] for x, m in zip(there, padded["attention_mask"])])
        there = pool(flat[batch.units.rows], batch.units, "mean")
    assert logits.abs().max() > 0.3
    torch.testing.assert_close(logits, there, atol=2e-5, rtol=1e-4)


# ---- whole runs ----
TINY = dict(
    max_length=14,  # cuts some words
    batch_size=8, device_batch_size=2, max_steps=6, warmup_steps=2, learning_rate=1e-2,
    log_interval=1, eval_interval=3, save_interval=3, dropout=0.0, dtype="fp32")  # fmt: skip
SCRIPT = "train_classifier.py"
arguments, run = partial(harness.arguments, SCRIPT), partial(harness.run, SCRIPT)
evaluate, evaluation = (partial(function, "evals/classifier.py", "--device_batch_size=2")
                        for function in (harness.run, harness.arguments))  # fmt: skip


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    folder, keys = tmp_path_factory.mktemp("config"), TINY | {"init_from": model_folder}
    for key, n in (("data", 45), ("eval_data", 21)):
        lines = [{key: e[key] for key in ("words", "labels")} for e in sentences(n, seed=n)]
        keys[key] = write_jsonl(folder / f"{key}.jsonl", lines)
    return harness.write_config(folder, **keys)


@pytest.fixture(scope="module")
def text_keys(tmp_path_factory):
    """{loss_kind: keys of the command line} with data of its form, 30 texts."""
    rng, folder, out = np.random.default_rng(3), tmp_path_factory.mktemp("texts"), {}
    say = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    data = {"softmax": [], "bce": [], "mse": []}
    for i in range(30):
        text, word = say(4 + i % 7), say(1)
        data["softmax"].append({"text": text, "label": "tmrsk".index(text[0]) % 2})
        data["bce"].append({"query": word, "pos": [f"{word} {say(2)}"], "neg": [say(3), say(2)]})
        share = int(rng.integers(0, 4))
        other = " ".join(text.split()[:share] + say(4 - share).split())
        data["mse"].append({"text": text, "text_pair": other, "label": share * 1.25})
    for kind, lines in data.items():
        path = write_jsonl(folder / f"{kind}.jsonl", lines)
        out[kind] = [f"--data={path}", f"--eval_data={path}", "--task=texts", "--max_length=40",
                     f"--loss_kind={kind}", "--prediction_head=True", "--freeze_backbone=False",
                     "--learning_rate=1e-3", "--pos_weight=2"]  # fmt: skip
    return out


def results(folder):
    """The one file's in results.json."""
    (found,) = json.loads((folder / "results.json").read_text()).values()
    return found["metrics"] | {"task": found["task"]}


def test_a_frozen_run_learns_and_changes_its_last_layer_alone(tiny, model_folder, tmp_path):
    lines = [{"words": e["words"], "labels": e["labels"]} for e in sentences(60, 5, 9, 1)]
    path = write_jsonl(tmp_path / "easy.jsonl", lines)
    more = ["--max_steps=60", "--learning_rate=0.05", "--dropout=0.1", "--attn_dropout=0.3"]
    run(tiny, tmp_path, *more, f"--data={path}", f"--eval_data={path}", "--eval_interval=20")
    curve, right = losses(tmp_path), losses(tmp_path, "eval_acc")
    assert list(curve) == list(range(1, 61)) and list(right) == [20, 40, 60]
    assert right[60] > 0.6 and curve[60] < 0.8 * curve[1]
    base, last = from_pretrained(model_folder), from_pretrained(str(tmp_path))
    assert all(torch.equal(p, base.state_dict()[key]) for key, p in last.state_dict().items())
    assert last.config.attn_dropout == base.config.attn_dropout == 0.0  # the run's is not saved
    found, n = results(tmp_path), sum(len(x["words"]) for x in lines)
    assert (found["task"], found["acc"], found["n"]) == ("words", right[60], n)


def test_evaluation_later_gives_the_metrics_of_the_end(tiny, model_folder, unbroken, tmp_path):
    path = os.path.join(os.path.dirname(tiny), "eval_data.jsonl")
    keys = ["--dtype=fp32", f"--model={unbroken}", f"--eval_data={path}"]
    evaluate(tmp_path, *keys)
    assert results(tmp_path) == results(unbroken) and results(unbroken)["missing"] > 0
    assert os.listdir(tmp_path) == ["results.json"]
    evaluate(tmp_path, *keys, "--eval_lines=5")
    assert results(tmp_path)["n"] == sum(len(x["words"]) for x in read_jsonl(path)[:5])
    (tmp_path / "x.txt").write_text("-DOCSTART- O\n\ntan A\n")
    for more, message in (
        ([f"--eval_data={tmp_path}/x.txt", "--eval_lines=2"], "x.txt, 2 lines: there is no"),
        (["--model="], "give --model"), ([f"--model={model_folder}"], "no classifier saved by us"),
    ):  # fmt: skip
        harness.assert_refused(message, "evals/classifier.py", keys[0], tmp_path, *keys, *more)


def test_kinds_of_texts_learn_and_reload(tiny, text_keys, tmp_path):
    for kind, metric in (("softmax", "mcc"), ("bce", "ndcg"), ("mse", "pearson")):
        whole, after = tmp_path / kind, tmp_path / f"{kind}-after"
        keys = [*text_keys[kind], "--max_steps=30", "--eval_interval=10", "--dropout=0.1"]
        run(tiny, whole, *keys)
        found = losses(whole, f"eval_{metric}")
        assert found[30] > found[10] and found[30] > 0.5, (kind, found)
        evaluate(after, keys[1], f"--model={whole}", "--dtype=fp32")
        assert results(whole) == results(after)


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    more = ["--dropout=0.1", "--learning_rate=0.1", "--max_steps=18"]
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (4, 14), *more)


def test_stopped_and_resumed_is_bit_equal(tiny, unbroken, tmp_path):
    harness.stopped_and_resumed(SCRIPT, tiny, tmp_path, 4)
    assert_equal_bits(tmp_path, unbroken)


def test_lora_resumes_merged_and_as_an_adapter(tiny, tokenizer, tmp_path):
    keys = ["--lora_rank=2", "--dropout=0.1"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    classifier = run(tiny, whole, *keys).classifier.eval()
    run(tiny, half, *keys, "--stop_step=3")
    run(tiny, half, *keys, "--resume=True")
    assert_equal_bits(half, whole)
    batch = T.make_batch(sentences(4), tokenizer, classifier.s)
    merged = from_pretrained(str(whole / "step6"))
    with torch.no_grad():
        ours, theirs = (m(batch.tokens, batch.seqs) for m in (classifier.model, merged))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # an adapter's folder is a model to start from, its base is found
    run(tiny, tmp_path / "next", f"--init_from={whole / 'step6' / 'adapter'}", "--max_steps=1",
        "--warmup_steps=None")  # fmt: skip
    last = from_pretrained(str(tmp_path / "next" / "step1")).state_dict()
    assert all(torch.equal(p, last[key]) for key, p in merged.state_dict().items())


def test_two_ranks_equal_one(tiny, text_keys, tmp_path):
    """Ranks and micro-batches with unequal numbers of labels, DDP and FSDP."""
    kinds = {"ddp": [],
             "whole": ["--freeze_backbone=False", "--learning_rate=1e-3"],
             "fsdp": ["--freeze_backbone=False", "--learning_rate=1e-3", "--fsdp=full"],
             "lora": ["--lora_rank=2", "--lora_dropout=0", "--fsdp=full"],
             "mse": [*text_keys["mse"], "--fsdp=full"]}  # fmt: skip
    argvs = []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *flags))
        if kind != "fsdp":
            run(tiny, tmp_path / f"{kind}-one", *flags, "--fsdp=")
    more = ["--freeze_backbone=False", "--dropout=0.2"]
    half = arguments(tiny, tmp_path / "half", *more)
    argvs += [arguments(tiny, tmp_path / "unbroken", *more), half + ["--stop_step=3"]]
    keys = [f"--model={tmp_path}/ddp", f"--eval_data={os.path.dirname(tiny)}/eval_data.jsonl"]
    argvs += [half + ["--resume=True"], evaluation(tmp_path / "after", "--dtype=fp32", *keys)]
    harness.run_ranks(2, argvs)
    assert results(tmp_path / "after") == results(tmp_path / "ddp")
    for kind in kinds:
        one = tmp_path / ("whole-one" if kind == "fsdp" else f"{kind}-one")
        harness.assert_close(tmp_path / kind, one, "step6", loss=1e-5, gnorm=1e-4, eval_loss=1e-4)
        a, b = (read_classifier(str(folder / "step6"))[1] for folder in (tmp_path / kind, one))
        assert all((a[name] - b[name]).norm() <= 1e-3 * b[name].norm() for name in b), kind
    assert_equal_bits(tmp_path / "half", tmp_path / "unbroken")


def test_show_batch_and_dry_run(tiny, text_keys, unbroken, tmp_path):
    more = ["--label_position=next_token"]
    shown, dry = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path, *more)
    assert re.search(r"--- text 0: \d+ tokens: \[CLS\].*\[SEP\]\n[ABC]: '\[CLS\].*\n[ABC]: ", shown)
    assert re.search(r"(?s)[\d.,]+ tok/s, [\d.,]+ ex/s, .* device_batch_size up to .* fits", dry)
    more = [*text_keys["mse"], "--pooling=cls"]
    shown, _ = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path, *more)
    assert re.search(r"--- text 0: \d+ tokens: \[CLS\].*\n[\d.]+: '\[CLS\]'\n--- text 1", shown)


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path):
    keys = ["--learning_rate=1e30", "--warmup_steps=0", "--max_steps=20", "--eval_interval=0",
            "--freeze_backbone=False"]  # fmt: skip
    out = harness.printed_before_the_4th_bad_step(SCRIPT, tiny, tmp_path, *keys)
    assert re.search(r"step \d: loss nan.* skipped. Lines of .*data.jsonl: \[\d+", out)


def test_dropout_is_off_in_evaluation_and_in_a_frozen_model(tiny, tokenizer, tmp_path):
    keys = ["--attn_dropout=0.5", "--dropout=0.9", "--max_steps=1", "--warmup_steps=None"]
    found = run(tiny, tmp_path, *keys)
    classifier, s, examples = found.classifier, found.s, sentences(6)
    one, other = (T.evaluate(classifier, examples, tokenizer, s) for _ in range(2))
    batch = T.make_batch(examples, tokenizer, s).to("cpu")
    assert one == other and classifier.training
    assert not torch.equal(classifier(*batch)[2], classifier(*batch)[2])
    features = classifier.model(*batch[:2])
    loss = classifier.eval()(*batch)[0].item() / len(batch[3])
    assert torch.equal(classifier.model(*batch[:2]), features)
    assert one["loss"] == pytest.approx(loss, rel=1e-6)


# ---- bad input ----
@pytest.mark.parametrize(("kind", "line", "message"), [
    ("words", '{"words": ["a", "b"], "labels": ["A"]}', "2 words and 1 in 'labels'"),
    ("words", '{"words": [], "labels": []}', "field 'labels' is empty"),
    ("words", '{"words": ["a"]}', "field 'labels' is missing"),
    ("words", '{"words": "a b", "labels": ["A", "B"]}', "field 'words' is 'a b'"),
    ("words", '{"words": ["a"], "labels": [1]}', "'labels' is [1] (expected list of str)"),
    ("words", '{"words": ["a"], "labels": ["D"]}', "label 'D' is none of the 2 labels: 1, B"),
    ("softmax", '{"text": "a", "label": 0.5}', "field 'label' is 0.5 (expected str)"),
    ("softmax", '{"text": "a"}', "field 'label' is missing"),
    ("softmax", '{"text": 1, "label": "x"}', "field 'text' is 1"),
    ("softmax", '{"text": "a", "text_pair": 2, "label": "x"}', "field 'text_pair' is 2"),
    ("softmax", '{"text": "a", "label": "x"}', "label 'x' is none of the 2 labels: 1, B"),
    ("bce", '{"text": "a", "label": 2}', "label 2.0: expected 0 to 1"),
    ("bce", '{"text": "a"}', "field 'label' is missing"),
    ("mse", '{"text": "a", "label": 1e39}', "field 'label' is 1e+39, expected finite"),
    ("mse", '{"text": "a", "label": "1"}', "field 'label' is '1' (expected float)"),
    ("mse", '{"text": "a", "label": NaN}', "field 'label' is nan, expected finite")])  # fmt: skip
def test_broken_lines(kind, line, message, tmp_path):
    path, good = tmp_path / "x.jsonl", '{"text": "a", "label": 1}'
    keys = dict(task="texts", loss_kind=kind)
    if kind == "words":
        good, keys = '{"words": ["a", "b"], "labels": ["1", "B"]}', {}
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ValueError) as error:
        read_examples(str(path), settings(**keys, labels=["1", "B"]))
    assert f"{path} line 3: " in str(error.value) and message in str(error.value)


def test_columns(tmp_path):
    path, text = tmp_path / "eng.testa", "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\n"
    path.write_text(text + "rejects VBZ I-VP O\n\n\nPeter NNP I-NP I-PER")
    examples = read_words(str(path), "labels", 3)
    assert examples == read_words(str(path), "labels", -1) == [
        {"words": ["EU", "rejects"], "labels": ["I-ORG", "O"], "lines": [3, 4]},
        {"words": ["Peter"], "labels": ["I-PER"], "lines": [7]}]  # fmt: skip
    assert read_words(str(path), "labels", 1)[0]["labels"] == ["NNP", "VBZ"]
    with pytest.raises(ValueError, match="eng.testa line 4: label 'O' is none of the 2 labels: I"):
        read_examples(str(path), settings(labels=["I-ORG", "I-PER"]))
    path.write_text("a X\nb\n")
    with pytest.raises(ValueError, match="eng.testa line 2: 1 columns, the first has 2"):
        read_words(str(path), "labels", -1)


def test_pairs_with_negatives_become_labelled_texts(tmp_path):
    lines = [{"query": "q", "pos": ["a", "b"], "neg": ["c"], "prompt": "ask: "},
             {"query": "r", "positive": "d"}]  # fmt: skip
    examples = read_texts(write_jsonl(tmp_path / "x.jsonl", lines), "bce")
    assert [(e["text"], e["pair"], e["label"], e["lines"]) for e in examples] == [
        ("ask: q", "a", 1.0, [1]), ("ask: q", "b", 1.0, [1]), ("ask: q", "c", 0.0, [1]),
        ("r", "d", 1.0, [2])]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), [
    (["--task=word"], "task takes one of words, texts, not 'word'"),
    (["--label_position=next"], "label_position takes one of same_token, next_token"),
    (["--loss_kind=mse"], "loss_kind='mse' is for texts"),
    (["--lora_rank=2", "--freeze_backbone=False"], "LoRA freezes the backbone"),
    (["--device_batch_size=3"], "batch_size=8 must be k x device_batch_size=3"),
    (["--init_from=nowhere/at/all"], "nowhere/at/all"),
    (["--label_names=('A','B')"], "data.jsonl line"),
    (["--pooling=max", "--task=texts"], "pooling takes one of mean, "),
    (["--max_length=2"], "leaves no room"),
    (["--eval_data={other}"], "other.jsonl line 2: label 'Z' is none of the 3 labels"),
    (["--init_from={llama}", "--prediction_head=True"], "is for ModernBERT, this is a llama"),
    (["--out_dir={unbroken}", "--resume=True", "--data={other}", "--eval_data="],
     " began otherwise, data: ")])  # fmt: skip
def test_bad_settings_say_what_is_expected(tiny, unbroken, folders, tmp_path, more, message):
    lines = [{"words": ["tan"], "labels": ["A"]}, {"words": ["tan"], "labels": ["Z"]}]
    other = write_jsonl(tmp_path / "other.jsonl", lines)
    more = [key.format(other=other, unbroken=unbroken, llama=folders["llama"]) for key in more]
    harness.assert_refused(message, SCRIPT, tiny, tmp_path / "out", *more)


def test_labels_are_sorted():
    for labels, wanted in (("10 2 0 2", "0 2 10"), ("b B a", "B a b"), ("x 10 9", "9 10 x")):
        assert label_set([{"label": x} for x in labels.split()]) == wanted.split()


def test_both_texts_of_a_long_pair_are_seen(tokenizer):
    s = settings(max_length=32, task="texts", loss_kind="mse")
    for text, pair in (("tan " * 60, "ris su"), ("tan", "ris " * 60), ("tan " * 60, "ris " * 60)):
        example = {"text": text, "pair": pair, "label": 0.0, "targets": [0.0]}
        tokens = T.make_batch([example], tokenizer, s).tokens
        shown = tokenizer.decode(tokens).split("[SEP]")
        assert len(tokens) <= 32 and "tan" in shown[0] and "ris" in shown[1] and len(shown) == 3
        if pair == "ris su":
            assert shown[1].strip() == pair and len(tokens) == 32
    assert min(shown[0].count("tan"), shown[1].count("ris")) > 5, shown


def test_conll2003_has_its_labels():
    for field, n in {"pos": 47, "chunk": 23, "ner": 9}.items():
        config = harness.configured(SCRIPT, "classifier_conll2003", f"--label_field={field}")
        assert len(set(config["label_names"])) == len(config["label_names"]) == n, field


# ---- prepare ----
COLUMNS = (
    "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\nGerman JJ I-NP I-MISC\n"
    "call NN I-NP O\n\nPeter NNP I-NP I-PER\nBlackburn NNP I-NP I-PER\nParis NNP B-NP I-LOC\n"
    "Lyon NNP I-NP B-LOC\n")  # fmt: skip
WANTED = [{"words": ["EU", "rejects", "German", "call"], "pos": ["NNP", "VBZ", "JJ", "NN"],
           "chunk": ["B-NP", "B-VP", "B-NP", "I-NP"], "ner": ["B-ORG", "O", "B-MISC", "O"]},
          {"words": ["Peter", "Blackburn", "Paris", "Lyon"], "pos": ["NNP"] * 4,
           "chunk": ["B-NP", "I-NP", "B-NP", "I-NP"], "ner": ["B-PER", "I-PER", "B-LOC", "B-LOC"]}]


def splits(folder):
    return [read_jsonl(folder / f"{name}.jsonl") for name in ("train", "val", "test")]


def test_conll2003_from_columns_and_from_the_hubs_schema(tmp_path, capsys):
    prepare = harness.script("data/conll2003/prepare.py")
    for name in ("eng.train", "eng.testa", "eng.testb"):
        (tmp_path / name).write_text(COLUMNS)
    prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "a")])
    shown = capsys.readouterr().out
    assert "2 sentences, 8 words, 5 names; expected 14,041, 203,621, 23,499: NOT the data" in shown
    assert splits(tmp_path / "a") == [WANTED] * 3
    (tmp_path / "eng.testa").write_text("EU NNP I-NP\n")
    with pytest.raises(ValueError, match="eng.testa line 1: 3 columns, expected 4"):
        prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "a")])

    from datasets import ClassLabel, Dataset, Features, List, Value

    names = {f: sorted({x for row in WANTED for x in row[f]}) for f in prepare.FIELDS}
    rows, features = {"tokens": [row["words"] for row in WANTED]}, {"tokens": List(Value("string"))}
    for f in prepare.FIELDS:
        rows[f"{f}_tags"] = [[names[f].index(x) for x in row[f]] for row in WANTED]
        features[f"{f}_tags"] = List(ClassLabel(names=names[f]))
    dataset = Dataset.from_dict(rows, features=Features(features))
    for split in ("train", "validation", "test"):
        dataset.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    prepare.main(["--dataset", str(tmp_path / "hub"), "--out", str(tmp_path / "b")])
    assert splits(tmp_path / "b") == [WANTED] * 3


def test_universal_dependencies(tmp_path):
    prepare, row = harness.script("data/ud/prepare.py"), "{}\t{}\tx\t{}\t{}" + "\t_" * 5 + "\n"
    text = "# text = I don't\n" + row.format(1, "I", "PRON", "PRP")
    text += row.format("2-3", "don't", "_", "_") + row.format(2, "do", "AUX", "VBP")
    text += row.format(3, "n't", "PART", "RB") + row.format("3.1", "go", "VERB", "VB") + "\n"
    text += row.format(1, "New York", "PROPN", "NNP")
    for part in ("train", "dev", "test"):
        (tmp_path / f"en_x-ud-{part}.conllu").write_text(text)
    prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "out")])
    upos = [{"words": ["I", "do", "n't"], "labels": ["PRON", "AUX", "PART"]},
            {"words": ["New York"], "labels": ["PROPN"]}]  # fmt: skip
    assert splits(tmp_path / "out") == [upos] * 3
    dev, one = tmp_path / "en_x-ud-dev.conllu", tmp_path / "one.jsonl"
    prepare.main(["--input", str(dev), "--out", str(one), "--tags", "xpos"])
    assert read_jsonl(one)[0]["labels"] == ["PRP", "VBP", "RB"]
    dev.write_text("1\tI\tI\tPRON\n")
    with pytest.raises(ValueError, match="dev.conllu line 1: 4 columns, expected 10"):
        prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "out")])
