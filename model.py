"""
One transformer for encoders and decoders, over packed rows.

A batch is one flat row of tokens, all texts end to end, and `Seqs`, which says where each text
begins. There is no padding and no mask tensor: two switches per layer, `causal` and
`window = (left, right)`, give every mask of the field.

Llama, Mistral, Qwen2, Qwen3, ModernBERT, ModernBERT-decoder and NeoBERT differ in `ModelConfig`
only. Folders are Hugging Face's: `from_pretrained` and `save_pretrained` read and write what
`transformers` does, key by key (see NAMES below).

Shapes: B texts, T tokens of the packed row, C n_embd, H heads, D head_dim, V vocabulary, L labels.
"""

import inspect
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

try:  # each is optional: see choose_backend
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# ---- the packed row ----


@dataclass
class Seqs:
    """Where the B texts of a packed row lie. Built on the CPU by `data.make_seqs`, once a batch."""

    cu_seqlens: torch.Tensor  # [B+1] int32, 0 and the end of each text
    lengths: list[int]  # the same as B numbers on the host, so that nothing has to ask the device
    positions: torch.Tensor  # [T] int64, 0.. within each text
    max_seqlen: int


# ---- attention ----
# q [T, H, D], k and v [T, H_kv, D] -> [T, H, D], each text by itself. Three backends, one meaning:
# a query at position i sees keys i - left .. i + right (-1: no limit), and none after i if causal.


def choose_backend(wanted, device, dtype, dropout_p=0.0, gqa=False):
    """The attention backend that will run: "flash_attn", "varlen" (torch's own) or "sdpa".

    `wanted` is one of these or "auto", the first that can. `dtype` is what q, k and v will have
    (the autocast type in training), `dropout_p` the dropout of attention probabilities, `gqa`
    whether k and v have fewer heads. Raises ValueError where the wanted backend cannot run or
    cannot do the dropout: never a silent fallback.
    """
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    reasons = {"flash_attn": None, "varlen": None, "sdpa": None}
    if flash_attn_varlen_func is None:
        reasons["flash_attn"] = "the package flash-attn is not installed"
    if varlen_attn is None:
        reasons["varlen"] = "this torch has no torch.nn.attention.varlen"
    else:
        can = inspect.signature(varlen_attn).parameters
        if "window_size" not in can or (gqa and "enable_gqa" not in can):
            reasons["varlen"] = "varlen attention of this torch has no window or no grouped heads"
        elif dropout_p > 0:
            reasons["varlen"] = "varlen attention has no dropout of attention probabilities"
    for name in ("flash_attn", "varlen"):
        if not half:
            reasons[name] = f"it needs bf16 or fp16 on CUDA, not {dtype} on {device.type}"
    if wanted == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if wanted not in reasons:
        raise ValueError(f"attention_backend={wanted!r}: expected auto or one of {list(reasons)}")
    if reasons[wanted]:
        raise ValueError(f"attention_backend={wanted!r} cannot run: {reasons[wanted]}")
    return wanted


@torch.compiler.disable  # compiled blocks stop here: lengths change with every batch
def attention(q, k, v, seqs, causal, window, dropout_p=0.0, backend="sdpa"):
    """softmax(q k^T / sqrt(D)) v within each text. q [T, H, D], k, v [T, H_kv, D] -> [T, H, D]."""
    if backend == "flash_attn":
        cu, longest = seqs.cu_seqlens, seqs.max_seqlen
        exact = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, dropout_p, causal=causal, window_size=window,
            deterministic=exact,
        )  # fmt: skip
    if backend == "varlen":
        cu, longest = seqs.cu_seqlens, seqs.max_seqlen
        grouped = {"enable_gqa": True} if q.size(1) != k.size(1) else {}
        # here a window of (-1, 0) is the causal mask
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=window, **grouped)
    return sdpa_packed(q, k, v, seqs.lengths, causal, window, dropout_p)


def sdpa_packed(q, k, v, lengths, causal, window, dropout_p):
    """torch's scaled_dot_product_attention text by text; neighbours of equal length in one call.

    A T x T mask costs 12 times as much, padding 2.5 times (measured on 2 CPU cores). `split` and
    `cat` rather than slices: their backward is one copy, that of a slice is a zeroed [T, H, D].
    """
    runs = []  # [length, how many neighbours have it]
    for n in lengths:
        if runs and runs[-1][0] == n:
            runs[-1][1] += 1
        else:
            runs.append([n, 1])
    sizes = [n * b for n, b in runs]
    out = []
    for (n, b), *qkv in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q1, k1, v1 = (x.view(b, n, -1, x.size(-1)).transpose(1, 2) for x in qkv)  # [b, H, n, D]
        o = sdpa_window(q1, k1, v1, causal, window, dropout_p)
        out.append(o.transpose(1, 2).reshape(b * n, -1, o.size(-1)))  # [b*n, H, D]
    return torch.cat(out)


def sdpa_window(q, k, v, causal, window, dropout_p):
    """q [b, H, n, D] over its own window. Long texts go in blocks of queries over the keys near
    them, so that memory and time grow with n * window, not with n * n."""
    n, gqa = q.size(2), q.size(1) != k.size(1)
    left, right = (n if w < 0 else w for w in window)
    if left >= n - 1 and (causal or right >= n - 1):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout_p, enable_gqa=gqa
        )
    block = n if n <= 256 else max(128, (left + right) // 2)
    out = []
    for start in range(0, n, block):
        stop = min(start + block, n)
        first, last = max(0, start - left), min(n, stop + right)
        mask = window_mask(stop - start, last - first, start - first, left, right, q.device)
        near_k, near_v = k[:, :, first:last], v[:, :, first:last]
        out.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], near_k, near_v, mask, dropout_p=dropout_p, enable_gqa=gqa
            )
        )
    return torch.cat(out, dim=2)


@lru_cache(maxsize=64)
def window_mask(n_query, n_key, offset, left, right, device):
    """[n_query, n_key] bool: query i stands at key i + offset and sees `left` back, `right` on."""
    i = torch.arange(n_query, device=device)[:, None] + offset
    j = torch.arange(n_key, device=device)[None, :]
    return (j >= i - left) & (j <= i + right)


# ---- rotary positions ----


def rope_frequencies(rope, head_dim, max_seq_len, device):
    """(frequencies [D/2] fp32, factor on cos and sin) for one kind of layer.

    `rope` = {"theta": float, "scaling": None or Hugging Face's dictionary with "rope_type"}:
    linear (positions divided by `factor`), llama3 (low frequencies only, Llama 3.1) or yarn
    (Peng et al. 2023, arXiv 2309.00071, sec. 3.2 and 3.4).
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / rope["theta"] ** (even / head_dim)
    s = rope["scaling"]
    if s is None:
        return freq, 1.0
    kind, factor = s["rope_type"], s["factor"]
    trained = s.get("original_max_position_embeddings") or max_seq_len
    if kind == "linear":
        return freq / factor, 1.0
    if kind == "llama3":
        # wavelengths beyond trained / low are stretched, those under trained / high are kept
        turns = trained * freq / (2 * math.pi)  # full turns within the trained length
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        keep = keep.clamp(0, 1)
        return freq / factor * (1 - keep) + freq * keep, 1.0
    if kind == "yarn":
        # a ramp over the dimensions, from beta_fast turns in the trained length to beta_slow
        def dimension(turns):
            wavelength = trained / (turns * 2 * math.pi)
            return head_dim / 2 * math.log(wavelength) / math.log(rope["theta"])

        low, high = dimension(s.get("beta_fast") or 32), dimension(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (even / 2 - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        scale = s.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        return freq / factor * (1 - keep) + freq * keep, scale
    raise ValueError(f"rope_type {kind!r}: expected default, linear, llama3 or yarn")


def rotate(x, cos, sin, pairs):
    """Rotary embedding in fp32. x [T, ..., H, D], cos and sin [T, D/2] -> like x.

    pairs = "half": dimension i turns with i + D/2 (Llama, ModernBERT), "adjacent": 2i with 2i + 1.
    """
    shape = (x.size(0),) + (1,) * (x.dim() - 2) + (-1,)
    cos, sin = cos.view(shape), sin.view(shape)
    if pairs == "half":
        a, b = x.chunk(2, dim=-1)  # cos and sin are fp32: so are the products
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


# ---- configuration ----


@dataclass
class ModelConfig:
    """What differs between the families, as data."""

    family: str  # a key of NAMES: which keys and which config.json a folder has
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_hidden: int  # width of the gated MLP
    max_seq_len: int  # the positions the model is trained for
    n_kv_head: int = 0  # 0: as many as n_head
    head_dim: int = 0  # 0: n_embd / n_head
    causal: bool = True
    layer_kinds: list = None  # "global" or "local" per layer; None: all global
    window: int = 0  # of local layers, Hugging Face's number: see window_of
    rope: dict = None  # {"global": {"theta", "scaling"}, "local": ...}; None: theta 10,000
    rope_pairs: str = "half"  # or "adjacent"
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    embed_norm: bool = False  # a norm behind the embedding; block 0 then has none before attention
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's q and k
    fused_qkv: bool = False  # q, k and v as one matrix
    fused_mlp: bool = False  # gate and up as one matrix
    activation: str = "silu"  # of the gate; or "gelu"
    head: str = "linear"  # "dense": dense -> gelu -> norm -> linear (ModernBERT); "none": no head
    head_bias: bool = False
    head_dense_bias: bool = False
    tied: bool = True  # the head's matrix is the embedding
    attn_dropout: float = 0.0  # of attention probabilities
    out_dropout: float = 0.0  # of the attention block's output
    init: str = "normal"  # "normal" .02, "uniform" +-.02, "megatron": see init_weights
    hf: dict = field(default_factory=dict)  # config.json as read: what we do not use is passed on

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.layer_kinds = self.layer_kinds or ["global"] * self.n_layer
        kinds = set(self.layer_kinds)
        if "local" in kinds and (
            self.window < 1
            or self.family in ("llama", "neobert")
            or (self.family == "mistral" and len(kinds) == 2)
        ):
            raise ValueError(f"a {self.family} cannot have local layers {kinds} of {self.window}")
        if self.family == "modernbert" and self.causal:  # transformers has its decoder apart
            self.family, self.fused_qkv = "modernbert-decoder", False
        if len(self.layer_kinds) != self.n_layer:
            raise ValueError(f"{len(self.layer_kinds)} layer_kinds for {self.n_layer} layers")
        if self.rope is None:
            self.rope = {kind: {"theta": 10_000.0, "scaling": None} for kind in ("global", "local")}
        for rope in self.rope.values():
            rope_frequencies(rope, self.head_dim, self.max_seq_len, "cpu")  # an unknown type: now

    def window_of(self, layer):
        """(left, right) of a layer. A local decoder layer sees `window` keys, itself included, a
        local bidirectional one `window` on each side: that is what transformers computes."""
        if self.layer_kinds[layer] == "global":
            return (-1, 0) if self.causal else (-1, -1)
        return (self.window - 1, 0) if self.causal else (self.window, self.window)


def _ettin(n_layer, n_embd, n_hidden, n_head):
    kinds = ["local" if i % 3 else "global" for i in range(n_layer)]
    same = dict(n_layer=n_layer, n_embd=n_embd, n_hidden=n_hidden, n_head=n_head, vocab_size=50368)
    same |= dict(max_seq_len=1024, layer_kinds=kinds, window=64, norm="layer", embed_norm=True)
    same |= dict(fused_mlp=True, activation="gelu", head="dense", head_bias=True, init="megatron")
    return same | dict(family="modernbert", causal=False, fused_qkv=True, out_dropout=0.1)


_TINY = dict(n_layer=6, n_head=4, n_embd=256, max_seq_len=512, vocab_size=8192)

# Named shapes. ModernBERT's (Ettin) are encoders, or with causal=True the decoders that pair.
SIZES = {
    "ettin-17m": _ettin(7, 256, 384, 4),
    "ettin-32m": _ettin(10, 384, 576, 6),
    "ettin-68m": _ettin(19, 512, 768, 8),
    "ettin-150m": _ettin(22, 768, 1152, 12),
    "ettin-400m": _ettin(28, 1024, 2624, 16),
    "ettin-1b": _ettin(28, 1792, 3840, 28),
    "neobert-250m": dict(
        family="neobert", vocab_size=30522, n_layer=28, n_head=12, n_embd=768, n_hidden=2048,
        max_seq_len=1024, causal=False, rope_pairs="adjacent", fused_qkv=True, fused_mlp=True,
        norm_eps=1e-6, tied=False, head_bias=True, init="uniform"),
    # small shapes for teaching
    "modernbert-tiny": _ettin(6, 256, 384, 4) | dict(vocab_size=8192, max_seq_len=512),
    "llama-tiny": _TINY | dict(family="llama", n_hidden=688),
    "qwen3-tiny": _TINY | dict(family="qwen3", n_hidden=688, n_kv_head=2, qk_norm=True),
}  # fmt: skip


# ---- the blocks ----


class Norm(nn.Module):
    """RMSNorm or LayerNorm in fp32; the result has the type of x."""

    def __init__(self, n, kind, eps, bias=False):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, x):
        weight = self.weight.float()
        if self.kind == "rms":
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)


def to_compute(x):
    """x in the autocast type, once, instead of once in each linear layer that reads it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        c = self.config = config
        self.kind, self.window = c.layer_kinds[layer], c.window_of(layer)
        n_q, n_kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        if c.fused_qkv:
            self.qkv_proj = nn.Linear(c.n_embd, n_q + 2 * n_kv, bias=c.qkv_bias)
        else:
            self.q_proj = nn.Linear(c.n_embd, n_q, bias=c.qkv_bias)
            self.k_proj = nn.Linear(c.n_embd, n_kv, bias=c.qkv_bias)
            self.v_proj = nn.Linear(c.n_embd, n_kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(n_q, c.n_embd, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = Norm(c.head_dim, "rms", c.norm_eps)
            self.k_norm = Norm(c.head_dim, "rms", c.norm_eps)

    def forward(self, x, rope, seqs, backend):  # x [T, C]
        c = self.config
        if c.fused_qkv:
            qkv = self.qkv_proj(x).view(x.size(0), -1, c.head_dim)  # [T, H + 2 H_kv, D]
            q, k, v = qkv.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=1)
        else:
            q, k, v = (
                proj(x).view(x.size(0), -1, c.head_dim)  # [T, H, D] or [T, H_kv, D]
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rope[self.kind]
        q, k = rotate(q, cos, sin, c.rope_pairs), rotate(k, cos, sin, c.rope_pairs)
        dropout_p = c.attn_dropout if self.training else 0.0
        y = attention(q, k, v, seqs, c.causal, self.window, dropout_p, backend)
        y = self.o_proj(y.flatten(1))  # [T, H, D] -> [T, H*D] -> [T, C]
        return F.dropout(y, c.out_dropout, self.training)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, config):
        super().__init__()
        c = config
        self.act = {"silu": F.silu, "gelu": F.gelu}[c.activation]
        if c.fused_mlp:
            self.gate_up_proj = nn.Linear(c.n_embd, 2 * c.n_hidden, bias=c.mlp_bias)
        else:
            self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.mlp_bias)
            self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=c.mlp_bias)
        self.fused = c.fused_mlp

    def forward(self, x):  # [T, C]
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))"""

    def __init__(self, config, layer):
        super().__init__()
        c = config
        if not (c.embed_norm and layer == 0):  # the embedding's norm has done it already
            self.attn_norm = Norm(c.n_embd, c.norm, c.norm_eps, c.norm_bias)
        else:
            self.attn_norm = nn.Identity()
        self.attn = Attention(c, layer)
        self.mlp_norm = Norm(c.n_embd, c.norm, c.norm_eps, c.norm_bias)
        self.mlp = MLP(c)

    def forward(self, x, rope, seqs, backend):
        x = x + self.attn(to_compute(self.attn_norm(x)), rope, seqs, backend)
        return x + self.mlp(to_compute(self.mlp_norm(x)))


class Head(nn.Module):
    """What ModernBERT has before its decoder: norm(gelu(dense(x)))."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.dense = nn.Linear(c.n_embd, c.n_embd, bias=c.head_dense_bias)
        self.norm = Norm(c.n_embd, c.norm, c.norm_eps, c.norm_bias)

    def forward(self, x):
        x = x.to(next(self.dense.parameters()).dtype)  # fp32 where the head trains on a bf16 base
        return self.norm(F.gelu(self.dense(x)))


class Transformer(nn.Module):
    """The model. Everything that touches a parameter runs inside `forward`, so that DDP, FSDP and
    compile see one call."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.embed_norm = Norm(c.n_embd, c.norm, c.norm_eps, c.norm_bias) if c.embed_norm else None
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = Norm(c.n_embd, c.norm, c.norm_eps, c.norm_bias)
        self.head = Head(c) if c.head == "dense" else None
        if c.head != "none":
            self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=c.head_bias)
        self.tie()
        self.gradient_checkpointing = False
        self.backend = "sdpa"  # runs everywhere; scripts set choose_backend(...)
        self.stream_dtype = None  # of the residual stream; None: as the embedding gives it
        self.warned = False

    def tie(self):
        if self.config.tied and self.config.head != "none":
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, seqs, rows=None, targets=None, vectors=None, at=None):
        """tokens [T] int64 of a packed row ->

        - hidden [T, C] after the final norm,
        - with `rows` [L] int64: logits [L, V] at these rows of the hidden states,
        - with `rows` and `targets` [L] int64: (sum of cross-entropies, sum of hits) at these rows.

        vectors [A, C]: stand in for the embeddings of the tokens at rows `at` [A] int64, whatever
        these tokens are; gradients flow into them.
        """
        x = self.embed(tokens)
        if vectors is not None:
            x = x.index_copy(0, at, vectors.to(x.dtype))
        if self.stream_dtype is not None:  # bf16 under LoRA, also where the embedding is fp32
            x = x.to(self.stream_dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        rope = self.rope(seqs)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, seqs, self.backend, use_reentrant=False)
            else:
                x = block(x, rope, seqs, self.backend)
        x = self.norm(x)
        if rows is None:
            return x
        if self.config.head == "none":
            raise ValueError("this model has no language modelling head: it gives hidden states")
        x = x[rows]  # [L, C]: the head sees labelled positions only
        if self.head is not None:
            x = self.head(to_compute(x))
        if targets is None:
            return self.lm_head(x.to(self.lm_head.weight.dtype))
        return linear_cross_entropy(x, self.lm_head.weight, self.lm_head.bias, targets)

    def rope(self, seqs):
        """{kind of layer: (cos, sin)}, each [T, D/2] fp32."""
        c = self.config
        if seqs.max_seqlen > c.max_seq_len and not self.warned:
            self.warned = True
            warnings.warn(
                f"a text of {seqs.max_seqlen:,} tokens: the model was trained for "
                f"{c.max_seq_len:,} positions", stacklevel=2,
            )  # fmt: skip
        out = {}
        for kind in dict.fromkeys(c.layer_kinds):
            device = seqs.positions.device
            freq, scale = rope_frequencies(c.rope[kind], c.head_dim, c.max_seq_len, device)
            angle = seqs.positions[:, None] * freq  # [T, D/2]
            out[kind] = angle.cos() * scale, angle.sin() * scale
        return out

    def drop_head(self):
        """For embeddings, which are made from hidden states alone."""
        if self.config.head != "none":
            self.config.head, self.head = "none", None
            del self.lm_head

    def resize_vocab(self, vocab_size):
        """More rows for new tokens, each the mean of the old ones; the head's too."""
        old, bias = self.embed.weight, getattr(getattr(self, "lm_head", None), "bias", None)
        extra = vocab_size - old.size(0)
        if extra < 0:
            raise ValueError(f"resize_vocab: {vocab_size} is under the present {old.size(0)}")

        def grown(w):
            mean = w.detach().float().mean(0, keepdim=True).to(w.dtype)
            rows = torch.cat((w.detach(), mean.expand(extra, *w.shape[1:])))
            return nn.Parameter(rows, requires_grad=w.requires_grad)

        self.embed.weight = grown(old)
        if self.config.head != "none" and not self.config.tied:
            self.lm_head.weight = grown(self.lm_head.weight)
        if bias is not None:
            self.lm_head.bias = grown(bias)
        self.config.vocab_size = self.embed.num_embeddings = vocab_size
        self.tie()

    def flops_per_token(self, seq_len):
        """Floating-point operations of forward and backward for one token of a text of seq_len:
        6 a weight that multiplies, 12 D H a key seen (PaLM, arXiv 2204.02311, appendix B)."""
        c = self.config
        n = sum(p.numel() for b in self.blocks for p in b.parameters() if p.dim() == 2)
        seen = 0
        for i in range(c.n_layer):
            left, right = (seq_len if w < 0 else min(w, seq_len) for w in c.window_of(i))
            seen += min(seq_len / (2 if c.causal else 1), left + right + 1)
        return 6 * n + 12 * c.n_head * c.head_dim * seen

    def save_pretrained(self, folder, state_dict=None):
        """Writes config.json and safetensors that `transformers` loads with equal outputs.
        `state_dict`: full weights gathered elsewhere (FSDP)."""
        write_folder(folder, self.config, self.state_dict() if state_dict is None else state_dict)


@torch.no_grad()
def init_weights(model):
    """Fresh weights. normal: std .02 (Llama); uniform: +-.02 (NeoBERT); megatron: truncated normal
    .02 at 2 sigma and .02 / sqrt(2 layers) for what writes to the residual stream (Ettin)."""
    c = model.config
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)  # norms are 1
        elif c.init == "uniform":
            p.uniform_(-0.02, 0.02)
        elif c.init == "normal":
            p.normal_(0.0, 0.02)
        else:
            out = name.endswith(("o_proj.weight", "down_proj.weight", "head.dense.weight"))
            std = 0.02 / math.sqrt(2 * c.n_layer) if out else 0.02
            nn.init.trunc_normal_(p, 0.0, std, -2 * std, 2 * std)
    return model


# ---- the loss over a vocabulary ----


class _LinearCrossEntropy(torch.autograd.Function):
    # With p = exp(logits - max) and s = sum p:
    #     loss = log s + max - logit[target]
    #     dx = (p / s) W - W[target],    dW = (p / s)^T x - onehot^T x
    # p / s is never formed: s divides the small sides, dx rows and x rows.
    @staticmethod
    def forward(ctx, x, weight, bias, targets, grad):
        need_x, need_w, need_b = (grad and need for need in ctx.needs_input_grad[:3])
        wide = torch.float32 if x.dtype != torch.float64 else torch.float64
        loss, hits = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=torch.int64)
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=wide) if need_w else None
        db = torch.zeros_like(bias, dtype=wide) if need_b else None
        w = weight.to(x.dtype)
        # 64 MB of fp32 logits at a time on the CPU, 512 MB on a GPU
        step = max(1, 2 ** (24 if x.device.type == "cpu" else 27) // weight.size(0))
        # one buffer for all chunks: on the CPU fresh memory costs a page fault for each 4 kB
        buffer = torch.empty(min(step, x.size(0)), weight.size(0), dtype=wide, device=x.device)
        for start in range(0, x.size(0), step):
            x1, t1 = x[start : start + step], targets[start : start + step]  # [n, C], [n]
            logits = buffer[: x1.size(0)]  # [n, V]
            if x.dtype == wide:
                torch.mm(x1, w.t(), out=logits)
            else:
                logits.copy_(x1 @ w.t())
            if bias is not None:
                logits += bias
            top = logits.amax(dim=1, keepdim=True)  # [n, 1]
            right = logits.gather(1, t1[:, None])  # [n, 1], the target's logit
            hits += (right == top).sum()  # a tie with the best counts as a hit
            p = logits.sub_(top).exp_()
            s = p.sum(dim=1, keepdim=True)  # [n, 1]
            loss += (s.log() + top - right).sum()
            if db is not None:
                db += (1 / s[:, 0]) @ p
                db.index_add_(0, t1, torch.full_like(s[:, 0], -1.0))
            if need_x or need_w:
                p = p.to(x.dtype)
            if need_x:
                dx[start : start + step] = (p @ w).to(wide) / s - w[t1]
            if need_w:
                if x.dtype == wide:
                    dw.addmm_(p.t(), x1 / s)  # in place: no second [V, C]
                else:
                    dw += p.t() @ (x1 / s).to(x.dtype)
                dw.index_add_(0, t1, -x1.to(wide))
        ctx.save_for_backward(dx, dw, db)
        ctx.types = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        dx, dw, db = ctx.saved_tensors
        dx = None if dx is None else dx.mul_(d_loss)
        dw = None if dw is None else dw.mul_(d_loss).to(ctx.types[0])
        db = None if db is None else db.mul_(d_loss).to(ctx.types[1])
        return dx, dw, db, None, None


def linear_cross_entropy(x, weight, bias, targets):
    """Sum over rows of -log softmax(x W^T + b)[target], and how many targets had the best logit.

    x [L, C], weight [V, C], bias [V] or None, targets [L] int64 -> (loss fp32, hits int64). Logits
    exist for a chunk of rows at a time; the gradients are computed in the forward pass, chunk by
    chunk, so that no [L, V] tensor lives. Without gradients: the loss alone. L = 0 gives 0.
    """
    x, grad = to_compute(x), torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False):  # types are settled above
        return _LinearCrossEntropy.apply(x, weight, bias, targets, grad)


# ---- Hugging Face folders ----
# Our module names on the left, each family's on the right.

_LLAMA = {
    "embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
    "lm_head": "lm_head", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj", "attn.o_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}  # fmt: skip
_MODERNBERT = {
    "embed": "model.embeddings.tok_embeddings", "embed_norm": "model.embeddings.norm",
    "blocks": "model.layers", "norm": "model.final_norm", "lm_head": "decoder",
    "attn_norm": "attn_norm", "mlp_norm": "mlp_norm", "attn.o_proj": "attn.Wo",
    "mlp.gate_up_proj": "mlp.Wi", "mlp.down_proj": "mlp.Wo",
}  # fmt: skip
NAMES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
    "modernbert": _MODERNBERT | {
        "attn.qkv_proj": "attn.Wqkv", "head.dense": "head.dense", "head.norm": "head.norm"},
    "modernbert-decoder": _MODERNBERT | {
        "attn.q_proj": "attn.q_proj", "attn.k_proj": "attn.k_proj", "attn.v_proj": "attn.v_proj",
        "head.dense": "lm_head.dense", "head.norm": "lm_head.norm"},
    "neobert": {
        "embed": "model.encoder", "blocks": "model.transformer_encoder",
        "norm": "model.layer_norm", "lm_head": "decoder", "attn_norm": "attention_norm",
        "mlp_norm": "ffn_norm", "attn.qkv_proj": "qkv", "attn.o_proj": "wo",
        "mlp.gate_up_proj": "ffn.w12", "mlp.down_proj": "ffn.w3"},
}  # fmt: skip
ARCHITECTURES = {  # with a language modelling head, without
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertModel"),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", "ModernBertDecoderModel"),
    "neobert": ("NeoBERTLMHead", "NeoBERT"),
}

CLASSIFIERS = ("score.", "classifier.", "linear.")  # the last layer of a classifier's folder


def hf_module(module, family):
    """"blocks.3.attn.q_proj" -> "model.layers.3.self_attn.q_proj" """
    names = NAMES[family]
    if not module.startswith("blocks."):
        return names[module]
    _, i, inner = module.split(".", 2)
    return f"{names['blocks']}.{i}.{names[inner]}"


def our_module(module, family):
    """The way back; None for a name that the family does not have. "model." may be missing."""
    back = {theirs: ours for ours, theirs in NAMES[family].items()}
    for name in (module, "model." + module):
        if name in back and back[name] != "blocks":
            return back[name]
        head = NAMES[family]["blocks"] + "."
        if name.startswith(head):
            i, _, inner = name[len(head) :].partition(".")
            if i.isdigit() and inner in back:
                return f"blocks.{i}.{back[inner]}"
    return None


def _rope_from_hf(hf, kind, theta_key, theta_default):
    """{"theta", "scaling"} from `rope_parameters`, or the older rope_theta and rope_scaling."""
    new = hf.get("rope_parameters") or {}
    new = new.get({"global": "full_attention", "local": "sliding_attention"}[kind], new)
    old = hf.get("rope_scaling") or {}
    scaling = {k: v for k, v in (old | new).items() if k not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", old.get("type", "default"))
    theta = new.get("rope_theta") or hf.get(theta_key) or theta_default
    if kind == "local" and hf.get(theta_key, 0) is None:  # null: as global
        theta = hf.get("global_rope_theta") or theta
    return {"theta": theta, "scaling": None if scaling["rope_type"] == "default" else scaling}


def config_from_hf(hf):
    """config.json as a dictionary -> ModelConfig. Missing keys get transformers' defaults."""
    family = hf.get("model_type")
    if family not in NAMES:
        raise ValueError(f"config.json: model_type {family!r}, expected one of {list(NAMES)}")
    n_layer, n_head = hf["num_hidden_layers"], hf["num_attention_heads"]
    c = dict(
        family=family, vocab_size=hf["vocab_size"], n_layer=n_layer, n_head=n_head,
        n_embd=hf["hidden_size"], n_hidden=hf["intermediate_size"], hf=hf,
    )  # fmt: skip
    if family == "neobert":
        n_hidden = int(2 * hf["intermediate_size"] / 3)
        kept = ("rope_pairs", "fused_qkv", "fused_mlp", "norm_eps", "init")
        c |= {k: SIZES["neobert-250m"][k] for k in kept} | dict(
            n_hidden=(n_hidden + 7) // 8 * 8, max_seq_len=hf.get("max_length", 1024),
            causal=hf.get("is_causal", False), norm_eps=hf.get("norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings", False), head_bias=hf.get("decoder_bias", True),
        )  # fmt: skip
        rope = _rope_from_hf(hf, "global", "rope_theta", 10_000.0)
        return ModelConfig(**c, rope={"global": rope, "local": rope})
    kinds = hf.get("layer_types")
    c["max_seq_len"] = hf.get("max_position_embeddings", 2048 if family == "llama" else 8192)
    if family.startswith("modernbert"):
        every = hf.get("global_attn_every_n_layers", 3)
        thetas = (("global", 160_000.0), ("local", 10_000.0))
        dropout = hf.get("attention_dropout", 0.0)
        c |= dict(
            causal=family == "modernbert-decoder" and hf.get("is_causal", True),
            window=hf.get("local_attention", 128) // 2,  # the config counts both sides
            rope={k: _rope_from_hf(hf, k, f"{k}_rope_theta", theta) for k, theta in thetas},
            norm="layer", norm_eps=hf.get("norm_eps", 1e-5), norm_bias=hf.get("norm_bias", False),
            embed_norm=True, qkv_bias=hf.get("attention_bias", False),
            out_bias=hf.get("attention_bias", False), mlp_bias=hf.get("mlp_bias", False),
            fused_qkv=family == "modernbert", fused_mlp=True,
            activation=hf.get("hidden_activation", "gelu"), head="dense",
            head_bias=hf.get("decoder_bias", True),
            head_dense_bias=hf.get("classifier_bias", False),
            tied=hf.get("tie_word_embeddings", True), init="megatron", attn_dropout=dropout,
            out_dropout=hf.get("attention_out_dropout", dropout),  # ours; theirs share one number
        )  # fmt: skip
        kinds = kinds or ["sliding" if i % every else "full" for i in range(n_layer)]
    else:
        bias = hf.get("attention_bias", False)
        rope = _rope_from_hf(hf, "global", "rope_theta", 10_000.0)
        window = hf.get("sliding_window")
        if family in ("qwen2", "qwen3"):
            window = window if hf.get("use_sliding_window") else None
            from_layer = hf.get("max_window_layers", 28)
        else:
            window, from_layer = (window, 0) if family == "mistral" else (None, 0)
        if window:
            kinds = kinds or ["sliding" if i >= from_layer else "full" for i in range(n_layer)]
        else:
            kinds = ["full"] * n_layer
        c |= dict(
            n_kv_head=hf.get("num_key_value_heads") or n_head, head_dim=hf.get("head_dim") or 0,
            causal=hf.get("is_causal", True), window=window or 0,
            rope={"global": rope, "local": rope}, norm_eps=hf.get("rms_norm_eps", 1e-6),
            qkv_bias=bias or family == "qwen2", out_bias=bias and family != "qwen2",
            mlp_bias=hf.get("mlp_bias", False), qk_norm=family == "qwen3",
            activation=hf.get("hidden_act", "silu"), tied=hf.get("tie_word_embeddings", False),
            attn_dropout=hf.get("attention_dropout") or 0.0,
        )  # fmt: skip
    c["layer_kinds"] = ["local" if k.startswith("sliding") else "global" for k in kinds]
    if c["activation"] not in ("silu", "gelu"):
        raise ValueError(f"config.json: activation {c['activation']!r}, expected silu or gelu")
    return ModelConfig(**c)


def config_to_hf(c):
    """ModelConfig -> config.json. Keys of the folder that was read and mean nothing to us stay."""

    def rope(kind):
        return {"rope_type": "default", "rope_theta": c.rope[kind]["theta"]} | (
            c.rope[kind]["scaling"] or {}
        )

    gone = ("rope_theta", "rope_scaling", "global_rope_theta", "local_rope_theta", "torch_dtype")
    hf = {k: v for k, v in c.hf.items() if k not in gone} | dict(
        model_type=c.family, architectures=[ARCHITECTURES[c.family][c.head == "none"]],
        vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, tie_word_embeddings=c.tied, is_causal=c.causal,
    )  # fmt: skip
    if c.family == "neobert":
        # the published config counts the MLP's width before the factor 2/3: 3072 for 2048
        if c.n_hidden != (int(2 * (c.n_hidden * 3 // 2) / 3) + 7) // 8 * 8:
            raise ValueError(f"NeoBERT's n_hidden must be a multiple of 8, not {c.n_hidden}")
        return hf | dict(
            intermediate_size=c.n_hidden * 3 // 2, max_length=c.max_seq_len, norm_eps=c.norm_eps,
            decoder_bias=c.head_bias, rope_parameters=rope("global"),
        )  # fmt: skip
    hf |= dict(intermediate_size=c.n_hidden, max_position_embeddings=c.max_seq_len)
    kinds = [{"local": "sliding_attention", "global": "full_attention"}[k] for k in c.layer_kinds]
    if c.family.startswith("modernbert"):
        return hf | dict(
            layer_types=kinds, local_attention=2 * c.window, norm_eps=c.norm_eps,
            norm_bias=c.norm_bias, attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias,
            hidden_activation=c.activation, decoder_bias=c.head_bias,
            classifier_bias=c.head_dense_bias, attention_dropout=c.attn_dropout,
            attention_out_dropout=c.out_dropout,
            rope_parameters={"full_attention": rope("global"), "sliding_attention": rope("local")},
        )  # fmt: skip
    hf |= dict(
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        hidden_act=c.activation, mlp_bias=c.mlp_bias, attention_dropout=c.attn_dropout,
        rope_parameters=rope("global"), sliding_window=c.window or None,
    )  # fmt: skip
    if c.family != "qwen2":
        hf["attention_bias"] = c.qkv_bias
    if c.family in ("qwen2", "qwen3"):
        hf |= dict(layer_types=kinds, use_sliding_window=bool(c.window))
    return hf


def _interleave_qkv(w, c, back):
    """NeoBERT stores q, k and v head by head: [H, 3, D, C] there, [3, H, D, C] here."""
    shape = (3, c.n_head) if back else (c.n_head, 3)
    return w.reshape(*shape, c.head_dim, -1).transpose(0, 1).reshape(w.shape)


def write_folder(folder, config, state, classifier=None):
    """`state`: our names -> tensors, of any device. Writes config.json and safetensors.
    `classifier`: (tensors by transformers' names, keys of config.json) of a ...Classification
    model, whose other names are those of a model with a head."""
    c, out = config, {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and c.tied:
            continue
        if c.family == "neobert" and name.endswith("qkv_proj.weight"):
            tensor = _interleave_qkv(tensor, c, back=True)
        module, leaf = name.rsplit(".", 1)
        key = f"{hf_module(module, c.family)}.{leaf}"
        bare = c.head == "none" and classifier is None
        out[key.removeprefix("model.") if bare else key] = tensor.detach().contiguous()
    more, keys = classifier or ({}, {})
    out |= {key: tensor.detach().contiguous() for key, tensor in more.items()}
    os.makedirs(folder, exist_ok=True)
    save_torch_state_dict(out, folder, max_shard_size="5GB", metadata={"format": "pt"})
    hf = config_to_hf(c) | {"dtype": str(state["embed.weight"].dtype).removeprefix("torch.")} | keys
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(hf, f, indent=2)


def newest_model(folder):
    """The folder itself, or if it is the out_dir of a run its checkpoint with the largest number:
    of step500 and ext800 the latter."""

    def has_model(path):
        files = ("config.json", "adapter_config.json", "modules.json")
        return any(os.path.exists(os.path.join(path, name)) for name in files)

    if has_model(folder):
        return folder
    # a save that is under way, or was killed, has a name with a dot in front
    names = [n for n in os.listdir(folder) if re.fullmatch(r"[^.].*\d|\d", n)]
    names = [n for n in names if has_model(os.path.join(folder, n))]
    if not names:
        raise FileNotFoundError(f"{folder}: no config.json, and no checkpoint such as step500")
    return os.path.join(folder, max(names, key=lambda n: int(re.search(r"\d+$", n)[0])))


def resolve_folder(name):
    """A local folder (of an out_dir its newest checkpoint), or a hub id `owner/name[@revision]`,
    downloaded to the cache."""
    if os.path.isdir(name):
        return newest_model(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id (owner/name[@revision])")
    repo, _, revision = name.partition("@")
    patterns = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]
    try:
        return snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
    except OSError as error:  # no network, no such repository: perhaps it was meant as a path
        raise OSError(f"{name}: no such folder, and from the hub: {error}") from error


def _read_tensors(folder):
    """{name: function that reads it} from safetensors, one file or sharded, or an old .bin."""
    files = sorted(os.listdir(folder))
    paths = [os.path.join(folder, f) for f in files if re.fullmatch(r"model.*\.safetensors", f)]
    if paths:
        handles = [safe_open(path, "pt") for path in paths]
        return {key: (lambda h=h, key=key: h.get_tensor(key)) for h in handles for key in h.keys()}
    paths = [os.path.join(folder, f) for f in files if re.fullmatch(r"pytorch_model.*\.bin", f)]
    if not paths:
        raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin")
    state = {}
    for path in paths:
        state |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {key: (lambda t=t: t) for key, t in state.items()}


def from_pretrained(
    name, attention=None, window=None, max_seq_len=None, rope_theta=None, rope_scaling=None,
    dtype=torch.float32,
):  # fmt: skip
    """A Transformer from a Hugging Face folder or a hub id `owner/name[@revision]`.

    attention: "causal" or "bidirectional" instead of the folder's own; "bidirectional" on a Llama
    is LLM2Vec's model. An encoder read as causal becomes a ModernBERT-decoder.
    window: of the local layers (see ModelConfig.window_of), 0 makes every layer global.
    rope_theta, rope_scaling, max_seq_len: for training at a longer context.
    Raises ValueError for a missing, unexpected or misshapen weight; a folder without any
    language modelling head, a classifier's too, gives a model without one.
    """
    folder = resolve_folder(name)
    with open(os.path.join(folder, "config.json")) as f:
        source = config_from_hf(json.load(f))
    if attention not in (None, "causal", "bidirectional"):
        raise ValueError(f"attention={attention!r}: expected causal or bidirectional")
    c = replace(source, causal=source.causal if attention is None else attention == "causal")
    if window is not None:
        if window and "local" not in c.layer_kinds:
            raise ValueError(f"{folder}: window={window}, but none of its layers is local")
        c.window = window
        c.layer_kinds = c.layer_kinds if window else ["global"] * c.n_layer
    c.max_seq_len = max_seq_len or c.max_seq_len
    for kind, rope in source.rope.items():
        theta, scaling = rope_theta or rope["theta"], rope_scaling or rope["scaling"]
        c.rope[kind] = {"theta": theta, "scaling": scaling}

    tensors = {}
    files = _read_tensors(folder)
    classifier = any(key.startswith(CLASSIFIERS) for key in files)
    if classifier:  # train_classifier.py reads its last layers
        files = {k: read for k, read in files.items() if not k.startswith((*CLASSIFIERS, "head."))}
    for key, read in files.items():
        module, _, leaf = key.rpartition(".")
        if leaf in ("inv_freq", "freqs_cis"):
            continue  # tables that old files carry
        ours = our_module(module, source.family)
        if ours is None:
            raise ValueError(f"{folder}: unexpected tensor {key!r} for {source.family}")
        tensors[f"{ours}.{leaf}"] = read
    if c.tied:
        tensors.pop("lm_head.weight", None)
    untied = c.head != "none" and not (c.tied and c.head == "linear" and not c.head_bias)
    bare = not any(key.startswith("model.") for key in files)  # saved without a head: AutoModel
    headless = untied and bare and not any(k.startswith(("head.", "lm_head.")) for k in tensors)
    if headless or classifier:
        c.head = "none"

    with torch.device("meta"):
        model = Transformer(c)
    state = {}
    for key, read in tensors.items():
        tensor = read()
        if c.family == "neobert" and key.endswith("qkv_proj.weight"):
            tensor = _interleave_qkv(tensor, c, back=False)
        if source.fused_qkv and not c.fused_qkv and ".qkv_proj." in key:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[key.replace("qkv_proj", letter + "_proj")] = part.to(dtype, copy=True)
        else:  # a copy: a mapped file may lie unaligned, and then other kernels sum in other orders
            state[key] = tensor.to(dtype, copy=True)
    wanted = {k: p.shape for k, p in model.named_parameters()}
    for key in wanted.keys() | state.keys():
        module, _, leaf = key.rpartition(".")
        theirs = f"{hf_module(module, c.family)}.{leaf}"
        if key not in state:
            raise ValueError(f"{folder}: tensor {theirs!r} is missing")
        if key not in wanted or state[key].shape != wanted[key]:
            found = tuple(state[key].shape)
            expected = tuple(wanted[key]) if key in wanted else "no such tensor"
            raise ValueError(f"{folder}: tensor {theirs!r} is {found}, expected {expected}")
    model.load_state_dict(state, strict=False, assign=True)  # all names are checked above
    for p in model.parameters():
        p.requires_grad_(True)
    model.tie()
    model.stream_dtype = dtype if dtype != torch.float32 else None
    return model


def from_scratch(size, **changes):
    """A freshly initialised model of a size in SIZES; `changes` are ModelConfig fields."""
    if size not in SIZES:
        raise ValueError(f"model_size={size!r}: expected one of {', '.join(SIZES)}")
    return init_weights(Transformer(ModelConfig(**(SIZES[size] | changes))))
