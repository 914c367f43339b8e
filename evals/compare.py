r"""
Several runs of eval_mteb.py in one table: are the differences more than chance?

    python -m evals.compare out/eval-*/results.json --baseline=bm25 \
        --seeds "ours=out/demo-*" --fuse=ours,bm25

A table for each retrieval task: the mean nDCG@10 over queries and seeds, the lowest and the highest
seed, and the difference to the baseline with its 95 % interval by a paired bootstrap, which draws
modules (a field of the queries; without it, queries) and seeds. --seeds makes one system of all
models whose names match. --fuse adds a row for two systems' rankings together.
out_dir/compare.md and .json get the tables.
"""

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from data import require
from formats import read_json, write_json
from metrics import ndcg

RRF = 60  # of reciprocal rank fusion


def read_runs(paths, seeds):
    """-> {task: {system: {run: its queries as eval_mteb.py writes them}}}. seeds: {system: pattern
    of model names}; a model that matches none is a system of its own."""
    runs = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise SystemExit(f"{path}: no such file, expected a results.json of eval_mteb.py")
        for row in require(read_json(path), "rows", [dict], path, 0):
            if name := row.get("queries"):  # what came of the same weights has the same name
                system = [s for s, pattern in seeds.items() if fnmatchcase(row["model"], pattern)]
                of_task = runs.setdefault(row["task"], {})
                of_system = of_task.setdefault((system or [row["model"]])[0], {})
                of_system[name] = read_json(path.parent, "scores", name, kind=list)
    return runs


def fused(a, b):
    """nDCG@10 [Q] of two runs' rankings together (reciprocal rank fusion, Cormack et al. 2009):

    score(d) = sum over the runs that have d among their best 100 of 1 / (60 + rank of d)
    """
    found = []
    for x, y in zip(a, b):
        scores = {}
        for top in (x["top"], y["top"]):
            for rank, d in enumerate(top, 1):
                scores[d] = scores.get(d, 0) + 1 / (RRF + rank)
        order = sorted(scores, key=lambda d: (scores[d], d), reverse=True)  # ties as in trec_eval
        gains = [x["relevant"].get(d, 0) for d in order]
        found.append(ndcg(gains, list(x["relevant"].values()), 10))
    return np.array(found)


def bootstrap(a, b, clusters, rng, n=10_000):
    """-> [low, high], the 95 % interval of mean(a) - mean(b). a, b: scores [seeds, Q];
    clusters [Q], from 0. Each of the n draws takes as many clusters as there are, the same for
    both, with all their queries, and as many seeds of each as there are."""
    n_clusters = clusters.max() + 1
    drawn = rng.integers(n_clusters, size=(n, n_clusters))
    times = np.stack([np.bincount(row, minlength=n_clusters) for row in drawn])  # [n, clusters]
    means = []
    for x in (a, b):
        sums = np.stack([np.bincount(clusters, row) for row in x])  # [seeds, clusters]
        of_seed = times @ sums.T / (times @ np.bincount(clusters))[:, None]  # [n, seeds]
        seeds = rng.integers(len(x), size=(n, len(x)))
        means.append(np.take_along_axis(of_seed, seeds, 1).mean(1))
    return np.percentile(means[0] - means[1], [2.5, 97.5])


def compare(task, systems, baseline, fuse=()):
    """{system: {run: queries}} -> {"task", "queries", "modules", "baseline", "rows": [..]}, a row
    a system, the best first: its scores and their "difference" to the baseline are x 100."""
    if missing := [name for name in (baseline, *fuse) if name not in systems]:
        raise SystemExit(f"{task} has no {', '.join(missing)}, only {', '.join(systems)}")
    runs = {name: list(of_system.values()) for name, of_system in systems.items()}
    queries = runs[baseline][0]
    asked = [
        [(q["id"], q["text"], q["relevant"]) for q in run] for of in runs.values() for run in of
    ]
    if any(other != asked[0] for other in asked):
        raise SystemExit(f"{task}: not all runs have the same queries and right answers")
    names = [q.get("module") or q["id"] for q in queries]
    clusters = np.unique(names, return_inverse=True)[1]
    scores = {name: np.array([[q["ndcg_at_10"] for q in run] for run in of_system])  # [seeds, Q]
              for name, of_system in runs.items()}  # fmt: skip
    if fuse:  # seed by seed; what has one seed goes with all of the other
        a, b = (runs[name] for name in fuse)
        pairs = [(a[i % len(a)], b[i % len(b)]) for i in range(max(len(a), len(b)))]
        scores[" + ".join(fuse)] = np.array([fused(*pair) for pair in pairs])
    rows = []
    for name, x in sorted(scores.items(), key=lambda item: -item[1].mean()):
        rows.append({"system": name, "ndcg": 100 * x.mean(), "seeds": (100 * x.mean(1)).tolist()})
        if name != baseline:
            interval = bootstrap(x, scores[baseline], clusters, np.random.default_rng(0))
            rows[-1]["difference"] = rows[-1]["ndcg"] - 100 * scores[baseline].mean()
            rows[-1]["interval"] = (100 * interval).tolist()
    facts = {"task": task, "queries": len(queries), "modules": len(set(names))}
    return facts | {"baseline": baseline, "rows": rows}


def table(found):
    """Markdown."""
    head = f"| | nDCG@10 | lowest - highest seed | less {found['baseline']} | 95 % |"
    lines = ["{task}, {queries} queries of {modules} modules".format(**found), "", head]
    lines.append("|---|--:|---|--:|---|")
    for row in found["rows"]:
        seeds, more = row["seeds"], ["", ""]
        spread = f"{min(seeds):.2f} - {max(seeds):.2f}" if len(seeds) > 1 else ""
        if "interval" in row:
            more = [f"{row['difference']:+.2f}", "{:+.2f} to {:+.2f}".format(*row["interval"])]
        cells = [row["system"], f"{row['ndcg']:.2f}", spread, *more]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="See the top of evals/compare.py.")
    parser.add_argument("results", nargs="+", help="results.json of eval_mteb.py")
    parser.add_argument("--baseline", default="bm25", help="a column of them")
    parser.add_argument("--seeds", action="append", default=[], metavar="NAME=PATTERN")
    parser.add_argument("--fuse", default=[], type=lambda names: names.split(","))
    parser.add_argument("--out_dir", default="out/compare")
    args = parser.parse_args()
    if any("=" not in given for given in args.seeds) or len(args.fuse) not in (0, 2):
        raise SystemExit("--seeds takes NAME=PATTERN, --fuse takes NAME,NAME")
    runs = read_runs(args.results, dict(given.split("=", 1) for given in args.seeds))
    found = [compare(task, systems, args.baseline, args.fuse) for task, systems in runs.items()]
    text = "\n".join(map(table, found))
    print(text)
    write_json(found, args.out_dir, "compare.json")
    Path(args.out_dir, "compare.md").write_text(text, "utf-8")
