#!/usr/bin/env bash
# Does learning to reconstruct help the embedder? Anchor-Embedding's comparison in small, on two CPU
# cores: stage I, then stage II, against stage II alone, as long and as long as both. Three seeds.
#   bash runs/anchor.sh [questions.jsonl]
# questions.jsonl (or .jsonl.gz): lines of {"question", "paragraph"} from another domain, such as
# the dev part of google-research-datasets/QED. Started again it goes on where it stopped.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is stopped saves and ends well: the next one must not begin
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
questions=${1:-}
out=out/anchor_tiny
steps=60 # of a stage, 64 pairs each
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/4 data and decoder"
[ -f data/pydocs/meta.json ] || $python data/pydocs/prepare.py
$python pretrain_mlm.py configs/clm_pydocs_tiny.py --resume=True

stage2() { # its folder, what it starts from, steps, seed
    $python train_contrastive.py configs/contrastive_anchor_tiny.py --out_dir=$out/$1 \
        --init_from=$2 --num_epochs=None --max_steps=$3 --eval_interval=$3 --seed=$4 --resume=True
}
models=out/clm_pydocs_tiny
for seed in 1 2 3; do
    say "2/4 seed $seed: stage I, then stage II"
    $python train_reconstruct.py configs/reconstruct_pydocs_tiny.py --out_dir=$out/stage1_$seed \
        --max_steps=$steps --eval_interval=$steps --seed=$((100 + seed)) --resume=True
    stage2 both_$seed $out/stage1_$seed $steps $seed
    say "3/4 seed $seed: stage II alone, as long as one stage, as long as two"
    stage2 alone_$seed out/clm_pydocs_tiny $steps $seed
    stage2 longer_$seed out/clm_pydocs_tiny $((2 * steps)) $seed
    for name in stage1 both alone longer; do models+=,$out/${name}_$seed; done
done

say "4/4 retrieval"
evaluate() { # the file, a name
    $python eval_mteb.py --local=$1 --out_dir=$out/eval_$2 --model=$models --pooling=last \
        --max_length=96
}
evaluate data/pydocs/test.jsonl pydocs
if [ -n "$questions" ]; then
    $python - "$questions" $out/questions.jsonl <<'PYTHON'
import gzip, json, sys
opened = gzip.open if sys.argv[1].endswith(".gz") else open
with opened(sys.argv[1], "rt", encoding="utf-8") as f, open(sys.argv[2], "w") as out:
    for line in map(json.loads, f):
        print(json.dumps({"query": line["question"], "pos": [line["paragraph"]]}), file=out)
PYTHON
    evaluate $out/questions.jsonl questions
fi
$python - $out <<'PYTHON'
import glob, json, re, sys
out = sys.argv[1]
rows = {"clm_pydocs_tiny": "the decoder, last token", "stage1": "stage I alone",
        "alone": "stage II alone", "longer": "stage II alone, twice the steps",
        "both": "stage I, then stage II", "bm25": "BM25"}
paths = sorted(glob.glob(out + "/eval_*/results.json"))
table = ["| nDCG@10, mean of three seeds (lowest - highest) |", "|---|"]
for path in paths:
    table[0] += f" {path.split('/')[-2].removeprefix('eval_')} |"
    table[1] += "---|"
results = [json.load(open(path))["rows"] for path in paths]
for key, title in rows.items():
    table.append(f"| {title} |")
    for result in results:
        x = [100 * r["score"] for r in result if re.sub(r".*/|_\d$", "", r["model"]) == key]
        spread = f" ({min(x):.1f} - {max(x):.1f})" if len(x) > 1 else ""
        table[-1] += f" {sum(x) / len(x):.1f}{spread} |"
open(out + "/table.md", "w").write("\n".join(table) + "\n")
print("", *table, sep="\n")
PYTHON
