# LLM2Vec, supervised (arXiv 2404.05961): their five bases and others, told apart by init_from. Each
# starts from its merged MNTP adapter, not from SimCSE.
#   python data/echo/prepare.py --input echo-data
#   torchrun --standalone --nproc_per_node=8 train_contrastive.py configs/contrastive_llm2vec.py \
#       --init_from=meta-llama/Meta-Llama-3-8B-Instruct
# A local copy goes by the name of its folder; your own MNTP by
# --adapters="['out/llm2vec-mntp/...']". A base that is not in the list gets the wrap of --prefix
# and --suffix, none without, and your own MNTP of configs/mntp_llm2vec.py.
# Published MTEB v1 English averages: Sheared 61.85, Llama-2 64.14, Llama-3 65.01.
base = "contrastive_echo_data.py"
init_from = "princeton-nlp/Sheared-LLaMA-1.3B"
_chat2 = ("[INST] ", " [/INST]")
_chat3 = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
_chatml = ("<|im_start|>user\n", "<|im_end|>")
_bases = {  # MNTP adapter, "" where none is published; prefix, suffix
    "Sheared-LLaMA-1.3B": ("LLM2Vec-Sheared-LLaMA-mntp", "", ""),
    "Llama-2-7b-chat-hf": ("LLM2Vec-Llama-2-7b-chat-hf-mntp", *_chat2),
    "Mistral-7B-Instruct-v0.2": ("LLM2Vec-Mistral-7B-Instruct-v2-mntp", *_chat2),
    "Meta-Llama-3-8B-Instruct": ("LLM2Vec-Meta-Llama-3-8B-Instruct-mntp", *_chat3),
    # LLM2Vec's code knows its wrap by exact names, this one's is not among them: it trains without
    "Llama-3.1-8B-Instruct": ("LLM2Vec-Meta-Llama-31-8B-Instruct-mntp", *_chat3),
}
_bases |= {f"Llama-3.2-{size}-Instruct": ("", *_chat3) for size in ("1B", "3B")}
# their code wraps Qwen2 like this, but leaves it causal under eager and sdpa attention
_bases |= {f"Qwen2-{size}-Instruct": ("", *_chatml) for size in ("0.5B", "1.5B", "7B")}
_bases |= {f"Qwen2.5-{size}-Instruct": ("", *_chatml) for size in ("0.5B", "1.5B", "3B", "7B")}
_bases |= {f"Qwen3-{size}": ("", *_chatml) for size in ("0.6B", "1.7B", "4B", "8B")}
_name = init_from.rstrip("/").split("/")[-1].split("@")[0].replace("Meta-Llama-3.1", "Llama-3.1")
_mntp, prefix, suffix = _bases.get(_name, ("", prefix, suffix))
adapters = ("McGill-NLP/" + _mntp if _mntp else f"out/llm2vec-mntp/{_name}",)
attention = "bidirectional"
out_dir = f"out/llm2vec-supervised/{_name}"

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.05

pooling = "mean"
pool_instruction = False  # the mean of the text's tokens, not the instruction's
pool_bos = False  # nor a bare passage's BOS, which matters where there is no wrap: Sheared-LLaMA
# LLM2Vec evaluates with "instruction: text", here the separator is that of training
separator = _sep
task_instructions = "formats/llm2vec_tasks.json"  # of MTEB's tasks
# LLM2Vec trains at 512 and cuts texts to 400 when it encodes; one length for all here
query_max_length = 400
passage_max_length = 400

# 64 queries x 8 GPUs = 512 queries/step, each among 1,024 passages; 1,000 steps = 512,000 of 1.5M
batch_size = 64 * 8
group_size = 2  # the positive and one hard negative
num_epochs = 3  # the horizon of their schedule, about 8,790 steps, which the run leaves
stop_step = 1000  # here, at 92 % of the peak
temperature = 0.02  # scale 50

learning_rate = 2e-4
weight_decay = 0.0
warmup_steps = 300
schedule = "linear"

# Memory a GPU, estimated: 7-8B weights in bf16 15 GB; 42M LoRA weights, gradients and Adam in fp32
# 0.7 GB; chunks of 16,384 tokens with checkpointing 4 GB for what stays and 3 GB for one block. An
# 80 GB GPU has room without FSDP, and without checkpointing at device_batch_tokens = 4096; two
# 24 GB GPUs need fsdp = "full" and device_batch_tokens = 4096. 1.3B: 3 + 0.3 + 2 GB.
gradient_checkpointing = True
device_batch_tokens = 16384
eval_interval = 100
save_interval = 200
keep_last = 2
