# LLM2Vec's MNTP (arXiv 2404.05961): five bases and two that theirs left causal, told apart by
# init_from.
#   python data/wikitext103/prepare.py --tokenizer princeton-nlp/Sheared-LLaMA-1.3B
#   python train_mntp.py configs/mntp_llm2vec.py --init_from=princeton-nlp/Sheared-LLaMA-1.3B
# A local copy goes by the name of its folder. contrastive_llm2vec.py starts from the adapter:
#   --adapters="['out/llm2vec-mntp/Sheared-LLaMA-1.3B/step1000']"
init_from = "princeton-nlp/Sheared-LLaMA-1.3B"
_bert = (0.2, False)  # 80 % become the mask, 10 % a random token, 10 % stay
_bases = {  # the model's name: mask_prob, mask_all
    "Sheared-LLaMA-1.3B": _bert,
    "Llama-2-7b-chat-hf": _bert,
    "Meta-Llama-3-8B-Instruct": _bert,
    "Llama-3.1-8B-Instruct": _bert,
    "Mistral-7B-Instruct-v0.2": (0.8, True),
    # not in the paper: in LLM2Vec's code these stay causal under eager and sdpa attention
    "Qwen2.5-0.5B-Instruct": _bert,
    "Qwen2.5-1.5B-Instruct": _bert,
    "Qwen2.5-7B-Instruct": _bert,
    "Qwen3-0.6B": _bert,
    "Qwen3-4B": _bert,
    "Qwen3-8B": _bert,
}
_name = init_from.rstrip("/").split("/")[-1].split("@")[0].replace("Meta-Llama-3.1", "Llama-3.1")
mask_prob, mask_all = _bases[_name]
mask_token = "_"
out_dir = f"out/llm2vec-mntp/{_name}"
data = f"data/wikitext103/{_name}"

# all of wikitext in chunks of 512, articles run on
max_seq_len = 512
chunks = True

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.05  # on q, k, v, o, gate, up, down; the head is frozen

# 32 rows x 512 = 16,384 tokens/step on one device; 1,000 steps = 32,000 rows, 16.4M tokens
batch_tokens = 32 * max_seq_len
device_batch_tokens = 8 * max_seq_len
max_steps = 1000

learning_rate = 5e-5
# LLM2Vec's schedule falls over 3 epochs of wikitext and is left at step 1,000. Here the steps are
# the schedule's horizon. Theirs, where the tokens make R rows: min_lr = (1 - 1000 / (3 R / 32)) lr
schedule = "linear"
warmup_steps = 0
weight_decay = 0.0
beta1, beta2 = 0.9, 0.999
adam_eps = 1e-8

# Memory, estimated: 7-8B weights in bf16 15 GB; 42M LoRA weights, gradients and Adam in fp32
# 0.7 GB; 4,096 tokens with checkpointing 2 GB, and one block 1 GB: a 24 GB GPU. Logits exist at
# labelled rows only, a chunk at a time: 820 of 4,096, 3,300 for Mistral.
gradient_checkpointing = True
eval_interval = 100
save_interval = 200
