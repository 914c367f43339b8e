"""
Contrastive training of an embedder: queries near their passages, far from all the others.

    python train_contrastive.py configs/contrastive_pydocs_tiny.py     # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=8 train_contrastive.py configs/contrastive_llm2vec.py
    python train_contrastive.py configs/x.py --resume=True             # go on where it stopped

The batch is as large as you like: texts go through the model in chunks of chunk_tokens, and the
gradient cache (Gao et al. 2021, arXiv 2101.06983) makes the gradient that of the whole batch.
LLM2Vec (arXiv 2404.05961), SimCSE (arXiv 2104.08821), NeoBERT (arXiv 2502.19587), Ettin
(arXiv 2507.11412), Anchor-Embedding and FlagEmbedding train their embedders like this.
"""

import math
import os
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import lora
from data import load_tokenizer, open_pairs, prefetch, read_pair, rows_of_step
from embedder import Embedder, Template, groups, pack, tokenize
from model import choose_backend, from_pretrained, resolve_folder

# ---- defaults ----
out_dir = "out/contrastive"
# model
init_from = ""  # a model folder, an out_dir, or a hub id owner/name[@revision]
adapters: tuple = ()  # PEFT folders or hub ids merged into it first, in order (LLM2Vec's MNTP)
attention: str | None = None  # causal or bidirectional; None: the model's own
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
max_seq_len: int | None = None  # positions the model is trained for; None: its own
attn_dropout: float | None = None  # of attention probabilities (SimCSE: 0.3); None: the model's own
lora_rank = 0  # 0: every weight trains
lora_alpha = 32.0
lora_dropout = 0.05
lora_targets = "all"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# embedding
pooling = "mean"  # mean, weighted_mean, last, cls; splade (sparse), tokens (multi-vector)
projection_dim = 128  # of multi-vector's token embeddings
prefix = ""  # the template: prefix + instruction + text + suffix, saved with the model
suffix = ""
pool_instruction = True  # False: the pool is the text's own tokens, without the instruction
normalize = True  # embeddings of length 1; False with scale for dot products
query_max_length = 512
passage_max_length = 512
# data: JSONL files, see data.py; one file a batch
data: tuple = ("data/pydocs/train.jsonl",)
eval_data = "data/pydocs/val.jsonl"  # "": none
query_instruction: tuple = ("",)  # one for all files, or one for each; a line's "prompt" goes first
passage_instruction: tuple = ("",)  # symmetric tasks have the same on both sides
sampling_alpha = 1.0  # a file is drawn with probability ~ (its lines) ** alpha
group_size = 2  # passages a query: one positive, the others its negatives, fewer where it has fewer
no_duplicates = False  # a pair whose text the batch has already gives way to a random one
# loss
temperature = 0.05  # InfoNCE's; scale = 1 / temperature
both_directions = False  # passages choose among queries, too
false_negative_margin: float | None = None  # drop passages above the positive's score + margin
distill_weight = 0.0  # of KL to the teacher's pos_scores, neg_scores, over each query's group
distill_temperature = 1.0  # of the teacher
matryoshka_dims: tuple = ()  # e.g. (768, 256, 64): the mean of the losses at these widths
query_flops = 5e-5  # of splade
passage_flops = 3e-5
negatives_cross_device = True  # candidates of all ranks
# batch
batch_size = 64  # queries of one step, over all ranks; each with up to group_size passages
chunk_tokens = 16384  # tokens of one forward on one device; the result does not depend on it
# length
max_steps: int | None = None
num_epochs: float | None = 1.0
# optimizer
learning_rate = 2e-5
min_lr = 0.0
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0
schedule = "linear"  # linear, cosine or constant, after the warmup
warmup_steps: int | None = None
warmup_ratio = 0.1
# evaluation and checkpoints
eval_interval = 200  # steps; 0: never
log_interval = 10
save_interval = 1000  # steps; the last step is always saved
keep_last = 1
keep_best = False
resume = False
tracker = ""
# device
dtype = "auto"  # bf16 (autocast, trained weights in fp32), fp32, or what the device is good at
compile = False
gradient_checkpointing = False
fsdp = False
deterministic = False
seed = 1337
# look, and do not train
dry_run = False
show_batch = False


# ---- the batch ----
# Every rank reads the texts of the whole batch, so that all know which candidate is whose; each
# tokenizes and embeds its own share. Texts are numbered queries first, then passages.


def choose_files(files, max_steps, alpha, seed):
    """The file of each step [max_steps], drawn with probability ~ (its lines) ** alpha."""
    p = np.array([len(file) for file in files]) ** alpha
    return np.random.default_rng(seed).choice(len(files), size=max_steps, p=p / p.sum())


def make_batch(files, step, choices, settings):
    """-> (pairs, which file): batch_size pairs of one file. A file's last batch takes what it lacks
    from the file's next epoch, so that every batch is full. A function of (seed, step)."""
    s, which = settings, int(choices[step])
    nth = int((choices[:step] == which).sum())  # how many batches this file has given
    order = rows_of_step(nth, s["batch_size"], len(files[which]), s["seed"] + which)
    pairs = []
    for epoch, line in zip(*order, strict=True):
        rng = np.random.default_rng((s["seed"], which, epoch, line))
        pairs.append(sample_pair(files[which], line, s["group_size"], rng))
    if s["no_duplicates"]:
        rng = np.random.default_rng((s["seed"], step))
        pairs = without_duplicates(pairs, files[which], s["group_size"], rng)
    return pairs, which


def sample_pair(file, line, group_size, rng):
    """One line with one of its positives and up to group_size - 1 of its negatives, drawn."""
    pair = read_pair(file, line)
    positive = rng.integers(len(pair["pos"]))
    n_neg = min(group_size - 1, len(pair["neg"]))
    negatives = sorted(rng.choice(len(pair["neg"]), n_neg, replace=False)) if n_neg else []
    passages = [pair["pos"][positive]] + [pair["neg"][i] for i in negatives]
    scores = None
    if pair["pos_scores"] and (pair["neg_scores"] or not n_neg):
        scores = [pair["pos_scores"][positive]] + [pair["neg_scores"][i] for i in negatives]
    return {"query": pair["query"], "known": pair["pos"], "passages": passages, "scores": scores,
            "prompt": pair["prompt"]}  # fmt: skip


def without_duplicates(pairs, file, group_size, rng):
    """A pair that shares a text with an earlier one gives way to a drawn one, in up to 20 tries."""
    seen, out = set(), []
    for pair in pairs:
        for _ in range(20):
            if not seen & {pair["query"], *pair["passages"]}:
                break
            pair = sample_pair(file, rng.integers(len(file)), group_size, rng)
        seen |= {pair["query"], *pair["passages"]}
        out.append(pair)
    return out


def layout(pairs):
    """Who is whose among B queries and N passages, as numbers:

    positive [B]: the passage of each query; group [B, G]: its passages, -1 where it has fewer;
    teacher [B, G]: their scores, nan where the line has none; known [K, 2]: (query, passage) that
    must not count as negatives, because the text is a positive of that query, or of its like.
    """
    n_group = max(len(p["passages"]) for p in pairs)
    group = np.full((len(pairs), n_group), -1)
    teacher = np.full((len(pairs), n_group), np.nan, dtype=np.float32)
    where, positives, n = {}, {}, 0
    for b, pair in enumerate(pairs):
        positives.setdefault(pair["query"], set()).update(pair["known"])
        for g, text in enumerate(pair["passages"]):
            group[b, g] = n
            where.setdefault(text, []).append(n)
            n += 1
        if pair["scores"]:
            teacher[b, : len(pair["scores"])] = pair["scores"]
    known = [
        (b, n)
        for b, pair in enumerate(pairs)
        for text in positives[pair["query"]]
        for n in where.get(text, [])
        if n != group[b, 0]
    ]
    known = np.array(known, dtype=np.int64).reshape(-1, 2)
    return torch.from_numpy(group), torch.from_numpy(teacher), torch.from_numpy(known)


# ---- losses ----
# queries [b, C] or [b, L, C], candidates [N, C] or [N, L, C] (multi-vector: zero rows are padding);
# all in fp32, summed over the b queries.
_BLOCK = 2**20  # scores that exist at a time


def similarity(queries, candidates):
    """Dot products [b, N]; of multi-vectors MaxSim, sum over i of max over j of q_i . d_j (Khattab
    and Zaharia 2020, arXiv 2004.12832, equation 3)."""
    if queries.dim() == 2:
        return queries @ candidates.t()
    dots = torch.einsum("bic,njc->bnij", queries, candidates)
    there = candidates.any(-1)  # [N, L]
    padding = ~there & there.any(-1, keepdim=True)  # a text that has no tokens at all scores 0
    dots = dots.masked_fill(padding[None, :, None, :], -torch.inf)
    return (dots.amax(-1) * queries.any(-1)[:, None, :]).sum(-1)


def info_nce(scores, positive, temperature, known=None, margin=None):
    """sum over b of -log( exp(s_b+ / tau) / sum over n of exp(s_bn / tau) ), and how often the
    positive was first (van den Oord et al. 2018, arXiv 1807.03748, equation 4).

    scores [b, N], positive [b]; known [K, 2]: pairs that are no negatives; margin: nor is what
    scores above the positive + margin.
    """
    own = scores.gather(1, positive[:, None])  # [b, 1]
    if known is not None and len(known):
        scores = scores.index_put(known.unbind(1), scores.new_tensor(-torch.inf))
    if margin is not None:
        scores = scores.masked_fill(scores > own.detach() + margin, -torch.inf)
        scores = scores.scatter(1, positive[:, None], own)
    losses = F.cross_entropy(scores / temperature, positive, reduction="sum")
    return losses, (scores.argmax(1) == positive).sum()


def distillation(scores, group, teacher, temperature, teacher_temperature):
    """sum over b of KL(teacher || student) over the query's own group; 0 for lines without scores.

    scores [b, N], group [b, G] with -1 for none, teacher [b, G] with nan for none.
    """
    there = ~teacher.isnan() | (group == group[:, :1])  # without scores the positive stands alone
    own = scores.gather(1, group.clamp(min=0)) / temperature  # [b, G]
    student = own.masked_fill(~there, -1e9).log_softmax(1)
    wanted = (teacher.nan_to_num() / teacher_temperature).masked_fill(~there, -1e9).log_softmax(1)
    return (wanted.exp() * (wanted - student)).sum()


def flops(x):
    """FLOPS regulariser: sum over v of (mean over texts of |x_v|)^2 (Paria et al. 2020,
    arXiv 2004.05665, equation 4). x [n, V]."""
    return x.abs().mean(0).square().sum()


def batch_loss(queries, passages, mine, where, s):
    """The loss of the queries `mine` of a batch of B queries and N passages -> (loss, hits).

    mine: indices of this rank's queries, a range. Gradients are left in queries.grad and
    passages.grad, so that scores exist for a few queries at a time. The batch's loss is the sum
    over ranks.
    """
    group, teacher, known = where
    n_batch, widths = len(queries), s["matryoshka_dims"] or (queries.size(-1),)
    # a block of queries at a time; multi-vectors hold a matrix for each pair
    per_pair = queries[0].numel() * passages[0].numel() // queries.size(-1) ** 2
    step = max(1, _BLOCK // (len(passages) * max(1, per_pair)))
    total, hits = 0.0, 0
    b, n = (torch.arange(len(x), device=x.device) for x in (queries, passages))
    elsewhere = (n < group[mine[0], 0]) | (n > group[mine].max())  # other ranks' passages
    others = (b < mine[0]) | (b > mine[-1])  # and queries
    for rows in mine.split(step):
        own = group[rows, 0]  # [b] ascending
        here = torch.isin(known[:, 0], rows)
        pairs = torch.stack((known[here, 0] - rows[0], known[here, 1]), dim=1)
        # (b, n) may not be negatives: then neither are passage n and query b
        here = torch.isin(known[:, 1], own)
        turned = torch.stack((torch.searchsorted(own, known[here, 1]), known[here, 0]), dim=1)
        loss = 0.0
        for width in widths:
            q, d = queries[..., :width], passages[..., :width]
            if s["matryoshka_dims"] and s["normalize"]:
                q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
            scores = similarity(q[rows], d)
            if not s["negatives_cross_device"]:
                scores = scores.masked_fill(elsewhere, -torch.inf)
            part, n_hits = info_nce(
                scores, own, s["temperature"], pairs, s["false_negative_margin"]
            )
            if s["both_directions"]:
                back = similarity(d[own], q)
                if not s["negatives_cross_device"]:
                    back = back.masked_fill(others, -torch.inf)
                part = (part + info_nce(back, rows, s["temperature"], turned)[0]) / 2
            if s["distill_weight"]:
                part = part + s["distill_weight"] * distillation(
                    scores, group[rows], teacher[rows], s["temperature"], s["distill_temperature"]
                )
            loss = loss + part / len(widths)
            hits += n_hits if width == max(widths) else 0
        loss = loss / n_batch
        loss.backward()
        total += loss.item()
    if s["pooling"] == "splade":
        penalty = s["query_flops"] * flops(queries) + s["passage_flops"] * flops(passages)
        (penalty / s["world_size"]).backward()  # each rank has all of it
        total += penalty.item() / s["world_size"]
    return total, int(hits)


# ---- embedding a batch, in chunks and over ranks ----


def chunks_of(encoded, chunk_tokens):
    """Indices of texts, longest first, in lists of at most chunk_tokens tokens together."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    parts = groups([len(encoded[i][0]) for i in order], chunk_tokens)
    return [[order[i] for i in part] for part in parts]


def padded(out):
    """What the embedder gives -> [n, C], of multi-vectors [n, L, C] with zero rows as padding."""
    if torch.is_tensor(out):
        return out
    return torch.nn.utils.rnn.pad_sequence(out[0].split(out[1]), batch_first=True)


def gather_rows(x, counts):
    """Rows of all ranks in rank order: x [n, ...] -> [sum of counts, ...]. Not differentiable."""
    if len(counts) == 1:
        return x
    if x.dim() == 3:  # multi-vectors, as long as the longest of all ranks
        longest = torch.tensor(x.size(1), device=x.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        x = F.pad(x, (0, 0, 0, int(longest) - x.size(1)))
    mine = x.new_zeros(max(counts), *x.shape[1:])
    mine[: len(x)] = x
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def embed_all(forward, chunks, n_chunks):
    """Vectors of all texts in their own order from their chunks -> [n, C] or [n, L, C]."""
    vectors = [None] * sum(map(len, chunks))
    for i, chunk in enumerate(chunks):
        for text, vector in zip(chunk, forward(i), strict=True):
            vectors[text] = vector
    for _ in range(n_chunks - len(chunks)):
        forward(0)
    if vectors[0].dim() == 1:
        return torch.stack(vectors)
    return torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)


def count_chunks(chunks, s):
    """How many forwards there are: under FSDP, where each is collective, the most of any rank."""
    if not s["fsdp"]:
        return len(chunks)
    of_rank = [len(chunks) * (r == s["rank"]) for r in range(s["world_size"])]
    return int(max(common.all_reduce_sum(of_rank)))


def cached_step(wrapped, batch, step, s):
    """Loss and gradients of one batch -> (this rank's share of the loss, its hits).

    wrapped: the embedder, as DDP or fully_shard wrapped it; batch: an item of train_batches.
    The gradient of the loss by the vectors is taken first, then that of the vectors by the weights,
    chunk by chunk: memory holds the activations of one chunk. Chunks decide what dropout is drawn,
    and nothing else.
    """
    (encoded, n_queries, where, counts), rank, world_size = batch, s["rank"], s["world_size"]
    device, chunks = s["device"], chunks_of(encoded, s["chunk_tokens"])

    def forward(i):
        common.seed_step(s["seed"], step, rank, i)  # dropout is a function of these, here and in 4.
        with s["autocast"]():
            return padded(wrapped(*pack([encoded[j] for j in chunks[i]], device)))

    # 1. the vectors of all texts, without a graph unless they fit in one chunk
    n_chunks = count_chunks(chunks, s)
    cached = n_chunks > 1
    with torch.no_grad() if cached else nullcontext():
        own = embed_all(forward, chunks, n_chunks)  # [n, C] or [n, L, C]
    # 2. the loss of this rank's queries among the passages of all ranks
    queries, passages = own[:n_queries].detach(), own[n_queries:].detach()
    if own.dim() == 3:  # queries are shorter than passages
        queries = queries[:, : max(end - start for _, (start, end) in encoded[:n_queries])]
    queries = gather_rows(queries, [n_queries] * world_size).requires_grad_()
    passages = gather_rows(passages, counts).requires_grad_()
    mine = torch.arange(rank * n_queries, (rank + 1) * n_queries, device=device)
    loss, hits = batch_loss(queries, passages, mine, [x.to(device) for x in where], s)
    # 3. the gradient of a rank's vectors has a part from every rank's loss
    if world_size > 1:
        for x in (queries, passages):
            dist.all_reduce(x.grad)
    first = sum(counts[:rank])
    parts = queries.grad[mine], passages.grad[first : first + counts[rank]]
    if own.dim() == 3:  # other ranks' texts may be longer, or shorter
        parts = [F.pad(x, (0, 0, 0, own.size(1) - x.size(1))) for x in parts]
    d_own = world_size * torch.cat(parts)  # times W, for DDP and FSDP average
    # 4. into the weights, chunk by chunk with the same dropout; ranks meet at the last one
    if not cached:
        own.backward(d_own)
        return loss, hits
    del own, queries, passages, parts
    for i in range(n_chunks):
        if s["fsdp"]:
            wrapped.set_requires_gradient_sync(i == n_chunks - 1)
        elif world_size > 1:
            wrapped.require_backward_grad_sync = i == n_chunks - 1
        out = forward(i if i < len(chunks) else 0)
        d_out = d_own[chunks[i]] if i < len(chunks) else torch.zeros_like(out)
        out.backward(d_out[:, : out.size(1)])  # [n, C], or [n, L, C] of the chunk's longest text
    return loss, hits


def encode_share(pairs, share, which, tokenizer, settings):
    """Token ids of this rank's queries and passages -> (encoded, how many of them are queries)."""
    s, own = settings, [pairs[i] for i in share]
    ask, answer = (i[which] if len(i) > 1 else i[0] for i in s["instructions"])
    instructions = [p["prompt"] if p["prompt"] is not None else ask for p in own]
    how = s["template"], s["query_max_length"], s["pool_instruction"]
    encoded = tokenize(tokenizer, [p["query"] for p in own], instructions, *how)
    how = s["template"], s["passage_max_length"], s["pool_instruction"]
    passages = [text for p in own for text in p["passages"]]
    return encoded + tokenize(tokenizer, passages, answer, *how), len(own)


def train_batches(files, first_step, last_step, choices, tokenizer, settings):
    """For each step (encoded texts of this rank, number of queries among them, layout of the whole
    batch, passages of each rank)."""
    s = settings
    shares = np.arange(s["batch_size"]).reshape(s["world_size"], -1)  # [W, B / W]
    for step in range(first_step, last_step):
        pairs, which = make_batch(files, step, choices, s)
        counts = [sum(len(pairs[i]["passages"]) for i in share) for share in shares]
        encoded, n = encode_share(pairs, shares[s["rank"]], which, tokenizer, s)
        yield encoded, n, layout(pairs), counts


def learning_rate_at(step, max_steps, peak, floor, schedule, warmup):
    """A linear warmup, then linear, cosine or constant from peak to floor at max_steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(max_steps - warmup, 1)
    kept = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[schedule]
    return floor + (peak - floor) * kept


@torch.no_grad()
def evaluate(embedder, file, settings, max_lines=1000):
    """Each query of the file among all its passages, up to max_lines lines, every rank its share
    of the texts -> {"eval_loss", "eval_acc" (accuracy@1), "eval_mrr" (@10), "eval_ndcg" (@10)}."""
    s = settings
    pairs = [read_pair(file, i) for i in range(min(len(file), max_lines))]
    passages = list(dict.fromkeys(text for p in pairs for text in p["pos"] + p["neg"]))
    number = {text: i for i, text in enumerate(passages)}
    ask, answer = s["instructions"][0][0], s["instructions"][1][0]
    asks = [p["prompt"] if p["prompt"] is not None else ask for p in pairs]
    embedder.eval()

    def embed(texts, instruction, length):
        mine = np.array_split(np.arange(len(texts)), s["world_size"])
        own = mine[s["rank"]] if len(mine[s["rank"]]) else [0]  # or one, not counted
        if not isinstance(instruction, str):
            instruction = [instruction[i] for i in own]
        how = s["template"], length, s["pool_instruction"]
        encoded = tokenize(embedder.tokenizer, [texts[i] for i in own], instruction, *how)
        chunks = chunks_of(encoded, s["chunk_tokens"])

        def forward(i):
            with s["autocast"]():
                return padded(embedder.embed([encoded[j] for j in chunks[i]]))

        vectors = embed_all(forward, chunks, count_chunks(chunks, s))
        return gather_rows(vectors[: len(mine[s["rank"]])], [len(m) for m in mine])

    queries = embed([p["query"] for p in pairs], asks, s["query_max_length"])
    texts = embed(passages, answer, s["passage_max_length"])
    embedder.train()
    loss, first, mrr, ndcg = 0.0, 0, 0.0, 0.0
    discount = 1 / np.log2(np.arange(2, 12))
    for b, pair in enumerate(pairs):
        parts = texts.split(max(1, _BLOCK // queries[0].numel()))  # multi-vectors are many numbers
        scores = torch.cat([similarity(queries[b : b + 1], part) for part in parts], 1)  # [1, N]
        right = [number[text] for text in dict.fromkeys(pair["pos"])]
        others = [(0, n) for n in right[1:]]
        others = torch.tensor(others, device=scores.device).view(-1, 2).long()
        positive = torch.tensor(right[:1], device=scores.device)
        loss += info_nce(scores, positive, s["temperature"], others)[0].item()
        top = scores[0].topk(min(10, len(passages))).indices.tolist()
        gains = np.array([n in right for n in top], dtype=float)
        first += gains[0]
        mrr += 1 / (1 + gains.argmax()) if gains.any() else 0.0
        ndcg += (gains * discount[: len(gains)]).sum() / discount[: min(len(right), 10)].sum()
    sums = {"eval_loss": loss, "eval_acc": first, "eval_mrr": mrr, "eval_ndcg": ndcg}
    return {key: value / len(pairs) for key, value in sums.items()}


def describe_batch(pairs, which, tokenizer, settings):
    """The first queries and passages as a reader wants them; what is pooled stands inverted."""
    encoded, n = encode_share(pairs, range(len(pairs)), which, tokenizer, settings)
    for i, (ids, (first, last)) in enumerate(encoded):
        before, pooled, behind = (
            tokenizer.decode(part) for part in (ids[:first], ids[first:last], ids[last:])
        )
        name = f"query {i}" if i < n else f"passage {i - n}"
        print(f"--- {name}: {len(ids)} tokens")
        print(f"{before}\033[7m{pooled}\033[0m{behind}")


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    if schedule not in ("linear", "cosine", "constant"):
        raise SystemExit(f"schedule={schedule!r}: expected linear, cosine or constant")

    # ---- distributed and seed ----
    rank, world_size, local_rank, device = common.setup_distributed()
    print0 = common.print0
    if deterministic:
        common.set_deterministic()
    torch.manual_seed(seed)
    compute_dtype = common.dtype_of(dtype, device)

    def autocast():
        on = compute_dtype != torch.float32
        return torch.autocast(device.type, compute_dtype) if on else nullcontext()

    # ---- data ----
    files = [open_pairs(path) for path in data]
    eval_file = open_pairs(eval_data) if eval_data and eval_interval else None
    if train_also and not lora_rank:
        raise SystemExit(f"{train_also=} goes with LoRA; lora_rank=0 trains every weight")
    if group_size < 1:
        raise SystemExit(f"{group_size=}: expected 1 or more, the positive is one")
    if batch_size % world_size:
        raise SystemExit(f"{batch_size=} must be a multiple of {world_size=}")
    for key in ("query_instruction", "passage_instruction"):
        if len(config[key]) not in (1, len(files)):
            raise SystemExit(f"{key}: {len(config[key])} texts for {len(files)} data files")
    n_lines = sum(len(file) for file in files)
    if max_steps is None:
        max_steps = math.ceil(num_epochs * n_lines / batch_size)
    warmup = warmup_steps if warmup_steps is not None else round(warmup_ratio * max_steps)
    choices = choose_files(files, max_steps, sampling_alpha, seed)
    settings = dict(
        batch_size=batch_size, group_size=group_size, no_duplicates=no_duplicates, seed=seed,
        rank=rank, world_size=world_size, template=Template(prefix, suffix),
        query_max_length=query_max_length, passage_max_length=passage_max_length,
        pool_instruction=pool_instruction, pooling=pooling, normalize=normalize,
        instructions=(query_instruction, passage_instruction), chunk_tokens=chunk_tokens,
        temperature=temperature, both_directions=both_directions, autocast=autocast,
        false_negative_margin=false_negative_margin, matryoshka_dims=matryoshka_dims,
        negatives_cross_device=negatives_cross_device, distill_weight=distill_weight,
        distill_temperature=distill_temperature, query_flops=query_flops,
        passage_flops=passage_flops, device=device, fsdp=fsdp,
    )  # fmt: skip
    for file in files:
        print0(f"{file.path}: {len(file):,} lines")
    ranks = world_size if negatives_cross_device else 1
    n_candidates = batch_size // world_size * ranks * group_size
    print0(
        f"a step: {batch_size // world_size} queries x {world_size} ranks = {batch_size} queries, "
        f"each among N = {n_candidates:,} candidates (fewer where lines have fewer negatives)\n"
        f"{max_steps:,} steps = {max_steps * batch_size / n_lines:.2f} epochs; "
        f"warmup {warmup:,} steps"
    )

    # ---- model (+ LoRA) ----
    last = common.latest_checkpoint(out_dir, "step")
    if last and not (resume or dry_run):
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    last = last if resume and not dry_run else None
    if pooling == "tokens" and projection_dim and (lora_rank or fsdp):
        raise SystemExit("the projection of pooling='tokens' trains without LoRA and without FSDP")
    weights_type = compute_dtype if lora_rank else torch.float32  # what trains is fp32
    base = resolve_folder(init_from)  # of an out_dir its newest checkpoint
    if lora_rank and last:  # on what it began with: init_from may have a newer checkpoint by now
        base, *adapters = lora.adapter_chain(os.path.join(last, "adapter"))[:-1]
    source = last if last and not lora_rank else base
    model = from_pretrained(source, attention, max_seq_len=max_seq_len, dtype=weights_type)
    tokenizer = load_tokenizer(base)
    for adapter in adapters if source == base else ():
        lora.load_adapter(model, adapter)
        lora.merge(model)
    if pooling != "splade":
        model.drop_head()
    c = model.config
    own_dropout = c.attn_dropout
    c.attn_dropout = own_dropout if attn_dropout is None else attn_dropout
    if lora_rank and last:
        lora.load_adapter(model, os.path.join(last, "adapter"), trainable=True)
    elif lora_rank:
        lora.inject(model, lora_rank, lora_alpha, lora_dropout, lora_targets, train_also=train_also)
    projection = None
    if pooling == "tokens" and projection_dim:
        projection = torch.nn.Linear(c.n_embd, projection_dim, bias=False)
        trained = os.path.join(last or base, "1_Dense", "model.safetensors")
        if os.path.exists(trained):
            weight = load_file(trained)["linear.weight"]
            if weight.size(0) != projection_dim:
                raise SystemExit(f"{projection_dim=}: {trained} projects to {weight.size(0)}")
            projection.weight.data = weight
    model.gradient_checkpointing = gradient_checkpointing
    gqa = c.n_head != c.n_kv_head
    model.backend = choose_backend(attention_backend, device, compute_dtype, c.attn_dropout, gqa)
    prompts = {"query": query_instruction[0], "document": passage_instruction[0]}
    embedder = Embedder(
        model, tokenizer, pooling, settings["template"], prompts, normalize, passage_max_length,
        pool_instruction, projection, compute_dtype,
    ).to(device).train()  # fmt: skip
    if max(matryoshka_dims, default=0) > embedder.dim:
        raise SystemExit(f"{matryoshka_dims=}: the embedding has {embedder.dim} numbers")
    if query_max_length != passage_max_length:
        print0(f"queries are cut at {query_max_length} tokens here, and in use at "
               f"{passage_max_length} as all texts are")  # fmt: skip
    if max(len(set(query_instruction)), len(set(passage_instruction))) > 1 or any(
        read_pair(file, 0)["prompt"] is not None for file in files
    ):
        print0(f"several instructions: {prompts} is saved, encode takes any other")
    if problem := embedder.st_problem():
        print0(f"saved for nanoembed alone; sentence-transformers would differ: {problem}")
    n_all = sum(p.numel() for p in embedder.parameters())
    n_trained = sum(p.numel() for p in embedder.parameters() if p.requires_grad)
    print0(
        f"{c.family}, {'causal' if c.causal else 'bidirectional'}, {pooling} pooling, "
        f"{n_all / 1e6:.1f}M weights, {n_trained / 1e6:.1f}M trained; attention by "
        f"{model.backend}, {compute_dtype} on {device}"
    )
    if show_batch:
        pairs, which = make_batch(files, 0, choices, settings)
        describe_batch(pairs[:4], which, tokenizer, settings)
        raise SystemExit

    # ---- compile, FSDP/DDP ----
    wrapped = embedder
    if compile:
        for block in model.blocks:
            block.compile()
    if fsdp:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(embedder)
    elif world_size > 1:
        wrapped = DDP(embedder, device_ids=[local_rank] if device.type == "cuda" else None)

    # ---- optimizer, resume ----
    trained = [p for p in embedder.parameters() if p.requires_grad]
    groups_of = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups_of if g["params"]], learning_rate, (beta1, beta2), adam_eps,
        fused=device.type in ("cuda", "cpu"),
    )  # fmt: skip
    step, best = 0, {"loss": math.inf, "folder": ""}
    if last:
        path = os.path.join(last, "training_state.pt")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        common.load_optimizer_state([optimizer], state["optimizers"])
        step, best = state["step"], state["best"]
        print0(f"resumed {last}, after step {step}")

    def save():
        optim = common.optimizer_state([optimizer])
        state = {
            name.removeprefix("model."): tensor
            for name, tensor in common.full_state_dict(embedder).items()
            if name.startswith("model.")
        }
        folder = common.begin_checkpoint(out_dir, f"step{step}")
        if rank == 0:
            now, c.attn_dropout = c.attn_dropout, own_dropout  # the next stage chooses its own
            embedder.save(folder, not problem, state)  # LoRA merged
            if lora_rank:
                adapter, name = os.path.join(folder, "adapter"), init_from.rstrip("/")
                name = base if os.path.isdir(name) else name
                lora.save_adapter(model, adapter, name, state, adapters)
                embedder.save_settings(adapter)
            c.attn_dropout = now
            state = {"step": step, "best": best, "optimizers": optim}
            torch.save(state, os.path.join(folder, "training_state.pt"))
        print0(f"saved {common.commit_checkpoint(folder)}")
        kept = best["folder"] if keep_best else None
        common.prune_checkpoints(out_dir, "step", keep_last, False, kept)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "pairs_s", "tok_s"]
    columns += ["eval_loss", "eval_acc", "eval_mrr", "eval_ndcg"]
    if dry_run:  # leaves nothing behind
        log = lambda step, values: None  # noqa: E731
    else:
        log = common.open_log(out_dir, columns, max_steps, step, tracker, config)
        common.save_config(config, os.path.join(out_dir, "config.py"))
    stop_requested = common.catch_sigterm()
    bad_steps, since, tokens_seen, seconds = 0, 0, 0, 0.0
    batches = prefetch(train_batches(files, step, max_steps, choices, tokenizer, settings))
    if isinstance(wrapped, DDP):
        # DDP orders its buckets anew after the first backward, and with them the sums over ranks:
        # one backward that counts for nothing lets a resumed run sum as the unbroken one does.
        with autocast():
            padded(wrapped(*pack([([0, 0], (0, 2))], device))).sum().backward()
        embedder.zero_grad(set_to_none=True)

    while step < max_steps:
        start = time.perf_counter()
        batch = next(batches)
        lr = learning_rate_at(step, max_steps, learning_rate, min_lr, schedule, warmup)
        n_tokens = sum(len(ids) for ids, _ in batch[0])
        stopping, n_tokens = common.all_reduce_sum([stop_requested(), n_tokens])
        if stopping:
            save()
            break

        loss, hits = cached_step(wrapped, batch, step, settings)
        gnorm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
        gnorm = gnorm.full_tensor().item() if fsdp else gnorm.item()
        loss, hits = common.all_reduce_sum([loss, hits])

        if not math.isfinite(loss + gnorm):
            bad_steps += 1
            print0(f"step {step + 1}: loss {loss}, gradient norm {gnorm}: skipped "
                   f"({files[choices[step]].path})")  # fmt: skip
            if bad_steps > 3:
                raise SystemExit("stopped at the 4th such step; the last checkpoint is good")
        else:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        embedder.zero_grad(set_to_none=True)
        step += 1
        since, tokens_seen = since + batch_size, tokens_seen + n_tokens
        seconds += time.perf_counter() - start

        if dry_run and step == min(2, max_steps):  # the first was slow: allocation, compilation
            spent = time.perf_counter() - start
            n, peak = len(chunks_of(batch[0], chunk_tokens)), common.peak_memory(device) / 1e9
            print0(
                f"dry run: {spent:.2f} s/step, {batch_size / spent:,.1f} queries/s, {n} chunks, "
                f"peak memory {peak:.2f} GB; the whole run takes "
                f"{common.format_time(spent * max_steps)} without evaluation"
            )
            break
        last_step = step == max_steps
        if step % log_interval == 0 or last_step:
            line = {"loss": loss, "acc": hits / batch_size, "gnorm": gnorm, "lr": lr}
            log(step, line | {"pairs_s": since / seconds, "tok_s": tokens_seen / seconds})
            since, tokens_seen, seconds = 0, 0, 0.0
        if eval_file and (step % eval_interval == 0 or last_step):
            found = evaluate(embedder, eval_file, settings)
            log(step, found)
            if found["eval_loss"] < best["loss"]:
                best = {"loss": found["eval_loss"], "folder": f"step{step}"}
                if keep_best and not last_step and step % save_interval:
                    save()
        if step % save_interval == 0 or last_step:
            save()

    # ---- clean-up ----
    batches.close()
    if dist.is_initialized():
        dist.destroy_process_group()
