#!/usr/bin/env bash
# Ettin's three phases for encoder and decoder, then each trained on with the other's objective:
#   SIZE=ettin-150m bash runs/ettin.sh                   # data/ettin, data/ettin_8k, data/ettin_decay
#   SIZE=ettin-17m OBJECTIVES=mlm LAUNCH=python bash runs/ettin.sh
#   TINY=1 bash runs/ettin.sh                            # data/pydocs, minutes on two cores
# Killed? Run the same command again: each phase goes on where it stopped.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is stopped saves and ends well: the next one must not begin
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
size=${SIZE:-ettin-17m} objectives=${OBJECTIVES:-mlm clm}
out=out/$size
launch=${LAUNCH:-$python -m torch.distributed.run --standalone --nproc_per_node=8}
all="" phase1="" phase2="" phase3="" cross=""  # keys of each; words, as no value has a space
if [ -n "${TINY:-}" ]; then
    launch=${LAUNCH:-$python} out=out/ettin-tiny
    all="--data=data/pydocs --batch_tokens=2048 --device_batch_tokens=2048 --compile=False
        --eval_interval=25 --eval_tokens=16384 --save_interval=25 --keep_models=25 --log_interval=5"
    phase1="--vocab_size=8192 --max_seq_len=256 --max_steps=250 --max_tokens=None
        --warmup_tokens=20480 --learning_rate=1e-3"
    phase2="--max_seq_len=1024 --max_steps=100 --max_tokens=None --learning_rate=1e-3"
    phase3="--max_seq_len=1024 --max_steps=100 --max_tokens=None --learning_rate=5e-4
        --weight_decay=0.3 --min_lr=2e-5"
    cross="$phase3 --warmup_tokens=20480 --decay_tokens=40960"
fi

train() { # OBJECTIVE FOLDER BASE CONFIG [KEYS]
    local name=$2 from=${3:+--init_from=$out/$3} config=configs/pretrain_ettin$4.py objective=$1
    shift 4
    printf '\n\033[1m== %s\033[0m\n' "$out/$name"
    $launch pretrain_mlm.py "$config" --model_size="$size" --objective="$objective" $from \
        --out_dir="$out/$name" --resume=True $all "$@"
}
for o in $objectives; do
    train $o $o "" "" $phase1
    train $o $o-ext $o _ext $phase2
    train $o $o-decay $o-ext _decay $phase3
done
for o in $objectives; do
    other=$([ $o = mlm ] && echo clm || echo mlm)
    train $other $o-to-$other $o-decay _cross $cross
    $python -m tools.plot "$out/$o" "$out/$o-ext" "$out/$o-decay" "$out/$o-to-$other" --joined \
        --out="$out/$o.png"
done
