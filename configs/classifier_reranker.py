# A cross-encoder that scores (query, passage), for reranking (Nogueira and Cho 2019,
# arXiv 1901.04085): one number, 1 for a passage that answers, 0 for one that does not.
#   python data/mine_negatives.py --help     # 5 hard negatives a query: data/own/train.jsonl
#   python train_classifier.py configs/classifier_reranker.py --data=data/own/train.jsonl \
#       --eval_data=data/own/val.jsonl
# Lines {"query", "pos", "neg"}, or {"text", "text_pair", "label": 0 or 1}.
out_dir = "out/classifier_reranker"
task = "texts"
init_from = "jhu-clsp/ettin-encoder-150m"

data = "data/own/train.jsonl"
eval_data = "data/own/val.jsonl"
loss_kind = "bce"
_negatives = 5  # of each query
pos_weight = float(_negatives)  # negatives / positives: both sides weigh the same
max_length = 512

freeze_backbone = False
pooling = "cls"
prediction_head = True  # transformers' ModernBertForSequenceClassification
dropout = 0.1
learning_rate = 2e-5
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.1

# 64 pairs/step = those of 10 to 11 queries with 1 positive and 5 negatives, up to 32,768 tokens
batch_size = 64
device_batch_size = 8
num_epochs = 1
eval_interval = 1000
save_interval = 1000
