# The tiny decoder of clm_pydocs_tiny looks both ways, in two minutes on two CPU cores.
#   python pretrain_mlm.py configs/clm_pydocs_tiny.py
#   python train_mntp.py configs/mntp_pydocs_tiny.py
# What it buys, and what not: bash runs/llm2vec.sh
out_dir = "out/mntp_pydocs_tiny"
init_from = "out/clm_pydocs_tiny"  # its newest checkpoint
data = "data/pydocs"
max_seq_len = 512

mask_token = "own"  # [MASK]: the decoder has its row, untrained; LoRA learns to live with it
mask_prob = 0.2

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.05

# 8 rows x 512 tokens = 4,096 tokens/step; 80 steps = 328,000 tokens = 0.23 epochs
batch_tokens = 8 * max_seq_len
device_batch_tokens = batch_tokens
max_steps = 80
learning_rate = 6e-3  # a width of 256 bears 100 times LLM2Vec's
warmup_steps = 8

log_interval = 10
eval_interval = 80
eval_tokens = 32768
save_interval = 500
