# How much two sentences mean the same, as a number: STS-B (Cer et al. 2017, arXiv 1708.00055),
# lines {"text", "text_pair", "label": 0.0 to 5.0}, 5,749 to train on and 1,500 of dev.
#   python train_classifier.py configs/classifier_stsb.py --data=stsb-train.jsonl \
#       --eval_data=stsb-dev.jsonl
out_dir = "out/classifier_stsb"
task = "texts"
init_from = "jhu-clsp/ettin-encoder-150m"

data = "data/stsb/train.jsonl"
eval_data = "data/stsb/val.jsonl"
loss_kind = "mse"  # judged by Pearson's and Spearman's correlation
max_length = 256

freeze_backbone = False
pooling = "mean"
prediction_head = True
dropout = 0.1
learning_rate = 5e-5
weight_decay = 0.01
schedule = "linear"
warmup_ratio = 0.1

# 16 pairs/step; 5,749 pairs x 4 epochs = 1,438 steps
batch_size = 16
device_batch_size = 16
num_epochs = 4
eval_interval = 360
save_interval = 720
