"""
One transformer for encoders and decoders, over packed rows.

A batch is one flat row of tokens, all texts end to end, and `Seqs` (see attention.py), which says
where each text begins. There is no padding and no mask tensor: `causal`, and for each layer
`window = (left, right)`, the tokens that it sees on each side (-1: all), give the mask of each
family. Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 3, ModernBERT, ModernBERT-decoder and NeoBERT
differ in `ModelConfig` only.

Shapes: B texts, T tokens of the packed row, C n_embd, H heads, D head_dim, V vocabulary,
L tokens whose logits are asked for, A tokens whose embedding is replaced.
"""

import math
import warnings
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import attention, choose_backend, rope_frequencies, rotate

# ---- the blocks ----


class Norm(nn.Module):
    """RMSNorm or LayerNorm in fp32; the result has the type of x. "rms_plus_one" is Gemma's: it
    multiplies by 1 + weight."""

    def __init__(self, n, kind, eps, bias=False):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(n) if kind != "rms_plus_one" else torch.zeros(n))
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, x):
        weight = self.weight.float()
        inputs = x.float(), weight.shape, weight + 1 if self.kind == "rms_plus_one" else weight
        if self.kind != "layer":
            return F.rms_norm(*inputs, self.eps).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(*inputs, bias, self.eps).to(x.dtype)


def hidden_norm(config):
    """The norm of hidden states [T, C]."""
    return Norm(config.n_embd, config.norm, config.norm_eps, config.norm_bias)


class Attention(nn.Module):
    """Queries, keys and values of one layer, rotated by position, and attention within texts."""

    def __init__(self, config, layer):
        super().__init__()
        c = self.config = config
        self.kind, self.window = c.layer_kinds[layer], c.window_of(layer)
        self.attn_dropout, self.out_dropout = c.attn_dropout, c.out_dropout
        n_q, n_kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        linear = partial(nn.Linear, c.n_embd, bias=c.qkv_bias)
        if c.fused_qkv:
            self.qkv_proj = linear(n_q + 2 * n_kv)
        else:
            self.q_proj, self.k_proj, self.v_proj = linear(n_q), linear(n_kv), linear(n_kv)
        self.o_proj = nn.Linear(n_q, c.n_embd, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = Norm(c.head_dim, c.norm, c.norm_eps)
            self.k_norm = Norm(c.head_dim, c.norm, c.norm_eps)

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
        if c.query_pre_attn_scalar != c.head_dim:  # attention divides by the root of head_dim
            q = q * math.sqrt(c.head_dim / c.query_pre_attn_scalar)
        cos, sin = rope[self.kind]
        q, k = rotate(q, cos, sin, c.rope_pairs), rotate(k, cos, sin, c.rope_pairs)
        dropout_p = self.attn_dropout if self.training else 0.0
        y = attention(q, k, v, seqs, c.causal, self.window, dropout_p, backend)
        y = self.o_proj(y.flatten(1))  # [T, H, D] -> [T, H*D] -> [T, C]
        return F.dropout(y, self.out_dropout, self.training)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.act = ACTIVATIONS[c.activation]
        linear = partial(nn.Linear, c.n_embd, bias=c.mlp_bias)
        if c.fused_mlp:
            self.gate_up_proj = linear(2 * c.n_hidden)
        else:
            self.gate_proj, self.up_proj = linear(c.n_hidden), linear(c.n_hidden)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=c.mlp_bias)

    def forward(self, x):  # [T, C]
        if self.config.fused_mlp:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma 3 norms what is added, too."""

    def __init__(self, config, layer):
        super().__init__()
        normed = config.embed_norm and layer == 0  # the embedding's norm has done it already
        self.attn_norm = nn.Identity() if normed else hidden_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = hidden_norm(config)
        self.mlp = MLP(config)
        self.attn_post_norm = hidden_norm(config) if config.post_norm else nn.Identity()
        self.mlp_post_norm = hidden_norm(config) if config.post_norm else nn.Identity()

    def forward(self, x, rope, seqs, backend):
        y = self.attn(to_compute(self.attn_norm(x)), rope, seqs, backend)
        x = x + self.attn_post_norm(y)
        return x + self.mlp_post_norm(self.mlp(to_compute(self.mlp_norm(x))))


class Head(nn.Module):
    """What ModernBERT has between the hidden states and the vocabulary: norm(gelu(dense(x)))."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.n_embd, config.n_embd, bias=config.head_dense_bias)
        self.norm = hidden_norm(config)

    def forward(self, x):
        # fp32 where the head trains on a bf16 base; LoRA may have wrapped the layer
        x = x.to(next(self.dense.parameters()).dtype)
        return self.norm(F.gelu(self.dense(x)))


class Transformer(nn.Module):
    """The model. Everything that touches a parameter runs inside `forward`, so that DDP, FSDP and
    compile see one call."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.embed_norm = hidden_norm(c) if c.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = hidden_norm(c)
        self.head = Head(c) if c.head == "dense" else None
        if c.head != "none":
            self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=c.head_bias)
        self.tie()
        self.gradient_checkpointing = False
        self.backend = "sdpa"  # it runs everywhere; scripts call set_backend
        self.stream_dtype = None  # of the hidden states between blocks; None: the embedding's
        self.warned = False  # of a text that is too long

    def tie(self):
        if self.config.tied and self.config.head != "none":
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, seqs, rows=None, targets=None, vectors=None, at=None):
        """tokens [T] int64 of a packed row ->

        - hidden [T, C] after the final norm,
        - with `rows` [L] int64, indices into the T tokens: logits [L, V] at these tokens,
        - with `rows` and `targets` [L] int64: (sum of cross-entropies, number of hits) there.

        vectors [A, C] replace the token embeddings at the indices `at` [A] int64; gradients flow
        into them (used by train_reconstruct.py)."""
        x = self.embed(tokens)  # [T, C]
        if self.config.embed_scale:  # rounded to the weights' type, as Gemma was trained
            x = x * torch.tensor(math.sqrt(x.size(-1)), dtype=x.dtype)
        if vectors is not None:
            x = x.index_copy(0, at, vectors.to(x.dtype))
        # stream_dtype keeps a frozen bf16 model in bf16 even if its embedding trains in fp32
        x = self.embed_norm(x.to(self.stream_dtype or x.dtype))
        rope = self.rope(seqs)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = (x, rope, seqs, self.backend)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        x = self.norm(x)
        if rows is None:
            return x
        if self.config.head == "none":
            raise ValueError("this model has no language modelling head: it gives hidden states")
        x = x[rows]  # [L, C]: the head sees labelled positions only
        return self.logits(x) if targets is None else self.cross_entropy(x, targets)

    def logits(self, hidden):
        """hidden [L, C] -> [L, V]"""
        x = hidden if self.head is None else self.head(hidden)
        return self.lm_head(x.to(self.lm_head.weight.dtype))

    def cross_entropy(self, hidden, targets):
        """hidden [L, C], targets [L] -> (sum of cross-entropies, sum of hits)"""
        x = hidden if self.head is None else self.head(hidden)
        return linear_cross_entropy(x, self.lm_head.weight, self.lm_head.bias, targets)

    def rope(self, seqs):
        """{kind of layer: (cos, sin)}, each [T, D/2] fp32."""
        c = self.config
        if seqs.max_seqlen > c.max_seq_len and not self.warned:
            self.warned = True
            trained = f"the model was trained for {c.max_seq_len:,}"
            warnings.warn(f"a text of {seqs.max_seqlen:,} tokens: {trained}", stacklevel=2)
        out, device = {}, seqs.positions.device
        for kind in set(c.layer_kinds):
            freq, scale = rope_frequencies(c.rope[kind], c.head_dim, c.max_seq_len, device)
            angle = seqs.positions[:, None] * freq  # [T, D/2]
            out[kind] = angle.cos() * scale, angle.sin() * scale
        return out

    def set_dropout(self, attn=None, out=None):
        """Dropout rates for this run; None leaves one as it is. The config, and with it a saved
        folder, keeps the model's own."""
        for block in self.blocks:
            if attn is not None:
                block.attn.attn_dropout = attn
            if out is not None:
                block.attn.out_dropout = out

    def set_backend(self, wanted, device, dtype):
        """Chooses the attention backend, see choose_backend. Not every backend has dropout, so
        call `set_dropout`, and `eval` where the model will not be trained, before this."""
        dropout_p = self.blocks[0].attn.attn_dropout if self.training else 0.0
        c = self.config
        gqa = c.n_head != c.n_kv_head
        self.backend = choose_backend(wanted, device, dtype, dropout_p, gqa, c.head_dim)

    def describe(self):
        """A line to print before training."""
        direction = "causal" if self.config.causal else "bidirectional"
        n = sum(p.numel() for p in self.parameters())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return (
            f"{self.config.family}, {direction}, {n / 1e6:.1f}M weights, "
            f"{trained / 1e6:.3f}M trained; attention by {self.backend}"
        )

    def drop_head(self):
        """For embeddings, which are made from hidden states alone."""
        if self.config.head != "none":
            self.config.head, self.head = "none", None
            del self.lm_head

    def keep_layers(self, n_layer):
        """Drops all but the first n_layer blocks; what follows them stays."""
        c = self.config
        if not 1 <= n_layer <= c.n_layer:
            raise ValueError(f"n_layer={n_layer}: the model has {c.n_layer} layers")
        self.blocks, c.n_layer = self.blocks[:n_layer], n_layer
        c.layer_kinds = c.layer_kinds[:n_layer]

    @torch.no_grad()
    def resize_vocab(self, vocab_size):
        """More rows for new tokens, each the mean of the old ones; the head's too."""
        c, extra = self.config, vocab_size - self.config.vocab_size
        if extra < 0:
            raise ValueError(f"resize_vocab: {vocab_size} is under the present {c.vocab_size}")
        head = [] if c.head == "none" else self.lm_head.parameters()
        for w in {self.embed.weight, *head}:  # a tied head's matrix is the embedding: once
            mean = w.float().mean(0, keepdim=True).to(w.dtype)
            w.data = torch.cat((w, mean.expand(extra, *w.shape[1:])))
        c.vocab_size = self.embed.num_embeddings = vocab_size

    def flops_per_token(self, seq_len):
        """Floating-point operations of forward and backward for one token of a text of seq_len: 6
        for each weight of the blocks' matrices, 12 H D for each key that it sees, which under a
        causal mask are half of them on average (PaLM, arXiv 2204.02311, appendix B)."""
        c = self.config
        n = sum(p.numel() for b in self.blocks for p in b.parameters() if p.dim() == 2)
        seen = 0
        for block in self.blocks:
            left, right = (seq_len if w < 0 else min(w, seq_len) for w in block.attn.window)
            seen += min(seq_len / (2 if c.causal else 1), left + right + 1)
        return 6 * n + 12 * c.n_head * c.head_dim * seen


def to_compute(x):
    """x in the autocast type, once, instead of once in each linear layer that reads it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# ---- configuration ----


@dataclass
class ModelConfig:
    """What differs between the families, as data."""

    family: str  # a key of NAMES in formats/huggingface.py
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
    window: int = 0  # tokens a local layer sees: on each side, or if causal, itself included
    rope: dict = None  # {"global": {"theta", "scaling"}, "local": ...}; None: theta 10,000
    rope_pairs: str = "half"  # or "adjacent"
    norm: str = "rms"  # "layer", or "rms_plus_one": times 1 + weight (Gemma)
    norm_eps: float = 1e-5
    norm_bias: bool = False
    post_norm: bool = False  # a norm behind attention and MLP, before they are added (Gemma 3)
    embed_scale: bool = False  # the embedding times sqrt(n_embd) (Gemma)
    embed_norm: bool = False  # a norm behind the embedding; block 0 then has none before attention
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's q and k
    query_pre_attn_scalar: float = 0  # scores are q k^T / sqrt(this); 0: head_dim
    fused_qkv: bool = False  # q, k and v as one matrix
    fused_mlp: bool = False  # gate and up as one matrix
    activation: str = "silu"  # of the gate: a key of ACTIVATIONS
    head: str = "linear"  # "dense": dense -> gelu -> norm -> linear (ModernBERT); "none": no head
    head_bias: bool = False
    head_dense_bias: bool = False
    tied: bool = True  # the head's matrix is the embedding
    attn_dropout: float = 0.0  # of attention probabilities
    out_dropout: float = 0.0  # of the attention block's output
    init: str = "normal"  # "normal" .02, "uniform" +-.02, "megatron": see from_scratch
    hf: dict = field(default_factory=dict)  # config.json as read: what we do not use is passed on

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.query_pre_attn_scalar = self.query_pre_attn_scalar or self.head_dim
        self.layer_kinds = self.layer_kinds or ["global"] * self.n_layer
        kinds = set(self.layer_kinds)
        # config.json of these families has no field that says which layers are local
        no_key = self.family in ("llama", "gemma", "neobert")
        no_key = no_key or self.family == "mistral" and len(kinds) == 2
        if "local" in kinds and (self.window < 1 or no_key):
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


# What a family is where config.json says nothing, as in transformers: the rest is as above.
_LLAMA = dict(max_seq_len=8192, norm_eps=1e-6, tied=False)
_GEMMA = _LLAMA | dict(
    head_dim=256, norm="rms_plus_one", embed_scale=True, activation="gelu_pytorch_tanh", tied=True)
_MODERNBERT = dict(
    max_seq_len=8192, norm="layer", embed_norm=True, fused_mlp=True, activation="gelu",
    head="dense", head_bias=True, init="megatron",
)  # fmt: skip
DEFAULTS = {
    "llama": _LLAMA | dict(max_seq_len=2048),
    "mistral": _LLAMA,
    "qwen2": _LLAMA | dict(qkv_bias=True),
    "qwen3": _LLAMA | dict(qk_norm=True),
    "gemma": _GEMMA,
    "gemma3_text": _GEMMA | dict(
        max_seq_len=131072, qk_norm=True, post_norm=True, query_pre_attn_scalar=256),
    "modernbert": _MODERNBERT | dict(causal=False, fused_qkv=True),
    "modernbert-decoder": _MODERNBERT,
    "neobert": _LLAMA | dict(
        max_seq_len=1024, causal=False, rope_pairs="adjacent", fused_qkv=True, fused_mlp=True,
        head_bias=True, init="uniform"),
}  # fmt: skip


def _ettin(n_layer, n_embd, n_hidden, n_head):
    return DEFAULTS["modernbert"] | dict(
        family="modernbert", vocab_size=50368, n_layer=n_layer, n_embd=n_embd, n_hidden=n_hidden,
        n_head=n_head, max_seq_len=1024, window=64, out_dropout=0.1,
        layer_kinds=["local" if i % 3 else "global" for i in range(n_layer)],
    )  # fmt: skip


_TINY = dict(n_layer=6, n_head=4, n_embd=256, max_seq_len=512, vocab_size=8192)

# Named shapes. Ettin's are ModernBERT encoders; causal=True gives the decoders paired with them.
SIZES = {
    "ettin-17m": _ettin(7, 256, 384, 4),
    "ettin-32m": _ettin(10, 384, 576, 6),
    "ettin-68m": _ettin(19, 512, 768, 8),
    "ettin-150m": _ettin(22, 768, 1152, 12),
    "ettin-400m": _ettin(28, 1024, 2624, 16),
    "ettin-1b": _ettin(28, 1792, 3840, 28),
    "neobert-250m": DEFAULTS["neobert"] | dict(
        family="neobert", vocab_size=30522, n_layer=28, n_head=12, n_embd=768, n_hidden=2048,
        norm_eps=1e-5),
    # small shapes for teaching
    "modernbert-tiny": _ettin(6, 256, 384, 4) | dict(vocab_size=8192, max_seq_len=512),
    "llama-tiny": _TINY | dict(family="llama", n_hidden=688),
    "qwen3-tiny": _TINY | dict(family="qwen3", n_hidden=688, n_kv_head=2, qk_norm=True),
}  # fmt: skip


@torch.no_grad()
def from_scratch(size, **changes):
    """A freshly initialised model of a size in SIZES; `changes` are ModelConfig fields.

    normal: std .02 (Llama); uniform: +-.02 (NeoBERT); megatron: truncated normal .02 at 2 sigma and
    .02 / sqrt(2 layers) for what writes to the residual stream (Ettin)."""
    if size not in SIZES:
        raise ValueError(f"model_size={size!r}: expected one of {', '.join(SIZES)}")
    c = ModelConfig(**(SIZES[size] | changes))
    model = Transformer(c)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            if name.endswith("bias"):  # the weights of norms are as Norm makes them
                p.zero_()
        elif c.init == "uniform":
            p.uniform_(-0.02, 0.02)
        elif c.init == "normal":
            p.normal_(0.0, 0.02)
        else:
            out = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * c.n_layer) if out else 0.02
            nn.init.trunc_normal_(p, 0.0, std, -2 * std, 2 * std)
    return model


# ---- the loss over a vocabulary ----


def linear_cross_entropy(x, weight, bias, targets):
    """Sum over rows of -log softmax(x W^T + b)[target], and how many targets had the best logit,
    of equal ones the first.

    x [L, C], weight [V, C], bias [V] or None, targets [L] int64 -> (loss fp32, hits int64). L = 0
    gives 0. The gradients are computed in the forward pass, for a chunk of rows at a time, so that
    no [L, V] tensor lives."""
    x, grad = to_compute(x), torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False):  # types are settled above
        return _LinearCrossEntropy.apply(x, weight, bias, targets, grad)


class _LinearCrossEntropy(torch.autograd.Function):
    # With p = exp(logits - max), not yet normalised, and s = sum p, softmax is p / s:
    #     loss = log s + max - logit[target]
    #     dx = (p / s) W - W[target],    dW = (p / s)^T x - onehot^T x
    # p / s would be one more [n, V]: s divides p W and x instead, which have C columns.
    # grad: inside forward the gradient mode is always off, so the caller passes it.
    @staticmethod
    def forward(ctx, x, weight, bias, targets, grad):
        wide = torch.promote_types(x.dtype, torch.float32)
        loss, hits = x.new_zeros((), dtype=wide), targets.new_zeros(())
        inputs = zip((x, weight, bias), (x.dtype, wide, wide), ctx.needs_input_grad)
        dx, dw, db = (
            torch.zeros_like(t, dtype=dtype) if grad and need else None for t, dtype, need in inputs
        )
        w = weight.to(x.dtype)
        # 64 MB of fp32 logits at a time on the CPU, 512 MB on a GPU
        step = max(1, 2 ** (24 if x.device.type == "cpu" else 27) // weight.size(0))
        # one buffer for all chunks: on the CPU fresh memory costs a page fault for each 4 kB
        buffer = x.new_empty(min(step, x.size(0)), weight.size(0), dtype=wide)
        for start in range(0, x.size(0), step):
            x1, t1 = x[start : start + step], targets[start : start + step]  # [n, C], [n]
            logits = buffer[: x1.size(0)]  # [n, V]
            if x.dtype == wide:
                torch.mm(x1, w.t(), out=logits)
            else:
                logits.copy_(x1 @ w.t())
            if bias is not None:
                logits += bias
            top, best = logits.max(dim=1, keepdim=True)  # [n, 1] each
            right = logits.gather(1, t1[:, None])  # [n, 1], the target's logit
            hits += (best == t1[:, None]).sum()  # one hit a row: bf16 logits are often equal
            p = logits.sub_(top).exp_()
            s = p.sum(dim=1, keepdim=True)  # [n, 1]
            loss += (s.log() + top - right).sum()
            if db is not None:
                db += (1 / s[:, 0]) @ p
                db.index_add_(0, t1, torch.full_like(s[:, 0], -1.0))
            if grad:
                p = p.to(x.dtype)
            if dx is not None:
                dx[start : start + step] = (p @ w).to(wide) / s - w[t1]
            if dw is not None:
                if x.dtype == wide:
                    dw.addmm_(p.t(), x1 / s)  # in place: no second [V, C]
                else:
                    dw += p.t() @ (x1 / s).to(x.dtype)
                dw.index_add_(0, t1, -x1.to(wide))
        ctx.save_for_backward(dx, dw, db)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        # autograd rounds each to the type of x, weight or bias
        return *(None if d is None else d.mul_(d_loss) for d in ctx.saved_tensors), None, None
