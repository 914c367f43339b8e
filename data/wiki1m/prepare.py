"""
Wiki1M, a million sentences of the English Wikipedia: for SimCSE, where a text is its own positive.

    python data/wiki1m/prepare.py                              # from the hub
    python data/wiki1m/prepare.py --input wiki1m_for_simcse.txt

One sentence a line becomes {"text": sentence}. Written: train.jsonl beside this file, or --out.
"""

import argparse
import json
import os

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", help="text file with a sentence a line; without it, it is downloaded")
    add("--out", default=os.path.join(HERE, "train.jsonl"))
    add("--max_lines", type=int, help="only the first ones (they are in random order)")
    args = parser.parse_args(argv)
    if not args.input:
        from huggingface_hub import hf_hub_download

        repo, name = "princeton-nlp/datasets-for-simcse", "wiki1m_for_simcse.txt"
        args.input = hf_hub_download(repo, name, repo_type="dataset")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    kept = empty = 0
    with open(args.input, "rb") as source, open(args.out + ".tmp", "w", encoding="utf-8") as out:
        for number, line in tqdm(enumerate(source, 1), "lines", unit=" lines"):
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{args.input} line {number}: not UTF-8: {error}") from None
            if not text:
                empty += 1
                continue
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            kept += 1
            if kept == args.max_lines:
                break
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {kept:,} sentences, {empty:,} empty lines left out. Expected: 1M (SimCSE)")


if __name__ == "__main__":
    main()
