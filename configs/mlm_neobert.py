# NeoBERT 250M from scratch (arXiv 2502.19587): RefinedWeb, 1M steps of 2.1M tokens at 1,024.
#   python data/text/prepare.py --dataset tiiuae/falcon-refinedweb --field content \
#       --tokenizer google-bert/bert-base-uncased --out data/refinedweb
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/mlm_neobert.py
# Then mlm_neobert_4096.py.
out_dir = "out/neobert-250m"
data = "data/refinedweb"
model_size = "neobert-250m"

# 8 GPUs x 64 rows x 4 micro-batches x 1,024 tokens = 2,097,152 tokens/step; 1M steps = 2.1T tokens
max_seq_len = 1024
batch_tokens = 8 * 64 * 4 * max_seq_len
device_batch_tokens = 64 * max_seq_len
max_steps = 1_000_000

mask_prob = 0.2
mask_all = True

learning_rate = 6e-4  # the paper's; the default of the published code is 1e-4
min_lr = 0.1 * learning_rate
beta1, beta2, adam_eps = 0.9, 0.95, 1e-8
weight_decay = 0.01
decay_all = True
grad_clip = 1.0
schedule = "cosine"
warmup_steps = 2000
decay_steps = 900_000 - warmup_steps  # to the floor at step 900,000

compile = True
eval_interval = 5000
save_interval = 2000
keep_models = 10_000
