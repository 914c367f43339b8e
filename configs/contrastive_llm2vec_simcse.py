# LLM2Vec, unsupervised: SimCSE (arXiv 2104.08821) on Wiki1M. Each sentence goes through twice,
# under two draws of the dropout, and must find itself among the others.
#   python data/wiki1m/prepare.py
#   python train_contrastive.py configs/contrastive_llm2vec_simcse.py \
#       --init_from=meta-llama/Meta-Llama-3-8B-Instruct                       # one GPU
# Bases, adapters and chat wraps: contrastive_llm2vec.py. (LLM2Vec trains this stage without the
# wrap and encodes with it; one template for both here.)
# Published MTEB v1 English averages: Sheared 49.42, Llama-2 55.36, Llama-3 56.23.
base = "contrastive_llm2vec.py"
out_dir = f"out/llm2vec-simcse/{_name}"
attn_dropout = 0.3

data = ("data/wiki1m/train.jsonl",)
passage_instruction = ("",)
separator = " "  # of evaluation: no instruction was trained
eval_data = ""  # without dropout a sentence always finds itself: judge by STS tasks
group_size = 1

# 128 sentences x 2 = 256 texts/step on one GPU; 1,000 steps = 128,000 of 1M sentences
batch_size = 128
query_max_length = 128
passage_max_length = 128
# 3 epochs are 23,438 steps, left after 1,000 at 96 % of the peak
temperature = 0.05  # scale 20

learning_rate = 3e-5
warmup_steps = 0

# Memory, estimated: 8B 16 GB + 8 GB for chunks of 16,384 tokens with checkpointing; on a 24 GB GPU
# device_batch_tokens = 4096. Attention dropout needs a backend that has it: the choice is printed.
eval_interval = 0
