# Token retrieval on Qwen3-Embedding-8B, which retrieves already: no stage 1.
#   torchrun --standalone --nproc_per_node=8 train_token_retrieval.py \
#       configs/token_retrieval_qwen3.py --data=your_spans.jsonl
base = "token_retrieval_acerag.py"
out_dir = "out/acerag-qwen3"
init_from = "Qwen/Qwen3-Embedding-8B"
train_also = "norm"  # its embedding has 622M numbers: 10 GB with gradients and Adam

# its own template: an instruction before the query; its tokenizer puts <|endoftext|> behind texts
suffix = ""
query_instruction = (
    "Instruct: Given a question, retrieve the words of the passage that answer it\nQuery:"
)

# It has 40,960 positions; stretched 2 times they are 81,920. Without, a passage beyond them warns.
max_seq_len = 81920
rope_scaling = ("yarn", 2.0)

# Memory a GPU at 80,000 tokens, counted, not measured: weights in bf16 15 GB (no head); LoRA (44M)
# in fp32 0.7 GB; the residual stream at 36 blocks 80,000 x 4,096 x 2 bytes x 36 = 24 GB; one
# block's activations, computed again, 26 GB (18 without LoRA's dropout), their gradients and the
# last hidden states about 6 GB: 72 GB. --dry_run=True tells what it is.
