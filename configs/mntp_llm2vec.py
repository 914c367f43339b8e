# LLM2Vec's MNTP (arXiv 2404.05961), for any base: theirs are Sheared-LLaMA-1.3B, Llama-2-7b-chat,
# Meta-Llama-3-8B-Instruct, Llama-3.1-8B-Instruct and Mistral-7B-Instruct-v0.2. (Qwen2 stays causal
# in their code, under eager and sdpa attention.)
#   python data/wikitext103/prepare.py --tokenizer princeton-nlp/Sheared-LLaMA-1.3B
#   python train_mntp.py configs/mntp_llm2vec.py --init_from=princeton-nlp/Sheared-LLaMA-1.3B
# A local copy goes by the name of its folder. contrastive_llm2vec.py starts from the adapter:
#   --adapters="['out/llm2vec-mntp/Sheared-LLaMA-1.3B/step1000']"
init_from = "princeton-nlp/Sheared-LLaMA-1.3B"
_name = init_from.rstrip("/").split("/")[-1].split("@")[0].replace("Meta-Llama-3.1", "Llama-3.1")
_mistral = _name == "Mistral-7B-Instruct-v0.2"
mask_prob = 0.8 if _mistral else 0.2
mask_all = _mistral  # else 80 % become the mask, 10 % a random token, 10 % stay
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
num_epochs = 3  # the horizon of their schedule, about 21,000 steps of Llama-2's tokens
stop_step = 1000  # the run leaves it here, at 95 % of the peak

learning_rate = 5e-5
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
