"""train_token_retrieval.py, passages.py and embedder.py's scores of tokens: windows, spans, the
loss against a loop, memory, and tiny runs, whole, killed and resumed, on 1 and 2 ranks."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import evals.token_retrieval
import harness
import passages as P
import train_token_retrieval as T
from data import open_pairs
from embedder import Embedder, score_tokens
from formats.huggingface import from_pretrained
from harness import ROOT, assert_close, assert_equal_bits, losses, raises, run_ranks, write_jsonl
from spans import covered, find_runs, gold_tokens, read_spans
from token_scores import windows_of
from tokenizer import Template, load_tokenizer, tokenize, tokenize_passage

SCRIPT = "train_token_retrieval.py"


# ---- windows ----
@pytest.mark.parametrize("causal", [True, False])
def test_windows_hold_each_token_once_where_it_sees_most(causal):
    for n, window, overlap in [(1, 4, 0), (9, 9, 3), (10, 9, 3), (23, 5, 2), (40, 8, 7), (41, 8, 0),
                               (100, 16, 6), (57, 10, 9)]:  # fmt: skip
        found = windows_of(n, window, overlap, causal)
        assert [first for *_, first, _ in found] == [0] + [last for *_, last in found[:-1]]
        assert found[0][0] == 0 and found[-1][1] == found[-1][3] == n

        def sees(j, start, stop, n=n):  # tokens in front of it, or to the nearer border if that
            front = j - start if start else n  # is none of the text's own
            return front if causal else min(front, stop - 1 - j if stop < n else n)

        for start, stop, first, last in found:
            assert stop - start == min(window, n) and start <= first < last <= stop
            for j in range(first, last):
                best = max(sees(j, a, b) for a, b, *_ in found if a <= j < b)
                assert sees(j, start, stop) >= best - (not causal), (n, window, overlap, j)
        for a, b in zip(found[:-1], found[1:], strict=True):
            assert a[1] - b[0] >= overlap and (a[1] - b[0] == overlap or b is found[-1])
    assert windows_of(50, 0, 0, causal) == [(0, 50, 0, 50)]
    raises(ValueError, "windows of 8 tokens cannot share 8", windows_of, 50, 8, 8, causal)


# ---- spans, tokens and back ----
TEXT = (
    "  na\xefve cafe\u0301 \u4f60\u597d\u3002\U0001f642\U0001f468\u200d\u2640 a\n\n\tb   c\xa0d  "
    "\u041f\u0440\u0438 it's 12345 \ufb01ne [SEP] <s> tan tamos ri.\r\nEnd ")  # fmt: skip


def tokenizers_of_all_kinds(toy_tokens):
    """Byte-level with and without the space in its offsets, SentencePiece's and BERT's manner."""
    plain = load_tokenizer(f"{toy_tokens}/tokenizer")
    spec = json.loads(plain.backend_tokenizer.to_str())
    spec["pre_tokenizer"]["trim_offsets"] = True
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                              "use_regex": True}  # fmt: skip
    letters = sorted(set(TEXT + "\u2581") - {"\U0001f642"})  # one character is unknown
    piece = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", *letters, "\u2581t"])},
                                 [("\u2581", "t")], unk_token="<unk>"))  # fmt: skip
    piece.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])  # fmt: skip
    piece.decoder = decoders.Metaspace()
    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.train_from_iterator([TEXT], trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    ))  # fmt: skip
    kinds = {"trimmed": Tokenizer.from_str(json.dumps(spec)), "piece": piece, "bert": bert}
    return {"bytes": plain} | {name: PreTrainedTokenizerFast(tokenizer_object=x, eos_token="E")
                               for name, x in kinds.items()}  # fmt: skip


@pytest.mark.parametrize("template", [Template(), Template("Read: ", "</s>"), Template("\u4f60 ")])
def test_spans_to_tokens_and_back(toy_tokens, template):
    written = [i for i, c in enumerate(TEXT) if not c.isspace()]
    for name, tokenizer in tokenizers_of_all_kinds(toy_tokens).items():
        passage = TEXT if name != "bert" else re.sub("\u0301|\u200d", "", TEXT)  # it drops these
        instruction = "passage: "
        ids, rows, spans = tokenize_passage(tokenizer, passage, instruction, template)
        assert ids == tokenize(tokenizer, [passage], instruction, template, 10**9)[0][0], name
        assert len(rows) == len(spans) and (np.diff(rows) > 0).all()
        assert (spans[:, 0] < spans[:, 1]).all() and (np.diff(spans[:, 0]) >= 0).all()
        held = covered(spans, len(passage))
        assert held[[i for i in written if i < len(passage)]].all() or name == "bert"
        outside = set(range(len(ids))) - set(rows.tolist())
        assert len(outside) >= len(tokenizer(template.prefix + instruction)["input_ids"]) - 3
        rng = np.random.default_rng(0)
        for _ in range(60):
            start, end = sorted(rng.choice(len(passage) + 1, 2, replace=False).tolist())
            record = {"passage": passage, "spans": [[start, end]], "where": "x line 1"}
            text = passage[start:end].strip()
            if not text:
                raises(ValueError, "x line 1: span", gold_tokens, record, spans)
                continue
            (inside,) = gold_tokens(record, spans)
            first, last = spans[inside[0], 0], spans[inside[-1], 1]
            assert text in passage[first:last], name
            # not a token more: each has a character of the span, and no other has one
            overlap = [max(0, min(b, end) - max(a, start)) for a, b in spans.tolist()]
            assert np.flatnonzero(overlap).tolist() == inside.tolist()
            if name == "bytes":  # the ids themselves say the text, where no character is parted
                assert text in tokenizer.decode([ids[rows[i]] for i in inside])


def test_offsets_that_lie_are_found(toy_tokens, monkeypatch):
    tokenizer, s = load_tokenizer(f"{toy_tokens}/tokenizer"), settings()
    _, _, spans = tokenize_passage(tokenizer, TEXT, "", Template())
    record = {"passage": TEXT, "spans": [[2, 7]], "where": "x.jsonl line 3"}
    with pytest.raises(ValueError, match=r"x.jsonl line 3: span \[2, 7\], 'na\xefve', comes back"):
        gold_tokens(record, spans[5:])
    raises(ValueError, "comes back from its tokens as ''", gold_tokens, record, spans[:0])
    passage = "tan molo rima suke kes tan"
    record = dict(query="ta", passage=passage, spans=[[4, 8]], answer=None, where="x line 3")
    good = P.encode_passage([record], tokenizer, s)
    inside = good.spans[good.gold.numpy()]
    assert passage[inside[:, 0].min() : inside[:, 1].max()].strip() == "molo"
    for by in (-6, 6):  # the tokenizer's offsets have moved
        ids, rows, spans = tokenize_passage(tokenizer, passage, s.passage_instruction, s.template)
        moved = ids, rows, (spans + by).clip(0, len(passage))
        monkeypatch.setattr(P, "tokenize_passage", lambda *args, moved=moved: moved)
        with pytest.raises(ValueError, match="x line 3: span .4, 8., 'molo', comes back"):
            P.encode_passage([record], tokenizer, s)


# ---- the loss ----
def settings(**changes):
    """What the main block gives to the functions, for one rank on the CPU."""
    plain = dict(
        batch_size=6, seed=7, rank=0, world_size=1, fsdp="", template=Template("<", ">"),
        query_instruction="ask: ", passage_instruction="read: ", query_max_length=24,
        passage_max_length=None, passage_window=0, window_overlap=0, causal=True, stop_step=10**9,
        device_batch_tokens=10**9, temperature=0.3, device=torch.device("cpu"),
        autocast=nullcontext)  # fmt: skip
    assert changes.keys() <= plain.keys()
    return SimpleNamespace(**(plain | changes))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    train = harness.spans_file(folder / "train.jsonl")
    return train, harness.spans_file(folder / "val.jsonl", 8, seed=2)


def encoded_runs(file, tokenizer, s, most=4):
    """Every run of up to `most` lines of a file, encoded."""
    runs = find_runs(file, most).tolist()
    lines = [[read_spans(file, i) for i in range(first, first + n)] for first, n in runs]
    return [P.encode_passage(records, tokenizer, s) for records in lines]


def hidden_states(model, passages):
    """[T, C] of the passages in one packed row, and the passages with their rows there"""
    (micro_batch,) = P.pack_passages(passages, 10**9)
    return torch.cat([model(*part) for part in micro_batch.parts]), micro_batch.passages


@pytest.fixture
def doubled(folders, monkeypatch):
    """The model in fp64: what the code does in fp32 becomes fp64, too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = from_pretrained(folders["llama"]).double().train()
    model.drop_head()
    return model, load_tokenizer(folders["llama"])


def plain_loss(model, tokenizer, records, s):
    """The loss of the lines, one by one -> (sum of losses, plain_scores of each line)"""
    total, scores = 0.0, [harness.plain_scores(model, tokenizer, x, s) for x in records]
    for cosines, gold in scores:
        sum_exp = sum(torch.exp(x / s.temperature) for x in cosines)
        logs = [torch.log(torch.exp(cosines[j] / s.temperature) / sum_exp) for j in gold]
        total = total - sum(logs) / len(logs)
    return total, scores


CASES = {"one row": {},
         "micro-batches": dict(device_batch_tokens=90),
         "windows": dict(passage_window=12, window_overlap=5),
         "windows in parts": dict(passage_window=12, window_overlap=5, device_batch_tokens=30)}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_a_loop(case, doubled, files):
    """fp64, several ragged passages, several queries each, several gold spans; packed = alone."""
    s, (model, tokenizer) = settings(batch_size=14, **CASES[case]), doubled
    file = open_pairs(files[0])
    runs = find_runs(file, 3)
    batch, (n, *lost, n_tokens) = next(P.train_batches(file, runs, 2, tokenizer, s))
    records = [read_spans(file, i) for i in P.lines_of_batch(2, runs, s)]
    assert n == 14 and lost == [0, 0] and any(len(r["spans"]) > 2 for r in records)
    n_parts = [len(micro_batch.parts) for micro_batch in batch]
    assert sum(len(x.passages) for x in batch) < 14  # passages with several queries
    assert (len(batch) > 1) == (s.device_batch_tokens < 100)
    assert (max(n_parts) > 1) == (case == "windows in parts")
    assert sum(len(tokens) for x in batch for tokens, _ in x.parts) == n_tokens
    loss, hits = T.train_step(model, batch, n, 2, s)
    got = harness.gradients(model)
    expected, scores = plain_loss(model, tokenizer, records, s)
    (expected / 14).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert hits == sum(int(x.argmax()) in gold for x, gold in scores)
    harness.assert_same_gradients(got, harness.gradients(model), 1e-10)


@pytest.mark.parametrize("window", [0, 12])
def test_training_and_use_give_equal_scores(window, folders, files):
    s = settings(passage_window=window, window_overlap=5 if window else 0)
    prompts = {"query": "ask: ", "document": "read: "}
    model, tokenizer = from_pretrained(folders["llama"]), load_tokenizer(folders["llama"])
    model.drop_head()
    embedder = Embedder(model, tokenizer, "last", s.template, prompts, max_length=24)
    passages, far = encoded_runs(open_pairs(files[0]), tokenizer, s), 0.0
    hidden, passages = hidden_states(model, passages)
    for p in passages:
        queries, passage = [r["query"] for r in p.records], p.records[0]["passage"]
        found, spans = score_tokens(embedder, queries, passage, window, s.window_overlap)
        whole, same_spans = score_tokens(embedder, queries, passage)
        got = T.token_scores(hidden, p).detach().numpy()
        assert found.dtype == np.float32 and np.abs(found - got).max() < 1e-5
        assert (spans == p.spans).all() and (spans == same_spans).all()
        vectors, tokens = embedder.encode(queries, "ask: "), hidden[p.tokens].detach().numpy()
        cosine = vectors @ (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).T
        assert np.abs(cosine - got).max() < 1e-5
        far = max(far, np.abs(whole - found).max())
    assert (far > 1e-2) == bool(window)  # a window's tokens do not see what is before it
    assert embedder.training


def test_score_tokens_of_odd_passages(folders):
    embedder = Embedder(from_pretrained(folders["llama"]), load_tokenizer(folders["llama"]), "last")
    scores, spans = score_tokens(embedder, ["tan", ""], "")
    assert scores.shape == (2, 0) and spans.shape == (0, 2)
    scores, spans = score_tokens(embedder, ["tan"], TEXT, window=7, overlap=3)
    assert scores.shape == (1, len(spans)) and np.abs(scores).max() <= 1 + 1e-6
    embedder.pooling = "tokens"
    raises(ValueError, "'tokens'", score_tokens, embedder, ["tan"], TEXT)


# ---- batches ----
def test_batches_are_a_function_of_seed_and_step(files):
    file, s = open_pairs(files[0]), settings(batch_size=5)
    runs, n = find_runs(file, 3), len(file)
    passages = [read_spans(file, i)["passage"] for i in range(n)]
    lines = [i for first, count in runs for i in range(first, first + count)]
    assert lines == list(range(n)) and runs[:, 1].max() == 3
    assert all(len(set(passages[first : first + count])) == 1 for first, count in runs)
    steps = [P.lines_of_batch(step, runs, s).tolist() for step in range(40)]
    assert steps[13] == P.lines_of_batch(13, runs, s).tolist() != steps[14]
    other_seed = settings(batch_size=5, seed=8)
    assert steps != [P.lines_of_batch(step, runs, other_seed).tolist() for step in range(40)]
    flat = sum(steps, [])
    epochs = [flat[i : i + n] for i in range(0, len(flat) - n, n)]
    assert len(epochs) > 5 and all(sorted(e) == list(range(n)) for e in epochs)
    assert epochs[0] != epochs[1]
    together = {(f + k, f + k + 1) for f, c in runs.tolist() for k in range(c - 1)}
    for e in epochs:
        assert together <= set(zip(e[:-1], e[1:], strict=True))


def test_ranks_share_a_batch_out():
    texts = ["a" * n for n in (5, 900, 3, 400, 450, 80, 1)]
    shares = P.share_out(texts, 3)
    assert sorted(sum(shares, [])) == list(range(7)) and shares[0] == [1]
    assert max(sum(len(texts[i]) for i in share) for share in shares) <= 900
    assert P.share_out(texts[:1], 2) == [[0], []]


def test_passages_are_cut_and_spans_behind_the_cut_are_lost(folders):
    tokenizer, words = load_tokenizer(folders["llama"]), "tan tama mos rilo sun kema"
    base = {"passage": words, "answer": None, "where": "x", "line": 1}
    spans = [[[0, 3]], [[0, 3], [14, 22]], [[14, 17], [23, 26]], [[5, 16]]]
    records, s = [base | {"query": f"q{i}", "spans": x} for i, x in enumerate(spans)], settings()
    whole = P.encode_passage(records, tokenizer, s)
    ids = whole.texts[0]
    assert whole.lost.tolist() == [0, 0] and len(whole.records) == 4
    n_tail = len(ids) - 1 - int(whole.tokens[-1])
    cut_at = whole.spans[:, 0].tolist().index(8)  # " mos" is the last token that stays
    limit = int(whole.tokens[cut_at]) + 1 + n_tail
    cut = P.encode_passage(records, tokenizer, s, limit)
    assert len(cut.texts[0]) == limit and cut.texts[0][-n_tail:] == ids[-n_tail:]
    assert (cut.spans == whole.spans[: cut_at + 1]).all()
    assert [r["query"] for r in cut.records] == ["q0", "q1", "q3"] and cut.lost.tolist() == [1, 3]
    assert cut.query.max() == 2 and (cut.gold <= cut_at).all() and len(cut.texts) == 4
    gold = whole.gold[whole.query == 1]
    assert cut.gold[cut.query == 1].tolist() == gold[gold <= cut_at].tolist()
    nothing = P.encode_passage(records[2:3], tokenizer, s, limit)
    assert nothing.records == [] and len(nothing.gold) == 0
    with pytest.raises(ValueError, match="passage_max_length=5 leaves no room"):
        P.encode_passage(records, tokenizer, s, 5)


# ---- memory ----
LONG = """
import sys
sys.path[:0] = [{root!r}]
import torch
import lora
from contextlib import nullcontext
from model import from_scratch
from passages import Passage, pack_passages
from train_token_retrieval import train_step
from types import SimpleNamespace
torch.manual_seed(0)
model = from_scratch("modernbert-tiny", n_layer=2, n_head=1, n_embd=64, n_hidden=1024,
                     vocab_size=512, max_seq_len=512, layer_kinds=["global", "local"], window=64,
                     out_dropout=0.0, causal=True, head="none")
lora.inject(model, 4, 8.0, 0.05, "all", train_also="norm")
model.gradient_checkpointing = True
s = SimpleNamespace(device=torch.device("cpu"), world_size=1, rank=0, fsdp="", seed=1,
                    temperature=0.02, autocast=nullcontext)
for n in (2500, 5000, 10000):
    ids, gold = torch.randint(5, 500, (n,)).tolist(), torch.arange(8)
    p = Passage(texts=[ids, [7, 8, 1], [9, 1]], tokens=torch.arange(n), query=gold % 2,
                ends=torch.tensor([n + 2, n + 4]), gold=gold * (n // 8), count=gold * 0 + 4,
                records=[0, 0], spans=None, lost=None)
    loss, _ = train_step(model.train(), pack_passages([p], 4096), 2, 0, s)
    grads = [x.grad for x in model.parameters() if x.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads) and any(map(torch.any, grads))
    model.zero_grad()
    with open("/proc/self/status") as f:  # not ru_maxrss, which a child inherits from its parent
        peak = next(line for line in f if line.startswith("VmHWM")).split()[1]
    print(n, loss / 2, int(peak) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_the_length_of_a_passage():
    """Training steps on LoRA with gradient checkpointing, on passages of 2,500, 5,000 and 10,000
    tokens in one piece: the process's peak after each, in MB. One 10,000 x 10,000 matrix in fp32
    would be 400."""
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    code = LONG.format(root=ROOT)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=exact)
    assert out.returncode == 0, out.stderr[-2000:]
    peak = {}
    for line in out.stdout.splitlines():
        n, loss, peak[int(n)] = map(float, line.split())
        assert math.log(4) < loss < 100
    first, second = peak[5000] - peak[2500], peak[10000] - peak[5000]
    # 30 kB a token; a T x T matrix of single bytes would add 19 to the first, 75 to the second
    assert 25 < first < 100 and 100 < second < 200, peak


# ---- whole runs ----
TINY = dict(prefix="<", suffix=">", query_instruction="ask: ", passage_instruction="read: ",
            query_max_length=24, batch_size=12, queries_per_passage=3, device_batch_tokens=100,
            temperature=0.1, max_steps=6, warmup_steps=2, learning_rate=1e-3, log_interval=1,
            eval_interval=3, save_interval=3, dtype="fp32")  # fmt: skip
run, arguments = partial(harness.run, SCRIPT), partial(harness.arguments, SCRIPT)


@pytest.fixture(scope="module")
def tiny(folders, files, tmp_path_factory):
    keys = TINY | dict(init_from=folders["llama"], data=files[0], eval_data=files[1])
    return harness.write_config(tmp_path_factory.mktemp("config"), **keys)


def test_training_finds_the_words_of_the_query(tiny, tmp_path, capsys):
    keys = ["--max_steps=60", "--schedule=constant", "--learning_rate=3e-3", "--eval_interval=60"]
    out = run(tiny, tmp_path, *keys, "--save_interval=60", "--gradient_checkpointing=True")
    printed = capsys.readouterr().out
    harness.assert_compared(printed, tmp_path, 60, "loss", "acc", "ndcg")
    assert "peak memory" in printed
    loss, s = losses(tmp_path), out.s
    assert min(loss.values()) < 0.6 * loss[1]
    model = from_pretrained(str(tmp_path / "step60"))
    loaded = Embedder.load(str(tmp_path / "step60"), dtype="fp32")
    assert loaded.pooling == "last" and loaded.prompts == {"query": "ask: ", "document": "read: "}
    s.ratios = T._RATIOS
    for s.passage_window, s.window_overlap in ((0, 0), (12, 4)):
        found = out.evaluate(model, out.eval_file, out.eval_runs, out.tokenizer, s)
        # the same numbers by Embedder.load and score_tokens, line by line
        again = evals.token_retrieval.evaluate(loaded, out.eval_file, out.eval_runs, s)
        assert found == pytest.approx(again["model"], abs=1e-3)
        assert list(found)[:4] == ["loss", "acc", "ap", "ndcg"] and "answer_4x" in found
        if not s.passage_window:  # what was logged, from the saved folder
            logged = {name: losses(tmp_path, f"eval_{name}")[60] for name in found}
            assert found == pytest.approx(logged, rel=1e-6)
            assert found["ap"] > again["random"]["ap"] + 0.1


def test_all_that_trained_is_saved(tiny, folders, tmp_path):
    """LoRA with the embedding and norms, in the folder and in the adapter."""
    embedder = run(tiny, tmp_path / "whole", "--lora_rank=4", "--train_also=embed,norm").embedder
    adapter = load_file(tmp_path / "whole/step6/adapter/adapter_model.safetensors")
    base = from_pretrained(folders["llama"])
    moved = {n: p for n, p in embedder.model.named_parameters() if p.requires_grad}
    assert len(adapter) == len(moved) and "embed.weight" in moved and "norm.weight" in moved
    for name in ("embed.weight", "norm.weight", "blocks.1.mlp_norm.weight"):
        assert not torch.equal(moved[name], base.get_parameter(name)), name
    texts = ["tan tama mos", "ris kema " * 9]
    ours = [score_tokens(embedder, ["tan", "kema"], text)[0] for text in texts]
    loaded = Embedder.load(str(tmp_path / "whole/step6"), dtype="fp32")
    alone = Embedder.load(
        folders["llama"], [str(tmp_path / "whole/step6/adapter")], dtype="fp32", pooling="last",
        template=embedder.template, prompts=embedder.prompts, max_length=24)  # fmt: skip
    for text, want in zip(texts, ours, strict=True):
        for other in (loaded, alone):
            assert np.abs(score_tokens(other, ["tan", "kema"], text)[0] - want).max() < 1e-5
    trained = run(tiny, tmp_path / "full", "--max_steps=3").embedder  # without LoRA: bit by bit
    loaded = Embedder.load(str(tmp_path / "full/step3"), dtype="fp32")
    for text in texts:
        a, b = (score_tokens(x, ["tan"], text)[0] for x in (trained, loaded))
        assert np.array_equal(a, b)


def test_killed_and_resumed_is_bit_equal(tiny, tmp_path):
    more = ["--max_steps=24", "--batch_size=4", "--save_interval=3", "--eval_interval=11"]
    more += ["--lora_rank=4", "--lora_dropout=0.2", "--train_also=embed,norm"]
    more += ["--passage_window=12", "--window_overlap=4", "--device_batch_tokens=30"]
    harness.assert_killed_and_resumed_is_bit_equal(SCRIPT, tiny, tmp_path, (4, 16), *more)


def test_two_ranks_equal_one(tiny, tmp_path):
    windows = ["--passage_window=12", "--window_overlap=4", "--device_batch_tokens=30"]
    kinds = {
        "ddp": [], "fsdp": ["--fsdp=full"], "parts": windows,
        "parts-fsdp": [*windows, "--fsdp=full"],
        "lora": ["--lora_rank=4", "--lora_dropout=0", "--train_also=embed,norm", "--fsdp=full"],
        "idle": ["--batch_size=2", "--fsdp=full"],  # often one passage alone: a rank has none
        "idle-ddp": ["--batch_size=2"]}  # fmt: skip
    argvs = []
    for kind, flags in kinds.items():
        argvs.append(arguments(tiny, tmp_path / kind, *flags))
        if kind not in ("fsdp", "parts-fsdp", "idle-ddp"):
            run(tiny, tmp_path / f"{kind}-one", *flags, "--fsdp=")
    more = ["--lora_rank=4", "--lora_dropout=0.2"]
    half = arguments(tiny, tmp_path / "half", *more)
    argvs += [arguments(tiny, tmp_path / "whole", *more), half + ["--stop_step=3"]]
    argvs += [half + ["--resume=True"]]
    run_ranks(2, argvs)
    for kind in kinds:
        one = {"fsdp": "ddp", "parts-fsdp": "parts", "idle-ddp": "idle"}.get(kind, kind)
        assert_close(tmp_path / kind, tmp_path / f"{one}-one", "step6", loss=1e-5, gnorm=1e-4,
                     eval_loss=1e-4, acc=1e-9)  # fmt: skip
    assert_equal_bits(tmp_path / "half", tmp_path / "whole")


def test_a_signal_saves_and_exits(tiny, unbroken, tmp_path):
    harness.stopped_and_resumed(SCRIPT, tiny, tmp_path, 4)
    assert_equal_bits(tmp_path, unbroken)


def test_show_batch_and_dry_run(tiny, unbroken, tmp_path):
    shown, dry = harness.shown_and_dry(SCRIPT, tiny, unbroken, tmp_path)
    assert re.search(r"train.jsonl line \d+: \d+ tokens of the passage, \d+ gold", shown)
    assert re.search(r"--- gold: \w+", shown)
    assert "\x1b[7m" in shown and "--- query: <ask:" in shown.replace("[CLS]", "")
    assert re.search(r"s/step, [\d.,]+ ex/s, [\d.,]+ tok/s, peak memory", dry)


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tiny, tmp_path):
    keys = ["--learning_rate=1e38", "--warmup_steps=0", "--max_steps=20", "--eval_interval=0"]
    out = harness.printed_before_the_4th_bad_step(SCRIPT, tiny, tmp_path, *keys)
    assert re.search(r"step 2: loss nan, .*train.jsonl: \[\d+", out)


def test_rope_scaling_reaches_the_model_and_its_folder(tiny, tmp_path):
    keys = ["--rope_scaling=('yarn',4.0)", "--max_seq_len=1024"]
    want = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    for name, more in {"full": [], "lora": ["--lora_rank=4"]}.items():
        out_dir, whole = tmp_path / name, tmp_path / f"{name}-whole"
        run(tiny, whole, *keys, *more)
        run(tiny, out_dir, *keys, *more, "--stop_step=3")
        model = run(tiny, out_dir, *keys, *more, "--resume=True").model
        for m in (model, from_pretrained(str(out_dir / "step6"))):
            assert m.config.rope["global"]["scaling"] == want and m.config.max_seq_len == 1024
        assert_equal_bits(out_dir, whole)


# ---- bad input ----
GOOD = {"query": "a", "passage": "tan tama", "spans": [[0, 3]]}


@pytest.mark.parametrize(("change", "message"), [
    ({"spans": [[0, 3], [4, 9]]}, "field 'spans' has [4, 9], expected [start, end] with 0 <="),
    ({"spans": [[-1, 3]]}, "<= 8, the passage's characters"),
    ({"spans": [[3, 3]]}, "field 'spans' has [3, 3]"),
    ({"spans": [[0, 3, 4]]}, "field 'spans' has [0, 3, 4]"),
    ({"spans": [[0, True]]}, "field 'spans' has [0, True]"),
    ({"spans": [0, 3]}, "field 'spans' is [0, 3] (expected list of list)"),
    ({"spans": []}, "field 'spans' is empty"), ({"spans": None}, "field 'spans' is None"),
    ({"spans": [[3, 4]]}, "field 'spans' has [3, 4], spaces alone"),
    ({"answer": [2, 99]}, "field 'answer' has [2, 99]"),
    ({"answer": "tan"}, "field 'answer' has tan"),
    ({"passage": 5}, "field 'passage' is 5 (expected str)"),
    ({"query": None}, "field 'query' is None"),
    ({"query": " "}, "field 'query' is empty")])  # fmt: skip
def test_broken_lines_name_file_line_and_field(change, message, tiny, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, GOOD, GOOD | change])
    with pytest.raises(ValueError) as error:
        run(tiny, tmp_path / "out", f"--data={path}")  # before training begins
    assert str(error.value).startswith(f"{path} line 3: field ") and message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "message"), [
    (["--num_epochs=1"], "max_steps=6, num_epochs=1.0; expected one of"),
    (["--fsdp=full"], "start with torchrun"),
    (["--eval_only=True"], "python -m evals.token_retrieval"),
    (["--init_from=resume"], "init_from='resume' is now --resume=True"),
    (["--chunk_tokens=10"], "'chunk_tokens' is now called 'device_batch_tokens'"),
    (["--passage_window=8", "--window_overlap=8"], "windows of 8 tokens cannot share 8"),
    (["--rope_scaling=('ntk',2.0)"], "expected ('linear', factor)"),
    (["--rope_scaling=('yarn',-2.0)"], "expected ('linear', factor)"),
    (["--queries_per_passage=0"], "queries_per_passage takes >= 1, not 0"),
    (["--data=nowhere.jsonl"], "nowhere.jsonl"),
    (["--lora_rank=2", "--lora_targets=q_prj"], "q_prj"),
    (["--query_max_length=5"], "max_length 5 leaves no room")])  # fmt: skip
def test_bad_settings_say_what_is_expected(tiny, tmp_path, more, message):
    harness.assert_refused(message, SCRIPT, tiny, tmp_path, *more)
