# A decoder becomes an embedder of Python's documentation: SmolLM2-135M on two cores: runs/demo.sh
#   python data/pydocs/prepare.py && python data/smollm2/prepare.py
#   python train_contrastive.py configs/contrastive_smollm2_pydocs.py
out_dir = "out/smollm2_pydocs"
init_from = "models/SmolLM2-135M-Instruct"
attention = "bidirectional"  # each token sees the whole text, as LLM2Vec's do
pooling = "mean"

data = ("data/pydocs/train_by_module.jsonl",)
consecutive = 8  # of one module: the other seven are hard negatives that cost no token
eval_data = "data/pydocs/val.jsonl"
query_max_length = 64  # most queries (name, signature, summary) are shorter
passage_max_length = 96  # a third of the passages is cut, and a step takes a third less time;
# what was trained on 96 tokens reads 256, and better: runs/demo.sh
group_size = 1  # no hard negatives
no_duplicates = True
both_directions = True  # passages choose among queries, too: twice the signal of a forward

lora_rank = 32
lora_alpha = 64.0
lora_dropout = 0.0

# 64 pairs/step x (25 + 60) tokens = about 5,500 tokens/step: one chunk, so one forward
batch_size = 64
device_batch_tokens = 16384
max_steps = 44
temperature = 0.04

learning_rate = 1e-3
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.1

log_interval = 1
eval_interval = 0  # runs/demo.sh scores the test before and after
save_interval = 500
