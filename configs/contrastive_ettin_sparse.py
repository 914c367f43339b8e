# Ettin as a sparse retriever (SPLADE): a weight for each entry of the vocabulary.
#   python data/st_triplets/prepare.py --dataset sentence-transformers/natural-questions \
#       --val_share 0.01 --out data/st_triplets/natural-questions.jsonl
#   python train_contrastive.py configs/contrastive_ettin_sparse.py
init_from = "jhu-clsp/ettin-encoder-150m"  # it needs the masked language modelling head
out_dir = f"out/{init_from.split('/')[-1]}-sparse"

pooling = "splade"
normalize = False  # dot products
query_max_length = 256
passage_max_length = 256

data = ("data/st_triplets/natural-questions.jsonl",)
eval_data = "data/st_triplets/natural-questions.val.jsonl"
group_size = 1  # pairs
no_duplicates = True

# 16 pairs/step; 99,000 pairs = 6,190 steps
batch_size = 16
num_epochs = 1
temperature = 1.0  # scale 1, dot products
query_flops = 5e-5
passage_flops = 3e-5
flops_warmup_ratio = 1 / 3  # 0 at first, and in full after a third of the run

learning_rate = 2e-5
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.1

# Memory, estimated for 150m: 2.4 GB + 6 GB for chunks of 16,384 tokens; the logits [T, 50368] exist
# for a few texts at a time
device_batch_tokens = 16384
eval_interval = 500
save_interval = 2000
