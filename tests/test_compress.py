"""tools/compress.py and sample.py --compress: what of a passage is kept, the page that shows it."""

import json
import math
import random
import re
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import tokenizers as tk

from embedder import Embedder, score_tokens
from formats.huggingface import from_pretrained
from harness import ROOT, execute, raises, write_jsonl
from tokenizer import load_tokenizer
from tools.compress import compress_text, keep, keep_counted, page, share_of, text_of, units_of

SCRIPT = f"{ROOT}/sample.py"
WORDS = "the fox, Köln jumps (over) 日本語 naïve-cats 😀 e\u0301té 12345 👩\u200d💻 it's a".split()


def passages(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        gaps = (" ", " ", " ", "  ", "\n", "\r\n\t", "\u3000")
        body = "".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(rng.randint(1, 60)))
        yield rng.choice(("", " ", "\n")) + body


@pytest.fixture(scope="module", params=["bytes", "metaspace", "wordpiece", "two words"])
def cut(request):
    """A function: passage -> int64 [n, 2], the characters of its tokens, as score_tokens has it.
    Offsets hold the space in front, or no space at all, or bytes of characters, or two words."""
    kind, options = request.param, dict(special_tokens=["<unk>"], show_progress=False)
    tokenizer, trainer = tk.models.BPE(unk_token="<unk>"), tk.trainers.BpeTrainer
    options["vocab_size"] = 400
    if kind == "wordpiece":
        tokenizer, trainer = tk.models.WordPiece(unk_token="<unk>"), tk.trainers.WordPieceTrainer
        options["vocab_size"] = 120
    elif kind == "bytes":
        options["initial_alphabet"] = tk.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tk.Tokenizer(tokenizer)
    tokenizer.pre_tokenizer = {
        "wordpiece": tk.pre_tokenizers.BertPreTokenizer(),
        "bytes": tk.pre_tokenizers.ByteLevel(add_prefix_space=False),
        "metaspace": tk.pre_tokenizers.Metaspace(),
        "two words": tk.pre_tokenizers.FixedLength(7),  # a token goes over the border of words
    }[kind]
    tokenizer.train_from_iterator(list(passages(60, seed=9)), trainer(**options))

    def spans(passage):
        offsets = np.array(tokenizer.encode(passage).offsets, np.int64).reshape(-1, 2)
        return offsets[offsets[:, 0] < offsets[:, 1]]

    return spans


def touched(kept, spans):
    """The tokens that have a character in the kept spans."""
    return {i for i, (a, b) in enumerate(spans.tolist()) if any(a < d and c < b for c, d in kept)}


def in_order(kept, passage):
    assert all(0 <= start < end <= len(passage) for start, end in kept)
    assert all(a[1] < b[0] for a, b in zip(kept[:-1], kept[1:]))


def test_tokens_are_kept_exactly(cut):
    rng = np.random.default_rng(0)
    for passage in passages(12):
        spans = cut(passage)
        scores = rng.standard_normal(len(spans)).astype(np.float32).round(1)  # with equal ones
        for ratio in (1, 2, 3.3, 8, 16, 1e9):
            budget = math.ceil(len(spans) / ratio)
            best = sorted(range(len(spans)), key=lambda i: (-scores[i], i))[:budget]
            kept = keep(scores, spans, passage, ratio, "tokens")
            in_order(kept, passage)
            want = {c for i in best for c in range(*spans[i])}
            for i in set(best) - {0}:  # between tokens in a row there may be a space
                if i - 1 in best:
                    want |= set(range(spans[i - 1][1], spans[i][0]))
            assert {c for start, end in kept for c in range(start, end)} == want


def test_words_are_whole(cut):
    rng = np.random.default_rng(1)
    for passage in passages(10, seed=1):
        spans = cut(passage)
        scores = rng.standard_normal(len(spans)).astype(np.float32)
        words = [m.span() for m in re.finditer(r"\S+", passage)]
        tokens_of = {w: touched([w], spans) for w in words}
        seen = [w for w in words if tokens_of[w]]
        for ratio in (1, 2, 4, 16):
            budget, kept = math.ceil(len(spans) / ratio), keep(scores, spans, passage, ratio)
            in_order(kept, passage)
            for start, end in kept:
                assert any(w[0] == start for w in words) and any(w[1] == end for w in words)
            in_kept = [w for w in seen if any(s <= w[0] and w[1] <= e for s, e in kept)]
            cost = touched(in_kept, spans)
            assert len(cost) <= budget
            # what is left does not hold any other word alone
            for w in set(seen) - set(in_kept):
                reach = touched([v for v in seen if tokens_of[v] & tokens_of[w]], spans)
                assert len(reach - cost) > budget - len(cost) or len(reach) > len(tokens_of[w])
            if ratio == 1:
                assert in_kept == seen
            if in_kept:  # order: the best word that fits is there
                best = max(seen, key=lambda w: max(scores[i] for i in tokens_of[w]))
                if len(tokens_of[best]) <= budget and len(seen) == len(words):
                    overlapping = [v for v in seen if tokens_of[v] & tokens_of[best]]
                    assert best in in_kept or len(overlapping) > 1


def test_words_by_hand():
    passage = "un able cats\n\nrun  far"
    spans = np.array([[0, 2], [2, 7], [7, 12], [12, 14], [14, 17], [17, 19], [19, 22]])
    #                 un      _able   _cats    \n\n      run       _ _       far
    scores = np.array([0.1, 0.9, 0.2, 1.0, 0.3, 0.8, 0.7], np.float32)

    def kept(ratio, *more):
        return [passage[a:b] for a, b in keep(scores, spans, passage, ratio, *more)]

    assert kept(7) == ["able"]  # a token of spaces is the best, and no word
    assert kept(3.5) == ["able", "far"] and kept(7 / 3) == ["able", "run  far"]
    assert kept(7 / 4) == ["able cats\n\nrun  far"] and kept(1) == [passage]
    assert kept(7, "tokens") == ["\n\n"] and kept(3.5, "tokens") == [" able", "\n\n"]
    # neighbours: the nearest first, on the left before the right, as far as there is room
    assert kept(3.5, "words", 1) == ["un able"] and kept(7 / 3, "words", 1) == ["un able cats"]
    assert kept(7 / 4, "words", 1) == ["un able cats", "far"]
    assert kept(7 / 3, "words", 2) == ["un able cats"]
    assert kept(7 / 4, "words", 2) == ["un able cats\n\nrun"]
    assert kept(7 / 3, "tokens", 1) == [" cats\n\nrun"]

    # a word of more tokens than are left is passed over, and so are its neighbours
    scores = np.array([0.9, 0.1, 0.8, 0.2], np.float32)
    spans = np.array([[0, 2], [2, 4], [4, 6], [6, 8]])
    assert keep(scores, spans, "abcd f h", 4) == [[5, 6]]
    assert keep(scores, spans, "abcd f h", 4, "words", 1) == [[5, 6]]
    assert keep(scores, spans, "abcd f h", 2) == [[0, 4]]

    # a token that has two words makes one of them
    spans = np.array([[0, 2], [2, 6], [6, 8]])
    assert units_of("abc def g", spans, "words") == [(0, 3, [0, 7])]
    units = units_of("ab cd e  ", np.array([[0, 5], [5, 9]]), "words")
    assert units == [(0, 1, [0, 5]), (1, 2, [6, 7])]


def test_bytes_of_a_character_and_nothing():
    passage = "a 😀 b"
    spans = np.array([[0, 1], [1, 2], [2, 3], [2, 3], [2, 3], [3, 5]])  # three pieces of one
    scores = np.array([0, 0, 0.1, 0.9, 0.2, 0.8], np.float32)
    assert keep(scores, spans, passage, 6, "tokens") == [[2, 3]]
    assert keep(scores, spans, passage, 2) == [[2, 3]]  # all three, or none
    assert keep(scores, spans, passage, 3) == [[0, 1], [4, 5]]
    assert keep(scores[:2], spans[1:2].repeat(2, 0), " ", 1) == []  # only spaces
    for wrong in (dict(ratio=0.5), dict(ratio=math.nan), dict(ratio=2, neighbours=-1)):
        raises(ValueError, "expected ratio=", keep, scores, spans, passage, **wrong)
    raises(ValueError, "unit 'lines'", keep, scores, spans, passage, 2, "lines")


def test_text_of():
    passage = "one two\nthree  four five"
    assert text_of(passage, []) == "" and text_of(passage, [[0, 3], [8, 13]]) == "one three"
    assert text_of(passage, [[0, 3], [7, 13]]) == "one\nthree"
    assert text_of(passage, [[3, 8], [15, 19]]) == " two\nfour"
    assert share_of([[0, 5], [10, 20]], [[3, 12]]) == pytest.approx(4 / 9)
    assert share_of([], [[3, 12]]) == 0


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    net, tokenizer = from_pretrained(folders["llama"]), load_tokenizer(folders["llama"])
    prompts, path = {"query": "Query: ", "document": ""}, tmp_path_factory.mktemp("embedder")
    embedder = Embedder(net, tokenizer, "last", prompts=prompts, max_length=64)
    embedder.save(f"{path}/step1", sentence_transformers=False)
    return f"{path}/step1"


PASSAGE = "tan molo rima <suke> 😀 & ta Köln\n\n" * 8


def test_compress_is_score_and_keep(folder):
    embedder = Embedder.load(folder, device="cpu", dtype="fp32")
    scores, spans = score_tokens(embedder, ["molo?"], PASSAGE)
    asked = [(4, "words", 0), (8, "tokens", 0), (16, "words", 2)]
    for ratio, unit, neighbours in asked:
        text, kept = compress_text(embedder, "molo?", PASSAGE, ratio, unit, neighbours)
        more = keep(scores[0], spans, PASSAGE, ratio, unit, neighbours)
        assert text == text_of(PASSAGE, kept) and kept and share_of(more, kept) > 0.9
        # the promise, by the tokenizer on the text that comes out
        n, total = (len(embedder.tokenizer(x, add_special_tokens=False)["input_ids"])
                    for x in (text, PASSAGE))  # fmt: skip
        assert n <= math.ceil(total / ratio) and total == len(spans)
        found = keep_counted(embedder.tokenizer, scores[0], spans, PASSAGE, ratio, unit, neighbours)
        assert found == (kept, (n, total))
    # more tokens than promised are what `keep` alone gives, where spaces are tokens
    assert any(len(embedder.tokenizer(text_of(PASSAGE, keep(scores[0], spans, PASSAGE, *a)))[
        "input_ids"]) > math.ceil(len(spans) / a[0]) + 2 for a in asked)  # fmt: skip
    text, kept = compress_text(embedder, "molo?", PASSAGE, 1)
    assert kept == [[0, len(PASSAGE.rstrip())]] and text == PASSAGE.rstrip()


class Page(HTMLParser):
    """The text of .passage with the classes of each character; tags that do not close are errors"""

    def __init__(self, text):
        super().__init__()
        self.open, self.passage, self.names, self.tags, self.heading = [], "", [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if ("h1", "") in self.open:
            self.heading += text
        if ("div", "passage") in self.open:
            self.passage += text
            inner = self.open[-1][1].split() if self.open[-1][0] == "span" else []
            self.names += [set(inner)] * len(text)


def test_page(cut):
    rng, query = np.random.default_rng(2), 'Is <script>alert("1")</script> & so on?'
    for i, passage in enumerate(passages(10, seed=2)):
        passage += ' <b class="x">&amp; </div>' * (i % 2)
        spans = cut(passage)
        scores = rng.standard_normal(len(spans)).astype(np.float32)
        kept = keep(scores, spans, passage, 4)
        gold = [[0, len(passage) // 2], [len(passage) - 1, len(passage)]] if i % 3 else []
        text = page(query, passage, scores, spans, kept, (3, len(spans)), gold)
        parsed = Page(text)
        assert parsed.heading == query and parsed.passage == passage
        heat = np.full(len(passage), -np.inf)
        for (start, end), score in zip(spans.tolist(), scores):
            heat[start:end] = np.maximum(heat[start:end], score)
        steps = [0] * len(passage)
        for c, names in enumerate(parsed.names):
            assert ("k" in names) == any(a <= c < b for a, b in kept)
            assert ("g" in names) == any(a <= c < b for a, b in gold)
            steps[c] = max([int(n[1:]) for n in names if n[0] == "h"], default=0)
        order = np.argsort(heat, kind="stable")
        assert (np.diff(np.array(steps)[order]) >= 0).all()  # a higher score, no weaker ground
        assert steps[int(heat.argmax())] == 9 or len(spans) == 1
        # one page, nothing from elsewhere
        assert not any("src" in attrs or "href" in attrs for _, attrs in parsed.tags)
        assert not re.search(r"url\(|@import|https?:", text.replace(escape(passage), ""))
        assert ("of the gold" in text) == bool(gold)
        assert "prefers-color-scheme: dark" in text and 'charset="utf-8"' in text
    assert f"3 of {len(spans)} tokens kept" in text


def test_page_of_equal_scores():
    """No division by nothing; and a long passage does not take a span for each character."""
    spans = np.array([[i, i + 2] for i in range(0, 4000, 2)])
    text = page("q", "ab" * 2000, np.ones(2000, np.float32), spans, [[0, 2]], (1, 2000))
    assert Page(text).passage == "ab" * 2000 and len(text) < 4000 + 4000


def test_script(folder, tmp_path, capsys):
    model, txt = f"--model={folder}", tmp_path / "passage.txt"
    txt.write_bytes(PASSAGE.replace("\n\n", "\r\n").encode())
    html = tmp_path / "out.html"
    execute([SCRIPT, model, "--compress=molo?", f"--file={txt}", "--ratio=4", f"--html={html}",
             "--spans=((0, 8),)", "--window=64", "--overlap=16", "--dtype=fp32"])  # fmt: skip
    run = capsys.readouterr()
    passage, parsed = txt.read_bytes().decode(), Page(html.read_bytes().decode())
    assert parsed.heading == "molo?" and parsed.passage == passage
    kept = json.loads(re.search(r"^spans: (.*)", run.out, re.M)[1])
    assert "may mean little" in run.out  # this model has not been trained for it
    bold = [c for c, names in enumerate(parsed.names) if "k" in names]
    assert bold == [c for start, end in kept for c in range(start, end)]
    assert [c for c, names in enumerate(parsed.names) if "g" in names] == list(range(8))
    assert "of the gold's characters" in run.out and "windows" in run.err
    printed = run.out.split("molo?\n\n")[1].split("\n\nspans:")[0]
    assert text_of(passage, kept).split() == printed.split()

    lines = [{"query": f"q{i}", "passage": f"{i} tan molo rima", "spans": [[2, 5]]} for i in (1, 2)]
    path = write_jsonl(tmp_path / "x.jsonl", lines)
    execute([SCRIPT, model, "--compress=", f"--file={path}", "--line=2", "--ratio=1"])
    out = capsys.readouterr().out
    assert "q2\n\n2 tan molo rima\n" in out and "gold's characters 100% are kept" in out


def test_script_errors(tmp_path):
    """What is asked for is checked before a model is read."""
    txt = tmp_path / "passage.txt"
    txt.write_text("tan molo")
    lines = write_jsonl(tmp_path / "x.jsonl", [{"passage": "abc", "spans": [[1, 9]]}])
    for arguments, told in (
        ((), "--compress wants the passage: --file="),
        (("--rank=x", f"--file={txt}"), "give --model=... and one of"),
        ((f"--file={txt}", "--spans=((5, 5),)"), r"passage.txt: span \(5, 5\) is not in its 8"),
        ((f"--file={lines}",), r"x.jsonl: span \[1, 9\] is not in its 3 characters"),
        ((f"--file={lines}", "--line=2"), "x.jsonl has no line 2")):  # fmt: skip
        raises(SystemExit, told, execute, [SCRIPT, "--model=no/such", "--compress=q", *arguments])
