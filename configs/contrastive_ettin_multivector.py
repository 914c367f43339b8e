# Ettin as a multi-vector retriever (ColBERT), distilled from a teacher's scores.
#   python data/bge_msmarco/prepare.py
#   for s in train val; do python data/mine_negatives.py --model=Qwen/Qwen3-Embedding-0.6B --keep \
#       --negatives=0 --pairs=data/bge_msmarco/$s.jsonl --out=data/bge_msmarco/$s.scored.jsonl; done
#   python train_contrastive.py configs/contrastive_ettin_multivector.py
# The teacher is any embedder that scores better than you hope to; a cross-encoder's scores do, too.
init_from = "jhu-clsp/ettin-encoder-150m"
out_dir = f"out/{init_from.split('/')[-1]}-multivector"

pooling = "tokens"
query_instruction = ("[Q] ",)  # markers: which side a text is on
passage_instruction = ("[D] ",)
projection_dim = 128
query_max_length = 64
passage_max_length = 300

data = ("data/bge_msmarco/train.scored.jsonl",)
eval_data = "data/bge_msmarco/val.scored.jsonl"
group_size = 32  # all of a line

# 16 queries/step, each with its scored passages; 486K lines = 30,375 steps. The teacher's order of
# these alone: contrast_weight = 1.0 adds InfoNCE, which knows the other queries' passages, too.
batch_size = 16
num_epochs = 1
contrast_weight = 0.0
temperature = 1.0  # MaxSim is a sum over the query's tokens, up to 64, not a cosine
distill_weight = 1.0
distill_temperature = 0.05  # cosines of the teacher, spread to logits

learning_rate = 8e-5
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.05

# Memory, estimated for 150m: 2.4 GB + 6 GB for chunks of 16,384 tokens
device_batch_tokens = 16384
eval_interval = 1000
save_interval = 5000
