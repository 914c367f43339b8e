"""
Anchor-Embedding, stage I: a causal model writes each side of a pair from the other's embedding.

    python train_reconstruct.py configs/reconstruct_pydocs_tiny.py  # one device
    torchrun --standalone --nproc_per_node=8 train_reconstruct.py \\
        configs/reconstruct_anchor.py
    python train_reconstruct.py configs/x.py --resume=True   # go on where it stopped
    python train_contrastive.py configs/contrastive_anchor.py  # stage II

One packed forward encodes queries and documents: the embedding is the hidden state of the last
token. A second one decodes: a text's row is [the other side's embedding ; its tokens], and the
gradient of the tokens flows through that embedding, the anchor, into the encoder. "Training LLMs to
be Better Text Embedders through Bidirectional Reconstruction" (EMNLP 2025).

A pair's loss does not depend on other pairs, as a contrastive one does, so batches larger than the
memory are accumulated, and that is exact: sums over micro-batches and ranks, divided once by the
targets of the whole step. (The original takes the mean over the tokens of each device's
micro-batch, then the mean of these: there a token counts more beside short texts.)
"""

import usage  # noqa: F401  --help ends here, without torch

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import checkpoint
import common
import lora
import optim
from attention import Seqs, move
from common import prefetch, print0
from data import open_pairs, read_pair
from embedder import Embedder, compare_saved
from formats.huggingface import resolve_folder
from pairs import encode_pairs, open_files, pairs_of_step
from pooling import pack
from tokenizer import Template, load_tokenizer

# ---- defaults ----
out_dir = "out/reconstruct"  # like .+
# model
init_from = ""  # a causal model: a folder, an out_dir, or a hub id owner/name[@revision]
tokenizer = ""  # a folder or hub id; "": the model's own. Its largest id must fit the model
n_layer: int | None = None  # >= 1; the first n layers of the model (arXiv 2410.14578); None: all
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
max_seq_len: int | None = None  # >= 1; positions the model is trained for; None: its own
lora_rank = 0  # >= 0; 0: every weight trains
lora_alpha = 32.0  # > 0
lora_dropout = 0.05  # >= 0 and < 1
lora_targets = "all"
train_also = ""  # trained whole beside LoRA: any of "embed,norm,head"
# texts
prefix = ""  # the template: prefix + instruction + text + suffix, saved with the model
suffix = ""  # with the EOS where the tokenizer adds none: its hidden state is the embedding
query_max_length = 512  # >= 1
passage_max_length = 512  # >= 1
write_template = False  # prefix, instruction and BOS are targets too; they are always context
# data: JSONL files of pairs, see data.py; negatives are not used; one file a batch
data: tuple[str, ...] = ("data/pydocs/train.jsonl",)
eval_data = "data/pydocs/val.jsonl"  # "": none
# one for all files, or one for each; a line's "prompt" goes first
query_instruction: tuple[str, ...] = ("",)
passage_instruction: tuple[str, ...] = ("",)
sampling_alpha = 1.0  # >= 0; a file is drawn with probability ~ (its lines) ** alpha
# loss
w_d2q = 0.8  # >= 0; weight of queries written from their documents' embeddings (EBD2Q)
w_q2d = 0.2  # >= 0; of documents from their queries' (EBQ2D)
# batch, in pairs
batch_size = 64  # >= 1; of one step, over all ranks and micro-batches
device_batch_size = 16  # >= 1; of one forward on one device; decides what dropout draws, no more
# length: one of the first two is the horizon of the schedule
max_steps: int | None = None  # >= 1
num_epochs: float | None = None  # > 0
stop_step: int | None = None  # >= 1; ends the run before its horizon
# optimizer
learning_rate = 4e-5  # >= 0
min_lr = 0.0  # >= 0
weight_decay = 0.0  # >= 0
beta1 = 0.9  # >= 0 and < 1
beta2 = 0.999  # >= 0 and < 1
adam_eps = 1e-8  # > 0
grad_clip = 1.0  # >= 0; largest norm of the gradient
schedule = "linear"  # one of linear, cosine, constant; after the warmup
warmup_steps: int | None = None  # >= 0; in steps or as a share of the run
warmup_ratio: float | None = None  # >= 0 and <= 1
# evaluation and checkpoints
eval_interval = 200  # >= 0; steps between evaluations; 0: none
eval_lines = 1000  # >= 0; of eval_data, from its start; 0: all
log_interval = 10  # >= 1
save_interval = 1000  # >= 1; steps; the last step is always saved
keep_last = 1  # >= 0
keep_best = False  # True: the one with the lowest eval loss stays, too
patience = 0  # >= 0; evaluations without a lower loss that end the run; 0: any number
resume = False
force_resume = False  # with other data, batch, LoRA, .. than the run began with
tracker = ""  # one of "", wandb, tensorboard
# device
dtype = "auto"  # one of auto, bf16, fp32; bf16 by autocast, what trains in fp32; auto: if fast
compile = False
gradient_checkpointing = False  # less memory, a third slower
fsdp = ""  # one of "", full; full shards weights, gradients and optimizer state
deterministic = False
seed = 1337  # >= 0 and < 1e18
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run
show_batch = False


# ---- the batch ----
# Texts of n pairs are numbered queries first, 0 .. n-1, then documents, n .. 2n-1.


@dataclass
class Batch:
    """m pairs to encode, T tokens, and the first n of them to decode, U tokens in A = 2n rows."""

    tokens: torch.Tensor  # [T]
    seqs: Seqs
    last: torch.Tensor  # [2m] the last token of each text
    out_tokens: torch.Tensor  # [U]: each text behind one more token, whose place the anchor takes
    out_seqs: Seqs
    at: torch.Tensor  # [A] where the anchors stand
    right: torch.Tensor  # [A] the text whose embedding each of them is: the other side
    shuffled: torch.Tensor  # [A] that of the next pair, wrong, to see what the right one tells
    rows: torch.Tensor  # [L] which rows of [U] predict: those of d2q, then those of q2d
    targets: torch.Tensor  # [L] the tokens behind them
    n_targets: list[int]  # how many of them are d2q's, and q2d's

    def to(self, device):
        return move(self, device)


def encode(pairs, which, tokenizer, s):
    """-> 2n items (ids, (start, end)): the tokens of each text, as the embedder makes them, and
    which of them are targets: from the text's first one to the EOS, or with write_template all. A
    text that was cut has the EOS behind the cut, as its embedding has."""
    encoded = encode_pairs(pairs, which, tokenizer, s)
    if s.write_template:
        return encoded
    bos = tokenizer.backend_tokenizer.encode("a").special_tokens_mask.index(0)  # how many it adds
    return [(ids, (max(start, bos), end)) for ids, (start, end) in encoded]


def pack_pairs(encoded, n):
    """What `encode` returned for m >= n pairs -> Batch, on the CPU.

    Texts lie in the order of their lengths, which is fast: attention text by text takes equal
    lengths in one call.
    """
    m = len(encoded) // 2
    order = sorted(range(2 * m), key=lambda i: len(encoded[i][0]))
    place = torch.tensor(order).argsort()  # [2m] of each text in that order
    tokens, seqs, texts = pack([encoded[i] for i in order], "cpu")
    decoded = [i for i in order if i % m < n]
    behind = [([0, *encoded[i][0]], encoded[i][1]) for i in decoded]
    out_tokens, out_seqs, out = pack(behind, "cpu")  # the row before a target predicts it

    decoded = torch.tensor(decoded)  # [A]
    right = (decoded + m) % (2 * m)
    shuffled = right // m * m + (right + 1) % m
    is_q2d = (decoded >= m)[out.text[out.rows]]  # [L]
    rows = torch.cat((out.rows[~is_q2d], out.rows[is_q2d]))
    n_q2d = int(is_q2d.sum())
    return Batch(
        tokens, seqs, texts.last, out_tokens, out_seqs, out_seqs.cu_seqlens[:-1].long(),
        place[right], place[shuffled], rows, out_tokens[rows + 1], [len(rows) - n_q2d, n_q2d],
    )  # fmt: skip


def train_batches(files, first_step, choices, tokenizer, s):
    """For each step the list of this rank's micro-batches: every world_size-th pair of the step."""
    for step in range(first_step, s.stop_step):
        pairs, which = pairs_of_step(files, step, choices, s)
        pairs, n = pairs[s.rank :: s.world_size], s.device_batch_size
        parts = [pairs[i : i + n] for i in range(0, len(pairs), n)]
        yield [pack_pairs(encode(part, which, tokenizer, s), n) for part in parts]


# ---- loss ----


class Reconstruction(nn.Module):
    """The model, called twice. A module so that all that has parameters runs in one forward call:
    DDP and FSDP see one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, anchors=("right",)):
        """-> losses [K, 2]: for each of the K kinds of anchors the sums over the targets of d2q and
        of q2d.

            r_x = h(x)_last                                          the final norm's output
            d2q = sum over pairs (q, d), over t of -log p(q_t | r_d, q_<t)
            q2d = sum over pairs (q, d), over t of -log p(d_t | r_q, d_<t)

        anchors: "right"; "shuffled", those of the next pair; "none", zeros: the decoder has a
        position that says nothing (which training did not show it).
        """
        b, losses = batch, []
        r = self.model(b.tokens, b.seqs)[b.last]  # [2m, C]
        for kind in anchors:
            vectors = torch.zeros_like(r[b.right]) if kind == "none" else r[getattr(b, kind)]
            # both directions in one packed row; a text sees its own anchor and nothing of others
            x = self.model(b.out_tokens, b.out_seqs, vectors=vectors, at=b.at)  # [U, C]
            x, targets = x[b.rows].split(b.n_targets), b.targets.split(b.n_targets)
            sums = [self.model.cross_entropy(*both)[0] for both in zip(x, targets)]
            losses.append(torch.stack(sums))
        return torch.stack(losses)


def perplexity(loss):
    return math.exp(min(loss, 100))


# ---- evaluation ----


@torch.no_grad()
def evaluate(wrapped, file, tokenizer, s):
    """Losses a token over the file's first eval_lines lines, each rank its share, with the right
    anchors, those of the next line, and none -> {"loss", "d2q_loss", "d2q_shuffled_loss", ..}. What
    the right ones save is what the embedding tells."""
    n_lines, n = min(s.eval_lines or len(file), len(file)), s.device_batch_size
    starts, total, n_targets = range(0, n_lines, n), np.zeros((3, 2)), np.zeros(2)
    wrapped.eval()
    # under FSDP a forward needs all ranks: each has as many, some of which do not count
    for i in range(s.rank, -(-len(starts) // s.world_size) * s.world_size, s.world_size):
        start = starts[i % len(starts)]
        size = min(n, n_lines - start)
        lines = [read_pair(file, j % n_lines) for j in range(start, start + size + 1)]  # one more
        pairs = [line | {"passages": line["pos"][:1]} for line in lines]
        batch = pack_pairs(encode(pairs, 0, tokenizer, s), size)
        with s.autocast():
            losses = wrapped(batch.to(s.device), ("right", "shuffled", "none"))  # [3, 2]
        if i < len(starts):
            total += losses.cpu().numpy()
            n_targets += batch.n_targets
    wrapped.train()
    *sums, n_d2q, n_q2d = common.all_reduce_sum([*total.flatten(), *n_targets])
    means = np.reshape(sums, (3, 2)) / np.maximum((n_d2q, n_q2d), 1)  # [3 kinds, 2 directions]
    d2q, q2d = means.T.tolist()
    found = {"loss": s.w_d2q * d2q[0] + s.w_q2d * q2d[0]}
    for name, (right, shuffled, none) in {"d2q": d2q, "q2d": q2d}.items():
        found |= {f"{name}_loss": right, f"{name}_ppl": perplexity(right)}
        found |= {f"{name}_shuffled_loss": shuffled, f"{name}_none_loss": none}
    return found


def show_rows(encoded, tokenizer):
    """Prints the rows that are decoded, as a reader wants them: whose embedding stands in front,
    and the targets inverted."""
    n = len(encoded) // 2
    for i, (ids, (start, end)) in enumerate(encoded):
        before, targets = (tokenizer.decode(part) for part in (ids[:start], ids[start:end]))
        side, other = ("query", "document") if i < n else ("document", "query")
        print(f"--- {side} {i % n}: {len(ids)} tokens behind 1 anchor, {end - start} targets")
        print(f"<{other} {i % n}>{before}\033[7m{targets}\033[0m")


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    s.template = Template(s.prefix, s.suffix)
    # as pairs.py has it: a positive for each query, no negatives; and what is written of a text
    s.group_size, s.consecutive, s.no_duplicates, s.crop = 1, 1, False, 0.0
    s.pool_instruction, s.pool_bos, s.ignore_prompts = s.write_template, True, False

    # ---- data ----
    files, choices = open_files(s)
    n_micro = common.count_micro_batches(s, "size")
    print0(f"a step: {s.device_batch_size} pairs x {n_micro} micro-batches x {s.world_size} ranks")
    eval_file = open_pairs(s.eval_data) if s.eval_data and s.eval_interval else None
    if eval_file and min(len(eval_file), s.eval_lines or len(eval_file)) < 2:
        raise SystemExit(f"{s.eval_data}, eval_lines={s.eval_lines}: shuffled anchors need two "
                         "lines or more")  # fmt: skip

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)
    model, base, adapters = lora.load_for_training(s, last, "causal")
    tokenizer, c = load_tokenizer(s.tokenizer or resolve_folder(base)), model.config
    if c.hf.get("model_type") in ("modernbert", "neobert"):  # what it was before it was read
        raise SystemExit(f"{base} is an encoder: expected a causal model, which can write")
    if c.head == "none":
        raise SystemExit(f"{base} has no language modelling head, so it writes nothing")
    if max(s.query_max_length, s.passage_max_length) >= c.max_seq_len:
        raise SystemExit(
            f"query_max_length={s.query_max_length}, passage_max_length={s.passage_max_length}: "
            f"the anchor takes one more of the model's {c.max_seq_len} positions"
        )
    lora.add_lora(model, s, last)
    common.place(model, s)
    # what the saved folder is for: stage II, sample.py --reconstruct, eval_mteb.py
    prompts = {"query": s.query_instruction[0], "document": s.passage_instruction[0]}
    embedder = Embedder(
        model, tokenizer, "last", s.template, prompts, True, s.passage_max_length,
        dtype=s.compute_dtype,
    )  # fmt: skip
    end = embedder.tokenize(["a"])[0][0][-1]
    added = tokenizer.added_tokens_decoder
    if end not in added or not added[end].special:
        raise SystemExit(
            f"suffix={s.suffix!r}: texts would end in {tokenizer.decode([end])!r}, with no EOS to "
            f"learn; give it one, such as {tokenizer.eos_token!r}"
        )
    print0(f"{model.describe()}\n{s.compute_dtype} on {s.device}")
    if s.show_batch:
        pairs, which = pairs_of_step(files, 0, choices, s)
        show_rows(encode(pairs[:4], which, tokenizer, s), tokenizer)
        raise SystemExit

    # ---- compile, FSDP/DDP, optimizer, resume ----
    module = Reconstruction(model).train()
    wrapped = common.wrap(module, model.blocks, s)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizers = optim.make_optimizers(module, s)
    step, best = checkpoint.load_state(last, optimizers)

    def save():
        weights = checkpoint.full_state_dict(module, "model.")
        with checkpoint.saving(s, step, best, optimizers) as folder:
            if folder:  # the tokenizer as it was: stage II adds the suffix itself
                embedder.save_trained(folder, weights, base, adapters, False)

    def trial(n):  # forward and backward of n pairs, for DDP's buckets and the dry run
        pairs, which = pairs_of_step(files, 0, choices, s)
        encoded = encode([pairs[i % len(pairs)] for i in range(n)], which, tokenizer, s)
        with s.autocast():
            wrapped(pack_pairs(encoded, n).to(s.device)).sum().backward()
        wrapped.zero_grad(set_to_none=True)

    # ---- loop ----
    columns = ["loss", "d2q_loss", "q2d_loss", "d2q_ppl", "q2d_ppl", "gnorm", "lr", "ex_s"]
    columns += ["tok_s", "eval_loss"]  # tokens of the texts; each goes through the model twice
    for name in ("eval_d2q", "eval_q2d"):
        columns += [f"{name}_{kind}" for kind in ("loss", "ppl", "shuffled_loss", "none_loss")]
    log, rates = common.open_log(s, columns, step), common.Rates()
    stop_requested = common.catch_stop(s)
    batches = prefetch(train_batches(files, step, choices, tokenizer, s))
    common.settle_buckets(wrapped, trial, 1)

    if eval_file and step == 0 and not s.dry_run:  # what training starts from
        found = evaluate(wrapped, eval_file, tokenizer, s)
        log(step, {f"eval_{name}": x for name, x in found.items()})
    while step < s.stop_step:
        start = time.perf_counter()
        micro_batches = next(batches)
        common.seed_step(s.seed, step, s.rank)  # dropout is a function of (seed, step, rank)
        lr = optim.learning_rate_at(step, s)
        counts = np.sum([[*b.n_targets, len(b.tokens)] for b in micro_batches], axis=0)
        *counts, n_tokens, stopping = common.all_reduce_sum([*counts, stop_requested()])
        if stopping:
            save()
            break

        # the means over the targets of all ranks and micro-batches; DDP and FSDP divide by W
        weights = torch.tensor([s.w_d2q / max(counts[0], 1), s.w_q2d / max(counts[1], 1)])
        weights = (s.world_size * weights).to(s.device)
        total = torch.zeros(2, device=s.device)  # d2q and q2d of this rank
        for i, batch in enumerate(micro_batches):
            common.sync_gradients(wrapped, i == len(micro_batches) - 1)
            with s.autocast():
                losses = wrapped(batch.to(s.device))[0]  # [2]
            total += losses.detach()
            (losses * weights).sum().backward()
        gnorm = optim.clip_gradients(trained, s.grad_clip)
        sums = common.all_reduce_sum(total.tolist())
        d2q, q2d = (x / max(n, 1) for x, n in zip(sums, counts))
        loss = s.w_d2q * d2q + s.w_q2d * q2d

        if math.isfinite(loss + gnorm):
            optim.update(optimizers, lr)
        else:
            path = files[choices[step]].path
            common.bad_step(s, step, loss, gnorm, f"Lines of {path}")
        module.zero_grad(set_to_none=True)
        step += 1

        if s.dry_run:
            if step < min(2, s.stop_step):  # the first is slow: allocation, compilation
                continue
            common.report_dry_run(s, start, {"ex": s.batch_size, "tok": n_tokens},
                                  "device_batch_size", trial, s.device_batch_size)  # fmt: skip
            break
        last_step, improved = step == s.stop_step, False
        rates.add(start, ex_s=s.batch_size, tok_s=n_tokens)
        if step % s.log_interval == 0 or last_step:
            line = {"loss": loss, "d2q_loss": d2q, "q2d_loss": q2d}
            line |= {"d2q_ppl": perplexity(d2q), "q2d_ppl": perplexity(q2d)}
            log(step, line | {"gnorm": gnorm, "lr": lr} | rates.read())
        if eval_file and (step % s.eval_interval == 0 or last_step):
            found = evaluate(wrapped, eval_file, tokenizer, s)
            log(step, {f"eval_{name}": x for name, x in found.items()})
            for name in ("d2q", "q2d"):
                shuffled, none = (found[f"{name}_{kind}_loss"] - found[f"{name}_loss"]
                                  for kind in ("shuffled", "none"))  # fmt: skip
                print0(f"  {name}: the right anchor saves {shuffled:.3f} nats a token over a "
                       f"shuffled one, {none:.3f} over none")  # fmt: skip
            if improved := found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
            elif checkpoint.is_patience_over(s, step, best):
                s.stop_step, last_step = step, True
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()

    # ---- clean-up ----
    if eval_file:
        compare_saved(s, step, module, lambda saved: evaluate(
            Reconstruction(saved.model), eval_file, tokenizer, s))  # fmt: skip
    common.finish(s, step, batches)
