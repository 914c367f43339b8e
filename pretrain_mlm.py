"""
Pretrain an encoder (masked language modelling) or a decoder (causal) on packed rows of tokens.

    python data/pydocs/prepare.py                     # real text, no download
    python pretrain_mlm.py configs/mlm_pydocs_tiny.py # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=8 pretrain_mlm.py \\
        configs/pretrain_ettin.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 pretrain_mlm.py configs/pretrain_ettin.py
    python pretrain_mlm.py configs/x.py --resume=True # go on where it stopped

A row is max_seq_len tokens of the token file, a few whole documents and the cut ends of two; no
document sees another. NeoBERT (arXiv 2502.19587), Ettin (arXiv 2507.11412), ModernBERT
(arXiv 2412.13663).
"""

import usage  # noqa: F401  --help ends here, without torch

import math
import time

import numpy as np
import torch

import checkpoint
import common
import lora
import optim
import token_rows
from common import prefetch, print0
from formats.huggingface import save_pretrained
from model import from_scratch
from tokenizer import check_tokenizer

# ---- defaults ----
out_dir = "out/mlm"  # like .+
# model
init_from = "scratch"  # or a model folder, an out_dir or a hub id owner/name[@revision]
model_size = "modernbert-tiny"  # from scratch: a name in model.SIZES
vocab_size: int | None = None  # >= 1; from scratch: None is the size's own, rows of the embedding
max_seq_len = 512  # >= 1; tokens of a row, and the positions the model is trained for
rope_theta: float | None = None  # > 0; None: the model's own; for training at a longer context
local_rope_theta: float | None = None  # > 0; of local layers; None: they have rope_theta, too
init_state = False  # True: begin with the optimizer's moments of init_from's checkpoint, too
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
attn_dropout: float | None = None  # >= 0 and < 1; of attention probabilities; None: the model's own
out_dropout: float | None = None  # >= 0 and < 1; of the attention block's output; None: model's own
# LoRA, for continued pretraining; rank 0 trains every weight
lora_rank = 0  # >= 0
lora_alpha = 32.0  # > 0
lora_dropout = 0.0  # >= 0 and < 1
lora_targets = "all"  # or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm,head"
# data and objective
# a folder of train.bin, val.bin, meta.json, tokenizer/ (see data/*/prepare.py), or a mixture
# {folder: weight}: exactly these shares of each 10,000 rows; or texts that are tokenized on the
# way, "stream:corpus/*.jsonl" or "hf:owner/name": docs/scale.md
data: str | dict = "data/pydocs"
tokenizer = ""  # of a stream: a folder or hub id; "": that of init_from; token files have their own
objective = "mlm"  # one of mlm, clm; masked tokens and both sides, or the next token (causal)
mask_prob = 0.3  # > 0 and <= 1; of the tokens that are not special
mask_all = False  # all become the mask; else 80 % do, 10 % a random token, 10 % stay
# batch, in tokens
batch_tokens = 32768  # >= 1; of one step, over all devices and micro-batches
device_batch_tokens = 8192  # >= 1; of one forward on one device
# length: one of these three is the horizon of the schedule
max_steps: int | None = None  # >= 1
max_tokens: int | None = None  # >= 1
num_epochs: float | None = None  # > 0
stop_step: int | None = None  # >= 1; ends the run before its horizon
# optimizer
optimizer = "adamw"  # one of adamw, stable_adamw, muon; muon: AdamW for all but matrices
learning_rate = 1e-3  # >= 0
min_lr = 0.0  # >= 0
weight_decay = 0.01  # >= 0
decay_all = False  # decays norms and biases, too; else tensors with two dimensions or more
beta1 = 0.9  # >= 0 and < 1
beta2 = 0.98  # >= 0 and < 1
adam_eps = 1e-6  # > 0
grad_clip = 1.0  # >= 0; largest norm of the gradient; 0: none
schedule = "cosine"  # one of cosine, linear, constant, wsd; wsd: constant, then a decay
decay_shape = "sqrt"  # one of sqrt, linear; of wsd's decay; sqrt: 1 - sqrt(t)
warmup_steps: int | None = None  # >= 0; warmup in steps, tokens or as a share of the run
warmup_tokens: int | None = None  # >= 0
warmup_ratio: float | None = None  # >= 0 and <= 1
decay_steps: int | None = None  # >= 0; the end of a wsd run; cosine and linear begin with it
decay_tokens: int | None = None  # >= 0
decay_ratio: float | None = None  # >= 0 and <= 1; None: wsd 10 %, others all after the warmup
# evaluation and checkpoints
eval_interval = 250  # >= 0; steps; 0: never
eval_tokens = 262144  # >= 1; of val.bin, from its start, with the same masks every time
eval_docs = 1000  # >= 0; of a stream without a split to evaluate on: its first, never trained on
eval_mask_prob: float | None = None  # > 0 and <= 1; for phases with other ones; None: mask_prob
log_interval = 10  # >= 1
save_interval = 1000  # >= 1; steps; the last step is always saved
checkpoint_prefix = "step"  # like [A-Za-z0-9_-]+; out_dir/step1000. Ettin's phases: ext, decay
keep_last = 2  # >= 0; checkpoints that can be resumed; 0: all
# of older ones the model stays at multiples of keep_models steps, the whole at those of keep_states
keep_models = 0  # >= 0; steps; 0: none
keep_states = 0  # >= 0; steps; 0: none; init_from with init_state=True may begin at each
keep_best = False  # True: the one with the lowest eval loss stays too
patience = 0  # >= 0; evaluations without a lower loss that end the run; 0: any number
resume = False
force_resume = False  # with other data, batch, LoRA, .. than the run began with
tracker = ""  # one of "", wandb, tensorboard
# device
dtype = "auto"  # one of auto, bf16, fp32; bf16 by autocast, weights in fp32; auto: if it is fast
compile = False  # torch.compile of each block
compile_backend = "inductor"  # one of inductor, cudagraphs, aot_eager, eager
compile_dynamic: bool | None = None  # code for any shape; None: where one has changed
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, 1/3 slower
fsdp = ""  # one of "", full; full shards weights, gradients and optimizer state
zero1 = False  # shard the optimizer state only
deterministic = False  # bit-equal runs on CUDA too, slower
seed = 1337  # >= 0 and < 1e18
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run, largest device_batch_tokens
show_batch = False  # print the first row as a reader wants it
# (from, to): write (input_ids, step) of these steps to out_dir as .npy; data/order trains on them
dump_data_order: tuple[int, ...] = ()  # >= 0


# ---- objective ----


def corrupt(ids, lengths, rng, s):
    """A row's ids [n] and the lengths of its texts -> (inputs [n], label rows [L], targets [L])."""
    return mask_tokens(ids, rng, s) if s.objective == "mlm" else (ids, *next_tokens(ids, lengths))


def mask_tokens(ids, rng, s):
    """BERT's corruption (Devlin et al. 2019, section 3.1) -> (inputs [n], rows [L], targets [L]);

        loss = - sum over masked i of log p(x_i | the corrupted row)

    s.ordinary: the ids that are not special; these alone are masked, and drawn as replacements.
    """
    chosen = (rng.random(len(ids)) < s.mask_prob) & np.isin(ids, s.ordinary)  # [n]
    rows = np.flatnonzero(chosen)  # [L]
    inputs, targets = ids.copy(), ids[rows]
    how = rng.random(len(rows))
    inputs[rows[how < (1.0 if s.mask_all else 0.8)]] = s.mask_id
    if not s.mask_all:
        swap = rows[how >= 0.9]
        inputs[swap] = s.ordinary[rng.integers(len(s.ordinary), size=len(swap))]
    return inputs, rows, targets


def next_tokens(ids, lengths):
    """Causal labels -> (rows [L], targets [L]). A text's last token predicts nothing."""
    rows = np.delete(np.arange(len(ids)), np.cumsum(lengths) - 1)
    return rows, ids[rows + 1]


def fresh_model(s):
    """Initialised weights, in the shape that the settings ask for."""
    rope = {"theta": s.rope_theta, "scaling": None}
    changes = {
        "vocab_size": s.vocab_size, "attn_dropout": s.attn_dropout, "out_dropout": s.out_dropout,
        "rope": s.rope_theta and {"global": rope, "local": rope},
    }  # fmt: skip
    changes = {key: value for key, value in changes.items() if value is not None}
    causal = s.objective == "clm"
    return from_scratch(s.model_size, max_seq_len=s.max_seq_len, causal=causal, **changes)


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    if s.lora_rank and s.init_from == "scratch":
        raise SystemExit("LoRA needs a base in init_from, not 'scratch'")
    if s.init_state and (s.init_from == "scratch" or s.lora_rank):
        raise SystemExit("init_state=True needs a checkpoint in init_from, and no LoRA")
    for key in ("keep_models", "keep_states"):
        if getattr(s, key) % s.save_interval:
            raise SystemExit(f"{key}={getattr(s, key)} is no multiple of save_interval="
                             f"{s.save_interval}: of which checkpoints?")  # fmt: skip
    if s.zero1 and (s.fsdp or s.optimizer == "muon"):
        raise SystemExit("zero1 goes with adamw and stable_adamw, and not with fsdp")
    if s.fsdp and s.optimizer == "muon":
        raise SystemExit(
            "optimizer='muon' does not go with fsdp: on sharded matrices torch's Muon gives other "
            "updates (0.4 % of the weights after three steps)"
        )

    # ---- data ----
    train, tokenizer = token_rows.open_train(s)
    if s.tokenizer and not s.stream:
        raise SystemExit(f"tokenizer={s.tokenizer!r} is for a stream: {s.data} has its own")
    token_rows.set_rows(train, s)
    optim.set_lengths(s, s.n_rows * s.max_seq_len, s.batch_tokens)
    s.mask_id = train.meta["mask_id"]
    s.ordinary = np.setdiff1d(np.arange(train.meta["vocab_size"]), train.meta["special_ids"])
    if s.objective == "mlm" and s.mask_id is None:
        raise SystemExit(f"{s.data}: its tokenizer has no mask token, as objective='mlm' needs")
    val, eval_rows = token_rows.open_val(train, s)
    print0(token_rows.describe_run(train, s), f"\nevaluation on {len(eval_rows):,} rows held out")
    if s.show_batch:
        token_rows.show_first_row(train, corrupt, s, tokenizer, mark=s.objective == "mlm")
        raise SystemExit
    if s.dump_data_order:
        token_rows.write_data_order(train, s)
        raise SystemExit

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)
    attention = "causal" if s.objective == "clm" else "encoder"
    if s.init_from == "scratch" and not last:
        model = fresh_model(s)
    else:
        model, base, adapters = lora.load_for_training(s, last, attention, s.rope_theta)
        model.set_dropout(out=s.out_dropout)
    check_tokenizer(tokenizer, model.config.vocab_size)
    specials = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "mask")]
    # what a base's config.json says stays: Llama 3 has several EOS
    model.config.hf = {key: getattr(tokenizer, key) for key in specials} | model.config.hf
    if s.local_rope_theta:
        model.config.rope["local"] = {"theta": s.local_rope_theta, "scaling": None}
    lora.add_lora(model, s, last)
    common.place(model, s)
    print0(f"{model.describe()}\n{s.compute_dtype} on {s.device}")

    # ---- compile, FSDP/DDP, optimizer, resume ----
    wrapped = common.wrap(model, model.blocks, s)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = optim.make_optimizers(model, s, s.optimizer, s.zero1, s.decay_all)
    step, best = checkpoint.load_state(last, optimizers)
    if s.init_state and not last:
        checkpoint.load_moments(base, optimizers, s)

    def save():
        weights = checkpoint.full_state_dict(model)
        with checkpoint.saving(s, step, best, optimizers) as folder:
            if folder and s.lora_rank:
                lora.save_adapter(model, folder, base, weights, adapters)
            elif folder:
                save_pretrained(model, folder, weights)
            if folder:
                tokenizer.save_pretrained(folder)

    def trial(n):  # forward and backward of n rows, for DDP's buckets and the dry run
        batch = token_rows.first_batch(train, n, corrupt, s)
        with s.autocast():
            wrapped(*batch.to(s.device))[0].backward()
        wrapped.zero_grad(set_to_none=True)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "tok_s", "mfu", "eval_loss", "eval_ppl", "eval_acc"]
    log, rates = common.open_log(s, columns, step), common.Rates()
    peak = common.peak_flops(s.device)
    flops_per_token = model.flops_per_token(train.mean_length)
    stop_requested = common.catch_stop(s)
    batches = prefetch(token_rows.train_batches(train, step, corrupt, s))
    common.settle_buckets(wrapped, trial, s.rows_per_batch)

    while step < s.stop_step:
        start = time.perf_counter()
        micro_batches = next(batches)
        common.seed_step(s.seed, step, s.rank)  # dropout is a function of (seed, step, rank)
        lr = optim.learning_rate_at(step, s)
        n_labels = sum(len(batch.targets) for batch in micro_batches)
        n_labels, stopping = common.all_reduce_sum([n_labels, stop_requested()])
        if stopping:
            save()
            break

        total = common.zeros(2, s.device)  # loss and hits of this rank
        for i, batch in enumerate(micro_batches):
            common.sync_gradients(wrapped, i == len(micro_batches) - 1)
            with s.autocast():
                loss, hits = wrapped(*batch.to(s.device))
            total += torch.stack((loss.detach(), hits))
            # the mean over all ranks' and micro-batches' labels; DDP and FSDP divide by the ranks
            (loss * (s.world_size / max(n_labels, 1))).backward()
        gnorm = optim.clip_gradients(trained, s.grad_clip)
        loss, hits = (x / max(n_labels, 1) for x in common.all_reduce_sum(total.tolist()))

        if math.isfinite(loss + gnorm):
            optim.update(optimizers, lr)
        else:
            common.bad_step(s, step, loss, gnorm, token_rows.name_rows(train, step, s))
        model.zero_grad(set_to_none=True)
        step += 1

        if s.dry_run:
            if step < min(2, s.stop_step):  # the first is slow: allocation, compilation
                continue
            common.report_dry_run(s, start, {"tok": s.batch_tokens}, "device_batch_tokens", trial,
                                  s.rows_per_batch, s.max_seq_len)  # fmt: skip
            break
        last_step, improved = step == s.stop_step, False
        rates.add(start, tok_s=s.batch_tokens)
        if step % s.log_interval == 0 or last_step:
            line = {"loss": loss, "acc": hits, "gnorm": gnorm, "lr": lr} | rates.read()
            if peak:
                line["mfu"] = line["tok_s"] * flops_per_token / (peak * s.world_size)
            log(step, line)
        if val and (step % s.eval_interval == 0 or last_step):
            found = token_rows.evaluate(wrapped, val, eval_rows, corrupt, s, s.eval_mask_prob)
            found["ppl"] = math.exp(min(found["loss"], 100))
            log(step, {f"eval_{name}": x for name, x in found.items()})
            if improved := found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"{s.checkpoint_prefix}{step}"}
            elif checkpoint.is_patience_over(s, step, best):
                s.stop_step, last_step = step, True
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()

    # ---- clean-up ----
    common.finish(s, step, batches)
