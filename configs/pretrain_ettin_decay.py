# Ettin, phase 3 of 3: 100B tokens (50B in their configs) at 8,192, mask 15 %, decay to 2 % of peak.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin_decay.py \
#       --model_size=ettin-150m
base = "pretrain_ettin_ext.py"
init_from = f"out/{model_size}-{objective}-ext/ext52982"  # phase 2's last
out_dir = f"out/{model_size}-{objective}-decay"
data = "data/ettin_decay"
checkpoint_prefix = "decay"

max_tokens = 100_000_000_000  # 21,193 steps of 4,718,592 tokens
mask_prob = 0.15  # their configs; the data card says .05
min_lr = 0.02 * learning_rate
learning_rate = learning_rate / 2  # where phase 2 ended
