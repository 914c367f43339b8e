"""
Token-level retrieval: for a query, the tokens of a long passage that matter. Keeping the best ones
compresses the passage 4x to 16x before another model reads it.

    python train_token_retrieval.py configs/token_retrieval_pydocs_tiny.py
    torchrun --standalone --nproc_per_node=8 train_token_retrieval.py \\
        configs/token_retrieval_acerag.py
    python train_token_retrieval.py configs/x.py --resume=True   # go on where it stopped

Lines are {"query", "passage", "spans": [[start, end], ..]}, characters of the raw passage, end
exclusive. Following lines with the same passage are trained together: it is encoded once. Stage 1
is passage retrieval, train_contrastive.py; evals/token_retrieval.py compares with baselines.
TacZip / AceRAG (VectorSpaceLab).
"""

import usage  # noqa: F401  --help ends here, without torch

import math
import time

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import common
import lora
import optim
from common import prefetch, print0
from data import open_pairs
from embedder import Embedder, compare_saved
from formats.huggingface import config_from_hf, resolve_folder
from passages import eval_batches, lines_of_batch, pack_texts, pad_batch, show_lines, train_batches
from spans import find_runs
from token_scores import cosines, names_of, token_metrics, windows_of
from tokenizer import Template, load_tokenizer

# ---- defaults ----
out_dir = "out/token_retrieval"  # like .+
# model
init_from = ""  # a model folder, an out_dir (stage 1's), or a hub id owner/name[@revision]
tokenizer = ""  # a folder or hub id; "": the model's own. Its largest id must fit the model
adapters: tuple[str, ...] = ()  # PEFT folders or hub ids merged into it first, in order
attention: str | None = None  # one of causal, bidirectional; None: the model's own
n_layer: int | None = None  # >= 1; the first n layers of the model (arXiv 2410.14578); None: all
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
max_seq_len: int | None = None  # >= 1; positions the model is trained for; None: its own
rope_scaling: tuple = ()  # ("yarn", 2.5) or ("linear", 2.5): stretches the base's own positions
# LoRA; rank 0 trains every weight
lora_rank = 0  # >= 0
lora_alpha = 32.0  # > 0
lora_dropout = 0.05  # >= 0 and < 1
lora_targets = "all"  # or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# embedding: a query's is its last token's hidden state
prefix = ""  # the template: prefix + instruction + text + suffix, saved with the model
suffix = ""
query_instruction = ""
passage_instruction = ""
query_max_length = 512  # >= 1; tokens
# passages
passage_max_length: int | None = None  # >= 1; tokens in training, the rest is cut; None: all
passage_window = 0  # >= 0; tokens encoded at a time; 0: the whole; see train_step
window_overlap = 0  # >= 0; tokens that neighbouring windows share
# data: JSONL files
data = "data/pydocs/spans_train.jsonl"
eval_data = "data/pydocs/spans_val.jsonl"  # "": none
queries_per_passage = 8  # >= 1; most lines in a row with one passage that are trained together
# loss
temperature = 0.02  # > 0
# batch
batch_size = 64  # >= 1; queries of one step, over all devices and micro-batches
device_batch_tokens = 16384  # >= 1; of one forward on one device; a passage may have more
# length: one of these two is the horizon of the schedule
max_steps: int | None = None  # >= 1
num_epochs: float | None = None  # > 0
stop_step: int | None = None  # >= 1; ends the run before its horizon
# optimizer
learning_rate = 2e-4  # >= 0
min_lr = 0.0  # >= 0
weight_decay = 0.0  # >= 0; of tensors with two dimensions or more
beta1 = 0.9  # >= 0 and < 1
beta2 = 0.999  # >= 0 and < 1
adam_eps = 1e-8  # > 0
grad_clip = 1.0  # >= 0; of the norm of the gradient; 0: none
schedule = "linear"  # one of linear, cosine, constant; after the warmup
warmup_steps: int | None = None  # >= 0; warmup in steps or as a share of the run
warmup_ratio: float | None = None  # >= 0 and <= 1
# evaluation and checkpoints
eval_interval = 200  # >= 0; steps; 0: never
eval_lines = 1000  # >= 0; of eval_data, from its start; 0: all
log_interval = 10  # >= 1
save_interval = 1000  # >= 1; steps; the last step is always saved
keep_last = 1  # >= 0; checkpoints that can be resumed; 0: all
keep_best = False  # True: the one with the lowest eval loss stays too
patience = 0  # >= 0; evaluations without a lower loss that end the run; 0: any number
resume = False
force_resume = False  # with other data, batch, LoRA, .. than the run began with
tracker = ""  # one of "", wandb, tensorboard
# device
dtype = "auto"  # one of auto, bf16, fp32; bf16 by autocast, what trains in fp32; auto: if fast
compile = False  # torch.compile of each block
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, 1/3 slower
fsdp = ""  # one of "", full; full shards weights, gradients and optimizer state
deterministic = False  # bit-equal runs on CUDA too, slower
seed = 1337  # >= 0 and < 1e18
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run
show_batch = False  # print the first passages and queries as a reader wants them

_RATIOS = (16, 8, 4)  # evaluation keeps 1/16, 1/8 and 1/4 of a passage's tokens


# ---- the loss ----


def token_scores(hidden, passage):
    """Cosines [Q, n], fp32, of a passage's queries and tokens, from hidden states [T, C]."""
    queries = hidden[passage.ends]  # [Q, C]
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    return cosines(F.normalize(queries, dim=-1), hidden[passage.tokens])


def token_loss(scores, query, gold, count, temperature):
    """The sum over queries of

        -1/|gold| sum over j in gold of log( exp(s_j / tau) / sum over k of exp(s_k / tau) )

    where k are all tokens of the query's passage; and for how many queries a gold token was first.
    scores [Q, n]; query, gold, count [G]: see Passage. No less than log |gold| a query.
    """
    logits = scores / temperature
    losses = logits.logsumexp(dim=1).sum() - (logits[query, gold] / count).sum()
    return losses, (logits.argmax(dim=1)[query] == gold).sum()


def train_step(wrapped, batch, n_queries, step, s):
    """Gradients of one step's loss, the mean over all ranks' n_queries -> this rank's (sum of
    losses, hits).

    wrapped: the model, as DDP or fully_shard wrapped it. A micro-batch is one forward and one
    backward, but for a passage in several parts: there the softmax still runs over all its tokens,
    by the gradient cache of train_contrastive.py (Gao et al. 2021, arXiv 2101.06983). Memory holds
    the activations of device_batch_tokens tokens, and the last hidden states of the whole passage.
    """
    total = torch.zeros(2, device=s.device)

    def forward(part, number):
        common.seed_step(s.seed, step, s.rank, number)  # both forwards of a part drop the same
        with s.autocast():
            return wrapped(*part)  # [T, C]

    for i, micro_batch in enumerate(batch):
        micro_batch, last = micro_batch.to(s.device), i == len(batch) - 1
        parts, cached = micro_batch.parts, len(micro_batch.parts) > 1
        # 1. the hidden states of all parts, without a graph where they are several
        common.sync_gradients(wrapped, last and not cached)
        with torch.set_grad_enabled(not cached):
            hidden = [forward(part, 1000 * i + k) for k, part in enumerate(parts)]
        hidden = torch.cat(hidden).requires_grad_() if cached else hidden[0]  # [T, C]
        # 2. the loss, and its gradient by the hidden states
        loss = hidden.sum() * 0.0  # of a micro-batch without queries, too
        for p in micro_batch.passages:
            scores = token_scores(hidden, p)  # [Q, n]
            losses, hits = token_loss(scores, p.query, p.gold, p.count, s.temperature)
            loss = loss + losses
            total += torch.stack((losses.detach(), hits))
        # the mean over all ranks' and micro-batches' queries; DDP and FSDP divide by the ranks
        (loss * (s.world_size / max(n_queries, 1))).backward()
        # 3. the hidden states again, a part at a time, and back with their gradient
        if cached:
            gradients = hidden.grad.split([len(tokens) for tokens, _ in parts])
            for k, (part, gradient) in enumerate(zip(parts, gradients)):
                common.sync_gradients(wrapped, last and k == len(parts) - 1)
                forward(part, 1000 * i + k).backward(gradient)
    return total.tolist()


# ---- evaluation ----


@torch.no_grad()
def evaluate(wrapped, file, runs, tokenizer, s):
    """Means over the queries of the runs, whose passages are not cut; each rank takes its share.
    -> {"loss", "acc" (a gold token is first), and all of token_metrics}"""
    names = ["loss", "acc", *names_of(_RATIOS)]
    totals = {name: np.zeros(2) for name in names}  # sum, and of how many: not all have an answer
    wrapped.eval()
    for micro_batch in eval_batches(file, runs, tokenizer, s):
        micro_batch = micro_batch.to(s.device)
        with s.autocast():
            hidden = torch.cat([wrapped(*part) for part in micro_batch.parts])  # [T, C]
        for p in micro_batch.passages:
            for i, scores in enumerate(token_scores(hidden, p).split(1)):  # [1, n]
                gold = p.gold[p.query == i]  # [g]
                count = torch.full_like(gold, len(gold))
                loss, hits = token_loss(scores, gold * 0, gold, count, s.temperature)
                found = {"loss": loss.item(), "acc": hits.item()}
                scores, gold = scores[0].cpu().numpy(), gold.cpu().numpy()
                found |= token_metrics(scores, gold, p.spans, p.records[i], _RATIOS)
                for name, x in found.items():
                    totals[name] += x, 1
    wrapped.train()
    sums = common.all_reduce_sum(np.concatenate(list(totals.values())))
    return {name: x / n for name, x, n in zip(names, sums[::2], sums[1::2]) if n}


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    kind, factor = s.rope_scaling if len(s.rope_scaling) == 2 else (None, None)
    is_factor = type(factor) in (int, float) and factor > 0
    if s.rope_scaling and not (is_factor and kind in ("linear", "yarn")):
        message = "expected ('linear', factor) or ('yarn', factor)"
        raise SystemExit(f"rope_scaling={s.rope_scaling}: {message}")
    s.template = Template(s.prefix, s.suffix)

    # ---- data ----
    file, eval_file = open_pairs(s.data), None
    runs = find_runs(file, s.queries_per_passage)
    optim.set_lengths(s, len(file), s.batch_size)
    print0(
        f"{s.data}: {len(file):,} lines, {len(runs):,} runs with the same passage\na step: "
        f"{s.batch_size} queries over {s.world_size} ranks, about "
        f"{s.batch_size * len(runs) / len(file):,.0f} passages\n{s.stop_step:,} steps = "
        f"{s.stop_step * s.batch_size / len(file):.2f} epochs; warmup {s.warmup:,} steps"
    )
    if s.eval_data and s.eval_interval:
        eval_file = open_pairs(s.eval_data)
        eval_runs = find_runs(eval_file, s.queries_per_passage, s.eval_lines)
        print0(f"{s.eval_data}: {eval_runs[:, 1].sum():,} lines for evaluation")

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)
    model, base, adapters = lora.load_for_training(s, last, s.attention)
    if s.rope_scaling and (s.lora_rank or not last):  # a resumed model says it itself
        scaling = {
            "rope_type": s.rope_scaling[0], "factor": float(s.rope_scaling[1]),
            "original_max_position_embeddings": config_from_hf(model.config.hf).max_seq_len,
        }  # fmt: skip
        for rope in model.config.rope.values():
            rope["scaling"] = scaling
    tokenizer = load_tokenizer(s.tokenizer or resolve_folder(base))
    model.drop_head()
    lora.add_lora(model, s, last)
    common.place(model, s)
    prompts = {"query": s.query_instruction, "document": s.passage_instruction}
    embedder = Embedder(
        model, tokenizer, "last", s.template, prompts, max_length=s.query_max_length,
        dtype=s.compute_dtype, token_scores=True,
    )  # fmt: skip
    s.causal = model.config.causal
    windows_of(0, s.passage_window, s.window_overlap, s.causal)  # complains of impossible windows
    if s.passage_window:
        print0(f"the folder does not say it: score_tokens(.., window={s.passage_window}, "
               f"overlap={s.window_overlap}) gives the scores that are trained")  # fmt: skip
    if problem := embedder.st_problem():
        print0(f"saved for nanoembed alone; sentence-transformers would differ: {problem}")
    print0(f"{model.describe()}\n{s.compute_dtype} on {s.device}")
    if s.show_batch:
        show_lines(lines_of_batch(0, runs, s)[:3], file, tokenizer, s)
        raise SystemExit

    # ---- compile, FSDP/DDP, optimizer, resume ----
    wrapped = common.wrap(model, model.blocks, s)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = optim.make_optimizers(model, s)
    step, best = checkpoint.load_state(last, optimizers)

    def save():
        weights = checkpoint.full_state_dict(model)
        with checkpoint.saving(s, step, best, optimizers) as folder:
            if folder:
                embedder.save_trained(folder, weights, base, adapters, not problem)

    def trial(n):  # forward and backward of n tokens, for DDP's buckets
        tokens, seqs = pack_texts([[0] * n])
        with s.autocast():
            wrapped(tokens.to(s.device), seqs.to(s.device)).sum().backward()
        model.zero_grad(set_to_none=True)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "ex_s", "tok_s", "eval_loss", "eval_acc"]
    columns += [f"eval_{name}" for name in names_of(_RATIOS)]
    log, rates = common.open_log(s, columns, step), common.Rates()
    lost = np.zeros(2)  # queries and spans
    stop_requested = common.catch_stop(s)
    batches = prefetch(train_batches(file, runs, step, tokenizer, s))
    common.settle_buckets(wrapped, trial, 2)

    if eval_file and step == 0 and not s.dry_run:  # what training starts from
        found = evaluate(wrapped, eval_file, eval_runs, tokenizer, s)
        log(step, {f"eval_{name}": x for name, x in found.items()})
    while step < s.stop_step:
        start = time.perf_counter()
        micro_batches, counts = next(batches)
        lr = optim.learning_rate_at(step, s)
        counts = common.all_reduce_sum([stop_requested(), *counts])
        stopping, n_queries, *lost_now, n_tokens = counts
        if stopping:
            save()
            break

        total = train_step(wrapped, pad_batch(micro_batches, s), n_queries, step, s)
        gnorm = optim.clip_gradients(trained, s.grad_clip)
        loss, hits = (x / max(n_queries, 1) for x in common.all_reduce_sum(total))

        if math.isfinite(loss + gnorm):
            optim.update(optimizers, lr)
        else:
            numbers = file.numbers[lines_of_batch(step, runs, s)].tolist()
            message = f"Lines of {s.data}: {common.shown(numbers)}"
            common.bad_step(s, step, loss, gnorm, message)
        model.zero_grad(set_to_none=True)
        step += 1
        lost += lost_now

        if s.dry_run:
            if step < min(2, s.stop_step):  # the first is slow: allocation, compilation
                continue
            common.report_dry_run(s, start, {"ex": n_queries, "tok": n_tokens})
            break
        last_step, improved = step == s.stop_step, False
        rates.add(start, ex_s=n_queries, tok_s=n_tokens)
        if step % s.log_interval == 0 or last_step:
            log(step, {"loss": loss, "acc": hits, "gnorm": gnorm, "lr": lr} | rates.read())
        if eval_file and (step % s.eval_interval == 0 or last_step):
            found = evaluate(wrapped, eval_file, eval_runs, tokenizer, s)
            log(step, {f"eval_{name}": x for name, x in found.items()})
            if improved := found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
            elif checkpoint.is_patience_over(s, step, best):
                s.stop_step, last_step = step, True
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()
    print0(
        f"peak memory {common.peak_memory(s.device) / 1e9:.2f} GB; left out because of "
        f"passage_max_length: {lost[0]:.0f} queries, {lost[1]:.0f} spans"
    )

    # ---- clean-up ----
    if eval_file:
        compare_saved(s, step, model, lambda saved: evaluate(
            saved.model, eval_file, eval_runs, tokenizer, s))  # fmt: skip
    common.finish(s, step, batches)
