"""
AceRAG's data for token retrieval: from places of tokens to places of characters.

    python data/acerag/prepare.py --tokenizer=NousResearch/Llama-2-7b-chat-hf --out data/acerag/train.jsonl
    python data/acerag/prepare.py --tokenizer=llama-2-7b-chat --input nq_llama2.json --out train.jsonl

Rows {"query", "conversations": [{"prompt", "context"}, ..], "gold_indices": [[int, ..], ..]} become
{"query", "passage", "spans": [[start, end], ..]}. gold_indices count tokens of one tokenizer, its
chat template and its BOS: give the one that the data was made with. The gold words of the first
lines are printed: look at them. What cannot be exact is reported line by line, or refused: see
readme.md. Without --input the files of that tokenizer's family come from the hub.
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
    call = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}  # Qwen3's
    return tokenizer.apply_chat_template(chat, **call)


def equal_ends(a: list[int], b: list[int]) -> tuple[int, int]:
    """How many ids are equal at the front and at the back of two lists."""
    n = min(len(a), len(b))
    front = next((i for i in range(n) if a[i] != b[i]), n)
    back = next((i for i in range(n) if a[-1 - i] != b[-1 - i]), n)
    return front, back


def context_tokens(tokenizer, prompt: str, context: str, tag: str, max_tokens: int):
    """-> (int64 [n, 2], passage, middle): the characters [start, end) of the passage that each of
    the n tokens has, in the order in which gold_indices count them. The passage is the context,
    less its characters [start, end) = middle, None where nothing is taken out.

    AceRAG's rule: the chat is tokenized with the tag in the prompt, and with the context in its
    place. What is equal at the front and at the back is not context. Of more than
    (max_tokens - front - back) * 8 tokens in between only the first and the last half are used.
    They go on in windows of max_tokens, each of which begins with a BOS that counts as a token,
    where the tokenizer has one: Llama-2's has, Qwen3's has none.
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
    half, middle, passage = (max_tokens - front - back) * 8 // 2, None, context
    if len(places) > (max_tokens - front - back) * 8:
        middle = start, end = int(places[half - 1, 1]), int(places[-half, 0])
        places = np.concatenate((places[:half], places[-half:] - (end - start)))
        passage = context[:start] + context[end:]
    if tokenizer.bos_token_id:
        begins = np.arange(0, len(places), max_tokens - 1)
        places = np.insert(places, begins, places[begins, :1], axis=0)  # a BOS has no character
    return places, passage, middle


def put_back(spans, middle):
    """Spans of the passage -> spans of the context, whose characters `middle` it lacks."""
    (start, end), out = middle, []
    for a, b in spans:
        parts = (a, min(b, start)), (max(a, start) + end - start, b + end - start)
        out += [[a, b] for a, b in parts if a < b]
    return out


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
            found = context_tokens(tokenizer, prompt, context, args.tag, args.window)
            places, passage, middle = found
            if not indices:
                raise Refused("no gold token")
            if min(indices) < 0 or max(indices) >= len(places):
                raise Refused(
                    f"token {max(indices)} of {len(places)}: not the tokenizer, the template or "
                    "the window of this data"
                )
            spans, empty, more = spans_of(places, indices)
            if not spans:
                raise Refused("no gold token has a character of the context")
        except Refused as reason:
            report(f"refused: {reason}")
            continue
        if middle and not args.cut_middle:
            n = middle[1] - middle[0]
            report(f"not exact: {n} characters in the middle were never marked, see --cut_middle")
            passage, spans = context, put_back(spans, middle)
        if empty:
            report(f"not exact: {empty} gold tokens have no character of the context")
        if more:
            report(f"not exact: {more} more tokens share a character with the gold ones")
        yield {"query": query, "passage": passage, "spans": spans}


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
    add("--cut_middle", action="store_true", help="of a long context, which AceRAG never trains on")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.add_tokens([args.tag], special_tokens=True)  # as AceRAG does: its brackets stay whole
    if not tokenizer.chat_template:
        raise SystemExit(f"{args.tokenizer} has no chat template: gold_indices count its tokens")
    if not args.input:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(DATASET, repo_type="dataset", allow_patterns=[f"{FOLDER}/*"])
        family = "llama2" if tokenizer.bos_token_id else "qwen3"  # each has files of its own
        args.input = [f"{folder}/{FOLDER}/*_{family}.json*"]
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
                if counts["lines"] <= 3:
                    words = " | ".join(line["passage"][a:b] for a, b in line["spans"])
                    tqdm.write(f"line {counts['lines']}, {line['query']!r}: {words}")
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {counts['lines']:,} lines. Expected: 12K (the figure of AceRAG)")
    print(f"refused: {counts['refused']:,}, reported as not exact: {counts['not exact']:,}")


if __name__ == "__main__":
    main()
