# NeoBERT, contrastive fine-tuning (arXiv 2502.19587): one data set a batch, drawn with
# p ~ lines^0.5, 30 % of the steps SimCSE.
#   see data/st_triplets/readme.md for the commands that prepare the data
#   torchrun --standalone --nproc_per_node=8 train_contrastive.py configs/contrastive_neobert.py
# The numbers of the optimizer are those of the fork pszemraj/NeoBERT.
out_dir = "out/neobert-contrastive"
init_from = "chandar-lab/NeoBERT"  # or out/neobert-250m-4096/step50000
attn_dropout = 0.1  # SimCSE needs a dropout

pooling = "mean"
query_max_length = 256
passage_max_length = 256

# Theirs has 17 data sets. FEVER and ConcurrentQA are left out here: a join and a nested form. And
# theirs takes its SimCSE texts from RefinedWeb, where these are Wikipedia's sentences.
_sets = (
    "all-nli amazon-qa github-issues gooaq paq pubmedqa qqp sentence-compression "
    "stackexchange-body stackexchange-post stackoverflow sts12 stsb trivia-qa wikihow"
).split()
_msmarco = ("data/bge_msmarco/train.jsonl",)
# A file's weight is the root of its lines: PAQ (64M) 8,000, GooAQ 1,700, Amazon-QA 1,050, the 16
# of them about 15,000 (an estimate: the start of a run prints the lines). Wiki1M weighs 1,000 a
# mention, so 6 mentions are 6,000 / 21,000 = 29 % of the steps.
_simcse = ("data/wiki1m/train.jsonl",) * 6
data = tuple(f"data/st_triplets/{name}.jsonl" for name in _sets) + _msmarco + _simcse
eval_data = "data/st_triplets/all-nli.val.jsonl"
sampling_alpha = 0.5
group_size = 8  # all negatives of a line, up to 7
no_duplicates = True  # all-nli and PAQ repeat their texts

# 64 queries x 8 GPUs = 512 queries/step, each among the passages of all; 10,000 steps = 5.1M
# queries. (Theirs: 128 texts a GPU, 64 queries of most sets but 18 of GooAQ and 2 of QQP, which
# have many negatives; each query is compared within its GPU.)
batch_size = 64 * 8
max_steps = 10_000
temperature = 0.05

learning_rate = 5e-5
min_lr = 0.1 * learning_rate
weight_decay = 0.01
schedule = "linear"
warmup_steps = 100

# Memory a GPU, estimated: 250M weights with gradients and Adam in fp32 4 GB; chunks of 16,384
# tokens without checkpointing 12 GB
device_batch_tokens = 16384
eval_interval = 500
save_interval = 2000
