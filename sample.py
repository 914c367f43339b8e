"""
Use a model: fill in masked tokens, write on from a prompt, or rank texts by a question.

    python sample.py --model=out/mlm_pydocs_tiny --text="Return the [MASK] of the list."
    python sample.py --model=out/mlm_pydocs_tiny/step1600 --file=lines.txt     # one text a line
    python sample.py --model=out/clm_pydocs_tiny --prompt="Return the" --num_samples=3
    python sample.py --model=owner/name@revision --text=- < letter.txt        # from stdin
    python sample.py --model=out/contrastive_pydocs_tiny --rank="How do I split a string?"
    python sample.py --model=any/embedder --rank="a question" --file=mine.txt # one text a line
    python sample.py --model=out/token_retrieval_pydocs_tiny --compress="How is the pool closed?" \
        --file=passage.txt --ratio=8 --html=out.html
    python sample.py --model=out/reconstruct_pydocs_tiny --reconstruct="Return a copy of the list."

The model is a Hugging Face folder, a hub id, an adapter of ours or peft's (its base is read, too),
or the out_dir of a run: then the newest checkpoint in it. Masked models fill, causal ones write.
"""

import copy
import json
import math
import os
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

import common
from attention import make_seqs
from data import open_pairs, read_pair
from embedder import Embedder
from formats.peft import adapter_chain
from lora import load_merged
from token_scores import score_tokens
from tokenizer import check_tokenizer, load_tokenizer
from tools.compress import keep, page, read_passage, share_of, text_of

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
rank_pairs: tuple[str, ...] = (
    "data/pydocs/train.jsonl", "data/pydocs/val.jsonl", "data/pydocs/test.jsonl",
)  # fmt: skip
num_ranked = 5
# reconstruct: what a model of train_reconstruct.py writes from a text's embedding alone, greedily
reconstruct: str | None = None  # "-" reads it from stdin
reconstruct_side = "query"  # what the text is: a query, then a document is written, or a document
# compress: the part of the passage in file that matters most for a question, in its order
compress: str | None = None  # the question; "" takes the line's, where file is a .jsonl
line = 1  # of a .jsonl file {"query", "passage", "spans"}; a .txt is one passage
ratio = 8.0  # 1 token of 8 is kept
unit = "words"  # or tokens. What is written without spaces, as Chinese, wants tokens
neighbours = 0  # units on each side that are kept with each of the best
window = 0  # tokens encoded at a time, for passages longer than memory; 0: the whole
overlap = 0  # tokens that windows share
html: str | None = None  # writes a page there: the passage as a heat map
spans: tuple = ()  # gold ((start, end), ..) characters, underlined in the page; or a .jsonl's own
seed = 1337  # sample i is drawn with seed + i, whatever num_samples is
# device
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
dtype = "fp32"  # bf16 halves the memory; its logits have 3 digits. auto: bf16 where that is fast


# ---- the model ----


def load(name, dtype="fp32", attention_backend="auto"):
    """(model, tokenizer, its folder) of a folder, an out_dir, a hub id, or an adapter, which is
    merged. SystemExit where the model has no language modelling head."""
    device = common.setup_distributed()[3]
    dtype = common.dtype_of(dtype, device)
    base, *adapters = adapter_chain(name)
    folder = adapters[-1] if adapters else base
    net = load_merged(base, adapters, dtype=dtype).eval()
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, net.config.vocab_size)
    if net.config.head == "none":
        raise SystemExit(f"{folder} has no language modelling head, so it predicts no tokens")
    net.set_backend(attention_backend, device, dtype)
    print(f"{folder}: {net.describe()}, {dtype} on {device}")
    return net.to(device), tokenizer, folder


def read_text(text):
    """The text that an option gives, or stdin's for "-"."""
    return sys.stdin.read().rstrip("\n") if text == "-" else text


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [line.strip() for line in f if line.strip()]


# ---- fill masks ----


def read_notes(folder):
    """What train_mntp.py says of its mask, {} of other models."""
    path = os.path.join(folder, "mntp.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def check_fills(net, tokenizer, notes):
    """SystemExit where the model cannot fill masks, with what it can do instead."""
    if net.config.causal:
        raise SystemExit("a causal model does not see what follows a mask: try --prompt")
    if tokenizer.mask_token is None and not notes:
        raise SystemExit("this tokenizer has no mask token, so the model was not trained to fill")


@torch.no_grad()
def fill(net, tokenizer, texts, n, notes=None):
    """The n most probable tokens for each mask, each by itself: two masks of a text do not know of
    each other's fill. The mask is written [MASK] or as the tokenizer writes it.

    -> for each text (ids, places [M] of the masks in ids, probabilities [M, n], tokens [M, n]).
    notes: of train_mntp.py, whose models are read one place before the mask, and whose mask may be
    another token than the tokenizer's.
    SystemExit for a text without a mask, or with one that nothing stands before.
    """
    notes, device = notes or {}, net.embed.weight.device
    if tokenizer.mask_token is None:  # a decoder's: [MASK] shall be one token, for now
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    mask, mask_id, before = tokenizer.mask_token, tokenizer.mask_token_id, -notes.get("at", 0)
    # A word carries the space in front of it, and so does the mask that stands for a word: else
    # byte-level BPE would see a lone space, as it never did in training. WordPiece does not care.
    marked = [t.replace("[MASK]", mask).replace(" " + mask, mask) for t in texts]
    ids = [tokenizer(t)["input_ids"] for t in marked]
    places = [[k for k, i in enumerate(text_ids) if i == mask_id] for text_ids in ids]
    for text, masks in zip(texts, places, strict=True):
        if not masks:
            raise SystemExit(f"no {mask} to fill in the text {text[:60]!r}")
        if before and masks[0] == 0:
            raise SystemExit(f"nothing stands before the {mask} of the text {text[:60]!r}")
    seqs = make_seqs([len(text_ids) for text_ids in ids], device)
    row = torch.tensor([i for text_ids in ids for i in text_ids])  # [T], all texts end to end
    rows = (row == mask_id).nonzero()[:, 0]  # [L], every mask
    row[rows] = notes.get("mask_id", mask_id)
    logits = net(row.to(device), seqs, rows.to(device) - before)  # [L, V]
    p, best = logits.float().softmax(-1).topk(min(n, logits.size(-1)))  # [L, n]
    counts = [len(masks) for masks in places]
    return list(zip(ids, places, p.cpu().split(counts), best.cpu().split(counts), strict=True))


def shown(tokenizer, i):
    """One token as a reader wants it, in quotes; what is no whole character as the raw token."""
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None:
        return f"<id {i}, no token>"  # a row of the embedding that the tokenizer does not use
    readable = tokenizer.decode([i])
    return repr(readable if readable and "\ufffd" not in readable else token)


def print_fill(tokenizer, text, ids, places, p, best):
    print(f"\n{text}")
    for k in range(len(places)):
        fills = zip(p[k].tolist(), best[k].tolist(), strict=True)
        fills = "  ".join(f"{x:6.1%} {shown(tokenizer, i):<12}" for x, i in fills).rstrip()
        print(f"  {f'mask {k + 1}' if len(places) > 1 else 'mask'}: {fills}")
    fills, specials = dict(zip(places, best[:, 0].tolist(), strict=True)), tokenizer.all_special_ids
    # without [CLS] and such, but with those the model fills in
    filled = [fills.get(k, i) for k, i in enumerate(ids) if k in fills or i not in specials]
    print(f"  best: {tokenizer.decode(filled)}")


def use_fill(s):
    net, tokenizer, folder = load(s.model, s.dtype, s.attention_backend)
    notes = read_notes(folder)
    check_fills(net, tokenizer, notes)
    texts = read_lines(s.file) if s.file is not None else [read_text(s.text)]
    for first in range(0, len(texts), 32):  # 32 texts are one packed row
        part = texts[first : first + 32]
        filled = fill(net, tokenizer, part, s.num_fills, notes)
        for text, result in zip(part, filled, strict=True):
            print_fill(tokenizer, text, *result)


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
    probs = keep_top_p(keep_top_k(logits / temperature, top_k), top_p).softmax(-1)  # [S, V]
    pairs = zip(probs, generators, strict=True)
    return [torch.multinomial(row, 1, generator=g).item() for row, g in pairs]


@torch.no_grad()
def generate(
    net, prompt_ids, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, num_samples=1,
    eos_ids=(), seed=1337, anchor=None,
):  # fmt: skip
    """-> num_samples lists of new ids. A sample ends with an id of eos_ids, which is in its list,
    or after max_new_tokens.

    There is no KV cache: every step runs the whole text again, n new tokens after a prompt of p
    cost n * (p + n/2) tokens of forward instead of p + n. The samples are the texts of one packed
    row, which one that has ended leaves. anchor [C]: stands in for the prompt's first token.
    """
    if min(temperature, top_k) < 0 or not 0 < top_p <= 1 or min(num_samples, max_new_tokens) < 1:
        raise SystemExit(
            f"expected {temperature=} and {top_k=} of 0 or more, {top_p=} above 0 and up to 1, "
            f"{num_samples=} and {max_new_tokens=} of 1 or more"
        )
    device = net.embed.weight.device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]
    samples = [list(prompt_ids) for _ in range(num_samples)]
    running = list(range(num_samples))
    for _ in tqdm(range(max_new_tokens), "tokens", leave=False, disable=None):
        row = torch.tensor([i for s in running for i in samples[s]], device=device)  # [T]
        seqs = make_seqs([len(samples[s]) for s in running], device)
        ends = seqs.cu_seqlens.long()
        vectors = None if anchor is None else anchor.expand(len(running), -1)  # [S, C]
        logits = net(row, seqs, ends[1:] - 1, vectors=vectors, at=ends[:-1])  # [S, V]
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
        mask = tokenizer.mask_token or "mask"
        raise SystemExit(f"a bidirectional model does not write on: try --text with a {mask}")
    eos = net.config.hf.get("eos_token_id")  # Llama 3 has a list of them
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    ids = tokenizer(prompt)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] in eos_ids else ids
    if not ids:
        raise SystemExit("an empty prompt, and the tokenizer puts no token in front: write a word")
    if len(ids) >= (n := net.config.max_seq_len):
        raise SystemExit(f"the prompt has {len(ids)} tokens, the model {n} positions: no room")
    return ids, eos_ids


def print_sample(tokenizer, title, ids, new, eos_ids):
    ended = "ended by its EOS" if new[-1] in eos_ids else "cut"
    print(f"\n--- {title}{len(new)} tokens, {ended} ---")
    print(tokenizer.decode(ids + new, skip_special_tokens=True))


def use_prompt(s):
    net, tokenizer, _ = load(s.model, s.dtype, s.attention_backend)
    ids, eos_ids = encode_prompt(net, tokenizer, read_text(s.prompt))
    room = min(s.max_new_tokens, net.config.max_seq_len - len(ids))
    if room < s.max_new_tokens:
        print(f"at most {room} new tokens: the model has {net.config.max_seq_len} positions")
    samples = generate(net, ids, room, s.temperature, s.top_k, s.top_p, s.num_samples, eos_ids,
                       s.seed)  # fmt: skip
    for i, new in enumerate(samples, 1):
        print_sample(tokenizer, f"sample {i}: {len(ids)} + ", ids, new, eos_ids)


# ---- reconstruct ----


@torch.no_grad()
def write_back(embedder, text, side, max_new_tokens):
    """What the model writes of the other side of a pair from the embedding of a text, a "query" or
    a "document" -> (ids, ids that end a text).

    The rows are those of train_reconstruct.py: the anchor, then BOS, prefix and instruction of the
    side that is written, then the text. Greedy: the most probable token each time.
    """
    net, tokenizer, prompts = embedder.model, embedder.tokenizer, embedder.prompts
    if side not in ("query", "document"):
        raise SystemExit(f"reconstruct_side={side!r}: expected query or document")
    if not net.config.causal or net.config.head == "none" or embedder.pooling != "last":
        raise SystemExit("--reconstruct wants a causal model that has kept its head")
    [(ids, _)] = embedder.tokenize([text], prompts.get(side, ""))
    device = net.embed.weight.device
    hidden = net(torch.tensor(ids, device=device), make_seqs([len(ids)], device))  # [T, C]
    other = prompts.get("document" if side == "query" else "query", "")
    backend, template = tokenizer.backend_tokenizer, embedder.template
    plain = backend.encode("a")
    given = plain.ids[: plain.special_tokens_mask.index(0)]  # BOS
    # a space at the end is a part of the first word, which the model writes
    given += backend.encode((template.prefix + other).rstrip(" "), add_special_tokens=False).ids
    eos_ids = embedder.tokenize(["a"])[0][0][-1:]
    room = min(max_new_tokens, net.config.max_seq_len - 1 - len(given))
    # the last hidden state is not normalized: as in training
    (new,) = generate(net, [0, *given], room, 0, eos_ids=eos_ids, anchor=hidden[-1])
    return new, eos_ids


def use_reconstruct(s):
    embedder = Embedder.load(s.model, dtype=s.dtype, attention_backend=s.attention_backend)
    text = read_text(s.reconstruct)
    new, eos_ids = write_back(embedder, text, s.reconstruct_side, s.max_new_tokens)
    title = f"from this {s.reconstruct_side}'s embedding: "
    print_sample(embedder.tokenizer, title, [], new, eos_ids)


# ---- rank ----


def read_entries(paths):
    """(titles, passages) of files of pairs: the query and its first positive."""
    pairs = [read_pair(file, i) for file in map(open_pairs, paths) for i in range(len(file))]
    return [p["query"] for p in pairs], [p["pos"][0] for p in pairs]


def nearest(embedder, question, texts, n):
    """[(similarity, index)] of the n texts nearest to a question, the best first."""
    queries = embedder.encode([question], embedder.prompts.get("query", ""))  # [1, C]
    vectors = embedder.encode(texts, embedder.prompts.get("document", ""), progress=True)  # [N, C]
    scores = vectors @ queries[0]  # [N]
    return [(float(scores[i]), int(i)) for i in (-scores).argsort(kind="stable")[:n]]


def use_rank(s):
    embedder = Embedder.load(s.model, dtype="auto")
    if embedder.pooling == "tokens":
        raise SystemExit("--rank wants one vector a text; this model has one for each token")
    titles, texts = (read_lines(s.file),) * 2 if s.file else read_entries(s.rank_pairs)
    print(f"\n{s.rank}\n")
    for place, (score, i) in enumerate(nearest(embedder, s.rank, texts, s.num_ranked), 1):
        print(f"{place}. {score:.3f}  {titles[i]}")
        if not s.file:
            print(f"          {' '.join(texts[i].split())[:160]}")


# ---- compress ----


def use_compress(s):
    if s.file is None:
        raise SystemExit("--compress wants the passage: --file=passage.txt or a .jsonl")
    passage, query, gold = read_passage(s.file, s.line)
    query, gold = s.compress or query, s.spans or gold
    if not query or not passage.strip():
        raise SystemExit(f"{s.file}: there is no question, or nothing in the passage")
    if wrong := [span for span in gold if not 0 <= span[0] < span[1] <= len(passage)]:
        raise SystemExit(f"{s.file}: span {wrong[0]} is not in its {len(passage)} characters")
    embedder = Embedder.load(s.model, dtype=s.dtype, attention_backend=s.attention_backend)
    (scores,), spans = score_tokens(embedder, [query], passage, s.window, s.overlap, True)
    kept = keep(scores, spans, passage, s.ratio, s.unit, s.neighbours)
    if s.html is not None:
        with open(s.html, "w", encoding="utf-8", newline="") as f:
            f.write(page(query, passage, scores, spans, kept, gold))
    print(f"\n{query}\n\n{text_of(passage, kept)}\n\nspans: {kept}")
    if gold:
        print(f"of the gold's characters {share_of(kept, gold):.0%} are kept")


if __name__ == "__main__":
    # ---- configure ----
    s = SimpleNamespace(**common.configure(globals()))
    uses = [(s.text, use_fill), (s.prompt, use_prompt), (s.reconstruct, use_reconstruct),
            (s.rank, use_rank), (s.compress, use_compress)]  # fmt: skip
    if s.rank is None and s.compress is None:  # which read their texts from file
        uses.append((s.file, use_fill))
    uses = [use for value, use in uses if value is not None]
    if not s.model or len(uses) != 1:
        raise SystemExit(
            "give --model=... and one of --text=, --file=, --prompt=, --rank=, --reconstruct= or "
            "--compress="
        )
    uses[0](s)
