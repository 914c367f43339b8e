"""
Anchor-Embedding, stage I: a causal model writes each side of a pair from the other's embedding.

    python train_reconstruct.py configs/reconstruct_pydocs_tiny.py     # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=8 train_reconstruct.py configs/reconstruct_anchor.py
    python train_reconstruct.py configs/x.py --resume=True             # go on where it stopped
    python train_contrastive.py configs/contrastive_anchor.py          # stage II, from its folder

One packed forward encodes queries and documents: the embedding is the hidden state of the last
token. A second one decodes: a text's row is [the other side's embedding ; its tokens], and the
gradient of the tokens flows through that embedding, the anchor, into the encoder. "Training LLMs to
be Better Text Embedders through Bidirectional Reconstruction" (EMNLP 2025).

A pair's loss does not depend on other pairs, as a contrastive one does, so batches larger than the
memory are accumulated, and that is exact: sums over micro-batches and ranks, divided once by the
targets of the whole step. (The original takes the mean over the tokens of each device's
micro-batch, then the mean of these: there a token counts more beside short texts.)
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import lora
from data import load_tokenizer, make_seqs, open_pairs, prefetch, read_pair, rows_of_step
from embedder import Embedder, Template, tokenize
from model import choose_backend, from_pretrained, linear_cross_entropy, resolve_folder, to_compute

# ---- defaults ----
out_dir = "out/reconstruct"
# model
init_from = ""  # a causal model: a folder, an out_dir, or a hub id owner/name[@revision]
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
max_seq_len: int | None = None  # positions the model is trained for; None: its own
lora_rank = 0  # 0: every weight trains
lora_alpha = 32.0
lora_dropout = 0.05
lora_targets = "all"
train_also = ""  # trained whole beside LoRA: any of "embed,norm,head"
# texts
prefix = ""  # the template: prefix + instruction + text + suffix, saved with the model
suffix = ""  # with the EOS where the tokenizer adds none: its hidden state is the embedding
query_max_length = 512
passage_max_length = 512
write_template = False  # prefix, instruction and BOS are targets too; they are always context
# data: JSONL files of pairs, see data.py; negatives are not used; one file a batch
data: tuple = ("data/pydocs/train.jsonl",)
eval_data = "data/pydocs/val.jsonl"  # "": none
query_instruction: tuple = ("",)  # one for all files, or one for each; a line's "prompt" goes first
passage_instruction: tuple = ("",)
sampling_alpha = 1.0  # a file is drawn with probability ~ (its lines) ** alpha
# loss
w_d2q = 0.8  # weight of queries written from their documents' embeddings (EBD2Q)
w_q2d = 0.2  # of documents from their queries' (EBQ2D)
# batch, in pairs
batch_size = 64  # of one step, over all ranks and micro-batches
device_batch_size = 16  # of one forward on one device; it decides what dropout draws, no more
# length
max_steps: int | None = None
num_epochs: float | None = 1.0
# optimizer
learning_rate = 4e-5
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0
schedule = "linear"  # linear, cosine or constant, after the warmup
warmup_steps: int | None = None
warmup_ratio = 0.1
# evaluation and checkpoints
eval_interval = 200  # steps; 0: never
eval_pairs = 1000  # of eval_data, from its start
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
# Texts of n pairs are numbered queries first, 0 .. n-1, then documents, n .. 2n-1.


def choose_files(files, max_steps, alpha, seed):
    """The file of each step [max_steps], drawn with probability ~ (its lines) ** alpha."""
    p = np.array([len(file) for file in files]) ** alpha
    return np.random.default_rng(seed).choice(len(files), size=max_steps, p=p / p.sum())


def read_pairs(files, step, choices, settings):
    """-> ([(query, document, prompt or None)] of this rank, which file): every world_size-th pair
    of the step. One of a line's positives is drawn. A function of (seed, step)."""
    s, which = settings, int(choices[step])
    nth = int((choices[:step] == which).sum())  # how many batches this file has given
    order = rows_of_step(nth, s["batch_size"], len(files[which]), s["seed"] + which)
    own, pairs = [x[s["rank"] :: s["world_size"]].tolist() for x in order], []
    for epoch, line in zip(*own, strict=True):
        pair = read_pair(files[which], line)
        rng = np.random.default_rng((s["seed"], which, epoch, line))
        document = pair["pos"][rng.integers(len(pair["pos"]))]
        pairs.append((pair["query"], document, pair["prompt"]))
    return pairs, which


def encode(pairs, which, tokenizer, settings):
    """-> 2n items (ids, (start, end)): the tokens of each text, as the embedder makes them, and
    which of them are targets: from the text's first one to the EOS, or with write_template all. A
    text that was cut has the EOS behind the cut, as its embedding has."""
    s = settings
    ask, answer = (i[which] if len(i) > 1 else i[0] for i in s["instructions"])
    instructions = [ask if prompt is None else prompt for _, _, prompt in pairs]
    how = s["template"], s["query_max_length"], s["write_template"]
    encoded = tokenize(tokenizer, [q for q, _, _ in pairs], instructions, *how)
    how = s["template"], s["passage_max_length"], s["write_template"]
    encoded += tokenize(tokenizer, [d for _, d, _ in pairs], answer, *how)
    if s["write_template"]:
        return encoded
    bos = tokenizer.backend_tokenizer.encode("a").special_tokens_mask.index(0)  # how many it adds
    return [(ids, (max(start, bos), end)) for ids, (start, end) in encoded]


def train_batches(files, first_step, last_step, choices, tokenizer, settings):
    """For each step the list of this rank's micro-batches, as `encode` gives them."""
    s, n = settings, settings["device_batch_size"]
    for step in range(first_step, last_step):
        pairs, which = read_pairs(files, step, choices, s)
        parts = [pairs[i : i + n] for i in range(0, len(pairs), n)]
        yield [encode(part, which, tokenizer, s) for part in parts]


def n_targets(encoded):
    """[d2q, q2d]: how many tokens of the queries are to be written, and of the documents."""
    counts, n = [max(end - start, 0) for _, (start, end) in encoded], len(encoded) // 2
    return [sum(counts[:n]), sum(counts[n:])]


@dataclass
class Batch:
    """m pairs to encode, T tokens, and the first n of them to decode, U tokens in A = 2n rows."""

    tokens: torch.Tensor  # [T]
    seqs: object
    last: torch.Tensor  # [2m] the last token of each text
    out_tokens: torch.Tensor  # [U]: each text behind one more token, whose place the anchor takes
    out_seqs: object
    at: torch.Tensor  # [A] where the anchors stand
    right: torch.Tensor  # [A] the text whose embedding each of them is: the other side
    shuffled: torch.Tensor  # [A] that of the next pair, wrong, to see what the right one tells
    rows: list[torch.Tensor]  # of d2q and of q2d, [L] each: which rows of [U] predict
    targets: list[torch.Tensor]  # likewise: the tokens behind them


def pack_pairs(encoded, n, device):
    """What `encode` returned for m >= n pairs -> Batch: built on the CPU, moved once.

    Texts lie in the order of their lengths, which is fast: attention text by text takes equal
    lengths in one call.
    """
    m, lengths = len(encoded) // 2, [len(ids) for ids, _ in encoded]

    def moved(x):
        return torch.from_numpy(np.asarray(x, dtype=np.int64)).to(device, non_blocking=True)

    order = sorted(range(2 * m), key=lambda i: lengths[i])
    last = np.empty(2 * m, dtype=np.int64)
    last[order] = np.cumsum([lengths[i] for i in order]) - 1
    tokens, seqs = np.concatenate([encoded[i][0] for i in order]), [lengths[i] for i in order]

    order = [i for i in order if i % m < n]
    out_lengths = [lengths[i] + 1 for i in order]
    at = np.cumsum([0, *out_lengths[:-1]])  # [A]
    out_tokens = np.concatenate([[0, *encoded[i][0]] for i in order])
    right = [(i + m) % (2 * m) for i in order]
    shuffled = [i // m * m + (i + 1) % m for i in right]
    rows, targets = ([], []), ([], [])
    for i, row in zip(order, at, strict=True):
        ids, (start, end) = encoded[i]
        rows[i // m].append(np.arange(row + start, row + end))  # the anchor's row predicts ids[0]
        targets[i // m].append(ids[start:end])
    return Batch(
        moved(tokens), make_seqs(seqs, device), moved(last),
        moved(out_tokens), make_seqs(out_lengths, device), moved(at), moved(right), moved(shuffled),
        [moved(np.concatenate(x)) for x in rows], [moved(np.concatenate(x)) for x in targets],
    )  # fmt: skip


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
            each = [cross_entropy(self.model, x[rows], targets)
                    for rows, targets in zip(b.rows, b.targets, strict=True)]  # fmt: skip
            losses.append(torch.stack(each))
        return torch.stack(losses)


def cross_entropy(model, x, targets):
    """Transformer.forward's, for the hidden states [L, C] of one direction -> their sum."""
    if model.head is not None:
        x = model.head(to_compute(x))
    return linear_cross_entropy(x, model.lm_head.weight, model.lm_head.bias, targets)[0]


def learning_rate_at(step, max_steps, peak, floor, schedule, warmup):
    """A linear warmup, then linear, cosine or constant from peak to floor at max_steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(max_steps - warmup, 1)
    kept = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[schedule]
    return floor + (peak - floor) * kept


def perplexity(loss):
    return math.exp(min(loss, 100))


@torch.no_grad()
def evaluate(wrapped, file, tokenizer, settings):
    """Losses a token over the file's first eval_pairs lines, each rank its share, with the right
    anchors, those of the next line, and none -> values for the log. What the right ones save is
    what the embedding tells."""
    s, kinds = settings, ("right", "shuffled", "none")
    n_lines, n = min(len(file), s["eval_pairs"]), s["device_batch_size"]
    parts = [range(i, min(i + n, n_lines)) for i in range(0, n_lines, n)]
    mine = parts[s["rank"] :: s["world_size"]]
    total, count = np.zeros((3, 2)), np.zeros(2)
    wrapped.eval()
    for i in range(math.ceil(len(parts) / s["world_size"])):
        idle = i >= len(mine)  # but FSDP's forward is collective: every rank runs as many
        part = parts[0] if idle else mine[i]
        lines = [read_pair(file, j % n_lines) for j in range(part[0], part[-1] + 2)]  # one more
        pairs = [(x["query"], x["pos"][0], x["prompt"]) for x in lines]
        encoded = encode(pairs, 0, tokenizer, s)
        with s["autocast"]():
            losses = wrapped(pack_pairs(encoded, len(part), s["device"]), kinds)  # [3, 2]
        if not idle:
            m = len(pairs)
            total += losses.cpu().double().numpy()
            count += n_targets(encoded[: m - 1] + encoded[m:-1])
    wrapped.train()
    *sums, n_q, n_d = common.all_reduce_sum([*total.flatten(), *count])
    found, d2q, q2d = {}, sums[0] / max(n_q, 1), sums[1] / max(n_d, 1)
    found["eval_loss"] = s["w_d2q"] * d2q + s["w_q2d"] * q2d
    found |= {"eval_d2q_loss": d2q, "eval_q2d_loss": q2d}
    found |= {"eval_d2q_ppl": perplexity(d2q), "eval_q2d_ppl": perplexity(q2d)}
    for kind, x, y in (("shuffled", *sums[2:4]), ("none", *sums[4:6])):
        found |= {f"d2q_{kind}_loss": x / max(n_q, 1), f"q2d_{kind}_loss": y / max(n_d, 1)}
    return found


def describe_batch(encoded, tokenizer):
    """The rows that are decoded, as a reader wants them: whose embedding stands in front, and the
    targets inverted."""
    n = len(encoded) // 2
    for i, (ids, (start, end)) in enumerate(encoded):
        before, asked = (tokenizer.decode(part) for part in (ids[:start], ids[start:end]))
        one, other = ("query", "document") if i < n else ("document", "query")
        print(f"--- {one} {i % n}: {len(ids)} tokens behind 1 anchor, {end - start} targets")
        print(f"<{other} {i % n}>{before}\033[7m{asked}\033[0m")


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    if schedule not in ("linear", "cosine", "constant"):
        raise SystemExit(f"schedule={schedule!r}: expected linear, cosine or constant")
    if train_also and not lora_rank:
        raise SystemExit(f"{train_also=} goes with LoRA; lora_rank=0 trains every weight")
    if fsdp and "RANK" not in os.environ:
        raise SystemExit("fsdp shares work between ranks: start with torchrun")

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
    if eval_file and min(len(eval_file), eval_pairs) < 2:
        raise SystemExit(f"{eval_data}, {eval_pairs=}: shuffled anchors need two lines or more")
    accumulation = batch_size // (device_batch_size * world_size)
    if accumulation * device_batch_size * world_size != batch_size:
        raise SystemExit(f"{batch_size=} must be k x {device_batch_size=} x {world_size=}")
    for key in ("query_instruction", "passage_instruction"):
        if len(config[key]) not in (1, len(files)):
            raise SystemExit(f"{key}: {len(config[key])} texts for {len(files)} data files")
    n_lines = sum(len(file) for file in files)
    if max_steps is None:
        max_steps = math.ceil(num_epochs * n_lines / batch_size)
    warmup = warmup_steps if warmup_steps is not None else round(warmup_ratio * max_steps)
    choices = choose_files(files, max_steps, sampling_alpha, seed)
    settings = dict(
        batch_size=batch_size, device_batch_size=device_batch_size, seed=seed, rank=rank,
        world_size=world_size, template=Template(prefix, suffix), write_template=write_template,
        query_max_length=query_max_length, passage_max_length=passage_max_length,
        instructions=(query_instruction, passage_instruction), w_d2q=w_d2q, w_q2d=w_q2d,
        eval_pairs=eval_pairs, autocast=autocast, device=device,
    )  # fmt: skip
    for file in files:
        print0(f"{file.path}: {len(file):,} lines")
    print0(
        f"a step: {device_batch_size} pairs x {accumulation} micro-batches x {world_size} ranks "
        f"= {batch_size:,} pairs\n{max_steps:,} steps = {max_steps * batch_size / n_lines:.2f} "
        f"epochs; warmup {warmup:,} steps"
    )

    # ---- model (+ LoRA) ----
    last = common.latest_checkpoint(out_dir, "step")
    if last and not (resume or dry_run):
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    last = last if resume and not dry_run else None
    weights_type = compute_dtype if lora_rank else torch.float32  # what trains is fp32
    base = resolve_folder(init_from)  # of an out_dir its newest checkpoint
    if lora_rank and last:  # on what it began with: init_from may have a newer checkpoint by now
        base = lora.adapter_chain(os.path.join(last, "adapter"))[0]
    source = last if last and not lora_rank else base
    model = from_pretrained(source, "causal", max_seq_len=max_seq_len, dtype=weights_type)
    tokenizer = load_tokenizer(base)
    c = model.config
    if c.hf.get("model_type") in ("modernbert", "neobert"):
        raise SystemExit(f"{base} is an encoder: expected a causal model, which can write")
    if c.head == "none":
        raise SystemExit(f"{base} has no language modelling head, so it writes nothing")
    if max(query_max_length, passage_max_length) >= c.max_seq_len:
        raise SystemExit(f"{query_max_length=}, {passage_max_length=}: the anchor takes one more "
                         f"of the model's {c.max_seq_len} positions")  # fmt: skip
    if lora_rank and last:
        lora.load_adapter(model, os.path.join(last, "adapter"), trainable=True)
    elif lora_rank:
        lora.inject(model, lora_rank, lora_alpha, lora_dropout, lora_targets, train_also=train_also)
    model.gradient_checkpointing = gradient_checkpointing
    gqa = c.n_head != c.n_kv_head
    model.backend = choose_backend(attention_backend, device, compute_dtype, c.attn_dropout, gqa)
    # what the saved folder is for: stage II, sample.py --reconstruct, eval_mteb.py
    prompts = {"query": query_instruction[0], "document": passage_instruction[0]}
    embedder = Embedder(
        model, tokenizer, "last", settings["template"], prompts, True, passage_max_length,
        dtype=compute_dtype,
    ).to(device).train()  # fmt: skip
    end = embedder.tokenize(["a"])[0][0][-1]
    added = tokenizer.added_tokens_decoder
    if end not in added or not added[end].special:
        raise SystemExit(f"{suffix=}: texts would end in {tokenizer.decode([end])!r}, with no EOS "
                         f"to learn; give it one, such as {tokenizer.eos_token!r}")  # fmt: skip
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(
        f"{c.family}, causal, {n_all / 1e6:.1f}M weights, {n_trained / 1e6:.1f}M trained; "
        f"attention by {model.backend}, {compute_dtype} on {device}"
    )
    if show_batch:
        pairs, which = read_pairs(files, 0, choices, settings)
        describe_batch(encode(pairs[:4], which, tokenizer, settings), tokenizer)
        raise SystemExit

    # ---- compile, FSDP/DDP ----
    raw = wrapped = Reconstruction(model).train()
    if compile:
        for block in model.blocks:
            block.compile()
    if fsdp:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(raw)
    elif world_size > 1:
        wrapped = DDP(raw, device_ids=[local_rank] if device.type == "cuda" else None)

    # ---- optimizer, resume ----
    trained = [p for p in model.parameters() if p.requires_grad]
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
        weights = common.full_state_dict(raw)
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        folder = common.begin_checkpoint(out_dir, f"step{step}")
        if rank == 0:
            # the tokenizer as it was, for stage II adds the suffix itself; LoRA merged; the head
            embedder.save(folder, False, weights)
            if lora_rank:
                name = base if os.path.isdir(init_from) else init_from
                lora.save_adapter(model, os.path.join(folder, "adapter"), name, weights)
                embedder.save_settings(os.path.join(folder, "adapter"))
            state = {"step": step, "best": best, "optimizers": optim}
            torch.save(state, os.path.join(folder, "training_state.pt"))
        print0(f"saved {common.commit_checkpoint(folder)}")
        kept = best["folder"] if keep_best else None
        common.prune_checkpoints(out_dir, "step", keep_last, False, kept)

    # ---- loop ----
    columns = ["loss", "d2q_loss", "q2d_loss", "d2q_ppl", "q2d_ppl", "gnorm", "lr", "pairs_s"]
    columns += ["tok_s", "eval_loss"]  # tokens of the texts; each goes through the model twice
    for name in ("d2q", "q2d"):
        columns += [f"eval_{name}_loss", f"eval_{name}_ppl"]
        columns += [f"{name}_shuffled_loss", f"{name}_none_loss"]
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
            wrapped(pack_pairs([([0, 0], (0, 2))] * 2, 1, device)).sum().backward()
        raw.zero_grad(set_to_none=True)

    while step < max_steps:
        start = time.perf_counter()
        micro_batches = next(batches)
        common.seed_step(seed, step, rank)  # dropout is a function of (seed, step, rank)
        lr = learning_rate_at(step, max_steps, learning_rate, min_lr, schedule, warmup)
        counts = np.sum([n_targets(encoded) for encoded in micro_batches], axis=0)
        n_tokens = sum(len(ids) for encoded in micro_batches for ids, _ in encoded)
        *counts, n_tokens, stopping = common.all_reduce_sum([*counts, n_tokens, stop_requested()])
        if stopping:
            save()
            break

        # the means over the targets of all ranks and micro-batches; DDP and FSDP divide by W
        weights = torch.tensor([w_d2q / max(counts[0], 1), w_q2d / max(counts[1], 1)])
        weights = (world_size * weights).to(device)
        total = torch.zeros(2, device=device)  # this rank's d2q, q2d
        for i, encoded in enumerate(micro_batches):
            sync = i == len(micro_batches) - 1  # gradients meet once a step, at the last backward
            if fsdp:
                raw.set_requires_gradient_sync(sync)
            elif world_size > 1:
                wrapped.require_backward_grad_sync = sync
            with autocast():
                losses = wrapped(pack_pairs(encoded, len(encoded) // 2, device))[0]  # [2]
            total += losses.detach()
            (losses * weights).sum().backward()
        gnorm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
        gnorm = gnorm.full_tensor().item() if fsdp else gnorm.item()
        sums = common.all_reduce_sum(total.tolist())
        d2q, q2d = (x / max(n, 1) for x, n in zip(sums, counts, strict=True))
        loss = w_d2q * d2q + w_q2d * q2d

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
        raw.zero_grad(set_to_none=True)
        step += 1
        since, tokens_seen = since + batch_size, tokens_seen + n_tokens
        seconds += time.perf_counter() - start

        if dry_run and step < min(2, max_steps):  # the first is slow: allocation, compilation
            continue
        if dry_run:

            def forward_backward(n, encoded=micro_batches[0]):
                some = [encoded[i % device_batch_size] for i in range(n)]
                some += [encoded[device_batch_size + i % device_batch_size] for i in range(n)]
                with autocast():
                    wrapped(pack_pairs(some, n, device)).sum().backward()
                raw.zero_grad(set_to_none=True)

            spent = time.perf_counter() - start
            fit, peak_gb = common.largest_batch(forward_backward, device_batch_size, device)
            print0(
                f"dry run: {spent:.2f} s/step, {batch_size / spent:,.1f} pairs/s, "
                f"peak memory {peak_gb:.2f} GB; the whole run takes "
                f"{common.format_time(spent * max_steps)} without evaluation; "
                f"device_batch_size up to about {fit:,} fits"
            )
            break
        last_step = step == max_steps
        if step % log_interval == 0 or last_step:
            line = {"loss": loss, "d2q_loss": d2q, "q2d_loss": q2d}
            line |= {"d2q_ppl": perplexity(d2q), "q2d_ppl": perplexity(q2d)}
            line |= {"gnorm": gnorm, "lr": lr}
            log(step, line | {"pairs_s": since / seconds, "tok_s": tokens_seen / seconds})
            since, tokens_seen, seconds = 0, 0, 0.0
        if eval_file and (step % eval_interval == 0 or last_step):
            found = evaluate(wrapped, eval_file, tokenizer, settings)
            log(step, found)
            for name in ("d2q", "q2d"):
                over = [found[f"{name}_{x}_loss"] - found[f"eval_{name}_loss"]
                        for x in ("shuffled", "none")]  # fmt: skip
                print0(f"  {name}: the right anchor saves {over[0]:.3f} nats a token over a "
                       f"shuffled one, {over[1]:.3f} over none")  # fmt: skip
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
