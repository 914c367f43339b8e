# AceRAG's token retrieval on Qwen3-Embedding-8B, which retrieves already: no stage 1.
#   python data/acerag/prepare.py --tokenizer=Qwen/Qwen3-8B --cut_middle \
#       --out data/acerag/qwen3.jsonl
#   torchrun --standalone --nproc_per_node=8 train_token_retrieval.py \
#       configs/token_retrieval_qwen3.py
base = "token_retrieval_acerag.py"
out_dir = "out/acerag-qwen3"
init_from = "Qwen/Qwen3-Embedding-8B"
data = "data/acerag/qwen3.jsonl"

# Queries end in <|endoftext|> and have no instruction, as in theirs, although the model was made
# with one: query_instruction = "Instruct: ...\nQuery:".
tokenizer = "Qwen/Qwen3-8B"
suffix = "<|endoftext|>"

# Its own 40,960 positions: with the middle cut no passage is longer than 32,768. For 80,000 tokens
# max_seq_len = 81920 and rope_scaling = ("yarn", 2.0).
max_seq_len = 40960

# Memory a GPU at 32,768 tokens, counted, not measured: weights in bf16 15 GB (no head); LoRA (44M),
# embedding (622M) and norms, gradients and Adam, in fp32 11 GB; the residual stream at 36 blocks
# 32,768 x 4,096 x 2 bytes x 36 = 10 GB; one block's activations, computed again, 11 GB (7 without
# LoRA's dropout), their gradients and the last hidden states about 3 GB: 50 GB. train_also = "norm"
# takes 10 GB off. At 80,000 tokens 82 GB. --dry_run=True tells what it is.
