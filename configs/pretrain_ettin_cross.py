# Ettin's cross-objective training: 50B tokens of the other objective, from the finished model.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin_cross.py \
#       --model_size=ettin-150m --objective=clm      # encoder -> decoder
# --objective=mlm is decoder -> encoder (the authors' blog says with MNTP's shifted labels), saved
# as a ModernBERT.
base = "pretrain_ettin_decay.py"
_other = {"clm": "mlm", "mlm": "clm"}[objective]
init_from = f"out/{model_size}-{_other}-decay"  # its newest checkpoint; a new schedule
out_dir = f"out/{model_size}-{_other}-to-{objective}"
checkpoint_prefix = "step"

# half the peak rate, 3B warmup, the last 10B down to 2 %; 50B tokens = 19,534 steps; 1b: a third
init_state = False
max_tokens = 16_666_666_667 if _size == "1b" else 50_000_000_000
learning_rate = _peaks[_size] / 2
min_lr = 0.02 * learning_rate
weight_decay = _decays[_size] / learning_rate  # a fresh optimizer: its peak is this one
local_rope_theta = None  # 160,000 for all, as theirs, though some decays end with 10,000
warmup_tokens = 1_000_000_000 if _size == "1b" else 3_000_000_000
decay_ratio = None
decay_tokens = 3_333_000_000 if _size == "1b" else 10_000_000_000
decay_shape = "linear"
