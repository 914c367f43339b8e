"""
Train a classifier: a label for each word (part of speech, chunks, names), or one for a text or a
pair of texts (classes, a yes or no as rerankers give it, a number).

    python train_classifier.py configs/classifier_pos_ud.py            # one GPU, a Mac or the CPU
    torchrun --standalone --nproc_per_node=8 train_classifier.py configs/classifier_reranker.py
    python train_classifier.py configs/x.py --resume=True              # go on where it stopped
    python train_classifier.py --eval_only=True --init_from=out/x --eval_data=test.jsonl

Words are tokenized together, joined by spaces; a word's vector is the mean of its tokens', read
where they stand or one position before (LLM2Vec's word tasks, arXiv 2404.05961, section 4.1: a
frozen model and one linear layer). Texts are pooled as embeddings are (cross-encoders: Nogueira and
Cho 2019, arXiv 1901.04085). What is saved is transformers' ...ForTokenClassification or
...ForSequenceClassification where these compute the same; where not, it is said why.
"""

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import f1_score, matthews_corrcoef, ndcg_score
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import common
import lora
from data import (
    check_tokenizer,
    load_tokenizer,
    make_seqs,
    open_pairs,
    prefetch,
    read_jsonl,
    read_pair,
    require,
    rows_of_step,
)
from embedder import Template, merged_state, pack, pool, tokenize, whole_backend
from model import CLASSIFIERS, Head, choose_backend, from_pretrained, resolve_folder, write_folder

# ---- defaults ----
out_dir = "out/classifier"
task = "words"  # words: a label for each word; texts: one for a text or a pair of texts
# model
init_from = ""  # a model folder, an adapter's, an out_dir, or a hub id owner/name[@revision]
adapters: tuple = ()  # PEFT folders or hub ids merged into it first, in order (LLM2Vec's MNTP)
attention: str | None = None  # causal or bidirectional; None: the model's own
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
attn_dropout: float | None = None  # of attention probabilities; None: the model's own
freeze_backbone = True  # the last layers alone train; with LoRA, the adapter too
lora_rank = 0  # 0: no LoRA
lora_alpha = 32.0
lora_dropout = 0.05
lora_targets = "all"
train_also = ""  # trained whole beside LoRA: any of "embed,norm"
# classifier
dropout = 0.1  # in front of the last linear layer
prediction_head = False  # ModernBERT's dense, gelu, norm in front of it, as transformers has it
label_position = "same_token"  # next_token: a word is read one position before (MNTP models)
merge_subwords = True  # words: the mean of a word's tokens; False: its first token
pooling = "mean"  # texts: mean, weighted_mean, last, cls
loss_kind = "softmax"  # texts: softmax (classes), bce (yes or no: rerankers), mse (a number)
pos_weight = 1.0  # bce: weight of the examples whose label is 1, e.g. negatives / positives
label_names: tuple = ()  # of softmax, in the order of the outputs; (): those of `data`, sorted
# data
data = "data/ud/train.jsonl"  # words: JSONL or columns; texts: JSONL, see read_words, read_texts
eval_data = "data/ud/val.jsonl"  # "": none
label_field = "labels"  # words: the field of JSONL lines that holds the labels
label_column = -1  # words: the column of a CoNLL file that holds the label, -1 is the last
prefix = ""  # texts: prefix + text (+ separator + text_pair) + suffix, saved with the model
suffix = ""
separator: str | None = None  # None: the tokenizer's SEP, or a line break where it has none
max_seq_len = 512  # tokens of a text; what is longer loses its last words
# batch
batch_size = 8  # texts of one step, over all devices and micro-batches
device_batch_size = 8  # texts of one forward on one device
# length
max_steps: int | None = None
num_epochs: float | None = 1.0
# optimizer
learning_rate = 5e-4
min_lr = 0.0
weight_decay = 0.0  # of tensors with two dimensions or more
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0  # largest norm of the gradient; 0: none
schedule = "linear"  # linear, cosine or constant, after the warmup
warmup_steps: int | None = None
warmup_ratio = 0.0
# evaluation and checkpoints
eval_only = False  # a saved classifier (init_from) on eval_data, into out_dir/results.json
eval_interval = 500  # steps; 0: never. The last step is evaluated, too
log_interval = 10
save_interval = 1000  # steps; the last step is always saved
keep_last = 1
keep_best = False  # True: the one with the lowest eval loss stays, too
resume = False
tracker = ""  # wandb or tensorboard
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


# ---- the data ----
# An example is a dictionary. Words: {"words", "labels", "lines"}, the line of each word for
# messages. Texts: {"text", "pair" or None, "label", "lines"}.


def read_words(path, field, column):
    """Examples of a .jsonl file of {"words": [..], field: [..]}, or of a CoNLL file: a word a line,
    columns apart by spaces or tabs, the word first, an empty line after each sentence."""
    examples = []
    if path.endswith((".json", ".conllu")):
        raise ValueError(f"{path}: expected .jsonl or columns; data/ud/prepare.py reads CoNLL-U")
    if path.endswith((".jsonl", ".jsonl.gz")):
        for line, record in read_jsonl(path):
            words, labels = (require(record, key, [str], path, line) for key in ("words", field))
            if not words or len(words) != len(labels):
                raise ValueError(
                    f"{path} line {line}: {len(words)} words and {len(labels)} in '{field}', "
                    "expected as many, and at least one"
                )
            examples.append({"words": words, "labels": labels, "lines": [line] * len(words)})
    else:
        words, labels, lines = [], [], []
        with open(path, encoding="utf-8") as f:
            for line, row in enumerate([*f, ""], 1):
                columns = row.rstrip("\r\n").split("\t") if "\t" in row else row.split()
                if columns and columns[0] != "-DOCSTART-":
                    if not -len(columns) < column < len(columns):
                        raise ValueError(
                            f"{path} line {line}: {len(columns)} columns, no label in {column}"
                        )
                    words.append(columns[0])
                    labels.append(columns[column])
                    lines.append(line)
                elif words:
                    examples.append({"words": words, "labels": labels, "lines": lines})
                    words, labels, lines = [], [], []
    if not examples:
        raise ValueError(f"{path}: there is no sentence in it")
    return examples


def read_texts(path, kind):
    """Examples of a JSONL file of {"text", "text_pair", "label"}, text_pair optional. label: a str
    or int for softmax, a number, for bce from 0 to 1. For bce also {"query", "pos", "neg"} lines,
    see data.read_pair: the query with each of its passages, 1 for pos, 0 for neg."""
    _, first = next(read_jsonl(path), (0, {}))
    examples = []
    if kind == "bce" and "label" not in first:
        file = open_pairs(path)
        for i in range(len(file)):
            pair, lines = read_pair(file, i), [int(file.numbers[i])]
            query = (pair["prompt"] or "") + pair["query"]
            for label, passages in ((1.0, pair["pos"]), (0.0, pair["neg"])):
                for text in passages:
                    examples.append({"text": query, "pair": text, "label": label, "lines": lines})
        return examples
    for line, record in read_jsonl(path):
        text, other = require(record, "text", str, path, line), None
        if record.get("text_pair") is not None:
            other = require(record, "text_pair", str, path, line)
        if kind == "softmax":
            type_ = int if type(record.get("label")) is int else str
            label = str(require(record, "label", type_, path, line))
        else:
            label = float(require(record, "label", float, path, line))
            if not math.isfinite(label) or (kind == "bce" and not 0 <= label <= 1):
                expected = "from 0 to 1" if kind == "bce" else "that is finite"
                raise ValueError(f"{path} line {line}: label {label}, expected one {expected}")
        examples.append({"text": text, "pair": other, "label": label, "lines": [line]})
    if not examples:
        raise ValueError(f"{path}: there is no line in it, expected JSONL")
    return examples


def labels_of(example):
    return example["labels"] if "labels" in example else [example["label"]]


def label_set(examples):
    """All labels, sorted; whole numbers by their value, so that 0, 1, .. are their outputs."""
    names = {label for example in examples for label in labels_of(example)}
    number = {name: int(name) for name in names if name.lstrip("-").isdecimal()}
    return sorted(names, key=lambda name: (name not in number, number.get(name, 0), name))


def number_labels(examples, names, path):
    """Adds "targets", the labels' numbers, to each example. ValueError for a label that is not in
    names, with its file and line."""
    number = {name: i for i, name in enumerate(names)}
    for example in examples:
        for label, line in zip(labels_of(example), example["lines"], strict=True):
            if label not in number:
                raise ValueError(
                    f"{path} line {line}: label {label!r} is none of the {len(names)} labels: "
                    f"{', '.join(names[:50])}"
                )
        example["targets"] = [number[label] for label in labels_of(example)]


# ---- the batch ----


@dataclass
class Words:
    """Which tokens of a packed row make which word: P tokens, L words that have one."""

    rows: torch.Tensor  # [P] int64, positions that are read
    word: torch.Tensor  # [P] int64, the word of each, 0..L-1
    count: torch.Tensor  # [L] int64, tokens of each word
    kept: np.ndarray  # [L] the places of the L words among all words of the batch


def tokenize_words(tokenizer, sentences, max_length):
    """Lists of words -> [(ids, places [P], words [P]), ..]: tokens that stand for a word, and it.

    A sentence is " ".join(words), tokenized once, in training and in use. A token belongs to the
    word of its last character, a space to the word behind it. With more than max_length tokens the
    sentence loses its last ones; the tokenizer's own EOS or SEP stays. So a word may have no token:
    it was cut off, or tokenizes to nothing.
    """
    backend, out = tokenizer.backend_tokenizer, []
    if backend.truncation is not None:  # only then: another thread may be encoding
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    encoded = backend.encode_batch([" ".join(words) for words in sentences])
    for words, e in zip(sentences, encoded, strict=True):
        sizes = [len(word) + (i > 0) for i, word in enumerate(words)]
        word_of = np.repeat(np.arange(len(words)), sizes)  # of each character
        ids, body = e.ids, len(e.ids)
        while body and e.special_tokens_mask[body - 1]:
            body -= 1
        starts, ends = np.array(e.offsets, dtype=np.int64).reshape(-1, 2).T
        places = np.flatnonzero(ends > starts)  # what the tokenizer adds itself ends at 0
        room = min(body, max_length - (len(ids) - body))
        if len(places) and room <= places[0]:
            raise ValueError(f"max_seq_len {max_length} leaves no room for the first word")
        places = places[places < room]
        # a row needs a token
        out.append((ids[: max(room, 0)] + ids[body:] or [0], places, word_of[ends[places] - 1]))
    return out


def pack_words(encoded, n_words, label_position, merge_subwords):
    """What `tokenize_words` returned -> (tokens [T] int64, seqs, Words), on the CPU. n_words: of
    each sentence."""
    lengths = [len(ids) for ids, _, _ in encoded]
    starts, first = np.cumsum([0, *lengths[:-1]]), np.cumsum([0, *n_words[:-1]])  # [B]
    # the text's first token has no position before it, where there is no BOS
    back = 1 if label_position == "next_token" else 0
    rows = [np.maximum(places - back, 0) + at
            for (_, places, _), at in zip(encoded, starts, strict=True)]  # fmt: skip
    words = [w + at for (_, _, w), at in zip(encoded, first, strict=True)]  # of the batch
    rows, words = np.concatenate(rows), np.concatenate(words)  # [P], words ascending
    kept, at, word, count = np.unique(words, True, True, True)
    if not merge_subwords:
        rows, word, count = rows[at], np.arange(len(kept)), np.ones_like(count)
    tokens = torch.from_numpy(np.concatenate([ids for ids, _, _ in encoded]).astype(np.int64))
    where = Words(*(torch.from_numpy(x.astype(np.int64)) for x in (rows, word, count)), kept)
    return tokens, make_seqs(lengths), where


def join_texts(examples, tokenizer, s):
    """text, or text + separator + pair. What is too long loses the last tokens of the first, which
    keeps half of the room; then `tokenize` cuts the second."""
    backend, out = whole_backend(tokenizer), []
    for text, other in ((e["text"], e["pair"]) for e in examples):
        if other is not None and len(text) + len(other) > s["max_seq_len"] // 2:  # few tokens else
            around = len(backend.encode(s["prefix"] + s["separator"] + s["suffix"]))
            room = s["max_seq_len"] - around
            first, second = (backend.encode(x, add_special_tokens=False) for x in (text, other))
            keep = max(room - len(second), room // 2)
            text = text[: first.offsets[keep - 1][1]] if len(first) > keep > 0 else text
        out.append(text if other is None else text + s["separator"] + other)
    return out


def make_batch(examples, tokenizer, s):
    """A packed micro-batch on the CPU -> (tokens [T], seqs, where, targets [L]). L are the words
    that have a token, or the texts; where: Words, or the embedder's Pool."""
    if s["task"] == "words":
        encoded = tokenize_words(tokenizer, [e["words"] for e in examples], s["max_seq_len"])
        how = [len(e["words"]) for e in examples], s["label_position"], s["merge_subwords"]
        tokens, seqs, where = pack_words(encoded, *how)
        targets = np.concatenate([e["targets"] for e in examples])[where.kept]
        return tokens, seqs, where, torch.from_numpy(targets)
    texts, template = join_texts(examples, tokenizer, s), Template(s["prefix"], s["suffix"])
    encoded = tokenize(tokenizer, texts, "", template, s["max_seq_len"])
    tokens, seqs, where = pack(encoded, "cpu")
    if s["loss_kind"] == "softmax":
        return tokens, seqs, where, torch.tensor([e["targets"][0] for e in examples])
    return tokens, seqs, where, torch.tensor([e["label"] for e in examples], dtype=torch.float32)


def train_batches(examples, first_step, last_step, tokenizer, settings):
    """For each step, this rank's micro-batches: every world_size-th text of the step."""
    s, n = settings, settings["device_batch_size"]
    for step in range(first_step, last_step):
        _, rows = rows_of_step(step, s["batch_size"], len(examples), s["seed"])
        mine = [examples[i] for i in rows[s["rank"] :: s["world_size"]]]
        yield [make_batch(mine[i : i + n], tokenizer, s) for i in range(0, len(mine), n)]


def to_device(batch, device):
    tokens, seqs, where, targets = batch
    seqs.cu_seqlens, seqs.positions = seqs.cu_seqlens.to(device), seqs.positions.to(device)
    for name, value in vars(where).items():
        if torch.is_tensor(value):
            setattr(where, name, value.to(device))
    return tokens.to(device), seqs, where, targets.to(device)


# ---- the model and its loss ----


def mean_of_words(x, where):
    """x [P, C], the tokens' -> [L, C], the mean of each word."""
    sums = x.new_zeros(len(where.count), x.size(1)).index_add(0, where.word, x)
    return sums / where.count[:, None]


def loss_of(logits, targets, kind, pos_weight):
    """(sum of losses, hits) of L examples, in fp32. logits [L, K], or [L, 1] for bce and mse.

    softmax: -log softmax(z)[y]
    bce:     -(w y log sigmoid(z) + (1 - y) log(1 - sigmoid(z))), w = pos_weight
    mse:     (z - y)^2, without hits
    """
    if kind == "softmax":
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss, (logits.argmax(1) == targets).sum()
    z, y = logits[:, 0], targets.to(logits.dtype)
    if kind == "bce":
        weight = z.new_tensor(pos_weight)
        loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="sum")
        return loss, ((z > 0) == (y > 0.5)).sum()
    return (z - y).square().sum(), torch.zeros((), device=z.device)


class Classifier(nn.Module):
    """hidden states -> a word's or a text's vector -> dropout -> linear. It is a module so that all
    that has parameters runs in one forward call."""

    def __init__(self, model, head, n_out, bias, settings):
        super().__init__()
        self.model, self.head, self.settings = model, head, settings
        self.linear = nn.Linear(model.config.n_embd, n_out, bias=bias)
        nn.init.normal_(self.linear.weight, 0.0, 0.02)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def train(self, mode=True):
        super().train(mode)
        if self.settings["frozen"]:  # its features are those of use, without dropout
            self.model.eval()
        return self

    def forward(self, tokens, seqs, where, targets=None):
        """A batch of make_batch -> logits [L, K], with targets (sum of losses, hits)."""
        s = self.settings
        hidden = self.model(tokens, seqs)  # [T, C]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            # where transformers has its prediction head: on every token, on the pooled vector
            if s["task"] == "words":
                x = hidden[where.rows].to(wide)  # [P, C]
                x = mean_of_words(self.head(x) if self.head else x, where)  # [L, C]
            else:
                x = pool(hidden, where, s["pooling"])  # [B, C]
                x = self.head(x) if self.head else x
            logits = self.linear(F.dropout(x, s["dropout"], self.training))  # [L, K]
            if targets is None:
                return logits
            return loss_of(logits, targets, s["loss_kind"], s["pos_weight"])


def learning_rate_at(step, max_steps, peak, floor, schedule, warmup):
    """A linear warmup, then linear, cosine or constant from peak to floor at max_steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(max_steps - warmup, 1)
    kept = {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "constant": 1.0}[schedule]
    return floor + (peak - floor) * kept


# ---- evaluation ----


def columns_of(settings):
    """Names of the metrics, beside the loss."""
    if settings["task"] == "words":
        spans = any(name[:2] in ("B-", "I-") for name in settings["labels"])
        return ["acc", "f1", "precision", "recall"] if spans else ["acc"]
    kinds = {"softmax": ["acc", "f1", "mcc"], "bce": ["acc", "f1", "ndcg"]}
    return kinds.get(settings["loss_kind"], ["pearson", "spearman"])


def score_words(examples, found, names):
    """found: for each example the numbers of its words' labels, -1 for a word without a token: that
    is counted wrong, and is outside of all entities. -> (metrics, how many such words)."""
    gold = [e["labels"] for e in examples]
    guess = [[names[i] if i >= 0 else None for i in f] for f in found]
    flat = [(g, p) for a, b in zip(gold, guess, strict=True) for g, p in zip(a, b, strict=True)]
    metrics = {"acc": sum(g == p for g, p in flat) / len(flat)}
    if any(name[:2] in ("B-", "I-") for name in names):
        both = gold, [["O" if p is None else p for p in row] for row in guess]
        for name, score in (("f1", entity_f1), ("precision", precision_score),
                            ("recall", recall_score)):  # fmt: skip
            metrics[name] = float(score(*both, zero_division=0))
    return metrics, sum(p is None for _, p in flat)


def score_texts(examples, logits, kind):
    """logits [n, K] of all examples -> metrics: accuracy, macro F1 and Matthews; for bce F1 of the
    1s at threshold 0 and nDCG@10 of the texts that share their "text" (a query's candidates, 2 or
    more, not all of one label); for mse Pearson and Spearman."""
    if kind == "softmax":
        gold, guess = [e["targets"][0] for e in examples], logits.argmax(1)
        f1, mcc = f1_score(gold, guess, average="macro"), matthews_corrcoef(gold, guess)
        return {"acc": float((guess == gold).mean()), "f1": float(f1), "mcc": float(mcc)}
    gold, score = np.array([e["label"] for e in examples]), logits[:, 0]
    if kind == "mse":
        found = {"pearson": pearsonr(gold, score)[0], "spearman": spearmanr(gold, score)[0]}
        return {name: float(value) for name, value in found.items()}
    yes, guess = gold > 0.5, score > 0
    metrics = {"acc": float((yes == guess).mean()), "f1": float(f1_score(yes, guess))}
    queries = {}
    for i, example in enumerate(examples):
        queries.setdefault(example["text"], []).append(i)
    queries = [np.array(rows) for rows in queries.values() if len(set(gold[rows])) > 1]
    if queries:
        ndcg = [ndcg_score(gold[None, rows], score[None, rows], k=10) for rows in queries]
        metrics["ndcg"] = float(np.mean(ndcg))
    return metrics


@torch.no_grad()
def evaluate(classifier, examples, tokenizer, settings):
    """-> {"n", "missing" (words), "loss", the metrics} of all examples, each rank its share."""
    s, found, loss = settings, {}, 0.0
    n, size, world_size = len(examples), s["device_batch_size"], s["world_size"]
    classifier.eval()
    mine = np.arange(s["rank"], n, world_size)
    for i in range(0, math.ceil(n / world_size), size):
        rows = mine[i : i + size].tolist()
        # FSDP's forward is collective: every rank runs as many
        batch = to_device(
            make_batch([examples[r] for r in rows or [0]], tokenizer, s), s["device"]
        )
        with s["autocast"]():
            logits = classifier(*batch[:3])  # [L, K]
        if not rows:
            continue
        loss += loss_of(logits, batch[3], s["loss_kind"], s["pos_weight"])[0].item()
        if s["task"] == "texts":
            found |= zip(rows, logits.cpu().numpy(), strict=True)
            continue
        sizes = [len(examples[row]["words"]) for row in rows]
        best = np.full(sum(sizes), -1)
        best[batch[2].kept] = logits.argmax(1).cpu().numpy()
        found |= zip(rows, np.split(best, np.cumsum(sizes[:-1])), strict=True)
    classifier.train()
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, found)
        found = {row: value for share in shares for row, value in share.items()}
    (loss,) = common.all_reduce_sum([loss])
    found = [found[row] for row in range(n)]
    if s["task"] == "words":
        n_words = sum(map(len, found))
        metrics, missing = score_words(examples, found, s["labels"])
        loss /= max(n_words - missing, 1)
        return {"n": n_words, "missing": missing, "loss": loss} | metrics
    return {"n": n, "loss": loss / n} | score_texts(examples, np.stack(found), s["loss_kind"])


def write_results(path, data, task, found):
    """Adds what was found to the results of other files: {data: {"task", "n", "metrics"}}."""
    results = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    counts = {key: found[key] for key in ("n", "missing") if key in found}
    metrics = {k: v if math.isfinite(v) else None for k, v in found.items() if k not in counts}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(results | {data: {"task": task, **counts, "metrics": metrics}}, f, indent=1)


def describe_batch(batch, examples, tokenizer, settings):
    """The first texts as a reader wants them; what is read for a label stands inverted."""
    tokens, seqs, where, _ = batch
    start = 0
    for i, (n, example) in enumerate(zip(seqs.lengths, examples, strict=False)):
        read = {}  # words: the labels that are read at a position
        if settings["task"] == "words":
            labels = np.concatenate([e["labels"] for e in examples])[where.kept]
            for row, word in zip(where.rows.tolist(), where.word.tolist(), strict=True):
                read.setdefault(row, []).append(labels[word])
        else:
            firsts = {"cls": where.first, "last": where.last}
            rows = firsts.get(settings["pooling"], torch.tensor([]))[i : i + 1].tolist()
            rows = rows or (start + where.place[start : start + n].nonzero()[:, 0]).tolist()
            read = {row: [] for row in rows}
        shown = []
        for row in range(start, start + n):
            piece = tokenizer.decode(tokens[row : row + 1])
            marks = "".join(f"<{label}>" for label in read.get(row, []))
            shown.append(f"\033[7m{piece}\033[0m{marks}" if row in read else piece)
        label = "" if settings["task"] == "words" else f", label {example['label']}"
        print(f"--- text {i}: {n} tokens{label}")
        print("".join(shown))
        start += n


# ---- folders ----
_SAVED = (
    "task loss_kind labels label_position merge_subwords pooling prefix suffix separator "
    "max_seq_len prediction_head dropout pos_weight"
).split()
_LLAMAS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def transformers_class(c, s):
    """(transformers' class that computes the same, None) or (None, why there is none)."""
    family, head, words = c.family, s["prediction_head"], s["task"] == "words"
    if family == "neobert":
        return None, "transformers has no NeoBERT"
    if words and s["label_position"] == "next_token":
        return None, "its classes read a token's label where the token stands, not one before"
    if words and family == "modernbert-decoder":
        return None, "transformers labels no tokens with a ModernBERT decoder"
    if family.startswith("modernbert") and not head:
        return None, "its ModernBERT classes have a prediction head: prediction_head=True"
    name = _LLAMAS.get(family) or {"modernbert": "ModernBert"}.get(family, "ModernBertDecoder")
    if words:
        return f"{name}ForTokenClassification", None
    fitting = ("mean", "cls") if family == "modernbert" else ("last",)
    if s["pooling"] not in fitting:
        return None, f"{name}ForSequenceClassification pools {' or '.join(fitting)}"
    return f"{name}ForSequenceClassification", None


def has_bias(c, s):
    """Has the last layer a bias? As in transformers' classes."""
    if s["task"] == "words" or c.family in ("modernbert", "neobert"):
        return True
    return c.family == "modernbert-decoder" and c.head_dense_bias


def set_pad(tokenizer, c, suffix=""):
    """transformers' decoders take the last token that is no padding: padding must be none that
    texts end with."""
    last = tokenizer("a" + suffix)["input_ids"][-1]
    for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, "!"):
        if token and tokenizer.convert_tokens_to_ids(token) not in (None, last):
            tokenizer.pad_token = token
            break
    c.hf = c.hf | {"pad_token_id": tokenizer.pad_token_id}


def save_classifier(folder, classifier, tokenizer, settings, state):
    """A folder for transformers where it has the class, else for this script alone; LoRA is merged
    in it. state: the classifier's full tensors."""
    s, c = settings, classifier.model.config
    name, problem = transformers_class(c, s)
    own = {n: t for n, t in state.items() if not n.startswith("model.")}
    layer = "score" if c.family in _LLAMAS else "classifier"
    if name:  # elsewhere "linear", which no class of transformers takes for its own
        own = {n.replace("linear.", layer + "."): t for n, t in own.items()}
    labels = s["labels"] or ["score"]
    kinds = {"softmax": "single_label", "bce": "multi_label", "mse": None}
    kind = kinds[s["loss_kind"]]
    keys = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": f"{kind}_classification" if kind else "regression",
        "classifier_dropout": s["dropout"],
    }
    keys |= {"architectures": [name]} if name else {}
    if s["task"] == "texts" and c.family == "modernbert":
        keys["classifier_pooling"] = s["pooling"]
    model_state = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    write_folder(folder, c, merged_state(classifier.model, model_state), (own, keys))
    tokenizer.save_pretrained(folder)
    notes = {key: s[key] for key in _SAVED} | {"transformers": name, "problem": problem}
    with open(os.path.join(folder, "nanoembed_classifier.json"), "w", encoding="utf-8") as f:
        json.dump(notes, f, indent=1)


def read_classifier(folder):
    """(its settings, {our name: tensor} of its last layers). A ValueError for another folder."""
    path = os.path.join(folder, "nanoembed_classifier.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder}: no nanoembed_classifier.json: no classifier saved by us")
    with open(path, encoding="utf-8") as f:
        settings = json.load(f)
    tensors = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                for key in f.keys():
                    if key.startswith("head."):
                        tensors[key] = f.get_tensor(key)
                    elif key.startswith(CLASSIFIERS):
                        tensors["linear." + key.partition(".")[2]] = f.get_tensor(key)
    return settings, tensors


if __name__ == "__main__":
    # ---- configure ----
    config = common.configure(globals())
    for key, values in {
        "task": ("words", "texts"), "loss_kind": ("softmax", "bce", "mse"),
        "label_position": ("same_token", "next_token"),
        "pooling": ("mean", "weighted_mean", "last", "cls"),
        "schedule": ("linear", "cosine", "constant"),
    }.items():  # fmt: skip
        if config[key] not in values:
            raise SystemExit(f"{key}={config[key]!r}: expected one of {', '.join(values)}")
    if task == "words" and loss_kind != "softmax":
        raise SystemExit(f"{loss_kind=}: words have the labels of softmax")
    if lora_rank and not freeze_backbone:
        raise SystemExit(f"{lora_rank=}: LoRA freezes the backbone, freeze_backbone=False does not")
    if eval_only and not eval_data:
        raise SystemExit("eval_only needs eval_data")

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
    base, *chain = lora.adapter_chain(init_from)
    chain += [resolve_folder(adapter) for adapter in adapters]
    own = [f for f in (base, *chain) if os.path.exists(os.path.join(f, "tokenizer.json"))]
    tokenizer = load_tokenizer((own or [base])[-1])  # an adapter's may have a new token
    settings = {key: config[key] for key in _SAVED if key != "labels"}
    if eval_only:  # a classifier is used as it was trained
        settings, _ = read_classifier(base)
        for key in set(_SAVED) - {"labels"}:
            config[key] = globals()[key] = settings[key]
        print0("as it was trained:", {key: settings[key] for key in _SAVED if key != "labels"})
    if task == "texts" and settings["separator"] is None:
        settings["separator"] = tokenizer.sep_token or "\n"

    def read(path):
        if task == "words":
            return read_words(path, label_field, label_column)
        return read_texts(path, loss_kind)

    examples = [] if eval_only else read(data)
    eval_examples = read(eval_data) if eval_data and (eval_interval or eval_only) else []
    names = list(settings.get("labels", label_names))
    if loss_kind != "softmax":
        names = []
    elif not names:
        names = label_set(examples)
    if loss_kind == "softmax":
        for path, some in ((data, examples), (eval_data, eval_examples)):
            number_labels(some, names, path)
    accumulation = batch_size // (device_batch_size * world_size)
    if not eval_only and accumulation * device_batch_size * world_size != batch_size:
        raise SystemExit(f"{batch_size=} must be k x {device_batch_size=} x {world_size=}")
    if max_steps is None:
        max_steps = math.ceil(num_epochs * len(examples) / batch_size)
    warmup = warmup_steps if warmup_steps is not None else round(warmup_ratio * max_steps)
    settings |= dict(
        labels=names, frozen=freeze_backbone and not lora_rank, batch_size=batch_size,
        device_batch_size=device_batch_size, seed=seed, rank=rank, world_size=world_size,
        device=device, autocast=autocast,
    )  # fmt: skip
    if not eval_only:
        print0(
            f"{data}: {len(examples):,} texts, {len(names) or 'no'} labels {' '.join(names[:50])}\n"
            f"a step: {device_batch_size} texts x {accumulation} micro-batches x {world_size} ranks"
            f" = {batch_size} texts; {max_steps:,} steps = "
            f"{max_steps * batch_size / len(examples):.2f} epochs; warmup {warmup:,} steps"
        )

    # ---- model (+ LoRA) ----
    last = None if eval_only else common.latest_checkpoint(out_dir, "step")
    if last and not (resume or dry_run):
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    last = last if resume and not dry_run else None
    if last:
        before = read_classifier(last)[0]
        for key in _SAVED:
            if settings[key] != before[key]:
                raise SystemExit(f"{last} was trained with {key}={before[key]!r}, now it is "
                                 f"{settings[key]!r}: choose another out_dir")  # fmt: skip
    if lora_rank and last:  # on what it began with: init_from may have a newer checkpoint by now
        base, *chain = lora.adapter_chain(os.path.join(last, "adapter"))[:-1]
    weights_type = compute_dtype if freeze_backbone else torch.float32  # what trains is fp32
    source = last if last and not lora_rank else base
    if eval_only:  # as they were saved
        with open(os.path.join(base, "config.json"), encoding="utf-8") as f:
            weights_type = getattr(torch, json.load(f)["dtype"])
    looks = [attention, *map(lora.attention_of, chain)]  # an adapter may say it
    looks = None if eval_only else next(filter(None, looks), None)
    model = from_pretrained(source, looks, dtype=weights_type)
    check_tokenizer(tokenizer, model.config.vocab_size)
    for adapter in chain if source == base else ():
        lora.load_adapter(model, adapter)
        lora.merge(model)
    c, head = model.config, None
    if prediction_head:
        if not c.family.startswith("modernbert"):
            raise SystemExit(f"{prediction_head=}: ModernBERT's, this is a {c.family}")
        head = model.head or Head(c)  # the one that masked language modelling has trained
        if model.head is None:
            nn.init.normal_(head.dense.weight, 0.0, 0.02)
        head.float()
    model.drop_head()
    c.attn_dropout = c.attn_dropout if attn_dropout is None else attn_dropout
    if lora_rank and last:
        lora.load_adapter(model, os.path.join(last, "adapter"), trainable=True)
    elif lora_rank and not eval_only:
        lora.inject(model, lora_rank, lora_alpha, lora_dropout, lora_targets, train_also=train_also)
    elif freeze_backbone:
        model.requires_grad_(False)
    model.gradient_checkpointing = gradient_checkpointing
    gqa = c.n_head != c.n_kv_head
    model.backend = choose_backend(attention_backend, device, compute_dtype, c.attn_dropout, gqa)
    classifier = Classifier(model, head, len(names) or 1, has_bias(c, settings), settings)
    if last or eval_only:
        _, tensors = read_classifier(last or base)
        rest = {n: t for n, t in classifier.state_dict().items() if n.startswith("model.")}
        classifier.load_state_dict(rest | tensors)
    set_pad(tokenizer, c, settings["suffix"])
    classifier.to(device).train()
    their_class, problem = transformers_class(c, settings)
    print0(f"saved for transformers' {their_class}" if their_class else
           f"saved for nanoembed alone; transformers would differ: {problem}")  # fmt: skip
    if their_class and task == "texts":
        how = Template(settings["prefix"], settings["suffix"])
        pair = tokenizer("a", "b")["input_ids"]
        if how != Template() or tokenizer("a" + settings["separator"] + "b")["input_ids"] != pair:
            print0("with equal logits for equal ids: give its tokenizer one text, "
                   f"{settings['prefix'] + 'text' + settings['separator'] + 'text_pair'!r}"
                   f" + {settings['suffix']!r}, not two")  # fmt: skip
    n_all = sum(p.numel() for p in classifier.parameters())
    n_trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    print0(
        f"{c.family}, {'causal' if c.causal else 'bidirectional'}, {n_all / 1e6:.1f}M weights, "
        f"{n_trained / 1e6:.3f}M trained; attention by {model.backend}, {compute_dtype} on {device}"
    )
    if show_batch:
        order = rows_of_step(0, batch_size, len(examples), seed)[1][:4]
        some = [examples[i] for i in order]
        describe_batch(make_batch(some, tokenizer, settings), some, tokenizer, settings)
        raise SystemExit

    # ---- compile, FSDP/DDP ----
    wrapped = classifier
    if compile:
        for block in model.blocks:
            block.compile()
    if fsdp:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(classifier)
    elif world_size > 1 and not eval_only:
        wrapped = DDP(classifier, device_ids=[local_rank] if device.type == "cuda" else None)

    def report(step, log):
        """The metrics of eval_data: logged, and written to results.json."""
        found = evaluate(classifier, eval_examples, tokenizer, settings)
        log(step, {f"eval_{key}": found[key] for key in ["loss", *columns_of(settings)]
                   if key in found})  # fmt: skip
        if found.get("missing"):
            print0(f"{found['missing']} of {found['n']} words have no token: counted wrong")
        if rank == 0 and not dry_run:
            write_results(os.path.join(out_dir, "results.json"), eval_data, task, found)
        return found

    if eval_only:
        found = report(0, lambda step, values: None)
        print0(eval_data, json.dumps(found))
        if dist.is_initialized():
            dist.destroy_process_group()
        raise SystemExit

    # ---- optimizer, resume ----
    trained = [p for p in classifier.parameters() if p.requires_grad]
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

    def save():
        weights, optim = common.full_state_dict(classifier), common.optimizer_state([optimizer])
        folder = common.begin_checkpoint(out_dir, f"step{step}")
        if rank == 0:
            save_classifier(folder, classifier, tokenizer, settings, weights)  # LoRA merged
            if lora_rank:
                own = {n.removeprefix("model."): t for n, t in weights.items()}
                first = base if chain or os.path.isdir(init_from) else init_from
                lora.save_adapter(model, os.path.join(folder, "adapter"), first, own, chain)
            state = {"step": step, "best": best, "optimizers": optim}
            torch.save(state, os.path.join(folder, "training_state.pt"))
        print0(f"saved {common.commit_checkpoint(folder)}")
        kept = best["folder"] if keep_best else None
        common.prune_checkpoints(out_dir, "step", keep_last, False, kept)

    # ---- loop ----
    columns = ["loss", "acc", "gnorm", "lr", "texts_s", "tok_s"]
    columns += [f"eval_{name}" for name in ["loss", *columns_of(settings)]]
    if dry_run:  # leaves nothing behind
        log = lambda step, values: None  # noqa: E731
    else:
        log = common.open_log(out_dir, columns, max_steps, step, tracker, config)
        common.save_config(config, os.path.join(out_dir, "config.py"))
    stop_requested = common.catch_sigterm()
    bad_steps, since, tokens_seen, seconds = 0, 0, 0, 0.0
    batches = prefetch(train_batches(examples, step, max_steps, tokenizer, settings))
    if isinstance(wrapped, DDP):
        # DDP orders its buckets anew after the first backward, and with them the sums over ranks:
        # one backward that counts for nothing lets a resumed run sum as the unbroken one does.
        with autocast():
            warm = make_batch(examples[:1], tokenizer, settings)
            wrapped(*to_device(warm, device))[0].backward()
        classifier.zero_grad(set_to_none=True)

    while step < max_steps:
        start = time.perf_counter()
        micro_batches = next(batches)
        common.seed_step(seed, step, rank)  # dropout is a function of (seed, step, rank)
        lr = learning_rate_at(step, max_steps, learning_rate, min_lr, schedule, warmup)
        n_labels = sum(len(targets) for _, _, _, targets in micro_batches)
        n_tokens = sum(len(tokens) for tokens, _, _, _ in micro_batches)
        counts = [n_labels, n_tokens, stop_requested()]
        n_labels, n_tokens, stopping = common.all_reduce_sum(counts)
        if stopping:
            save()
            break

        wide = torch.float32 if device.type == "mps" else torch.float64  # a Mac has no float64
        total = torch.zeros(2, device=device, dtype=wide)  # loss, hits of this rank
        for i, batch in enumerate(micro_batches):
            sync = i == len(micro_batches) - 1  # gradients meet once a step, at the last backward
            if fsdp:
                wrapped.set_requires_gradient_sync(sync)
            elif world_size > 1:
                wrapped.require_backward_grad_sync = sync
            with autocast():
                loss, hits = wrapped(*to_device(batch, device))
            total += torch.stack((loss.detach(), hits))
            # the mean over all ranks' and micro-batches' labels; DDP and FSDP divide by the ranks
            (loss * (world_size / max(n_labels, 1))).backward()
        gnorm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
        gnorm = gnorm.full_tensor().item() if fsdp else gnorm.item()
        loss, hits = (x / max(n_labels, 1) for x in common.all_reduce_sum(total.tolist()))

        if not math.isfinite(loss + gnorm):
            bad_steps += 1  # in the whole run: a good one has none
            rows = rows_of_step(step, batch_size, len(examples), seed)[1]
            lines = [examples[i]["lines"][0] for i in rows[:8]]
            print0(f"step {step + 1}: loss {loss}, gradient norm {gnorm}: skipped. Lines of "
                   f"{data}: {lines}{'...' if len(rows) > 8 else ''}")  # fmt: skip
            if bad_steps > 3:
                raise SystemExit("stopped at the 4th such step; the last checkpoint is good")
        else:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        classifier.zero_grad(set_to_none=True)
        step += 1
        since, tokens_seen = since + batch_size, tokens_seen + n_tokens
        seconds += time.perf_counter() - start

        if dry_run and step < min(2, max_steps):  # the first is slow: allocation, compilation
            continue
        if dry_run:

            def forward_backward(n):
                some = [examples[i % len(examples)] for i in range(n)]
                with autocast():
                    batch = to_device(make_batch(some, tokenizer, settings), device)
                    wrapped(*batch)[0].backward()
                classifier.zero_grad(set_to_none=True)

            spent = time.perf_counter() - start
            fit, peak_gb = common.largest_batch(forward_backward, device_batch_size, device)
            print0(
                f"dry run: {spent:.2f} s/step, {batch_size / spent:,.1f} texts/s, "
                f"peak memory {peak_gb:.2f} GB; the whole run takes "
                f"{common.format_time(spent * max_steps)} without evaluation; "
                f"device_batch_size up to about {fit:,} fits"
            )
            break
        last_step = step == max_steps
        if step % log_interval == 0 or last_step:
            acc = None if loss_kind == "mse" else hits
            line = {"loss": loss, "acc": acc, "gnorm": gnorm, "lr": lr}
            log(step, line | {"texts_s": since / seconds, "tok_s": tokens_seen / seconds})
            since, tokens_seen, seconds = 0, 0, 0.0
        if eval_examples and (step % eval_interval == 0 or last_step):
            found = report(step, log)
            if found["loss"] < best["loss"]:
                best = {"loss": found["loss"], "folder": f"step{step}"}
                if keep_best and not last_step and step % save_interval:
                    save()
        if step % save_interval == 0 or last_step:
            save()

    # ---- clean-up ----
    batches.close()
    if dist.is_initialized():
        dist.destroy_process_group()
