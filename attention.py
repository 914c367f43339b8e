"""
Attention over packed rows, its backends, and rotary positions. A packed row is one flat row of
tokens, all texts end to end; `Seqs` says where each text begins.

Shapes: B texts, T tokens of the packed row, H heads, D head_dim.
"""

import inspect
import math
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import lru_cache, partial
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

flash_attn_varlen_func = varlen_attn = None  # each is optional: see choose_backend
if torch.cuda.is_available():  # to import them takes half as long as torch itself
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

# ---- the packed row ----


@dataclass
class Seqs:
    """Where the B texts of a packed row lie. See make_seqs."""

    cu_seqlens: torch.Tensor  # [B+1] int32, 0 and the end of each text
    lengths: list[int]  # the same as B numbers on the host, so that nothing has to ask the device
    positions: torch.Tensor  # [T] int64, from 0 in each text
    max_seqlen: int  # no property: compiled code would be made anew for each list of lengths

    def to(self, device):
        return move(self, device)


def move(x, device):
    """A CPU tensor, or a list, tuple or dataclass that holds some, on the device. A GPU copies from
    pinned memory while the host goes on; a copy from other memory would first wait until the GPU
    has done all that it was given before."""
    if is_dataclass(x):
        return replace(x, **{name: move(part, device) for name, part in vars(x).items()})
    if type(x) in (list, tuple) and x and type(x[0]) is not int:  # not the lengths, on the host
        return type(x)(move(part, device) for part in x)
    if not torch.is_tensor(x):
        return x
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def make_seqs(lengths: list[int], device="cpu"):
    """Where B texts of these lengths (in tokens) lie in a packed row. ValueError for an empty text.
    Built on the CPU and moved once."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a packed row holds texts of at least 1 token, got lengths {lengths}")
    ends = np.cumsum([0, *lengths])  # [B+1]
    positions = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)  # [T]
    cu_seqlens = torch.from_numpy(ends.astype(np.int32))
    positions = torch.from_numpy(positions)
    return Seqs(cu_seqlens, list(lengths), positions, max(lengths)).to(device)


# ---- attention ----
# Three backends, one meaning of `causal` and `window = (left, right)`, which give every mask of the
# field: a query at position i sees keys i - left .. i + right of its text (-1: no limit), and none
# after i if causal.

BACKENDS = ("flash_attn", "varlen", "sdpa")  # the best first


def choose_backend(wanted, device, dtype, dropout_p=0.0, gqa=False, head_dim=64):
    """The attention backend that will run: `wanted`, one of BACKENDS, or for "auto" the first that
    can. dtype: of q, k and v (the autocast type in training); dropout_p: of attention
    probabilities; gqa: whether k and v have fewer heads; head_dim: the numbers of a head.
    ValueError where the wanted backend cannot run or cannot do the dropout: never a silent
    fallback."""
    unable = {}  # backend: why it cannot run
    if flash_attn_varlen_func is None:
        unable["flash_attn"] = "the package flash-attn is not installed"
    if varlen_attn is None:
        unable["varlen"] = "this torch has no torch.nn.attention.varlen"
    else:
        can = inspect.signature(varlen_attn).parameters
        if "window_size" not in can or (gqa and "enable_gqa" not in can):
            unable["varlen"] = "varlen attention of this torch has no window or no grouped heads"
        elif dropout_p > 0:
            unable["varlen"] = "varlen attention has no dropout of attention probabilities"
        elif head_dim % 8:  # flash-attn pads such heads
            unable["varlen"] = f"it needs heads of a multiple of 8 numbers, not {head_dim}"
    reason = None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        reason = f"it needs bf16 or fp16 on CUDA, not {dtype} on {device.type}"
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        reason = f"it needs a GPU of compute capability 8.0 or more, not {capability}"
    elif head_dim > 256:
        reason = f"it needs heads of at most 256 numbers, not {head_dim}"
    if reason:
        unable = {"flash_attn": reason, "varlen": reason}
    if wanted == "auto":
        return next(name for name in BACKENDS if name not in unable)
    if wanted not in BACKENDS:
        raise ValueError(f"attention_backend={wanted!r}: expected auto or one of {BACKENDS}")
    if wanted in unable:
        raise ValueError(f"attention_backend={wanted!r} cannot run: {unable[wanted]}")
    return wanted


def attention(q, k, v, seqs, causal, window, dropout_p=0.0, backend="sdpa"):
    """softmax(q k^T / sqrt(D)) v within each text. q [T, H, D], k, v [T, H_kv, D] -> [T, H, D]."""
    if backend == "sdpa":
        return sdpa_packed(q, k, v, seqs, causal, window, dropout_p)
    n, cu = seqs.max_seqlen, seqs.cu_seqlens
    if backend == "flash_attn":
        return flash_attn_varlen_func(
            q, k, v, cu, cu, n, n, dropout_p, causal=causal, window_size=window,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    grouped = {"enable_gqa": True} if q.size(1) != k.size(1) else {}
    # here a window of (-1, 0) is the causal mask
    return varlen_attn(q, k, v, cu, cu, n, n, window_size=window, **grouped)


def sdpa_packed(q, k, v, seqs, causal, window, dropout_p):
    """torch's scaled_dot_product_attention text by text; neighbours of equal length in one call.

    A T x T mask costs 12 times as much, padding 2.5 times (measured on 2 CPU cores). `split` and
    `cat` rather than slices: their backward is one copy, that of a slice is a zeroed [T, H, D]."""
    runs = [(n, len(list(same))) for n, same in groupby(seqs.lengths)]  # length, how often
    parts = zip(*(x.split([n * b for n, b in runs]) for x in (q, k, v)))
    out = []
    for (n, b), qkv in zip(runs, parts):
        qkv = (x.unflatten(0, (b, n)).transpose(1, 2) for x in qkv)  # [b, H, n, D]
        o = sdpa_window(*qkv, causal, window, dropout_p)
        out.append(o.transpose(1, 2).flatten(0, 1))  # [b*n, H, D]
    return torch.cat(out)


def sdpa_window(q, k, v, causal, window, dropout_p):
    """q [b, H, n, D]. Long texts go in blocks of queries over the keys near them, so that memory
    and time grow with n * window, not with n * n."""
    n, gqa = q.size(2), q.size(1) != k.size(1)
    left, right = (n if w < 0 else w for w in window)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, enable_gqa=gqa)
    if left >= n - 1 and (causal or right >= n - 1):
        return attend(q, k, v, is_causal=causal)
    block = n if n <= 256 else max(128, (left + right) // 2)
    out = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        first, last = max(0, start - left), min(n, stop + right)
        mask = window_mask(stop - start, last - first, start - first, left, right, q.device)
        near_k, near_v = k[:, :, first:last], v[:, :, first:last]
        out.append(attend(q[:, :, start:stop], near_k, near_v, mask))
    return torch.cat(out, dim=2)


@lru_cache(maxsize=64)
def window_mask(n_query, n_key, offset, left, right, device):
    """[n_query, n_key] bool: query i stands at key i + offset and sees `left` back, `right` on."""
    i = torch.arange(n_query, device=device)[:, None] + offset
    j = torch.arange(n_key, device=device)[None, :]
    return (j >= i - left) & (j <= i + right)


# ---- rotary positions ----


def rope_frequencies(rope, head_dim, max_seq_len, device):
    """(frequencies [D/2] fp32, factor on cos and sin) for one kind of layer. `rope` = {"theta":
    float, "scaling": None or Hugging Face's dictionary with "rope_type"}: linear (positions divided
    by `factor`), llama3 (low frequencies only, Llama 3.1) or yarn (Peng et al. 2023, arXiv
    2309.00071, sec. 3.2 and 3.4)."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / rope["theta"] ** (even / head_dim)
    s, scale = rope["scaling"], 1.0
    if s is None:
        return freq, scale
    kind, factor = s["rope_type"], s["factor"]
    trained = s.get("original_max_position_embeddings") or max_seq_len
    if kind == "linear":
        keep = 0  # every frequency is divided
    elif kind == "llama3":
        # wavelengths beyond trained / low are stretched, those under trained / high are kept
        turns = trained * freq / (2 * math.pi)  # full turns within the trained length
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        keep = keep.clamp(0, 1)
    elif kind == "yarn":
        # a ramp over the dimensions, from beta_fast turns in the trained length to beta_slow
        low, high = (
            head_dim / 2 * math.log(trained / (turns * 2 * math.pi)) / math.log(rope["theta"])
            for turns in (s.get("beta_fast") or 32, s.get("beta_slow") or 1)
        )
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (even / 2 - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        scale = s.get("attention_factor") or 0.1 * math.log(max(factor, 1)) + 1.0
    else:
        raise ValueError(f"rope_type {kind!r}: expected default, linear, llama3 or yarn")
    return freq / factor * (1 - keep) + freq * keep, scale


def rotate(x, cos, sin, pairs):
    """Rotary embedding in fp32. x [T, H, D], cos and sin [T, D/2] -> like x.

    pairs = "half": dimension i turns with i + D/2 (Llama, ModernBERT), "adjacent": 2i with 2i + 1.
    """
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2], fp32: so are the products
    half = pairs == "half"
    a, b = x.chunk(2, dim=-1) if half else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = a * cos - b * sin, b * cos + a * sin
    out = torch.cat(turned, dim=-1) if half else torch.stack(turned, dim=-1).flatten(-2)
    return out.to(x.dtype)
