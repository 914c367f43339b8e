"""
Wikitext-103, raw: token files of Wikipedia's good and featured articles, for train_mntp.py.

    python data/wikitext103/prepare.py --tokenizer princeton-nlp/Sheared-LLaMA-1.3B
    python data/wikitext103/prepare.py --tokenizer ... --input wikitext-103-raw   # a folder

An article is a document; with chunks=True train_mntp.py lets them run on. The tokenizer is the
model's: the files go to data/wikitext103/<its name>, or --out.
"""

import argparse
import os
import re
import sys

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from formats.tiktoken_bpe import fast_encode  # noqa: E402
from tokenizer import load_tokenizer, vocab_size_of  # noqa: E402
from tokens import write_meta, write_tokens  # noqa: E402

SPLITS = {"train": "train", "val": "validation"}  # ours: theirs
FILES = {"train": "wiki.train.raw", "val": "wiki.valid.raw"}
# Merity et al. 2016 (arXiv 1609.07843), table 1: articles and tokens, the end of a line being one
EXPECTED = {"train": (28_475, 103_227_021), "val": (60, 217_646)}
TITLE = re.compile(r" = [^=].* = ")


def articles(lines):
    """Yield (text, lines, words) of each article: from a title to the next. A title stands between
    blank lines: there are formulas that look like one."""
    kept, words, before = [], 0, ""
    lines = iter(lines)
    line = next(lines, None)
    while line is not None:
        after = next(lines, None)
        title = TITLE.fullmatch(line) and not before.strip() and not (after or "").strip()
        if title and any(x.strip() for x in kept):
            yield "\n".join(kept), len(kept), words
            kept, words = [], 0
        kept.append(line)
        words += len(line.split())
        before, line = line, after
    if any(x.strip() for x in kept):
        yield "\n".join(kept), len(kept), words


def lines_of(split, folder):
    """The lines of a split, without their ends, from a file or from the hub."""
    if folder:
        path = os.path.join(folder, FILES[split])
        with open(path, encoding="utf-8", newline="\n") as f:
            for line in f:
                yield line.rstrip("\n")
    else:
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split=SPLITS[split])
        for batch in rows.iter(1000):
            for line in batch["text"]:
                yield line.rstrip("\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="the model's: folder, or owner/name[@revision]")
    add("--input", help="folder with wiki.train.raw and wiki.valid.raw; without it, downloaded")
    add("--out", help="folder for the token files")
    args = parser.parse_args(argv)
    name = args.tokenizer.rstrip("/").split("/")[-1].split("@")[0]
    name = name.replace("Meta-Llama-3.1", "Llama-3.1")
    out = args.out or os.path.join(HERE, name)  # as configs/mntp_llm2vec.py has it
    tokenizer = load_tokenizer(args.tokenizer)
    encode, splits, report = fast_encode(tokenizer), {}, []
    os.makedirs(out, exist_ok=True)
    for split in SPLITS:
        counts = [0, 0, 0]  # articles, lines, words

        def docs(split=split, counts=counts):
            texts = []
            for text, n_lines, n_words in tqdm(articles(lines_of(split, args.input)), split):
                for i, n in enumerate((1, n_lines, n_words)):
                    counts[i] += n
                texts.append(text)
                if len(texts) == 100:
                    yield from encode(texts)
                    texts = []
            yield from encode(texts)

        splits[split] = write_tokens(out, split, docs(), vocab_size_of(tokenizer))
        n, lines, words = counts
        report.append(
            f"{split:5} {n:7,} articles {words + lines:12,} words and line ends "
            f"{splits[split]['tokens']:12,} tokens. Expected: {EXPECTED[split][0]:,} articles, "
            f"{EXPECTED[split][1]:,} words and line ends"
        )
    write_meta(out, tokenizer, args.tokenizer, splits)
    print(out, *report, sep="\n")


if __name__ == "__main__":
    main()
