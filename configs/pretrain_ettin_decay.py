# Ettin, phase 3 of 3: 50B tokens (their configs; the model card says 100B), mask 15 %, the rate
# falls to 2 % of the peak.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin_decay.py \
#       --model_size=ettin-150m
base = "pretrain_ettin_ext.py"
init_from = f"out/{model_size}-{objective}-ext"  # phase 2's newest checkpoint
out_dir = f"out/{model_size}-{objective}-decay"
data = "data/ettin_decay"
checkpoint_prefix = "decay"

max_tokens = 16_666_666_667 if _size == "1b" else 50_000_000_000  # 19,534 steps (about 20k)
_short = objective == "clm" and _size in ("17m", "32m", "68m", "400m")
local_rope_theta = 10_000.0 if _short else None  # else rope_theta's 160,000
mask_prob = 0.15  # their configs; the data card says .05
min_lr = 0.02 * learning_rate
learning_rate = learning_rate / 2  # where phase 2 ended
