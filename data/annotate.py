"""
Let a language model mark what matters in a passage for a query: spans for token retrieval.

    python data/annotate.py ask --input pairs.jsonl --out out/ask --model=gpt-4o
    python data/annotate.py read --input pairs.jsonl --answers out/ask/answers*.jsonl \\
        --out data/mine/spans.jsonl

ask turns lines {"query", "passage"} into requests of the batch API that OpenAI has, and others, as
vLLM, have as well: out/ask/requests_001.jsonl, at most 50,000 requests or 150 MB each. Send
them with the client of your choice; nothing is sent from here.
read turns the answers into {"query", "passage", "spans": [[start, end], ..]}.

The model is asked for quotes, not for numbers, which it cannot count. A quote marks the characters
where it occurs, and spaces may differ in kind and number. Nothing is guessed:
- A quote that does not occur in the passage marks nothing and is reported.
- A quote that occurs more than once marks nothing and is reported, too: the model was asked for as
  many words as tell it from the rest.
- A line with no mark left, without an answer or with an answer that is no JSON is left out and
  reported.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # the project
from data import read_jsonl, require  # noqa: E402
from spans import join_spans  # noqa: E402

PROMPT = """\
You mark the parts of a passage that are needed to answer a query.

Query:
{query}

Passage:
{passage}

Copy out of the passage, word for word, every part that is needed to answer the query: names, \
numbers, dates and the words that connect them. Leave out what is not needed. Copy exactly, \
spelling and punctuation included. Where the same words stand in the passage more than once, copy \
enough words around them that the quote occurs only once. If nothing in the passage helps, give an \
empty list.

Answer with JSON only: {{"quotes": ["...", "..."]}}"""


def request_id(query: str, passage: str, line: int) -> str:
    """The line, and a hash of its texts: answers to other texts are noticed."""
    digest = hashlib.sha256(f"{query}\0{passage}".encode("utf-8", "replace")).hexdigest()
    return f"{line}-{digest[:12]}"


def texts_of(path: str):
    """Yield (id, line, query, passage) of each line of a file."""
    for line, record in read_jsonl(path):
        query, passage = (require(record, field, str, path, line) for field in ("query", "passage"))
        yield request_id(query, passage, line), line, query, passage


def ask(args):
    os.makedirs(args.out, exist_ok=True)
    files, size, out = 0, 0, None
    for n, (name, _, query, passage) in enumerate(tqdm(texts_of(args.input), "requests")):
        content = PROMPT.format(query=query, passage=passage)
        body = {"model": args.model, "messages": [{"role": "user", "content": content}]}
        body["response_format"] = {"type": "json_object"}
        request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        text = (json.dumps(request) + "\n").encode()
        if out is None or n % args.max_requests == 0 or size + len(text) > args.max_bytes:
            if out is not None:
                out.close()
            files, size = files + 1, 0
            out = open(os.path.join(args.out, f"requests_{files:03d}.jsonl"), "wb")  # noqa: SIM115
        out.write(text)
        size += len(text)
    if out is None:
        raise SystemExit(f"{args.input}: there is no line in it")
    out.close()
    print(f"{args.out}: {n + 1:,} requests in {files} files")


def quotes_of(answer: dict) -> list[str]:
    """The quotes in a line of the batch's output. ValueError says what is wrong with it."""
    response = answer.get("response") or {}
    if answer.get("error") or response.get("status_code") != 200:
        raise ValueError(f"no answer: {answer.get('error') or response.get('status_code')!r:.200}")
    try:
        content = response["body"]["choices"][0]["message"]["content"]
        fence = re.fullmatch(r"\s*```(?:json)?(.*)```\s*", content, re.S)
        quotes = json.loads(fence[1] if fence else content)["quotes"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is not the JSON that was asked for: {error!r:.200}") from None
    if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
        raise ValueError(f"'quotes' is {quotes!r:.60}, expected a list of texts")
    return quotes


def find(quote: str, passage: str) -> list[tuple[int, int]]:
    """[start, end) of each place where a quote occurs, overlapping ones too, but for the kind and
    number of spaces."""
    words = [re.escape(word) for word in quote.split()]
    if not words:
        return []
    # no part of a longer word: "art" is not in "start"
    ends = quote.split()[0][0], quote.split()[-1][-1]
    left, right = (r"\b" if re.match(r"\w", c) else "" for c in ends)
    pattern = re.compile(f"(?=({left}" + r"\s+".join(words) + f"{right}))")
    return [match.span(1) for match in pattern.finditer(passage)]


def read(args):
    answers = {}
    for path in args.answers:
        for line, answer in read_jsonl(path):
            name = require(answer, "custom_id", str, path, line)
            if name in answers:
                raise ValueError(f"{path} line {line}: a second answer to {name!r}")
            answers[name] = answer
    counts = Counter()
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)

    def report(line, what, quote=None):
        counts[what.partition(":")[0]] += 1
        tqdm.write(f"{args.input} line {line}: {what}" + (f": {quote!r}" if quote else ""))

    with open(args.out + ".tmp", "wb") as out:
        for name, line, query, passage in tqdm(texts_of(args.input), "lines"):
            if name not in answers:
                report(line, "left out, there is no answer to it")
                continue
            try:
                quotes = quotes_of(answers.pop(name))
            except ValueError as error:
                report(line, f"left out: {error}")
                continue
            spans = []
            for quote in quotes:
                places = find(quote, passage)
                if len(places) == 1:
                    spans += places
                    counts["quotes found"] += 1
                elif places:
                    report(line, "a quote that occurs more than once", quote)
                else:
                    report(line, "a quote that does not occur", quote)
            if not spans:
                report(line, "left out, nothing is marked")
                continue
            record = {"query": query, "passage": passage, "spans": join_spans(spans)}
            text = json.dumps(record, ensure_ascii=False) + "\n"
            out.write(text.encode("utf-8", "replace"))
            counts["lines"] += 1
    os.replace(args.out + ".tmp", args.out)
    if answers:
        print(f"{len(answers):,} answers are to no line of {args.input}, such as {min(answers)!r}")
    lines = counts.pop("lines", 0)
    print(f"{args.out}: {lines:,} lines")
    print("\n".join(f"{what}: {n:,}" for what, n in counts.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("ask", help="write the requests").add_argument
    add("--input", required=True, help="JSONL with query and passage")
    add("--out", required=True, help="folder for the requests")
    add("--model", required=True, help="its name, for those who serve it")
    add("--max_requests", type=int, default=50_000, help="in a file")
    add("--max_bytes", type=int, default=150_000_000, help="of a file")
    add = commands.add_parser("read", help="turn the answers into spans").add_argument
    add("--input", required=True, help="the same JSONL")
    add("--answers", required=True, nargs="+", help="the files that came back")
    add("--out", required=True, help="the .jsonl to write")
    args = parser.parse_args(argv)
    ask(args) if args.command == "ask" else read(args)


if __name__ == "__main__":
    main()
