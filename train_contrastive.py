"""
Contrastive training of an embedder: queries near their passages, far from all the others.

    python train_contrastive.py configs/contrastive_pydocs_tiny.py  # one device
    torchrun --standalone --nproc_per_node=8 train_contrastive.py \\
        configs/contrastive_llm2vec.py
    python train_contrastive.py configs/x.py --resume=True   # goes on where it stopped

A batch may be much larger than the memory holds: its texts go through the model in chunks, and the
gradient cache (Gao et al. 2021, arXiv 2101.06983) gives the gradient of the whole batch's loss.
LLM2Vec (arXiv 2404.05961), SimCSE (arXiv 2104.08821), NeoBERT (arXiv 2502.19587), Ettin
(arXiv 2507.11412), Anchor-Embedding and FlagEmbedding train their embedders like this.
"""

import usage  # noqa: F401  --help ends here, without torch

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import common
import lora
import optim
from attention import move
from common import prefetch, print0
from data import open_pairs, read_pair
from embedder import Embedder, chunks_of, compare_saved
from formats.huggingface import resolve_folder
from formats.sentence_transformers import read_settings
from grad_cache import embed_all, gather_rows, pad_chunks, padded
from metrics import ranked
from pairs import (
    encode,
    encode_pairs,
    instructions_of,
    layout,
    mask_negatives,
    may_be_negative,
    open_files,
    pairs_of_step,
    prompts_of,
    show_pairs,
)
from pooling import pack
from tokenizer import Template, load_tokenizer

# ---- defaults ----
out_dir = "out/contrastive"  # like .+
# model
init_from = ""  # a model folder, an out_dir, or a hub id owner/name[@revision]
tokenizer = ""  # a folder or hub id; "": the model's own. Its largest id must fit the model
adapters: tuple[str, ...] = ()  # PEFT folders or hub ids merged into it first (LLM2Vec's MNTP)
attention: str | None = None  # one of causal, bidirectional; None: the model's own
n_layer: int | None = None  # >= 1; the first n layers of the model (arXiv 2410.14578); None: all
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
max_seq_len: int | None = None  # >= 1; positions the model is trained for; None: its own
attn_dropout: float | None = None  # >= 0 and < 1; of attention (SimCSE: 0.3); None: the model's own
lora_rank = 0  # >= 0; 0: every weight trains
lora_alpha = 32.0  # > 0
lora_dropout = 0.05  # >= 0 and < 1
lora_targets = "all"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# embedding
pooling = "mean"  # one of mean, weighted_mean, last, cls, splade, tokens; sparse, multi-vector
projection_dim = 128  # >= 0; of multi-vector's token embeddings
prefix = ""  # the template: prefix + instruction + text + suffix, saved with the model
suffix = ""
separator = ""  # what every instruction ends in; one that does not gets it
pool_instruction = True  # False: the pool is the text's own tokens, without the instruction
pool_bos = True  # False: where nothing but a BOS stands before the text, that is left out, too
normalize = True  # embeddings of length 1; False: plain dot products
query_max_length = 512  # >= 1
passage_max_length = 512  # >= 1
# data: JSONL files, see data.py; a batch takes all of its lines from one file
data: tuple[str, ...] = ("data/pydocs/train.jsonl",)
eval_data = "data/pydocs/val.jsonl"  # "": none
# one instruction for all files, or one for each; the "prompt" of a line goes before it
query_instruction: tuple[str, ...] = ("",)
passage_instruction: tuple[str, ...] = ("",)  # symmetric tasks have the same on both sides
ignore_prompts = False  # True: queries have query_instruction alone, whatever their lines say
# JSON {task: instruction} for evaluation, saved with the model beside the data files' own
task_instructions = ""
sampling_alpha = 1.0  # >= 0; a file is drawn with probability ~ (its lines) ** alpha
group_size = 2  # >= 1; passages a query: a positive, and its negatives as far as there are any
consecutive = 1  # >= 1; neighbours in the file that a batch takes together: hard if by topic
# of a {"text"} line: two runs of this share of its words, drawn anywhere, are the pair
# (arXiv 2508.03453); 0: the text twice, which only dropout tells apart (SimCSE)
crop = 0.0  # >= 0 and <= 1
no_duplicates = False  # a pair whose text the batch has already gives way to a random one
# loss
contrast_weight = 1.0  # >= 0; of InfoNCE; 0: distillation alone
temperature = 0.05  # > 0; scores are divided by it; sentence-transformers' scale is 1 / temperature
both_directions = False  # passages choose among queries, too
false_negative_margin: float | None = None  # drop passages above the positive's score + margin
distill_weight = 0.0  # >= 0; of KL to the teacher's pos_scores, neg_scores, over each query's group
distill_temperature = 1.0  # > 0; of the teacher
matryoshka_dims: tuple[int, ...] = ()  # >= 1; the mean of the losses at these widths
query_flops = 5e-5  # >= 0; splade: weight of the FLOPS regulariser, which makes embeddings sparse
passage_flops = 3e-5  # >= 0
flops_warmup_ratio = 1 / 3  # >= 0 and <= 1; of the run: both grow with the square of the step
negatives_cross_device = True  # candidates of all ranks
# batch
batch_size = 64  # >= 2; queries of one step, over all ranks; each with up to group_size passages
device_batch_tokens = 16384  # >= 1; of one forward on one device, a chunk; the loss is the same
# length: set max_steps or num_epochs, the horizon of the schedule
max_steps: int | None = None  # >= 1
num_epochs: float | None = None  # > 0
stop_step: int | None = None  # >= 1; ends the run before its horizon
# optimizer
learning_rate = 2e-5  # >= 0
min_lr = 0.0  # >= 0
weight_decay = 0.01  # >= 0
beta1 = 0.9  # >= 0 and < 1
beta2 = 0.999  # >= 0 and < 1
adam_eps = 1e-8  # > 0
grad_clip = 1.0  # >= 0
schedule = "linear"  # one of linear, cosine, constant; after the warmup
warmup_steps: int | None = None  # >= 0; in steps or as a share of the run
warmup_ratio: float | None = None  # >= 0 and <= 1
# evaluation and checkpoints
eval_interval = 200  # >= 0; steps; 0: never
eval_lines = 1000  # >= 0; of eval_data, from its start; 0: all
log_interval = 10  # >= 1
save_interval = 1000  # >= 1; steps; the last step is always saved
keep_last = 1  # >= 0
keep_best = False
patience = 0  # >= 0; evaluations without a lower loss that end the run; 0: any number
resume = False
force_resume = False  # with other data, batch, LoRA, .. than the run began with
tracker = ""  # one of "", wandb, tensorboard
# device
dtype = "auto"  # one of auto, bf16, fp32; bf16 by autocast, what trains in fp32; auto: if fast
compile = False
gradient_checkpointing = False
fsdp = ""  # one of "", full; full shards weights, gradients and optimizer state
deterministic = False
seed = 1337  # >= 0 and < 1e18
# look, and do not train
dry_run = False
show_batch = False


# ---- the batch ----
# `s` holds the settings: the keys above, and what common.start adds (rank, world_size, device, ..).
# Every rank reads the texts of the whole batch, so that each knows which candidate belongs to whom;
# it tokenizes and embeds its own share, a range of the queries and the passages of these.


@dataclass
class Batch:
    """A step's B queries and N passages. Both are numbered through the whole batch."""

    # (ids, (start, end)) of each text, its pooled range: this rank's queries, then its passages
    encoded: list[tuple]
    chunks: list[list[int]]  # indices into encoded: texts that go through the model together
    n_queries: int  # of each rank
    n_passages: list[int]  # of the ranks
    group: torch.Tensor  # [B, G] the passages of each query, its positive first, -1 for none
    teacher: torch.Tensor  # [B, G] their scores, nan where the line has none
    known: torch.Tensor  # [K, 2] (query, passage): known as right, so no negative of the query


def make_batch(pairs, which, tokenizer, s):
    """-> this rank's Batch. All pairs come from one file, number `which` of s.data."""
    shares = np.arange(len(pairs)).reshape(s.world_size, -1)  # [W, B / W]
    n_passages = [sum(len(pairs[i]["passages"]) for i in share) for share in shares]
    encoded = encode_pairs([pairs[i] for i in shares[s.rank]], which, tokenizer, s)
    chunks = chunks_of(encoded, s.device_batch_tokens)
    return Batch(encoded, chunks, shares.shape[1], n_passages, *layout(pairs))


def train_batches(files, first_step, choices, tokenizer, s):
    """The Batch of each step, whose lines come from files[choices[step]]."""
    steps = range(first_step, s.stop_step)
    return (make_batch(*pairs_of_step(files, i, choices, s), tokenizer, s) for i in steps)


# ---- the loss ----
# queries [b, C] or [b, L, C], passages [N, C] or [N, L, C] (multi-vector: zero rows are padding);
# all in fp32, summed over the b queries.


def contrast(scores, positive, s):
    """The loss of each query (or passage) against its candidates: to try another, write it here.
    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4):

        sum over b of -log( exp(x_b+ / tau) / sum over n of exp(x_bn / tau) )

    scores [b, N], -inf for what may not be a negative; positive [b]: the index of the right one.
    """
    return F.cross_entropy(scores / s.temperature, positive, reduction="sum")


def similarity(queries, passages):
    """Dot products [b, N]; of multi-vectors MaxSim, sum over i of max over j of q_i . d_j (Khattab
    and Zaharia 2020, arXiv 2004.12832, equation 3)."""
    if queries.dim() == 2:
        return queries @ passages.t()
    dots = torch.einsum("bic,njc->bnij", queries, passages)
    is_token = passages.any(-1)  # [N, L]
    padding = ~is_token & is_token.any(-1, keepdim=True)  # a text without any token scores 0
    dots = dots.masked_fill(padding[None, :, None, :], -torch.inf)
    return (dots.amax(-1) * queries.any(-1)[:, None, :]).sum(-1)


def distillation(scores, group, teacher, s):
    """sum over b of KL(teacher || student) over the query's own group; 0 for lines without scores.

    scores [b, N], group [b, G] with -1 for none, teacher [b, G] with nan for none.
    """
    # A line without scores keeps its positive alone: both distributions are 1 there, so its KL is
    # 0. The masks are -1e9, for -inf would give nan in teacher - student.
    is_scored = ~teacher.isnan() | (group == group[:, :1])
    student = scores.gather(1, group.clamp(min=0)) / s.temperature  # [b, G]
    student = student.masked_fill(~is_scored, -1e9).log_softmax(1)
    teacher = teacher.nan_to_num() / s.distill_temperature
    teacher = teacher.masked_fill(~is_scored, -1e9).log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum()


def flops(x):
    """FLOPS regulariser: sum over v of (mean over texts of |x_v|)^2 (Paria et al. 2020,
    arXiv 2004.05665, equation 4). x [n, V]."""
    return x.abs().mean(0).square().sum()


def block_loss(queries, passages, rows, batch, s):
    """The loss of the queries `rows` [b], consecutive ones, among all passages -> (loss, how often
    the positive had the best score). With matryoshka_dims it is the mean over these widths."""
    ranges = slice(None), slice(None)  # of queries and passages that are candidates
    if not s.negatives_cross_device:
        first = sum(batch.n_passages[: s.rank])
        ranges = (slice(s.rank * batch.n_queries, (s.rank + 1) * batch.n_queries),
                  slice(first, first + batch.n_passages[s.rank]))  # fmt: skip
    positive = batch.group[rows, 0]  # [b] ascending
    allowed = may_be_negative(batch.known, rows, ranges[1], len(passages))  # [b, N]
    loss, widths = 0.0, s.matryoshka_dims or (queries.size(-1),)
    for width in widths:
        q, d = queries[..., :width], passages[..., :width]
        if s.matryoshka_dims and s.normalize:
            q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
        scores = similarity(q[rows], d)  # [b, N]
        masked = mask_negatives(scores, positive, allowed, s.false_negative_margin)
        part = contrast(masked, positive, s)
        if s.both_directions:  # known pairs are masked here, too; the margin does not act
            back = may_be_negative(batch.known.flip(1), positive, ranges[0], len(queries))
            back = mask_negatives(similarity(d[positive], q), rows, back, None)  # [b, B]
            part = (part + contrast(back, rows, s)) / 2
        part = s.contrast_weight * part
        if s.distill_weight:
            kl = distillation(scores, batch.group[rows], batch.teacher[rows], s)
            part = part + s.distill_weight * kl
        loss = loss + part / len(widths)
        if width == max(widths):
            hits = (masked.argmax(1) == positive).sum()
    return loss, hits


def flops_share(step, s):
    """Which part of query_flops and passage_flops acts in this step: (step / ramp)^2, then 1, for
    embeddings that are made sparse too early stay empty (Formal et al. 2021, arXiv 2107.05720)."""
    ramp = s.flops_warmup_ratio * s.max_steps
    return 1.0 if step >= ramp else (step / ramp) ** 2


def loss_and_grad(vectors, batch, step, s):
    """The loss of this rank's queries among the passages of all ranks -> (loss, hits, d_vectors).

    d_vectors: world_size times the gradient of the batch's loss by this rank's vectors [n, C] or
    [n, L, C]; DDP and FSDP, which average over ranks, take the factor away. The batch's loss is the
    mean over its B queries, the sum of what the ranks return. Scores exist for a block of queries
    at a time.
    """
    vectors, n = vectors.detach().requires_grad_(), batch.n_queries
    queries, passages = vectors[:n], vectors[n : n + batch.n_passages[s.rank]]
    if vectors.dim() == 3:  # all are padded to the longest text: here to the longest query
        queries = queries[:, : max(end - start for _, (start, end) in batch.encoded[:n])]
    gathered = gather_rows(queries, [n] * s.world_size), gather_rows(passages, batch.n_passages)
    queries, passages = (x.detach().requires_grad_() for x in gathered)  # [B, ...], [N, ...]
    n_dots = 1 if vectors.dim() == 2 else queries.size(1) * passages.size(1)  # of a pair of texts
    limit = 2 ** (20 if vectors.device.type == "cpu" else 27)  # dot products that exist at a time
    rows = torch.arange(s.rank * n, (s.rank + 1) * n, device=vectors.device)
    total, hits = 0.0, 0
    for block in rows.split(max(1, limit // (len(passages) * max(1, n_dots)))):
        loss, block_hits = block_loss(queries, passages, block, batch, s)
        loss = loss / len(queries)
        loss.backward()
        total, hits = total + loss.item(), hits + int(block_hits)
    if s.pooling == "splade":
        penalty = s.query_flops * flops(queries) + s.passage_flops * flops(passages)
        # each rank computes all of it, and ranks are summed
        penalty = flops_share(step, s) * penalty / s.world_size
        penalty.backward()
        total += penalty.item()
    # a rank's vectors occur in the losses of all ranks: this sums their gradients
    torch.autograd.backward(gathered, (queries.grad, passages.grad))
    return total, hits, s.world_size * vectors.grad


# ---- the gradient cache ----


def cached_step(wrapped, batch, step, s):
    """Loss and gradients of one batch -> (this rank's share of the loss, its hits).

    First all chunks are embedded without a graph, which gives the loss and its gradient by their
    vectors; then each is embedded again and takes its part of that gradient into the weights. So
    memory holds the activations of one chunk. The result does not depend on how texts are split
    into chunks, except for dropout, which is seeded per chunk. wrapped: see common.wrap.
    """

    def embed(i):  # chunk i -> [n, C] or [n, L, C]
        common.seed_step(s.seed, step, s.rank, i)  # the same dropout whenever chunk i is embedded
        with s.autocast():
            return padded(wrapped(*pack([batch.encoded[j] for j in batch.chunks[i]], s.device)))

    batch = move(batch, s.device)
    single = len(batch.chunks) == 1  # it fits in memory: its graph is kept, one pass is enough
    with torch.set_grad_enabled(single):
        vectors = embed_all(embed, batch.chunks)
    loss, hits, d_vectors = loss_and_grad(vectors, batch, step, s)
    if single:
        vectors.backward(d_vectors)
        return loss, hits
    for i, chunk in enumerate(batch.chunks):
        common.sync_gradients(wrapped, i == len(batch.chunks) - 1)
        vectors = embed(i)
        vectors.backward(d_vectors[chunk][:, : vectors.size(1)])  # as long as the chunk's texts
    return loss, hits


# ---- evaluation ----


def evaluate(embedder, pairs, s):
    """Each query among all passages of the pairs, every rank its share of the texts -> {"loss",
    "acc" (accuracy@1), "mrr" (@10), "ndcg" (@10)}."""
    passages = list(dict.fromkeys(text for p in pairs for text in p["pos"] + p["neg"]))
    number = {text: i for i, text in enumerate(passages)}
    prompts = prompts_of(pairs, s.query_instruction[0], s)

    def embed(texts, prompts, max_length):
        shares = np.array_split(np.arange(len(texts)), s.world_size)
        share = shares[s.rank] if len(shares[s.rank]) else [0]  # if empty, embed text 0 and drop it
        texts, prompts = ([x[i] for i in share] for x in (texts, prompts))
        encoded = encode(texts, prompts, max_length, embedder.tokenizer, s)
        chunks = chunks_of(encoded, s.device_batch_tokens)
        if s.fsdp:  # every rank must call the model equally often
            pad_chunks(encoded, chunks)
        parts = [[encoded[i] for i in chunk] for chunk in chunks]
        vectors = embed_all(lambda i: padded(embedder.embed(parts[i])), chunks)
        return gather_rows(vectors[: len(shares[s.rank])], [len(share) for share in shares])

    with embedder.evaluating():
        queries = embed([p["query"] for p in pairs], prompts, s.query_max_length)
        instructions = [s.passage_instruction[0]] * len(passages)
        vectors = embed(passages, instructions, s.passage_max_length)  # [N, C] or [N, L, C]
    sums = dict.fromkeys(("loss", "acc", "mrr", "ndcg"), 0.0)
    for b, pair in enumerate(pairs):
        parts = vectors.split(max(1, 2**20 // queries[0].numel()))  # multi-vectors need memory
        scores = torch.cat([similarity(queries[b : b + 1], part) for part in parts], 1)  # [1, N]
        right = [number[text] for text in dict.fromkeys(pair["pos"])]
        top = scores[0].topk(min(10, len(passages))).indices.tolist()
        positive = torch.tensor(right[:1], device=scores.device)
        scores[0, right[1:]] = -torch.inf  # no negatives
        sums["loss"] += contrast(scores, positive, s).item()
        for name, value in ranked(top, right).items():
            sums[name] += value
    return {name: value / len(pairs) for name, value in sums.items()}


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    if s.pooling == "tokens" and s.projection_dim and (s.lora_rank or s.fsdp):
        raise SystemExit("the projection of pooling='tokens' trains without LoRA and without FSDP")
    s.template = Template(s.prefix, s.suffix, s.separator)

    # ---- data ----
    files, choices = open_files(s)
    eval_file = open_pairs(s.eval_data) if s.eval_data and s.eval_interval else []
    eval_pairs = [read_pair(eval_file, i) for i in range(len(eval_file))[: s.eval_lines or None]]
    n_queries = s.batch_size // s.world_size  # of a rank
    n_candidates = (s.batch_size if s.negatives_cross_device else n_queries) * s.group_size
    print0(f"a step: {n_queries} queries x {s.world_size} ranks, each among up to N = "
           f"{n_candidates:,} candidates;\nevaluation on {len(eval_pairs):,} lines")  # fmt: skip

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)  # what to resume, or None
    model, base, adapters = lora.load_for_training(s, last, s.attention)
    tokenizer = load_tokenizer(s.tokenizer or resolve_folder(base))
    if s.pooling != "splade":
        model.drop_head()
    lora.add_lora(model, s, last)
    common.place(model, s)
    projection = None
    if s.pooling == "tokens" and s.projection_dim:
        fresh = torch.nn.Linear(model.config.n_embd, s.projection_dim, bias=False)
        projection = read_settings(last or resolve_folder(base)).get("projection", fresh)
        if (dim := projection.out_features) != s.projection_dim:
            raise SystemExit(f"projection_dim={s.projection_dim}: {base} projects to {dim}")
    prompts = {"query": s.query_instruction[0], "document": s.passage_instruction[0]}
    instructions = instructions_of(files, s)
    embedder = Embedder(
        model, tokenizer, s.pooling, s.template, prompts, s.normalize, s.passage_max_length,
        s.pool_instruction, projection, s.compute_dtype, s.pool_bos, instructions=instructions,
    ).to(s.device).train()  # fmt: skip
    if max(s.matryoshka_dims, default=0) > (dim := embedder.dim):
        raise SystemExit(f"matryoshka_dims={s.matryoshka_dims}: embeddings have {dim} numbers")
    if s.query_max_length != s.passage_max_length:
        print0(f"queries are cut at {s.query_max_length} tokens in training, later like passages")
    if len({*instructions.values(), prompts["query"]} - {""}) > 1:
        print0(f"several instructions: {prompts} is saved, encode takes any other")
    if problem := embedder.st_problem():
        print0(f"saved for nanoembed alone; sentence-transformers would differ: {problem}")
    print0(f"{model.describe()}\n{s.pooling} pooling, {s.compute_dtype} on {s.device}")
    if s.show_batch:
        show_pairs(*pairs_of_step(files, 0, choices, s), tokenizer, s)
        raise SystemExit

    # ---- compile, FSDP/DDP, optimizer, resume ----
    wrapped = common.wrap(embedder, model.blocks, s)
    trained = [p for p in embedder.parameters() if p.requires_grad]
    optimizers = optim.make_optimizers(embedder, s)
    step, best = checkpoint.load_state(last, optimizers)

    def save():
        weights = checkpoint.full_state_dict(embedder, "model.")
        with checkpoint.saving(s, step, best, optimizers) as folder:
            if folder:
                embedder.save_trained(folder, weights, base, adapters, not problem)

    def trial(n):  # a step of n texts that counts for nothing: see settle_buckets
        with s.autocast():
            padded(wrapped(*pack([([0, 0], (0, 2))] * n, s.device))).sum().backward()
        wrapped.zero_grad(set_to_none=True)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "ex_s", "tok_s"]
    columns += ["eval_loss", "eval_acc", "eval_mrr", "eval_ndcg"]
    log, rates = common.open_log(s, columns, step), common.Rates()
    stop_requested = common.catch_stop(s)
    batches = prefetch(train_batches(files, step, choices, tokenizer, s))
    common.settle_buckets(wrapped, trial, 1)

    if eval_pairs and step == 0 and not s.dry_run:  # what training starts from
        found = evaluate(embedder, eval_pairs, s)
        log(step, {f"eval_{name}": x for name, x in found.items()})
    while step < s.stop_step:
        start = time.perf_counter()
        batch = next(batches)
        lr = optim.learning_rate_at(step, s)
        n_tokens = sum(len(ids) for ids, _ in batch.encoded)
        stopping, n_tokens = common.all_reduce_sum([stop_requested(), n_tokens])
        if stopping:
            save()
            break

        if s.fsdp:
            pad_chunks(batch.encoded, batch.chunks)  # dummy texts behind those of the loss
        loss, hits = common.all_reduce_sum(cached_step(wrapped, batch, step, s))
        gnorm = optim.clip_gradients(trained, s.grad_clip)

        if math.isfinite(loss + gnorm):
            optim.update(optimizers, lr)
        else:
            common.bad_step(s, step, loss, gnorm, f"Lines of {files[choices[step]].path}")
        embedder.zero_grad(set_to_none=True)
        step += 1

        if s.dry_run:
            if step < min(2, s.stop_step):  # the first is slow: allocation, compilation
                continue
            print0(f"{len(batch.chunks)} chunks of up to {s.device_batch_tokens:,} tokens")
            common.report_dry_run(s, start, {"ex": s.batch_size, "tok": n_tokens})
            break
        last_step, improved = step == s.stop_step, False
        rates.add(start, ex_s=s.batch_size, tok_s=n_tokens)
        if step % s.log_interval == 0 or last_step:
            line = {"loss": loss, "acc": hits / s.batch_size, "gnorm": gnorm, "lr": lr}
            log(step, line | rates.read())
        if eval_pairs and (step % s.eval_interval == 0 or last_step):
            found = evaluate(embedder, eval_pairs, s)
            log(step, {f"eval_{name}": x for name, x in found.items()})
            if improved := found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
            elif checkpoint.is_patience_over(s, step, best):
                s.stop_step, last_step = step, True
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()

    # ---- clean-up ----
    if eval_pairs:
        compare_saved(s, step, embedder, lambda saved: evaluate(saved, eval_pairs, s))
    common.finish(s, step, batches)
