"""
Embeddings in fewer bytes: a byte or a bit for each number, as sentence-transformers has them.

    ranges = ranges_of(embedder.encode(sample))                       # int8 alone needs them
    codes = embedder.encode(texts, precision="int8", ranges=ranges)   # [N, C] int8
    found = scores(embedder.encode(queries), codes, "int8", ranges)   # [Q, N]

    bits = embedder.encode(texts, precision="binary")                 # [N, C / 8] int8
    found = scores(embedder.encode(queries), bits, "binary")          # or queries as bits, too
"""

import numpy as np


def ranges_of(vectors):
    """float32 [2, C]: the least and the largest value of each of the C numbers among the vectors
    [N, C], which int8 cuts into 256 steps. ValueError for fewer than two vectors."""
    if len(vectors) < 2:
        raise ValueError(f"int8: ranges from {len(vectors)} vectors; give ranges_of(a sample's)")
    return np.stack((vectors.min(0), vectors.max(0)))


def steps_of(ranges):
    """float32 [C]: what one of the 255 steps is worth; 1 where all values are the same."""
    steps = (ranges[1] - ranges[0]) / 255
    return np.where(steps == 0, 1, steps)


def quantize(vectors, precision, ranges=None):
    """float32 [N, C] -> with None as they are; "int8": int8 [N, C], by `ranges`, beyond which
    values are cut, or by the vectors' own; "binary": int8 [N, C / 8], bit c is x_c > 0.

    ValueError for another precision, and for bits of a C that 8 does not divide."""
    if precision == "int8":
        ranges = ranges_of(vectors) if ranges is None else ranges
        codes = np.floor((vectors - ranges[0]) / steps_of(ranges))
        return (codes.clip(0, 255) - 128).astype(np.int8)
    if precision == "binary":
        if vectors.shape[1] % 8:
            numbers = f"embeddings of {vectors.shape[1]} numbers"
            raise ValueError(f"precision='binary': {numbers}, expected a multiple of 8")
        return (np.packbits(vectors > 0, axis=1) ^ 128).view(np.int8)  # less 128, as they have it
    if precision is not None:
        raise ValueError(f"precision={precision!r}: expected None, 'int8' or 'binary'")
    return vectors


def scores(queries, texts, precision=None, ranges=None):
    """-> float32 [Q, N], larger is nearer: dot products of queries, float32 [Q, C] or quantized as
    the texts are, with what `quantize` gave for the texts.

    int8: of the lower ends of their steps, x = least + (code + 128) * step, which move all scores
    of a query by one number; without ranges of the codes as they are. binary: each bit is +1 or -1,
    so that of two texts' bits it is C - 2 * (their Hamming distance)."""

    def values(x):
        if x.dtype != np.int8:
            return x
        if precision == "binary":
            return 2 * np.unpackbits(x.view(np.uint8) ^ 128, axis=1).astype(np.float32) - 1
        x = x.astype(np.float32)
        return x if ranges is None else ranges[0] + (x + 128) * steps_of(ranges)

    queries, size = values(queries), 8192  # texts whose float32 values exist at a time
    parts = [queries @ values(texts[i : i + size]).T for i in range(0, len(texts), size)]
    return np.concatenate([np.empty((len(queries), 0), np.float32), *parts], 1)
