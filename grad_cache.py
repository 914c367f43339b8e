"""
What the gradient cache rests on: texts in chunks, and vectors of all chunks and ranks together.
"""

import torch
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather

from common import all_reduce_max


def pad_chunks(encoded, chunks):
    """Under FSDP a forward needs all ranks: adds chunks of one token, of a text that nothing asks
    for, until every rank has as many chunks as the one that has most."""
    missing = all_reduce_max(len(chunks)) - len(chunks)
    if missing:
        encoded.append(([0], (0, 1)))
        chunks += [[len(encoded) - 1]] * missing


def padded(out):
    """What the embedder gives -> [n, C], of multi-vectors [n, L, C] with zero rows as padding."""
    if torch.is_tensor(out):
        return out
    return torch.nn.utils.rnn.pad_sequence(out[0].split(out[1]), batch_first=True)


def gather_rows(x, counts):
    """Rows of all ranks in rank order: x [n, ...] -> [sum of counts, ...], with gradients. Of
    multi-vectors [n, L, C] all become as long as the longest of any rank."""
    if len(counts) == 1:
        return x
    longest = all_reduce_max(x.size(1)) - x.size(1) if x.dim() == 3 else 0
    x = F.pad(x, (0, 0) + (0, longest) * (x.dim() == 3) + (0, max(counts) - len(x)))
    parts = all_gather(x.contiguous())
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def embed_all(embed, chunks):
    """Vectors of all texts in their own order, from those of the chunks -> [n, C] or [n, L, C]."""
    vectors = {}
    for i, chunk in enumerate(chunks):
        vectors |= zip(chunk, embed(i))
    vectors = [vectors[i] for i in range(len(vectors))]
    return torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
