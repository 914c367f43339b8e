# Ettin, or any ModernBERT, as a dense retriever: MS MARCO triplets, batch 512 (gradient cache).
#   python data/st_triplets/prepare.py --config triplet-hard --max_rows 1250000 --val_share 0.001 \
#       --dataset sentence-transformers/msmarco-co-condenser-margin-mse-sym-mnrl-mean-v1 \
#       --out data/st_triplets/msmarco.jsonl
#   python train_contrastive.py configs/contrastive_ettin_dense.py            # one GPU
# Other sizes: --init_from=jhu-clsp/ettin-encoder-17m, -32m, -68m, -400m, -1b; the decoders
# want --pooling=last.
init_from = "jhu-clsp/ettin-encoder-150m"
out_dir = f"out/{init_from.split('/')[-1]}-dense"

pooling = "mean"
query_max_length = 512
passage_max_length = 512

data = ("data/st_triplets/msmarco.jsonl",)
eval_data = "data/st_triplets/msmarco.val.jsonl"
group_size = 2
no_duplicates = True

# 512 queries/step, each among 1,024 passages; 1.25M triplets = 2,440 steps
batch_size = 512
num_epochs = 1
temperature = 0.05  # scale 20

learning_rate = 8e-5
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.05

# Memory, estimated for 150m: weights, gradients and Adam in fp32 2.4 GB; chunks of 16,384 tokens
# 6 GB. The batch costs only its vectors: 1,536 x 768 x 4 bytes = 5 MB.
device_batch_tokens = 16384
eval_interval = 250
save_interval = 500
