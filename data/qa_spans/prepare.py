"""
Questions with the place of their evidence in a passage, for token retrieval: SQuAD, QED, HotpotQA.

    python data/qa_spans/prepare.py --format=squad --input train-v1.1.json --out data/qa_spans/squad_train.jsonl
    python data/qa_spans/prepare.py --format=squad --split=validation --out data/qa_spans/squad_dev.jsonl  # hub
    python data/qa_spans/prepare.py --format=qed --input qed-train.jsonlines --out data/qa_spans/qed_train.jsonl \\
        --val_out data/qa_spans/qed_val.jsonl --val_share=0.05
    python data/qa_spans/prepare.py --format=hotpot --split=train --out data/qa_spans/hotpot_train.jsonl

Files may be gzipped. Written: {"query", "passage", "spans": [[start, end], ..], "answer": [start,
end]}, characters of the passage, end exclusive. "answer" is missing where the answer is not in the
passage (yes, no). What is gold, what is left out and how many lines to expect: see readme.md.
"""  # noqa: E501

import argparse
import gzip
import json
import os
import re
import sys
from collections import Counter

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from data import is_held_out, read_jsonl, require  # noqa: E402
from spans import join_spans  # noqa: E402

HUB = {"squad": ("rajpurkar/squad", None), "hotpot": ("hotpotqa/hotpot_qa", "distractor")}


class Refused(Exception):
    """A question that is left out; the message is the reason, under which it is counted."""


# ---- sentences ----

# a sentence ends here if a space and a capital, a digit or a quote follow; a line ends one, too
END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+(?=[\"'(\[\u201c\u2018]*[^\W_a-z])|\s*\n\s*")
ABBREVIATIONS = set(
    """mr mrs ms dr st mt ft no nos vs inc ltd co corp jr sr gen gov sen rep col capt lt sgt maj
    prof rev hon fig vol ed pp al ca approx
    jan feb mar apr jun jul aug sep sept oct nov dec""".split()
)


def trim_span(text: str, span) -> list[int]:
    """A span of `text` without the spaces at its ends."""
    start, end = span
    inside = text[start:end]
    return [start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())]


def sentences(text: str) -> list[tuple[int, int]]:
    """[start, end) of each sentence; together they are the text. A rule, not a model: it does not
    end one behind an initial ("J. Smith", "the U.S. Army") or a common abbreviation."""
    starts = [0]
    for end in END.finditer(text):
        word = re.search(r"[\w.]*$", text[max(0, end.start() - 20) : end.start()])[0]
        initial = len(word) == 1 and word.isupper() or re.fullmatch(r"([^\W\d]\.)+[^\W\d]", word)
        if end[0][0] != "." or not (initial or word.lower() in ABBREVIATIONS):
            starts.append(end.end())
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def around(pieces, spans):
    """The pieces, [start, end) each, that have a character of any of the spans."""
    return [p for p in pieces if any(p[0] < end and start < p[1] for start, end in spans)]


# ---- the three formats: a record -> (query, passage, spans, answer or None) ----


def from_squad(record: dict, gold: str, path: str, line: int):
    """The answer is the one given most often, the first of them where several are. A file that was
    rebuilt says how often an answer occurs (n_occurrences): more than once, and its place is not
    known."""
    passage = require(record, "context", str, path, line)
    answers = [a for a in record["answers"] if a.get("n_occurrences", 1) == 1]
    if not answers:
        raise Refused("place of the answer not known" if record["answers"] else "no answer")
    places = []
    for a in answers:
        start = require(a, "answer_start", int, path, line)
        if not a["text"] or passage[start : start + len(a["text"])] != a["text"]:
            raise Refused("the answer is not where it should be")
        places.append((start, start + len(a["text"])))
    answer = Counter(places).most_common(1)[0][0]  # of equal ones the first
    spans = around(sentences(passage), [answer]) if gold == "evidence" else [answer]
    return require(record, "question", str, path, line), passage, spans, answer


def from_qed(record: dict, gold: str, path: str, line: int):
    """Evidence is the sentence that was selected, what its names and pronouns refer to, and the
    answer; where more than one sentence is needed QED marks none, and it is those with an answer.
    """
    if "annotation" in record:  # as published; otherwise the short form, see readme.md
        record = short_form(record, path, line)
    passage = require(record, "paragraph", str, path, line)
    if record["type"] == "none":
        raise Refused("no correct answer (type none)")
    answers, selected = record["answers"], record["selected_sentence"]
    if not answers:
        raise Refused("no answer")
    if gold == "answer":
        spans = answers
    elif selected:
        refs = [ref["paragraph"] for ref in record["refs"]]
        spans = [selected, answers[0], *(ref for ref in refs if ref != [-1, -1])]  # -1: unwritten
    else:
        starts = record["sentence_starts"]
        spans = list(zip(starts, [*starts[1:], len(passage)], strict=False))  # none for no starts
        spans = around(spans, answers) or answers
    return require(record, "question", str, path, line), passage, spans, answers[0]


def short_form(record: dict, path: str, line: int) -> dict:
    """QED's published record -> {question, paragraph, type, answers, selected_sentence, ..}"""
    passage = require(record, "paragraph_text", str, path, line)
    given = record["annotation"]

    def place(span):
        if span["start"] >= 0 and passage[span["start"] : span["end"]] != span["string"]:
            raise Refused("a span is not where it should be")
        return [span["start"], span["end"]]

    kind = given["explanation_type"]
    answers = [place(answer["paragraph_reference"]) for answer in given.get("answer", [])]
    if not answers:  # those of all who answered for Natural Questions
        answers = [place(span) for spans in record["original_nq_answers"] for span in spans]
    refs = [place(ref["sentence_reference"]) for ref in given.get("referential_equalities", [])]
    return {
        "question": require(record, "question_text", str, path, line), "paragraph": passage,
        "type": kind, "sentence_starts": record["sentence_starts"], "answers": answers,
        "selected_sentence": place(given["selected_sentence"]) if kind[0] == "s" else None,
        "refs": [{"paragraph": ref} for ref in refs],
    }  # fmt: skip


def from_hotpot(record: dict, gold: str, path: str, line: int):
    """The passage is all paragraphs, distractors too: title, new line, sentences, empty line. Gold
    are the supporting sentences; the answer's first occurrence in them, as words."""
    context, facts = record["context"], record["supporting_facts"]
    if isinstance(context, dict):  # the hub's columns
        context = list(zip(context["title"], context["sentences"], strict=True))
        facts = list(zip(facts["title"], facts["sent_id"], strict=True))
    passage, places = "", {}
    for title, of_title in context:
        passage += ("\n\n" if passage else "") + title + "\n"
        for i, sentence in enumerate(of_title):
            places[title, i] = (len(passage), len(passage) + len(sentence))
            passage += sentence
    if any((title, i) not in places for title, i in facts):
        raise Refused("a supporting sentence is not there")
    spans = [places[title, i] for title, i in facts]
    text = require(record, "answer", str, path, line)
    word, answer = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)"), None
    if text and text not in ("yes", "no"):
        found = (word.search(passage, *span) for span in join_spans(spans))
        answer = next((match.span() for match in found if match), None)
    if gold == "answer":
        if answer is None:
            raise Refused("the answer is not in the supporting sentences")
        spans = [answer]
    return require(record, "question", str, path, line), passage, spans, answer


FORMATS = {"squad": from_squad, "qed": from_qed, "hotpot": from_hotpot}


# ---- files ----


def records_of(args):
    """(path or data set, line or record from 1, record) of the input."""
    if not args.input:
        if args.format not in HUB:
            raise SystemExit("QED is not on the hub: give --input, see readme.md")
        from datasets import load_dataset

        name, config = HUB[args.format]
        for number, record in enumerate(load_dataset(name, config, split=args.split), 1):
            if args.format == "squad":  # columns -> a list, as in the file
                columns = record["answers"]["text"], record["answers"]["answer_start"]
                answers = zip(*columns, strict=True)
                record["answers"] = [{"text": t, "answer_start": start} for t, start in answers]
            yield name, number, record
        return
    for path in args.input:
        if args.format == "qed":
            for number, record in read_jsonl(path):
                yield path, number, record
            continue
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            try:
                records = json.load(f)
            except ValueError as error:
                raise ValueError(f"{path}: not JSON: {error}") from None
        if args.format == "squad":
            paragraphs = [p for article in records["data"] for p in article["paragraphs"]]
            records = [qa | {"context": p["context"]} for p in paragraphs for qa in p["qas"]]
        for number, record in enumerate(records, 1):
            yield path, number, record


def line_of(record: dict, args, path: str, number: int) -> dict:
    """Our line. Refused where there is none; ValueError, which names file and line, for a record of
    another form."""
    try:
        query, passage, spans, answer = FORMATS[args.format](record, args.gold, path, number)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} line {number}: not {args.format}: {error!r}") from None
    for start, end in [*spans, *([answer] if answer else [])]:
        if not 0 <= start < end <= len(passage):
            raise ValueError(
                f"{path} line {number}: span [{start}, {end}] is not in the passage of "
                f"{len(passage)} characters"
            )
    spans = [trim_span(passage, span) for span in join_spans(spans)]
    spans = [span for span in spans if span[0] < span[1]]
    if not query.strip() or not spans:
        raise Refused("empty question or evidence")
    line = {"query": query, "passage": passage, "spans": spans}
    return line | ({"answer": trim_span(passage, answer)} if answer else {})


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--format", required=True, choices=list(FORMATS))
    add("--input", nargs="+", help="files; without it squad and hotpot come from the hub")
    add("--split", default="train", help="of the data set on the hub: train or validation")
    add("--out", required=True, help="the .jsonl to write")
    add("--gold", default="evidence", choices=["evidence", "answer"], help="what the spans are")
    add("--without", help="leave out questions on the passages of this .jsonl (a test set)")
    add("--val_out", help="a second .jsonl: the questions on a share of the passages")
    add("--val_share", type=float, default=0.05, help="that share, by a hash of the passage")
    args = parser.parse_args(argv)
    if args.val_out:
        os.makedirs(os.path.dirname(os.path.abspath(args.val_out)), exist_ok=True)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    lines, refused, gold, total = {False: [], True: []}, Counter(), 0, 0
    kept_apart = {line["passage"] for _, line in read_jsonl(args.without)} if args.without else ()
    for path, number, record in tqdm(records_of(args), "questions", unit=""):
        try:
            line = line_of(record, args, path, number)
            if line["passage"] in kept_apart:
                raise Refused(f"its passage is in {args.without}")
        except Refused as reason:
            refused[str(reason)] += 1
            continue
        gold += sum(end - start for start, end in line["spans"])
        total += len(line["passage"])
        held_out = bool(args.val_out) and is_held_out(line["passage"], args.val_share)
        lines[held_out].append(json.dumps(line, ensure_ascii=False) + "\n")
    for held_out, path in ((False, args.out), (True, args.val_out)):
        if path:
            with open(path + ".tmp", "wb") as f:
                f.writelines(line.encode("utf-8", "replace") for line in lines[held_out])
            os.replace(path + ".tmp", path)
            print(f"{path}: {len(lines[held_out]):,} questions")
    print(f"gold: {gold / max(total, 1):.1%} of the characters")
    for reason, n in refused.items():
        print(f"left out, {reason}: {n:,}")


if __name__ == "__main__":
    main()
