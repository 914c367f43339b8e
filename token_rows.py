"""
Packed micro-batches from the rows of token files: what pretraining and MNTP share.

They differ in the objective, which each script holds and gives to the functions here, for one row:

    corrupt(ids, lengths, rng, s) -> (inputs [n], label rows [L], targets [L])
"""

import math
import os
from dataclasses import dataclass
from itertools import cycle, islice
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from attention import Seqs, make_seqs, move
from common import all_reduce_sum, count_micro_batches, shown
from order import BLOCK, rows_of_mixture, rows_of_step, shares_of
from tokens import TokenFile, open_shards, read_row, tokenizer_of


@dataclass
class Batch:
    """Rows of token files, end to end, as one packed micro-batch of T tokens."""

    inputs: torch.Tensor  # [T] int64
    seqs: Seqs
    rows: torch.Tensor  # [L] int64, positions whose hidden states predict
    targets: torch.Tensor  # [L] int64

    def to(self, device):
        """-> the arguments of Transformer.forward, on the device."""
        return move([self.inputs, self.seqs, self.rows, self.targets], device)


def make_batch(rows, corrupt, s, seed=None):
    """-> Batch, on the CPU, of rows ((epoch, row), ids, lengths of its texts), wherever they are
    from. What is drawn for a row is a function of (seed, epoch, row) alone."""
    arrays, lengths, total = [], [], 0
    for key, ids, row_lengths in rows:
        rng = np.random.default_rng((s.seed if seed is None else seed, *key))
        inputs, labels, targets = corrupt(ids, row_lengths, rng, s)
        arrays.append((inputs, labels + total, targets))
        lengths, total = lengths + row_lengths, total + len(ids)
    inputs, labels, targets = (torch.from_numpy(np.concatenate(x)) for x in zip(*arrays))
    return Batch(inputs, make_seqs(lengths), labels, targets)


@dataclass
class Rows:
    """The rows of a split, numbered through its files: the shards of all folders, in order. No row
    goes on in the next file: what is left at the end of one, less than a row, is not read."""

    files: list[TokenFile]
    firsts: np.ndarray  # [n_files + 1] int64, the number of each file's first row, then of all
    row_size: int  # tokens of a row; rows of whole documents may have fewer
    weights: dict  # {folder: weight}
    metas: list[dict]  # of each folder
    n_rows: list[int]  # likewise
    shares: np.ndarray  # [n_folders] int64, how many of order.BLOCK rows are of each
    chunks: bool  # a row is one text, whatever documents it holds

    @property
    def folder(self):
        """The first folder, whose tokenizer is that of all."""
        return next(iter(self.weights))

    @property
    def meta(self):
        """Likewise."""
        return self.metas[0]

    @property
    def mean_length(self):
        """Tokens of a document."""
        tokens, docs = (sum(file.counts[key] for file in self.files) for key in ("tokens", "docs"))
        return tokens / max(docs, 1)


def open_rows(data, split, row_size, chunks=False):
    """-> Rows of a folder, or of a mixture {folder: weight}. SystemExit where weights, tokenizers,
    or the rows of a folder do not fit; other errors as of open_shards."""
    weights = data if isinstance(data, dict) else {data: 1.0}
    good = [type(w) in (int, float) and 0 < w < math.inf for w in weights.values()]
    if not good or not all(good):
        raise SystemExit(f"data={data}: expected weights above 0")
    rows = Rows([], [0], row_size, weights, [], [], shares_of([*weights.values()]), chunks)
    for folder, share in zip(weights, rows.shares):
        files = open_shards(folder, split)
        n_rows, meta = [file.n_rows(row_size) for file in files], files[0].meta
        rows.files, rows.firsts = rows.files + files, rows.firsts + n_rows
        rows.metas.append(meta)
        rows.n_rows.append(sum(n_rows))
        if share == 0:
            raise SystemExit(f"data={data}: {folder} has not one row in {BLOCK:,}")
        if len(weights) > 1 and "order" in meta:
            raise SystemExit(f"{folder} has the order of a run: it goes with no other folder")
        if meta.get("tokenizer_sha256") != rows.metas[0].get("tokenizer_sha256"):
            raise SystemExit(f"{folder} has another tokenizer than {rows.folder}")
        if (whole := meta.get("row_tokens", 0)) > row_size or whole and chunks:
            raise SystemExit(f"{folder} has rows of whole documents, of up to {whole} tokens: they "
                             f"take max_seq_len={whole} or more, and no chunks")  # fmt: skip
    rows.firsts = np.cumsum(rows.firsts)
    return rows


def open_train(s, chunks=False):
    """-> (the rows to train on, the tokenizer) of s.data. A stream's are those to evaluate on, and
    s.stream makes the others."""
    if isinstance(s.data, str) and s.data.startswith(("stream:", "hf:")):
        from scale.streams import open_stream

        return open_stream(s, chunks)
    rows = open_rows(s.data, "train", s.max_seq_len, chunks)
    return rows, tokenizer_of(rows.folder)


def locate(rows, number):
    """-> (the file that has the row, its number there)."""
    i = np.searchsorted(rows.firsts, number, side="right") - 1
    return rows.files[i], int(number - rows.firsts[i])


def read_rows(rows, epochs, numbers):
    """Yields ((epoch, number of the row), ids, lengths of its texts) of each, for make_batch."""
    for epoch, number in zip(epochs, numbers):
        ids, lengths = read_row(*locate(rows, number), rows.row_size)
        yield (epoch, number), ids, [len(ids)] if rows.chunks else lengths


def first_batch(rows, n, corrupt, s):
    """The first n rows, over again where there are fewer, to try a forward with."""
    if s.stream:
        return make_batch(islice(cycle(next(rows_of_rank(rows, 0, s))), n), corrupt, s)
    return make_batch(read_rows(rows, [0] * n, np.arange(n) % s.n_rows), corrupt, s)


def rows_of(rows, step, n, s):
    """(epoch, number) int64 [n] each: the rows of a step that takes n."""
    if len(rows.n_rows) > 1:
        return rows_of_mixture(step, n, rows.n_rows, rows.shares, s.order_seed)
    return rows_of_step(step, n, rows.n_rows[0], s.order_seed)


def name_rows(rows, step, s):
    """The rows that a step trains on, for messages."""
    if s.stream:
        return f"Rows {step * s.rows_per_step:,} and on of {s.data}"
    found = (locate(rows, n) for n in rows_of(rows, step, s.rows_per_step, s)[1])
    return f"Rows of train: {shown([f'{file.path} {row}' for file, row in found])}"


def set_rows(rows, s):
    """Adds to the settings how many rows there are (n_rows), in a step (rows_per_step), a forward
    (rows_per_batch), how many forwards a step (n_micro), and the seed of the rows' order (None: as
    they stand). SystemExit where they do not fit."""
    s.n_rows = int(rows.firsts[-1])
    s.rows_per_step = s.batch_tokens // s.max_seq_len
    s.rows_per_batch = s.device_batch_tokens // s.max_seq_len
    s.n_micro = count_micro_batches(s, "tokens")
    row = f"max_seq_len={s.max_seq_len}"
    if s.device_batch_tokens % s.max_seq_len:
        raise SystemExit(f"device_batch_tokens={s.device_batch_tokens} must be a multiple of {row}")
    for folder, n, meta in zip(rows.weights, rows.n_rows, rows.metas):
        if n == 0 and not s.stream:
            total = meta["splits"]["train"]["tokens"]
            raise SystemExit(f"{folder}: {total} tokens of train are no row of {row}")
    published = rows.metas[0].get("order")  # of a run whose order this one repeats: data/order
    s.order_seed = None if published else s.seed
    ours = {"max_seq_len": s.max_seq_len, "rows_per_step": s.rows_per_step}
    if published and published != ours:
        raise SystemExit(f"{s.data} has the order of a run with {published}, this one has {ours}")


def describe_run(rows, s):
    """The rows, the batch's arithmetic and the length of the run, in three lines, or more for a
    mixture."""
    up_to = "up to " * any("row_tokens" in meta for meta in rows.metas)
    n_tokens, n_seen = sum(f.counts["tokens"] for f in rows.files), s.stop_step * s.rows_per_step
    lines = [f"{s.data}: {n_tokens:,} tokens = {s.n_rows:,} rows of {up_to}{s.max_seq_len}"]
    if s.stream:
        lines = [f"{s.data}: {len(s.stream.parts):,} parts in {s.stream.n_lanes} lanes"]
    epochs = "" if s.stream else f" = {n_seen / s.n_rows:.2f} epochs"
    for folder, n, share in zip(rows.weights, rows.n_rows, rows.shares / BLOCK):
        if share < 1:
            seen = f"{n_seen * share / n:.2f} epochs"
            lines.append(f"  {share:.2%} from {folder}: {n:,} rows, seen for {seen}")
    lines.append(
        f"a step: {s.rows_per_batch} rows x {s.n_micro} micro-batches x {s.world_size} ranks = "
        f"{up_to}{s.batch_tokens:,} tokens\n{s.stop_step:,} steps = {up_to}"
        f"{s.stop_step * s.batch_tokens:,} tokens{epochs}; warmup {s.warmup:,} steps"
    )
    return "\n".join(lines)


def open_val(train, s):
    """-> (the rows of val.bin, the numbers of those that are evaluated on), (None, []) where there
    is none to do. Of a mixture they are the first of each folder that has a val.bin, as many as its
    weight says, so that the loss is of the mixture, too."""
    weights = {folder: weight for (folder, weight), meta in zip(train.weights.items(), train.metas)
               if "val" in meta["splits"]}  # fmt: skip
    if not s.eval_interval or not weights:
        return None, []
    val, numbers = train, []
    if not s.stream:
        val = open_rows(weights, "val", s.max_seq_len, train.chunks)
    for file, first, weight in zip(val.files, val.firsts, weights.values()):
        wanted = int(s.eval_tokens * weight / sum(weights.values()))
        n = min(wanted // s.max_seq_len, file.n_rows(s.max_seq_len))
        if n < 1:
            raise SystemExit(
                f"eval_tokens={s.eval_tokens}, {wanted} of them from {file.path} with its "
                f"{file.counts['tokens']}: no row of {s.max_seq_len} to evaluate on; "
                "eval_interval=0 does without"
            )
        numbers += range(first, first + n)
    return val, numbers


def train_batches(rows, first_step, corrupt, s):
    """For each step, the list of this rank's micro-batches."""
    for found in map(list, rows_of_rank(rows, first_step, s)):
        parts = [found[i : i + s.rows_per_batch] for i in range(0, len(found), s.rows_per_batch)]
        yield [make_batch(part, corrupt, s) for part in parts]


def rows_of_rank(rows, first_step, s):
    """For each step this rank's rows, as make_batch takes them: every world_size-th of the step."""
    if s.stream:
        yield from s.stream.rows_of_steps(first_step, s)
    else:
        for step in range(first_step, s.stop_step):
            order = rows_of(rows, step, s.rows_per_step, s)
            yield read_rows(rows, *(x[s.rank :: s.world_size] for x in order))


@torch.no_grad()
def evaluate(model, rows, numbers, corrupt, s, mask_prob=None):
    """-> {"loss", "acc"} over the rows of these numbers, with the same masks every time and for
    runs of all seeds; each rank takes its share. mask_prob: another than that of training."""
    s = SimpleNamespace(**vars(s) | {"mask_prob": mask_prob or s.mask_prob})
    total = np.zeros(3)  # loss, hits, labels
    model.eval()
    share, n = numbers[s.rank :: s.world_size], s.rows_per_batch
    for i in range(0, -(-len(numbers) // s.world_size), n):
        part = share[i : i + n] or [0]  # an idle rank, as FSDP's forward is collective
        batch = make_batch(read_rows(rows, [0] * len(part), part), corrupt, s, seed=0)
        with s.autocast():
            loss, hits = model(*batch.to(s.device))
        if i < len(share):
            total += loss.item(), hits.item(), len(batch.targets)
    model.train()
    loss, hits, n_labels = all_reduce_sum(total)
    return {"loss": loss / max(n_labels, 1), "acc": hits / max(n_labels, 1)}


def show_first_row(rows, corrupt, s, tokenizer, mark=True):
    """Prints the first row of the run as a reader wants it: the texts and their borders. With mark,
    each token at whose place an answer is read stands inverted, the answer behind it."""
    batch = make_batch(islice(next(rows_of_rank(rows, 0, s)), 1), corrupt, s)
    answers = dict(zip(batch.rows.tolist(), batch.targets.tolist()))
    places = iter(range(s.max_seq_len))
    for i, n in enumerate(batch.seqs.lengths):
        text, labels = "", 0
        for j in islice(places, n):
            token = tokenizer.decode(batch.inputs[j : j + 1])
            if mark and j in answers:
                token = f"\033[7m{token}\033[0m<{tokenizer.decode([answers[j]])}>"
            text, labels = text + token, labels + (j in answers)
        print(f"--- text {i}: {n} tokens, {labels} labels ---", text, sep="\n")


def write_data_order(rows, s):
    """order_FROM-TO_input_ids.npy [rows, max_seq_len] and order_FROM-TO_step.npy [rows] in out_dir:
    each row of these steps of the run (from 0, TO is the first that is not in it) and the step that
    trains on it, the columns of Ettin's."""
    first, end = s.dump_data_order if len(s.dump_data_order) == 2 else (0, 0)
    if not 0 <= first < end <= s.stop_step:
        raise SystemExit(f"dump_data_order={s.dump_data_order}: expected (from, to) of steps, "
                         f"0 <= from < to <= {s.stop_step}")  # fmt: skip
    if any("row_tokens" in meta for meta in rows.metas):
        raise SystemExit(f"dump_data_order: {s.data} has rows of whole documents, of many lengths")
    os.makedirs(s.out_dir, exist_ok=True)
    path, n = os.path.join(s.out_dir, f"order_{first}-{end}_"), s.rows_per_step
    shape = (end - first) * n, s.max_seq_len
    dtype = max(meta["dtype"] for meta in rows.metas)  # uint16 < uint32
    ids = np.lib.format.open_memmap(path + "input_ids.npy", "w+", dtype, shape)
    np.save(path + "step.npy", np.arange(first, end).repeat(n))
    s = SimpleNamespace(**vars(s) | {"rank": 0, "world_size": 1})  # all rows
    start = 0 if s.stream else first  # a stream has no other way to get there
    steps = tqdm(range(start, end), desc="data order", unit="step")
    for step, found in zip(steps, rows_of_rank(rows, start, s)):
        for i, (_, row, _) in enumerate(found if step >= first else (), start=(step - first) * n):
            ids[i] = row
    print(f"wrote {path}input_ids.npy {shape} and {path}step.npy")
