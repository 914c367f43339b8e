"""Data for token retrieval: qa_spans, acerag, annotate.py and the spans of pydocs."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers as tk
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from harness import raises, script, write_jsonl
from harness import read_jsonl as read
from spans import join_spans, squeezed

qa, acerag, pydocs = (script(f"data/{n}/prepare.py") for n in ("qa_spans", "acerag", "pydocs"))
annotate = script("data/annotate.py")


def gzipped(path):
    Path(f"{path}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    return f"{path}.gz"


def quoted(line):
    return [line["passage"][start:end] for start, end in line["spans"]]


def assert_told(told, *parts):
    assert [part for part in parts if part not in told] == [], told


def prepared(module, capsys, out, *argv):
    """The lines that a script writes to the file `out`, and what it prints."""
    module.main([*argv, f"--out={out}"])
    return read(out), capsys.readouterr().out


# ---- spans ----
def test_join_and_trim():
    rng = random.Random(0)
    for _ in range(200):
        spans = [sorted(rng.sample(range(30), 2)) for _ in range(rng.randint(0, 6))]
        inside, joined = {i for start, end in spans for i in range(start, end)}, join_spans(spans)
        assert {i for start, end in joined for i in range(start, end)} == inside
        assert all(a[1] < b[0] for a, b in zip(joined[:-1], joined[1:], strict=True))  # no touch
    assert qa.trim_span("ab  cd \n e", [2, 8]) == [4, 6]
    start, end = qa.trim_span("a   b", [1, 4])
    assert start >= end


def test_sentences():
    first = ("Mr. J. Smith of the U.S. Army paid $3.50 (approx. 3 euros) in Washington D.C. on "
             '3 Feb. He said: "It works!"')  # fmt: skip
    text = first + " Then he left for $3.50. É. Zola wrote no. 5... What? Yes.\nA title\n\nNo end"
    pieces = [text[start:end] for start, end in qa.sentences(text)]
    assert "".join(pieces) == text and qa.sentences("") == [(0, 0)]
    assert [piece.strip() for piece in pieces] == [
        first, "Then he left for $3.50.", "É. Zola wrote no. 5...", "What?", "Yes.", "A title",
        "No end"]  # fmt: skip


# ---- SQuAD ----
CONTEXT = "Köln lies on the Rhine. Its cathedral took 632 years. It is tall 😀. The Rhine is long."


def squad_file(tmp_path, qas):
    articles = {"version": "1.1", "data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(articles))
    return str(tmp_path / "squad.json")


def answered(question, *texts, start=None, **more):
    answers = [{"text": text, "answer_start": CONTEXT.index(text) if start is None else start}
               for text in texts]  # fmt: skip
    return {"question": question, "answers": [answer | more for answer in answers]}


def test_squad(tmp_path, capsys):
    qas = [
        answered("how long?", "Its cathedral", "632 years", "632 years"),  # the most frequent
        answered("first?", "Köln", "the Rhine"),  # the first of equals
        answered("two sentences?", "tall 😀. The Rhine"),
        {"question": "impossible?", "answers": [], "is_impossible": True},
        answered("moved?", "Köln", start=1),
        answered("where?", "Rhine", n_occurrences=2)]  # fmt: skip
    path = squad_file(tmp_path, qas)
    argv, out = ["--format=squad", f"--input={path}"], tmp_path / "new" / "out.jsonl"
    lines, told = prepared(qa, capsys, out, *argv)
    assert [line["query"] for line in lines] == ["how long?", "first?", "two sentences?"]
    assert [quoted(line) for line in lines] == [
        ["Its cathedral took 632 years."], ["Köln lies on the Rhine."],
        ["It is tall 😀. The Rhine is long."]]  # fmt: skip
    answers = [line["passage"][slice(*line["answer"])] for line in lines]
    assert answers == ["632 years", "Köln", "tall 😀. The Rhine"]
    assert all(line["passage"] == CONTEXT for line in lines)
    assert_told(told, "out.jsonl: 3 questions", "left out, no answer: 1",
                "place of the answer not known: 1",
                "left out, the answer is not where it should be: 1")  # fmt: skip
    argv = ["--format=squad", "--gold=answer", f"--input={gzipped(path)}"]
    lines, _ = prepared(qa, capsys, tmp_path / "a.jsonl", *argv)
    assert [quoted(line) for line in lines] == [[a] for a in answers]


def test_squad_from_the_hub(tmp_path, monkeypatch):
    """Its rows have columns of answers; the lines are those of the file."""
    given = answered("how long?", "632 years", "years")
    columns = {"text": ["632 years", "years"],
               "answer_start": [a["answer_start"] for a in given["answers"]]}  # fmt: skip
    rows = Dataset.from_list([{"question": "how long?", "context": CONTEXT, "answers": columns}])

    def load(name, config, split):
        assert (name, config, split) == ("rajpurkar/squad", None, "validation")
        return rows

    monkeypatch.setattr("datasets.load_dataset", load)
    out = ["--split=validation", f"--out={tmp_path}/hub.jsonl"]
    qa.main(["--format=squad", *out])
    path = squad_file(tmp_path, [given])
    qa.main(["--format=squad", f"--input={path}", f"--out={tmp_path}/file.jsonl"])
    assert read(tmp_path / "hub.jsonl") == read(tmp_path / "file.jsonl") != []
    raises(SystemExit, "QED is not on the hub", qa.main, ["--format=qed", *out])


# ---- QED ----
QED = "Howl is a film . It was made by Miyazaki in Tokyo . The book , by Jones , came first ."


def pair(text, context=QED):
    return [context.index(text), context.index(text) + len(text)]


def span(text, context=QED):
    start, end = pair(text, context)
    return {"start": start, "end": end, "string": text}


def qed_records():
    """One of each type in the published form, and the same in the short one."""
    starts = [0, QED.index("It was"), QED.index("The book")]
    base = {"paragraph_text": QED, "sentence_starts": starts, "title_text": "Howl"}
    howl, sentence = span("howl", "who made howl"), "It was made by Miyazaki in Tokyo . "
    answer = dict.fromkeys(("paragraph_reference", "sentence_reference"), span("Miyazaki"))
    refs = [span("It") | {"bridge": False}, span("a film") | {"bridge": False},
            {"start": -1, "end": -1, "string": "", "bridge": "of"}]  # fmt: skip
    equal = [{"question_reference": howl, "sentence_reference": ref} for ref in refs]
    single = base | {
        "question_text": "who made howl", "original_nq_answers": [[span("Miyazaki in Tokyo")]],
        "annotation": {"explanation_type": "single_sentence", "selected_sentence": span(sentence),
                       "answer": [answer], "referential_equalities": equal}}  # fmt: skip
    multi = base | {"question_text": "who were they",
                    "original_nq_answers": [[span("Miyazaki")], [span("Jones")]],
                    "annotation": {"explanation_type": "multi_sentence"}}  # fmt: skip
    none = multi | {"annotation": {"explanation_type": "none"}}

    def short(question, kind, *answers, **more):
        plain = {"paragraph": QED, "sentence_starts": starts, "selected_sentence": None, "refs": []}
        answers = [pair(text) for text in answers]
        return plain | {"question": question, "type": kind, "answers": answers} | more

    places = [{"paragraph": [ref["start"], ref["end"]]} for ref in refs]
    shorts = [short("who made howl", "single_sentence", "Miyazaki", refs=places,
                    selected_sentence=pair(sentence)),
              short("who were they", "multi_sentence", "Miyazaki", "Jones"),
              short("who", "none", "Howl")]  # fmt: skip
    return [single, multi, none], shorts


def test_qed(tmp_path, capsys):
    published, short = qed_records()
    for name, records in (("published", published), ("short", short)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", records)
        argv = ["--format=qed", f"--input={gzipped(path) if name == 'short' else path}"]
        (single, multi), told = prepared(qa, capsys, tmp_path / "out.jsonl", *argv)
        assert "left out, no correct answer (type none): 1" in told
        assert quoted(single) == ["a film", "It was made by Miyazaki in Tokyo ."]
        assert single["query"] == "who made howl" and QED[slice(*single["answer"])] == "Miyazaki"
        assert quoted(multi) == [  # two neighbours: one span
            "It was made by Miyazaki in Tokyo . The book , by Jones , came first ."]  # fmt: skip
        lines, _ = prepared(qa, capsys, tmp_path / "a.jsonl", "--gold=answer", *argv)
        assert [quoted(line) for line in lines] == [["Miyazaki"], ["Miyazaki", "Jones"]]
    moved = json.loads(json.dumps(published[0]))
    moved["annotation"]["answer"][0]["paragraph_reference"]["start"] += 1
    path = write_jsonl(tmp_path / "moved.jsonl", [moved, published[1]])
    argv = ["--format=qed", f"--input={path}"]
    lines, told = prepared(qa, capsys, tmp_path / "out.jsonl", *argv)
    assert len(lines) == 1 and "left out, a span is not where it should be: 1" in told


def test_val_and_without(tmp_path):
    """A passage is on one side, with all of its questions; the sides together are all."""
    contexts = [f"Passage number {i} is short." for i in range(60)]
    records = [
        qed_records()[1][1] | {"question": f"q{k} {c}", "paragraph": c, "sentence_starts": [0],
                               "answers": [[0, 7]]} for c in contexts for k in range(2)
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "in.jsonl", records)
    test = write_jsonl(tmp_path / "test.jsonl", [{"passage": contexts[3]}, {"passage": "other"}])
    qa.main(["--format=qed", f"--input={path}", f"--out={tmp_path}/t.jsonl", "--val_share=0.3",
             f"--val_out={tmp_path}/v.jsonl", f"--without={test}"])  # fmt: skip
    train, val = (read(tmp_path / f"{s}.jsonl") for s in "tv")
    sides = [{line["passage"] for line in side} for side in (train, val)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(contexts) - {contexts[3]}
    assert len(train) + len(val) == 118 and 20 < len(val) < 56


# ---- HotpotQA ----
def test_hotpot(tmp_path, monkeypatch, capsys):
    context = [["Ed Wood", ["Ed Wood is a film.", " It stars Woody, a woodsman.", " The end."]],
               ["Scott D.", ["Scott was born in 1966.", " He likes wood."]]]  # fmt: skip
    base = {"_id": "1", "type": "bridge", "level": "hard", "context": context}
    facts = [["Ed Wood", 1], ["Ed Wood", 2], ["Scott D.", 1]]
    records = [base | {"question": "what?", "answer": "wood", "supporting_facts": facts},
               base | {"question": "same?", "answer": "yes", "supporting_facts": facts[:1]},
               base | {"question": "gone?", "answer": "x", "supporting_facts": [["Ed Wood", 9]]}]
    (tmp_path / "hotpot.json").write_text(json.dumps(records))
    argv = ["--format=hotpot", f"--input={tmp_path}/hotpot.json"]
    (first, second), told = prepared(qa, capsys, tmp_path / "file.jsonl", *argv)
    assert first["passage"] == (
        "Ed Wood\nEd Wood is a film. It stars Woody, a woodsman. The end.\n\n"
        "Scott D.\nScott was born in 1966. He likes wood.")  # fmt: skip
    assert quoted(first) == ["It stars Woody, a woodsman. The end.", "He likes wood."]
    start, end = first["answer"]  # the word, not a part of Woody or woodsman
    assert first["passage"][start - 6 : end + 1] == "likes wood."
    assert quoted(second) == ["It stars Woody, a woodsman."] and "answer" not in second
    assert "left out, a supporting sentence is not there: 1" in told
    lines, _ = prepared(qa, capsys, tmp_path / "a.jsonl", "--gold=answer", *argv)
    assert [quoted(line) for line in lines] == [["wood"]]

    columns, rows = {"title": [t for t, _ in context], "sentences": [s for _, s in context]}, []
    for r in records:
        titles, places = zip(*r["supporting_facts"], strict=True)
        facts = {"title": titles, "sent_id": places}
        rows.append(r | {"context": columns, "supporting_facts": facts})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, split: Dataset.from_list(rows))
    assert prepared(qa, capsys, tmp_path / "hub.jsonl", "--format=hotpot")[0] == [first, second]


def test_qa_errors(tmp_path):
    _, short = qed_records()
    long = short[0] | {"selected_sentence": [0, 999]}
    write_jsonl(tmp_path / "a.jsonl", [short[1], long])
    write_jsonl(tmp_path / "b.jsonl", [{"type": "single_sentence", "paragraph": "x"}])
    (tmp_path / "c.json").write_text("[{")
    for kind, name, told in [
        ("qed", "a.jsonl", r"a\.jsonl line 2: span \[0, 999\] is not in the passage"),
        ("qed", "b.jsonl", r"b\.jsonl line 1: no key 'answers'"),
        ("hotpot", "c.json", r"c\.json: not JSON")]:  # fmt: skip
        with pytest.raises(ValueError, match=told):
            qa.main([f"--format={kind}", f"--input={tmp_path}/{name}", f"--out={tmp_path}/o.jsonl"])
    assert not os.path.exists(tmp_path / "o.jsonl")


# ---- AceRAG ----
PROMPT = f"Answer with the passages.\n{acerag.TAG}\n\nQuestion: who?\nAnswer:"
TEMPLATE = ("{% for m in messages %}[INST] {{ m['content'].strip() }} [/INST]{% endfor %}"
            "{% if add_generation_prompt %} {% endif %}")  # fmt: skip
WORDS = "the red fox Köln jumps over 日本語 lazy dogs 😀 and naïve cats sleep 12345 nights".split()


def texts(n, seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        gaps = (" ", " ", " ", "  ", "\n", "\n\n")
        yield "".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(rng.randint(20, 60)))


@pytest.fixture(scope="module", params=["bytes", "metaspace", "wordpiece"])
def tokenizer(request):
    """Offsets with the space in front (bytes, sentencepiece) and without any space (WordPiece)."""
    size = dict(vocab_size=420, show_progress=False)
    before, after, train = tk.pre_tokenizers, tk.decoders, tk.trainers
    model, pre_tokenizer, decoder, trainer = {
        "bytes": (tk.models.BPE(), before.ByteLevel(add_prefix_space=False), after.ByteLevel(),
                  train.BpeTrainer(initial_alphabet=before.ByteLevel.alphabet(), **size)),
        "metaspace": (tk.models.BPE(unk_token="<unk>"), before.Metaspace(), after.Metaspace(),
                      train.BpeTrainer(special_tokens=["<unk>"], **size)),
        "wordpiece": (tk.models.WordPiece(unk_token="[UNK]"), before.BertPreTokenizer(),
                      after.WordPiece(), train.WordPieceTrainer(special_tokens=["[UNK]"], **size)),
    }[request.param]  # fmt: skip
    inner = tk.Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoder
    if request.param == "wordpiece":
        inner.normalizer = tk.normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    inner.train_from_iterator([*texts(40), PROMPT, "[INST] [/INST]"], trainer)
    bos = {"bos_token": "<s>"} if request.param == "metaspace" else {}  # Llama-2's; Qwen3 has none
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **bos)
    tokenizer.add_tokens([acerag.TAG], special_tokens=True)  # as AceRAG's training does
    return tokenizer


def as_acerag_does(tokenizer, prompt, context, window):
    """The ids that gold_indices count, by its rule, on ids alone."""

    def ids(content):
        chat = [{"role": "user", "content": content}]
        encoded = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        return encoded["input_ids"]

    a, b = ids(prompt), ids(prompt.replace(acerag.TAG, context))
    head = next(i for i in range(len(a)) if a[i] != b[i])
    tail = next(i for i in range(len(a)) if a[-1 - i] != b[-1 - i])
    middle, room = b[head : len(b) - tail], (window - head - tail) * 8
    if len(middle) > room:
        middle = middle[: room // 2] + middle[-(room // 2) :]
    bos, out = [tokenizer.bos_token_id] * bool(tokenizer.bos_token_id), []
    for i in range(0, len(middle), window - len(bos)):
        out += bos + middle[i : i + window - len(bos)]
    return out


def test_acerag_spans_have_the_gold_tokens_text(tokenizer):
    """Whatever tokens are gold, the spans spell what these tokens spell, and nothing else."""
    rng, exact, windows = random.Random(1), 0, 0
    brackets = ["[1] The fox jumps over it, and [2]", "[CON] jumps, he said [TEXT]"]  # like the tag
    for context in [*texts(30, seed=2), *brackets]:
        ids = as_acerag_does(tokenizer, PROMPT, context, 40)
        found = acerag.context_tokens(tokenizer, PROMPT, context, acerag.TAG, 40)
        places, passage, middle = found
        assert len(places) == len(ids) and passage == context and middle is None
        if tokenizer.bos_token:  # one in front of each window, with no character
            begins = [k for k, i in enumerate(ids) if i == tokenizer.bos_token_id]
            assert begins == list(range(0, len(ids), 40)) and not acerag.spans_of(places, begins)[0]
            windows += len(begins) > 1
        starts = rng.sample(range(len(ids)), 3)
        gold = sorted({k for s in starts for k in range(s, min(s + rng.randint(1, 6), len(ids)))})
        spans, empty, more = acerag.spans_of(places, gold)
        assert not any(context[start:end] == "" for start, end in spans)
        if empty or more:
            continue  # reported: a prefix space, or some bytes of a character
        got = squeezed("".join(context[start:end] for start, end in spans))
        # token by token: WordPiece's decoder would put its own spaces
        decoded = squeezed("".join(tokenizer.decode([ids[k]]).removeprefix("##") for k in gold))
        if "�" not in decoded:
            pattern = re.sub(r"<unk>|\\\[unk\\\]", ".+?", re.escape(decoded))
            assert re.fullmatch(pattern, got), (decoded, got)
            exact += 1
        hit = {k for k, (a, b) in enumerate(places) for s, e in spans if a < e and s < b}
        assert hit == set(gold)
    assert exact >= 12 and (windows > 3 or not tokenizer.bos_token)


def test_acerag_cuts_the_middle_as_it_does(tokenizer):
    context, window = " ".join(texts(20, seed=3)), 60
    ids = as_acerag_does(tokenizer, PROMPT, context, window)
    found = acerag.context_tokens(tokenizer, PROMPT, context, acerag.TAG, window)
    places, passage, (start, end) = found
    assert len(places) == len(ids) and (np.diff(places[:, 0]) >= 0).all() and end - start > 100
    assert passage == context[:start] + context[end:] and places.max() <= len(passage)
    exact = 0
    for k in range(len(ids)):
        spans, empty, more = acerag.spans_of(places, [k])
        piece = tokenizer.decode([ids[k]]).removeprefix("##")
        if not (empty or more or "�" in piece or "unk" in piece.lower()):
            ((a, b),) = spans
            ((c, d),) = acerag.put_back(spans, (start, end))
            assert squeezed(passage[a:b]) == squeezed(context[c:d]) == squeezed(piece)
            exact += 1
    assert exact > 0.6 * len(ids)
    across = acerag.put_back([[start - 2, start + 3]], (start, end))
    assert across == [[start - 2, start], [end, end + 3]]  # what was taken out is not gold


def row(query, context, gold, prompt=PROMPT):
    chats = [{"prompt": prompt, "context": context}, {"role": "assistant", "content": "x"}]
    return {"query": query, "conversations": chats, "gold_indices": [gold]}


def test_acerag_main(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tok")
    context = next(texts(1, seed=5))
    n = len(as_acerag_does(tokenizer, PROMPT, context, 4096))
    rows = [row("ok", context, [4, 5, 9]), row("past the end", context, [n]),
            row("negative", context, [-1]), row("no gold", context, []),
            row("no tag", context, [1], "Answer:"),
            row("two lists", context, [1]) | {"gold_indices": [[1], [2]]},
            row("stripped", context + "\n", [1], acerag.TAG),  # the template strips it
        ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(rows), "utf-8")
    write_jsonl(tmp_path / "lines.json", rows)
    tok = f"--tokenizer={tmp_path}/tok"
    for name in ("list", "lines"):
        argv = [f"--input={tmp_path}/{name}.json", tok]
        lines, told = prepared(acerag, capsys, tmp_path / f"{name}.jsonl", *argv)
        assert [line["query"] for line in lines] == ["ok"]
        assert lines[0]["passage"] == context and all(quoted(lines[0]))
        assert_told(told, "refused: 6, reported as not exact: 0", "line 5: refused: the prompt has",
                    f"line 2: refused: token {n} of {n}: not the tokenizer",
                    "line 6: refused: 1 contexts for 2 lists",
                    "line 7: refused: the chat template changes the context")  # fmt: skip

    # gold behind the first window is kept, and of a longer context the middle is there or not
    long, out = " ".join(texts(20, seed=3)), tmp_path / "o"
    n = len(as_acerag_does(tokenizer, PROMPT, long, 60))
    late = write_jsonl(tmp_path / "late.jsonl", [row("late", long, [2, 70, n - 2])])
    argv = [f"--input={late}", tok, "--window=60"]
    (whole,), told = prepared(acerag, capsys, out, *argv)
    (cut,), silent = prepared(acerag, capsys, out, *argv, "--cut_middle")
    assert whole["passage"] == long and len(cut["passage"]) < len(long) and quoted(whole)
    assert quoted(cut) == quoted(whole) and "characters in the middle" in told
    assert "middle" not in silent and f"line 1, 'late': {' | '.join(quoted(cut))}" in silent

    bad = write_jsonl(tmp_path / "bad.jsonl", [rows[0], row("x", context, ["1"])])
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2: field 'gold_indices' is \['1'\]"):
        prepared(acerag, capsys, out, f"--input={bad}", tok)
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepared(acerag, capsys, out, f"--input={tmp_path}/none*", tok)


def test_acerag_reports_bytes_of_a_character(tmp_path, capsys):
    vocab = {c: i for i, c in enumerate(sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}
    inner = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "tok")
    path = write_jsonl(tmp_path / "in.jsonl", [row("q", "ab😀cd", [1, 3])])  # b, one of 4 bytes
    argv, out = [f"--input={path}", f"--tokenizer={tmp_path}/tok"], tmp_path / "out.jsonl"
    (line,), told = prepared(acerag, capsys, out, *argv)
    assert "line 1: not exact: 3 more tokens share a character with the gold ones" in told
    assert "refused: 0, reported as not exact: 1" in told and quoted(line) == ["b😀"]
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit, match="no chat template"):
        acerag.main([argv[0], f"--tokenizer={tmp_path}/plain", f"--out={out}"])


# ---- annotate.py ----
def answer_to(name, content, status=200, error=None):
    body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return {"custom_id": name, "response": {"status_code": status, "body": body}, "error": error}


def test_annotate_round_trip(tmp_path, capsys):
    passage = "The  cat sat.\nThe cat ran to Köln 😀 in 1999 (it was {wet}). A dog sat.\n"
    lines = [{"query": f"query {i}", "passage": f"{i}: {passage}"} for i in range(9)]
    source = write_jsonl(tmp_path / "in.jsonl", lines)
    ask = ["ask", "--model=some-model", "--max_requests=4", "--out", str(tmp_path / "ask")]
    annotate.main([*ask, "--input", source])
    names = sorted(os.listdir(tmp_path / "ask"))
    assert names == [f"requests_00{i}.jsonl" for i in (1, 2, 3)]
    requests = [r for name in names for r in read(tmp_path / "ask" / name)]
    assert len({r["custom_id"] for r in requests}) == len(requests) == 9
    for i, request in enumerate(requests):
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        assert request["body"]["model"] == "some-model"
        (message,) = request["body"]["messages"]
        assert f"query {i}\n" in message["content"] and f"{i}: {passage}" in message["content"]

    def quotes(*some):
        return json.dumps({"quotes": some}, ensure_ascii=False)

    contents = [
        quotes("Köln 😀 in 1999", "A dog"), quotes("The cat sat."),  # two spaces in the passage
        quotes("ran to", "to Köln", "(it was {wet})"),  # the first two overlap
        quotes("The cat", "a horse", "A dog sat."),  # twice, not at all, once
        quotes("köln"), "```json\n" + quotes("1999") + "\n```",  # not as it is written; fenced
        "I think it is 1999", quotes()]  # fmt: skip
    answers = [answer_to(r["custom_id"], c) for r, c in zip(requests, contents, strict=False)]
    answers[7] = answer_to(requests[7]["custom_id"], "", status=429)
    random.Random(0).shuffle(answers)
    answers.append(answer_to("77-abc", quotes("x")))
    files = [write_jsonl(tmp_path / f"a{i}.jsonl", answers[i::2]) for i in (0, 1)]
    capsys.readouterr()
    out, read_them = tmp_path / "new" / "spans.jsonl", ["read", "--input", source]
    lines, told = prepared(annotate, capsys, out, *read_them, "--answers", *files)
    assert [(line["query"][-1], quoted(line)) for line in lines] == [
        ("0", ["Köln 😀 in 1999", "A dog"]), ("1", ["The  cat sat."]),
        ("2", ["ran to Köln", "(it was {wet})"]), ("3", ["A dog sat."]), ("5", ["1999"]),
    ]  # fmt: skip
    assert_told(
        told, "line 4: a quote that occurs more than once: 'The cat'",
        "line 4: a quote that does not occur: 'a horse'", "line 5: left out, nothing is marked",
        "line 5: a quote that does not occur: 'köln'",
        "line 7: left out: the answer is not the JSON that was asked for",
        "line 8: left out: no answer: 429", "line 9: left out, there is no answer to it",
        "1 answers are to no line", "77-abc", "spans.jsonl: 5 lines", "quotes found: 8",
    )  # fmt: skip

    other = write_jsonl(tmp_path / "other.jsonl", [{"query": "q", "passage": "the cat"}])
    argv = ["read", "--input", other, "--answers", *files]
    assert prepared(annotate, capsys, out, *argv)[0] == []  # the answers are to other texts
    with pytest.raises(ValueError, match=r"a0\.jsonl line 1: a second answer"):
        prepared(annotate, capsys, out, *read_them, "--answers", files[0], files[0])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"query": "q"}])
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1: field 'passage' is missing"):
        annotate.main([*ask, "--input", bad])


def test_quotes_are_found_where_they_are():
    assert annotate.find("a a", "a a a") == [(0, 3), (2, 5)]  # overlaps count: not once
    assert annotate.find("art", "We start now.") == [] == annotate.find("19", "in 1998")
    assert annotate.find("(art)", "x(art)y") == [(1, 6)]
    assert annotate.find("a.c (x", "abc a.c\t(x") == [(4, 10)]  # no pattern
    assert annotate.find("  ", "a  b") == []


# ---- pydocs ----
def doc(name, summary, body, module="pkg.mod"):
    return {"module": module, "name": name, "signature": f"{name}()", "summary": summary,
            "body": body}  # fmt: skip


BODY = "It takes the {} and gives it back after some work that needs at least twelve words."


def test_pydocs_spans(tmp_path, monkeypatch, capsys):
    docs = [
        doc("pkg.mod", "A module for tests of spans.", BODY.format("module")),
        doc("f", "Return the first of them.", BODY.format("first")),
        doc("g", "Return the second one.", BODY.format("second") + " Return the first of them."),
        doc("h", "See the base class.", BODY.format("third")),
        doc("i", "See the base class!", BODY.format("fourth")),
        doc("j", "Only a summary, of enough words to be a document.", ""),
        doc("k", "A short body is no pair.", "Four words, no more.")]  # fmt: skip
    lines = list(pydocs.span_lines(docs))
    # f's summary is written in g, h and i share theirs, j and k are no pairs
    assert [(line["name"], line["query"]) for line in lines] == [
        ("pkg.mod", "A module for tests of spans."), ("g", "Return the second one.")]  # fmt: skip
    (passage,) = {line["passage"] for line in lines}
    assert quoted(lines[0]) == [docs[0]["body"]] and quoted(lines[1]) == [docs[2]["body"]]
    assert docs[5]["summary"] in passage and docs[6]["body"] in passage
    assert not any(d["summary"] in passage for d in docs if d["name"] in ("pkg.mod", "g", "h", "k"))

    # long modules in parts, small ones left out, the topics never
    many, topic = (
        [doc(f"n{i}", f"Summary number {i} of it.", BODY.format(i), module) for i in range(n)]
        for module, n in (("pkg.long", 40), ("pydoc_data.topics", 9)))  # fmt: skip
    small = [doc("s", "Small.", BODY.format(1), "pkg.small")] * 3
    monkeypatch.setattr(pydocs, "PASSAGE_CHARS", 1000)
    parts = pydocs.passages_of(docs[:4] + many + small + topic)
    assert [d for part in parts for d in part] == docs[:4] + many and len(parts) == 5
    assert all(sum(len(pydocs.entry_of(d)) for d in part) <= 1000 for part in parts)

    monkeypatch.setattr(pydocs, "split_of", lambda m: "test" if m == "pkg.long" else "train")
    pydocs.write_spans(docs + many, str(tmp_path))
    assert "test spans       40, of 4 passages" in capsys.readouterr().out
    names = [line["name"] for line in read(tmp_path / "spans_test.jsonl")]
    assert names == [f"n{i}" for i in range(40)]  # in their order
    assert read(tmp_path / "spans_train.jsonl") == lines and not read(tmp_path / "spans_val.jsonl")
