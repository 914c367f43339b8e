# AceRAG (TacZip), stage 1, passage retrieval: MS MARCO with hard negatives on a 32k Llama-2.
#   python data/bge_msmarco/prepare.py
#   torchrun --standalone --nproc_per_node=8 train_contrastive.py configs/contrastive_acerag.py
# Then train_token_retrieval.py. (A model that retrieves already, Qwen3-Embedding-8B, skips this.)
out_dir = "out/acerag-stage1"
init_from = "Yukang/Llama-2-7b-longlora-32k-ft"
tokenizer = "meta-llama/Llama-2-7b-chat-hf"
attention = "causal"

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.03
train_also = "embed,norm"  # trained whole, and saved with the model

pooling = "last"
# The token that is pooled, as in stage 2; Llama-2's tokenizer adds only <s>. (Theirs has neither
# in this stage, and pools the text's last token.)
suffix = "</s>"
query_max_length = 512
passage_max_length = 512

data = ("data/bge_msmarco/train.jsonl",)
eval_data = "data/bge_msmarco/val.jsonl"
ignore_prompts = True  # lines may have an instruction: theirs are bare
group_size = 8  # one positive of the line, drawn, and 7 of its negatives

# 16 queries x 8 GPUs = 128 queries/step, each among 1,024 passages of all GPUs
# 486K lines = 3,797 steps
batch_size = 16 * 8
num_epochs = 1
temperature = 0.02

learning_rate = 2e-4
weight_decay = 0.0
schedule = "linear"
warmup_ratio = 0.1

# Memory a GPU, estimated: weights in bf16 13 GB; LoRA (40M) and embedding with norms (131M), their
# gradients and Adam, in fp32 2.8 GB; chunks of 16,384 tokens with checkpointing 8 GB. (They shard
# the optimizer, ZeRO-1; its 1.4 GB need no sharding.) fsdp = "full" below 32 GB.
gradient_checkpointing = True
device_batch_tokens = 16384
eval_interval = 500
save_interval = 500
