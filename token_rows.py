"""
Packed micro-batches from the rows of a token file: what pretraining and MNTP share.

They differ in the objective, which each script holds and gives to the functions here, for one row:

    corrupt(ids, lengths, rng, s) -> (inputs [n], label rows [L], targets [L])
"""

import os
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from attention import Seqs, make_seqs, move
from common import all_reduce_sum, count_micro_batches, shown
from order import rows_of_step
from tokens import open_tokens, read_row, tokenizer_of


@dataclass
class Batch:
    """Rows of a token file, end to end, as one packed micro-batch of T tokens."""

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


def read_rows(file, epochs, rows, s):
    """Yields ((epoch, row), ids, lengths of its texts) of each, for make_batch."""
    for epoch, row in zip(epochs, rows):
        yield (epoch, row), *read_row(file, row, s.max_seq_len)


def first_batch(file, n, corrupt, s):
    """The file's first n rows, over again where it has fewer, to try a forward with."""
    return make_batch(read_rows(file, [0] * n, np.arange(n) % s.n_rows, s), corrupt, s)


def open_train(s):
    """-> (the file to train on, the tokenizer): of a folder of token files, or of a stream, where
    the file is of the texts to evaluate on, and s.stream gives the rows."""
    if isinstance(s.data, str) and s.data.startswith(("stream:", "hf:")):
        from scale.streams import open_stream

        return open_stream(s)
    return open_tokens(s.data, "train"), tokenizer_of(s.data)


def set_rows(file, s):
    """Adds to the settings how many rows the file has (n_rows), a step (rows_per_step), a forward
    (rows_per_batch), how many forwards a step (n_micro), and the seed of the rows' order (None: as
    they stand). SystemExit where they do not fit."""
    s.n_rows = len(file.tokens) // s.max_seq_len
    s.rows_per_step = s.batch_tokens // s.max_seq_len
    s.rows_per_batch = s.device_batch_tokens // s.max_seq_len
    s.n_micro = count_micro_batches(s, "tokens")
    row = f"max_seq_len={s.max_seq_len}"
    if s.device_batch_tokens % s.max_seq_len:
        raise SystemExit(f"device_batch_tokens={s.device_batch_tokens} must be a multiple of {row}")
    if s.n_rows == 0:
        raise SystemExit(f"{s.data}: {len(file.tokens)} tokens are no row of {row}")
    published = file.meta.get("order")  # of a run whose order this one repeats: data/order
    s.order_seed = None if published else s.seed
    ours = {"max_seq_len": s.max_seq_len, "rows_per_step": s.rows_per_step}
    if published and published != ours:
        raise SystemExit(f"{s.data} has the order of a run with {published}, this one has {ours}")


def describe_run(file, s):
    """The batch's arithmetic and the length of the run, in three lines."""
    size = f"{len(file.tokens):,} tokens = {s.n_rows:,} rows of {s.max_seq_len}"
    epochs = f" = {s.stop_step * s.rows_per_step / s.n_rows:.2f} epochs"
    if s.stream:
        size, epochs = f"{len(s.stream.parts):,} parts, read in {s.stream.n_lanes} lanes", ""
    return (
        f"{s.data}: {size}\n"
        f"a step: {s.rows_per_batch} rows x {s.n_micro} micro-batches x {s.world_size} ranks = "
        f"{s.batch_tokens:,} tokens\n{s.stop_step:,} steps = {s.stop_step * s.batch_tokens:,} "
        f"tokens{epochs}; warmup {s.warmup:,} steps"
    )


def open_val(file, s):
    """-> (val.bin, or what a stream holds out; how many of its rows are evaluated on), or (None, 0)
    where there is none to do."""
    if not s.eval_interval or "val" not in file.meta["splits"]:
        return None, 0
    val = file if s.stream else open_tokens(s.data, "val")
    n_rows = min(s.eval_tokens, len(val.tokens)) // s.max_seq_len
    if n_rows < 1:
        raise SystemExit(
            f"eval_tokens={s.eval_tokens}, {len(val.tokens)} tokens of val.bin: no row of "
            f"{s.max_seq_len} to evaluate on; eval_interval=0 does without"
        )
    return val, n_rows


def train_batches(file, first_step, corrupt, s):
    """For each step, the list of this rank's micro-batches."""
    for rows in map(list, rows_of_rank(file, first_step, s)):
        parts = [rows[i : i + s.rows_per_batch] for i in range(0, len(rows), s.rows_per_batch)]
        yield [make_batch(part, corrupt, s) for part in parts]


def rows_of_rank(file, first_step, s):
    """For each step this rank's rows, as make_batch takes them: every world_size-th of the step."""
    if s.stream:
        from scale.streams import rows_of_steps

        yield from rows_of_steps(first_step, s)
    else:
        for step in range(first_step, s.stop_step):
            order = rows_of_step(step, s.rows_per_step, s.n_rows, s.order_seed)
            yield read_rows(file, *(x[s.rank :: s.world_size] for x in order), s)


def name_rows(step, s):
    """The rows that a step trains on, for a message."""
    if s.stream:
        return f"Rows {step * s.rows_per_step:,} and on of {s.data}"
    rows = rows_of_step(step, s.rows_per_step, s.n_rows, s.order_seed)[1]
    return f"Rows of {s.data}/train.bin: {shown(rows.tolist())}"


@torch.no_grad()
def evaluate(model, file, n_rows, corrupt, s, mask_prob=None):
    """-> {"loss", "acc"} over the first n_rows rows of a file, with the same masks every time and
    for runs of all seeds; each rank takes its share. mask_prob: another than that of training."""
    s = SimpleNamespace(**vars(s) | {"mask_prob": mask_prob or s.mask_prob})
    total = np.zeros(3)  # loss, hits, labels
    model.eval()
    share, n = range(s.rank, n_rows, s.world_size), s.rows_per_batch
    for i in range(0, -(-n_rows // s.world_size), n):
        rows = share[i : i + n] or [0]  # an idle rank, as FSDP's forward is collective
        batch = make_batch(read_rows(file, [0] * len(rows), rows, s), corrupt, s, seed=0)
        with s.autocast():
            loss, hits = model(*batch.to(s.device))
        if i < len(share):
            total += loss.item(), hits.item(), len(batch.targets)
    model.train()
    loss, hits, n_labels = all_reduce_sum(total)
    return {"loss": loss / max(n_labels, 1), "acc": hits / max(n_labels, 1)}


def show_first_row(file, corrupt, s, tokenizer, mark=True):
    """Prints the first row of the run as a reader wants it: the texts and their borders. With mark,
    each token at whose place an answer is read stands inverted, the answer behind it."""
    batch = make_batch(islice(next(rows_of_rank(file, 0, s)), 1), corrupt, s)
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


def write_data_order(file, s):
    """order_FROM-TO_input_ids.npy [rows, max_seq_len] and order_FROM-TO_step.npy [rows] in out_dir:
    each row of these steps of the run (from 0, TO is the first that is not in it) and the step that
    trains on it, the columns of Ettin's."""
    first, end = s.dump_data_order if len(s.dump_data_order) == 2 else (0, 0)
    if not 0 <= first < end <= s.stop_step:
        raise SystemExit(f"dump_data_order={s.dump_data_order}: expected (from, to) of steps, "
                         f"0 <= from < to <= {s.stop_step}")  # fmt: skip
    os.makedirs(s.out_dir, exist_ok=True)
    path, n = os.path.join(s.out_dir, f"order_{first}-{end}_"), s.rows_per_step
    shape = (end - first) * n, s.max_seq_len
    ids = np.lib.format.open_memmap(path + "input_ids.npy", "w+", file.tokens.dtype, shape)
    np.save(path + "step.npy", np.arange(first, end).repeat(n))
    s = SimpleNamespace(**vars(s) | {"rank": 0, "world_size": 1})  # all rows
    start = 0 if s.stream else first  # a stream has no other way to get there
    steps = tqdm(range(start, end), desc="data order", unit="step")
    for step, rows in zip(steps, rows_of_rank(file, start, s)):
        if step >= first:
            ids[(step - first) * n : (step - first + 1) * n] = [row for _, row, _ in rows]
    print(f"wrote {path}input_ids.npy {shape} and {path}step.npy")
