"""
Masked next-token prediction: a decoder learns to look both ways, with the head that it has.

    python train_mntp.py configs/mntp_pydocs_tiny.py           # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=4 train_mntp.py configs/mntp_llm2vec.py
    python train_mntp.py configs/x.py --resume=True            # go on where it stopped

Attention is bidirectional, tokens are masked, and masked token i is predicted from the hidden state
at i - 1: a decoder's head reads the next token there, so nothing of it has to be learned anew. The
first step of LLM2Vec (arXiv 2404.05961), and Ettin's way from a decoder to an encoder (arXiv
2507.11412). The data are the token files of pretraining, in the model's own tokenizer.

LoRA gives checkpoints that are PEFT folders, and at the end out_dir/merged, a model folder; both
say that the model is bidirectional, and in mntp.json what its mask was.
lora_rank=0 trains every weight, and each checkpoint is a model folder.
"""

import json
import math
import os
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

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
    vocab_size_of,
)
from embedder import merged_state
from model import choose_backend, from_pretrained, resolve_folder

# ---- defaults ----
out_dir = "out/mntp"
# model: attention is bidirectional, whatever the folder says
init_from = ""  # a model folder, an out_dir, or a hub id owner/name[@revision]
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
max_seq_len = 512  # tokens of a row
lora_rank = 16  # 0: every weight trains
lora_alpha = 32.0
lora_dropout = 0.05
lora_targets = "all"  # the blocks' linear layers; or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm,head"; a tied head goes with embed
save_merged = True  # under LoRA: at the end the merged model in out_dir/merged
# data and objective
data_dir = "data/pydocs"  # train.bin, val.bin, meta.json, tokenizer/: see data/*/prepare.py
chunks = False  # True: a row is one text, documents run on; False: no document sees another
mask_token = "_"  # a token of the vocabulary; or eos, own (the tokenizer's) or new (adds <mask>)
mask_prob = 0.2  # of the tokens that are not special
mask_all = False  # all become the mask; else 80 % do, 10 % a random token, 10 % stay
# batch, in tokens
batch_size = 32 * 512  # of one step, over all devices and micro-batches
device_batch_size = 8 * 512  # of one forward on one device
# length: the schedule ends where training does
max_steps: int | None = 1000
num_epochs: float | None = None
# optimizer
learning_rate = 5e-5
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0  # largest norm of the gradient; 0: none
schedule = "linear"  # linear, cosine or constant, after the warmup
warmup_steps = 0
decay_steps: int | None = None  # the fall of linear and cosine: the last steps; None: all of them
# evaluation and checkpoints
eval_interval = 100  # steps; 0: never
eval_tokens = 262144  # of val.bin, from its start, with the same masks every time
log_interval = 10
save_interval = 200  # steps; the last step is always saved
keep_last = 1  # checkpoints; 0: all
keep_best = False  # True: the one with the lowest eval loss stays too
resume = False
tracker = ""  # wandb or tensorboard
# device
dtype = "auto"  # bf16 (autocast, trained weights in fp32), fp32, or what the device is good at
compile = False  # torch.compile of each block
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, 1/3 slower
fsdp = False  # shard weights, gradients and optimizer state over the ranks
deterministic = False  # bit-equal runs on CUDA too, slower
seed = 1337
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run, largest device_batch_size
show_batch = False  # print the first row as a reader wants it


# ---- functions ----


def choose_mask(tokenizer, mask_token):
    """-> the mask's id. "new" adds <mask> to the tokenizer, in place.

    An ordinary token such as "_" is not made the tokenizer's mask_token: it would be cut out of the
    words that have it, and texts would get other ids than the model has seen.
    """
    if mask_token == "new":
        if tokenizer.mask_token is not None:
            had = tokenizer.mask_token
            raise SystemExit(f"mask_token='new': the tokenizer has {had!r} already, take 'own'")
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    if mask_token in ("new", "own"):
        if tokenizer.mask_token_id is None:
            raise SystemExit("mask_token='own': the tokenizer has none; take '_', 'eos' or 'new'")
        return tokenizer.mask_token_id
    if mask_token == "eos":
        if tokenizer.eos_token_id is None:
            raise SystemExit("mask_token='eos': the tokenizer has none; take '_' or 'new'")
        return tokenizer.eos_token_id
    if mask_token not in (vocab := tokenizer.get_vocab()):
        raise SystemExit(f"{mask_token=}: expected a token of the vocabulary, eos, own or new")
    return vocab[mask_token]


def mask_next(ids, lengths, rng, mask_prob, mask_all, mask_id, ordinary):
    """BERT's corruption (Devlin et al. 2019, section 3.1), asked for one place to the left
    -> (inputs [T], rows [L], targets [L]); LLM2Vec, section 2.2:

        loss = - sum over masked i of log p(x_i | hidden state at i - 1)

    The first token of a text has no place before it: it is never masked.
    ordinary: the ids that are neither special nor the mask; these alone are masked, and drawn as
    replacements.
    """
    chosen = (rng.random(len(ids)) < mask_prob) & np.isin(ids, ordinary)  # [T]
    chosen[np.cumsum([0, *lengths[:-1]])] = False
    masked = np.flatnonzero(chosen)  # [L]
    inputs, targets = ids.copy(), ids[masked]
    how = rng.random(len(masked))
    inputs[masked[how < (1.0 if mask_all else 0.8)]] = mask_id
    if not mask_all:
        swap = masked[how >= 0.9]
        inputs[swap] = ordinary[rng.integers(len(ordinary), size=len(swap))]
    return inputs, masked - 1, targets


def make_batch(tokens, indices, epochs, settings):
    """Rows of the token file, end to end, as one packed micro-batch.

    -> (inputs [T], seqs, label rows [L], targets [L]), on the CPU. What is drawn for a row is a
    function of (seed, epoch, row) alone.
    """
    s, inputs, lengths, rows, targets = settings, [], [], [], []
    for i, (row, epoch) in enumerate(zip(indices, epochs, strict=True)):
        ids, row_lengths = read_row(tokens, row, s["max_seq_len"])
        row_lengths = [len(ids)] if s["chunks"] else row_lengths
        rng = np.random.default_rng((s["seed"], epoch, row))
        masking = s["mask_prob"], s["mask_all"], s["mask_id"], s["ordinary"]
        ids, r, t = mask_next(ids, row_lengths, rng, *masking)
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


def learning_rate_at(step, max_steps, peak, floor, schedule, warmup, decay):
    """A linear warmup, then linear, cosine or constant: from peak to floor in the last `decay`
    steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = max(step - (max_steps - decay), 0) / max(decay, 1)
    kept = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[schedule]
    return floor + (peak - floor) * kept


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


def describe_row(tokens, row, epoch, settings, tokenizer):
    """The first row as a reader wants it: texts, borders, what is hidden and what is asked. The
    token at whose place the answer is read stands inverted, the answer behind it."""
    inputs, seqs, rows, targets = make_batch(tokens, [row], [epoch], settings)
    asked = dict(zip(rows.tolist(), targets.tolist(), strict=True))
    start = 0
    for i, n in enumerate(seqs.lengths):
        words = []
        for j in range(start, start + n):
            word = tokenizer.decode(inputs[j : j + 1])
            if j in asked:
                word = f"\033[7m{word}\033[0m<{tokenizer.decode([asked[j]])}>"
            words.append(word)
        labels = sum(start <= j < start + n for j in asked)
        print(f"--- text {i}: {n} tokens, {labels} labels ---")
        print("".join(words))
        start += n


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    if schedule not in ("linear", "cosine", "constant"):
        raise SystemExit(f"schedule={schedule!r}: expected linear, cosine or constant")
    if (max_steps is None) == (num_epochs is None):
        raise SystemExit(
            f"the length of training: {max_steps=}, {num_epochs=}; expected one of them "
            "(--max_steps=None takes back what a config gives)"
        )
    if not 0 < mask_prob <= 1:
        raise SystemExit(f"{mask_prob=}: expected a share, above 0 and up to 1")
    if train_also and not lora_rank:
        raise SystemExit(f"{train_also=} goes with LoRA; lora_rank=0 trains every weight")
    if fsdp and "RANK" not in os.environ:
        raise SystemExit("fsdp shares work between ranks: start with torchrun")
    if mask_token == "new" and lora_rank and "embed" not in train_also.split(","):
        raise SystemExit("mask_token='new': its row must train, too: train_also='embed'")

    # ---- distributed and seed ----
    rank, world_size, local_rank, device = common.setup_distributed()
    print0 = common.print0
    if deterministic:
        common.set_deterministic()
    torch.manual_seed(seed)  # the same fresh LoRA on every rank
    compute_dtype = common.dtype_of(dtype, device)

    def autocast():
        on = compute_dtype != torch.float32
        return torch.autocast(device.type, compute_dtype) if on else nullcontext()

    # ---- data ----
    train = open_tokens(data_dir, "train")
    base = resolve_folder(init_from)  # of an out_dir its newest checkpoint
    tokenizer = load_tokenizer(base)
    theirs = load_tokenizer(os.path.join(data_dir, "tokenizer")).get_vocab()
    if not theirs.items() <= tokenizer.get_vocab().items():
        raise SystemExit(f"{data_dir} has another tokenizer than {init_from}: prepare it with that")
    mask_id = choose_mask(tokenizer, mask_token)
    rows_per_step, rows_per_batch = batch_size // max_seq_len, device_batch_size // max_seq_len
    accumulation = batch_size // (device_batch_size * world_size)
    if rows_per_batch * max_seq_len != device_batch_size:
        raise SystemExit(f"{device_batch_size=} must be a multiple of {max_seq_len=}")
    if accumulation * device_batch_size * world_size != batch_size:
        raise SystemExit(f"{batch_size=} must be k x {device_batch_size=} x {world_size=}")
    n_rows = len(train.tokens) // max_seq_len
    if n_rows == 0:
        raise SystemExit(f"{data_dir}: {len(train.tokens)} tokens are no row of {max_seq_len=}")
    if max_steps is None:
        max_steps = math.ceil(num_epochs * n_rows / rows_per_step)
    decay = max_steps - warmup_steps if decay_steps is None else decay_steps
    never_masked = [*train.meta["special_ids"], mask_id]
    settings = dict(
        chunks=chunks, max_seq_len=max_seq_len, mask_prob=mask_prob, mask_all=mask_all,
        mask_id=mask_id, ordinary=np.setdiff1d(np.arange(train.meta["vocab_size"]), never_masked),
        seed=seed, rank=rank, world_size=world_size, n_rows=n_rows,
        rows_per_step=rows_per_step, rows_per_batch=rows_per_batch,
    )  # fmt: skip
    has_val = eval_interval and "val" in train.meta["splits"]
    val = open_tokens(data_dir, "val") if has_val else None
    eval_rows = min(eval_tokens, len(val.tokens)) // max_seq_len if val else 0
    if val and not eval_rows:
        raise SystemExit(f"{eval_tokens=}, {len(val.tokens)} tokens of val.bin: no row to evaluate "
                         "on; eval_interval=0 does without")  # fmt: skip
    print0(
        f"{data_dir}: {len(train.tokens):,} tokens = {n_rows:,} rows of {max_seq_len}, each "
        f"{'one text' if chunks else 'of whole documents and cut ends'}\n"
        f"a step: {rows_per_batch} rows x {accumulation} micro-batches x {world_size} ranks "
        f"= {batch_size:,} tokens\n{max_steps:,} steps = {max_steps * batch_size:,} tokens "
        f"= {max_steps * rows_per_step / n_rows:.2f} epochs; the mask is "
        f"{tokenizer.convert_ids_to_tokens(mask_id)!r}, id {mask_id}; "
        f"evaluation on {eval_rows:,} rows of val.bin"
    )
    if show_batch:
        epochs, rows = rows_of_step(0, rows_per_step, n_rows, seed)
        describe_row(train, rows[0], epochs[0], settings, tokenizer)
        raise SystemExit

    # ---- model (+ LoRA) ----
    last = common.latest_checkpoint(out_dir, "step")
    if last and not (resume or dry_run):
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    last = last if resume and not dry_run else None
    if lora_rank and last:  # on what it began with: init_from may have a newer checkpoint by now
        base = lora.adapter_chain(last)[0]
    source = last if last and not lora_rank else base
    weights_type = compute_dtype if lora_rank else torch.float32  # what trains is fp32
    model = from_pretrained(source, "bidirectional", dtype=weights_type)
    c = model.config
    if c.family in ("modernbert", "neobert"):
        raise SystemExit(f"{init_from} is an encoder, and fills masks: pretrain_mlm.py goes on")
    if c.head == "none":
        raise SystemExit(f"{init_from} has no language modelling head, and it is what predicts")
    if max_seq_len > c.max_seq_len:
        raise SystemExit(f"{max_seq_len=}: the model was trained for {c.max_seq_len} positions")
    if mask_token == "new" and vocab_size_of(tokenizer) > c.vocab_size:
        model.resize_vocab(vocab_size_of(tokenizer))
    check_tokenizer(tokenizer, c.vocab_size)
    if lora_rank and last:
        lora.load_adapter(model, last, trainable=True)
    elif lora_rank:
        lora.inject(model, lora_rank, lora_alpha, lora_dropout, lora_targets, train_also=train_also)
    model.gradient_checkpointing = gradient_checkpointing
    gqa = c.n_head != c.n_kv_head
    model.backend = choose_backend(attention_backend, device, compute_dtype, c.attn_dropout, gqa)
    model.to(device).train()
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(
        f"{c.family}, bidirectional, {n_all / 1e6:.1f}M weights, {n_trained / 1e6:.1f}M trained; "
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
    trained = [p for p in raw.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], learning_rate, (beta1, beta2), adam_eps,
        fused=device.type in ("cuda", "cpu"),
    )  # fmt: skip
    step, best = 0, {"loss": math.inf, "folder": ""}
    if last:
        path = os.path.join(last, "training_state.pt")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        common.load_optimizer_state([optimizer], state["optimizers"])
        step, best = state["step"], state["best"]
        print0(f"resumed {last}, after step {step}")

    def save_notes(folder):
        """The tokenizer, and how to ask: which token is the mask, read at which place from it."""
        tokenizer.save_pretrained(folder)
        notes = {"mask": tokenizer.convert_ids_to_tokens(mask_id), "mask_id": mask_id, "at": -1}
        with open(os.path.join(folder, "mntp.json"), "w", encoding="utf-8") as f:
            json.dump(notes, f)

    def save():
        weights, optim = common.full_state_dict(model), common.optimizer_state([optimizer])
        folder = common.begin_checkpoint(out_dir, f"step{step}")
        if rank == 0:
            if lora_rank:
                lora.save_adapter(raw, folder, base if os.path.isdir(init_from) else init_from,
                                  weights)  # fmt: skip
            else:
                raw.save_pretrained(folder, weights)
            save_notes(folder)
            state = {"step": step, "best": best, "optimizers": optim}
            torch.save(state, os.path.join(folder, "training_state.pt"))
        print0(f"saved {common.commit_checkpoint(folder)}")
        kept = best["folder"] if keep_best else None
        common.prune_checkpoints(out_dir, "step", keep_last, False, kept)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "tok_s", "eval_loss", "eval_acc"]
    if dry_run:  # leaves nothing behind
        log = lambda step, values: None  # noqa: E731
    else:
        log = common.open_log(out_dir, columns, max_steps, step, tracker, config)
        common.save_config(config, os.path.join(out_dir, "config.py"))
    stop_requested = common.catch_sigterm()
    bad_steps, since, seconds = 0, 0, 0.0
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
        lr = learning_rate_at(step, max_steps, learning_rate, min_lr, schedule, warmup_steps, decay)
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
        gnorm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
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
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
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
            line = {"loss": loss, "acc": hits, "gnorm": gnorm, "lr": lr, "tok_s": since / seconds}
            log(step, line)
            since, seconds = 0, 0.0
        if eval_rows and (step % eval_interval == 0 or last_step):
            loss, acc = evaluate(model, val, eval_rows, settings, device, autocast)
            log(step, {"eval_loss": loss, "eval_acc": acc})
            if loss < best["loss"]:
                best = {"loss": loss, "folder": f"step{step}"}
                if keep_best and not last_step and step % save_interval:
                    save()
        if step % save_interval == 0 or last_step:
            save()

    # ---- the merged model ----
    if save_merged and lora_rank and step == max_steps and not dry_run:
        weights = common.full_state_dict(model)
        folder = common.begin_checkpoint(out_dir, "merged")
        if rank == 0:
            raw.save_pretrained(folder, merged_state(raw, weights))
            save_notes(folder)
        print0(f"saved {common.commit_checkpoint(folder)}")

    # ---- clean-up ----
    batches.close()
    if dist.is_initialized():
        dist.destroy_process_group()
