"""
AceRAG's data for token retrieval: from places of tokens to places of characters.

    python data/acerag/prepare.py --tokenizer=NousResearch/Llama-2-7b-chat-hf --out data/acerag/train.jsonl
    python data/acerag/prepare.py --tokenizer=llama-2-7b-chat --input token_level/*.json --out train.jsonl

Rows {"query", "conversations": [{"prompt", "context"}, ..], "gold_indices": [[int, ..], ..]} become
{"query", "passage", "spans": [[start, end], ..]}. gold_indices count tokens of one tokenizer and
its chat template: give the ones the data was made with. What cannot be exact is reported line by
line, or refused: see readme.md. Without --input the files come from the hub.
"""  # noqa: E501

import argparse
import glob
import json
import os
import sys
from collections import Counter

import numpy as np
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from data import read_jsonl, require  # noqa: E402
from spans import join_spans  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

DATASET, FOLDER = "wcyno23/AceRAG-Data", "train/token_level_estimator"
TAG = "[CONTEXT_RmehNsY1]"  # stands in the prompt for the context


class Refused(Exception):
    """A conversation that is left out, and why."""


def rendered(tokenizer, text: str) -> str:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def equal_ends(a: list[int], b: list[int]) -> tuple[int, int]:
    """How many ids are equal at the front and at the back of two lists."""
    n = min(len(a), len(b))
    front = next((i for i in range(n) if a[i] != b[i]), n)
    back = next((i for i in range(n) if a[-1 - i] != b[-1 - i]), n)
    return front, back


def context_tokens(tokenizer, prompt: str, context: str, tag: str, max_tokens: int):
    """-> (int64 [n, 2], cut): the characters [start, end) of the context that each of AceRAG's n
    context tokens has, in the order in which gold_indices count them; cut: tokens in the middle
    that AceRAG takes out.

    Its rule: the chat is tokenized with the tag in the prompt, and with the context in its place.
    What is equal at the front and at the back is not context. Of more than
    (4096 - front - back) * 8 tokens in between only the first and the last half are used.
    """
    if prompt.count(tag) != 1:
        raise Refused(f"the prompt has {tag} {prompt.count(tag)} times, expected once")
    without, whole = (rendered(tokenizer, prompt.replace(tag, text)) for text in (tag, context))
    begin = without.find(tag)
    if begin < 0 or whole[begin : begin + len(context)] != context:
        raise Refused("the chat template changes the context")
    call = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    ids = tokenizer(without, add_special_tokens=False, verbose=False)["input_ids"]
    encoded = tokenizer(whole, **call)
    front, back = equal_ends(ids, encoded["input_ids"])
    n = len(encoded["input_ids"])
    places = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    places = (places[front : n - back] - begin).clip(0, len(context))
    room = (max_tokens - front - back) * 8
    if len(places) <= room:
        return places, 0
    half = room // 2
    return np.concatenate((places[:half], places[-half:])), len(places) - 2 * half


def spans_of(places, gold: list[int]):
    """Characters of the gold tokens -> (spans, tokens that have no character, others that share a
    character with the gold ones). Tokens in a row are one span, with the spaces between them."""
    empty = [k for k in gold if places[k, 0] == places[k, 1]]
    runs, last = [], None
    for k in sorted(set(gold) - set(empty)):
        start, end = places[k].tolist()
        if last is not None and k == last + 1:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([start, end])
        last = k
    spans = join_spans(runs)
    hit = np.zeros(len(places), bool)  # as training will read them
    for start, end in spans:
        hit |= (places[:, 0] < end) & (start < places[:, 1])
    return spans, len(empty), int(hit.sum()) - len(set(gold) - set(empty))


def convert(record: dict, tokenizer, args, path: str, line: int, report):
    """Yield our lines of a row. report(text) for what is not exact, and for what is refused."""
    query = require(record, "query", str, path, line)
    chats, gold = record.get("conversations"), record.get("gold_indices")
    if not isinstance(chats, list) or not isinstance(gold, list):
        raise ValueError(f"{path} line {line}: expected lists 'conversations' and 'gold_indices'")
    chats = [chat for chat in chats if chat.get("context") is not None]  # without the answers
    if len(chats) != len(gold):
        report(f"refused: {len(chats)} contexts for {len(gold)} lists of gold_indices")
        return
    for chat, indices in zip(chats, gold, strict=True):
        prompt, context = (require(chat, field, str, path, line) for field in ("prompt", "context"))
        require({"gold_indices": indices}, "gold_indices", [int], path, line)
        try:
            places, cut = context_tokens(tokenizer, prompt, context, args.tag, args.window)
            if not indices:
                raise Refused("no gold token")
            if min(indices) < 0 or max(indices) >= len(places):
                raise Refused(
                    f"token {max(indices)} of {len(places)}: not the tokenizer, the template or "
                    "the window of this data"
                )
            if max(indices) >= args.window and not args.late:
                raise Refused(f"gold behind the first {args.window} tokens, see --late")
            spans, empty, more = spans_of(places, indices)
            if not spans:
                raise Refused("no gold token has a character of the context")
        except Refused as reason:
            report(f"refused: {reason}")
            continue
        if cut:
            report(f"not exact: {cut} tokens in the middle were never marked")
        if empty:
            report(f"not exact: {empty} gold tokens have no character of the context")
        if more:
            report(f"not exact: {more} more tokens share a character with the gold ones")
        yield {"query": query, "passage": context, "spans": spans}


def rows_of(paths: list[str]):
    """(path, line or row from 1, record): a file is a JSON list or JSONL."""
    for path in paths:
        with open(path, "rb") as f:
            is_list = f.read(1) == b"["
            f.seek(0)
            records = json.load(f) if is_list else []
        for number, record in enumerate(records, 1) if is_list else read_jsonl(path):
            yield path, number, record


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", help="files or patterns; without it they come from the hub")
    add("--tokenizer", required=True, help="folder or name on the hub, with its chat template")
    add("--out", required=True, help="the .jsonl to write")
    add("--tag", default=TAG, help="what stands in a prompt for the context")
    add("--window", type=int, default=4096, help="AceRAG's lm_max_length, in tokens")
    add("--late", action="store_true", help="keep rows with gold behind the first window")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.add_tokens([args.tag], special_tokens=True)  # as AceRAG does: its brackets stay whole
    if not tokenizer.chat_template:
        raise SystemExit(f"{args.tokenizer} has no chat template: gold_indices count its tokens")
    if not args.input:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(DATASET, repo_type="dataset", allow_patterns=[f"{FOLDER}/*"])
        args.input = [f"{folder}/{FOLDER}/*.json*"]
    paths = []
    for pattern in args.input:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(f"--input {pattern}: there is no such file")
        paths += found
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    counts = Counter()
    with open(args.out + ".tmp", "wb") as out:
        for path, number, record in tqdm(rows_of(paths), "rows", unit=" rows"):

            def report(text, prefix=f"{path} line {number}"):
                counts[text.partition(":")[0]] += 1
                tqdm.write(f"{prefix}: {text}")

            for line in convert(record, tokenizer, args, path, number, report):
                text = json.dumps(line, ensure_ascii=False) + "\n"
                out.write(text.encode("utf-8", "replace"))
                counts["lines"] += 1
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {counts['lines']:,} lines. Expected: 12K (the figure of AceRAG)")
    print(f"refused: {counts['refused']:,}, reported as not exact: {counts['not exact']:,}")


if __name__ == "__main__":
    main()
