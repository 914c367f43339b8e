# Anchor-Embedding, stage I: the tiny decoder on the documentation of Python, in minutes on 2 cores.
#   python pretrain_mlm.py configs/clm_pydocs_tiny.py
#   python train_reconstruct.py configs/reconstruct_pydocs_tiny.py
#   python train_contrastive.py configs/contrastive_anchor_tiny.py        # stage II
out_dir = "out/reconstruct_pydocs_tiny"
init_from = "out/clm_pydocs_tiny"  # its newest checkpoint

query_max_length = 48  # 1 query in 7 is cut, 3 passages in 8
passage_max_length = 96

data = ("data/pydocs/train.jsonl",)
eval_data = "data/pydocs/val.jsonl"

# 64 pairs/step x (32 + 66) tokens, each encoded and decoded; about 9,250 pairs = 145 steps an epoch
batch_size = 64
device_batch_size = 32
seed = 1338  # another order than stage II's
max_steps = 150

learning_rate = 1e-3  # of 5e-4 and 1e-3 the lower eval_loss after 60 steps
weight_decay = 0.01
schedule = "linear"
warmup_ratio = 0.1

eval_interval = 50
eval_lines = 200
save_interval = 150
