# Ettin's decoder -> encoder by MNTP (arXiv 2507.11412): 50B tokens, every weight trains, documents
# packed. The same by masked language modelling: pretrain_ettin_cross.py --objective=mlm.
#   torchrun --nproc_per_node=8 train_mntp.py configs/mntp_ettin_cross.py \
#       --init_from=jhu-clsp/ettin-decoder-150m
init_from = "jhu-clsp/ettin-decoder-150m"
_name = init_from.rstrip("/").split("/")[-1].split("@")[0]
out_dir = f"out/{_name}-mntp"
data = "data/ettin-decay"  # yours to make, with data/text/prepare.py and its tokenizer

lora_rank = 0
save_merged = False
mask_token = "own"
mask_prob = 0.15

# 576 rows x 8,192 tokens = 4,718,592 tokens/step as in pretraining
max_seq_len = 8192
batch_tokens = 576 * max_seq_len
device_batch_tokens = {"ettin-decoder-400m": 4, "ettin-decoder-1b": 2}.get(_name, 8) * max_seq_len
max_tokens = 50_000_000_000  # 10,597 steps

# half the peak rate, 3B tokens of warmup, the last 10B down to 2 % of it, on a line
_peaks = {"17m": 3e-3, "32m": 3e-3, "68m": 3e-3, "150m": 8e-4, "400m": 5e-4, "1b": 5e-4}
_decays = {"17m": 3e-4, "32m": 3e-4, "68m": 3e-4, "150m": 1e-5, "400m": 1e-5, "1b": 5e-5}
_size = _name.removeprefix("ettin-decoder-")
learning_rate = _peaks[_size] / 2
min_lr = 0.02 * learning_rate
weight_decay = _decays[_size] / _peaks[_size]  # of torch's kind: see pretrain_ettin.py
schedule = "wsd"
warmup_tokens = 3_000_000_000
decay_tokens = 10_000_000_000
decay_shape = "linear"
# AdamW and a clipped gradient, where Ettin has StableAdamW
beta1, beta2, adam_eps = 0.9, 0.98, 1e-6
grad_clip = 1.0

compile = True
eval_interval = 500
save_interval = 1800
keep_last = 0  # every checkpoint stays
