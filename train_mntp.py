"""
Masked next-token prediction: a decoder learns to look both ways, with the head that it has.

    python train_mntp.py configs/mntp_pydocs_tiny.py   # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=4 train_mntp.py \\
        configs/mntp_llm2vec.py
    python train_mntp.py configs/x.py --resume=True    # go on where it stopped

Attention is bidirectional, tokens are masked, and masked token i is predicted from the hidden state
at i - 1: a decoder's head reads the next token there, so nothing of it has to be learned anew. The
first step of LLM2Vec (arXiv 2404.05961), and Ettin's way from a decoder to an encoder (arXiv
2507.11412). The data are the token files of pretraining, in the model's own tokenizer.

LoRA gives checkpoints that are PEFT folders, and at the end out_dir/merged, a model folder; both
say that the model is bidirectional, and in mntp.json what its mask was.
lora_rank=0 trains every weight, and each checkpoint is a model folder.
"""

import usage  # noqa: F401  --help ends here, without torch

import json
import math
import os
import time

import numpy as np
import torch

import checkpoint
import common
import lora
import optim
import token_rows
from common import prefetch, print0
from formats.huggingface import resolve_folder, save_pretrained
from tokenizer import check_tokenizer, load_tokenizer, vocab_size_of

# ---- defaults ----
out_dir = "out/mntp"  # like .+
# model: attention is bidirectional, whatever the folder says
init_from = ""  # a model folder, an out_dir, or a hub id owner/name[@revision]
max_seq_len = 512  # >= 1; tokens of a row, and the positions the model is trained for
tokenizer = ""  # a folder or hub id, of the same ids as the data's; "": the model's own
n_layer: int | None = None  # >= 1; the first n layers of the model (arXiv 2410.14578); None: all
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
# LoRA; rank 0 trains every weight
lora_rank = 16  # >= 0
lora_alpha = 32.0  # > 0
lora_dropout = 0.05  # >= 0 and < 1
lora_targets = "all"  # the blocks' linear layers; or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm,head"; a tied head goes with embed
out_dropout: float | None = None  # >= 0 and < 1; of the attention block's output; None: model's own
save_merged = True  # under LoRA: at the end the merged model in out_dir/merged
# data and objective
# a folder of train.bin, val.bin, meta.json, tokenizer/ (see data/*/prepare.py), or a mixture
# {folder: weight}: exactly these shares of each 10,000 rows; or texts that are tokenized on the
# way, "stream:corpus/*.jsonl" or "hf:owner/name": docs/scale.md
data: str | dict = "data/pydocs"
chunks = False  # True: a row is one text, documents run on; False: no document sees another
mask_token = "_"  # a token of the vocabulary; or eos, own (the tokenizer's) or new (adds <mask>)
mask_prob = 0.2  # > 0 and <= 1; of the tokens that are not special
mask_all = False  # all become the mask; else 80 % do, 10 % a random token, 10 % stay
# batch, in tokens
batch_tokens = 32 * 512  # >= 1; of one step, over all devices and micro-batches
device_batch_tokens = 8 * 512  # >= 1; of one forward on one device
# length: one of these three is the horizon of the schedule
max_steps: int | None = None  # >= 1
max_tokens: int | None = None  # >= 1
num_epochs: float | None = None  # > 0
stop_step: int | None = None  # >= 1; ends the run before its horizon
# optimizer
optimizer = "adamw"  # one of adamw, stable_adamw
learning_rate = 5e-5  # >= 0
min_lr = 0.0  # >= 0
weight_decay = 0.0  # >= 0; of tensors with two dimensions or more
beta1 = 0.9  # >= 0 and < 1
beta2 = 0.999  # >= 0 and < 1
adam_eps = 1e-8  # > 0
grad_clip = 1.0  # >= 0; largest norm of the gradient; 0: none
schedule = "linear"  # one of cosine, linear, constant, wsd; wsd: constant, then a decay
decay_shape = "sqrt"  # one of sqrt, linear; of wsd's decay; sqrt: 1 - sqrt(t)
warmup_steps: int | None = None  # >= 0; warmup in steps, tokens or as a share of the run
warmup_tokens: int | None = None  # >= 0
warmup_ratio: float | None = None  # >= 0 and <= 1
decay_steps: int | None = None  # >= 0; the end of a wsd run; cosine and linear begin with it
decay_tokens: int | None = None  # >= 0
decay_ratio: float | None = None  # >= 0 and <= 1; None: wsd 10 %, others all after the warmup
# evaluation and checkpoints
eval_interval = 100  # >= 0; steps; 0: never
eval_tokens = 262144  # >= 1; of val.bin, from its start, with the same masks every time
eval_docs = 1000  # >= 0; of a stream without a split to evaluate on: its first, never trained on
log_interval = 10  # >= 1
save_interval = 200  # >= 1; steps; the last step is always saved
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
dry_run = False  # two steps: memory, speed, time of the whole run, largest device_batch_tokens
show_batch = False  # print the first row as a reader wants it


# ---- objective ----


def mask_next(ids, lengths, rng, s):
    """BERT's corruption (Devlin et al. 2019, section 3.1), asked for one place to the left. A row's
    ids [n] and the lengths of its texts -> (inputs [n], rows [L], targets [L]); LLM2Vec, section
    2.2:

        loss = - sum over masked i of log p(x_i | hidden state at i - 1)

    The first token of a text has no place before it: it is never masked. s.ordinary: the ids that
    are neither special nor the mask; these alone are masked, and drawn as replacements.
    """
    chosen = (rng.random(len(ids)) < s.mask_prob) & np.isin(ids, s.ordinary)  # [n]
    chosen[np.cumsum([0, *lengths[:-1]])] = False
    masked = np.flatnonzero(chosen)  # [L]
    inputs, targets = ids.copy(), ids[masked]
    draw = rng.random(len(masked))
    inputs[masked[draw < (1.0 if s.mask_all else 0.8)]] = s.mask_id
    if not s.mask_all:
        swap = masked[draw >= 0.9]
        inputs[swap] = s.ordinary[rng.integers(len(s.ordinary), size=len(swap))]
    return inputs, masked - 1, targets


def choose_mask(tokenizer, mask_token):
    """-> the mask's id. "new" adds <mask> to the tokenizer, in place.

    An ordinary token such as "_" is not made the tokenizer's mask_token: it would be cut out of the
    words that have it, and texts would get other ids than the model has seen.
    """
    if mask_token == "new":
        if tokenizer.mask_token is not None:
            raise SystemExit(f"mask_token='new': the tokenizer has {tokenizer.mask_token!r} "
                             "already, take 'own'")  # fmt: skip
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


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    if s.mask_token == "new" and s.lora_rank and "embed" not in s.train_also.split(","):
        raise SystemExit("mask_token='new': its row must train, too: train_also='embed'")

    # ---- data ----
    train, data_tokenizer = token_rows.open_train(s, s.chunks)
    tokenizer = load_tokenizer(s.tokenizer or resolve_folder(s.init_from))
    if not data_tokenizer.get_vocab().items() <= tokenizer.get_vocab().items():
        raise SystemExit(f"{s.data} has another tokenizer than {s.init_from}: prepare it with that")
    s.mask_id = choose_mask(tokenizer, s.mask_token)
    never_masked = [*train.meta["special_ids"], s.mask_id]
    s.ordinary = np.setdiff1d(np.arange(train.meta["vocab_size"]), never_masked)
    token_rows.set_rows(train, s)
    optim.set_lengths(s, s.n_rows * s.max_seq_len, s.batch_tokens)
    val, eval_rows = token_rows.open_val(train, s)
    mask = tokenizer.convert_ids_to_tokens(s.mask_id)
    kind = "one text" if s.chunks else "whole documents and cut ends"
    print0(token_rows.describe_run(train, s), f"\neach row is {kind}; the mask is {mask!r}, id "
           f"{s.mask_id}; evaluation on {len(eval_rows):,} rows held out")  # fmt: skip
    if s.show_batch:
        token_rows.show_first_row(train, mask_next, s, tokenizer)
        raise SystemExit

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)
    model, base, adapters = lora.load_for_training(s, last, "bidirectional")
    if model.config.family in ("modernbert", "neobert"):
        raise SystemExit(f"{s.init_from} is an encoder, and fills masks: pretrain_mlm.py goes on")
    if model.config.head == "none":
        raise SystemExit(f"{s.init_from} has no language modelling head, and it is what predicts")
    if s.mask_token == "new" and vocab_size_of(tokenizer) > model.config.vocab_size:
        model.resize_vocab(vocab_size_of(tokenizer))
    check_tokenizer(tokenizer, model.config.vocab_size)
    model.set_dropout(out=s.out_dropout)
    lora.add_lora(model, s, last)
    common.place(model, s)
    print0(f"{model.describe()}\n{s.compute_dtype} on {s.device}")

    # ---- compile, FSDP/DDP, optimizer, resume ----
    wrapped = common.wrap(model, model.blocks, s)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = optim.make_optimizers(model, s, s.optimizer)
    step, best = checkpoint.load_state(last, optimizers)

    def save_notes(folder):
        """The tokenizer, and how to ask: which token is the mask, read at which place from it."""
        tokenizer.save_pretrained(folder)
        with open(os.path.join(folder, "mntp.json"), "w", encoding="utf-8") as f:
            json.dump({"mask": mask, "mask_id": s.mask_id, "at": -1}, f)

    def save():
        weights = checkpoint.full_state_dict(model)
        with checkpoint.saving(s, step, best, optimizers) as folder:
            if folder and s.lora_rank:
                lora.save_adapter(model, folder, base, weights, adapters)
            elif folder:
                save_pretrained(model, folder, weights)
            if folder:
                save_notes(folder)

    def trial(n):  # forward and backward of n rows, for DDP's buckets and the dry run
        batch = token_rows.first_batch(train, n, mask_next, s)
        with s.autocast():
            wrapped(*batch.to(s.device))[0].backward()
        wrapped.zero_grad(set_to_none=True)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "tok_s", "eval_loss", "eval_acc"]
    log, rates = common.open_log(s, columns, step), common.Rates()
    stop_requested = common.catch_stop(s)
    batches = prefetch(token_rows.train_batches(train, step, mask_next, s))
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
            log(step, {"loss": loss, "acc": hits, "gnorm": gnorm, "lr": lr} | rates.read())
        if val and (step % s.eval_interval == 0 or last_step):
            found = token_rows.evaluate(wrapped, val, eval_rows, mask_next, s)
            log(step, {f"eval_{name}": x for name, x in found.items()})
            if improved := found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
            elif checkpoint.is_patience_over(s, step, best):
                s.stop_step, last_step = step, True
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()

    # ---- the merged model ----
    if s.save_merged and s.lora_rank and step == s.stop_step and not s.dry_run:
        weights = checkpoint.full_state_dict(model)
        folder = checkpoint.begin_checkpoint(s.out_dir, "merged")
        if s.rank == 0:
            save_pretrained(model, folder, lora.merged_state(model, weights, base, adapters))
            save_notes(folder)
        print0(f"saved {checkpoint.commit_checkpoint(folder)}")

    # ---- clean-up ----
    common.finish(s, step, batches)
