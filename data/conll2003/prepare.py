"""
CoNLL-2003 (Tjong Kim Sang and De Meulder 2003): words with parts of speech, chunks and names.

    python data/conll2003/prepare.py                        # from the hub
    python data/conll2003/prepare.py --input conll2003      # eng.train, eng.testa, eng.testb
    python data/conll2003/prepare.py --dataset owner/name --revision main     # another copy of it

Writes train.jsonl, val.jsonl and test.jsonl beside this file, or in --out: lines {"words", "pos",
"chunk", "ner"}. Chunks and names are written as IOB2 (each begins with B-), as the hub's copy has
them; the column files are IOB1 (B- only between two neighbours). -DOCSTART- lines are left out.
"""

import argparse
import json
import os
import sys
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from labels import read_columns  # noqa: E402

FIELDS = ("pos", "chunk", "ner")
SPLITS = {"train": ("train", "eng.train"), "val": ("validation", "eng.testa"),
          "test": ("test", "eng.testb")}  # fmt: skip
# sentences, words and names of the shared task (its table 1 and 2, without the -DOCSTART- lines)
EXPECTED = {"train": (14_041, 203_621, 23_499), "val": (3_250, 51_362, 5_942),
            "test": (3_453, 46_435, 5_648)}  # fmt: skip


def iob2(labels):
    """IOB1 or IOB2 -> IOB2: what begins a chunk is B-."""
    out, before = [], "O"
    for label in labels:
        new = before == "O" or before[2:] != label[2:]
        out.append("B" + label[1:] if label[0] == "I" and new else label)
        before = label
    return out


def read_file(path):
    """Yield {"words", "pos", "chunk", "ner"} of each sentence of a column file."""
    for sentence in read_columns(path):
        for line, columns in sentence:
            if len(columns) != 4:
                raise ValueError(f"{path} line {line}: {len(columns)} columns, expected 4")
        columns = zip(*(columns for _, columns in sentence), strict=True)
        yield dict(zip(("words", *FIELDS), map(list, columns), strict=True))


def read_dataset(dataset, split):
    """The same of the hub's schema: "tokens" and "pos_tags", "chunk_tags", "ner_tags", numbers of a
    ClassLabel or the labels themselves."""
    names = {}
    for field in FIELDS:
        feature = dataset.features[f"{field}_tags"]
        inner = getattr(feature, "feature", feature)
        names[field] = getattr(inner, "names", None)
        if names[field] is None and getattr(inner, "dtype", "") != "string":
            raise ValueError(f"{split}: {field}_tags are {feature}: numbers without names")
    for row in dataset:
        out = {"words": row["tokens"]}
        for field in FIELDS:
            tags = row[f"{field}_tags"]
            out[field] = [names[field][tag] for tag in tags] if names[field] else tags
        if out["words"] and out["words"][0] != "-DOCSTART-":
            yield out


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", help="folder with eng.train, eng.testa, eng.testb; without it, from the hub")
    add("--dataset", default="eriktks/conll2003", help="hub id, or folder of parquet files")
    # the hub's own copy is a script, which datasets no longer runs; this is its conversion
    add("--revision", default="refs/convert/parquet")
    add("--out", default=HERE)
    args = parser.parse_args(argv)
    if args.input is None:
        from datasets import load_dataset

        local = os.path.isdir(args.dataset)
        dataset = load_dataset(args.dataset, revision=None if local else args.revision)
    os.makedirs(args.out, exist_ok=True)
    sets = {field: set() for field in FIELDS}
    for name, (split, file) in SPLITS.items():
        if args.input is None:
            sentences = read_dataset(dataset[split], split)
        else:
            sentences = read_file(os.path.join(args.input, file))
        path, n = os.path.join(args.out, f"{name}.jsonl"), Counter()
        with open(path + ".tmp", "w", encoding="utf-8") as out:
            for sentence in sentences:
                for field in ("chunk", "ner"):
                    sentence[field] = iob2(sentence[field])
                for field in FIELDS:
                    sets[field].update(sentence[field])
                out.write(json.dumps(sentence, ensure_ascii=False) + "\n")
                n["sentences"] += 1
                n["words"] += len(sentence["words"])
                n["names"] += sum(label[0] == "B" for label in sentence["ner"])
        os.replace(path + ".tmp", path)
        found, expected = (n["sentences"], n["words"], n["names"]), EXPECTED[name]
        print(f"{path}: {found[0]:,} sentences, {found[1]:,} words, {found[2]:,} names; expected "
              f"{expected[0]:,}, {expected[1]:,}, {expected[2]:,}"
              f"{'' if found == expected else ': NOT the data of the shared task'}")  # fmt: skip
    for field, labels in sets.items():
        print(f"{field}: {len(labels)} labels in these files")


if __name__ == "__main__":
    main()
