"""train_contrastive.py: its losses against loops, the gradient cache, and tiny runs of the script,
whole, killed and resumed, on 1-3 ranks.

    python -m pytest tests/test_contrastive.py
"""

import json
import math
import os
import random
import re
from collections import Counter
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import harness
import train_contrastive as T
from data import load_tokenizer, open_pairs, read_pair
from embedder import Embedder, Template
from harness import kill_at_step, losses, run_ranks, saved, start
from model import from_pretrained, from_scratch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORDS = [f"{a}{b}" for a in ("ta", "mo", "ri", "su", "ke") for b in ("n", "lo", "ma", "s")]


def settings(**changes):
    """What the main block gives to the functions, for one rank on the CPU."""
    plain = dict(
        batch_size=6, group_size=3, no_duplicates=False, seed=7, rank=0, world_size=1,
        template=Template(), query_max_length=16, passage_max_length=32, pool_instruction=True,
        pooling="mean", normalize=True, instructions=(("",), ("",)), chunk_tokens=10**9,
        temperature=0.5, both_directions=False, autocast=nullcontext, false_negative_margin=None,
        matryoshka_dims=(), negatives_cross_device=True, distill_weight=0.0,
        distill_temperature=1.0, query_flops=0.3, passage_flops=0.2,
        device=torch.device("cpu"), fsdp=False,
    )  # fmt: skip
    assert changes.keys() <= plain.keys() or not changes
    return plain | changes


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


# ---- losses, against loops over numbers ----


def plain_similarity(q, d):
    """q and d [C], or lists of tokens [L, C] as they are without padding."""
    if q.dim() == 1:
        return (q * d).sum()
    if not len(q) or not len(d):
        return q.new_tensor(0.0)
    return sum(max((x * y).sum() for y in d) for x in q)


def plain_info_nce(scores, positive, tau, excluded, margin=None):
    """scores: one query's list of scores -> (its loss, whether the positive is first)."""
    own = scores[positive]
    rest = [
        x for n, x in enumerate(scores)
        if n != positive and n not in excluded
        and (margin is None or x.item() <= own.item() + margin)
    ]  # fmt: skip
    total = sum((torch.exp(x / tau) for x in rest), torch.exp(own / tau))
    return -torch.log(torch.exp(own / tau) / total), all(x <= own for x in rest)


def plain_kl(scores, teacher, tau, teacher_tau):
    """KL(teacher || student) of one group of scores."""
    student, wanted = [x / tau for x in scores], [x / teacher_tau for x in teacher]
    total, wanted_total = sum(map(torch.exp, student)), sum(map(np.exp, wanted))
    kl = 0.0
    for x, y in zip(student, wanted, strict=True):
        p = np.exp(y) / wanted_total
        kl = kl + p * (np.log(p) - torch.log(torch.exp(x) / total))
    return kl


def plain_flops(vectors):
    return sum(x**2 for x in sum(abs(v) for v in vectors) / len(vectors))


def plain_loss(pairs, queries, passages, s, world_size):
    """The loss of a batch from its texts and their vectors, and the hits."""
    owner = [b for b, p in enumerate(pairs) for _ in p["passages"]]
    texts = [text for p in pairs for text in p["passages"]]
    first = [owner.index(b) for b in range(len(pairs))]
    rank = [b * world_size // len(pairs) for b in range(len(pairs))]

    def right(b):  # all texts that are known to answer query b
        same = [p["known"] for p in pairs if p["query"] == pairs[b]["query"]]
        return {text for known in same for text in known}

    def far(a, b):
        return not s["negatives_cross_device"] and rank[a] != rank[b]

    total, hits = 0.0, 0
    widths = s["matryoshka_dims"] or (queries[0].size(-1),)
    for width in widths:
        q, d = ([x[..., :width] for x in y] for y in (queries, passages))
        if s["matryoshka_dims"] and s["normalize"]:
            q, d = ([x / x.norm(dim=-1, keepdim=True) for x in y] for y in (q, d))
        for b, pair in enumerate(pairs):
            scores = [plain_similarity(q[b], x) for x in d]
            out = {n for n, text in enumerate(texts) if text in right(b) or far(owner[n], b)}
            loss, hit = plain_info_nce(
                scores, first[b], s["temperature"], out, s["false_negative_margin"]
            )
            hits += int(hit) if width == max(widths) else 0
            if s["both_directions"]:
                back = [plain_similarity(d[first[b]], x) for x in q]
                out = {a for a in range(len(pairs))
                       if pair["passages"][0] in right(a) or far(a, b)}  # fmt: skip
                loss = (loss + plain_info_nce(back, b, s["temperature"], out)[0]) / 2
            if s["distill_weight"] and pair["scores"]:
                group = [scores[n] for n in range(len(texts)) if owner[n] == b]
                loss = loss + s["distill_weight"] * plain_kl(
                    group, pair["scores"], s["temperature"], s["distill_temperature"]
                )
            total = total + loss / len(widths) / len(pairs)
    if s["pooling"] == "splade":
        total = total + s["query_flops"] * plain_flops(queries)
        total = total + s["passage_flops"] * plain_flops(passages)
    return total, hits


def pair(query, passages, known=(), scores=None):
    return {"query": query, "known": [passages[0], *known], "passages": passages, "scores": scores}


# Groups of 1 to 3, with and without scores; a query twice with other positives (a); its other
# positive is a negative elsewhere (p0b in group 2); one passage for two queries (p3); a negative
# that is the text of the positive (group 5).
PAIRS = [
    pair("a", ["p0", "n0", "n1"], ["p0b"], [3.0, 1.0, -0.5]),
    pair("b", ["p1"]),
    pair("c", ["p2", "p0b"], scores=[0.5, 0.75]),
    pair("a", ["p0c", "n1"]),
    pair("d", ["p3", "p1", "n2"], ["p2"]),
    pair("e", ["p3", "p3"], scores=[2.0, 1.0]),
]


def vectors(kind, n, seed):
    """n random vectors [8], or lists of 1-5 token vectors, in fp64."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    if kind == "dense":
        return [draw(8) for _ in range(n)]
    return [F.normalize(draw(1 + (i * 7 + seed) % 5, 8), dim=-1) for i in range(n)]


def stacked(x):
    return torch.nn.utils.rnn.pad_sequence(x, batch_first=True)  # of [8] and of [L, 8]


@pytest.mark.parametrize("kind", ["dense", "tokens"])
def test_similarity_equals_loops(kind):
    queries, passages = vectors(kind, 4, 1), vectors(kind, 7, 2)
    if kind == "tokens":  # an empty text beside others
        passages[3], queries[1] = passages[3][:0], queries[1][:0]
        passages[5] = -queries[0]  # a maximum below 0, which padding must not win
        queries[0] = queries[0][:1]
    got = T.similarity(stacked(queries), stacked(passages))
    for b, q in enumerate(queries):
        for n, d in enumerate(passages):
            assert got[b, n].item() == pytest.approx(float(plain_similarity(q, d)), abs=1e-12)


@pytest.mark.parametrize("margin", [None, 0.0, 0.4, -0.3])
@pytest.mark.parametrize("known", [[], [(0, 1), (0, 4), (2, 5), (3, 0)]])
def test_info_nce_equals_loops(margin, known):
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positive = torch.tensor([2, 7, 3, 8])
    got, hits = T.info_nce(scores, positive, 0.3, torch.tensor(known).view(-1, 2), margin)
    want = [
        plain_info_nce(scores[b], int(positive[b]), 0.3, {n for a, n in known if a == b}, margin)
        for b in range(4)
    ]
    assert got.item() == pytest.approx(sum(loss.item() for loss, _ in want), rel=1e-12)
    assert hits == sum(hit for _, hit in want)


def test_margin_leaves_the_positive_its_gradient():
    scores = torch.tensor([[1.0, 3.0, 0.5]], dtype=torch.float64, requires_grad=True)
    T.info_nce(scores, torch.tensor([0]), 1.0, None, 0.1)[0].backward()
    p = 1 / (1 + np.exp(-0.5))  # against the third alone: the second is above 1.0 + 0.1
    assert scores.grad[0].tolist() == pytest.approx([p - 1, 0, 1 - p])


def test_distillation_equals_loops():
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.tensor([[0, 1, 2], [3, 4, -1], [5, -1, -1], [6, 7, -1]])
    nan = float("nan")
    teacher = torch.tensor([[1.0, 3.0, 2.0], [0.5, -0.5, nan], [1, nan, nan], [nan, nan, nan]])
    got = T.distillation(scores, group, teacher.double(), 0.7, 0.4)
    want = [plain_kl([scores[0, i] for i in (0, 1, 2)], [1.0, 3.0, 2.0], 0.7, 0.4)]
    want += [plain_kl([scores[1, i] for i in (3, 4)], [0.5, -0.5], 0.7, 0.4)]
    assert min(want) > 0.01 and got.item() == pytest.approx(float(sum(want)), rel=1e-12)
    # the teacher's own scores at its temperature leave nothing to learn
    same = teacher.nan_to_num().double() * 0.7 / 0.4
    scores = torch.zeros(4, 8).double().scatter(1, group.clamp(min=0), same)
    assert abs(T.distillation(scores[:1], group[:1], teacher[:1].double(), 0.7, 0.4)) < 1e-12


def test_flops_equals_loops():
    x = torch.stack(vectors("dense", 5, 3))
    assert T.flops(x).item() == pytest.approx(float(plain_flops(x)), rel=1e-12)


LOSSES = {
    "plain": {},
    "margin": dict(false_negative_margin=0.2),
    "both": dict(both_directions=True),
    "distill": dict(distill_weight=0.7, distill_temperature=0.4),
    "matryoshka": dict(matryoshka_dims=(2, 8, 1), distill_weight=0.7, both_directions=True),
    "unnormalised": dict(matryoshka_dims=(4, 8), normalize=False),
    "splade": dict(pooling="splade"),
    "apart": dict(negatives_cross_device=False, both_directions=True, distill_weight=0.5),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "name"), [("dense", n) for n in LOSSES] + [("tokens", n) for n in ("plain", "apart")]
)
def test_batch_loss_and_its_gradients_equal_loops(kind, name, world_size, monkeypatch):
    """The sums over the ranks, in one block of queries and in several."""
    s = settings(world_size=world_size, **LOSSES[name])
    group, teacher, known = T.layout(PAIRS)
    n = sum(len(p["passages"]) for p in PAIRS)
    queries = [x.requires_grad_() for x in vectors(kind, 6, 1)]
    passages = [x.requires_grad_() for x in vectors(kind, n, 2)]
    want, want_hits = plain_loss(PAIRS, queries, passages, s, world_size)
    want.backward()
    for block in (2**22, 1, 300):
        monkeypatch.setattr(T, "_BLOCK", block)
        q, d = (stacked([x.detach() for x in y]).requires_grad_() for y in (queries, passages))
        loss, hits = 0.0, 0
        for mine in torch.arange(6).view(world_size, -1):
            parts = T.batch_loss(q, d, mine, (group, teacher.double(), known), s)
            loss, hits = loss + parts[0], hits + parts[1]
        assert loss == pytest.approx(want.item(), rel=1e-10) and hits == want_hits
        for got, ours in ((q.grad, queries), (d.grad, passages)):
            none = torch.zeros_like
            grads = stacked([none(x) if x.grad is None else x.grad for x in ours])
            assert grads.abs().max() > 1e-3
            torch.testing.assert_close(got, grads, atol=1e-12, rtol=1e-9)


# ---- batches ----


def test_layout_equals_loops():
    group, teacher, known = T.layout(PAIRS)
    texts = [text for p in PAIRS for text in p["passages"]]
    n, expected = 0, set()
    for b, p in enumerate(PAIRS):
        size = len(p["passages"])
        assert group[b].tolist() == [*range(n, n + size)] + [-1] * (3 - size)
        scores = p["scores"] or []
        assert teacher[b, : len(scores)].tolist() == pytest.approx(scores)
        assert teacher[b, len(scores) :].isnan().all()
        for other in PAIRS:
            if other["query"] == p["query"]:
                expected |= {(b, m) for m, t in enumerate(texts) if t in other["known"] and m != n}
        n += size
    assert set(map(tuple, known.tolist())) == expected
    assert {(0, 5), (3, 0), (3, 5), (0, 6), (5, 12), (5, 8), (4, 4)} <= expected  # see PAIRS
    none = T.layout([pair("a", ["x"]), pair("b", ["y"])])
    assert none[0].tolist() == [[0], [1]] and len(none[2]) == 0


@pytest.fixture
def two_files(tmp_path):
    """10 and 25 lines: positives 2, negatives 0 to 4, every text with its line in it."""
    paths = []
    for name, n in (("a", 10), ("b", 25)):
        lines = []
        for i in range(n):
            line = {"query": f"{name}{i}", "pos": [f"{name}{i}p{k}" for k in range(2)]}
            line["neg"] = [f"{name}{i}n{k}" for k in range(i % 5)]
            if i % 3 == 0:
                line |= {"pos_scores": [9.0, 8.0], "neg_scores": [k / 2 for k in range(i % 5)]}
            lines.append(line | ({"prompt": f"{name}{i}:"} if i % 4 == 0 else {}))
        paths.append(write_lines(tmp_path / f"{name}.jsonl", lines))
    return [open_pairs(path) for path in paths]


def test_batches_are_a_function_of_seed_and_step(two_files):
    s = settings(batch_size=4)
    choices = T.choose_files(two_files, 60, 1.0, 7)
    batches = [T.make_batch(two_files, step, choices, s) for step in range(60)]
    assert batches[37] == T.make_batch(two_files, 37, choices, s)
    other = [T.make_batch(two_files, step, choices, s | {"seed": 8}) for step in range(60)]
    assert batches != other
    seen = {0: [], 1: []}
    for step, (pairs, which) in enumerate(batches):
        assert which == choices[step] and len(pairs) == 4
        assert all(p["query"][0] == "ab"[which] for p in pairs)  # one file a batch
        seen[which] += [p["query"] for p in pairs]
    for which, n in ((0, 10), (1, 25)):  # epochs one after the other, in batches of 4
        assert len(seen[which]) > 2 * n
        orders = [seen[which][i : i + n] for i in range(0, len(seen[which]) - n + 1, n)]
        assert all(len(set(order)) == n for order in orders) and orders[0] != orders[1]


def test_ranks_and_resumed_runs_see_the_batches_of_one_rank(two_files, toy_tokens):
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    choices = T.choose_files(two_files, 9, 1.0, 7)
    assert (T.choose_files(two_files, 20, 1.0, 7)[:9] == choices).all()  # longer runs begin alike

    def run(world_size, first):
        steps = []
        for rank in range(world_size):
            s = settings(rank=rank, world_size=world_size)
            batches = T.train_batches(two_files, first, 9, choices, tokenizer, s)
            for step, (encoded, n, where, counts) in enumerate(batches, first):
                assert len(encoded) == n + counts[rank] and n == 6 // world_size
                steps.append((step, rank, encoded[:n], encoded[n:], [x.tolist() for x in where]))
        out = []
        for step in range(first, 9):
            parts = [x[1:] for x in steps if x[0] == step]
            out.append([sum((x[i] for x in sorted(parts, key=lambda x: x[0])), []) for i in (1, 2)])
            assert all(str(x[3]) == str(parts[0][3]) for x in parts)
            out[-1].append(str(parts[0][3]))
        return out

    one = run(1, 0)
    assert one == run(2, 0) == run(3, 0) and run(1, 4) == one[4:]


def test_files_are_drawn_in_proportion_to_a_power_of_their_size():
    files = [range(n) for n in (100, 400, 900)]
    for alpha, shares in ((1.0, (1, 4, 9)), (0.5, (1, 2, 3)), (0.0, (1, 1, 1))):
        count = np.bincount(T.choose_files(files, 20_000, alpha, 3), minlength=3)
        assert count / 20_000 == pytest.approx(np.array(shares) / sum(shares), abs=0.015)


def test_a_pair_is_drawn_from_its_line(two_files):
    file, positives, chosen = two_files[1], set(), set()
    for i in range(25):
        line = read_pair(file, i)
        for group_size in (1, 3):
            for seed in range(6):
                p = T.sample_pair(file, i, group_size, np.random.default_rng(seed))
                first, *rest = p["passages"]
                assert p["query"] == line["query"] and first in line["pos"]
                assert p["known"] == line["pos"] and p["prompt"] == line["prompt"]
                assert len(set(rest)) == len(rest) == min(group_size - 1, i % 5)
                assert set(rest) <= set(line["neg"])
                if i % 3:
                    assert p["scores"] is None
                else:
                    score = dict(zip(line["pos"], line["pos_scores"], strict=True))
                    score |= dict(zip(line["neg"], line["neg_scores"] or [], strict=True))
                    assert p["scores"] == [score[text] for text in p["passages"]]
                positives.add(first[-2:])
                chosen |= set(rest) if i == 4 else set()
    assert positives == {"p0", "p1"} and len(chosen) == 4


def test_batches_without_duplicates(tmp_path):
    # 40 lines, each text about twice in the file: in several queries, as positive and as negative
    rng = np.random.default_rng(0)
    lines = [{"query": f"q{i % 30}", "pos": [f"t{i % 25}"], "neg": [f"t{rng.integers(40)}"]}
             for i in range(40)]  # fmt: skip
    file = open_pairs(write_lines(tmp_path / "x.jsonl", lines))
    choices = np.zeros(20, int)

    def repeated(step, **changes):
        pairs, _ = T.make_batch([file], step, choices, settings(group_size=2, **changes))
        sets = [{p["query"], *p["passages"]} for p in pairs]
        return len(pairs), max(Counter(text for texts in sets for text in texts).values())

    plain = [repeated(step) for step in range(20)]
    once = [repeated(step, no_duplicates=True) for step in range(20)]
    assert max(most for _, most in plain) > 1
    assert once == [(6, 1)] * 20 == [repeated(step, no_duplicates=True) for step in range(20)]


def test_instructions_of_files_and_lines(two_files, toy_tokens):
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    s = settings(instructions=(("ask a: ", "ask b: "), ("say: ",)), template=Template("<", ">"))
    for which in (0, 1):
        pairs, _ = T.make_batch(two_files, 0, np.array([which]), s)
        encoded, n = T.encode_share(pairs, [1, 4, 5], which, tokenizer, s)
        texts = [(pairs[i]["prompt"] or s["instructions"][0][which]) + pairs[i]["query"]
                 for i in (1, 4, 5)]  # fmt: skip
        texts += ["say: " + text for i in (1, 4, 5) for text in pairs[i]["passages"]]
        want = [tokenizer(f"<{text}>")["input_ids"] for text in texts]
        limits = [16] * 3 + [32] * (len(texts) - 3)
        assert n == 3 and any(p["prompt"] for p in pairs)
        for (ids, _), full, limit in zip(encoded, want, limits, strict=True):
            assert ids == (full if len(full) <= limit else full[: limit - 2] + full[-2:])


def test_learning_rates():
    def rate(step, schedule):
        return T.learning_rate_at(step, 100, 1.0, 0.1, schedule, 10)

    assert rate(0, "linear") == 0.1 and rate(9, "cosine") == 1.0
    assert rate(55, "linear") == rate(55, "cosine") == pytest.approx(0.55)
    assert rate(99, "constant") == 1.0 and rate(99, "linear") == pytest.approx(0.11)


# ---- the gradient cache ----


@pytest.fixture(scope="module")
def model_folder(toy_tokens, tmp_path_factory):
    """A ModernBERT of two layers with a masked language modelling head, and a tokenizer."""
    local = dict(layer_kinds=["global", "local"], window=4, out_dropout=0.0)
    return make_model(tmp_path_factory.mktemp("model"), toy_tokens, "modernbert-tiny", **local)


def make_model(folder, toy_tokens, size, **changes):
    torch.manual_seed(0)
    small = dict(n_layer=2, n_head=4, n_embd=32, n_hidden=48, vocab_size=512, max_seq_len=64)
    model = from_scratch(size, **small, **changes)
    for name, p in model.named_parameters():  # larger than at init, so that attention acts
        p.data.normal_(0, 1.0 if name == "embed.weight" else 0.3) if p.dim() == 2 else None
    ids = dict(cls=0, bos=0, sep=1, eos=1, pad=2)
    model.config.hf = {f"{name}_token_id": i for name, i in ids.items()}
    model.save_pretrained(str(folder))
    load_tokenizer(os.path.join(toy_tokens, "tokenizer")).save_pretrained(str(folder))
    return str(folder)


def sentence(rng, n):
    return " ".join(rng.choice(WORDS, n))


@pytest.fixture(scope="module")
def hard_file(tmp_path_factory):
    """60 lines with all there is: 0 to 3 negatives, scores on two of three lines, queries and
    passages that come twice, positives that are negatives elsewhere, prompts."""
    rng = np.random.default_rng(1)
    answers, lines = [sentence(rng, 4 + i % 20) for i in range(25)], []
    for i in range(60):
        line = {"query": answers[i % 20][:12], "pos": [answers[i % 25], answers[(i + 7) % 25]]}
        line["neg"] = [answers[(i * 3 + k) % 25] for k in range(i % 4)]
        if i % 3:
            line["pos_scores"] = (rng.integers(0, 32, 2) / 8).tolist()
            line["neg_scores"] = (rng.integers(-16, 16, i % 4) / 8).tolist()
        lines.append(line | ({"prompt": "tan: "} if i % 5 == 0 else {}))
    return write_lines(tmp_path_factory.mktemp("hard") / "hard.jsonl", lines)


@pytest.fixture
def doubled(model_folder, monkeypatch):
    """A function that makes the embedder in fp64: what the code does in fp32 becomes fp64, too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def make(pooling, dropout):
        model = from_pretrained(model_folder)
        model.config.out_dropout, model.config.attn_dropout = dropout, dropout
        projection = None
        if pooling == "tokens":
            torch.manual_seed(3)
            projection = torch.nn.Linear(32, 8, bias=False)
        if pooling != "splade":
            model.drop_head()
        tokenizer = load_tokenizer(model_folder)
        embedder = Embedder(model, tokenizer, pooling, projection=projection)
        return embedder.double().train()

    return make


def gradients(embedder):
    out = {name: p.grad.clone() for name, p in embedder.named_parameters() if p.grad is not None}
    embedder.zero_grad(set_to_none=True)
    return out


def same_gradients(got, want, tolerance):
    assert got.keys() == want.keys() and len(got) > 10
    for name, x in want.items():
        assert x.norm() > 1e-9, name
        assert (got[name] - x).norm() <= tolerance * x.norm(), name


EVERYTHING = dict(both_directions=True, distill_weight=0.5, false_negative_margin=0.3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pooling", ["mean", "tokens", "splade"])
def test_cached_gradients_are_those_of_one_graph(pooling, dropout, doubled, hard_file):
    """In fp64, against all texts in one graph: the same chunks with the same dropout, one loss
    written with loops, one backward."""
    s = settings(pooling=pooling, normalize=pooling != "splade", **EVERYTHING)
    if pooling == "mean":
        s |= dict(matryoshka_dims=(32, 8))
    if pooling == "splade":
        s |= dict(temperature=50.0)  # dot products of hundreds
    embedder, file = doubled(pooling, dropout), open_pairs(hard_file)
    choices = np.zeros(6, int)
    pairs, _ = T.make_batch([file], 5, choices, s)
    encoded, n, (group, teacher, known), counts = next(
        T.train_batches([file], 5, 6, choices, embedder.tokenizer, s)
    )
    batch = encoded, n, (group, teacher.double(), known), counts
    assert len(known) > 0 and any(p["scores"] for p in pairs)
    results = {}
    for chunk_tokens in (60, 10**9):
        s["chunk_tokens"] = chunk_tokens
        loss, hits = T.cached_step(embedder, batch, 5, s)
        results[chunk_tokens] = gradients(embedder)

        chunks, texts = T.chunks_of(encoded, chunk_tokens), [None] * len(encoded)
        assert len(chunks) > 3 if chunk_tokens == 60 else len(chunks) == 1
        for i, chunk in enumerate(chunks):
            common.seed_step(s["seed"], 5, 0, i)
            out = embedder.embed([encoded[j] for j in chunk])
            out = out[0].split(out[1]) if pooling == "tokens" else out
            for j, x in zip(chunk, out, strict=True):
                texts[j] = x
        want, want_hits = plain_loss(pairs, texts[:n], texts[n:], s, 1)
        want.backward()
        assert loss == pytest.approx(want.item(), rel=1e-10) and hits == want_hits
        same_gradients(results[chunk_tokens], gradients(embedder), 1e-10)
    if dropout == 0.0:
        same_gradients(results[60], results[10**9], 1e-10)
    else:
        with pytest.raises(AssertionError):  # other chunks draw another dropout
            same_gradients(results[60], results[10**9], 1e-3)


# ---- whole runs ----

TINY = """
query_max_length = 16
passage_max_length = 40
batch_size = 12  # divisible by 1, 2 and 3 ranks
group_size = 3
chunk_tokens = 100  # 4 and more chunks a rank
temperature = 0.1
distill_weight = 0.5
distill_temperature = 2.0
max_steps = 6
warmup_steps = 2
learning_rate = 1e-3
log_interval = 1
eval_interval = 3
save_interval = 3
dtype = "fp32"
"""
# keeps what is to be looked at of a rank's run
KEEP = f"""
import os, runpy, sys
import torch
sys.argv[0] = {os.path.join(ROOT, "train_contrastive.py")!r}
g = runpy.run_path(sys.argv[0], run_name="__main__")
torch.save(g["embedder"].state_dict(), os.path.join(g["out_dir"], f"rank{{g['rank']}}.pt"))
"""


@pytest.fixture(scope="module")
def easy_files(tmp_path_factory):
    """Passages that hold the words of their query, 60 to train on and 30 others."""
    rng, folder, out = np.random.default_rng(2), tmp_path_factory.mktemp("easy"), []
    for name, n in (("train", 60), ("val", 30)):
        lines = []
        for i in range(n):
            query = rng.choice(WORDS, 3, replace=False)
            pos = " ".join(rng.permutation([*query, *query, rng.choice(WORDS)]))
            lines.append({"query": " ".join(query), "pos": [pos], "neg": [sentence(rng, 7)]})
            if i % 5 == 0:
                lines[-1]["pos"].append(" ".join(query[::-1]))
        out.append(write_lines(folder / f"{name}.jsonl", lines))
    return out


@pytest.fixture(scope="module")
def tiny(model_folder, hard_file, tmp_path_factory):
    """A config file for the smallest run."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    more = f"init_from = {model_folder!r}\ndata = ({hard_file!r},)\neval_data = {hard_file!r}\n"
    path.write_text(TINY + more)
    return str(path)


SCRIPT = "train_contrastive.py"
arguments, run = partial(harness.arguments, SCRIPT), partial(harness.run, SCRIPT)


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """The run on one rank that others are compared with."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    run(tiny, out_dir)
    return out_dir


def test_a_run_learns_and_its_folder_gives_the_same_vectors(tiny, easy_files, tmp_path):
    from sentence_transformers import SentenceTransformer

    train, val = easy_files
    keys = [f"--data=({train!r},)", f"--eval_data={val}", "--max_steps=40", "--eval_interval=1",
            "--query_instruction=('tan: ',)", "--passage_instruction=('mos: ',)"]  # fmt: skip
    embedder = run(tiny, tmp_path, *keys, "--learning_rate=3e-3").embedder
    curve, right = losses(tmp_path), losses(tmp_path, "eval_acc")
    assert list(curve) == list(range(1, 41)) and list(right) == list(range(1, 41))
    curve = list(curve.values())
    assert sum(curve[-5:]) < 0.6 * sum(curve[:5]) and right[40] > right[1] + 0.2

    file = open_pairs(val)
    pairs = [read_pair(file, i) for i in range(30)]
    texts = list(dict.fromkeys(text for p in pairs for text in p["pos"] + p["neg"]))
    asked = [p["query"] for p in pairs]
    embedder.eval()
    queries, passages = embedder.encode(asked, "tan: "), embedder.encode(texts, "mos: ")
    loaded = Embedder.load(str(tmp_path / "step40"), dtype="fp32")
    assert loaded.prompts == {"query": "tan: ", "document": "mos: "}
    assert np.array_equal(loaded.encode(asked, loaded.prompts["query"]), queries)
    theirs = SentenceTransformer(str(tmp_path / "step40"), device="cpu")
    for ours, there in ((queries, theirs.encode(asked, prompt_name="query")),
                        (passages, theirs.encode(texts, prompt_name="document"))):  # fmt: skip
        assert np.abs(ours - there).max() < 1e-5

    # what evaluation printed, by loops
    found = dict.fromkeys(("loss", "acc", "mrr", "ndcg"), 0.0)
    for pair, q in zip(pairs, queries, strict=True):
        scores = {text: float(q @ d) for text, d in zip(texts, passages, strict=True)}
        first, wrong = pair["pos"][0], [t for t in texts if t not in pair["pos"]]
        weights = [np.exp((scores[t] - scores[first]) / 0.1) for t in [first, *wrong]]
        found["loss"] += np.log(sum(weights))
        top = sorted(texts, key=scores.get, reverse=True)[:10]
        hits = [i for i, t in enumerate(top) if t in pair["pos"]]
        found["acc"] += 0 in hits
        found["mrr"] += 1 / (hits[0] + 1) if hits else 0
        ideal = sum(1 / np.log2(i + 2) for i in range(len(pair["pos"])))
        found["ndcg"] += sum(1 / np.log2(i + 2) for i in hits) / ideal
    for name, total in found.items():
        assert losses(tmp_path, f"eval_{name}")[40] == pytest.approx(total / 30, rel=1e-4), name


def test_the_next_stage_sees_the_same_ids_and_its_own_dropout(tiny, tmp_path):
    """The saved tokenizer has the suffix for sentence-transformers: training adds it once, too."""
    keys = ["--suffix= ris[SEP]", "--prefix=ta: ", "--attn_dropout=0.3", "--max_steps=1"]
    first = run(tiny, tmp_path / "a", *keys).embedder
    second = run(tiny, tmp_path / "b", *keys[:2], "--max_steps=1", f"--init_from={tmp_path / 'a'}")
    texts = ["tan mos", "", "ris " * 40]
    ids = [e.tokenize(texts) for e in (first, second.embedder, Embedder.load(str(tmp_path / "b")))]
    assert ids[0] == ids[1] == ids[2]
    assert first.model.config.attn_dropout == 0.3 and second.c.attn_dropout == 0.0


def test_a_positive_that_is_listed_twice_counts_once(tiny, tmp_path):
    evals = []
    for name, pos in (("once", ["tan mo", "ris"]), ("twice", ["tan mo", "ris", "tan mo"])):
        lines = [{"query": "tan", "pos": pos}, {"query": "su", "pos": ["suma", "ke"]}]
        file = write_lines(tmp_path / f"{name}.jsonl", lines)
        run(tiny, tmp_path / name, f"--eval_data={file}", "--max_steps=1", "--eval_interval=1")
        evals.append([losses(tmp_path / name, f"eval_{x}") for x in ("loss", "ndcg")])
    assert evals[0] == evals[1] and math.isfinite(evals[0][0][1])


@pytest.mark.parametrize("pooling", ["tokens", "splade"])
def test_many_vectors_and_sparse_ones_are_saved(pooling, tiny, unbroken, tmp_path):
    keys = [f"--pooling={pooling}", "--projection_dim=8", "--max_steps=4", "--save_interval=2"]
    keys += ["--temperature=20", "--normalize=False"] if pooling == "splade" else []
    embedder = run(tiny, tmp_path / "whole", *keys).embedder.eval()
    texts = ["ta", "tan tama mos", "", "ris sus kes tan " * 4]
    ours = embedder.encode(texts)
    loaded = Embedder.load(str(tmp_path / "whole" / "step4"), dtype="fp32")
    for a, b in zip(loaded.encode(texts), ours, strict=True):
        assert np.array_equal(a, b) and a.shape[-1] == (8 if pooling == "tokens" else 512)
    run(tiny, tmp_path / "again", *keys, "--max_steps=2", "--schedule=constant")
    run(tiny, tmp_path / "again", *keys, "--schedule=constant", "--resume=True")
    run(tiny, tmp_path / "constant", *keys, "--schedule=constant")
    assert losses(tmp_path / "again") == losses(tmp_path / "constant")
    assert saved(tmp_path / "again", 4) == saved(tmp_path / "constant", 4)


def test_chunks_change_nothing(tiny, unbroken, tmp_path):
    run(tiny, tmp_path, "--chunk_tokens=100000")
    for column in ("loss", "gnorm", "eval_loss"):
        got, want = losses(tmp_path, column), losses(unbroken, column)
        assert got == pytest.approx(want, rel=1e-5), column
    dropped = run(tiny, tmp_path / "b", "--attn_dropout=0.2", "--max_steps=2")
    assert dropped.c.attn_dropout == 0.2
    assert losses(tmp_path / "b")[1] != pytest.approx(losses(unbroken)[1], rel=1e-3)


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path, capsys):
    more = ["--max_steps=40", "--attn_dropout=0.2"]
    run(tiny, tmp_path / "whole", *more)
    process = start(1, SCRIPT, tiny, tmp_path / "broken", *more)
    kill_at_step(process, tmp_path / "broken", random.randint(4, 24))
    capsys.readouterr()
    run(tiny, tmp_path / "broken", *more, "--resume=True")
    step = int(re.search(r"resumed .*, after step (\d+)", capsys.readouterr().out)[1])
    assert 3 <= step < 40
    for column in ("loss", "gnorm", "eval_loss", "eval_ndcg"):
        want = losses(tmp_path / "whole", column)
        assert losses(tmp_path / "broken", column) == want and 39 in want
    assert saved(tmp_path / "broken", 40) == saved(tmp_path / "whole", 40)


def test_the_best_checkpoint_is_kept(tiny, easy_files, tmp_path):
    # 20 good steps, then some that spoil the weights
    keys = [f"--data=({easy_files[0]!r},)", f"--eval_data={easy_files[1]}", "--keep_best=True"]
    keys += ["--schedule=constant", "--save_interval=100"]
    run(tiny, tmp_path, *keys, "--max_steps=20", "--eval_interval=4", "--learning_rate=3e-3")
    keys += ["--max_steps=24", "--eval_interval=1", "--learning_rate=1.0"]
    run(tiny, tmp_path, *keys, "--resume=True")
    evals = losses(tmp_path, "eval_loss")
    best = min(evals, key=evals.get)
    assert list(evals) == [4, 8, 12, 16, 20, 21, 22, 23, 24] and best <= 20
    assert {p.name for p in tmp_path.glob("step*")} == {"step24", f"step{best}"}


def test_lora_resumed_is_bit_equal(tiny, model_folder, tmp_path):
    """An adapter, and a second one on top of it."""
    keys = ["--lora_rank=4", "--train_also=norm", "--schedule=constant", "--attn_dropout=0.2"]
    keys += ["--suffix= ke", "--pool_instruction=False"]
    for first, second in (("", ""), ("whole", "2")):
        if first:
            keys.append(f"--adapters=({str(tmp_path / first / 'step6' / 'adapter')!r},)")
        whole, half = tmp_path / f"whole{second}", tmp_path / f"half{second}"
        embedder = run(tiny, whole, *keys).embedder.eval()
        run(tiny, half, *keys, "--max_steps=3")
        run(tiny, half, *keys, "--resume=True")
        for column in ("loss", "gnorm", "eval_loss"):
            assert losses(half, column) == losses(whole, column) and losses(half)
        assert saved(half, 6) == saved(whole, 6)
        a, b = (load_file(x / "step6/adapter/adapter_model.safetensors") for x in (half, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        ours = embedder.encode(["tan mos", "ris"], "su ")
        for folder in ("step6", "step6/adapter"):  # merged, or the chain base + adapters
            loaded = Embedder.load(str(whole / folder), dtype="fp32")
            assert loaded.template.suffix == " ke" and not loaded.pool_instruction
            assert np.abs(loaded.encode(["tan mos", "ris"], "su ") - ours).max() < 1e-5
    assert losses(tmp_path / "whole2") != losses(tmp_path / "whole")


def equal_runs(got, want):
    """Losses to 1e-5, weights to what Adam makes of that."""
    for column, tolerance in dict(loss=1e-5, gnorm=1e-4, eval_loss=1e-4, acc=1e-9).items():
        expected = losses(want, column)
        assert expected and losses(got, column) == pytest.approx(expected, rel=tolerance), got
    a, b = (from_pretrained(str(folder / "step6")).state_dict() for folder in (got, want))
    for name in b:
        assert (a[name] - b[name]).norm() <= 1e-3 * b[name].norm(), (got, name)


def test_two_ranks_equal_one_and_each_other(tiny, tmp_path):
    """With hard negatives, known positives, distillation and chunks; the losses and weights of one
    rank, and bit by bit those of the other rank."""
    (tmp_path / "keep.py").write_text(KEEP)
    everything = ["--both_directions=True", "--false_negative_margin=0.3"]
    kinds = {
        "ddp": everything,
        "fsdp": [*everything, "--fsdp=True"],
        "tokens": ["--pooling=tokens", "--projection_dim=8"],
        "splade": ["--pooling=splade", "--normalize=False", "--temperature=20"],
        "lora": ["--lora_rank=4", "--lora_dropout=0", "--chunk_tokens=100000", "--fsdp=True"],
    }
    argvs = []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *flags))
        if "--fsdp=True" not in flags:
            argvs[-1][0] = str(tmp_path / "keep.py")
        if kind != "fsdp":
            run(tiny, tmp_path / f"{kind}-one", *flags, "--fsdp=False")
    more = ["--schedule=constant", "--attn_dropout=0.2", "--fsdp=True"]
    half = arguments(tiny, tmp_path / "half", *more)
    argvs += [arguments(tiny, tmp_path / "whole", *more), half + ["--max_steps=3"]]
    argvs += [half + ["--resume=True"]]
    argvs += [arguments(tiny, tmp_path / "apart", "--negatives_cross_device=False")]
    run_ranks(2, argvs)
    for kind in kinds:
        equal_runs(tmp_path / kind, tmp_path / ("ddp-one" if kind == "fsdp" else f"{kind}-one"))
    for kind in ("ddp", "tokens", "splade"):
        one, other = (torch.load(tmp_path / kind / f"rank{i}.pt") for i in range(2))
        assert one and all(torch.equal(one[name], other[name]) for name in one), kind
    for column in ("loss", "gnorm", "eval_loss"):
        assert losses(tmp_path / "half", column) == losses(tmp_path / "whole", column)
    # half of the candidates: an easier choice
    assert losses(tmp_path / "apart")[1] < losses(tmp_path / "lora")[1] - 0.2


def test_three_ranks_equal_one_and_resumed_are_bit_equal(tiny, toy_tokens, tmp_path):
    # Qwen's gradients arrive in another order than its parameters are listed: DDP reorders its
    # buckets after the first backward
    folder = make_model(tmp_path / "qwen3", toy_tokens, "qwen3-tiny", n_kv_head=2)
    more = [f"--init_from={folder}", "--pooling=last", "--schedule=constant"]
    run(tiny, tmp_path / "one", *more)
    half = arguments(tiny, tmp_path / "half", *more, "--attn_dropout=0.2")
    argvs = [arguments(tiny, tmp_path / "three", *more)]
    argvs += [arguments(tiny, tmp_path / "whole", *more, "--attn_dropout=0.2")]
    run_ranks(3, [*argvs, half + ["--max_steps=3"], half + ["--resume=True"]])
    equal_runs(tmp_path / "three", tmp_path / "one")
    for column in ("loss", "gnorm", "eval_loss"):
        assert losses(tmp_path / "half", column) == losses(tmp_path / "whole", column)
    assert saved(tmp_path / "half", 6) == saved(tmp_path / "whole", 6)


def test_sigterm_saves_and_exits(tiny, unbroken, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(common, "catch_sigterm", lambda: lambda: calls.append(1) or len(calls) > 4)
    run(tiny, tmp_path)
    assert f"saved {tmp_path}/step4" in capsys.readouterr().out and max(losses(tmp_path)) == 4
    monkeypatch.undo()
    run(tiny, tmp_path, "--resume=True")
    assert losses(tmp_path) == losses(unbroken) and saved(tmp_path, 6) == saved(unbroken, 6)


def test_show_batch_and_dry_run(tiny, unbroken, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, "--show_batch=True", "--pool_instruction=False")
    shown = capsys.readouterr().out
    assert "--- query 0:" in shown and re.search(r"\[CLS\]tan: ?\x1b\[7m", shown)
    before = sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("*"))
    run(tiny, unbroken, "--dry_run=True", "--eval_interval=0")
    out = capsys.readouterr().out
    assert re.search(r"dry run: [\d.]+ s/step, [\d.,]+ queries/s, \d+ chunks, peak memory", out)
    assert sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("*")) == before


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path, capsys):
    keys = ["--learning_rate=1e30", "--warmup_steps=0", "--save_interval=1", "--max_steps=20"]
    with pytest.raises(SystemExit, match="4th such step"):
        run(tiny, tmp_path, *keys, "--eval_interval=0")
    assert "step 2: loss nan" in capsys.readouterr().out


# ---- bad input ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "pos": []}', "line 3: field 'pos' is empty"),
        ('{"query": "a"}', "line 3: field 'pos' is missing"),
        ('{"query": "a", "pos": "b"}', "line 3: field 'pos' is 'b' (expected list of str)"),
        ('{"query": 5, "pos": ["b"]}', "line 3: field 'query' is 5 (expected str)"),
        ('{"pos": ["b"]}', "line 3: field 'query' is missing"),
        ('{"query": "a", "pos": ["b"], "neg": [null]}', "line 3: field 'neg' is [None]"),
        ('{"query": "a", "pos": ["b"], "pos_scores": [1, 2]}', "'pos_scores' has 2 numbers for 1"),
        ('{"query": "a", "pos": ["b"], "neg_scores": ["x"]}', "line 3: field 'neg_scores'"),
        ('{"query": "a", "pos": ["b"], "prompt": 1}', "line 3: field 'prompt' is 1"),
        ('{"anchor": "a", "positive": ["b"]}', "line 3: field 'positive' is ['b']"),
        ('{"positive": "b"}', "line 3: field 'query' is missing"),
        ('{"text": null}', "line 3: field 'text' is None"),
        ('{"query": "a", "pos": ["b"]', "line 3: not JSON"),
        ('["a", "b"]', "line 3: a list, expected an object"),
    ],
)
def test_broken_lines_name_file_line_and_field(line, message, tmp_path):
    good = '{"query": "a", "pos": ["b"]}\n'
    path = tmp_path / "x.jsonl"
    path.write_text(f"{good}\n{line}\n{good}")
    file = open_pairs(str(path))
    assert len(file) == 3 and read_pair(file, 0)["query"] == read_pair(file, 2)["query"] == "a"
    with pytest.raises(ValueError) as error:
        read_pair(file, 1)
    assert f"{path} " in str(error.value) and message in str(error.value)


def test_three_forms_of_lines(tmp_path):
    lines = [{"query": "a", "pos": ["b", "c"], "neg": None, "pos_scores": [1, 2.5], "prompt": None},
             {"anchor": "a", "positive": "b", "negative": "c"}, {"query": "a", "positive": "b"},
             {"text": "a\u2028b"}]  # fmt: skip
    file = open_pairs(write_lines(tmp_path / "x.jsonl", lines))
    empty = dict(neg=[], pos_scores=None, neg_scores=None, prompt=None)
    assert [read_pair(file, i) for i in range(4)] == [
        empty | {"query": "a", "pos": ["b", "c"], "pos_scores": [1, 2.5]},
        empty | {"query": "a", "pos": ["b"], "neg": ["c"]},
        empty | {"query": "a", "pos": ["b"]},
        empty | {"query": "a\u2028b", "pos": ["a\u2028b"]},
    ]


def test_a_broken_line_stops_the_run(tiny, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"query": "a", "pos": ["b"]}\n' * 20 + '{"query": "a", "pos": []}\n')
    with pytest.raises(ValueError, match="x.jsonl line 21: field 'pos' is empty"):
        run(tiny, tmp_path / "out", f"--data=({str(path)!r},)")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedule=cosin"], "schedule='cosin'"),
        (["--pooling=max"], "pooling 'max': expected one of"),
        (["--group_size=0"], "group_size=0"),
        (["--matryoshka_dims=(64,16)"], "matryoshka_dims=(64, 16): the embedding has 32"),
        (["--query_instruction=('a','b')"], "query_instruction: 2 texts for 1 data files"),
        (["--data=('nowhere.jsonl',)"], "nowhere.jsonl"),
        (["--init_from=nowhere/at/all"], "nowhere/at/all"),
        (["--lora_rank=2", "--lora_targets=q_prj"], "q_prj"),
        (["--pooling=tokens", "--lora_rank=2"], "without LoRA"),
        (["--attention_backend=varlen"], "cannot run"),
        (["--temprature=1"], "did you mean 'temperature'"),
        (["--dtype=fp16"], "fp16"),
        (["--tracker=mlflow"], "tracker"),
    ],
)
def test_bad_settings_say_what_is_expected(tiny, tmp_path, more, message):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        run(tiny, tmp_path, *more)
    assert message in str(error.value)


def test_a_run_is_not_overwritten(tiny, unbroken):
    with pytest.raises(SystemExit, match="--resume=True"):
        run(tiny, unbroken)
