# A tiny ModernBERT encoder on Python's own documentation: minutes on two CPU cores.
#   python data/pydocs/prepare.py && python pretrain_mlm.py configs/mlm_pydocs_tiny.py
out_dir = "out/mlm_pydocs_tiny"
data = "data/pydocs"
model_size = "modernbert-tiny"
max_seq_len = 512
vocab_size = 8192

# 4 rows x 512 tokens = 2,048 tokens/step: small batches learn most from few tokens
# 1,600 steps = 3.3M tokens = 2.3 epochs
batch_tokens = 4 * max_seq_len
device_batch_tokens = batch_tokens
max_steps = 1600
warmup_ratio = 0.05

mask_prob = 0.3
learning_rate = 1e-3
min_lr = learning_rate / 50
weight_decay = 0.01
out_dropout = 0.0  # two passes over the data: nothing to regularise
schedule = "wsd"
decay_ratio = 0.3

log_interval = 50
eval_interval = 200
eval_tokens = 65536
save_interval = 400
