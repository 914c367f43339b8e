# Your own data, on one 24 GB card: a Qwen3 of 0.6B with LoRA.
#   python train_contrastive.py configs/contrastive_own_data.py --show_batch=True    # look first
#   python train_contrastive.py configs/contrastive_own_data.py --dry_run=True       # memory, time
#   python train_contrastive.py configs/contrastive_own_data.py
#
# 1. Write one JSON object a line: {"query": "...", "pos": ["a text that answers it", ...]}.
#    1,000 lines are worth a try, 10,000 are comfortable. Keep some for validation in a second
#    file, with other queries and, if you can, other texts.
# 2. Hard negatives help more than anything else. Add "neg": [...] yourself or mine them:
#      python data/mine_negatives.py --model=Qwen/Qwen3-Embedding-0.6B --pairs=my/train.jsonl \
#          --out=my/mined.jsonl --range=10:100 --negatives=7 --margin=0.05
# 3. Start, and watch the eval line: nDCG@10 should rise and stay up.
# 4. python sample.py --model=out/own_data --rank="a question" --file=texts.txt
out_dir = "out/own_data"
data = ("my/train.jsonl",)
eval_data = "my/val.jsonl"

# This model is an embedder already, so little data takes it a long way. Qwen/Qwen3-0.6B is the
# plain language model; it wants 100,000 lines and more.
init_from = "Qwen/Qwen3-Embedding-0.6B"
pooling = "last"  # the hidden state of the last token, <|endoftext|>
# The embedder's tokenizer puts that token there by itself; Qwen/Qwen3-0.6B's does not, and wants
# suffix = "<|endoftext|>"
# Say in one sentence what is searched for. It stands in front of each query, in use as well: it is
# saved with the model. Passages have none.
query_instruction = ("Instruct: Given a question, retrieve passages that answer it\nQuery:",)
query_max_length = 128  # tokens; longer texts lose their end
passage_max_length = 512

lora_rank = 16  # 10M trained weights of 600M: hard to break the model with; 0 trains all of it
lora_alpha = 32.0
lora_dropout = 0.05

# A query is compared with the passages of all queries of the step: the larger the batch, the harder
# the choice. The gradient cache lets it be large on a small card: memory depends on
# device_batch_tokens alone.
# 128 queries/step, each among 128 x 4 = 512 passages; 10,000 lines = 78 steps an epoch
batch_size = 128
group_size = 4  # a positive and 3 of its negatives; lines without negatives are fine
num_epochs = 2
temperature = 0.02
no_duplicates = True
# A passage that scores above the query's own by more than this is likelier an unlabelled answer
# than a negative; it is left out. None keeps all.
false_negative_margin = 0.1

learning_rate = 1e-4
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.1

# Memory, estimated: weights in bf16 1.2 GB, LoRA with Adam 0.2 GB, a chunk of 8,192 tokens 12 GB.
# Out of memory? Halve device_batch_tokens: the result stays the same.
device_batch_tokens = 8192
eval_interval = 50
save_interval = 100
keep_best = True  # and the checkpoint with the lowest eval loss
