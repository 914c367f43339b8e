"""
Train a classifier: a label for each word (part of speech, chunks, names), or one for a text or a
pair of texts (classes, a yes or no as rerankers give it, a number).

    python train_classifier.py configs/classifier_pos_ud.py   # one device
    torchrun --standalone --nproc_per_node=8 train_classifier.py \\
        configs/classifier_reranker.py
    python train_classifier.py configs/x.py --resume=True     # go on where it stopped
    python -m evals.classifier --model=out/x --eval_data=test.jsonl

Words are tokenized together, joined by spaces; a word's vector is the mean of its tokens', read
where they stand or one position before (LLM2Vec's word tasks, arXiv 2404.05961, section 4.1: a
frozen model and one linear layer). Texts are pooled as embeddings are (cross-encoders: Nogueira and
Cho 2019, arXiv 1901.04085). What is saved is transformers' ...ForTokenClassification or
...ForSequenceClassification where these compute the same; where they do not, the script says why.
"""

import usage  # noqa: F401  --help ends here, without torch

import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import checkpoint
import common
import lora
import optim
from attention import Seqs, move
from common import prefetch, print0
from formats import classifier as folders
from formats.huggingface import resolve_folder
from labels import join_texts, labels_of, read_examples, score_texts, score_words
from model import Head
from order import rows_of_step
from pooling import Pool, pack, pool
from tokenizer import (
    Template,
    check_tokenizer,
    load_tokenizer,
    puts_end,
    tokenize,
    tokenize_words,
)

# ---- defaults ----
out_dir = "out/classifier"  # like .+
task = "words"  # one of words, texts; a label for each word, or one for a text or a pair
# model
init_from = ""  # a model folder, an adapter's, an out_dir, or a hub id owner/name[@revision]
tokenizer = ""  # a folder or hub id; "": the model's own. Its largest id must fit the model
adapters: tuple[str, ...] = ()  # PEFT folders or hub ids merged into it first (LLM2Vec's MNTP)
attention: str | None = None  # one of causal, bidirectional; None: the model's own
n_layer: int | None = None  # >= 1; the first n layers of the model (arXiv 2410.14578); None: all
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
attn_dropout: float | None = None  # >= 0 and < 1; of attention probabilities; None: the model's own
freeze_backbone = True  # the last layers alone train; with LoRA, the adapter too
# LoRA; rank 0: none
lora_rank = 0  # >= 0
lora_alpha = 32.0  # > 0
lora_dropout = 0.05  # >= 0 and < 1
lora_targets = "all"  # or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# classifier
dropout = 0.1  # >= 0 and < 1; in front of the last linear layer
prediction_head = False  # ModernBERT's dense, gelu, norm in front of it, as transformers has it
label_position = "same_token"  # one of same_token, next_token; next: read one before (MNTP)
merge_subwords = True  # words: the mean of a word's tokens; False: its first token
pooling = "mean"  # one of mean, weighted_mean, last, cls; of texts
loss_kind = "softmax"  # one of softmax, bce, mse; classes; texts: yes or no (rerankers), a number
pos_weight = 1.0  # > 0; bce: weight of the examples whose label is 1, e.g. negatives / positives
label_names: tuple[str, ...] = ()  # softmax: in the order of the outputs; (): those of data, sorted
# data: see read_words and read_texts in data.py
data = "data/ud/train.jsonl"  # words: JSONL, or columns as CoNLL has them; texts: JSONL
eval_data = "data/ud/val.jsonl"  # "": none
eval_lines = 0  # >= 0; of eval_data, from its start; 0: all
label_field = "labels"  # words: the field of JSONL lines that holds the labels
label_column = -1  # != 0; words: the column of a CoNLL file that holds the label, -1 is the last
prefix = ""  # texts: prefix + text (+ separator + text_pair) + suffix, saved with the model
suffix = ""
separator: str | None = None  # None: the tokenizer's SEP, or a line break where it has none
max_length = 512  # >= 1; tokens of a text; what is longer loses its last words
# batch, in texts
batch_size = 8  # >= 1; of one step, over all devices and micro-batches
device_batch_size = 8  # >= 1; of one forward on one device
# length: one of these two is the horizon of the schedule
max_steps: int | None = None  # >= 1
num_epochs: float | None = None  # > 0
stop_step: int | None = None  # >= 1; ends the run before its horizon
# optimizer
learning_rate = 5e-4  # >= 0
min_lr = 0.0  # >= 0
weight_decay = 0.0  # >= 0; of matrices, not of biases and norms
beta1 = 0.9  # >= 0 and < 1
beta2 = 0.999  # >= 0 and < 1
adam_eps = 1e-8  # > 0
grad_clip = 1.0  # >= 0; the gradient's largest norm; 0: any
schedule = "linear"  # one of linear, cosine, constant; after the warmup
warmup_steps: int | None = None  # >= 0; in steps or as a share of the run
warmup_ratio: float | None = None  # >= 0 and <= 1
# evaluation and checkpoints
eval_interval = 500  # >= 0; steps; 0: never
log_interval = 10  # >= 1
save_interval = 1000  # >= 1; steps; the last step is always saved
keep_last = 1  # >= 0; checkpoints that can be resumed; 0: all
keep_best = False  # True: the one with the lowest eval loss, too
patience = 0  # >= 0; evaluations without a lower loss that end the run; 0: any number
resume = False
force_resume = False  # with other data, batch, LoRA, .. than the run began with
tracker = ""  # one of "", wandb, tensorboard
# device
dtype = "auto"  # one of auto, bf16, fp32; bf16 by autocast, what trains in fp32; auto: if fast
compile = False  # each block, by torch.compile
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, 1/3 slower
fsdp = ""  # one of "", full; full shards weights, gradients and optimizer state
deterministic = False  # bit-equal runs on CUDA too, slower
seed = 1337  # >= 0 and < 1e18
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run, largest device_batch_size
show_batch = False  # print the first texts, and what is read for each label


# ---- the batch ----


@dataclass
class Batch:
    """Texts end to end as one packed micro-batch of T tokens, with L labels of words or texts."""

    tokens: torch.Tensor  # [T] int64
    seqs: Seqs
    units: Pool  # which tokens make each of the L words or texts
    targets: torch.Tensor  # [L] int64 for softmax, else fp32
    kept: torch.Tensor  # [L] int64, their places among all words or texts of the batch

    def to(self, device):
        """-> the arguments of Classifier.forward, on the device."""
        return move([self.tokens, self.seqs, self.units, self.targets], device)


def make_batch(examples, tokenizer, s):
    """-> Batch, on the CPU. For examples see labels.py."""
    if s.task == "words":
        encoded = tokenize_words(tokenizer, [e["words"] for e in examples], s.max_length)
        tokens, seqs, _ = pack([(ids, (0, len(ids))) for ids, _, _ in encoded], "cpu")
        units, kept = pack_words(encoded, examples, s)
    else:
        texts = join_texts(examples, tokenizer, s)
        encoded = tokenize(tokenizer, texts, "", Template(s.prefix, s.suffix), s.max_length)
        (tokens, seqs, units), kept = pack(encoded, "cpu"), torch.arange(len(examples))
    targets = torch.tensor([target for e in examples for target in e["targets"]])
    return Batch(tokens, seqs, units, targets[kept], kept)


def pack_words(encoded, examples, s):
    """What `tokenize_words` returned -> (Pool, kept [L]: the places among all words of those that
    have a token). Its `rows` [P] are the positions that are read, and its other indices are into
    these P: a word is to them what a text is to a packed row."""
    # without a BOS, the text's first token has no position before it
    back = int(s.label_position == "next_token")
    rows, words, start, first_word = [], [], 0, 0
    for (ids, places, word_of), example in zip(encoded, examples):
        rows.append(np.maximum(places - back, 0) + start)
        words.append(word_of + first_word)
        start, first_word = start + len(ids), first_word + len(example["words"])
    rows, words = torch.from_numpy(np.concatenate(rows)), np.concatenate(words)  # [P] each
    kept, first, word, count = map(torch.from_numpy, np.unique(words, True, True, True))
    units = Pool(text=word, place=torch.ones_like(word), rows=rows, first=first,
                 last=first + count - 1, count=count, lengths=count.tolist())  # fmt: skip
    return units, kept


def pooling_of(s):
    """How the tokens of a word or a text become one vector, see pooling.pool."""
    return s.pooling if s.task == "texts" else "mean" if s.merge_subwords else "cls"


def examples_of(step, examples, s):
    """The texts of a step, over all ranks."""
    return [examples[i] for i in rows_of_step(step, s.batch_size, len(examples), s.seed)[1]]


def train_batches(examples, first_step, tokenizer, s):
    """For each step, the list of this rank's micro-batches: every world_size-th text of it."""
    n = s.device_batch_size
    for step in range(first_step, s.stop_step):
        share = examples_of(step, examples, s)[s.rank :: s.world_size]
        yield [make_batch(share[i : i + n], tokenizer, s) for i in range(0, len(share), n)]


def show_texts(examples, tokenizer, s):
    """Prints texts as a reader wants them, and each label with the tokens that are read for it."""
    for i, example in enumerate(examples):
        batch, labels = make_batch([example], tokenizer, s), labels_of(example)
        units, n = batch.units, len(batch.units.text)
        print(f"--- text {i}: {len(batch.tokens)} tokens: {tokenizer.decode(batch.tokens)}")
        # which of the tokens have a weight in each word or text [L, P]
        is_read = pool(torch.eye(n), units, pooling_of(s)) > 0
        for place, tokens in zip(batch.kept, is_read):
            print(f"{labels[place]}: {tokenizer.decode(batch.tokens[units.rows[tokens]])!r}")


# ---- model and loss ----


def loss_of(logits, targets, s):
    """(sum of losses, hits) of L examples, in fp32. logits [L, K], or [L, 1] for bce and mse.

    softmax: -log softmax(z)[y]
    bce:     -(w y log sigmoid(z) + (1 - y) log(1 - sigmoid(z))), w = pos_weight
    mse:     (z - y)^2, without hits
    """
    if s.loss_kind == "softmax":
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss, (logits.argmax(1) == targets).sum()
    z = logits[:, 0]
    if s.loss_kind == "mse":
        return (z - targets).square().sum(), z.new_zeros(())
    weight = z.new_tensor(s.pos_weight)
    loss = F.binary_cross_entropy_with_logits(z, targets, pos_weight=weight, reduction="sum")
    return loss, ((z > 0) == (targets > 0.5)).sum()


class Classifier(nn.Module):
    """hidden states -> a word's or a text's vector -> dropout -> linear. It is a module so that all
    that has parameters runs in one forward call.

    head: the model's dense, gelu and norm, which masked language modelling has trained, for
    prediction_head; None where there are none: then fresh ones.
    """

    def __init__(self, model, head, s):
        super().__init__()
        self.model, self.s, c = model, s, model.config
        if s.prediction_head and not c.family.startswith("modernbert"):
            raise SystemExit(f"prediction_head=True is for ModernBERT, this is a {c.family}")
        if s.prediction_head and head is None:
            head = Head(c)
            nn.init.normal_(head.dense.weight, 0.0, 0.02)
        # a bias where transformers' classes have one
        bias = s.task == "words" or c.family in ("modernbert", "neobert") or c.head_dense_bias
        linear = nn.Linear(c.n_embd, len(s.labels) or 1, bias)
        nn.init.normal_(linear.weight, 0.0, 0.02)
        if bias:
            nn.init.zeros_(linear.bias)
        head = head if s.prediction_head else nn.Identity()
        self.last_layers = nn.ModuleDict({"head": head, "linear": linear}).float()

    def forward(self, tokens, seqs, units, targets):
        """The tensors of a Batch -> (sum of losses, hits, logits [L, K] without a gradient)."""
        s, head, linear = self.s, *self.last_layers.values()
        hidden = self.model(tokens, seqs)  # [T, C]
        with torch.autocast(hidden.device.type, enabled=False):
            # where transformers has its prediction head: on every token, on the pooled vector
            words = s.task == "words"
            x = head(hidden[units.rows].float()) if words else hidden
            x = pool(x, units, pooling_of(s))  # [L, C], fp32
            x = x if words else head(x)
            logits = linear(F.dropout(x, s.dropout, self.training))  # [L, K]
            return *loss_of(logits, targets, s), logits.detach()


# ---- evaluation ----


@torch.no_grad()
def evaluate(classifier, examples, tokenizer, s):
    """-> {"n", "missing" (words without a token), "loss", and the metrics of metrics.py} of all
    examples; each rank takes its share."""
    # a sentence has as many numbers as words, a text has one: where the first of each stands
    first = np.cumsum([0, *(len(e["lines"]) for e in examples)])  # and the end, which is N
    logits = torch.full((first[-1], len(s.labels) or 1), -math.inf, device=s.device)  # [N, K]
    loss, n = 0.0, s.device_batch_size
    classifier.eval()
    for i in range(s.rank * n, len(examples) + s.rank * n, s.world_size * n):
        part = examples[i : i + n]
        # FSDP's forward is collective: a rank without a part runs as many as the others
        batch = make_batch(part or examples[:1], tokenizer, s)
        with s.autocast():
            batch_loss, _, found = classifier(*batch.to(s.device))
        if part:
            loss += batch_loss.item()
            logits[batch.kept + first[i]] = found
    classifier.train()
    if s.world_size > 1:
        dist.all_reduce(logits, dist.ReduceOp.MAX)
    (loss,) = common.all_reduce_sum([loss])
    n, logits = len(logits), logits.cpu().numpy()
    if s.task == "words":
        best = np.where(np.isinf(logits[:, 0]), -1, logits.argmax(1))  # -1: a word without a token
        best = np.split(best, first[1:-1])
        metrics, missing = score_words(examples, best, s.labels)
    else:
        metrics, missing = score_texts(examples, logits, s.loss_kind), 0
    return {"n": n, "missing": missing, "loss": loss / (n - missing or 1)} | metrics


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    if s.task == "words" and s.loss_kind != "softmax":
        raise SystemExit(f"loss_kind={s.loss_kind!r} is for texts; words have softmax")
    if s.lora_rank and not s.freeze_backbone:
        raise SystemExit("LoRA freezes the backbone, freeze_backbone=False does not")

    # ---- data ----
    s.labels = list(s.label_names)
    examples, eval_data = read_examples(s.data, s), s.eval_data if s.eval_interval else ""
    eval_examples = read_examples(eval_data, s, s.eval_lines) if eval_data else []
    n_micro = common.count_micro_batches(s, "size")
    optim.set_lengths(s, len(examples), s.batch_size)
    print0(
        f"{s.data}: {len(examples):,} texts and {len(eval_examples):,} for evaluation, "
        f"{len(s.labels)} labels {' '.join(s.labels[:50])}\n"
        f"a step: {s.device_batch_size} texts x {n_micro} micro-batches x {s.world_size} ranks = "
        f"{s.batch_size} texts\n{s.stop_step:,} steps = "
        f"{s.stop_step * s.batch_size / len(examples):.2f} epochs; warmup {s.warmup:,} steps"
    )

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)
    model, base, adapters = lora.load_for_training(s, last, s.attention)
    parts = [resolve_folder(name) for name in (base, *adapters)]
    sources = [part for part in parts if os.path.exists(f"{part}/tokenizer.json")]
    # an adapter may have added a token
    tokenizer = load_tokenizer(s.tokenizer or (sources or parts[:1])[-1])
    check_tokenizer(tokenizer, model.config.vocab_size)
    if s.task == "texts" and s.separator is None:
        s.separator = tokenizer.sep_token or "\n"
    if s.task == "texts" and s.pooling == "last" and not s.suffix and not puts_end(tokenizer):
        print0("pooling='last' reads a text's last word: no end token, see the key suffix")
    head = model.head
    model.drop_head()
    lora.add_lora(model, s, last)
    if s.freeze_backbone and not s.lora_rank:
        model.requires_grad_(False)
        model.set_dropout(0.0, 0.0)  # its features are those of use
    classifier = Classifier(model, head, s).to(s.device)
    if last:
        classifier.last_layers.load_state_dict(folders.read_classifier(last, s)[1])
    common.place(model, s)
    print0(f"{model.describe()}\n{s.compute_dtype} on {s.device}; the last layers train, too")
    print0(folders.describe_saved(model.config, s))
    if s.show_batch:
        show_texts(examples_of(0, examples, s)[:4], tokenizer, s)
        raise SystemExit

    # ---- compile, FSDP/DDP, optimizer, resume ----
    wrapped = common.wrap(classifier, model.blocks, s)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizers = optim.make_optimizers(classifier, s)
    step, best = checkpoint.load_state(last, optimizers)

    def save():
        weights = checkpoint.full_state_dict(model)
        last_layers = checkpoint.full_state_dict(classifier.last_layers)
        with checkpoint.saving(s, step, best, optimizers) as folder:
            if folder and s.lora_rank:
                lora.save_adapter(model, f"{folder}/adapter", base, weights, adapters)
            if folder:
                merged = lora.merged_state(model, weights, base, adapters)
                folders.save_classifier(folder, model.config, tokenizer, s, merged, last_layers)

    def trial(n):  # forward and backward of n texts, for DDP's buckets and the dry run
        batch = make_batch((examples[:n] * n)[:n], tokenizer, s)
        with s.autocast():
            wrapped(*batch.to(s.device))[0].backward()
        wrapped.zero_grad(set_to_none=True)

    # ---- loop ----
    metrics = "loss acc f1 precision recall mcc ndcg pearson spearman".split()
    columns = ["loss", "acc", "gnorm", "lr", "ex_s", "tok_s", *(f"eval_{m}" for m in metrics)]
    log, rates = common.open_log(s, columns, step), common.Rates()
    stop_requested = common.catch_stop(s)
    batches = prefetch(train_batches(examples, step, tokenizer, s))
    common.settle_buckets(wrapped, trial, 1)

    while step < s.stop_step:
        start = time.perf_counter()
        micro_batches = next(batches)
        lr = optim.learning_rate_at(step, s)
        common.seed_step(s.seed, step, s.rank)  # dropout is a function of (seed, step, rank)
        counts = np.sum([[len(b.targets), len(b.tokens)] for b in micro_batches], axis=0)
        n_labels, n_tokens, stopping = common.all_reduce_sum([*counts, stop_requested()])
        if stopping:
            save()
            break

        n_labels = max(n_labels, 1)
        total = common.zeros(2, s.device)  # loss and hits of this rank
        for i, batch in enumerate(micro_batches):
            common.sync_gradients(wrapped, i == len(micro_batches) - 1)
            with s.autocast():
                loss, hits, _ = wrapped(*batch.to(s.device))
            total += torch.stack((loss.detach(), hits))
            # the mean over all ranks' and micro-batches' labels; DDP and FSDP divide by the ranks
            (loss * (s.world_size / n_labels)).backward()
        gnorm = optim.clip_gradients(trained, s.grad_clip)
        loss, hits = (x / n_labels for x in common.all_reduce_sum(total.tolist()))

        if math.isfinite(loss + gnorm):
            optim.update(optimizers, lr)
        else:
            lines = [e["lines"][0] for e in examples_of(step, examples, s)]
            message = f"Lines of {s.data}: {common.shown(lines)}"
            common.bad_step(s, step, loss, gnorm, message)
        classifier.zero_grad(set_to_none=True)
        step += 1

        if s.dry_run:
            if step < min(2, s.stop_step):  # the first is slow: allocation, compilation
                continue
            common.report_dry_run(s, start, {"tok": n_tokens, "ex": s.batch_size},
                                  "device_batch_size", trial, s.device_batch_size)  # fmt: skip
            break
        last_step, improved = step == s.stop_step, False
        rates.add(start, ex_s=s.batch_size, tok_s=n_tokens)
        if step % s.log_interval == 0 or last_step:
            acc = None if s.loss_kind == "mse" else hits
            log(step, {"loss": loss, "acc": acc, "gnorm": gnorm, "lr": lr} | rates.read())
        if eval_examples and (step % s.eval_interval == 0 or last_step):
            found = evaluate(classifier, eval_examples, tokenizer, s)
            folders.write_results(found, s)
            log(step, {f"eval_{m}": found.get(m) for m in metrics})
            if improved := found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
            elif checkpoint.is_patience_over(s, step, best):
                s.stop_step, last_step = step, True
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()

    # ---- clean-up ----
    common.finish(s, step, batches)
