"""
Any evaluation over the checkpoints of a run, or of its phases, as a table and a plot over steps:

    python -m evals.revisions out/ettin-17m/mlm --keys=rows:1:value \
        -- evals.pseudo_perplexity --lengths=128,512
    python -m evals.revisions out/x out/x-ext --keys=rows:0:score -- eval_mteb --local=my_tasks

What stands behind the -- is run once for each checkpoint, with its --model= and --out_dir= added,
but not where the results of that very command are there already. All numbers of its results.json
go to revisions.csv in out_dir, under their places in the file (rows:0:score); those in --keys to
revisions.png.
"""

import argparse
import csv
import os
import subprocess
import sys

import matplotlib

from formats import read_json, write_json
from formats.huggingface import checkpoints, step_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def numbers(value, path=""):
    """{place: number} of all numbers in what a JSON file holds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {path: value}
    if not isinstance(value, dict | list):
        return {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [numbers(part, f"{path}:{key}".lstrip(":")) for key, part in items if key != "config"]
    return {place: number for part in found for place, number in part.items()}


def main(runs, out_dir, keys, command):
    rows, first = [], 0  # phases follow one another on the axis of steps
    for run in map(os.path.normpath, runs):
        for folder in checkpoints(run):
            step = first + step_of(folder)
            out = os.path.join(out_dir, folder.replace(os.sep, "_"))
            argv = [*command, f"--model={folder}", f"--out_dir={out}"]
            if read_json(out, "command.json") != {"argv": argv}:
                subprocess.run([sys.executable, "-m", *argv], check=True)
                write_json({"argv": argv}, out, "command.json")
            row = {"checkpoint": folder, "step": step}
            rows.append(row | numbers(read_json(out, "results.json")))
        first = step
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(os.path.join(out_dir, "revisions.csv"), "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row["checkpoint"], *(f"{key} {row.get(key, '-')}" for key in keys), sep="  ")
    print(f"wrote {out_dir}/revisions.csv")
    if unknown := set(keys) - set(names):
        raise SystemExit(f"no {', '.join(unknown)}, the results have {', '.join(names[2:])}")
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if key in row]
        plt.plot(*zip(*points), "o-", label=key)
    if keys:
        plt.xlabel("step")
        plt.legend()
        plt.savefig(os.path.join(out_dir, "revisions.png"), dpi=150)
        print(f"wrote {out_dir}/revisions.png")


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", help="out_dirs, in the order of their training")
    parser.add_argument("--keys", default="", help="places of results.json to plot: rows:0:score")
    parser.add_argument("--out_dir", default="out/revisions")
    argv = sys.argv[1:]
    if "--" not in argv[:-1] and not {"-h", "--help"} & set(argv):
        parser.error("the evaluation stands behind --, as: -- eval_mteb --local=my_tasks")
    args = parser.parse_args(argv[: argv.index("--") if "--" in argv else None])
    keys = [key for key in args.keys.split(",") if key]
    main(args.runs, args.out_dir, keys, argv[argv.index("--") + 1 :])
