"""
Pretrain an encoder (masked language modelling) or a decoder (causal) on packed rows of tokens.

    python data/pydocs/prepare.py                                    # real text, no download
    python pretrain_mlm.py configs/mlm_pydocs_tiny.py                # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=8 pretrain_mlm.py configs/pretrain_ettin.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain_mlm.py configs/pretrain_ettin.py                    # several machines
    python pretrain_mlm.py configs/x.py --resume=True                # go on where it stopped

A row is max_seq_len tokens of the token file, a few whole documents and the cut ends of two; no
document sees another. NeoBERT (arXiv 2502.19587), Ettin (arXiv 2507.11412), ModernBERT
(arXiv 2412.13663).
"""

import math
import os
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import common
import lora
from data import (
    check_tokenizer,
    load_tokenizer,
    make_seqs,
    open_tokens,
    prefetch,
    read_row,
    rows_of_step,
)
from model import choose_backend, from_pretrained, from_scratch, resolve_folder

# ---- defaults ----
out_dir = "out/mlm"
# model
init_from = "scratch"  # resume, a model folder, an out_dir or a hub id owner/name[@revision]
model_size = "modernbert-tiny"  # from scratch: a name in model.SIZES
vocab_size: int | None = None  # from scratch: None is the size's own, rows of the embedding
max_seq_len = 512  # tokens of a row, and the positions the model is trained for
rope_theta: float | None = None  # None: the model's own; for training at a longer context
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
attn_dropout: float | None = None  # of attention probabilities; None: the model's own
out_dropout: float | None = None  # of the attention block's output; None: the model's own
# LoRA, for continued pretraining; rank 0 trains every weight
lora_rank = 0
lora_alpha = 32.0
lora_dropout = 0.0
lora_targets = "all"  # or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm,head"
# data and objective
data_dir = "data/pydocs"  # train.bin, val.bin, meta.json, tokenizer/: see data/*/prepare.py
objective = "mlm"  # mlm: bidirectional, masked tokens; clm: causal, the next token
mask_prob = 0.3  # of the tokens that are not special
mask_all = False  # all become the mask; else 80 % do, 10 % a random token, 10 % stay
# batch, in tokens
batch_size = 32768  # of one step, over all devices and micro-batches
device_batch_size = 8192  # of one forward on one device
# length: one of these
max_steps: int | None = None
max_tokens: int | None = None
num_epochs: float | None = None
# optimizer
optimizer = "adamw"  # adamw, stable_adamw, or muon (matrices of the blocks; AdamW for the rest)
learning_rate = 1e-3
min_lr = 0.0
weight_decay = 0.01  # of tensors with two dimensions or more
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
grad_clip = 1.0  # largest norm of the gradient; 0: none
schedule = "cosine"  # cosine, linear, constant, wsd (constant, then a decay)
decay_shape = "sqrt"  # of wsd: 1 - sqrt(t), or linear
warmup_steps: int | None = None  # warmup: in steps, tokens or as a share of the run; None: none
warmup_tokens: int | None = None
warmup_ratio: float | None = None
decay_steps: int | None = None  # the decay: the end of a wsd run; cosine and linear begin with it
decay_tokens: int | None = None
decay_ratio: float | None = None  # None: wsd 10 % of the run, the others all after the warmup
# evaluation and checkpoints
eval_interval = 250  # steps; 0: never
eval_tokens = 262144  # of val.bin, from its start, with the same masks every time
log_interval = 10
save_interval = 1000  # steps; the last step is always saved
checkpoint_prefix = "step"  # folders out_dir/step1000; Ettin's later phases use ext, decay
keep_last = 2  # checkpoints that can be resumed; 0: all
keep_models = False  # True: of older ones the model stays, without the optimizer's state
keep_best = False  # True: the one with the lowest eval loss stays too
resume = False
tracker = ""  # wandb or tensorboard
# device
dtype = "auto"  # bf16 (autocast, weights in fp32), fp32, or bf16 where the device is good at it
compile = False  # torch.compile of each block
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, 1/3 slower
fsdp = False  # shard weights, gradients and optimizer state over the ranks
zero1 = False  # shard the optimizer state only
deterministic = False  # bit-equal runs on CUDA too, slower
seed = 1337
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run, largest device_batch_size
show_batch = False  # print the first row as a reader wants it
dump_data_order = False  # write (input_ids, step) of the whole run to out_dir as .npy


# ---- functions ----


def mask_tokens(ids, rng, mask_prob, mask_all, mask_id, ordinary):
    """BERT's corruption (Devlin et al. 2019, section 3.1) -> (inputs [T], rows [L], targets [L]).

    ordinary: the ids that are not special; these alone are masked, and drawn as replacements.
    """
    chosen = (rng.random(len(ids)) < mask_prob) & np.isin(ids, ordinary)  # [T]
    rows = np.flatnonzero(chosen)  # [L]
    inputs, targets = ids.copy(), ids[rows]
    how = rng.random(len(rows))
    inputs[rows[how < (1.0 if mask_all else 0.8)]] = mask_id
    if not mask_all:
        swap = rows[how >= 0.9]
        inputs[swap] = ordinary[rng.integers(len(ordinary), size=len(swap))]
    return inputs, rows, targets


def next_tokens(ids, lengths):
    """Causal labels -> (rows [L], targets [L]). A document's last token predicts nothing."""
    rows = np.delete(np.arange(len(ids)), np.cumsum(lengths) - 1)
    return rows, ids[rows + 1]


def make_batch(tokens, indices, epochs, settings):
    """Rows of the token file, end to end, as one packed micro-batch.

    -> (inputs [T], seqs, label rows [L], targets [L]), on the CPU. What is drawn for a row is a
    function of (seed, epoch, row) alone.
    """
    s, inputs, lengths, rows, targets = settings, [], [], [], []
    for i, (row, epoch) in enumerate(zip(indices, epochs, strict=True)):
        ids, row_lengths = read_row(tokens, row, s["max_seq_len"])
        if s["objective"] == "mlm":
            rng = np.random.default_rng((s["seed"], epoch, row))
            masking = s["mask_prob"], s["mask_all"], s["mask_id"], s["ordinary"]
            ids, r, t = mask_tokens(ids, rng, *masking)
        else:
            r, t = next_tokens(ids, row_lengths)
        inputs.append(ids)
        lengths += row_lengths
        rows.append(r + i * s["max_seq_len"])
        targets.append(t)
    inputs, rows, targets = (torch.from_numpy(np.concatenate(x)) for x in (inputs, rows, targets))
    return inputs, make_seqs(lengths), rows, targets


def train_batches(tokens, first_step, last_step, settings):
    """For each step, the list of this rank's micro-batches: every world_size-th row of the step."""
    s, n = settings, settings["rows_per_batch"]
    for step in range(first_step, last_step):
        order = rows_of_step(step, s["rows_per_step"], s["n_rows"], s["seed"])
        epochs, rows = (x[s["rank"] :: s["world_size"]] for x in order)
        starts = range(0, len(rows), n)
        yield [make_batch(tokens, rows[i : i + n], epochs[i : i + n], s) for i in starts]


def to_device(batch, device):
    inputs, seqs, rows, targets = batch
    seqs.cu_seqlens, seqs.positions = seqs.cu_seqlens.to(device), seqs.positions.to(device)
    return inputs.to(device), seqs, rows.to(device), targets.to(device)


def learning_rate_at(step, max_steps, peak, floor, schedule, warmup, decay, decay_shape):
    """Learning rate of step 0..max_steps-1: a linear warmup, then from peak to floor in `decay`
    steps, at once (cosine, linear) or at the end of the run (wsd), and the floor from there on.

    What is kept of peak - floor at t in 0..1: cosine (1 + cos(pi t))/2, linear 1 - t,
    sqrt 1 - sqrt(t) (Ettin's "1-sqrt").
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    start = max_steps - decay if schedule == "wsd" else warmup
    t = min(max(step - start, 0) / max(decay, 1), 1.0)
    shape = decay_shape if schedule == "wsd" else schedule
    kept = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "sqrt": 1 - math.sqrt(t)}
    return floor + (peak - floor) * kept[shape]


def in_steps(steps, tokens, ratio, batch_size, max_steps):
    """A length given in steps, in tokens or as a share of the run, in steps; None if in none."""
    if sum(x is not None for x in (steps, tokens, ratio)) > 1:
        raise SystemExit(f"give one of steps={steps}, tokens={tokens}, ratio={ratio}, not several")
    if tokens is not None:
        return round(tokens / batch_size)
    return round(ratio * max_steps) if ratio is not None else steps


def make_optimizers(model, kind, lr, betas, eps, weight_decay, fused, zero1):
    """A list: one optimizer, or Muon for the blocks' matrices and AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in named if kind == "muon" and p.ndim == 2 and "blocks." in n]
    rest = [p for _, p in named if not any(p is m for m in muon)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    cls = common.StableAdamW if kind == "stable_adamw" else torch.optim.AdamW
    settings = {"lr": lr, "betas": betas, "eps": eps}
    if cls is torch.optim.AdamW:
        settings["fused"] = fused
    if zero1:
        optimizers = [ZeroRedundancyOptimizer(groups, optimizer_class=cls, **settings)]
    else:
        optimizers = [cls(groups, **settings)]
    if muon:  # scaled to AdamW's update size, so that one learning rate serves both
        scaling = "match_rms_adamw"
        optimizers.append(
            torch.optim.Muon(muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn=scaling)
        )
    return optimizers


@torch.no_grad()
def evaluate(model, tokens, n_rows, settings, device, autocast):
    """(loss, accuracy) over the first n_rows rows of `tokens`, each rank its share."""
    s, total = settings, torch.zeros(3, dtype=torch.float64)
    model.eval()
    mine = np.arange(s["rank"], n_rows, s["world_size"])
    for i in range(0, math.ceil(n_rows / s["world_size"]), s["rows_per_batch"]):
        rows = mine[i : i + s["rows_per_batch"]]
        idle = len(rows) == 0  # but FSDP's forward is collective: every rank runs as many
        rows = np.zeros(1, dtype=np.int64) if idle else rows
        # the same masks for runs of all seeds
        batch = to_device(make_batch(tokens, rows, [0] * len(rows), s | {"seed": 0}), device)
        with autocast():
            loss, hits = model(*batch)
        if not idle:
            total += torch.tensor([loss.item(), hits.item(), len(batch[3])], dtype=torch.float64)
    model.train()
    loss, hits, count = common.all_reduce_sum(total.tolist())
    return loss / max(count, 1), hits / max(count, 1)


def write_data_order(out_dir, tokens, max_steps, settings):
    """data_order_input_ids.npy [rows, max_seq_len] and data_order_step.npy [rows]: each row of the
    run and the step (from 0) that trains on it, as Ettin publishes them."""
    s, n = settings, settings["rows_per_step"]
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, "data_order_")
    shape = max_steps * n, s["max_seq_len"]
    ids = np.lib.format.open_memmap(path + "input_ids.npy", "w+", tokens.tokens.dtype, shape)
    steps = np.lib.format.open_memmap(path + "step.npy", "w+", np.int64, shape[:1])
    for step in tqdm(range(max_steps), desc="data order", unit="step"):
        rows = rows_of_step(step, n, s["n_rows"], s["seed"])[1]
        for i, row in enumerate(rows, start=step * n):
            ids[i], steps[i] = read_row(tokens, row, s["max_seq_len"])[0], step
    print(f"wrote {path}input_ids.npy {shape} and {path}step.npy")


def describe_row(tokens, row, epoch, settings, tokenizer):
    """The first row as a reader wants it: documents, borders, what is hidden and what is asked."""
    inputs, seqs, rows, targets = make_batch(tokens, [row], [epoch], settings)
    asked = dict(zip(rows.tolist(), targets.tolist(), strict=True))
    start = 0
    for i, n in enumerate(seqs.lengths):
        words = []
        for j in range(start, start + n):
            word = tokenizer.decode(inputs[j : j + 1])
            if j in asked and settings["objective"] == "mlm":
                word = f"\033[7m{word}\033[0m<{tokenizer.decode([asked[j]])}>"
            words.append(word)
        labels = sum(start <= j < start + n for j in asked)
        print(f"--- document {i}: {n} tokens, {labels} labels ---")
        print("".join(words))
        start += n


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    resume = resume or init_from == "resume"
    for key, values in {
        "objective": ("mlm", "clm"), "schedule": ("cosine", "linear", "constant", "wsd"),
        "decay_shape": ("sqrt", "linear"), "optimizer": ("adamw", "stable_adamw", "muon"),
    }.items():  # fmt: skip
        if config[key] not in values:
            raise SystemExit(f"{key}={config[key]!r}: expected one of {', '.join(values)}")
    if sum(x is not None for x in (max_steps, max_tokens, num_epochs)) != 1:
        raise SystemExit(
            f"the length of training: {max_steps=}, {max_tokens=}, {num_epochs=}; expected one "
            "of them (--max_steps=None takes back what a config gives)"
        )
    if train_also and not lora_rank:
        raise SystemExit(f"{train_also=} goes with LoRA; lora_rank=0 trains every weight")
    if lora_rank and init_from in ("scratch", "resume"):
        raise SystemExit(f"LoRA needs a base in init_from, not {init_from!r}; see --resume=True")
    if (fsdp or zero1) and "RANK" not in os.environ:
        raise SystemExit("fsdp and zero1 share work between ranks: start with torchrun")
    if zero1 and (fsdp or optimizer == "muon"):
        raise SystemExit("zero1 goes with adamw and stable_adamw, and not with fsdp")

    # ---- distributed and seed ----
    rank, world_size, local_rank, device = common.setup_distributed()
    print0 = common.print0
    if deterministic:
        common.set_deterministic()
    torch.manual_seed(seed)  # the same fresh weights on every rank
    compute_dtype = common.dtype_of(dtype, device)

    def autocast():
        on = compute_dtype != torch.float32
        return torch.autocast(device.type, compute_dtype) if on else nullcontext()

    # ---- data ----
    train = open_tokens(data_dir, "train")
    tokenizer = load_tokenizer(os.path.join(data_dir, "tokenizer"))
    rows_per_step, rows_per_batch = batch_size // max_seq_len, device_batch_size // max_seq_len
    accumulation = batch_size // (device_batch_size * world_size)
    if rows_per_batch * max_seq_len != device_batch_size:
        raise SystemExit(f"{device_batch_size=} must be a multiple of {max_seq_len=}")
    if accumulation * device_batch_size * world_size != batch_size:
        raise SystemExit(f"{batch_size=} must be k x {device_batch_size=} x {world_size=}")
    n_rows = len(train.tokens) // max_seq_len
    if n_rows == 0:
        raise SystemExit(f"{data_dir}: {len(train.tokens)} tokens are no row of {max_seq_len=}")
    if objective == "mlm" and train.meta["mask_id"] is None:
        raise SystemExit(f"{data_dir}: its tokenizer has no mask token, as objective='mlm' needs")
    if max_steps is None:
        all_tokens = max_tokens if max_tokens is not None else num_epochs * n_rows * max_seq_len
        max_steps = math.ceil(all_tokens / batch_size)
    warmup = in_steps(warmup_steps, warmup_tokens, warmup_ratio, batch_size, max_steps) or 0
    decay = in_steps(decay_steps, decay_tokens, decay_ratio, batch_size, max_steps)
    if decay is None:
        decay = round(0.1 * max_steps) if schedule == "wsd" else max_steps - warmup
    settings = dict(
        objective=objective, max_seq_len=max_seq_len, mask_prob=mask_prob, mask_all=mask_all,
        mask_id=train.meta["mask_id"], seed=seed, rank=rank, world_size=world_size, n_rows=n_rows,
        ordinary=np.setdiff1d(np.arange(train.meta["vocab_size"]), train.meta["special_ids"]),
        rows_per_step=rows_per_step, rows_per_batch=rows_per_batch,
    )  # fmt: skip
    has_val = eval_interval and "val" in train.meta["splits"]
    val = open_tokens(data_dir, "val") if has_val else None
    eval_rows = min(eval_tokens, len(val.tokens)) // max_seq_len if val else 0
    print0(
        f"{data_dir}: {len(train.tokens):,} tokens = {n_rows:,} rows of {max_seq_len}\n"
        f"a step: {rows_per_batch} rows x {accumulation} micro-batches x {world_size} ranks "
        f"= {batch_size:,} tokens\n{max_steps:,} steps = {max_steps * batch_size:,} tokens "
        f"= {max_steps * rows_per_step / n_rows:.2f} epochs; warmup {warmup:,} steps; "
        f"evaluation on {eval_rows:,} rows of val.bin"
    )
    if show_batch:
        epochs, rows = rows_of_step(0, rows_per_step, n_rows, seed)
        describe_row(train, rows[0], epochs[0], settings, tokenizer)
        raise SystemExit
    if dump_data_order:
        write_data_order(out_dir, train, max_steps, settings)
        raise SystemExit

    # ---- model (+ LoRA) ----
    last = common.latest_checkpoint(out_dir, checkpoint_prefix)
    if last and not (resume or dry_run):
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    last = last if resume and not dry_run else None
    if init_from == "resume" and not last:
        raise SystemExit(f"init_from='resume': {out_dir} has no checkpoint to go on from")
    attention = "causal" if objective == "clm" else "bidirectional"
    source = last if last and not lora_rank else init_from
    if source in ("scratch", "resume"):
        changes = {"max_seq_len": max_seq_len, "causal": objective == "clm"}
        changes |= {"vocab_size": vocab_size} if vocab_size else {}
        if rope_theta:
            rope = {"theta": rope_theta, "scaling": None}
            changes["rope"] = {"global": rope, "local": rope}
        model = from_scratch(model_size, **changes)
    else:
        frozen = compute_dtype if lora_rank else torch.float32
        if lora_rank and last:  # on what it began with: there may be a newer checkpoint by now
            source = lora.adapter_chain(last)[0]
        model = from_pretrained(source, attention, rope_theta=rope_theta, dtype=frozen)
        model.config.max_seq_len = max(model.config.max_seq_len, max_seq_len)
    check_tokenizer(tokenizer, model.config.vocab_size)
    specials = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "mask")]
    # what a base's config.json says stays: Llama 3 has several EOS
    model.config.hf = {key: getattr(tokenizer, key) for key in specials} | model.config.hf
    if attn_dropout is not None:
        model.config.attn_dropout = attn_dropout
    if out_dropout is not None:
        model.config.out_dropout = out_dropout
    if lora_rank and last:
        lora.load_adapter(model, last, trainable=True)
    elif lora_rank:
        lora.inject(model, lora_rank, lora_alpha, lora_dropout, lora_targets, train_also=train_also)
    model.gradient_checkpointing = gradient_checkpointing
    c = model.config
    gqa = c.n_head != c.n_kv_head
    model.backend = choose_backend(attention_backend, device, compute_dtype, c.attn_dropout, gqa)
    model.to(device).train()
    flops_per_token = model.flops_per_token(len(train.tokens) / (len(train.starts) - 1))
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(
        f"{c.family}, {attention}, {n_all / 1e6:.1f}M weights, {n_trained / 1e6:.1f}M trained; "
        f"attention by {model.backend}, {compute_dtype} on {device}"
    )

    # ---- compile, FSDP/DDP ----
    raw = model
    if compile:
        for block in model.blocks:
            block.compile()
    if fsdp:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif world_size > 1:
        model = DDP(model, device_ids=[local_rank] if device.type == "cuda" else None)

    # ---- optimizer, resume ----
    fused = device.type in ("cuda", "cpu")
    settings_of_optimizer = learning_rate, (beta1, beta2), adam_eps, weight_decay
    optimizers = make_optimizers(raw, optimizer, *settings_of_optimizer, fused, zero1)
    step, best = 0, {"loss": math.inf, "folder": ""}
    if last:
        path = os.path.join(last, "training_state.pt")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        common.load_optimizer_state(optimizers, state["optimizers"])
        step, best = state["step"], state["best"]
        print0(f"resumed {last}, after step {step}")

    def save():
        weights, optim = common.full_state_dict(model), common.optimizer_state(optimizers)
        folder = common.begin_checkpoint(out_dir, f"{checkpoint_prefix}{step}")
        if rank == 0:
            if lora_rank:
                base = resolve_folder(init_from) if os.path.isdir(init_from) else init_from
                lora.save_adapter(raw, folder, base, weights)
            else:
                raw.save_pretrained(folder, weights)
            tokenizer.save_pretrained(folder)
            state = {"step": step, "best": best, "optimizers": optim}
            torch.save(state, os.path.join(folder, "training_state.pt"))
        print0(f"saved {common.commit_checkpoint(folder)}")
        kept = best["folder"] if keep_best else None
        common.prune_checkpoints(out_dir, checkpoint_prefix, keep_last, keep_models, kept)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "tok_s", "mfu", "eval_loss", "eval_ppl", "eval_acc"]
    if dry_run:  # leaves nothing behind
        log = lambda step, values: None  # noqa: E731
    else:
        log = common.open_log(out_dir, columns, max_steps, step, tracker, config)
        common.save_config(config, os.path.join(out_dir, "config.py"))
    stop_requested = common.catch_sigterm()
    peak, bad_steps, since, seconds = common.peak_flops(device), 0, 0, 0.0
    batches = prefetch(train_batches(train, step, max_steps, settings))
    if isinstance(model, DDP):
        # DDP orders its buckets anew after the first backward, and with them the sums over ranks:
        # one backward that counts for nothing lets a resumed run sum as the unbroken one does.
        warm = make_batch(train, [0] * rows_per_batch, [0] * rows_per_batch, settings)
        with autocast():
            model(*to_device(warm, device))[0].backward()
        model.zero_grad(set_to_none=True)

    while step < max_steps:
        start = time.perf_counter()
        micro_batches = next(batches)
        common.seed_step(seed, step, rank)  # dropout is a function of (seed, step, rank)
        lr = learning_rate_at(
            step, max_steps, learning_rate, min_lr, schedule, warmup, decay, decay_shape
        )
        n_labels = sum(len(targets) for _, _, _, targets in micro_batches)
        n_labels, stopping = common.all_reduce_sum([n_labels, stop_requested()])
        if stopping:
            save()
            break

        wide = torch.float32 if device.type == "mps" else torch.float64  # a Mac has no float64
        total = torch.zeros(2, device=device, dtype=wide)  # loss, hits of this rank
        for i, batch in enumerate(micro_batches):
            sync = i == len(micro_batches) - 1  # gradients meet once a step, at the last backward
            if fsdp:
                model.set_requires_gradient_sync(sync)
            elif world_size > 1:
                model.require_backward_grad_sync = sync
            with autocast():
                loss, hits = model(*to_device(batch, device))
            total += torch.stack((loss.detach(), hits))
            # the mean over all ranks' and micro-batches' labels; DDP and FSDP divide by the ranks
            (loss * (world_size / max(n_labels, 1))).backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        gnorm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        gnorm = gnorm.full_tensor().item() if fsdp else gnorm.item()
        loss, hits = (x / max(n_labels, 1) for x in common.all_reduce_sum(total.tolist()))

        if not math.isfinite(loss + gnorm):
            bad_steps += 1  # in the whole run: a good one has none
            epochs, rows = rows_of_step(step, rows_per_step, n_rows, seed)
            print0(
                f"step {step + 1}: loss {loss}, gradient norm {gnorm}: skipped. Rows of {data_dir}"
                f"/train.bin: {rows[:8].tolist()}{'...' if len(rows) > 8 else ''}"
            )
            if bad_steps > 3:
                raise SystemExit("stopped at the 4th such step; the last checkpoint is good")
        else:
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = lr
                opt.step()
        model.zero_grad(set_to_none=True)
        step += 1
        since, seconds = since + batch_size, seconds + time.perf_counter() - start

        if dry_run and step < min(2, max_steps):  # the first is slow: allocation, compilation
            continue
        if dry_run:

            def forward_backward(n):
                some = [i % n_rows for i in range(n)]
                with autocast():
                    model(*to_device(make_batch(train, some, some, settings), device))[0].backward()
                model.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - start
            fit, peak_gb = common.largest_batch(forward_backward, rows_per_batch, device)
            print0(
                f"dry run: {seconds:.2f} s/step, {batch_size / seconds:,.0f} tok/s, "
                f"peak memory {peak_gb:.2f} GB; the whole run takes "
                f"{common.format_time(seconds * max_steps)} without evaluation; "
                f"device_batch_size up to about {fit * max_seq_len:,} fits"
            )
            break
        last_step = step == max_steps
        if step % log_interval == 0 or last_step:
            speed = since / seconds
            mfu = speed * flops_per_token / (peak * world_size) if peak else None
            line = {"loss": loss, "acc": hits, "gnorm": gnorm, "lr": lr, "tok_s": speed, "mfu": mfu}
            log(step, line)
            since, seconds = 0, 0.0
        if eval_rows and (step % eval_interval == 0 or last_step):
            loss, acc = evaluate(model, val, eval_rows, settings, device, autocast)
            log(step, {"eval_loss": loss, "eval_ppl": math.exp(min(loss, 100)), "eval_acc": acc})
            if loss < best["loss"]:
                best = {"loss": loss, "folder": f"{checkpoint_prefix}{step}"}
                if keep_best and not last_step and step % save_interval:
                    save()
        if step % save_interval == 0 or last_step:
            save()

    # ---- clean-up ----
    batches.close()
    if dist.is_initialized():
        dist.destroy_process_group()
