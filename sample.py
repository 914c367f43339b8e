"""
Use a model: fill in masked tokens, write on from a prompt, or rank texts by a question.

    python sample.py --model=out/mlm_pydocs_tiny --text="Return the [MASK]."
    python sample.py --model=out/mlm_pydocs_tiny --file=lines.txt  # one a line
    python sample.py --model=out/clm_pydocs_tiny --prompt="Return the"
    python sample.py --model=owner/name@revision --text=- < letter.txt  # stdin
    python sample.py --model=out/contrastive_pydocs_tiny --rank="a question"
    python sample.py --model=any/embedder --rank="a question" --file=mine.txt
    python sample.py --model=out/token_retrieval_pydocs_tiny --file=text.txt \\
        --compress="How is the pool closed?" --ratio=8 --html=out.html
    python sample.py --model=out/reconstruct_pydocs_tiny \\
        --reconstruct="Return a copy of the list."

The model is a Hugging Face folder, a hub id, an adapter of ours or peft's (its base is read, too),
or the out_dir of a run: then the newest checkpoint in it. Masked models fill, causal ones write.
"""

import usage  # noqa: F401  --help ends here, without torch

import copy
import math
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

import common
from attention import make_seqs
from data import open_pairs, read_pair, text_lines
from embedder import Embedder, score_tokens
from formats import read_json
from formats.huggingface import resolve_folder
from formats.peft import pinned_chain
from lora import load_merged
from tokenizer import check_tokenizer, load_tokenizer
from tools.compress import keep_counted, page, read_passage, share_of, text_of

# ---- defaults ----
model = ""  # a folder, an out_dir or a hub id owner/name[@revision]
# fill masks: give one of these two
text: str | None = None  # with one [MASK] or more; "-" reads it from stdin
file: str | None = None  # texts, one a line; blank lines are passed over. Also for rank
num_fills = 5  # >= 1; candidates shown for each mask
# generate, causal models
prompt: str | None = None  # "-" reads it from stdin
num_samples = 1  # >= 1
max_new_tokens = 100  # >= 1; a sample also ends at its EOS, and at the model's max_seq_len
temperature = 0.8  # >= 0; 0: always the most probable token (greedy)
top_k = 0  # >= 0; draw from the k most probable tokens; 0: from all
top_p = 1.0  # > 0 and <= 1; draw from the fewest tokens that have this probability; 1: all
# rank: an embedder's five nearest texts to a question, out of file or of the pairs of rank_pairs
rank: str | None = None
rank_pairs: tuple[str, ...] = (
    "data/pydocs/train.jsonl", "data/pydocs/val.jsonl", "data/pydocs/test.jsonl",
)  # fmt: skip
num_ranked = 5  # >= 1
# reconstruct: what a model of train_reconstruct.py writes from a text's embedding alone, greedily
reconstruct: str | None = None  # "-" reads it from stdin
reconstruct_side = "query"  # one of query, document; what the text is: the other is written
# compress: the part of the passage in file that matters most for a question, in its order
compress: str | None = None  # the question; "" takes the line's, where file is a .jsonl
line = 1  # >= 1; of a .jsonl file {"query", "passage", "spans"}; a .txt is one passage
ratio = 8.0  # >= 1; 1 token of 8 is kept
unit = "words"  # one of words, tokens; what is written without spaces, as Chinese, wants tokens
neighbours = 0  # >= 0; units on each side that are kept with each of the best
window = 0  # >= 0; tokens encoded at a time, for passages longer than memory; 0: the whole
overlap = 0  # >= 0; tokens that windows share
html: str | None = None  # writes a page there: the passage as a heat map
spans: tuple = ()  # gold ((start, end), ..) characters, underlined in the page; or a .jsonl's own
seed = 1337  # >= 0 and < 1e18; sample i is drawn with seed + i, whatever num_samples is
# device
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
dtype = "fp32"  # one of auto, bf16, fp32; bf16 halves the memory, logits have 3 digits


# ---- the model ----


def load(name, dtype="fp32", attention_backend="auto"):
    """(model, tokenizer, its folder) of a folder, an out_dir, a hub id, or an adapter, which is
    merged. SystemExit where the model has no language modelling head."""
    device = common.setup_distributed()[3]
    dtype = common.dtype_of(dtype, device)
    base, *adapters = pinned_chain(name)
    folder = resolve_folder([base, *adapters][-1])
    net = load_merged(base, adapters, dtype=dtype).eval()
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, net.config.vocab_size)
    if net.config.head == "none":
        raise SystemExit(f"{folder} has no language modelling head, so it predicts no tokens")
    net.set_backend(attention_backend, device, dtype)
    print(f"{folder}: {net.describe()}, {dtype} on {device}")
    return net.to(device), tokenizer, folder


def load_embedder(s):
    return Embedder.load(s.model, dtype=s.dtype, attention_backend=s.attention_backend)


def read_text(text):
    """The text that an option gives, or stdin's for "-"."""
    return sys.stdin.read().rstrip("\n") if text == "-" else text


def read_lines(path):
    if texts := [text.strip() for _, text in text_lines(path)]:
        return texts
    raise SystemExit(f"{path}: no text in it")


# ---- fill masks ----


@torch.no_grad()
def fill(net, tokenizer, texts, n, notes):
    """The n most probable tokens for each mask, each by itself: two masks of a text do not know of
    each other's fill. The mask is written [MASK] or as the tokenizer writes it.

    -> for each text (ids, places [M] of the masks in ids, probabilities [M, n], tokens [M, n]).
    notes: what mntp.json says of a model of train_mntp.py, {} for others. Such models are read one
    place before the mask, and their mask may be another token than the tokenizer's.
    SystemExit for a model that cannot fill, and for a text without a mask, or with one that nothing
    stands before.
    """
    if net.config.causal:
        raise SystemExit("a causal model does not see what follows a mask: try --prompt")
    if tokenizer.mask_token is None:
        if not notes:
            raise SystemExit("this tokenizer has no mask token: the model was not trained to fill; "
                             "an embedder is for --rank")
        tokenizer = copy.deepcopy(tokenizer)  # a decoder's: [MASK] shall be one token, for now
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    mask, mask_id, before = tokenizer.mask_token, tokenizer.mask_token_id, -notes.get("at", 0)
    # A word carries the space in front of it, and so does the mask that stands for a word: else
    # byte-level BPE would see a lone space, as it never did in training. WordPiece does not care.
    marked = [text.replace("[MASK]", mask).replace(" " + mask, mask) for text in texts]
    ids = tokenizer(marked)["input_ids"]
    places = [[k for k, i in enumerate(text_ids) if i == mask_id] for text_ids in ids]
    for text, masks in zip(texts, places):
        if not masks or masks[0] < before:
            problem = f"nothing stands before the {mask} of" if masks else f"no {mask} to fill in"
            raise SystemExit(f"{problem} the text {text[:60]!r}")
    device = net.embed.weight.device
    seqs = make_seqs(list(map(len, ids)), device)
    row = torch.tensor(sum(ids, []))  # [T], all texts end to end
    rows = (row == mask_id).nonzero()[:, 0]  # [L], every mask
    row[rows] = notes.get("mask_id", mask_id)
    logits = net(row.to(device), seqs, rows.to(device) - before)  # [L, V]
    top = logits.float().softmax(-1).topk(min(n, logits.size(-1)))  # [L, n]
    p, best = (x.cpu().split(list(map(len, places))) for x in top)
    return list(zip(ids, places, p, best))


def shown(tokenizer, i):
    """One token as a reader wants it, in quotes; what is no whole character as the raw token."""
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None:
        return f"<id {i}, no token>"  # a row of the embedding that the tokenizer does not use
    readable = tokenizer.decode([i])
    return repr(readable if readable and "\ufffd" not in readable else token)


def print_fill(tokenizer, text, ids, places, p, best):
    print(f"\n{text}")
    for k, fills in enumerate(zip(p.tolist(), best.tolist()), 1):
        fills = "  ".join(f"{x:6.1%} {shown(tokenizer, i):<12}" for x, i in zip(*fills)).rstrip()
        print(f"  {f'mask {k}' if len(places) > 1 else 'mask'}: {fills}")
    fills, specials = dict(zip(places, best[:, 0].tolist())), tokenizer.all_special_ids
    # without [CLS] and such, but with those the model fills in
    filled = [fills.get(k, i) for k, i in enumerate(ids) if k in fills or i not in specials]
    print(f"  best: {tokenizer.decode(filled)}")


def use_fill(s):
    net, tokenizer, folder = load(s.model, s.dtype, s.attention_backend)
    notes = read_json(folder, "mntp.json")
    texts = read_lines(s.file) if s.file is not None else [read_text(s.text)]
    for first in range(0, len(texts), 32):  # 32 texts are one packed row
        part = texts[first : first + 32]
        for text, result in zip(part, fill(net, tokenizer, part, s.num_fills, notes)):
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
    return [torch.multinomial(row, 1, generator=g).item() for row, g in zip(probs, generators)]


@torch.no_grad()
def generate(
    net, prompt_ids, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, num_samples=1,
    eos_ids=(), seed=1337, anchor=None,
):  # fmt: skip
    """-> num_samples lists of new ids. A sample ends with an id of eos_ids, which is in its list,
    after max_new_tokens, or where the model has no more positions.

    There is no KV cache: every step runs the whole text again, n new tokens after a prompt of p
    cost n * (p + n/2) tokens of forward instead of p + n. The samples are the texts of one packed
    row, which one that has ended leaves. anchor [C]: stands in for the prompt's first token.
    """
    if min(temperature, top_k) < 0 or not 0 < top_p <= 1 or min(num_samples, max_new_tokens) < 1:
        given = f"{temperature=}, {top_k=}, {top_p=}, {num_samples=}, {max_new_tokens=}"
        raise SystemExit(f"{given}: expected >= 0, >= 0, above 0 and up to 1, >= 1, >= 1")
    n, positions = len(prompt_ids), net.config.max_seq_len
    room = min(max_new_tokens, positions - n)
    if room < 1:
        raise SystemExit(f"the prompt has {n} tokens, the model {positions} positions: no room")
    if room < max_new_tokens:
        print(f"at most {room} new tokens: the model has {positions} positions")
    device = net.embed.weight.device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]
    samples = [list(prompt_ids) for _ in range(num_samples)]
    running = list(zip(samples, generators))
    for _ in tqdm(range(room), "tokens", leave=False, disable=None):
        texts, generators = zip(*running)
        row = torch.tensor(sum(texts, []), device=device)  # [T]
        seqs = make_seqs(list(map(len, texts)), device)
        ends = seqs.cu_seqlens.long()
        vectors = None if anchor is None else anchor.expand(len(texts), -1)  # [S, C]
        logits = net(row, seqs, ends[1:] - 1, vectors=vectors, at=ends[:-1])  # [S, V]
        for text, i in zip(texts, draw(logits, temperature, top_k, top_p, generators)):
            text.append(i)
        running = [both for both in running if both[0][-1] not in eos_ids]
        if not running:
            break
    return [sample[n:] for sample in samples]


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
    return ids, eos_ids


def print_sample(tokenizer, title, ids, new, eos_ids):
    ended = "ended by its EOS" if new[-1] in eos_ids else "cut"
    print(f"\n--- {title}{len(new)} tokens, {ended} ---")
    print(tokenizer.decode(ids + new, skip_special_tokens=True))


def use_prompt(s):
    net, tokenizer, _ = load(s.model, s.dtype, s.attention_backend)
    ids, eos_ids = encode_prompt(net, tokenizer, read_text(s.prompt))
    samples = generate(
        net, ids, s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.num_samples, eos_ids, s.seed
    )
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
    other = {"query": "document", "document": "query"}.get(side)  # the side that is written
    if other is None:
        raise SystemExit(f"reconstruct_side={side!r}: expected query or document")
    if not net.config.causal or net.config.head == "none" or embedder.pooling != "last":
        raise SystemExit("--reconstruct wants a causal model that has kept its head")
    [(ids, _)] = embedder.tokenize([text], prompts.get(side, ""))
    device = net.embed.weight.device
    hidden = net(torch.tensor(ids, device=device), make_seqs([len(ids)], device))  # [T, C]
    plain = tokenizer.backend_tokenizer.encode("a")
    given = plain.ids[: plain.special_tokens_mask.index(0)]  # BOS
    # a space at the end is a part of the first word, which the model writes
    head = embedder.template.head(prompts.get(other, "")).rstrip(" ")
    given += tokenizer.backend_tokenizer.encode(head, add_special_tokens=False).ids
    [(with_end, _)] = embedder.tokenize(["a"])
    eos_ids = with_end[-1:]
    # the last hidden state is not normalized: as in training
    prompt_ids = [0, *given]
    (new,) = generate(net, prompt_ids, max_new_tokens, 0, eos_ids=eos_ids, anchor=hidden[-1])
    return new, eos_ids


def use_reconstruct(s):
    embedder = load_embedder(s)
    text = read_text(s.reconstruct)
    new, eos_ids = write_back(embedder, text, s.reconstruct_side, s.max_new_tokens)
    title = f"from this {s.reconstruct_side}'s embedding: "
    print_sample(embedder.tokenizer, title, [], new, eos_ids)


# ---- rank ----


def use_rank(s):
    embedder = load_embedder(s)
    prompts = embedder.prompts
    if embedder.pooling == "tokens":
        raise SystemExit("--rank wants one vector a text; this model has one for each token")
    if s.file is None:
        files = map(open_pairs, s.rank_pairs)
        pairs = [read_pair(file, i) for file in files for i in range(len(file))]
        titles, texts = zip(*((pair["query"], pair["pos"][0]) for pair in pairs))
    else:
        titles = texts = read_lines(s.file)
    query = embedder.encode([s.rank], prompts.get("query", ""))[0]  # [C]
    scores = embedder.encode(texts, prompts.get("document", ""), progress=True) @ query  # [N]
    print(f"\n{s.rank}\n")
    for place, i in enumerate((-scores).argsort(kind="stable")[: s.num_ranked], 1):
        print(f"{place}. {scores[i]:.3f}  {titles[i]}")
        if s.file is None:
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
    embedder = load_embedder(s)
    if not embedder.token_scores:
        print("its folder does not say that train_token_retrieval.py trained it:\n"
              "what it keeps may mean little")  # fmt: skip
    (scores,), spans = score_tokens(embedder, [query], passage, s.window, s.overlap, True)
    settings = s.ratio, s.unit, s.neighbours
    kept, counts = keep_counted(embedder.tokenizer, scores, spans, passage, *settings)
    if s.html is not None:
        with open(s.html, "w", encoding="utf-8", newline="") as f:
            f.write(page(query, passage, scores, spans, kept, counts, gold))
    print(f"\n{query}\n\n{text_of(passage, kept)}\n\nspans: {kept}")
    print("{:,} of {:,} tokens are kept".format(*counts))
    if gold:
        print(f"of the gold's characters {share_of(kept, gold):.0%} are kept")


if __name__ == "__main__":
    # ---- configure ----
    s = SimpleNamespace(**common.configure(globals()))
    uses = {"text": use_fill, "file": use_fill, "prompt": use_prompt, "rank": use_rank,
            "reconstruct": use_reconstruct, "compress": use_compress}  # fmt: skip
    given = [key for key in uses if getattr(s, key) is not None]
    if "rank" in given or "compress" in given:  # they read their texts from file
        given = [key for key in given if key != "file"]
    if not s.model or len(given) != 1:
        raise SystemExit(f"give --model=... and one of --{'=, --'.join(uses)}=")
    uses[given[0]](s)
