# Anchor-Embedding's baseline (EMNLP 2025): LLM2Vec's supervised recipe on a causal model, without
# stage I. Five bases, told apart by init_from; another gets the wrap of --prefix and --suffix.
#   python data/echo/prepare.py --input echo-data
#   torchrun --standalone --nproc_per_node=8 train_contrastive.py \
#       configs/contrastive_anchor_baseline.py --init_from=meta-llama/Llama-3.2-3B-Instruct
# A local copy goes by the name of its folder.
base = "contrastive_echo_data.py"
init_from = "meta-llama/Llama-3.2-1B-Instruct"
_llama = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
_qwen = ("<|im_start|>user\n", "<|im_end|><|endoftext|>")
_wraps = {  # prefix, suffix: each base its own; the published code gives Llama's to all
    "Llama-3.2-1B-Instruct": _llama,
    "Llama-3.2-3B-Instruct": _llama,
    "Llama-3.1-8B-Instruct": _llama,
    "Qwen2.5-1.5B-Instruct": _qwen,
    "Qwen3-0.6B": ("<|im_start|>user\n", "<|im_end|>"),  # a public fork's
}
# the part of the path that names the base, also in out/anchor-stage1/Llama-3.2-1B-Instruct
_parts = [part.split("@")[0].replace("Meta-Llama", "Llama") for part in init_from.split("/")]
_name = ([part for part in _parts if part in _wraps] or _parts)[-1]
prefix, suffix = _wraps.get(_name, (prefix, suffix))
attention = "causal"
out_dir = f"out/anchor-baseline/{_name}"

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.05

pooling = "last"  # the last token of the suffix: <|eot_id|>, <|endoftext|>
query_max_length = 512
passage_max_length = 512

# 128 queries x 8 GPUs = 1,024 queries/step, each among 2,048 passages; 1,000 steps = 1.0M of 1.5M.
# (Theirs for 3B and 8B: 64 x 2 and 32 x 4 by accumulation, where a query is compared with the
# passages of its micro-batch alone.) The baseline of 1B has 64 x 8 = 512.
batch_size = 64 * 8 if _name == "Llama-3.2-1B-Instruct" else 128 * 8
group_size = 2  # the positive and one hard negative
num_epochs = 3  # the horizon of the schedule: 4,394 steps, or 8,789 of 512
# LLM2Vec's. Theirs goes on to the end of the 3 epochs; some published configs stop at 200, inside
# their own warmup.
stop_step = 1000
temperature = 0.02  # scale 50

learning_rate = 2e-4
weight_decay = 0.0
warmup_steps = 300
schedule = "linear"

# Memory a GPU, estimated, with chunks of 16,384 tokens and checkpointing: 1B 2.5 + 2 GB; 1.5B and
# 3B 6 + 4 GB; 8B 16 + 8 GB. No FSDP from 32 GB on; 8B on two 24 GB GPUs: fsdp = "full",
# device_batch_tokens = 4096.
gradient_checkpointing = True
device_batch_tokens = 16384
eval_interval = 100
save_interval = 200
keep_last = 2
