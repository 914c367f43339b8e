"""train_contrastive.py: its losses against loops, the gradient cache, and tiny runs of the script,
whole, killed and resumed, on 1-3 ranks."""

import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModel, PreTrainedTokenizerFast

import common
import grad_cache
import harness
import lora
import pairs as P
import train_contrastive as T
from data import open_pairs, read_pair
from embedder import Embedder
from formats import read_json, write_json
from formats.huggingface import from_pretrained, save_pretrained
from harness import ROOT, WORDS, assert_equal_bits, losses, run_ranks, saved, write_jsonl
from model import from_scratch
from pairs import choose_files
from tokenizer import Template, load_tokenizer


def settings(**changes):
    """The script's defaults, and what its main block adds to them, for one rank on the CPU."""
    keys = {k: v for k, v in vars(T).items() if type(v) in common.KINDS.values()}
    keys |= dict(
        batch_size=6, group_size=3, query_max_length=16, passage_max_length=32, temperature=0.5,
        query_flops=0.3, passage_flops=0.2, device_batch_tokens=10**9, seed=7, rank=0,
        max_steps=30, stop_step=9, world_size=1, template=Template(), autocast=nullcontext,
        device=torch.device("cpu"),
    )  # fmt: skip
    return SimpleNamespace(**keys | changes)


# ---- losses, against loops over numbers ----
def plain_similarity(q, d):
    """q and d [C], or lists of tokens [L, C] as they are without padding."""
    if q.dim() == 1:
        return (q * d).sum()
    return sum((max((x * y).sum() for y in d) for x in q if len(d)), q.new_tensor(0.0))


def plain_contrast(scores, positive, excluded, s, hinged, margin=None):
    """scores: one query's list of scores -> (its loss, whether the positive is first)."""
    right, tau = scores[positive], s.temperature
    wrong = [x for n, x in enumerate(scores) if n != positive and n not in excluded]
    if margin is not None:
        wrong = [x for x in wrong if x.item() <= right.item() + margin]
    loss = -torch.log(torch.exp(right / tau) / sum(torch.exp(x / tau) for x in [right, *wrong]))
    if hinged:
        loss = sum((torch.relu(tau + x - right) for x in wrong), 0 * right)
    return loss, all(x <= right for x in wrong)


def hinge(scores, positive, s):
    """Another loss, in the place of `contrast`."""
    excess = (s.temperature + scores - scores.gather(1, positive[:, None])).relu()
    return excess.sum() - len(scores) * s.temperature  # the positive's own


def plain_kl(scores, teacher, tau, teacher_tau):
    """KL(teacher || student) of one group of scores."""
    student, p = [torch.exp(x / tau) for x in scores], [math.exp(x / teacher_tau) for x in teacher]
    p = [x / sum(p) for x in p]
    return sum(y * (math.log(y) - torch.log(x / sum(student))) for x, y in zip(student, p))


def plain_loss(pairs, queries, passages, s, world_size, hinged=False):
    """The loss of a batch from its texts and their vectors, and the hits."""
    owner = [b for b, p in enumerate(pairs) for _ in p["passages"]]
    texts = [text for p in pairs for text in p["passages"]]
    first = [owner.index(b) for b in range(len(pairs))]
    apart = 1 if s.negatives_cross_device else world_size  # queries that share their candidates
    rank = [b * apart // len(pairs) for b in range(len(pairs))]
    right = [  # all texts that are known to answer query b
        {text for other in pairs if other["query"] == p["query"] for text in other["known"]}
        for p in pairs]  # fmt: skip

    total, hits = 0.0, 0
    widths = s.matryoshka_dims or (queries[0].size(-1),)
    for width in widths:
        q, d = ([x[..., :width] for x in y] for y in (queries, passages))
        if s.matryoshka_dims and s.normalize:
            q, d = ([x / x.norm(dim=-1, keepdim=True) for x in y] for y in (q, d))
        for b, p in enumerate(pairs):
            scores = [plain_similarity(q[b], x) for x in d]
            out = {n for n, t in enumerate(texts) if t in right[b] or rank[owner[n]] != rank[b]}
            loss, hit = plain_contrast(scores, first[b], out, s, hinged, s.false_negative_margin)
            hits += int(hit) if width == max(widths) else 0
            if s.both_directions:
                back = [plain_similarity(d[first[b]], x) for x in q]
                out = {a for a, t in enumerate(right) if texts[first[b]] in t or rank[a] != rank[b]}
                loss = (loss + plain_contrast(back, b, out, s, hinged)[0]) / 2
            loss = s.contrast_weight * loss
            if s.distill_weight and p["scores"]:
                group = [scores[n] for n in range(len(texts)) if owner[n] == b]
                kl = plain_kl(group, p["scores"], s.temperature, s.distill_temperature)
                loss = loss + s.distill_weight * kl
            total = total + loss / len(widths) / len(pairs)
    if s.pooling == "splade":
        ramp = (5 / (s.flops_warmup_ratio * s.max_steps)) ** 2  # in step 5
        for weight, x in ((s.query_flops, queries), (s.passage_flops, passages)):
            total = total + ramp * weight * sum(v**2 for v in sum(map(abs, x)) / len(x))
    return total, hits


def pair(query, passages, known=(), scores=None):
    return {"query": query, "known": [passages[0], *known], "passages": passages, "scores": scores}


# Groups of 1 to 3, with and without scores; a query twice with other positives (a); its other
# positive is a negative elsewhere (p0b in group 2); one passage for two queries (p3); a negative
# that is the text of the positive (group 5).
PAIRS = [pair("a", ["p0", "n0", "n1"], ["p0b"], [3.0, 1.0, -0.5]), pair("b", ["p1"]),
         pair("c", ["p2", "p0b"], scores=[0.5, 0.75]), pair("a", ["p0c", "n1"]),
         pair("d", ["p3", "p1", "n2"], ["p2"]),
         pair("e", ["p3", "p3"], scores=[2.0, 1.0])]  # fmt: skip


def vectors(kind, n, seed):
    """n random vectors [8], or lists of 1-5 token vectors, in fp64."""
    rng = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=rng, dtype=torch.float64)
    if kind == "dense":
        return [draw(8) for _ in range(n)]
    return [F.normalize(draw(1 + (i * 7 + seed) % 5, 8), dim=-1) for i in range(n)]


stacked = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)  # of [8] and of [L, 8]


def test_may_be_negative_equals_loops():
    """Of queries among passages and of their positives among queries, from the same pairs."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        n_queries, n_passages = rng.integers(1, 8), rng.integers(8, 15)
        positive = torch.tensor(np.sort(rng.choice(n_passages, n_queries, replace=False)))
        known = torch.tensor(rng.integers(0, (n_queries, n_passages), (rng.integers(12), 2)))
        queries = torch.arange(*np.sort(rng.choice(n_queries + 1, 2, replace=False)))
        for rows, pairs, n in ((queries, known, n_passages),
                               (positive[queries], known.flip(1), n_queries)):  # fmt: skip
            first, last = np.sort(rng.integers(0, n + 1, 2))
            got = P.may_be_negative(pairs, rows, slice(first, last), n)
            want = [[first <= i < last and [row, i] not in pairs.tolist() for i in range(n)]
                    for row in rows.tolist()]  # fmt: skip
            assert got.tolist() == want


LOSSES = {"plain": {},
          **{f"margin {m}": dict(false_negative_margin=m) for m in (0.0, 0.2, 0.4, -0.3)},
          "both": dict(both_directions=True),
          "distill": dict(distill_weight=0.7, distill_temperature=0.4),
          "distill alone": dict(distill_weight=0.7, contrast_weight=0.0),
          "matryoshka": dict(matryoshka_dims=(2, 8, 1), distill_weight=0.7, both_directions=True),
          "unnormalised": dict(matryoshka_dims=(4, 8), normalize=False),
          "splade": dict(pooling="splade"),
          "apart": dict(negatives_cross_device=False, both_directions=True, distill_weight=0.5),
          "hinge": dict(both_directions=True),  # another loss, in the place of `contrast`
}
CASES = [*(("dense", name) for name in LOSSES), ("tokens", "plain"), ("tokens", "apart")]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_loss_and_its_gradients_equal_loops(kind, name, world_size, monkeypatch):
    """The sums over the ranks, in one block of queries and in several."""
    monkeypatch.setattr(T, "contrast", hinge if name == "hinge" else T.contrast)
    shares = np.split(np.arange(6), world_size)
    counts = [sum(len(PAIRS[b]["passages"]) for b in share) for share in shares]
    group, teacher, known = P.layout(PAIRS)
    cases = [(0, 5), (3, 0), (3, 5), (0, 6), (5, 12), (5, 8), (4, 4)]  # see PAIRS
    assert all(list(case) in known.tolist() for case in cases)
    queries, passages = vectors(kind, 6, 1), vectors(kind, 13, 2)
    if kind == "tokens":  # an empty text beside others
        queries[0], passages[3], queries[2] = queries[0][:0], passages[3][:0], queries[2][:1]
        passages[5] = -queries[2]  # a maximum below 0, which padding must not win
    for x in queries + passages:
        x.requires_grad_().grad = torch.zeros_like(x)
    s = settings(**LOSSES[name])
    want, want_hits = plain_loss(PAIRS, queries, passages, s, world_size, name == "hinge")
    want.backward()
    for block in (6, 1, 2):  # queries
        monkeypatch.setattr(torch.Tensor, "split", lambda x, _, n=block: [
            x[i : i + n] for i in range(0, len(x), n)])  # fmt: skip
        whole = [stacked([x.detach() for x in y]).requires_grad_() for y in (queries, passages)]
        loss, hits = 0.0, 0
        for rank, share in enumerate(shares):
            first = sum(counts[:rank])
            texts = [*queries[share[0] : share[-1] + 1], *passages[first : first + counts[rank]]]
            encoded = [(None, (0, len(x))) for x in texts]
            batch = T.Batch(encoded, [], len(share), counts, group, teacher.double(), known)
            gathered = iter(whole)  # what all_gather gives, with the gradient of all ranks
            monkeypatch.setattr(T, "gather_rows", lambda x, _, g=gathered: next(g) + 0 * x.sum())
            s = settings(rank=rank, world_size=world_size, **LOSSES[name])
            part = T.loss_and_grad(stacked(texts), batch, 5, s)
            loss, hits = loss + part[0], hits + part[1]
        assert loss == pytest.approx(want.item(), rel=1e-12) and hits == want_hits
        for got, texts in zip(whole, (queries, passages), strict=True):
            grads = stacked([x.grad for x in texts])
            assert grads.abs().max() > 1e-3
            rows = [i for i, x in enumerate(texts) if len(x)]  # an empty text has no vector
            torch.testing.assert_close(got.grad[rows], grads[rows], atol=1e-12, rtol=1e-9)


# ---- batches ----
@pytest.fixture(scope="module")
def easy_files(tmp_path_factory):
    """Passages that hold the words of their query, 60 to train on and 40 others; some of them are
    listed twice."""
    rng, lines = np.random.default_rng(2), []
    for i in range(100):
        query = rng.choice(WORDS, 3, replace=False)
        pos = " ".join(rng.permutation([*query, *query, rng.choice(WORDS)]))
        more = [" ".join(query[::-1])] * (i % 5 == 0) + [pos] * (i % 3 == 0)
        neg = " ".join(rng.choice(WORDS, 7))
        lines.append({"query": " ".join(query), "pos": [pos, *more], "neg": [neg]})
    folder, parts = tmp_path_factory.mktemp("easy"), {"train": lines[:60], "val": lines[60:]}
    return [write_jsonl(folder / f"{name}.jsonl", part) for name, part in parts.items()]


@pytest.fixture(scope="module")
def hard_file(tmp_path_factory):
    """60 lines with all there is: 0 to 3 negatives, scores on two of three lines, queries and
    passages that come twice, positives that are negatives elsewhere, prompts."""
    rng = np.random.default_rng(1)
    answers, lines = [" ".join(rng.choice(WORDS, 4 + i % 20)) for i in range(25)], []
    for i in range(60):
        line = {"query": answers[i % 20][:12], "pos": [answers[i % 25], answers[(i + 7) % 25]]}
        line["neg"] = [answers[(i * 3 + k) % 25] for k in range(i % 4)]
        if i % 3:
            line["pos_scores"] = (rng.integers(0, 32, 2) / 8).tolist()
            line["neg_scores"] = (rng.integers(-16, 16, i % 4) / 8).tolist()
        lines.append(line | ({"prompt": "tan: "} if i % 5 == 0 else {}))
    return write_jsonl(tmp_path_factory.mktemp("hard") / "hard.jsonl", lines)


def test_ranks_and_resumed_runs_see_the_batches_of_one_rank(easy_files, hard_file, toy_tokens):
    files = [open_pairs(easy_files[1]), open_pairs(hard_file)]  # 40 and 60 lines
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    sizes = [range(n) for n in (100, 400, 900)]  # files are drawn by a power of their size
    for alpha, shares in ((1.0, (1, 4, 9)), (0.5, (1, 2, 3)), (0.0, (1, 1, 1))):
        count = np.bincount(choose_files(sizes, 20_000, alpha, 3), minlength=3)
        assert count / 20_000 == pytest.approx(np.array(shares) / sum(shares), abs=0.015)
    choices = choose_files(files, 19, 1.0, 7)
    assert (choose_files(files, 40, 1.0, 7)[:19] == choices).all()  # longer runs begin alike

    def run(world_size, first, seed=7):
        """Of each step the queries of all ranks, their passages, and the layout."""
        ranks, n, steps = [], 6 // world_size, []
        for rank in range(world_size):
            s = settings(rank=rank, world_size=world_size, seed=seed, stop_step=19)
            ranks.append(T.train_batches(files, first, choices, tokenizer, s))
        for batches in zip(*ranks, strict=True):
            assert all(len(b.encoded) == n + b.n_passages[r] for r, b in enumerate(batches))
            (layout,) = {str([x.tolist() for x in (b.group, b.teacher, b.known)]) for b in batches}
            parts = [b.encoded[:n] for b in batches], [b.encoded[n:] for b in batches]
            steps.append([sum(part, []) for part in parts] + [layout])
        return steps

    one = run(1, 0)
    assert len(one) == 19 and one == run(2, 0) == run(3, 0) and run(1, 4) == one[4:]
    assert one != run(1, 0, seed=8)


def test_a_pair_is_drawn_from_its_line(hard_file):
    file, positives, chosen = open_pairs(hard_file), set(), set()
    for i, group_size, seed in itertools.product(range(60), (1, 3), range(6)):
        line = read_pair(file, i)
        p = P.sample_pair(file, i, group_size, np.random.default_rng(seed))
        first, *rest = p["passages"]
        assert (p["query"], p["known"], p["prompt"]) == (line["query"], line["pos"], line["prompt"])
        assert len(set(rest)) == len(rest) == min(group_size - 1, i % 4)
        assert first in line["pos"] and set(rest) <= set(line["neg"])
        pos, neg = (dict(zip(line[key], line[f"{key}_scores"] or [])) for key in ("pos", "neg"))
        assert p["scores"] == ([pos[first], *map(neg.get, rest)] if i % 3 else None)
        positives.add(line["pos"].index(first))
        chosen |= set(rest) if i == 3 else set()
    assert positives == {0, 1} and len(chosen) == 3


def test_crops_of_a_text(tmp_path):
    """Two runs of words of a {"text"} line, drawn anew in each epoch; other lines stay whole."""
    words = [f"w{i}" for i in range(20)]
    lines = [{"text": " \n".join(words)}, {"text": "w"}, {"query": "a b c d", "pos": ["e f g h"]}]
    file, seen = open_pairs(write_jsonl(tmp_path / "x.jsonl", lines)), Counter()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        p = P.sample_pair(file, 0, 2, rng, crop=0.4)
        assert p["known"] == p["passages"] and p["scores"] is None
        for text in (p["query"], *p["passages"]):
            first = words.index(text.split()[0])
            assert text == " \n".join(words[first : first + 8])
            seen[first] += 1
    assert sorted(seen) == list(range(13)) and min(seen.values()) > 30  # 800 / 13 = 62
    assert P.sample_pair(file, 1, 2, rng, crop=0.4)["passages"] == ["w"]
    assert P.sample_pair(file, 2, 2, rng, crop=0.4)["query"] == "a b c d"
    short = P.sample_pair(file, 0, 2, rng, crop=0.01)
    assert len(short["query"].split()) == 1
    assert P.sample_pair(file, 0, 2, rng, crop=1.0) == P.sample_pair(file, 0, 2, rng)
    s = settings(batch_size=1, group_size=2, crop=0.4)
    [one], [two] = (P.pairs_of_step([file], i, np.zeros(9, int), s)[0] for i in (0, 3))
    assert one != two


def test_batches_without_duplicates(tmp_path):
    # 40 lines, each text about twice in the file: in several queries, as positive and as negative
    rng = np.random.default_rng(0)
    lines = [{"query": f"q{i % 30}", "pos": [f"t{i % 25}"], "neg": [f"t{rng.integers(40)}"]}
             for i in range(40)]  # fmt: skip
    files = [open_pairs(write_jsonl(tmp_path / "x.jsonl", lines))]
    for no_duplicates in (False, True):
        s, repeated = settings(group_size=2, no_duplicates=no_duplicates), []
        for step in range(20):
            pairs, again = (P.pairs_of_step(files, step, np.zeros(20, int), s)[0] for _ in "12")
            assert pairs == again and len(pairs) == 6
            texts = [text for p in pairs for text in {p["query"], *p["passages"]}]
            repeated.append(max(Counter(texts).values()))
        assert (max(repeated) == 1) == no_duplicates


def test_instructions_of_files_and_lines(easy_files, hard_file, toy_tokens):
    files = [open_pairs(easy_files[1]), open_pairs(hard_file)]
    tokenizer = load_tokenizer(os.path.join(toy_tokens, "tokenizer"))
    s = settings(query_instruction=("ask a: ", "ask b: "), passage_instruction=("say: ",),
                 template=Template("<", ">"))  # fmt: skip
    for which, s.ignore_prompts in ((0, False), (1, False), (1, True)):
        pairs, _ = P.pairs_of_step(files, 0, np.array([which]), s)
        encoded = P.encode_pairs(pairs, which, tokenizer, s)
        own = [None if s.ignore_prompts else p["prompt"] for p in pairs]
        texts = [(o or s.query_instruction[which]) + p["query"] for o, p in zip(own, pairs)]
        texts += ["say: " + text for p in pairs for text in p["passages"]]
        want = [tokenizer(f"<{text}>")["input_ids"] for text in texts]
        assert any(p["prompt"] for p in pairs) == which and len(encoded) == len(want)
        for (ids, _), full, limit in zip(encoded, want, [16] * 6 + [32] * 99):
            assert ids == (full if len(full) <= limit else full[: limit - 2] + full[-2:])
    assert [*P.instructions_of(files, s).values()] == ["ask a: ", "ask b: "]
    s.ignore_prompts, prompts = False, ["ask a: ", read_pair(files[1], 0)["prompt"]]
    assert prompts[1] and [*P.instructions_of(files, s).values()] == prompts


# ---- the gradient cache ----
@pytest.fixture(scope="module")
def model_folder(toy_tokens, tmp_path_factory):
    """A ModernBERT of two layers with a masked language modelling head, and a tokenizer."""
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    model = from_scratch(
        "modernbert-tiny", n_layer=2, n_head=4, n_embd=32, n_hidden=48, vocab_size=512,
        max_seq_len=64, layer_kinds=["global", "local"], window=4, out_dropout=0.0)  # fmt: skip
    for name, p in model.named_parameters():  # larger than at init, so that attention acts
        p.data.normal_(0, 1.0 if name == "embed.weight" else 0.3) if p.dim() == 2 else None
    ids = dict(cls=0, bos=0, sep=1, eos=1, pad=2).items()
    model.config.hf = {f"{name}_token_id": i for name, i in ids}
    save_pretrained(model, folder)
    load_tokenizer(os.path.join(toy_tokens, "tokenizer")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("pooling", ["mean", "tokens", "splade"])
def test_cached_gradients_equal_one_graph(pooling, dropout, model_folder, hard_file, monkeypatch):
    """In fp64, against all texts in one graph: the same chunks with the same dropout, one loss
    written with loops, one backward."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what is fp32 in the code
    s = settings(pooling=pooling, both_directions=True, distill_weight=0.5,
                 false_negative_margin=0.3,
                 matryoshka_dims=(32, 8) if pooling == "mean" else ())  # fmt: skip
    model, projection = from_pretrained(model_folder), None
    model.set_dropout(attn=dropout, out=dropout)
    if pooling == "tokens":
        torch.manual_seed(3)
        projection = torch.nn.Linear(32, 8, bias=False)
    if pooling == "splade":
        s.temperature, s.normalize = 50.0, False  # dot products of hundreds
    else:
        model.drop_head()
    embedder = Embedder(model, load_tokenizer(model_folder), pooling, projection=projection)
    embedder.double().train()
    pairs, which = P.pairs_of_step([open_pairs(hard_file)], 5, np.zeros(6, int), s)
    results = {}
    for s.device_batch_tokens in (60, 10**9):
        batch = T.make_batch(pairs, which, embedder.tokenizer, s)
        batch.teacher, n = batch.teacher.double(), batch.n_queries
        assert len(batch.known) > 0 and any(p["scores"] for p in pairs)
        loss, hits = T.cached_step(embedder, batch, 5, s)
        results[s.device_batch_tokens] = harness.gradients(embedder)
        texts = {}
        assert (len(batch.chunks) > 3) == (s.device_batch_tokens == 60)
        for i, chunk in enumerate(batch.chunks):
            common.seed_step(s.seed, 5, 0, i)
            out = embedder.embed([batch.encoded[j] for j in chunk])
            out = out[0].split(out[1]) if pooling == "tokens" else out
            texts |= zip(chunk, out, strict=True)
        texts = [texts[j] for j in range(len(texts))]
        want, want_hits = plain_loss(pairs, texts[:n], texts[n:], s, 1)
        want.backward()
        assert loss == pytest.approx(want.item(), rel=1e-10) and hits == want_hits
        cached = results[s.device_batch_tokens]
        harness.assert_same_gradients(cached, harness.gradients(embedder), 1e-10)
        # chunks that FSDP needs where another rank has more of them
        monkeypatch.setattr(grad_cache, "all_reduce_max", lambda n: n + 2)
        grad_cache.pad_chunks(batch.encoded, batch.chunks)
        assert batch.chunks[-3] != batch.chunks[-2] == batch.chunks[-1] == [len(batch.encoded) - 1]
        assert T.cached_step(embedder, batch, 5, s)[0] == pytest.approx(loss, rel=1e-12)
        harness.assert_same_gradients(harness.gradients(embedder), cached, 1e-12)
    tolerance = 1e-3 if dropout else 1e-10
    with pytest.raises(AssertionError) if dropout else nullcontext():
        harness.assert_same_gradients(results[60], results[10**9], tolerance)  # another dropout


# ---- whole runs ----
SCRIPT = "train_contrastive.py"
arguments, run = partial(harness.arguments, SCRIPT), partial(harness.run, SCRIPT)
KEEP = f"""import os, runpy, sys, torch  # keeps the weights of each rank
sys.argv[0] = {os.path.join(ROOT, SCRIPT)!r}
g = runpy.run_path(sys.argv[0], run_name="__main__")
torch.save(g["embedder"].state_dict(), os.path.join(g["s"].out_dir, f"rank{{g['s'].rank}}.pt"))
"""


@pytest.fixture(scope="module")
def tiny(model_folder, hard_file, tmp_path_factory):
    """A config file for the smallest run: 12 queries are divisible by 1, 2 and 3 ranks, and a step
    has 4 and more chunks."""
    return harness.write_config(
        tmp_path_factory.mktemp("config"), init_from=model_folder, data=(hard_file,),
        eval_data=hard_file, query_max_length=16, passage_max_length=40, batch_size=12,
        group_size=3, device_batch_tokens=100, temperature=0.1, distill_weight=0.5,
        distill_temperature=2.0, max_steps=6, warmup_steps=2, learning_rate=1e-3, log_interval=1,
        eval_interval=3, save_interval=3, dtype="fp32")  # fmt: skip


CLOSE = dict(loss=1e-5, gnorm=1e-4, eval_loss=1e-4, acc=1e-9)


def test_a_run_learns_and_its_folder_is_the_same(tiny, easy_files, tmp_path, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer

    keys = [f"--data={easy_files[0]}", f"--eval_data={easy_files[1]}", "--eval_lines=30",
            "--query_instruction=tan: ", "--passage_instruction=('mos: ',)"]  # fmt: skip
    keys += ["--max_steps=40", "--eval_interval=1", "--learning_rate=3e-3"]
    trained = run(tiny, tmp_path, *keys)
    embedder, right = trained.embedder, losses(tmp_path, "eval_acc")
    harness.assert_compared(capsys.readouterr().out, tmp_path, 40, "loss", "acc", "mrr", "ndcg")
    assert list(losses(tmp_path)) == list(right)[1:] == list(range(1, 41)) and right[0] < right[40]
    curve = list(losses(tmp_path).values())
    assert sum(curve[-5:]) < 0.6 * sum(curve[:5]) and right[40] > right[1] + 0.2
    pairs = trained.eval_pairs  # 30 of the 40
    texts = list(dict.fromkeys(text for p in pairs for text in p["pos"] + p["neg"]))
    asked = [p["query"] for p in pairs]
    embedder.eval()
    queries = embedder.encode(asked, "tan: ")
    passages = embedder.encode(texts, "mos: ")
    loaded = Embedder.load(str(tmp_path / "step40"), dtype="fp32")
    assert loaded.prompts == {"query": "tan: ", "document": "mos: "}
    assert np.array_equal(loaded.encode(asked, loaded.prompts["query"]), queries)
    theirs = SentenceTransformer(str(tmp_path / "final"), device="cpu")  # a name of the newest
    for ours, there in ((queries, theirs.encode(asked, prompt_name="query")),
                        (passages, theirs.encode(texts, prompt_name="document"))):  # fmt: skip
        assert np.abs(ours - there).max() < 1e-5
    # what evaluation printed, by loops, and what it says with another loss
    found = dict.fromkeys(("loss", "acc", "mrr", "ndcg", "hinge"), 0.0)
    for pair, q in zip(pairs, queries, strict=True):
        scores = {text: float(q @ d) for text, d in zip(texts, passages, strict=True)}
        first, wrong = pair["pos"][0], [t for t in texts if t not in pair["pos"]]
        weights = [np.exp((scores[t] - scores[first]) / 0.1) for t in [first, *wrong]]
        found["loss"] += np.log(sum(weights))
        found["hinge"] += sum(max(0, 0.1 + scores[t] - scores[first]) for t in wrong)
        top = sorted(texts, key=scores.get, reverse=True)[:10]
        hits = [i for i, t in enumerate(top) if t in pair["pos"]]
        found["acc"] += 0 in hits
        found["mrr"] += 1 / (hits[0] + 1) if hits else 0
        ideal = sum(1 / np.log2(i + 2) for i in range(len(set(pair["pos"]))))
        found["ndcg"] += sum(1 / np.log2(i + 2) for i in hits) / ideal
    monkeypatch.setattr(T, "contrast", hinge)
    hinged = T.evaluate(embedder, pairs, trained.s)["loss"]
    assert hinged == pytest.approx(found.pop("hinge") / 30, rel=1e-4) and hinged > 0.01
    for name, total in found.items():
        assert losses(tmp_path, f"eval_{name}")[40] == pytest.approx(total / 30, rel=1e-4), name


def test_the_next_stage_sees_the_same_ids_and_its_own_dropout(tiny, tmp_path):
    """The saved tokenizer has the suffix for sentence-transformers: training adds it once, too."""
    keys = ["--suffix= ris[SEP]", "--prefix=ta: ", "--max_steps=1", "--warmup_steps=0"]
    first = run(tiny, tmp_path / "a", *keys, "--attn_dropout=0.3").embedder
    second = run(tiny, tmp_path / "b", *keys, f"--init_from={tmp_path / 'a'}").embedder
    texts = ["tan mos", "", "ris " * 40]
    ids = [e.tokenize(texts) for e in (first, second, Embedder.load(str(tmp_path / "b")))]
    assert ids[0] == ids[1] == ids[2]
    dropout = [{block.attn.attn_dropout for block in e.model.blocks} for e in (first, second)]
    assert dropout == [{0.3}, {0.0}]
    assert json.loads(saved(tmp_path / "a", 1, "config.json"))["attention_dropout"] == 0.0


@pytest.mark.parametrize("pooling", ["tokens", "splade"])
def test_many_vectors_and_sparse_ones_are_saved(pooling, tiny, tmp_path):
    keys = [f"--pooling={pooling}", "--projection_dim=8", "--max_steps=4", "--eval_interval=2"]
    keys += ["--temperature=20", "--normalize=False"] if pooling == "splade" else []
    embedder = run(tiny, tmp_path / "whole", *keys).embedder.eval()
    texts = ["ta", "tan tama mos", "", "ris sus kes tan " * 4]
    loaded = Embedder.load(str(tmp_path / "whole" / "step4"), dtype="fp32")
    for a, b in zip(loaded.encode(texts), embedder.encode(texts), strict=True):
        assert np.array_equal(a, b) and a.shape[-1] == (8 if pooling == "tokens" else 512)
    run(tiny, tmp_path / "again", *keys, "--stop_step=2")
    again = run(tiny, tmp_path / "again", *keys, "--resume=True").embedder
    assert_equal_bits(tmp_path / "again", tmp_path / "whole")
    for name, x in embedder.state_dict().items():  # the projection, too
        assert torch.equal(again.state_dict()[name], x), name


def test_another_tokenizer_is_the_one_that_is_saved(tiny, model_folder, tmp_path):
    """Of the model and of its adapter; its largest id must fit."""
    other = load_tokenizer(model_folder)
    bare = Tokenizer.from_str(other.backend_tokenizer.to_str())
    bare.post_processor = processors.TemplateProcessing(single="$A")  # no CLS, no SEP
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path / "bare")
    keys = [f"--tokenizer={tmp_path / 'bare'}", "--lora_rank=2", "--max_steps=3"]
    run(tiny, tmp_path / "out", *keys)
    for folder in ("step3", "step3/adapter"):
        loaded = Embedder.load(str(tmp_path / "out" / folder))
        assert loaded.tokenize(["tan mos"])[0][0] == bare.encode("tan mos").ids
    assert bare.encode("tan mos").ids != other("tan mos")["input_ids"]
    other.add_tokens([f"more{i}" for i in range(600)])
    other.save_pretrained(tmp_path / "large")
    keys = [f"--tokenizer={tmp_path / 'large'}"]
    harness.assert_refused("take the model's own tokenizer", SCRIPT, tiny, tmp_path / "x", *keys)


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    more = ["--max_steps=40", "--attn_dropout=0.2"]
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (4, 24), *more)


def test_the_best_checkpoint_is_kept(tiny, easy_files, tmp_path):
    # 20 good steps, then some that spoil the weights
    keys = [f"--data={easy_files[0]}", f"--eval_data={easy_files[1]}", "--keep_best=True"]
    keys += ["--schedule=constant", "--save_interval=100"]
    run(tiny, tmp_path, *keys, "--max_steps=20", "--eval_interval=4", "--learning_rate=3e-3")
    keys += ["--max_steps=24", "--eval_interval=1", "--learning_rate=1.0"]
    run(tiny, tmp_path, *keys, "--resume=True")
    evals = losses(tmp_path, "eval_loss")
    best = min(evals, key=evals.get)
    assert list(evals) == [0, 4, 8, 12, 16, 20, 21, 22, 23, 24] and best <= 20
    assert {p.name for p in tmp_path.glob("step*")} == {"step24", f"step{best}"}


def test_lora_resumed_is_bit_equal(tiny, tmp_path):
    """An adapter, and a second one on top of it. The first is given as an out_dir, whose newest
    checkpoint is another when the second run goes on."""
    keys = ["--lora_rank=4", "--train_also=norm", "--attn_dropout=0.2"]
    keys += ["--suffix= ke", "--pool_instruction=False", "--eval_interval=2"]
    tasks = tmp_path / "tasks.json"
    tasks.write_text('{"STS12": "like it:"}')
    keys += ["--pool_bos=False", "--separator=; ", f"--task_instructions={tasks}"]
    first, name = tmp_path / "first", "adapter/adapter_model.safetensors"
    for whole, half in (("whole", "half"), ("whole2", "half2")):
        whole, half = tmp_path / whole, tmp_path / half
        embedder = run(tiny, whole, *keys).embedder.eval()
        run(tiny, half, *keys, "--stop_step=2")
        if first.exists():
            shutil.copytree(whole / "step6" / "adapter", first / "step2")  # another one
        run(tiny, half, *keys, "--resume=True")
        assert_equal_bits(half, whole)
        assert saved(half, 6, name) == saved(whole, 6, name)
        ours = embedder.encode(["tan mos", "ris"], "su ")
        for folder in ("step6", "step6/adapter"):  # merged, or the chain base + adapters
            loaded = Embedder.load(str(whole / folder), dtype="fp32")
            assert loaded.template == Template("", " ke", "; ") and not loaded.pool_instruction
            assert not loaded.pool_bos and loaded.instructions["STS12"] == "like it:"
            assert np.abs(loaded.encode(["tan mos", "ris"], "su ") - ours).max() < 1e-5
        if not first.exists():
            shutil.copytree(whole / "step6" / "adapter", first / "step1")
            keys.append(f"--adapters={first}")
    assert losses(tmp_path / "whole2") != losses(tmp_path / "whole")


def test_the_first_layers_alone(tiny, folders, tmp_path):
    """A run with n_layer=2 of 3, resumed, is one on a folder that was cut by hand. So is a second
    run on its adapter, which says how many layers it goes with, and one on the whole model's."""
    cut, base = tmp_path / "cut", folders["qwen3"]
    shutil.copytree(base, cut)
    config = read_json(base, "config.json")
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    write_json(config, cut, "config.json")
    tensors = load_file(f"{base}/model.safetensors")
    dropped = [name for name in tensors if name.startswith("model.layers.2.")]
    assert len(dropped) == 11
    save_file({n: x for n, x in tensors.items() if n not in dropped}, cut / "model.safetensors")

    keys = ["--lora_rank=4", "--train_also=norm", "--dtype=bf16", "--pooling=last"]
    texts = ["tan mos", "ris sus"]
    runs = {"hand": [f"--init_from={cut}"], "key": [f"--init_from={base}", "--n_layer=2"]}
    for name, more in runs.items():
        out = tmp_path / name
        run(tiny, out, *keys, *more, "--stop_step=2")
        run(tiny, out, *keys, *more, "--resume=True")
        first = tmp_path / f"{name}-adapter"
        shutil.copytree(out / "step6" / "adapter", first)
        run(tiny, tmp_path / f"{name}2", *keys, f"--init_from={first}")
    for end in ("", "2"):
        hand, ours = tmp_path / f"hand{end}", tmp_path / f"key{end}"
        assert_equal_bits(ours, hand)
        assert read_json(ours / "step6", "config.json") == read_json(hand / "step6", "config.json")
        sides = [Embedder.load(str(f), dtype="fp32").encode(texts) for f in (
            hand / "step6", ours / "step6", ours / "step6" / "adapter")]  # fmt: skip
        assert np.array_equal(sides[0], sides[1]) and np.abs(sides[2] - sides[0]).max() < 1e-2
    # an adapter of all layers is merged first, then the model is cut
    run(tiny, tmp_path / "all", *keys, f"--init_from={base}", "--max_steps=2")
    more = [f"--init_from={tmp_path}/all/step2/adapter", "--n_layer=1", "--max_steps=2"]
    embedder = run(tiny, tmp_path / "one", *keys, *more).embedder
    whole = from_pretrained(str(tmp_path / "all/step2"), n_layer=1, dtype=torch.bfloat16)
    name = "blocks.0.mlp.up_proj."
    got = embedder.model.state_dict()[f"{name}base.weight"]
    assert len(embedder.model.blocks) == 1 and torch.equal(got, whole.state_dict()[f"{name}weight"])
    assert AutoModel.from_pretrained(tmp_path / "one" / "step2").config.num_hidden_layers == 1
    harness.raises(ValueError, "n_layer=3: the model has 2", from_pretrained, str(cut), n_layer=3)
    harness.raises(ValueError, "n_layer=2: the model has 1", lora.load_adapter, whole, str(first))


def test_two_ranks_equal_one_and_each_other(tiny, tmp_path):
    """With hard negatives, known positives, distillation and chunks; the losses and weights of one
    rank, and bit by bit those of the other rank."""
    (tmp_path / "keep.py").write_text(KEEP)
    everything = ["--both_directions=True", "--false_negative_margin=0.3", "--seed=0"]
    kinds = {
        "ddp": everything, "fsdp": [*everything, "--fsdp=full"],
        "tokens": ["--pooling=tokens", "--projection_dim=8"],
        "fsdp-tokens": ["--pooling=tokens", "--projection_dim=0", "--fsdp=full"],
        "splade": ["--pooling=splade", "--normalize=False", "--temperature=20"],
        "lora": ["--lora_rank=4", "--lora_dropout=0", "--device_batch_tokens=9999", "--fsdp=full"]}
    argvs = []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *flags))
        if "--fsdp=full" not in flags:
            argvs[-1][0] = str(tmp_path / "keep.py")
        if kind != "fsdp":
            flags = [*flags, "--fsdp=", "--device_batch_tokens=100"]
            one = run(tiny, tmp_path / f"{kind}-one", *flags)
        if kind == "ddp":  # under FSDP the ranks have different numbers of chunks
            ranks = [SimpleNamespace(**vars(one.s) | {"rank": r, "world_size": 2}) for r in (0, 1)]
            given = one.files, 0, one.choices, one.tokenizer
            n_chunks = [[len(b.chunks) for b in T.train_batches(*given, s)] for s in ranks]
            difference = np.subtract(*n_chunks)
            assert min(difference) < 0 < max(difference) and np.min(n_chunks) > 1
    more = ["--attn_dropout=0.2", "--fsdp=full"]
    half, whole = (arguments(tiny, tmp_path / name, *more) for name in ("half", "whole"))
    apart = arguments(tiny, tmp_path / "apart", "--negatives_cross_device=False")
    run_ranks(2, argvs + [whole, half + ["--stop_step=3"], half + ["--resume=True"], apart])
    for kind in kinds:
        one = tmp_path / ("ddp-one" if kind == "fsdp" else f"{kind}-one")
        harness.assert_close(tmp_path / kind, one, "step6", **CLOSE)
    for kind in ("ddp", "tokens", "splade"):
        one, other = (torch.load(tmp_path / kind / f"rank{i}.pt") for i in range(2))
        assert one and all(torch.equal(one[name], other[name]) for name in one), kind
    assert_equal_bits(tmp_path / "half", tmp_path / "whole")
    # among half of the candidates
    assert losses(tmp_path / "apart")[1] < losses(tmp_path / "lora")[1] - 0.2


def test_three_ranks_equal_one_and_resumed_are_bit_equal(tiny, folders, tmp_path):
    # Qwen's gradients arrive in another order than its parameters are listed: DDP reorders its
    # buckets after the first backward
    more = [f"--init_from={folders['qwen3']}", "--pooling=last"]
    run(tiny, tmp_path / "one", *more)
    three = arguments(tiny, tmp_path / "three", *more)
    more.append("--attn_dropout=0.2")
    half, whole = (arguments(tiny, tmp_path / name, *more) for name in ("half", "whole"))
    run_ranks(3, [three, whole, half + ["--stop_step=3"], half + ["--resume=True"]])
    harness.assert_close(tmp_path / "three", tmp_path / "one", "step6", **CLOSE)
    assert_equal_bits(tmp_path / "half", tmp_path / "whole")
    assert losses(tmp_path / "whole")[1] != pytest.approx(losses(tmp_path / "one")[1], rel=1e-3)


def test_a_signal_saves_and_exits(tiny, unbroken, tmp_path):
    harness.stopped_and_resumed(SCRIPT, tiny, tmp_path, 4)
    assert_equal_bits(tmp_path, unbroken)


def test_show_batch_and_dry_run(tiny, unbroken, tmp_path):
    more = ["--pool_instruction=False"]
    shown, dry = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path, *more)
    assert "--- query 0:" in shown and re.search(r"\[CLS\]tan: ?\x1b\[7m", shown)
    wanted = r"\d+ chunks of up to 100 tokens\ndry run: [\d.]+ s/step, [\d.,]+ ex/s, .*peak memory"
    assert re.search(wanted, dry)


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path):
    keys = ["--learning_rate=1e30", "--warmup_steps=0", "--max_steps=20", "--eval_interval=0"]
    out = harness.printed_before_the_4th_bad_step(SCRIPT, tiny, tmp_path, *keys)
    assert re.search(r"step 2: loss nan, .* Lines of .*hard.jsonl", out)


# ---- bad input ----
def test_three_forms_of_lines(tmp_path):
    lines = [{"query": "a", "pos": ["b", "c"], "neg": None, "pos_scores": [1, 2.5], "prompt": None},
             {"anchor": "a", "positive": "b", "negative": "c"}, {"query": "a", "positive": "b"},
             {"text": "a\u2028b"}]  # fmt: skip
    file = open_pairs(write_jsonl(tmp_path / "x.jsonl", lines))
    empty = dict(neg=[], pos_scores=None, neg_scores=None, prompt=None)
    assert [read_pair(file, i) for i in range(4)] == [
        empty | {"query": "a", "pos": ["b", "c"], "pos_scores": [1, 2.5]},
        empty | {"query": "a", "pos": ["b"], "neg": ["c"]}, empty | {"query": "a", "pos": ["b"]},
        empty | {"query": "a\u2028b", "pos": ["a\u2028b"]}]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), [
    ('{"query": "a", "pos": []}', "line 22: field 'pos' is empty"),
    ('{"query": "a"}', "line 22: field 'pos' is missing"),
    ('{"pos": ["b"]}', "line 22: field 'query' is missing"),
    ('{"query": "a", "pos": ["b"], "neg": [null]}', "line 22: field 'neg' is [None]"),
    ('{"query": "a", "pos": ["b"], "pos_scores": [1, 2]}', "'pos_scores' has 2 numbers for 1"),
    ('{"query": "a", "pos": ["b"], "neg_scores": ["x"]}', "line 22: field 'neg_scores'"),
    ('{"query": "a", "pos": ["b"], "prompt": 1}', "line 22: field 'prompt' is 1"),
    ('{"anchor": "a", "positive": ["b"]}', "line 22: field 'positive' is ['b']"),
    ('{"positive": "b"}', "line 22: field 'query' is missing"),
    ("--pooling=max", "pooling takes one of mean, "), ("--group_size=0", "takes >= 1, not 0"),
    ("--crop=2", "crop takes >= 0 and <= 1, not 2.0"),
    ("--matryoshka_dims=(64,16)", "matryoshka_dims=(64, 16): embeddings have 32"),
    ("--query_instruction=('a','b')", "query_instruction: 2 texts for 1 data files"),
    ("--data=nowhere.jsonl", "nowhere.jsonl"), ("--init_from=nowhere/at/all", "nowhere/at/all"),
    ("--lora_rank=2 --lora_targets=q_prj", "q_prj"),
    ("--train_also=norm", "train_also='norm' goes with LoRA"),
    ("--pooling=tokens --lora_rank=2", "without LoRA"),
    ("--num_epochs=1", "max_steps=6, num_epochs=1.0; expected one"),
    ("--fsdp=full", "start with torchrun")])  # fmt: skip
def test_bad_lines_and_settings_say_what_is_expected(bad, message, tiny, tmp_path):
    more, path = bad.split(), tmp_path / "x.jsonl"
    if bad.startswith("{"):
        path.write_text('{"query": "a", "pos": ["b"]}\n' * 20 + f"\n{bad}\n")
        more, message = [f"--data={path}"], message.replace("line 22", f"{path} line 22")
    harness.assert_refused(message, SCRIPT, tiny, tmp_path / "out", *more)
