# Classes of texts (intents, topics, sentiment): lines {"text", "label"}, the label a word or a
# number. With "text_pair" in each line: classes of pairs (entailment).
#   python train_classifier.py configs/classifier_texts.py --data=train.jsonl --eval_data=val.jsonl
out_dir = "out/classifier_texts"
task = "texts"
init_from = "out/mlm_pydocs_tiny"

data = "data/own/train.jsonl"
eval_data = "data/own/val.jsonl"
loss_kind = "softmax"
max_length = 128

freeze_backbone = False
pooling = "mean"
prediction_head = True
dropout = 0.1
learning_rate = 5e-4  # for 5M weights; 2e-5 to 5e-5 for 100M and more
weight_decay = 0.01
schedule = "linear"
warmup_ratio = 0.1

# 32 texts/step; 10,000 texts x 3 epochs = 938 steps
batch_size = 32
device_batch_size = 32
num_epochs = 3
eval_interval = 300
save_interval = 1000
