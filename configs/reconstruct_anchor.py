# Anchor-Embedding, stage I (EMNLP 2025): five bases, told apart by init_from, and any other with
# --prefix and --suffix, its wrap. Full fine-tuning.
#   python data/echo/prepare.py --input echo-data
#   torchrun --standalone --nproc_per_node=8 train_reconstruct.py configs/reconstruct_anchor.py \
#       --init_from=meta-llama/Llama-3.2-3B-Instruct
# A local copy goes by the name of its folder. Stage II is contrastive_anchor.py, and the baseline
# without stage I contrastive_anchor_baseline.py; the wraps are the same in all three.
base = "contrastive_echo_data.py"
init_from = "meta-llama/Llama-3.2-1B-Instruct"
_llama = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
_qwen = ("<|im_start|>user\n", "<|im_end|><|endoftext|>")
# Pairs/step on 8 GPUs, and memory a GPU, estimated: 16 bytes a weight (fp32, its gradient, Adam's
# two), two gradients of the head's matrix, and with checkpointing 8 bytes x layers x n_embd for
# each token of a forward (encoded and decoded), which has 512 at most a text and fewer in the mean.
# On top come DDP's buckets (4 bytes a weight) and autocast's copies (2), not counted here.
_bases = {  # wrap, pairs a forward, micro-batches, FSDP
    # 32 x 2 x 8 = 512; 20 + 2 + 9 GB: 80 GB GPUs
    "Llama-3.2-1B-Instruct": (_llama, 32, 2, ""),
    # 16 x 8 x 8 = 1,024; 51 + 3 + 11 GB: 80 GB, or with FSDP 6 + 5 + 11 GB: 48 GB
    "Llama-3.2-3B-Instruct": (_llama, 16, 8, "full"),
    # 4 x 16 x 8 = 512 (theirs 1 x 64 x 8); 128 GB of weights and Adam are 16 a GPU with FSDP, the
    # embedding and head whole 8, head 4, 4 GB: eight 80 GB GPUs, no fewer than four
    "Llama-3.1-8B-Instruct": (_llama, 4, 16, "full"),
    # 32 x 4 x 8 = 1,024; 25 + 2 + 11 GB: 80 GB, or with FSDP 48 GB
    "Qwen2.5-1.5B-Instruct": (_qwen, 32, 4, ""),
    # a public fork's (there on Korean and English pairs): 16 x 4 x 2 GPUs, here 16 x 1 x 8 = 128;
    # 10 + 1 + 16 GB at 2,048 tokens
    "Qwen3-0.6B": (("<|im_start|>user\n", "<|im_end|>"), 16, 1, ""),
}
# the part of the path that names the base
_parts = [part.split("@")[0].replace("Meta-Llama", "Llama") for part in init_from.split("/")]
_name = ([part for part in _parts if part in _bases] or _parts)[-1]
_other = (prefix, suffix), 8, 8, ""  # 8 x 8 x 8 = 512
_wrap, device_batch_size, _accumulation, fsdp = _bases.get(_name, _other)
prefix, suffix = _wrap
out_dir = f"out/anchor-stage1/{_name}"
_fork = _name == "Qwen3-0.6B"

query_max_length = 2048 if _fork else 512
passage_max_length = query_max_length
write_template = False  # theirs asks for header and instruction, which it masks in the decoder

w_d2q = 0.5 if _fork else 0.8
w_q2d = 0.5 if _fork else 0.2

# for 8 GPUs; on fewer it is the same, by more micro-batches. 2,000 steps x 512 = 1.0M of 1.5M pairs
batch_size = device_batch_size * _accumulation * 8
seed = 1338  # another order than stage II's, which would see the same pairs first
# the horizon of the schedule, which the run leaves at step 2,000 for stage II, at 80 % of the peak
# (512) or 59 % (1,024)
num_epochs = 1 if _fork else 3
stop_step = None if _fork else 2000

learning_rate = 1e-4 if _fork else 4e-5  # in pure bf16, as theirs, such steps round to nothing
weight_decay = 0.0
warmup_steps = None if _fork else 300
warmup_ratio = 0.1 if _fork else None
schedule = "linear"

gradient_checkpointing = True
eval_interval = 200
save_interval = 500
keep_last = 2
