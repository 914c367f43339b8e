#!/usr/bin/env bash
# From nothing to a search over Python's documentation, on two CPU cores.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is stopped saves and ends well: the next one must not begin
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
python=.venv/bin/python

say "1/6 environment: .venv"
[ -x $python ] || python3 -m venv .venv
$python -m pip install -q --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
$python -m pip install -q --disable-pip-version-check -r requirements.txt

say "2/6 data: the documentation of Python, numpy and torch on this machine"
[ -f data/pydocs/meta.json ] || $python data/pydocs/prepare.py

say "3/6 pretraining: a masked language model"
$python pretrain_mlm.py configs/mlm_pydocs_tiny.py --resume=True
$python -m tools.plot out/mlm_pydocs_tiny --keys=loss,eval_loss --out=out/mlm_pydocs_tiny/curves.png

say "4/6 what it has learned: five guesses for each [MASK]"
cat > out/masks.txt <<'TEXTS'
Return a new array of given shape and [MASK], filled with zeros.
If the file does not exist, FileNotFoundError is [MASK].
Return True if the object is a string, [MASK] otherwise.
TEXTS
$python sample.py --model=out/mlm_pydocs_tiny --file=out/masks.txt | grep -A 99 'attention by'

say "5/6 contrastive training: questions near their answers"
$python train_contrastive.py configs/contrastive_pydocs_tiny.py --resume=True

say "6/6 retrieval over modules that no training saw"
[ -d out/untrained ] || $python - <<'PYTHON'
import torch
from formats.huggingface import save_pretrained
from model import from_scratch
from tokenizer import load_tokenizer
torch.manual_seed(1337)
tokenizer = load_tokenizer("data/pydocs/tokenizer")
specials = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")]
ids = {key: getattr(tokenizer, key) for key in specials}
save_pretrained(from_scratch("modernbert-tiny", hf=ids), "out/untrained")
tokenizer.save_pretrained("out/untrained")
PYTHON
$python eval_mteb.py --local=data/pydocs/test.jsonl --out_dir=out/eval_pydocs \
    --model=out/untrained,out/mlm_pydocs_tiny,out/contrastive_pydocs_tiny
$python sample.py --model=out/contrastive_pydocs_tiny --rank="How do I split a string into words?" \
    | tail -n 12
echo
echo "The curve: out/mlm_pydocs_tiny/curves.png   The table: out/eval_pydocs/results.md"
