# The tiny encoder of mlm_pydocs_tiny as a retriever over Python's documentation, in minutes.
#   python data/pydocs/prepare.py && python pretrain_mlm.py configs/mlm_pydocs_tiny.py
#   python train_contrastive.py configs/contrastive_pydocs_tiny.py
out_dir = "out/contrastive_pydocs_tiny"
init_from = "out/mlm_pydocs_tiny"  # its newest checkpoint

pooling = "mean"
query_max_length = 64  # 95 % of the queries (name, signature, summary) are shorter
passage_max_length = 192  # half of the passages have fewer than 70 tokens, 1 in 6 is cut

data = ("data/pydocs/train.jsonl",)
eval_data = "data/pydocs/val.jsonl"
group_size = 1  # there are no hard negatives; data/mine_negatives.py makes some
no_duplicates = True

# 128 pairs/step, each among 128 passages; about 9,400 pairs = 74 steps an epoch
# 128 x 34 tokens of queries + 128 x 90 of passages = 16,000 tokens/step
batch_size = 128
num_epochs = 2
temperature = 0.05

learning_rate = 5e-4
weight_decay = 0.01
schedule = "linear"
warmup_ratio = 0.1

device_batch_tokens = 8192
eval_interval = 25
save_interval = 500
