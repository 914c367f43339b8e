"""
The seeded order in which training sees rows of token files and lines of JSONL files: a function of
the seed and the step alone, so that any number of ranks, and a resumed run, see the same.
"""

import numpy as np

BLOCK = 10_000  # rows of a mixture in which each source has its exact share


def mix(x):
    """A hash of each uint64 (the finalizer of splitmix64), of 63 bits: adding to it cannot wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def permuted(index, n, seed, epoch):
    """The places of a permutation of 0..n-1, keyed by (seed, epoch): int64, shaped like `index`.

    A Feistel network, without a table: a number is two digits (a, b) of base ~sqrt(n), and each
    round adds to one of them a hash of the other. That can be undone, so it is a permutation. What
    the digits spell beyond n goes through again until it falls below n ("cycle walking").
    """
    index = np.asarray(index, np.int64)
    if index.size and not 0 <= index.min() <= index.max() < n:
        raise ValueError(f"indices {index.min()}..{index.max()} are not all in 0..{n - 1}")
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    base_a = np.uint64(np.ceil(np.sqrt(n)))
    base_b = np.uint64(-(-n // int(base_a)))

    def network(x):
        a, b = x // base_b, x % base_b
        for i in range(0, len(keys), 2):
            a = (a + mix(b ^ keys[i])) % base_a
            b = (b + mix(a ^ keys[i + 1])) % base_b
        return a * base_b + b

    out = network(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def rows_of_step(step, rows_per_step, n_rows, seed):
    """(epoch, row) of the global batch of `step`, which counts from 0: int64 [rows_per_step] each.
    The endless sequence is epoch 0's permutation of the rows, then epoch 1's, and so on; seed None:
    the rows as they stand."""
    if n_rows < 1:
        raise ValueError("not one whole row of tokens: lower max_seq_len or prepare more text")
    position = step * rows_per_step + np.arange(rows_per_step, dtype=np.int64)
    return _in_epochs(position, n_rows, seed)


def _in_epochs(position, n_rows, seed):
    epoch, row = np.divmod(position, n_rows)
    for e in np.unique(epoch) if seed is not None else ():
        row[epoch == e] = permuted(row[epoch == e], n_rows, seed, e)
    return epoch, row


def rows_of_mixture(step, rows_per_step, n_rows, shares, seed):
    """As rows_of_step, of several sources with n_rows[i] rows, which are numbered through.

    The endless sequence is cut in blocks of BLOCK rows. Of each, shares[i] are of source i, at
    places that a permutation of the block gives; these go through a source's epochs one by one,
    in the order of rows_of_step with a seed of its own.
    """
    block, place = rows_of_step(step, rows_per_step, BLOCK, seed)
    firsts = np.cumsum([0, *shares])
    source = np.searchsorted(firsts, place, side="right") - 1
    epoch, row = np.empty_like(place), np.empty_like(place)
    for i, n in enumerate(n_rows):
        chosen = source == i
        position = block[chosen] * shares[i] + place[chosen] - firsts[i]
        # SeedSequence takes large numbers: this one is hardly another run's
        epoch[chosen], row[chosen] = _in_epochs(position, n, seed + (1 + i << 64))
        row[chosen] += sum(n_rows[:i])
    return epoch, row


def shares_of(weights):
    """How many rows of a block each source has, BLOCK in all: int64, by largest remainders."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = exact.astype(np.int64)
    most = np.argsort(shares - exact, kind="stable")  # what was cut off, the largest first
    shares[most[: BLOCK - shares.sum()]] += 1
    return shares
