# Ettin, phase 2 of 3: 250B tokens at 7,999, rope theta 160,000, the rate falls to a half.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin_ext.py \
#       --model_size=ettin-150m
base = "pretrain_ettin.py"
init_from = f"out/{model_size}-{objective}"  # phase 1's newest checkpoint
out_dir = f"out/{model_size}-{objective}-ext"
data = "data/ettin_8k"  # likewise, of the longer documents
checkpoint_prefix = "ext"

# 320 rows x 7,999 tokens = 2,559,680 tokens/step; 250B tokens = 97,669 steps (theirs: about 100k)
# 8 GPUs x 8 rows x 5 micro-batches; 400m: 8 x 4 x 10; 1b: 8 x 2 x 20
max_seq_len = 7999
batch_tokens = 320 * max_seq_len
device_batch_tokens = {"ettin-400m": 4, "ettin-1b": 2}.get(model_size, 8) * max_seq_len
max_tokens = 83_333_000_000 if _size == "1b" else 250_000_000_000
rope_theta = 160_000.0
local_rope_theta = 10_000.0 if _size == "17m" else None

schedule = "wsd"  # no plateau: 1 - sqrt(t) over the whole phase
decay_shape = "sqrt"
decay_ratio = 1.0
init_state = True  # with empty moments StableAdamW's first updates are as large as the rate
warmup_tokens = 0
min_lr = learning_rate / 2
