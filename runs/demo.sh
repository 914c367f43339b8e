#!/usr/bin/env bash
# From nothing to an encoder that has read Python's documentation, on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/4 environment: .venv"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt

say "2/4 data: the documentation of Python, numpy and torch on this machine"
[ -f data/pydocs/meta.json ] || .venv/bin/python data/pydocs/prepare.py

say "3/4 pretraining a masked language model"
.venv/bin/python pretrain_mlm.py configs/mlm_pydocs_tiny.py --resume=True
.venv/bin/python plot.py out/mlm_pydocs_tiny --keys=loss,eval_loss --out=out/mlm_pydocs_tiny/curves.png

say "4/4 what it has learned: five guesses for each [MASK]"
for text in \
    "Return a new array of given shape and type, filled with [MASK]." \
    "If the file does not exist, a FileNotFoundError is [MASK]." \
    "Return True if the string is empty, False [MASK]."; do
  .venv/bin/python sample.py --model=out/mlm_pydocs_tiny --text="$text"
done
echo
echo "The curve: out/mlm_pydocs_tiny/curves.png"
