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
import re
import sys
from html import escape

import numpy as np
import torch
from tqdm import tqdm

import common
import lora
from data import (
    check_tokenizer,
    join_spans,
    load_tokenizer,
    make_seqs,
    open_pairs,
    read_jsonl,
    read_pair,
    require,
)
from embedder import Embedder, pack, score_tokens
from model import choose_backend, from_pretrained

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


def load(name, device, torch_dtype):
    """(model, tokenizer) of a folder, an out_dir, a hub id, or an adapter, which is merged."""
    base, *adapters = lora.adapter_chain(name)
    folder = adapters[-1] if adapters else base
    net = from_pretrained(base, lora.attention_of(folder) if adapters else None, dtype=torch_dtype)
    for adapter in adapters:
        lora.load_adapter(net, adapter)
        lora.merge(net)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, net.config.vocab_size)
    if net.config.head == "none":
        raise SystemExit(f"{folder} has no language modelling head, so it predicts no tokens")
    return net.to(device).eval(), tokenizer, folder


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
        raise SystemExit(
            f"this {net.config.family} is causal: it does not see what follows a mask; "
            "use --prompt to let it write on"
        )
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
    mask, before = tokenizer.mask_token, -notes.get("at", 0)
    # A word carries the space in front of it, and so does the mask that stands for a word.
    # WordPiece does not care; byte-level BPE would see a lone space, as it never did in training.
    marked = [t.replace("[MASK]", mask).replace(" " + mask, mask) for t in texts]
    ids = [tokenizer(t)["input_ids"] for t in marked]
    for text, text_ids in zip(texts, ids, strict=True):
        if tokenizer.mask_token_id not in text_ids:
            raise SystemExit(f"no {mask} to fill in the text {text[:60]!r}")
        if before and text_ids[0] == tokenizer.mask_token_id:
            raise SystemExit(f"nothing stands before the {mask} of the text {text[:60]!r}")
    lengths = [len(text_ids) for text_ids in ids]
    row = torch.tensor([i for text_ids in ids for i in text_ids])  # [T], all texts end to end
    rows = (row == tokenizer.mask_token_id).nonzero()[:, 0]  # [L], every mask
    row[rows] = notes.get("mask_id", tokenizer.mask_token_id)
    logits = net(row.to(device), make_seqs(lengths, device), rows.to(device) - before)  # [L, V]
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
    eos_ids=(), seed=1337, anchor=None,
):  # fmt: skip
    """-> num_samples lists of new ids. A sample ends with an id of eos_ids, which is in its list,
    or after max_new_tokens.

    There is no KV cache: every step runs the whole text again. n new tokens after a prompt of p
    cost n * (p + n/2) tokens of forward instead of p + n, about 200 times as much for n = 400:
    fine for a look at a model, not for serving one. The samples are the texts of one packed row,
    which one that has ended leaves. anchor [C]: stands in for the prompt's first token.
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
        raise SystemExit("--reconstruct wants a causal model that has kept its head, as saved by "
                         "train_reconstruct.py")  # fmt: skip
    encoded = embedder.tokenize([text], prompts.get(side, ""))
    tokens, seqs, where = pack(encoded, net.embed.weight.device)
    anchor = net(tokens, seqs)[where.last[0]]  # [C], not normalized: as in training
    other = prompts.get("document" if side == "query" else "query", "")
    backend, template = tokenizer.backend_tokenizer, embedder.template
    plain = backend.encode("a")
    given = plain.ids[: plain.special_tokens_mask.index(0)]  # BOS
    # a space at the end is a part of the first word, which the model writes
    given += backend.encode((template.prefix + other).rstrip(" "), add_special_tokens=False).ids
    eos_ids = embedder.tokenize(["a"])[0][0][-1:]
    room = min(max_new_tokens, net.config.max_seq_len - 1 - len(given))
    (new,) = generate(net, [0, *given], room, 0, eos_ids=eos_ids, anchor=anchor)
    return new, eos_ids


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


# ---- compress ----


def units_of(passage, spans, unit):
    """Token spans [n, 2] -> (tokens of each unit [[first, end), ..], characters of each [[start,
    end), ..]), in order. Tokens: each is a unit. Words: what stands between spaces; words that
    share a token are one unit, and a token of nothing but spaces is in none."""
    if unit == "tokens":
        return [(i, i + 1) for i in range(len(spans))], spans.tolist()
    if unit != "words":
        raise ValueError(f"unit {unit!r}: expected words or tokens")
    words = [match.span() for match in re.finditer(r"\S+", passage)]
    tokens, places, w = [], [], 0
    for i, (start, end) in enumerate(spans.tolist()):
        while w < len(words) and words[w][1] <= start:
            w += 1
        own = [word for word in words[w : w + end - start] if word[0] < end]  # a token may have two
        if own and places and own[0][0] < places[-1][1]:  # the same word as the last token's
            tokens[-1] = (tokens[-1][0], i + 1)
            places[-1][1] = own[-1][1]
        elif own:
            tokens.append((i, i + 1))
            places.append([own[0][0], own[-1][1]])
    return tokens, places


def keep(scores, spans, passage, ratio, unit="words", neighbours=0):
    """Scores [n] and spans [n, 2] of a passage's tokens -> the spans that are kept, in order.

    At most ceil(n / ratio) tokens, and just as many with unit="tokens". The best units come first,
    each by its best token, of equal ones the first; with each come its neighbours, the nearest
    first. What has more tokens than are left is passed over; where no word has so few, as in text
    without spaces, single tokens are kept. Units that follow one another are one
    span, with the spaces between them.
    """
    if not ratio >= 1 or neighbours < 0:
        raise ValueError(f"expected {ratio=} >= 1 and {neighbours=} >= 0")
    tokens, places = units_of(passage, spans, unit)
    if min((end - first for first, end in tokens), default=0) > math.ceil(len(scores) / ratio):
        tokens, places = units_of(passage, spans, "tokens")
    best = np.array([scores[first:end].max() for first, end in tokens])
    near = sorted(range(-neighbours, neighbours + 1), key=abs)  # 0, -1, 1, -2, 2
    left, kept = math.ceil(len(scores) / ratio), set()
    for i in np.argsort(-best, kind="stable").tolist():
        for j in (i + k for k in near):
            size = tokens[j][1] - tokens[j][0] if 0 <= j < len(tokens) else math.inf
            if j not in kept and size <= left:
                kept.add(j)
                left -= size
            elif j == i and j not in kept:
                break  # no neighbours of what did not fit
        if not left:
            break
    out = []
    for i in sorted(kept):
        if i - 1 in kept:
            out[-1][1] = max(out[-1][1], places[i][1])
        else:
            out.append(list(places[i]))
    return join_spans(out)


def text_of(passage, spans):
    """The kept spans as one text: a space stands for what is left out, if none is there already."""
    text = ""
    for start, end in spans:
        piece = passage[start:end]
        text += " " * bool(text and not text[-1].isspace() and not piece[0].isspace()) + piece
    return text


def compress_text(
    embedder, query, passage, ratio, unit="words", neighbours=0, window=0, overlap=0
):  # fmt: skip
    """-> (kept text, kept spans [[start, end], ..]): the 1/ratio of a passage's tokens that matter
    most for a query, in order; see `keep`, and `score_tokens` for windows."""
    scores, of_tokens = score_tokens(embedder, [query], passage, window, overlap)
    kept = keep(scores[0], of_tokens, passage, ratio, unit, neighbours)
    return text_of(passage, kept), kept


def share_of(inside, spans):
    """Of the characters in spans, the share that is in the spans `inside`."""
    both = sum(max(0, min(b, d) - max(a, c)) for a, b in inside for c, d in spans)
    return both / max(1, sum(d - c for c, d in spans))


_STYLE = """
:root { color-scheme: light dark; --text: #111; --faint: #4c4c4c; --page: #fff;
  --heat: 255 150 0; --gold: #0a58ca }
@media (prefers-color-scheme: dark) { :root { --text: #fff; --faint: #b5b5b5; --page: #141414;
  --heat: 170 80 0; --gold: #7db4ff } }
body { background: var(--page); color: var(--text); max-width: 46rem; margin: 2rem auto;
  padding: 0 1rem; font: 1rem/1.7 Georgia, serif }
h1 { font-size: 1.4rem; line-height: 1.3 }
.facts, .legend { color: var(--faint); font: .85rem/1.5 system-ui, sans-serif }
.passage { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--faint) }
.k { color: var(--text); font-weight: bold }
.g { text-decoration: underline 2px var(--gold); text-underline-offset: .2em }
"""


def page(query, passage, scores, of_tokens, kept, gold=()):
    """The passage as a heat map of its tokens' scores: one page of HTML that needs no other file.

    The ground of a token is the stronger, the higher its score: 10 steps from the median to the
    best. Kept characters are bold, the others grey; gold spans are underlined.
    """
    heat = np.full(len(passage) + 1, -1)  # [characters], the step of each
    low, high = np.median(scores), scores.max()
    steps = (9 * (scores - low) / max(high - low, 1e-9)).clip(0, 9).round().astype(int)
    for (start, end), step in zip(of_tokens.tolist(), steps, strict=True):
        heat[start:end] = np.maximum(heat[start:end], step)  # a character may have several
    mark = np.zeros((2, len(passage) + 1), bool)
    for row, spans in zip(mark, (kept, gold), strict=True):
        for start, end in spans:
            row[start:end] = True
    state = np.stack((heat, *mark))  # [3, characters]
    cuts = (np.flatnonzero((state[:, 1:] != state[:, :-1]).any(0)) + 1).tolist()
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(passage)], strict=True):
        step, is_kept, is_gold = state[:, start].tolist()
        names = [f"h{step}"] * (step > 0) + ["k"] * is_kept + ["g"] * is_gold
        text = escape(passage[start:end])
        parts.append(f'<span class="{" ".join(names)}">{text}</span>' if names else text)
    before = np.append(0, mark[0].cumsum())  # kept characters in front of each
    n_kept = int((before[of_tokens[:, 1]] > before[of_tokens[:, 0]]).sum())
    facts = f"{n_kept:,} of {len(scores):,} tokens kept"
    facts += f"; of the gold {share_of(kept, gold):.0%}" if gold else ""
    ground = "".join(f".h{i} {{ background: rgb(var(--heat) / {i / 14:.2f}) }}" for i in range(10))
    legend = "<span class=k>bold: kept</span>, <span class=h9>ground: score</span>"
    legend += ", <span class=g>underlined: gold</span>" if gold else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(query)}</title>
<style>{_STYLE}{ground}</style></head>
<body><h1>{escape(query)}</h1>
<p class="facts">{facts}</p><p class="legend">{legend}</p>
<div class="passage">{"".join(parts)}</div>
</body></html>
"""


def read_passage(path, line):
    """(passage, query or None, gold spans) of a text, or of a line of a .jsonl."""
    if not path.endswith(".jsonl"):
        with open(path, encoding="utf-8", newline="") as f:
            return f.read(), None, []
    for number, record in read_jsonl(path):
        if number == line:
            passage = require(record, "passage", str, path, line)
            return passage, record.get("query"), record.get("spans", [])
    raise SystemExit(f"{path} has no line {line}")


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    ways = (text, prompt, reconstruct, compress, rank if compress is not None else rank or file)
    if not model or sum(x is not None for x in ways) != 1:
        raise SystemExit(
            "give --model=... and one of --text=, --file=, --prompt=, --rank=, --reconstruct= or "
            "--compress="
        )

    # ---- reconstruct ----
    if reconstruct is not None:
        reconstruct = sys.stdin.read().rstrip("\n") if reconstruct == "-" else reconstruct
        embedder = Embedder.load(model, dtype=dtype, attention_backend=attention_backend)
        new, eos_ids = write_back(embedder, reconstruct, reconstruct_side, max_new_tokens)
        ended = "ended by its EOS" if new[-1] in eos_ids else "cut"
        print(f"\n--- from this {reconstruct_side}'s embedding: {len(new)} tokens, {ended} ---")
        print(embedder.tokenizer.decode(new, skip_special_tokens=True))
        raise SystemExit

    # ---- compress ----
    if compress is not None:
        if file is None:
            raise SystemExit("--compress wants the passage: --file=passage.txt or a .jsonl")
        passage, asked, gold = read_passage(file, line)
        asked, gold = compress or asked, spans or gold
        if not asked or not passage.strip():
            raise SystemExit(f"{file}: there is no question, or nothing in the passage")
        if wrong := [x for x in gold if not 0 <= x[0] < x[1] <= len(passage)]:
            raise SystemExit(f"{file}: span {wrong[0]} is not in its {len(passage)} characters")
        embedder = Embedder.load(model, dtype=dtype, attention_backend=attention_backend)
        scores, of_tokens = score_tokens(embedder, [asked], passage, window, overlap, True)
        kept = keep(scores[0], of_tokens, passage, ratio, unit, neighbours)
        if html is not None:
            with open(html, "w", encoding="utf-8", newline="") as f:
                f.write(page(asked, passage, scores[0], of_tokens, kept, gold))
        print(f"\n{asked}\n\n{text_of(passage, kept)}\n")
        print(f"spans: {kept}")
        if gold:
            print(f"of the gold's characters {share_of(kept, gold):.0%} are kept")
        raise SystemExit

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
        notes = read_notes(folder)
        check_fills(net, tokenizer, notes)
        if file is not None:
            texts = read_lines(file)
        else:
            texts = [sys.stdin.read().rstrip("\n") if text == "-" else text]
        for start in range(0, len(texts), 32):  # 32 texts are one packed row
            some = texts[start : start + 32]
            filled = fill(net, tokenizer, some, num_fills, notes)
            for one, result in zip(some, filled, strict=True):
                print_fill(tokenizer, one, *result)
