"""
The Echo / E5 training data: 14 public data sets, each query with a positive and a hard negative.

    python data/echo/prepare.py --input echo-data              # the folder of 14 JSONL files
    python data/echo/prepare.py --input echo-data --datasets nq squad

Lines {"query", "positive", "negative"} become {"query", "pos", "neg", "prompt"}. The prompt is the
data set's instruction with the separator, ready to stand in front of the query. Written beside this
file (or in --out): NAME.jsonl for each data set and val.jsonl, see readme.md. Constant memory.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project
from data import is_held_out, read_jsonl, require  # noqa: E402

# The instructions of E5-Mistral (Wang et al. 2024, arXiv 2401.00368), as LLM2Vec trains with them.
# Where a data set has two, line 0, 2, .. of its file takes the first and line 1, 3, .. the second.
# True: the task is symmetric. Its passages take the instruction, too: by the config's
# passage_instruction, which is why each instruction has a file of its own.
WIKIPEDIA = "Given a question, retrieve Wikipedia passages that answer the question"
CHINESE = "Given a Chinese search query, retrieve web passages that answer the question"
DATASETS = {
    "allnli": [
        ("Given a premise, retrieve a hypothesis that is entailed by the premise", False),
        ("Retrieve semantically similar text", True),
    ],
    "dureader": [(CHINESE, False)],
    "eli5_question_answer": [
        ("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum", False)
    ],
    "fever": [("Given a claim, retrieve documents that support or refute the claim", False)],
    "hotpot_qa": [
        ("Given a multi-hop question, retrieve documents that can help answer the question", False)
    ],
    "miracl": [(WIKIPEDIA, False)],
    "mrtydi": [(WIKIPEDIA, False)],
    "msmarco_passage": [
        ("Given a web search query, retrieve relevant passages that answer the query", False)
    ],
    "msmarco_document": [
        ("Given a web search query, retrieve relevant documents that answer the query", False)
    ],
    "nq": [(WIKIPEDIA, False)],
    "quora_duplicates": [
        (
            "Given a question, retrieve questions that are semantically equivalent to the given "
            "question",
            True,
        ),
        ("Find questions that have the same meaning as the input question", True),
    ],
    "squad": [("Retrieve Wikipedia passages that answer the question", False)],
    "t2ranking": [(CHINESE, False)],
    "trivia_qa": [("Retrieve Wikipedia passages that answer the question", False)],
}


def outputs(name: str, separator: str) -> list[tuple[str, str, bool]]:
    """(file name without .jsonl, prompt, do passages take it) for each instruction."""
    tasks = DATASETS[name]
    names = [name] if len(tasks) == 1 else [f"{name}_split{i + 1}" for i in range(len(tasks))]
    return [(n, text + separator, both) for n, (text, both) in zip(names, tasks, strict=True)]


def convert(name: str, args, val) -> dict:
    """Write the files of one data set, held-out lines to `val`. -> {file name: lines}, and "val",
    "empty" and "no negative"."""
    tasks = outputs(name, args.separator)
    counts = dict.fromkeys([task[0] for task in tasks] + ["val", "empty", "no negative"], 0)
    source = os.path.join(args.input, f"{name}.jsonl")
    paths = [os.path.join(args.out, f"{task[0]}.jsonl") for task in tasks]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path + ".tmp", "wb")) for path in paths]
        for number, record in tqdm(read_jsonl(source), name, unit=" lines"):
            fields = ("query", "positive", "negative")
            query, positive, negative = (require(record, f, str, source, number) for f in fields)
            if not query.strip() or not positive.strip():
                counts["empty"] += 1
                continue
            of = (number - 1) % len(tasks)
            file_name, prompt, both = tasks[of]
            line = {"query": query, "pos": [positive], "neg": [negative], "prompt": prompt}
            if not negative.strip() or negative == positive:
                line["neg"] = []
                counts["no negative"] += 1
            # val.jsonl has one passage_instruction for all its lines: the empty one
            held_out = not both and is_held_out(query, args.val_share)
            counts["val" if held_out else file_name] += 1
            text = json.dumps(line, ensure_ascii=False) + "\n"
            (val if held_out else files[of]).write(text.encode("utf-8", "replace"))
    for path in paths:
        os.replace(path + ".tmp", path)
    return counts


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, help="folder with allnli.jsonl, dureader.jsonl and so on")
    add("--out", default=HERE, help="folder for the files")
    add("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS), metavar="NAME")
    add("--separator", default="; ", help='between instruction and query; "; " is LLM2Vec\'s')
    add("--val_share", type=float, default=0.0005, help="of the lines, by query, for val.jsonl")
    args = parser.parse_args(argv)
    names = [name for name in DATASETS if name in args.datasets]
    missing = [n for n in names if not os.path.isfile(os.path.join(args.input, f"{n}.jsonl"))]
    if missing:
        raise SystemExit(f"{args.input} has no {', '.join(f'{n}.jsonl' for n in missing)}")
    os.makedirs(args.out, exist_ok=True)
    total = {}
    path = os.path.join(args.out, "val.jsonl")
    with open(path + ".tmp", "wb") as val:
        for name in names:
            for key, n in convert(name, args, val).items():
                total[key] = total.get(key, 0) + n
    os.replace(path + ".tmp", path)
    left_out, alone, n_val = total.pop("empty"), total.pop("no negative"), total.pop("val")
    for name, n in total.items():
        print(f"{name + '.jsonl':32} {n:>10,} lines")
    print(f"{'val.jsonl':32} {n_val:>10,} lines, no symmetric task among them")
    print(f"{sum(total.values()) + n_val:,} lines in all. Expected: 1.5M (the figure of LLM2Vec)")
    print(f"left out, query or positive empty: {left_out:,}; kept without negative: {alone:,}")


if __name__ == "__main__":
    main()
