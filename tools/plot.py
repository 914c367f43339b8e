"""
Curves of one or several runs from their log.csv, as PNG:

    python -m tools.plot out/mlm
    python -m tools.plot out/a out/b --keys=loss,eval_loss,lr --out=curves.png
    python -m tools.plot out/a out/a-ext out/a-decay --joined     # phases, one behind the other

Keys that differ only by a leading eval_ share a panel: training as a line, averaged over 1/30 of
its length (not lr), with the raw curve faint behind it; evaluation as points. Written to curves.png
in the first run's folder. Needs matplotlib.
"""

import argparse
import csv
import os
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read_curve(folder, key):
    """([steps], [values]) of one column of folder/log.csv; rows without the key are left out."""
    path = os.path.join(folder, "log.csv")
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file, so {folder} is not the out_dir of a run")
    with open(path, encoding="utf-8") as f:
        reader = csv.DictReader(f)
        rows = [row for row in reader if row.get(key)]
    if key not in reader.fieldnames:
        raise SystemExit(f"{path} has no column {key!r}, only {', '.join(reader.fieldnames)}")
    return [int(row["step"]) for row in rows], [float(row[key]) for row in rows]


def smooth(values):
    """Mean over a window of 1/30 of the curve around each point, narrower at the two ends. Centred:
    an average of the past only would lag behind and show a falling loss too high."""
    n = len(values)
    halves = [min(n // 60, i, n - 1 - i) for i in range(n)]
    return [fmean(values[i - half : i + half + 1]) for i, half in enumerate(halves)]


def plot(folders, keys, out, joined=False):
    ends = [max(read_curve(folder, keys[0])[0]) if joined else 0 for folder in folders]
    names = list(dict.fromkeys(key.removeprefix("eval_") for key in keys))  # a panel each
    size = (8, 1 + 3.5 * len(names))
    fig, axes = plt.subplots(len(names), 1, figsize=size, sharex=True, squeeze=False)
    for key in keys:
        name = key.removeprefix("eval_")
        ax = axes[names.index(name), 0]
        for i, folder in enumerate(folders):
            steps, values = read_curve(folder, key)
            steps = [sum(ends[:i]) + step for step in steps]
            run = os.path.basename(os.path.normpath(folder))
            style = {"color": f"C{i % 10}", "label": f"{run} {key}"}
            if key != name:
                ax.plot(steps, values, "o:", markeredgecolor="black", zorder=3, **style)
            else:
                ax.plot(steps, values, color=style["color"], alpha=0.25, linewidth=1)
                values = values if key == "lr" else smooth(values)
                ax.plot(steps, values, linewidth=1.8, **style)
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[-1, 0].set_xlabel("step")
    fig.tight_layout()
    fig.savefig(out, dpi=150)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", help="folders that hold a log.csv")
    parser.add_argument("--keys", default="loss,eval_loss", help="columns of log.csv")
    parser.add_argument("--joined", action="store_true", help="a run begins where the last ended")
    parser.add_argument("--out", help="a file; by default curves.png beside the first log.csv")
    args = parser.parse_args()
    out = args.out or os.path.join(args.runs[0], "curves.png")
    plot(args.runs, args.keys.split(","), out, args.joined)
    print(f"wrote {out}")
