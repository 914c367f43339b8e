"""
Part-of-speech tags from a Universal Dependencies treebank, for train_classifier.py.

    python data/ud/prepare.py --input UD_English-EWT                   # a folder of *.conllu files
    python data/ud/prepare.py --input en_ewt-ud-train.conllu.gz --out data/ud/train.jsonl
    python data/ud/prepare.py --input UD_English-EWT --tags xpos       # the language's own tags

Reads CoNLL-U, plain or gzipped (https://universaldependencies.org/format.html), and writes lines
{"words", "labels"}: train.jsonl, val.jsonl and test.jsonl beside this file from a folder with
...-train.conllu, ...-dev.conllu and ...-test.conllu, or --out from one file. Words are syntactic
words: "don't" is "do" and "n't". Of ranges (1-2) and empty nodes (1.1) nothing is written.
"""

import argparse
import gzip
import json
import os
import re
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))


def read_conllu(path, column):
    """Yield (words, labels) of each sentence. column: 3 is UPOS, 4 is XPOS."""
    words, labels = [], []
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\r\n")
            if not line:
                if words:
                    yield words, labels
                words, labels = [], []
            elif not line.startswith("#"):
                columns = line.split("\t")
                if len(columns) != 10:
                    raise ValueError(f"{path} line {number}: {len(columns)} columns, expected 10")
                if columns[0].isdigit():
                    if columns[column] == "_":
                        raise ValueError(f"{path} line {number}: {columns[1]!r} has no tag (_)")
                    words.append(columns[1])
                    labels.append(columns[column])
    if words:
        yield words, labels


def convert(source, out, column):
    """One file; renamed into place when whole."""
    n, tags = 0, Counter()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(out + ".tmp", "w", encoding="utf-8") as f:
        for words, labels in read_conllu(source, column):
            f.write(json.dumps({"words": words, "labels": labels}, ensure_ascii=False) + "\n")
            n += 1
            tags.update(labels)
    os.replace(out + ".tmp", out)
    print(f"{out}: {n:,} sentences, {tags.total():,} words, {len(tags)} tags: "
          f"{' '.join(sorted(tags))}")  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, help="a .conllu or .conllu.gz file, or a folder of them")
    add("--out", help="of one file; of a folder, the folder to write to")
    add("--tags", default="upos", choices=("upos", "xpos"))
    args = parser.parse_args(argv)
    column = {"upos": 3, "xpos": 4}[args.tags]
    if not os.path.isdir(args.input):
        convert(args.input, args.out or os.path.join(HERE, "train.jsonl"), column)
        return
    for part, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        pattern = rf".*-{part}(\.[^.]+)?\.conllu(\.gz)?"
        found = [n for n in sorted(os.listdir(args.input)) if re.fullmatch(pattern, n)]
        if len(found) != 1:
            raise SystemExit(f"{args.input}: expected one *-{part}.conllu, found {found}")
        out = os.path.join(args.out or HERE, f"{name}.jsonl")
        convert(os.path.join(args.input, found[0]), out, column)


if __name__ == "__main__":
    main()
