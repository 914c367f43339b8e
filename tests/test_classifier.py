"""train_classifier.py: words and texts against loops and transformers, tiny runs of the script,
whole, killed and resumed, on 1 and 2 ranks; data/ud and data/conll2003.

    python -m pytest tests/test_classifier.py
"""

import glob
import importlib.util
import json
import os
import re
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import normalizers

import common
import harness
import train_classifier as T
from data import load_tokenizer
from harness import kill_at_step, losses, run_ranks, saved, start
from model import Head, from_pretrained, from_scratch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SYLLABLES = [f"{a}{b}" for a in ("ta", "mo", "ri", "su", "ke") for b in ("n", "lo", "ma", "s")]


def settings(**changes):
    """What the main block gives to the functions, for one rank on the CPU."""
    plain = dict(
        task="words", loss_kind="softmax", labels=["A", "B", "C"], label_position="same_token",
        merge_subwords=True, pooling="mean", prefix="", suffix="", separator="[SEP]",
        max_seq_len=64, prediction_head=False, dropout=0.0, pos_weight=1.0, frozen=False,
        batch_size=4, device_batch_size=4, seed=7, rank=0, world_size=1,
        device=torch.device("cpu"), autocast=nullcontext,
    )  # fmt: skip
    assert changes.keys() <= plain.keys()
    s = plain | changes
    return s if s["loss_kind"] == "softmax" else s | {"labels": []}


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


SMALL = dict(n_layer=2, n_head=4, n_embd=32, n_hidden=48, vocab_size=512, max_seq_len=64)
SIZES = {
    "modernbert": ("modernbert-tiny", dict(layer_kinds=["global", "local"], window=4)),
    "modernbert-decoder": ("modernbert-tiny", dict(causal=True, layer_kinds=["local", "global"],
                                                   window=4)),
    "llama": ("llama-tiny", {}),
    "qwen3": ("qwen3-tiny", dict(n_kv_head=2)),
    "qwen3-bidirectional": ("qwen3-tiny", dict(n_kv_head=2, causal=False)),
    "mistral": ("llama-tiny", dict(family="mistral", n_kv_head=2)),
    "neobert": ("neobert-250m", {}),
}  # fmt: skip


def make_model(name):
    size, changes = SIZES[name]
    torch.manual_seed(0)
    model = from_scratch(size, **(SMALL | changes))
    model.config.out_dropout = 0.0
    for key, p in model.named_parameters():  # larger than at init, so that attention acts
        p.data.normal_(0, 1.0 if key == "embed.weight" else 0.3) if p.dim() == 2 else None
    return model


def make_classifier(name, s):
    model = make_model(name)
    head = None
    if s["prediction_head"]:
        head = Head(model.config)
        head.dense.weight.data.normal_(0, 0.3)
    model.drop_head()
    n_out = len(s["labels"]) if s["loss_kind"] == "softmax" else 1
    classifier = T.Classifier(model, head, n_out, T.has_bias(model.config, s), s)
    for p in classifier.linear.parameters():
        p.data.normal_(0, 0.3)
    return classifier


@pytest.fixture(scope="module")
def tokenizer(toy_tokens):
    return load_tokenizer(os.path.join(toy_tokens, "tokenizer"))


@pytest.fixture(scope="module")
def model_folder(toy_tokens, tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    make_model("modernbert").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(n, seed=0, longest=9, syllables=3):
    """1 to 8 words of 1 to 3 syllables; the first letter makes the label."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        words = ["".join(rng.choice(SYLLABLES, rng.integers(1, syllables + 1)))
                 for _ in range(rng.integers(1, longest))]  # fmt: skip
        out.append({"words": words, "labels": ["ABC"["tmrsk".index(w[0]) % 3] for w in words]})
        out[-1]["targets"] = ["ABC".index(x) for x in out[-1]["labels"]]
        out[-1]["lines"] = [len(out)] * len(words)
    return out


# ---- words ----


def plain_words(tokenizer, words, max_length):
    """(ids, for each word its tokens' positions), by characters, one at a time."""
    text, owner = "", []
    for i, word in enumerate(words):
        piece = word if i == 0 else " " + word
        text, owner = text + piece, owner + [i] * len(piece)
    full = tokenizer(text, return_offsets_mapping=True)
    ids, spans = full["input_ids"], full["offset_mapping"]
    assert ids[0] == 0 and ids[-1] == 1  # [CLS], [SEP]
    if len(ids) > max_length:
        ids, spans = ids[: max_length - 1] + [1], spans[: max_length - 1] + [(0, 0)]
    positions = [[] for _ in words]
    for i, (begin, end) in enumerate(spans):
        if end > begin:
            positions[owner[end - 1]].append(i)
    return ids, positions


HARD = [
    ["tan", "motasukes", "na\xefve", "\u4f60\u597d", "don't", "!?"],
    ["[SEP]", "tan"],
    ["tan"],
    ["tanmorisukelo" * 3, "tan", "mos", "tan", "rilotama"],
    ["", "tan", "", "\t", "ris"],
    ["\xad", "tan", "mo\xads"],
]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("position", ["same_token", "next_token"])
def test_word_vectors_equal_loops(position, merge, tokenizer, toy_tokens):
    """With words that tokenize to nothing (a soft hyphen at the start) and some that are cut."""
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\xad", "")
    all_words = HARD + [e["words"] for e in sentences(12)]
    encoded = T.tokenize_words(tokenizer, all_words, 14)
    tokens, seqs, where = T.pack_words(encoded, [len(w) for w in all_words], position, merge)
    hidden = torch.randn(len(tokens), 8, generator=torch.Generator().manual_seed(0)).double()
    got = T.mean_of_words(hidden[where.rows], where)
    want, start, missing, kept, n = [], 0, [], [], 0
    for i, words in enumerate(all_words):
        ids, positions = plain_words(tokenizer, words, 14)
        assert tokens[start : start + len(ids)].tolist() == ids
        for w, at in enumerate(positions):
            if not at:
                missing.append((i, w))
                continue
            if not merge:
                at = at[:1]
            shift = 1 if position == "next_token" else 0
            vectors = [hidden[start + place - shift] for place in at]
            want.append(sum(vectors) / len(vectors))
            kept.append(n + w)
        start, n = start + len(ids), n + len(words)
    assert where.kept.tolist() == kept
    assert start == len(tokens) == sum(seqs.lengths) and max(seqs.lengths) == 14
    assert (5, 0) in missing and (3, 4) in missing
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_a_first_token_without_bos_is_read_where_it_stands():
    one, other = ([5, 6, 7], np.arange(3), np.array([0, 0, 1])), ([8], np.zeros(1, int))
    encoded = [one, (*other, np.zeros(1, int))]
    _, _, where = T.pack_words(encoded, [2, 1], "next_token", True)
    assert where.rows.tolist() == [0, 0, 1, 3] and where.count.tolist() == [2, 1, 1]


def test_words_without_a_token_are_counted_wrong():
    examples = [{"labels": ["B-X", "I-X", "O"]}, {"labels": ["O", "B-Y"]}]
    names = ["B-X", "B-Y", "I-X", "O"]
    metrics, missing = T.score_words(examples, [[0, 2, 3], [3, 1]], names)
    assert missing == 0 and set(metrics.values()) == {1.0}
    metrics, missing = T.score_words(examples, [[0, 2, -1], [-1, -1]], names)
    assert missing == 3 and metrics["acc"] == 2 / 5
    assert metrics["recall"] == 0.5 and metrics["precision"] == 1.0


def test_entity_scores_equal_loops():
    rng, kinds = np.random.default_rng(0), ["O", "B-P", "I-P", "B-L", "I-L"]
    examples = [{"labels": [str(k) for k in rng.choice(kinds, 12)]} for _ in range(30)]
    found = [[int(i) for i in rng.integers(0, 5, 12)] for _ in range(30)]

    def entities(labels):  # (kind, begin, end): I- after another kind begins one, as conlleval has
        out, begin = set(), None
        for i, label in enumerate([*labels, "O"]):
            kind = None if label == "O" else label[2:]
            before = None if i == 0 or labels[i - 1] == "O" else labels[i - 1][2:]
            if begin is not None and (kind != before or label[0] == "B"):
                out.add((before, begin, i))
                begin = None
            if kind and begin is None:
                begin = i
        return out

    right = n_gold = n_found = 0
    for example, row in zip(examples, found, strict=True):
        gold, guess = entities(example["labels"]), entities([kinds[i] for i in row])
        right, n_gold, n_found = right + len(gold & guess), n_gold + len(gold), n_found + len(guess)
    metrics, _ = T.score_words(examples, found, kinds)
    assert metrics["precision"] == pytest.approx(right / n_found)
    assert metrics["recall"] == pytest.approx(right / n_gold)
    assert metrics["f1"] == pytest.approx(2 * right / (n_gold + n_found)) and right > 5


# ---- losses and gradients ----

TEXTS = [
    {"text": "tan mos", "pair": "ris tan kelo", "label": 1.0, "targets": [2], "lines": [1]},
    {"text": "", "pair": None, "label": 0.0, "targets": [0], "lines": [2]},
    {"text": "suma tan " * 9, "pair": "ris", "label": 0.25, "targets": [1], "lines": [3]},
    {"text": "ris", "pair": None, "label": 1.0, "targets": [1], "lines": [4]},
]


def plain_pool(h, pooling):
    if pooling in ("cls", "last"):
        return h[0] if pooling == "cls" else h[-1]
    w = [1.0] * len(h) if pooling == "mean" else [i + 1.0 for i in range(len(h))]
    return sum(x * y for x, y in zip(h, w, strict=True)) / sum(w)


def plain_loss(z, y, kind, pos_weight):
    if kind == "softmax":
        return -(z[y] - z.exp().sum().log())
    if kind == "mse":
        return (z[0] - y) ** 2
    p = 1 / (1 + torch.exp(-z[0]))
    return -(pos_weight * y * p.log() + (1 - y) * (1 - p).log())


CASES = [
    dict(),
    dict(label_position="next_token", prediction_head=True),
    dict(merge_subwords=False),
    dict(task="texts", pooling="cls", prediction_head=True),
    dict(task="texts", pooling="last", loss_kind="bce", pos_weight=3.0),
    dict(task="texts", pooling="weighted_mean", loss_kind="mse"),
    dict(task="texts", pooling="mean", prefix="tan: ", suffix="!", max_seq_len=20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_each_text_alone(case, tokenizer, monkeypatch):
    """In fp64: a packed batch against every text by itself, with losses written out."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    s = settings(**case)
    classifier = make_classifier("modernbert", s).double()
    examples = sentences(5) if s["task"] == "words" else TEXTS
    batch = T.make_batch(examples, tokenizer, s)
    loss, hits = classifier(*batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in classifier.named_parameters()}
    classifier.zero_grad()
    want = want_hits = 0.0
    head = classifier.head or (lambda x: x)
    for example in examples:
        if s["task"] == "words":
            ids, positions = plain_words(tokenizer, example["words"], s["max_seq_len"])
        else:
            [text] = T.join_texts([example], tokenizer, s)  # has a test of its own
            ids = tokenizer(s["prefix"] + text + s["suffix"])["input_ids"]
            assert len(ids) <= s["max_seq_len"]
        h = classifier.model(torch.tensor(ids), T.make_seqs([len(ids)]))
        if s["task"] == "words":
            shift = s["label_position"] == "next_token"
            at = [p if s["merge_subwords"] else p[:1] for p in positions]
            rows = [sum(head(h[i - shift]) for i in p) / len(p) for p in at]
            labels = example["targets"]
        else:
            rows = [head(plain_pool(h, s["pooling"]))]
            labels = example["targets"] if s["loss_kind"] == "softmax" else [example["label"]]
        for row, label in zip(rows, labels, strict=True):
            z = classifier.linear(row)
            want = want + plain_loss(z, label, s["loss_kind"], s["pos_weight"])
            if s["loss_kind"] == "softmax":
                want_hits += int(z.argmax()) == label
            elif s["loss_kind"] == "bce":
                want_hits += (z.item() > 0) == (label > 0.5)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-10) and hits == want_hits
    for name, p in classifier.named_parameters():
        assert p.grad.norm() > 1e-9, name
        assert (grads[name] - p.grad).norm() <= 1e-9 * p.grad.norm(), name


def test_pairs_are_the_tokenizers_own(tokenizer):
    """With SEP between them, a pair has the ids of the tokenizer's template for pairs."""
    from tokenizers import processors

    tokens, seqs, _, _ = T.make_batch(TEXTS[:1], tokenizer, settings(task="texts"))
    theirs = load_tokenizer(tokenizer.name_or_path)
    theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )  # fmt: skip
    assert tokens.tolist() == theirs(TEXTS[0]["text"], TEXTS[0]["pair"])["input_ids"]


def test_text_metrics_equal_loops():
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 3, 60), rng.normal(size=(60, 3))
    guess = z.argmax(1)
    found = T.score_texts([{"targets": [int(i)]} for i in y], z, "softmax")
    assert found["acc"] == pytest.approx(np.mean([a == b for a, b in zip(y, guess, strict=True)]))
    f1 = [2 * np.sum((y == k) & (guess == k)) / (np.sum(y == k) + np.sum(guess == k))
          for k in range(3)]  # fmt: skip
    assert found["f1"] == pytest.approx(np.mean(f1))
    one, other = np.eye(3)[y], np.eye(3)[guess]  # Matthews as the correlation of indicators
    cov = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()  # noqa: E731
    mcc = cov(one, other) / np.sqrt(cov(one, one) * cov(other, other))
    assert found["mcc"] == pytest.approx(mcc)

    y, z = rng.random(40) < 0.4, rng.normal(size=(40, 1))
    texts = [f"q{i // 5}" for i in range(40)]
    y[:5] = True  # a query without a wrong candidate is left out
    found = T.score_texts(
        [{"text": t, "label": float(i)} for t, i in zip(texts, y, strict=True)], z, "bce"
    )
    hits = np.sum(y & (z[:, 0] > 0))
    assert found["f1"] == pytest.approx(2 * hits / (np.sum(y) + np.sum(z > 0)))
    ndcg = []
    for q in range(8):
        rel, score = y[q * 5 : q * 5 + 5], z[q * 5 : q * 5 + 5, 0]
        if 0 < rel.sum() < 5:
            order = sorted(range(5), key=lambda i: -score[i])
            dcg = sum(rel[j] / np.log2(i + 2) for i, j in enumerate(order))
            ndcg.append(dcg / sum(1 / np.log2(i + 2) for i in range(rel.sum())))
    assert len(ndcg) > 3 and found["ndcg"] == pytest.approx(np.mean(ndcg))

    y, z = rng.normal(size=30), rng.normal(size=(30, 1))
    found = T.score_texts([{"label": i} for i in y], z, "mse")
    assert found["pearson"] == pytest.approx(np.corrcoef(y, z[:, 0])[0, 1])
    ranks = y.argsort().argsort(), z[:, 0].argsort().argsort()
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


# ---- folders ----

THEIRS = [
    ("modernbert", dict(prediction_head=True)),
    ("llama", dict()),
    ("qwen3-bidirectional", dict()),
    ("modernbert", dict(task="texts", pooling="cls", prediction_head=True)),
    ("modernbert", dict(task="texts", pooling="mean", prediction_head=True, loss_kind="mse")),
    ("modernbert-decoder", dict(task="texts", pooling="last", prediction_head=True)),
    ("llama", dict(task="texts", pooling="last", loss_kind="bce")),
    ("mistral", dict(task="texts", pooling="last")),
    ("qwen3", dict(task="texts", pooling="last")),
]


@pytest.mark.parametrize(("family", "case"), THEIRS, ids=str)
def test_saved_folders_are_transformers_own(family, case, tokenizer, tmp_path):
    import transformers

    s = settings(**case, dropout=0.2)
    classifier = make_classifier(family, s).eval()
    own = load_tokenizer(tokenizer.name_or_path)
    if family in ("llama", "mistral"):  # their tokenizers have no padding
        own.pad_token = None
    T.set_pad(own, classifier.model.config)
    T.save_classifier(str(tmp_path), classifier, own, s, classifier.state_dict())
    name, problem = T.transformers_class(classifier.model.config, s)
    assert problem is None
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == classifier.linear.out_features
    auto = "Token" if s["task"] == "words" else "Sequence"
    auto = getattr(transformers, f"AutoModelFor{auto}Classification").from_pretrained(tmp_path)
    assert type(auto) is type(theirs)
    if s["loss_kind"] == "softmax":
        assert theirs.config.id2label == {0: "A", 1: "B", 2: "C"}

    examples = sentences(5) if s["task"] == "words" else TEXTS
    with torch.no_grad():
        batch = T.make_batch(examples, own, s)
        logits = classifier(*batch[:3])
        texts = ([" ".join(e["words"]) for e in examples] if s["task"] == "words"
                 else T.join_texts(examples, own, s))  # fmt: skip
        padded = load_tokenizer(str(tmp_path))(texts, padding=True, return_tensors="pt")
        there = theirs(**{k: padded[k] for k in ("input_ids", "attention_mask")}).logits
    if s["task"] == "words":  # the mean of the logits of a word's tokens
        flat = torch.cat([x[m > 0] for x, m in zip(there, padded["attention_mask"], strict=True)])
        there = T.mean_of_words(flat[batch[2].rows], batch[2])
    assert logits.abs().max() > 0.3
    torch.testing.assert_close(logits, there, atol=2e-5, rtol=1e-4)
    # and back: what an embedder or another stage starts from
    again = from_pretrained(str(tmp_path))
    assert again.config.head == "none"
    for key, p in again.state_dict().items():
        assert torch.equal(p, classifier.model.state_dict()[key]), key


@pytest.mark.parametrize(
    ("family", "case", "reason"),
    [
        ("llama", dict(label_position="next_token"), "not one before"),
        ("modernbert", dict(), "prediction_head=True"),
        ("modernbert-decoder", dict(), "labels no tokens"),
        ("llama", dict(task="texts", pooling="mean"), "pools last"),
        ("neobert", dict(task="texts", pooling="cls"), "no NeoBERT"),
    ],
)
def test_what_differs_from_transformers_is_ours_alone(family, case, reason, tokenizer, tmp_path):
    s = settings(**case)
    classifier = make_classifier(family, s)
    own = load_tokenizer(tokenizer.name_or_path)
    T.save_classifier(str(tmp_path), classifier, own, s, classifier.state_dict())
    notes, tensors = T.read_classifier(str(tmp_path))
    assert notes["transformers"] is None and reason in notes["problem"]
    files = load_file(tmp_path / "model.safetensors")
    assert "linear.weight" in files and not any(k.startswith(("score", "class")) for k in files)
    assert torch.equal(tensors["linear.weight"], classifier.linear.weight)
    for key, p in from_pretrained(str(tmp_path)).state_dict().items():
        assert torch.equal(p, classifier.model.state_dict()[key]), key


# ---- whole runs ----

TINY = """
max_seq_len = 14  # cuts some words
batch_size = 8
device_batch_size = 2
max_steps = 6
warmup_steps = 2
learning_rate = 1e-2
log_interval = 1
eval_interval = 3
save_interval = 3
dropout = 0.0
dtype = "fp32"
"""
SCRIPT = "train_classifier.py"
FAST = ["--learning_rate=0.1"]  # for the last layer alone
arguments, run = partial(harness.arguments, SCRIPT), partial(harness.run, SCRIPT)


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    keys = ("words", "labels")
    files = {}
    for name, n in (("train", 45), ("val", 21)):
        lines = [{key: e[key] for key in keys} for e in sentences(n, seed=n)]
        files[name] = write_lines(folder / f"{name}.jsonl", lines)
    more = f"init_from = {model_folder!r}\ndata = {files['train']!r}\n"
    more += f"eval_data = {files['val']!r}\n"
    (folder / "tiny.py").write_text(TINY + more)
    return str(folder / "tiny.py")


@pytest.fixture(scope="module")
def text_keys(tmp_path_factory):
    """{loss_kind: keys of the command line} with data of its form, 30 texts."""
    rng, folder, out = np.random.default_rng(3), tmp_path_factory.mktemp("texts"), {}
    say = lambda n: " ".join(rng.choice(SYLLABLES, n))  # noqa: E731
    classes, pairs, scores = [], [], []
    for i in range(30):
        text = say(4 + i % 7)
        classes.append({"text": text, "label": "tmrsk".index(text[0]) % 2})
        word = say(1)
        pairs.append({"query": word, "pos": [f"{word} {say(2)}"], "neg": [say(3), say(2)]})
        share = int(rng.integers(0, 4))
        other = " ".join(text.split()[:share] + say(4 - share).split())
        scores.append({"text": text, "text_pair": other, "label": share * 1.25})
    for kind, lines in (("softmax", classes), ("bce", pairs), ("mse", scores)):
        path = write_lines(folder / f"{kind}.jsonl", lines)
        out[kind] = [f"--data={path}", f"--eval_data={path}", "--task=texts", "--max_seq_len=40",
                     f"--loss_kind={kind}", "--prediction_head=True", "--freeze_backbone=False",
                     "--learning_rate=1e-3"]  # fmt: skip
    out["bce"].append("--pos_weight=2")
    return out


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """The run on one rank that others are compared with: frozen, with dropout."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    run(tiny, out_dir, "--dropout=0.1", *FAST)
    return out_dir


def test_a_frozen_run_learns_and_changes_its_last_layer_alone(tiny, model_folder, tmp_path):
    lines = [{"words": e["words"], "labels": e["labels"]} for e in sentences(60, 5, 9, 1)]
    path = write_lines(tmp_path / "easy.jsonl", lines)
    more = ["--max_steps=60", "--learning_rate=0.05", "--dropout=0.1", f"--data={path}"]
    run(tiny, tmp_path, *more, f"--eval_data={path}", "--eval_interval=20")
    curve, right = losses(tmp_path), losses(tmp_path, "eval_acc")
    assert list(curve) == list(range(1, 61)) and list(right) == [20, 40, 60]
    assert right[60] > 0.6 and curve[60] < 0.8 * curve[1]
    base = from_pretrained(model_folder).state_dict()
    for key, p in from_pretrained(str(tmp_path)).state_dict().items():
        assert torch.equal(p, base[key]), key
    (found,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert found["task"] == "words" and found["n"] == sum(len(x["words"]) for x in lines)
    assert found["metrics"]["acc"] == right[60]


def test_eval_only_gives_the_metrics_of_the_end(tiny, unbroken, tmp_path, capsys):
    run_ = partial(run, tiny, tmp_path, "--eval_only=True", f"--init_from={unbroken}")
    with pytest.raises(SystemExit):
        run_("--label_position=next_token", "--max_seq_len=64", "--dropout=0.9")
    assert "as it was trained" in capsys.readouterr().out
    one, other = (json.loads((x / "results.json").read_text()) for x in (unbroken, tmp_path))
    assert one == other and list(one.values())[0]["missing"] > 0
    assert os.listdir(tmp_path) == ["results.json"]


def test_kinds_of_texts_learn_and_reload(tiny, text_keys, tmp_path):
    for kind, metric in (("softmax", "mcc"), ("bce", "ndcg"), ("mse", "pearson")):
        whole, after = tmp_path / kind, tmp_path / f"{kind}-after"
        keys = [*text_keys[kind], "--max_steps=30", "--eval_interval=10", "--dropout=0.1"]
        run(tiny, whole, *keys)
        found = losses(whole, f"eval_{metric}")
        assert found[30] > found[10] and found[30] > 0.5, (kind, found)
        with pytest.raises(SystemExit):
            run(tiny, after, keys[1], "--eval_only=True", f"--init_from={whole}")
        one, other = (json.loads((x / "results.json").read_text()) for x in (whole, after))
        assert one == other and one


def test_killed_and_resumed_is_bit_equal(tiny, unbroken, tmp_path):
    kill_at_step(start(1, SCRIPT, tiny, tmp_path, "--dropout=0.1", *FAST), tmp_path, 4)
    run(tiny, tmp_path, "--dropout=0.1", *FAST, "--resume=True")
    for column in ("loss", "acc", "gnorm", "eval_loss", "eval_acc"):
        assert losses(tmp_path, column) == losses(unbroken, column)
    assert saved(tmp_path, 6) == saved(unbroken, 6)


def test_lora_resumes_merged_and_as_an_adapter(tiny, tmp_path):
    keys = ["--lora_rank=2", "--dropout=0.1", "--schedule=constant"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    model = run(tiny, whole, *keys).classifier.eval()
    run(tiny, half, *keys, "--max_steps=3")
    run(tiny, half, *keys, "--resume=True")
    for column in ("loss", "gnorm", "eval_loss"):
        assert losses(half, column) == losses(whole, column)
    assert saved(half, 6) == saved(whole, 6)
    s = model.settings
    examples = sentences(4)
    batch = T.make_batch(examples, load_tokenizer(str(whole / "step6")), s)
    merged = from_pretrained(str(whole / "step6"))
    with torch.no_grad():
        ours, theirs = model.model(*batch[:2]), merged(*batch[:2])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # an adapter's folder is a model to start from, its base is found
    run(tiny, tmp_path / "next", f"--init_from={whole / 'step6' / 'adapter'}", "--max_steps=1")
    last = from_pretrained(str(tmp_path / "next" / "step1")).state_dict()
    assert all(torch.equal(p, last[key]) for key, p in merged.state_dict().items())


def equal_runs(got, want):
    """Losses to 1e-5, weights to what Adam makes of that."""
    for column, tolerance in dict(loss=1e-5, gnorm=1e-4, eval_loss=1e-4).items():
        expected = losses(want, column)
        assert expected and losses(got, column) == pytest.approx(expected, rel=tolerance), got
    a, b = (load_file(folder / "step6" / "model.safetensors") for folder in (got, want))
    assert a.keys() == b.keys()
    for name in b:
        assert (a[name] - b[name]).norm() <= 1e-3 * b[name].norm(), (got, name)


def test_two_ranks_equal_one(tiny, text_keys, tmp_path):
    """Ranks and micro-batches with unequal numbers of labels, DDP and FSDP."""
    kinds = {
        "ddp": [],
        "whole": ["--freeze_backbone=False", "--learning_rate=1e-3"],
        "fsdp": ["--freeze_backbone=False", "--learning_rate=1e-3", "--fsdp=True"],
        "lora": ["--lora_rank=2", "--lora_dropout=0", "--fsdp=True"],
        "mse": [*text_keys["mse"], "--fsdp=True"],
    }
    argvs = []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *flags))
        if kind != "fsdp":
            run(tiny, tmp_path / f"{kind}-one", *flags, "--fsdp=False")
    more = ["--freeze_backbone=False", "--dropout=0.2", "--schedule=constant"]
    half = arguments(tiny, tmp_path / "half", *more)
    argvs += [arguments(tiny, tmp_path / "unbroken", *more), half + ["--max_steps=3"]]
    argvs += [half + ["--resume=True"]]
    run_ranks(2, argvs)
    for kind in kinds:
        equal_runs(tmp_path / kind, tmp_path / ("whole-one" if kind == "fsdp" else f"{kind}-one"))
    for column in ("loss", "gnorm", "eval_loss"):
        assert losses(tmp_path / "half", column) == losses(tmp_path / "unbroken", column)
    assert saved(tmp_path / "half", 6) == saved(tmp_path / "unbroken", 6)


def test_sigterm_saves_and_exits(tiny, unbroken, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(common, "catch_sigterm", lambda: lambda: calls.append(1) or len(calls) > 4)
    run(tiny, tmp_path, "--dropout=0.1", *FAST)
    assert f"saved {tmp_path}/step4" in capsys.readouterr().out and max(losses(tmp_path)) == 4
    monkeypatch.undo()
    run(tiny, tmp_path, "--dropout=0.1", *FAST, "--resume=True")
    assert losses(tmp_path) == losses(unbroken) and saved(tmp_path, 6) == saved(unbroken, 6)


def test_show_batch_and_dry_run(tiny, text_keys, unbroken, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, "--show_batch=True", "--label_position=next_token")
    shown = capsys.readouterr().out
    assert re.search(r"--- text 0: \d+ tokens\n\x1b\[7m\[CLS\]\x1b\[0m<[ABC]>", shown)
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, "--show_batch=True", *text_keys["mse"], "--pooling=cls")
    shown = capsys.readouterr().out
    assert re.search(r"tokens, label [\d.]+\n\x1b\[7m\[CLS\]\x1b\[0m[^\x1b]+\n", shown)
    before = sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("*"))
    run(tiny, unbroken, "--dry_run=True")
    out = capsys.readouterr().out
    assert re.search(r"dry run: [\d.]+ s/step, [\d.,]+ texts/s, peak memory .* fits", out)
    assert sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("*")) == before


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path, capsys):
    keys = ["--learning_rate=1e30", "--warmup_steps=0", "--save_interval=1", "--max_steps=20"]
    keys += ["--freeze_backbone=False", "--eval_interval=0"]
    with pytest.raises(SystemExit, match="4th such step"):
        run(tiny, tmp_path, *keys)
    out = capsys.readouterr().out
    assert re.search(r"step \d: loss nan.* skipped. Lines of .*train.jsonl: \[\d+", out)


def test_dropout_is_off_in_evaluation(tokenizer):
    s = settings(dropout=0.9, frozen=True)
    classifier = make_classifier("modernbert", s).train()
    examples = sentences(6)
    one, other = (T.evaluate(classifier, examples, tokenizer, s) for _ in range(2))
    assert one == other and classifier.training and not classifier.model.training
    batch = T.make_batch(examples, tokenizer, s)
    assert not torch.equal(classifier(*batch[:3]), classifier(*batch[:3]))
    classifier.eval()
    loss = classifier(*batch)[0].item() / len(batch[3])
    assert one["loss"] == pytest.approx(loss, rel=1e-6)


# ---- bad input ----

GOOD = '{"words": ["a", "b"], "labels": ["A", "B"]}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"words": ["a", "b"], "labels": ["A"]}', "line 3: 2 words and 1 in 'labels'"),
        ('{"words": [], "labels": []}', "line 3: 0 words and 0"),
        ('{"words": ["a"]}', "line 3: field 'labels' is missing"),
        ('{"words": "a b", "labels": ["A", "B"]}', "line 3: field 'words' is 'a b'"),
        ('{"words": ["a"], "labels": [1]}', "line 3: field 'labels' is [1] (expected list of str)"),
        ('{"words": ["a"', "line 3: not JSON"),
        ('{"words": ["a"], "labels": ["D"]}', "line 3: label 'D' is none of the 2 labels: A, B"),
    ],
)
def test_broken_lines_of_words(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}")
    with pytest.raises(ValueError) as error:
        T.number_labels(T.read_words(str(path), "labels", -1), ["A", "B"], str(path))
    assert f"{path} " in str(error.value) and message in str(error.value)


def test_columns(tmp_path):
    path = tmp_path / "eng.testa"
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n\n"
    path.write_text(text + "Peter NNP I-NP I-PER")
    examples = T.read_words(str(path), "labels", 3)
    assert examples == T.read_words(str(path), "labels", -1) == [
        {"words": ["EU", "rejects"], "labels": ["I-ORG", "O"], "lines": [3, 4]},
        {"words": ["Peter"], "labels": ["I-PER"], "lines": [7]},
    ]  # fmt: skip
    assert T.read_words(str(path), "labels", 1)[0]["labels"] == ["NNP", "VBZ"]
    with pytest.raises(ValueError, match="eng.testa line 4: label 'O' is none of the 2 labels"):
        T.number_labels(examples, ["I-ORG", "I-PER"], str(path))
    path.write_text("a X\nb\n")
    with pytest.raises(ValueError, match="eng.testa line 2: 1 columns, no label in -1"):
        T.read_words(str(path), "labels", -1)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("softmax", '{"text": "a", "label": 0.5}', "line 3: field 'label' is 0.5 (expected str)"),
        ("softmax", '{"text": "a"}', "line 3: field 'label' is missing"),
        ("softmax", '{"text": 1, "label": "x"}', "line 3: field 'text' is 1"),
        ("softmax", '{"text": "a", "text_pair": 2, "label": "x"}', "field 'text_pair' is 2"),
        ("softmax", '{"text": "a", "label": "x"}', "line 3: label 'x' is none of the 1 labels: 1"),
        ("bce", '{"text": "a", "label": 2}', "line 3: label 2.0, expected one from 0 to 1"),
        ("mse", '{"text": "a", "label": "1"}', "line 3: field 'label' is '1' (expected float)"),
        ("mse", '{"text": "a", "label": NaN}', "line 3: label nan, expected one that is finite"),
    ],
)
def test_broken_lines_of_texts(kind, line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "a", "label": 1}}\n\n{line}\n')
    with pytest.raises(ValueError) as error:
        T.number_labels(T.read_texts(str(path), kind), ["1"], str(path))
    assert f"{path} " in str(error.value) and message in str(error.value)


def test_pairs_with_negatives_become_labelled_texts(tmp_path):
    lines = [{"query": "q", "pos": ["a", "b"], "neg": ["c"], "prompt": "ask: "},
             {"query": "r", "positive": "d"}]  # fmt: skip
    examples = T.read_texts(write_lines(tmp_path / "x.jsonl", lines), "bce")
    assert [(e["text"], e["pair"], e["label"], e["lines"]) for e in examples] == [
        ("ask: q", "a", 1.0, [1]), ("ask: q", "b", 1.0, [1]), ("ask: q", "c", 0.0, [1]),
        ("r", "d", 1.0, [2]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task=word"], "task='word': expected one of words, texts"),
        (["--label_position=next"], "label_position='next'"),
        (["--loss_kind=mse"], "words have the labels of softmax"),
        (["--lora_rank=2", "--freeze_backbone=False"], "LoRA freezes the backbone"),
        (["--device_batch_size=3"], "batch_size=8 must be k x device_batch_size=3"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl"),
        (["--init_from=nowhere/at/all"], "nowhere/at/all"),
        (["--label_names=('A','B')"], "train.jsonl line"),
        (["--eval_only=True"], "no classifier saved by us"),
        (["--pooling=max", "--task=texts"], "pooling='max'"),
        (["--dropuot=0.1"], "did you mean 'dropout'"),
        (["--max_seq_len=2"], "leaves no room"),
    ],
)
def test_bad_settings_say_what_is_expected(tiny, tmp_path, more, message):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        run(tiny, tmp_path, *more)
    assert message in str(error.value)


def test_labels_are_sorted():
    def named(*labels):
        return T.label_set([{"label": x} for x in labels])

    assert named("10", "2", "0", "2") == ["0", "2", "10"]
    assert named("b", "B", "a") == ["B", "a", "b"]
    assert named("x", "10", "9") == ["9", "10", "x"]


def test_resume_keeps_its_labels(tiny, unbroken, tmp_path):
    lines = [{"words": ["tan"], "labels": ["other"]}, {"words": ["mo"], "labels": ["labels"]}]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="was trained with labels="):
        run(tiny, unbroken, f"--data={path}", "--eval_data=", "--resume=True")


def test_both_texts_of_a_long_pair_are_seen(tokenizer):
    s = dict(prefix="", suffix="", separator="[SEP]", max_seq_len=32, task="texts",
             loss_kind="mse", pooling="mean")  # fmt: skip
    for text, pair in (("tan " * 60, "ris su"), ("tan", "ris " * 60), ("tan " * 60, "ris " * 60)):
        tokens, *_ = T.make_batch([{"text": text, "pair": pair, "label": 0.0}], tokenizer, s)
        shown = tokenizer.decode(tokens).split("[SEP]")
        assert len(tokens) <= 32 and "tan" in shown[0] and "ris" in shown[1] and len(shown) == 3
        if pair == "ris su":
            assert shown[1].strip() == pair and len(tokens) == 32
    even = shown[0].count("tan"), shown[1].count("ris")
    assert min(even) > 5, even


def test_labels_that_training_never_saw_are_an_error(tiny, tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text('{"words": ["tan"], "labels": ["A"]}\n{"words": ["tan"], "labels": ["Z"]}\n')
    with pytest.raises(ValueError, match="val.jsonl line 2: label 'Z' is none of the 3 labels"):
        run(tiny, tmp_path / "out", f"--eval_data={path}")


def test_a_run_is_not_overwritten(tiny, unbroken):
    with pytest.raises(SystemExit, match="--resume=True"):
        run(tiny, unbroken)


def test_configs_have_keys_of_the_script(monkeypatch):
    paths = sorted(glob.glob(os.path.join(ROOT, "configs", "classifier_*.py")))
    assert len(paths) == 5
    for path in paths:
        monkeypatch.setattr("sys.argv", [SCRIPT, path])
        found = common.configure(dict(vars(T)))
        assert found["batch_size"] % found["device_batch_size"] == 0
        assert found["task"] == ("words" if found["label_names"] or "pos_ud" in path else "texts")
        if "conll" in path:
            sizes = {"pos": 47, "chunk": 23, "ner": 9}
            for field, n in sizes.items():
                monkeypatch.setattr("sys.argv", [SCRIPT, path, f"--label_field={field}"])
                names = common.configure(dict(vars(T)))["label_names"]
                assert len(set(names)) == len(names) == n, field


# ---- prepare ----


def script(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


COLUMNS = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
Paris NNP B-NP I-LOC
Lyon NNP I-NP B-LOC
"""
WANTED = [
    {"words": ["EU", "rejects", "German", "call"], "pos": ["NNP", "VBZ", "JJ", "NN"],
     "chunk": ["B-NP", "B-VP", "B-NP", "I-NP"], "ner": ["B-ORG", "O", "B-MISC", "O"]},
    {"words": ["Peter", "Blackburn", "Paris", "Lyon"], "pos": ["NNP"] * 4,
     "chunk": ["B-NP", "I-NP", "B-NP", "I-NP"], "ner": ["B-PER", "I-PER", "B-LOC", "B-LOC"]},
]  # fmt: skip


def test_conll2003_from_columns_and_from_the_hubs_schema(tmp_path, capsys):
    prepare = script("data/conll2003/prepare.py")
    for name in ("eng.train", "eng.testa", "eng.testb"):
        (tmp_path / name).write_text(COLUMNS)
    prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "a")])
    shown = capsys.readouterr().out
    assert "2 sentences, 8 words, 5 names; expected 14,041, 203,621, 23,499: NOT the data" in shown
    for name in ("train", "val", "test"):
        assert read_lines(tmp_path / "a" / f"{name}.jsonl") == WANTED
    (tmp_path / "eng.testa").write_text("EU NNP I-NP\n")
    with pytest.raises(ValueError, match="eng.testa line 1: 3 columns, expected 4"):
        prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "a")])

    from datasets import ClassLabel, Dataset, Features, List, Value

    names = {f: sorted({x for row in WANTED for x in row[f]}) for f in prepare.FIELDS}
    rows = {"id": ["0", "1"], "tokens": [row["words"] for row in WANTED]}
    for f in prepare.FIELDS:
        rows[f"{f}_tags"] = [[names[f].index(x) for x in row[f]] for row in WANTED]
    features = {"id": Value("string"), "tokens": List(Value("string"))}
    features |= {f"{f}_tags": List(ClassLabel(names=names[f])) for f in prepare.FIELDS}
    dataset = Dataset.from_dict(rows, features=Features(features))
    for split in ("train", "validation", "test"):
        dataset.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    prepare.main(["--dataset", str(tmp_path / "hub"), "--out", str(tmp_path / "b")])
    for name in ("train", "val", "test"):
        assert read_lines(tmp_path / "b" / f"{name}.jsonl") == WANTED


def test_universal_dependencies(tmp_path):
    prepare, row = script("data/ud/prepare.py"), "{}\t{}\tx\t{}\t{}" + "\t_" * 5 + "\n"
    text = "# text = I don't\n" + row.format(1, "I", "PRON", "PRP")
    text += row.format("2-3", "don't", "_", "_") + row.format(2, "do", "AUX", "VBP")
    text += row.format(3, "n't", "PART", "RB") + row.format("3.1", "go", "VERB", "VB") + "\n"
    text += row.format(1, "New York", "PROPN", "NNP")
    for part in ("train", "dev", "test"):
        (tmp_path / f"en_x-ud-{part}.conllu").write_text(text)
    prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "out")])
    upos = [{"words": ["I", "do", "n't"], "labels": ["PRON", "AUX", "PART"]},
            {"words": ["New York"], "labels": ["PROPN"]}]  # fmt: skip
    for name in ("train", "val", "test"):
        assert read_lines(tmp_path / "out" / f"{name}.jsonl") == upos
    one = str(tmp_path / "one.jsonl")
    prepare.main(["--input", str(tmp_path / "en_x-ud-dev.conllu"), "--out", one, "--tags", "xpos"])
    assert read_lines(one)[0]["labels"] == ["PRP", "VBP", "RB"]
    (tmp_path / "en_x-ud-dev.conllu").write_text("1\tI\tI\tPRON\n")
    with pytest.raises(ValueError, match="dev.conllu line 1: 4 columns, expected 10"):
        prepare.main(["--input", str(tmp_path), "--out", str(tmp_path / "out")])
