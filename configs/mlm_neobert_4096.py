# NeoBERT's second phase: 50,000 steps at 4,096 tokens, on the paper's mixture. Its other two sets:
#   python data/text/prepare.py --dataset tiiuae/falcon-refinedweb --field content \
#       --tokenizer google-bert/bert-base-uncased --out data/refinedweb_1024 --min_tokens=1024
#   python data/text/prepare.py --dataset tiiuae/falcon-refinedweb --field content \
#       --tokenizer google-bert/bert-base-uncased --out data/refinedweb_2048 --min_tokens=2048
#   torchrun --nproc_per_node=8 pretrain_mlm.py configs/mlm_neobert_4096.py
base = "mlm_neobert.py"
init_from = "out/neobert-250m/step1000000"
out_dir = "out/neobert-250m-4096"
# 20 % of all documents, 40 % of those of 1,024 tokens and more, 40 % of those of 2,048 and more.
# The published code draws one of the three for each forward of 8 rows; here each step is mixed.
data = {"data/refinedweb": 0.2, "data/refinedweb_1024": 0.4, "data/refinedweb_2048": 0.4}

# 8 GPUs x 16 rows x 4 micro-batches x 4,096 tokens = 2,097,152 tokens/step
# 50,000 steps = 105B tokens
max_seq_len = 4096
device_batch_tokens = 16 * max_seq_len
max_steps = 50_000
schedule = "constant"
learning_rate = 0.1 * learning_rate  # the floor where phase 1 ended
warmup_steps = 0
