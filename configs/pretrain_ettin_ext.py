# Ettin, phase 2 of 3: 250B tokens at 8,192, rope theta 160,000, the rate falls to a half.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin_ext.py \
#       --model_size=ettin-150m
base = "pretrain_ettin.py"
init_from = f"out/{model_size}-{objective}/step360277"  # phase 1's last
out_dir = f"out/{model_size}-{objective}-ext"
data = "data/ettin_8k"  # likewise, of the longer documents
checkpoint_prefix = "ext"

# 576 rows x 8,192 tokens = 4,718,592 tokens/step as before; 250B tokens = 52,982 steps
max_seq_len = 8192
rope_theta = 160_000.0
device_batch_tokens = {"ettin-400m": 4, "ettin-1b": 2}.get(model_size, 8) * max_seq_len
max_tokens = 250_000_000_000

schedule = "wsd"  # no warmup, no plateau: 1 - sqrt(t) over the whole phase
decay_shape = "sqrt"
decay_ratio = 1.0
warmup_tokens = 0
min_lr = learning_rate / 2
