# NeoBERT's second phase: 50,000 steps at 4,096 tokens.
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/mlm_neobert_4096.py
# data holds the paper's mixture: 20 % all documents, 40 % those of 1,024 tokens and more, 40 %
# those of 2,048 and more.
base = "mlm_neobert.py"
init_from = "out/neobert-250m/step1000000"
out_dir = "out/neobert-250m-4096"
data = "data/refinedweb_4096"

# 8 GPUs x 16 rows x 4 micro-batches x 4,096 tokens = 2,097,152 tokens/step
# 50,000 steps = 105B tokens
max_seq_len = 4096
device_batch_tokens = 16 * max_seq_len
max_steps = 50_000
schedule = "constant"
learning_rate = 0.1 * learning_rate  # the floor where phase 1 ended
warmup_steps = 0
