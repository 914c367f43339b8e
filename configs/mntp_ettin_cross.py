# Ettin's decoder -> encoder by MNTP (arXiv 2507.11412): 50B tokens, every weight trains, documents
# packed. The same by masked language modelling: pretrain_ettin_cross.py --objective=mlm.
#   torchrun --nproc_per_node=8 train_mntp.py configs/mntp_ettin_cross.py \
#       --init_from=jhu-clsp/ettin-decoder-150m
init_from = "jhu-clsp/ettin-decoder-150m"
_name = init_from.rstrip("/").split("/")[-1].split("@")[0]
out_dir = f"out/{_name}-mntp"
data = "data/ettin_decay"  # yours to make, with data/text/prepare.py and its tokenizer

lora_rank = 0
save_merged = False
mask_token = "own"
mask_prob = 0.15

# 320 rows x 7,999 tokens = 2,559,680 tokens/step as in the phases of pretraining
max_seq_len = 7999  # the positions of the published decoders
batch_tokens = 320 * max_seq_len
device_batch_tokens = {"ettin-decoder-400m": 4, "ettin-decoder-1b": 2}.get(_name, 8) * max_seq_len

# 50B tokens = 19,534 steps: half the peak rate, 3B tokens of warmup, the last 10B down to 2 % of
# it, on a line; 1b: a third of these
_peaks = {"17m": 3e-3, "32m": 3e-3, "68m": 3e-3, "150m": 8e-4, "400m": 5e-4, "1b": 5e-4}
_decays = {"17m": 3e-4, "32m": 3e-4, "68m": 3e-4, "150m": 1e-5, "400m": 1e-5, "1b": 5e-5}
_size = _name.removeprefix("ettin-decoder-")
max_tokens = 16_666_666_667 if _size == "1b" else 50_000_000_000
learning_rate = _peaks[_size] / 2
min_lr = 0.02 * learning_rate
weight_decay = _decays[_size] / learning_rate  # of torch's kind: see pretrain_ettin.py
schedule = "wsd"
warmup_tokens = 1_000_000_000 if _size == "1b" else 3_000_000_000
decay_tokens = 3_333_000_000 if _size == "1b" else 10_000_000_000
decay_shape = "linear"
optimizer = "stable_adamw"
beta1, beta2, adam_eps = 0.9, 0.98, 1e-6
grad_clip = 0.0
out_dropout = 0.1

compile = True
eval_interval = 500
save_interval = 3900  # about 10B tokens
keep_last = 0  # every checkpoint stays
