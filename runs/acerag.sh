#!/usr/bin/env bash
# AceRAG (TacZip) at toy size, on two CPU cores: a decoder trained here, then passage retrieval
# (stage 1), then token retrieval (stage 2), against stage 2 alone and what learns nothing; 3 seeds.
#   bash runs/acerag.sh                  # on Python's documentation
#   bash runs/acerag.sh path/to/qed      # and on QED: a folder with train.jsonl.gz and dev.jsonl.gz
# Runs that are done are not done again. PYTHON=python bash ... takes your own environment.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is stopped saves and ends well: the next one must not begin
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
python=${PYTHON:-.venv/bin/python}
qed=${1:-}
out=out/acerag
stage1=80 stage2=100 # steps, of 64 pairs and of 16 queries
mkdir -p $out

say "data and the decoder"
if [ "$python" = .venv/bin/python ] && [ ! -x $python ]; then
    python3 -m venv .venv
    $python -m pip install -q --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
    $python -m pip install -q --disable-pip-version-check -r requirements.txt
fi
[ -f data/pydocs/spans_test.jsonl ] || $python data/pydocs/prepare.py
$python pretrain_mlm.py configs/clm_pydocs_tiny.py --resume=True
pairs="'data/pydocs/train.jsonl'"
tasks=pydocs first=stage1
if [ -n "$qed" ]; then
    tasks="pydocs qed" first=stage1-qed # that stage 1 has seen QED's pairs, too
    [ -f $out/qed_train.jsonl ] || $python data/qa_spans/prepare.py --format=qed \
        --input "$qed/train.jsonl.gz" --out $out/qed_train.jsonl
    # 93 of dev's passages stand in train, too: their questions are left out
    [ -f $out/qed_dev.jsonl ] || $python data/qa_spans/prepare.py --format=qed \
        --input "$qed/dev.jsonl.gz" --out $out/qed_dev.jsonl --without $out/qed_train.jsonl
    # question -> paragraph, for stage 1
    $python - $out <<'PYTHON'
import json, sys
with open(f"{sys.argv[1]}/qed_train.jsonl") as f, open(f"{sys.argv[1]}/qed_pairs.jsonl", "w") as g:
    for record in map(json.loads, f):
        g.write(json.dumps({"query": record["query"], "pos": [record["passage"]]}) + "\n")
PYTHON
    pairs="$pairs,'$out/qed_pairs.jsonl'"
fi

for seed in 1 2 3; do
    say "seed $seed, stage 1: passage retrieval"
    $python train_contrastive.py configs/contrastive_pydocs_tiny.py --seed=$seed --resume=True \
        --init_from=out/clm_pydocs_tiny --pooling=last --data="($pairs,)" --batch_size=64 \
        --num_epochs=None --max_steps=$stage1 --eval_interval=0 --out_dir=$out/$first-$seed
    for task in $tasks; do
        if [ $task = pydocs ]; then
            test=data/pydocs/spans_test.jsonl
            files="--data=data/pydocs/spans_train.jsonl"
        else
            test=$out/qed_dev.jsonl
            files="--data=$out/qed_train.jsonl --passage_max_length=384"
            files+=" --rope_scaling=() --max_seq_len=None" # within the 512 positions of the decoder
        fi
        for start in $first none; do
            from=out/clm_pydocs_tiny
            [ $start = none ] || from=$out/$first-$seed
            run=$out/$task-$start-$seed
            say "seed $seed, stage 2: $task from $from"
            # the test data is looked at once, when all is done
            $python train_token_retrieval.py configs/token_retrieval_pydocs_tiny.py $files \
                --seed=$seed --resume=True --init_from=$from --batch_size=16 \
                --num_epochs=None --max_steps=$stage2 --eval_interval=0 --out_dir=$run
            [ -f $run/results.json ] || $python -m evals.token_retrieval --model=$run \
                --eval_data=$test --eval_lines=0 --out_dir=$run
        done
    done
done

say "results: mean (min-max) over the seeds"
$python - $out $first $tasks <<'PYTHON'
import glob, json, sys
out, first, *tasks = sys.argv[1:]
columns = ["ap", "ndcg", "recall_16x", "recall_8x", "recall_4x", "answer_16x", "answer_8x", "answer_4x"]
for task in tasks:
    rows = {}
    for start, name in (("none", "stage 2 alone"), (first, "stage 1, then stage 2")):
        for path in sorted(glob.glob(f"{out}/{task}-{start}-*/results.json")):
            with open(path) as f:
                found = json.load(f)
            for way, numbers in found["results"].items():
                rows.setdefault(name if way == "model" else way, []).append(numbers)
    have = [c for c in columns if c in rows["random"][0]]
    print(f"\n{task}, {found['queries']} queries, {len(rows['stage 2 alone'])} seeds\n")
    print("| | " + " | ".join(have) + " |\n" + "|---" * (len(have) + 1) + "|")
    for name, runs in rows.items():
        cells = []
        for column in have:
            x = [100 * run[column] for run in runs]
            mean, spread = sum(x) / len(x), f" ({min(x):.1f}-{max(x):.1f})" if max(x) > min(x) else ""
            cells.append(f"{mean:.1f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")
PYTHON
