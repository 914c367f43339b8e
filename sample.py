"""
Use a model: fill in masked tokens, write on from a prompt, or rank texts by a question.

    python sample.py --model=out/mlm_pydocs_tiny --text="Return the [MASK] of the list."
    python sample.py --model=out/mlm_pydocs_tiny/step1600 --file=lines.txt     # one text a line
    python sample.py --model=out/clm_pydocs_tiny --prompt="Return the" --num_samples=3
    python sample.py --model=owner/name@revision --text=- < letter.txt        # from stdin
    python sample.py --model=out/contrastive_pydocs_tiny --rank="How do I split a string?"
    python sample.py --model=any/embedder --rank="a question" --file=mine.txt # one text a line

The model is a Hugging Face folder, a hub id, an adapter of ours or peft's (its base is read, too),
or the out_dir of a run: then the newest checkpoint in it. Masked models fill, causal ones write.
"""

import json
import math
import os
import sys

import torch
from tqdm import tqdm

import common
import lora
from data import check_tokenizer, load_tokenizer, make_seqs, open_pairs, read_pair
from embedder import Embedder
from model import choose_backend, from_pretrained, resolve_folder

# ---- defaults ----
model = ""  # a folder, an out_dir or a hub id owner/name[@revision]
# fill masks: give one of these two
text: str | None = None  # with one [MASK] or more; "-" reads it from stdin
file: str | None = None  # texts, one a line; blank lines are passed over. Also for rank
num_fills = 5  # candidates shown for each mask
# generate, causal models
prompt: str | None = None  # "-" reads it from stdin
num_samples = 1
max_new_tokens = 100  # a sample also ends at its EOS, and at the model's max_seq_len
temperature = 0.8  # 0: always the most probable token (greedy)
top_k = 0  # draw from the k most probable tokens; 0: from all
top_p = 1.0  # draw from the fewest tokens that together have this probability; 1: from all
# rank: an embedder's five nearest texts to a question, out of file or of the pairs of rank_pairs
rank: str | None = None
rank_pairs: tuple = ("data/pydocs/train.jsonl", "data/pydocs/val.jsonl", "data/pydocs/test.jsonl")
num_ranked = 5
seed = 1337  # sample i is drawn with seed + i, whatever num_samples is
# device
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
dtype = "fp32"  # bf16 halves the memory; its logits have 3 digits. auto: bf16 where that is fast


# ---- the model ----


def load(name, device, torch_dtype):
    """(model, tokenizer) of a folder, an out_dir, a hub id, or an adapter, which is merged."""
    folder = resolve_folder(name)
    adapter = os.path.join(folder, "adapter_config.json")
    if os.path.exists(adapter):
        with open(adapter, encoding="utf-8") as f:
            config = json.load(f)
        base, revision = config["base_model_name_or_path"], config.get("revision")
        at = f"@{revision}" if revision and not os.path.isdir(base) else ""
        net = from_pretrained(base + at, dtype=torch_dtype)
        lora.load_adapter(net, folder)
        lora.merge(net)
    else:
        net = from_pretrained(folder, dtype=torch_dtype)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, net.config.vocab_size)
    if net.config.head == "none":
        raise SystemExit(f"{folder} has no language modelling head, so it predicts no tokens")
    return net.to(device).eval(), tokenizer, folder


# ---- fill masks ----


def check_fills(net, tokenizer):
    """SystemExit where the model cannot fill masks, with what it can do instead."""
    if net.config.causal:
        raise SystemExit(
            f"this {net.config.family} is causal: it does not see what follows a mask; "
            "use --prompt to let it write on"
        )
    if tokenizer.mask_token is None:
        raise SystemExit("this tokenizer has no mask token, so the model was not trained to fill")


@torch.no_grad()
def fill(net, tokenizer, texts, n):
    """The n most probable tokens for each mask, each by itself: two masks of a text do not know of
    each other's fill. The mask is written [MASK] or as the tokenizer writes it.

    -> for each text (ids, places [M] of the masks in ids, probabilities [M, n], tokens [M, n]).
    SystemExit for a text without a mask.
    """
    device, mask = net.embed.weight.device, tokenizer.mask_token
    # A word carries the space in front of it, and so does the mask that stands for a word.
    # WordPiece does not care; byte-level BPE would see a lone space, as it never did in training.
    marked = [t.replace("[MASK]", mask).replace(" " + mask, mask) for t in texts]
    ids = [tokenizer(t)["input_ids"] for t in marked]
    for text, text_ids in zip(texts, ids, strict=True):
        if tokenizer.mask_token_id not in text_ids:
            raise SystemExit(f"no {mask} to fill in the text {text[:60]!r}")
    lengths = [len(text_ids) for text_ids in ids]
    row = torch.tensor([i for text_ids in ids for i in text_ids])  # [T], all texts end to end
    rows = (row == tokenizer.mask_token_id).nonzero()[:, 0]  # [L], every mask
    logits = net(row.to(device), make_seqs(lengths, device), rows.to(device))  # [L, V]
    p, best = logits.float().softmax(-1).topk(min(n, logits.size(-1)))  # [L, n]
    places = [
        [k for k, i in enumerate(text_ids) if i == tokenizer.mask_token_id] for text_ids in ids
    ]
    counts = [len(x) for x in places]
    return list(zip(ids, places, p.cpu().split(counts), best.cpu().split(counts), strict=True))


def shown(tokenizer, i):
    """One token as a reader wants it, in quotes; what is no whole character as the raw token."""
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None:
        return f"<id {i}, no token>"  # a row of the embedding that the tokenizer does not use
    readable = tokenizer.decode([i])
    return repr(token if "\ufffd" in readable or not readable else readable)


def print_fill(tokenizer, text, ids, places, p, best):
    print(f"\n{text}")
    for k in range(len(places)):
        row = zip(p[k].tolist(), best[k].tolist(), strict=True)
        line = "  ".join(f"{x:6.1%} {shown(tokenizer, i):<12}" for x, i in row).rstrip()
        print(f"  {f'mask {k + 1}' if len(places) > 1 else 'mask'}: {line}")
    filled, specials = list(ids), set(tokenizer.all_special_ids)
    for place, i in zip(places, best[:, 0].tolist(), strict=True):
        filled[place] = i
    # without [CLS] and such, but with those the model fills in
    kept = [i for k, i in enumerate(filled) if k in places or i not in specials]
    print(f"  best: {tokenizer.decode(kept)}")


# ---- generate ----


def keep_top_k(logits, k):
    """The k largest logits of each row [S, V] stay, with those equal to the k-th; others: -inf."""
    if not 0 < k < logits.size(-1):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)


def keep_top_p(logits, p):
    """Of each row [S, V] the smallest set of the most probable tokens whose mass reaches p stays
    (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751); the others become -inf."""
    if p >= 1:
        return logits
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
    drop = probs.cumsum(-1) - probs >= p  # those before it already reach p
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def draw(logits, temperature, top_k, top_p, generators):
    """[S, V] logits -> S token ids, each with the generator of its sample."""
    logits = logits.double().cpu()  # few numbers, so fp64 costs nothing
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs = keep_top_p(keep_top_k(logits / temperature, top_k), top_p).softmax(-1)
    return [
        torch.multinomial(row, 1, generator=g).item()
        for row, g in zip(probs, generators, strict=True)
    ]


@torch.no_grad()
def generate(
    net, prompt_ids, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, num_samples=1,
    eos_ids=(), seed=1337,
):  # fmt: skip
    """-> num_samples lists of new ids. A sample ends with an id of eos_ids, which is in its list,
    or after max_new_tokens.

    There is no KV cache: every step runs the whole text again. n new tokens after a prompt of p
    cost n * (p + n/2) tokens of forward instead of p + n, about 200 times as much for n = 400:
    fine for a look at a model, not for serving one. The samples are the texts of one packed row,
    which one that has ended leaves.
    """
    if min(temperature, top_k) < 0 or not 0 < top_p <= 1 or min(num_samples, max_new_tokens) < 1:
        raise SystemExit(
            f"expected {temperature=} >= 0, {top_k=} >= 0, 0 < {top_p=} <= 1, {num_samples=} >= 1 "
            f"and {max_new_tokens=} >= 1"
        )
    device = net.embed.weight.device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]
    samples = [list(prompt_ids) for _ in range(num_samples)]
    running = list(range(num_samples))
    for _ in tqdm(range(max_new_tokens), "tokens", leave=False, disable=None):
        row = torch.tensor([i for s in running for i in samples[s]], device=device)  # [T]
        seqs = make_seqs([len(samples[s]) for s in running], device)
        logits = net(row, seqs, seqs.cu_seqlens[1:].long() - 1)  # [S, V], behind each last token
        new = draw(logits, temperature, top_k, top_p, [generators[s] for s in running])
        for s, i in zip(running, new, strict=True):
            samples[s].append(i)
        running = [s for s in running if samples[s][-1] not in eos_ids]
        if not running:
            break
    return [sample[len(prompt_ids) :] for sample in samples]


def encode_prompt(net, tokenizer, prompt):
    """(ids, ids that end a text). Without the EOS or [SEP] that the tokenizer puts behind a text:
    the model shall write on. SystemExit where the model or the prompt is not for that."""
    if not net.config.causal:
        raise SystemExit(
            f"this {net.config.family} is bidirectional: it was not trained to predict the next "
            f"token; use --text with a {tokenizer.mask_token or 'mask'} to let it fill"
        )
    eos = net.config.hf.get("eos_token_id")  # Llama 3 has a list of them
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    ids = tokenizer(prompt)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] in eos_ids else ids
    if not ids:
        raise SystemExit("an empty prompt, and the tokenizer puts no token in front: write a word")
    if len(ids) >= net.config.max_seq_len:
        n = net.config.max_seq_len
        raise SystemExit(f"the prompt has {len(ids)} tokens, the model {n} positions: no room")
    return ids, eos_ids


def print_sample(tokenizer, number, prompt_ids, new, eos_ids):
    ended = "ended by its EOS" if new[-1] in eos_ids else "cut"
    print(f"\n--- sample {number}: {len(prompt_ids)} + {len(new)} tokens, {ended} ---")
    print(tokenizer.decode(prompt_ids + new, skip_special_tokens=True))


# ---- rank ----


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [line.strip() for line in f if line.strip()]


def read_entries(paths):
    """(titles, passages) of files of pairs: the query and its first positive."""
    pairs = [read_pair(file, i) for file in map(open_pairs, paths) for i in range(len(file))]
    return [p["query"] for p in pairs], [p["pos"][0] for p in pairs]


def nearest(embedder, question, texts, n):
    """[(similarity, index)] of the n texts nearest to a question, the best first."""
    asked = embedder.encode([question], embedder.prompts.get("query", ""))  # [1, C]
    vectors = embedder.encode(texts, embedder.prompts.get("document", ""), progress=True)  # [N, C]
    scores = vectors @ asked[0]  # [N]
    return [(float(scores[i]), int(i)) for i in (-scores).argsort(kind="stable")[:n]]


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    if not model or sum(x is not None for x in (text, prompt, rank or file)) != 1:
        raise SystemExit("give --model=... and one of --text=, --file=, --prompt= or --rank=")

    # ---- rank ----
    if rank is not None:
        embedder = Embedder.load(model, dtype="auto")
        if embedder.pooling == "tokens":
            raise SystemExit("--rank wants one vector a text; this model has one for each token")
        titles, texts = (read_lines(file),) * 2 if file else read_entries(rank_pairs)
        print(f"\n{rank}\n")
        for place, (score, i) in enumerate(nearest(embedder, rank, texts, num_ranked), 1):
            print(f"{place}. {score:.3f}  {titles[i]}")
            if not file:
                print(f"          {' '.join(texts[i].split())[:160]}")
        raise SystemExit

    # ---- model ----
    device = common.setup_distributed()[3]
    torch_dtype = common.dtype_of(dtype, device)
    net, tokenizer, folder = load(model, device, torch_dtype)
    c = net.config
    net.backend = choose_backend(
        attention_backend, device, torch_dtype, gqa=c.n_head != c.n_kv_head
    )
    print(
        f"{folder}: {c.family}, {'causal' if c.causal else 'bidirectional'}, "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}M weights; "
        f"attention by {net.backend}, {torch_dtype} on {device}"
    )

    # ---- generate ----
    if prompt is not None:
        prompt = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
        ids, eos_ids = encode_prompt(net, tokenizer, prompt)
        room = min(max_new_tokens, c.max_seq_len - len(ids))
        if room < max_new_tokens:
            print(f"at most {room} new tokens: the model has {c.max_seq_len} positions")
        samples = generate(net, ids, room, temperature, top_k, top_p, num_samples, eos_ids, seed)
        for i, new in enumerate(samples):
            print_sample(tokenizer, i + 1, ids, new, eos_ids)

    # ---- fill ----
    else:
        check_fills(net, tokenizer)
        if file is not None:
            texts = read_lines(file)
        else:
            texts = [sys.stdin.read().rstrip("\n") if text == "-" else text]
        for start in range(0, len(texts), 32):  # 32 texts are one packed row
            some = texts[start : start + 32]
            for one, result in zip(some, fill(net, tokenizer, some, num_fills), strict=True):
                print_fill(tokenizer, one, *result)
