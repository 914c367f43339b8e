#!/usr/bin/env bash
# A decoder that continues texts becomes one that finds them: SmolLM2-135M and Python's
# documentation, on two CPU cores. Where SmolLM2 cannot be had, runs/from_scratch.sh trains a model.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is stopped saves and ends well: the next one must not begin
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
python=.venv/bin/python
model=models/SmolLM2-135M-Instruct

say "1/6 environment: .venv"
[ -x $python ] || python3 -m venv .venv
$python -m pip install -q --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
$python -m pip install -q --disable-pip-version-check -r requirements.txt

say "2/6 data: the documentation of Python, numpy and torch on this machine"
[ -f data/pydocs/meta.json ] || $python data/pydocs/prepare.py

say "3/6 model: SmolLM2-135M, which continues texts"
$python -m pip install -q --disable-pip-version-check "$(grep '^gguf==' requirements-dev.txt)" &&
    $python data/smollm2/prepare.py || exec bash runs/from_scratch.sh

say "4/6 before: 499 questions on modules that no training sees"
score() { $python eval_mteb.py --local=data/pydocs/test.jsonl --max_length=256 "$@"; }
score --model=$model --attention=bidirectional --baselines=bm25,bm25:stem:k1=2:b=1 \
    --out_dir=out/demo/before

say "5/6 contrastive training: questions near their answers"
begin=$SECONDS
$python train_contrastive.py configs/contrastive_smollm2_pydocs.py --resume=True
seconds=$((SECONDS - begin))
$python -m tools.plot out/smollm2_pydocs --keys=loss,acc --out=out/demo/curve.png

say "6/6 after"
score --model=out/smollm2_pydocs --baselines= --out_dir=out/demo/after
$python - "$seconds" <<'PYTHON'
import json
import sys

from data import open_pairs, read_pair
from embedder import Embedder

before, after = ({row["model"]: 100 * row["score"] for row in json.load(open(path))["rows"]}
                 for path in ("out/demo/before/results.json", "out/demo/after/results.json"))
result = {
    "ndcg": after["out/smollm2_pydocs"], "untrained": before["models/SmolLM2-135M-Instruct"],
    "bm25": before["bm25"], "bm25_tuned": next(x for name, x in before.items() if ":" in name),
    "seconds_training": int(sys.argv[1]),
}
json.dump(result, open("out/demo.json", "w"), indent=1)
print(json.dumps(result))

embedder = Embedder.load("out/smollm2_pydocs", max_length=256)
test = open_pairs("data/pydocs/test.jsonl")
texts = [read_pair(test, i)["pos"][0] for i in range(len(test))]
names = [read_pair(test, i)["query"].partition("(")[0] for i in range(len(test))]
passages = embedder.encode(texts)
for question in ("How do I split a string into words?", "How do I loop over the lines of several files?",
                 "compress a file so that it takes less space"):
    print(f"\n{question}")
    scores = passages @ embedder.encode([question])[0]
    for i in scores.argsort()[:-4:-1]:
        print(f"  {scores[i]:.2f}  {names[i]}: {' '.join(texts[i].split())[:90]}")
PYTHON
echo
echo "The curve: out/demo/curve.png   The scores: out/demo.json   The embedder: out/smollm2_pydocs/final"
