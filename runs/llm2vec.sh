#!/usr/bin/env bash
# LLM2Vec's chain at toy size, on two CPU cores, from a decoder trained here: what does each step buy?
#   bash runs/llm2vec.sh [folder of a Universal Dependencies treebank]      # with it: POS tags, too
# The decoder is trained once, the steps behind it with three seeds. What is there is used again:
# after a change of steps or of the treebank, remove out/llm2vec and data/ud first.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is stopped saves and ends well: the next one must not begin
ud=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
python=${PYTHON:-.venv/bin/python}
[ -d "$ud" ] || ud=
out=out/llm2vec seeds="1 2 3"
mkdir -p $out

say "1/5 data and a decoder: causal pretraining on Python's documentation"
[ -f data/pydocs/meta.json ] || $python data/pydocs/prepare.py
$python pretrain_mlm.py configs/clm_pydocs_tiny.py --resume=True

say "2/5 masked next-token prediction, merged"
for seed in $seeds; do
    [ -d $out/mntp-$seed/merged ] || $python train_mntp.py configs/mntp_pydocs_tiny.py \
        --out_dir=$out/mntp-$seed --seed=$seed --resume=True
done

say "3/5 SimCSE on the merged model, without pairs: a text and itself, under two draws of dropout"
# the bodies of the training pairs, each for itself
[ -f $out/texts.jsonl ] || $python - $out/texts.jsonl <<'PYTHON'
import json, sys
with open("data/pydocs/train.jsonl") as f, open(sys.argv[1], "w") as out:
    for line in f:
        out.write(json.dumps({"text": json.loads(line)["pos"][0]}) + "\n")
PYTHON
train() {  # out_dir, then keys; LoRA as in MNTP, 64 texts a step
    [ -d "$1/step$steps" ] || $python train_contrastive.py configs/contrastive_pydocs_tiny.py \
        --out_dir="$1" --num_epochs=None --max_steps=$steps --batch_size=64 --lora_rank=16 \
        --resume=True "${@:2}"
}
for seed in $seeds; do
    steps=20 train $out/mntp-simcse-$seed --init_from=$out/mntp-$seed/merged --seed=$seed \
        --data="['$out/texts.jsonl']" --eval_data= --query_max_length=64 --passage_max_length=64 \
        --attn_dropout=0.3 --learning_rate=1e-3
done

say "4/5 supervised, from the decoder as it is, from the decoder that looks both ways, from MNTP"
for seed in $seeds; do
    for from in causal bidirectional mntp; do
        init=out/clm_pydocs_tiny attention=$from
        [ $from != mntp ] || init=$out/mntp-$seed/merged attention=bidirectional
        steps=20 train $out/$from-supervised-$seed --init_from=$init --attention=$attention \
            --seed=$seed --learning_rate=3e-3 --eval_interval=0 --passage_max_length=128
    done
done

say "5/5 evaluation on modules that no training saw"
models=out/clm_pydocs_tiny
for seed in $seeds; do
    models+=",$out/mntp-$seed/merged,$out/mntp-simcse-$seed"
    for from in causal bidirectional mntp; do models+=",$out/$from-supervised-$seed"; done
done
$python eval_mteb.py --local=data/pydocs/test.jsonl --model=$models --max_length=128 \
    --out_dir=$out/eval
$python eval_mteb.py --local=data/pydocs/test.jsonl --model=out/clm_pydocs_tiny \
    --attention=bidirectional --max_length=128 --baselines= --out_dir=$out/eval-bidirectional

if [ -n "$ud" ]; then
    [ -f data/ud/test.jsonl ] || $python data/ud/prepare.py --input "$ud"
    tags() {  # out_dir, then keys; a linear layer on the frozen model
        [ -f "$1/results.json" ] || $python train_classifier.py configs/classifier_pos_ud.py \
            --out_dir="$1" --eval_data=data/ud/test.jsonl --max_steps=200 --eval_interval=200 \
            --learning_rate=5e-3 --resume=True "${@:2}"
    }
    for seed in $seeds; do
        for at in same next; do
            keys="--seed=$seed --label_position=${at}_token"
            tags $out/pos-causal-$at-$seed --init_from=out/clm_pydocs_tiny $keys
            tags $out/pos-bidirectional-$at-$seed --init_from=out/clm_pydocs_tiny \
                --attention=bidirectional $keys
            tags $out/pos-mntp-$at-$seed --init_from=$out/mntp-$seed/merged $keys
            tags $out/pos-mntp-simcse-$at-$seed --init_from=$out/mntp-simcse-$seed $keys
        done
    done
fi

$python - $out "$ud" $seeds <<'PYTHON' | tee $out/table.md
import json, os, sys
out, ud, *seeds = sys.argv[1:]

def read(*path):
    with open(os.path.join(out, *path)) as f:
        return json.load(f)

ndcg = {row["model"]: row["score"] for row in read("eval", "results.json")["rows"]}
both = {row["model"]: row["score"] for row in read("eval-bidirectional", "results.json")["rows"]}

def tags(name):
    if not ud:
        return []
    def accuracy(at, seed):
        return read(f"pos-{name}-{at}-{seed}", "results.json")["data/ud/test.jsonl"]["metrics"]["acc"]
    return [[accuracy(at, seed) for seed in seeds] for at in ("same", "next")]

def show(scores):
    if not scores:
        return "-"
    mean, low, high = (100 * x for x in (sum(scores) / len(scores), min(scores), max(scores)))
    return f"{mean:.1f}" + (f" ({low:.1f} - {high:.1f})" if len(scores) > 1 else "")

decoder = "out/clm_pydocs_tiny"
rows = [
    ("decoder, causal", [ndcg[decoder]], "causal"),
    ("decoder, bidirectional, untrained so", [both[decoder]], "bidirectional"),
    ("+ MNTP", [ndcg[f"{out}/mntp-{s}/merged"] for s in seeds], "mntp"),
    ("+ MNTP + SimCSE", [ndcg[f"{out}/mntp-simcse-{s}"] for s in seeds], "mntp-simcse"),
]
for name, start in [("decoder, causal", "causal"), ("decoder, bidirectional", "bidirectional"),
                    ("+ MNTP", "mntp")]:
    rows.append((f"{name} + supervised", [ndcg[f"{out}/{start}-supervised-{s}"] for s in seeds], ""))
rows += [("BM25", [ndcg["bm25"]], ""), ("random", [ndcg["random"]], "")]
head = ["", "retrieval, nDCG@10"] + ["POS at the word", "POS one before"] * bool(ud)
print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
for name, scores, probe in rows:
    cells = [show(scores)] + ([show(x) for x in tags(probe)] if probe else ["-"] * 2 * bool(ud))
    print(f"| {' | '.join([name, *cells])} |")
print(f"\nMean over seeds {', '.join(seeds)} (lowest - highest); the decoder is one.")
PYTHON
