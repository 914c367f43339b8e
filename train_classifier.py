"""
Train a classifier: a label for each word (part of speech, chunks, names), or one for a text or a
pair of texts (classes, a yes or no as rerankers give it, a number).

    python train_classifier.py configs/classifier_pos_ud.py            # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=8 train_classifier.py configs/classifier_reranker.py
    python train_classifier.py configs/x.py --resume=True              # go on where it stopped
    python -m evals.classifier --model=out/x --eval_data=test.jsonl    # a saved one on other data

Words are tokenized together, joined by spaces; a word's vector is the mean of its tokens', read
where they stand or one position before (LLM2Vec's word tasks, arXiv 2404.05961, section 4.1: a
frozen model and one linear layer). Texts are pooled as embeddings are (cross-encoders: Nogueira and
Cho 2019, arXiv 1901.04085). What is saved is transformers' ...ForTokenClassification or
...ForSequenceClassification where these compute the same; where they do not, the script says why.
"""

import math
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import checkpoint
import common
import lora
import optim
from attention import Seqs
from common import prefetch, print0
from embedder import Pool, pack, pool
from formats import classifier as folders
from formats.huggingface import resolve_folder
from labels import label_set, number_labels, read_texts, read_words
from metrics import score_texts, score_words
from model import Head
from order import rows_of_step
from tokenizer import (
    Template,
    check_tokenizer,
    load_tokenizer,
    tokenize,
    tokenize_words,
    whole_backend,
)

# ---- defaults ----
out_dir = "out/classifier"
task = "words"  # words: a label for each word; texts: one for a text or a pair of texts
# model
init_from = ""  # a model folder, an adapter's, an out_dir, or a hub id owner/name[@revision]
adapters: tuple[str, ...] = ()  # PEFT folders or hub ids merged into it first (LLM2Vec's MNTP)
attention: str | None = None  # causal or bidirectional; None: the model's own
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
attn_dropout: float | None = None  # of attention probabilities; None: the model's own
freeze_backbone = True  # the last layers alone train; with LoRA, the adapter too
# LoRA; rank 0: none
lora_rank = 0
lora_alpha = 32.0
lora_dropout = 0.05
lora_targets = "all"  # or names: "q_proj,v_proj"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# classifier
dropout = 0.1  # in front of the last linear layer
prediction_head = False  # ModernBERT's dense, gelu, norm in front of it, as transformers has it
label_position = "same_token"  # next_token: a word is read one position before (MNTP models)
merge_subwords = True  # words: the mean of a word's tokens; False: its first token
pooling = "mean"  # texts: mean, weighted_mean, last, cls
loss_kind = "softmax"  # texts: softmax (classes), bce (yes or no: rerankers), mse (a number)
pos_weight = 1.0  # bce: weight of the examples whose label is 1, e.g. negatives / positives
label_names: tuple[str, ...] = ()  # softmax: in the order of the outputs; (): those of data, sorted
# data: see read_words and read_texts in data.py
data = "data/ud/train.jsonl"  # words: JSONL, or columns as CoNLL has them; texts: JSONL
eval_data = "data/ud/val.jsonl"  # "": none
eval_lines = 0  # of eval_data, from its start; 0: all
label_field = "labels"  # words: the field of JSONL lines that holds the labels
label_column = -1  # words: the column of a CoNLL file that holds the label, -1 is the last
prefix = ""  # texts: prefix + text (+ separator + text_pair) + suffix, saved with the model
suffix = ""
separator: str | None = None  # None: the tokenizer's SEP, or a line break where it has none
max_length = 512  # tokens of a text; what is longer loses its last words
# batch, in texts
batch_size = 8  # of one step, over all devices and micro-batches
device_batch_size = 8  # of one forward on one device
# length: one of these two is the horizon of the schedule
max_steps: int | None = None
num_epochs: float | None = None
stop_step: int | None = None  # ends the run before its horizon
# optimizer
learning_rate = 5e-4
min_lr = 0.0
weight_decay = 0.0  # of tensors with two dimensions or more
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0  # largest norm of the gradient; 0: none
schedule = "linear"  # linear, cosine, constant
warmup_steps: int | None = None  # warmup: in steps or as a share of the run; None: none
warmup_ratio: float | None = None
# evaluation and checkpoints
eval_interval = 500  # steps; 0: never
log_interval = 10
save_interval = 1000  # steps; the last step is always saved
keep_last = 1  # checkpoints that can be resumed; 0: all
keep_best = False  # True: the one with the lowest eval loss stays too
resume = False
tracker = ""  # wandb or tensorboard
# device
dtype = "auto"  # bf16 (autocast, trained weights in fp32), fp32, or what the device is good at
compile = False  # torch.compile of each block
gradient_checkpointing = False  # recompute each block in the backward pass: less memory, 1/3 slower
fsdp = ""  # full: weights, gradients and optimizer state are sharded over the ranks
deterministic = False  # bit-equal runs on CUDA too, slower
seed = 1337
# look, and do not train
dry_run = False  # two steps: memory, speed, time of the whole run, largest device_batch_size
show_batch = False  # print the first texts as a reader wants them


# ---- data ----
# An example is a dictionary. Words: {"words", "labels", "lines"}, a line for each word.
# Texts: {"text", "pair" or None, "label", "lines"}. number_labels adds "targets" to both.


def read_examples(path, s, n_lines=0):
    """The examples of a file, or of its first n_lines lines."""
    if s.task == "words":
        examples = read_words(path, s.label_field, s.label_column)
    else:
        examples = read_texts(path, s.loss_kind)
    examples = [e for e in examples if not n_lines or e["lines"][0] <= n_lines]
    if not examples:
        raise SystemExit(f"{path}: there is no example in its first {n_lines} lines")
    return examples


# ---- batch ----


@dataclass
class Words:
    """Which tokens of a packed row make which word: P tokens, L words that have one."""

    rows: torch.Tensor  # [P] int64, positions that are read
    word: torch.Tensor  # [P] int64, the word of each, 0..L-1
    count: torch.Tensor  # [L] int64, tokens of each word


@dataclass
class Batch:
    """Texts end to end as one packed micro-batch of T tokens, with L labels of words or texts."""

    tokens: torch.Tensor  # [T] int64
    seqs: Seqs
    units: Words | Pool  # which tokens make each of the L words or texts
    targets: torch.Tensor  # [L] int64 for softmax, else fp32
    kept: np.ndarray  # [L] their places among all words or texts of the batch

    def to(self, device):
        """-> the arguments of Classifier.forward, on the device."""
        tensors = {name: x for name, x in vars(self.units).items() if torch.is_tensor(x)}
        units = replace(self.units, **{name: x.to(device) for name, x in tensors.items()})
        return self.tokens.to(device), self.seqs.to(device), units, self.targets.to(device)


def make_batch(examples, tokenizer, s):
    """-> Batch, on the CPU."""
    if s.task == "words":
        encoded = tokenize_words(tokenizer, [e["words"] for e in examples], s.max_length)
        units, kept = words_of(encoded, [len(e["words"]) for e in examples], s)
        tokens, seqs, _ = pack([(ids, (0, len(ids))) for ids, _, _ in encoded], "cpu")
    else:
        texts, template = join_texts(examples, tokenizer, s), Template(s.prefix, s.suffix)
        encoded = tokenize(tokenizer, texts, "", template, s.max_length)
        (tokens, seqs, units), kept = pack(encoded, "cpu"), np.arange(len(examples))
    classes = s.loss_kind == "softmax"
    targets = [y for e in examples for y in (e["targets"] if classes else [e["label"]])]
    targets = torch.tensor(targets, dtype=torch.int64 if classes else torch.float32)
    return Batch(tokens, seqs, units, targets[kept], kept)


def words_of(encoded, n_words, s):
    """What `tokenize_words` returned, and how many words each sentence has -> (Words, kept [L]:
    the places of the words that have a token among all)."""
    # without a BOS, the text's first token has no position before it
    back = 1 if s.label_position == "next_token" else 0
    rows, words, start, first_word = [], [], 0, 0
    for (ids, places, word_of), n in zip(encoded, n_words, strict=True):
        rows.append(np.maximum(places - back, 0) + start)
        words.append(word_of + first_word)
        start, first_word = start + len(ids), first_word + n
    rows, words = np.concatenate(rows), np.concatenate(words)  # [P], words ascending
    kept, first_token, word, count = np.unique(words, True, True, True)
    if not s.merge_subwords:
        rows, word, count = rows[first_token], np.arange(len(kept)), np.ones_like(count)
    return Words(*(torch.from_numpy(x.astype(np.int64)) for x in (rows, word, count))), kept


def join_texts(examples, tokenizer, s):
    """text, or text + separator + pair. What is too long loses the last tokens of the first, which
    keeps half of the room; then `tokenize` cuts the second."""
    backend, joined = whole_backend(tokenizer), []
    room = s.max_length - len(backend.encode(s.prefix + s.separator + s.suffix))
    for text, pair in ((e["text"], e["pair"]) for e in examples):
        if pair is not None:
            first, second = (backend.encode(x, add_special_tokens=False) for x in (text, pair))
            keep = max(room - len(second), room // 2)
            if len(first) > keep > 0:
                text = text[: first.offsets[keep - 1][1]]
            text += s.separator + pair
        joined.append(text)
    return joined


def train_batches(examples, first_step, tokenizer, s):
    """For each step, the list of this rank's micro-batches: every world_size-th text of it."""
    n = s.device_batch_size
    for step in range(first_step, s.stop_step):
        rows = rows_of_step(step, s.batch_size, len(examples), s.seed)[1][s.rank :: s.world_size]
        parts = [rows[i : i + n] for i in range(0, len(rows), n)]
        yield [make_batch([examples[i] for i in part], tokenizer, s) for part in parts]


def show_texts(examples, tokenizer, s):
    """Prints texts as a reader wants them: what is read for a label stands inverted."""
    batch, start = make_batch(examples, tokenizer, s), 0
    pieces, rows = [tokenizer.decode([i]) for i in batch.tokens.tolist()], batch.units.rows
    if s.task == "texts":
        rows = {"cls": batch.units.first, "last": batch.units.last}.get(s.pooling, rows)
    for row in set(rows.tolist()):
        pieces[row] = f"\033[7m{pieces[row]}\033[0m"
    if s.task == "words":
        labels = np.concatenate([e["labels"] for e in examples])[batch.kept]
        for row, word in zip(rows.tolist(), batch.units.word.tolist(), strict=True):
            pieces[row] += f"<{labels[word]}>"
    for i, (n, example) in enumerate(zip(batch.seqs.lengths, examples, strict=True)):
        label = f", label {example['label']}" if s.task == "texts" else ""
        print(f"--- text {i}: {n} tokens{label}")
        print("".join(pieces[start : start + n]))
        start += n


# ---- model and loss ----


def mean_of_words(x, words):
    """x [P, C], the vectors of tokens -> [L, C], the mean of each word."""
    sums = x.new_zeros(len(words.count), x.size(1)).index_add(0, words.word, x)
    return sums / words.count[:, None]


def loss_of(logits, targets, s):
    """(sum of losses, hits) of L examples, in fp32. logits [L, K], or [L, 1] for bce and mse.

    softmax: -log softmax(z)[y]
    bce:     -(w y log sigmoid(z) + (1 - y) log(1 - sigmoid(z))), w = pos_weight
    mse:     (z - y)^2, without hits
    """
    if s.loss_kind == "softmax":
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss, (logits.argmax(1) == targets).sum()
    z, y = logits[:, 0], targets.to(logits.dtype)
    if s.loss_kind == "bce":
        weight = z.new_tensor(s.pos_weight)
        loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="sum")
        return loss, ((z > 0) == (y > 0.5)).sum()
    return (z - y).square().sum(), torch.zeros((), device=z.device)


def take_head(model, s):
    """Takes the language modelling head off the model -> with prediction_head its dense, gelu and
    norm, which masked language modelling has trained, or fresh ones where there are none."""
    c, head = model.config, nn.Identity()
    if s.prediction_head:
        if not c.family.startswith("modernbert"):
            raise SystemExit(f"prediction_head=True is for ModernBERT, this is a {c.family}")
        head = model.head or Head(c)
        if model.head is None:
            nn.init.normal_(head.dense.weight, 0.0, 0.02)
    model.drop_head()
    return head.float()


class Classifier(nn.Module):
    """hidden states -> a word's or a text's vector -> dropout -> linear. It is a module so that all
    that has parameters runs in one forward call. head: what take_head gave."""

    def __init__(self, model, head, s):
        super().__init__()
        c, self.model, self.s = model.config, model, s
        self.frozen = not any(p.requires_grad for p in model.parameters())
        linear = nn.Linear(c.n_embd, len(s.labels) or 1, bias=folders.has_bias(c, s))
        nn.init.normal_(linear.weight, 0.0, 0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        self.last_layers = nn.ModuleDict({"head": head, "linear": linear})

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:  # its features are those of use, without dropout
            self.model.eval()
        return self

    def forward(self, tokens, seqs, units, targets=None):
        """The tensors of a Batch -> logits [L, K], with targets (sum of losses, hits)."""
        s, head, linear = self.s, *self.last_layers.values()
        hidden = self.model(tokens, seqs)  # [T, C]
        with torch.autocast(hidden.device.type, enabled=False):
            # where transformers has its prediction head: on every token, on the pooled vector
            if s.task == "words":
                x = head(hidden[units.rows].to(linear.weight.dtype))  # [P, C], fp32
                x = mean_of_words(x, units)  # [L, C]
            else:
                x = head(pool(hidden, units, s.pooling))  # [B, C]
            logits = linear(F.dropout(x, s.dropout, self.training))  # [L, K]
            return logits if targets is None else loss_of(logits, targets, s)


# ---- evaluation ----


@torch.no_grad()
def evaluate(classifier, examples, tokenizer, s):
    """-> {"n", "missing" (words without a token), "loss", and the metrics of metrics.py} of all
    examples; each rank takes its share."""
    sizes = [len(e["lines"]) for e in examples]  # a sentence has as many words, a text counts 1
    places = np.split(np.arange(sum(sizes)), np.cumsum(sizes[:-1]))  # of an example among all N
    logits = torch.full((sum(sizes), len(s.labels) or 1), -math.inf, device=s.device)  # [N, K]
    loss, share = 0.0, range(s.rank, len(examples), s.world_size)
    classifier.eval()
    for i in range(0, math.ceil(len(examples) / s.world_size), s.device_batch_size):
        rows = share[i : i + s.device_batch_size]
        # FSDP's forward is collective: a rank without rows runs as many as the others
        batch = make_batch([examples[row] for row in rows or [0]], tokenizer, s)
        *inputs, targets = batch.to(s.device)
        with s.autocast():
            found = classifier(*inputs)  # [L, K]
        if rows:
            loss += loss_of(found, targets, s)[0].item()
            logits[np.concatenate([places[row] for row in rows])[batch.kept]] = found
    classifier.train()
    if s.world_size > 1:
        dist.all_reduce(logits, dist.ReduceOp.MAX)
    (loss,) = common.all_reduce_sum([loss])
    n, logits = len(logits), logits.cpu().numpy()
    if s.task == "texts":
        return {"n": n, "loss": loss / n} | score_texts(examples, logits, s.loss_kind)
    best = np.where(np.isinf(logits[:, 0]), -1, logits.argmax(1))  # -1: a word without a token
    metrics, missing = score_words(examples, [best[words] for words in places], s.labels)
    return {"n": n, "missing": missing, "loss": loss / max(n - missing, 1)} | metrics


if __name__ == "__main__":
    # ---- configure, ranks and seed ----
    s = common.start(common.configure(globals()))
    common.one_of(s, task=("words", "texts"), loss_kind=("softmax", "bce", "mse"),
                  label_position=("same_token", "next_token"),
                  pooling=("mean", "weighted_mean", "last", "cls"))  # fmt: skip
    if s.task == "words" and s.loss_kind != "softmax":
        raise SystemExit(f"loss_kind={s.loss_kind!r}: words have the labels of softmax")
    if s.lora_rank and not s.freeze_backbone:
        raise SystemExit("LoRA freezes the backbone, freeze_backbone=False does not")

    # ---- data ----
    examples, eval_examples = read_examples(s.data, s), []
    if s.eval_data and s.eval_interval:
        eval_examples = read_examples(s.eval_data, s, s.eval_lines)
    s.labels = []  # a number has none
    if s.loss_kind == "softmax":
        s.labels = list(s.label_names) or label_set(examples)
        number_labels(examples, s.labels, s.data)
        number_labels(eval_examples, s.labels, s.eval_data)
    n_micro = common.count_micro_batches(s, "size")
    optim.set_lengths(s, len(examples), s.batch_size)
    print0(
        f"{s.data}: {len(examples):,} texts and {len(eval_examples):,} for evaluation, "
        f"{len(s.labels)} labels {' '.join(s.labels[:50])}\n"
        f"a step: {s.device_batch_size} texts x {n_micro} micro-batches x {s.world_size} ranks = "
        f"{s.batch_size} texts; {s.stop_step:,} steps = "
        f"{s.stop_step * s.batch_size / len(examples):.2f} epochs; warmup {s.warmup:,} steps"
    )

    # ---- model (+ LoRA) ----
    last = checkpoint.find(s)
    model, base, adapters = lora.load_for_training(s, last, s.attention)
    sources = [resolve_folder(name) for name in (base, *adapters)]  # an adapter may add a token
    sources[1:] = [f for f in sources[1:] if os.path.exists(os.path.join(f, "tokenizer.json"))]
    tokenizer = load_tokenizer(last or sources[-1])
    check_tokenizer(tokenizer, model.config.vocab_size)
    if s.task == "texts" and s.separator is None:
        s.separator = tokenizer.sep_token or "\n"
    head = take_head(model, s)
    lora.add_lora(model, s, last)
    if s.freeze_backbone and not s.lora_rank:
        model.requires_grad_(False)
    classifier = Classifier(model, head, s)
    if last:
        classifier.last_layers.load_state_dict(folders.read_classifier(last, s)[1])
    common.place(model, s)
    classifier.to(s.device).train()
    print0(f"{model.describe()}, {s.compute_dtype} on {s.device}; the last layers train, too")
    print0(folders.describe_saved(tokenizer, model.config, s))
    if s.show_batch:
        rows = rows_of_step(0, s.batch_size, len(examples), s.seed)[1][:4]
        show_texts([examples[i] for i in rows], tokenizer, s)
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
                lora.save_adapter(model, os.path.join(folder, "adapter"), base, weights, adapters)
                weights = lora.merged_state(model, weights, base, adapters)
            if folder:
                folders.save_classifier(folder, model.config, tokenizer, s, weights, last_layers)

    def trial(n):  # forward and backward of n texts, for DDP's buckets and the dry run
        batch = make_batch([examples[i % len(examples)] for i in range(n)], tokenizer, s)
        with s.autocast():
            wrapped(*batch.to(s.device))[0].backward()
        wrapped.zero_grad(set_to_none=True)

    # ---- loop ----
    metrics = ["loss", "acc", "f1", "precision", "recall", "mcc", "ndcg", "pearson", "spearman"]
    columns = ["loss", "acc", "gnorm", "lr", "ex_s", "tok_s"] + [f"eval_{m}" for m in metrics]
    log, rates = common.open_log(s, columns, step), common.Rates()
    stop_requested, bad_steps = common.catch_stop(), 0
    batches = prefetch(train_batches(examples, step, tokenizer, s))
    common.settle_buckets(wrapped, trial, 1)

    while step < s.stop_step:
        start = time.perf_counter()
        micro_batches = next(batches)
        common.seed_step(s.seed, step, s.rank)  # dropout is a function of (seed, step, rank)
        lr = optim.learning_rate_at(step, s)
        n_labels = sum(len(batch.targets) for batch in micro_batches)
        n_tokens = sum(len(batch.tokens) for batch in micro_batches)
        counts = [n_labels, n_tokens, stop_requested()]
        n_labels, n_tokens, stopping = common.all_reduce_sum(counts)
        if stopping:
            save()
            print0("stopped; this goes on:", common.resume_command())
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
            rows = rows_of_step(step, s.batch_size, len(examples), s.seed)[1]
            message = f"Lines of {s.data}: {common.shown([examples[i]['lines'][0] for i in rows])}"
            bad_steps = common.bad_step(bad_steps, step, loss, gnorm, message)
        classifier.zero_grad(set_to_none=True)
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
            acc = None if s.loss_kind == "mse" else hits
            log(step, {"loss": loss, "acc": acc, "gnorm": gnorm, "lr": lr} | rates.read())
        if eval_examples and (step % s.eval_interval == 0 or last_step):
            found = evaluate(classifier, eval_examples, tokenizer, s)
            log(step, {f"eval_{m}": found.get(m) for m in metrics})
            if s.rank == 0:
                folders.write_results(found, s)
            improved = found["loss"] < best["loss"]
            if improved:
                best = {"loss": found["loss"], "folder": f"step{step}"}
        if step % s.save_interval == 0 or last_step or (improved and s.keep_best):
            save()

    # ---- clean-up ----
    batches.close()
    if dist.is_initialized():
        dist.destroy_process_group()
