# Ettin, phase 1 of 3 (arXiv 2507.11412): six sizes, encoders and decoders, from one file.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin.py --model_size=ettin-150m
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin.py --model_size=ettin-150m \
#       --objective=clm                       # the decoder that pairs: same tokens, same order
# Then pretrain_ettin_ext.py, pretrain_ettin_decay.py and, crosswise, pretrain_ettin_cross.py.
model_size = "ettin-17m"  # ettin-17m -32m -68m -150m -400m -1b
objective = "mlm"  # clm: the decoder
out_dir = f"out/{model_size}-{objective}"
# yours to make: data/text/prepare.py --tokenizer answerdotai/ModernBERT-base --out data/ettin ...
data = "data/ettin"

# 2,784 rows x 1,024 tokens = 2,850,816 tokens/step; 1.7T tokens = 596,321 steps. Theirs: 4,608
# documents a step, each a row of its own of up to 1,024 tokens; 599,525 steps, so 2.836M tokens.
# 8 GPUs x 58 rows x 6 micro-batches; 400m: 8 x 29 x 12; 1b: 8 x 12 x 29
max_seq_len = 1024
batch_tokens = 2784 * max_seq_len
device_batch_tokens = {"ettin-400m": 29, "ettin-1b": 12}.get(model_size, 58) * max_seq_len
max_tokens = 1_700_000_000_000

mask_prob = 0.3
mask_all = False

optimizer = "stable_adamw"  # clips each tensor's update, so the gradient is not clipped
_peaks = {"17m": 3e-3, "32m": 3e-3, "68m": 3e-3, "150m": 8e-4, "400m": 5e-4, "1b": 5e-4}
_decays = {"17m": 3e-4, "32m": 3e-4, "68m": 3e-4, "150m": 1e-5, "400m": 1e-5, "1b": 5e-5}
_warmups = {"17m": 4, "32m": 4, "68m": 3, "150m": 3, "400m": 2, "1b": 2}  # billions of tokens
_size = model_size.removeprefix("ettin-")
learning_rate = _peaks[_size]
# their decay is theta *= 1 - lr / peak * decay, ours (torch's) theta *= 1 - lr * decay
weight_decay = _decays[_size] / learning_rate
beta1, beta2, adam_eps = 0.9, 0.98, 1e-6
grad_clip = 0.0
schedule = "constant"
warmup_tokens = _warmups[_size] * 1_000_000_000

compile = True
eval_interval = 2000
eval_tokens = 4 * 1024 * 1024
eval_mask_prob = 0.15  # in all phases, whatever they train with
save_interval = 1000
keep_models = 3000  # about 8.5B tokens: each of these stays usable
keep_states = 30_000  # and from each of these a decay can be forked
