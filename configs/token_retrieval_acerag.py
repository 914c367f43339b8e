# AceRAG (TacZip), stage 2, token retrieval, on the 32k Llama-2 that stage 1 made a retriever.
#   torchrun --standalone --nproc_per_node=8 train_contrastive.py configs/contrastive_acerag.py
#   python data/acerag/prepare.py --tokenizer=meta-llama/Llama-2-7b-chat-hf --cut_middle \
#       --out data/acerag/train.jsonl           # or your own spans
#   torchrun --standalone --nproc_per_node=8 train_token_retrieval.py \
#       configs/token_retrieval_acerag.py --data=your_spans.jsonl
out_dir = "out/acerag-stage2"
init_from = "out/acerag-stage1"  # its newest checkpoint, the adapter merged; now a fresh one
tokenizer = "meta-llama/Llama-2-7b-chat-hf"
attention = "causal"

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.03
train_also = "embed,norm"  # trained whole, and saved with the model

suffix = "</s>"  # as in stage 1: the query's embedding is that of its last token
query_max_length = 512

# The base has 4,096 positions, stretched 8 times: 32,768. Their passages have no more, for the
# middle of longer ones is cut (--cut_middle above), whatever passage_max_length says. A longer one
# runs, with a warning; max_seq_len = 81920 and rope_scaling = ("linear", 20.0) train for 80,000.
max_seq_len = 32768
passage_max_length = 80000
passage_window = 0

data = "data/acerag/train.jsonl"
eval_data = ""
queries_per_passage = 8

# 8 queries x 8 GPUs = 64 queries/step; 12K lines = 188 steps/epoch
batch_size = 8 * 8
num_epochs = 1
temperature = 0.02

learning_rate = 2e-4
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.1

# Memory a GPU at 80,000 tokens, counted, not measured: weights in bf16 13 GB; LoRA (40M) and
# embedding with norms (131M), their gradients and Adam, in fp32 2.8 GB; the residual stream at 32
# blocks 80,000 x 4,096 x 2 bytes x 32 = 21 GB; one block's activations, computed again, 22 GB (14
# without LoRA's dropout), their gradients and the last hidden states about 6 GB: 65 GB.
gradient_checkpointing = True
device_batch_tokens = 16384  # shorter passages share a forward
eval_interval = 100
save_interval = 100
