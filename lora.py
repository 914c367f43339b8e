"""
LoRA: low-rank adapters on a frozen model (Hu et al. 2021, arXiv 2106.09685).

    inject(model, rank=16, alpha=32, dropout=0.05, targets="all")     # freeze, add the adapter
    save_adapter(model, "out/adapter", base_name="owner/name")        # what `peft` loads
    model = load_merged("owner/name", ["out/mntp"])                   # LLM2Vec's chain: base,
    load_adapter(model, "out/simcse")                                 # merged adapter, adapter

An adapter belongs to one base: the same weights (earlier adapters merged), and the same attention.
PEFT's own files do not say whether the model was bidirectional. Files: formats/peft.py.
"""

import math
import os
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from common import print0
from formats import peft
from formats.huggingface import from_pretrained, pinned, resolve_folder, stored_dtype

# ---- the layer ----


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), W and b frozen.

    rslora: alpha / sqrt(r) instead (arXiv 2312.03732). A [r, in] and B [out, r] are fp32 whatever
    type W has; the result has the type that W x + b has. B starts at zero: at first y is unchanged.
    """

    def __init__(self, base, rank, alpha, dropout, rslora=False):
        super().__init__()
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.dropout, self.scale = dropout, alpha / (math.sqrt(rank) if rslora else rank)
        with base.weight.device:
            self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
            self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft does

    def forward(self, x):  # [L, in] -> [L, out]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.base.weight.dtype)  # a trained fp32 embedding in front of bf16 layers
        y = self.base(x)
        a = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # [L, r]
        # into y, without a second [L, out]; scaled while it is narrow
        return y.addmm_(a * self.scale, self.lora_B.to(y.dtype).t())


def lora_layers(model):
    """{our module name: LoRALinear}"""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def trained_names(model):
    """The names of all parameters that train."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def inject(model, rank, alpha, dropout, targets, rslora=False, train_also=""):
    """Freezes the model and puts LoRA on its linear layers, in place.

    targets: "all" (every linear layer of the blocks) or our names, "q_proj,k_proj,down_proj".
    train_also: what trains beside the adapter, in fp32: any of "embed,norm,head". head: lm_head
        with its bias, and ModernBERT's head.dense; the matrix of a tied head belongs to embed.
    Raises ValueError for a target or group that names nothing.
    """
    if lora_layers(model):
        raise ValueError("inject: the model has an adapter already, merge it first")
    if rank < 1:
        raise ValueError(f"inject: rank {rank}, expected 1 or more")
    modules = model.blocks.named_modules(prefix="blocks")
    linear = {name: m for name, m in modules if isinstance(m, nn.Linear)}
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    wanted = _listed("targets", targets, ["all", *leaves])
    parameters = dict(model.named_parameters())  # a tied head's matrix is in it once, as embed
    groups = {}
    for name in parameters:
        group = "norm" if "norm" in name else name.partition(".")[0].removeprefix("lm_")
        groups.setdefault(group, []).append(name)
    del groups["blocks"]
    also = _listed("train_also", train_also, list(groups)) if train_also else ()

    model.requires_grad_(False)
    for name, module in linear.items():
        if "all" in wanted or name.rpartition(".")[2] in wanted:
            model.set_submodule(name, LoRALinear(module, rank, alpha, dropout, rslora))
    model.trained_along = [name for group in also for name in groups[group]]
    for name in model.trained_along:
        parameters[name].data = parameters[name].data.float()
        parameters[name].requires_grad_(True)


def _listed(key, text, names):
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if item not in names:
            raise ValueError(f"{key}={text!r}: no {item!r} in this model, expected some of {names}")
    return items


@torch.no_grad()
def merge(model):
    """Adds the adapter into the weights, in place; then every parameter trains. Gives back what
    `unmerge` needs, the old weights among it: W + D - D is not W in floating point."""
    layers, trained = lora_layers(model), trained_names(model)
    if not layers:
        raise ValueError("merge: the model has no adapter")
    weights = merged_state(model, model.state_dict())
    for name, lora in layers.items():
        plain = nn.Linear(lora.base.in_features, lora.base.out_features, device="meta")
        plain.weight, plain.bias = nn.Parameter(weights[f"{name}.weight"]), lora.base.bias
        model.set_submodule(name, plain)
    model.requires_grad_(True)
    return layers, trained


def unmerge(model, merged):
    """Back to what the model was before `merged = merge(model)`, bit by bit."""
    layers, trained = merged
    for name, lora in layers.items():
        model.set_submodule(name, lora)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)


def merged_state(model, state, base=None, adapters=()):
    """Full tensors by the model's names, with LoRA added into the weights: what is saved.

    base, adapters: what the model was made of. The frozen weights are read from there again, for
    the model may have them in bf16, and the sums are rounded once, as `load_merged` and peft do it,
    to the type of the base's files."""
    layers = lora_layers(model)
    if not layers:
        return state
    if base is not None:
        # new layers draw random numbers, and a save must not change what training draws next
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            save_adapter(model, folder, base, state, adapters)
            merged = load_merged(base, adapters, peft.attention_of(folder))
            if model.config.head == "none":
                merged.drop_head()
            load_adapter(merged, folder)
        merge(merged)
        return merged.to(stored_dtype(resolve_folder(base))).state_dict()
    weights = {n.replace(".base.", "."): t for n, t in state.items() if ".lora_" not in n}
    for name, layer in layers.items():
        w, a, b = (state[f"{name}.{part}"] for part in ("base.weight", "lora_A", "lora_B"))
        weights[f"{name}.weight"] = (w.float() + layer.scale * (b @ a)).to(w.dtype)
    return weights


# ---- save and load ----


def save_adapter(model, folder, base_name, state_dict=None, merged=()):
    """Writes adapter_config.json and adapter_model.safetensors, which `peft` loads.

    Everything that trained is in there, and the embedding and head if the vocabulary grew (a user
    of peft resizes the base first). base_name: the adapter's base, a folder or hub id
    `owner/name[@revision]`; merged: adapters that were merged into it before. state_dict: full
    tensors gathered elsewhere (FSDP). Raises ValueError for a model without LoRA.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapter")
    state = model.state_dict() if state_dict is None else state_dict
    along = {n for n in trained_names(model) if ".lora_" not in n}.union(model.trained_along)
    peft.write_adapter(folder, model.config, layers, state, along, base_name, merged)


def load_adapter(model, folder, trainable=False):
    """Puts the adapter of a PEFT folder (or hub id) on the model: ours, peft's or LLM2Vec's.

    trainable: what trained before trains on, in fp32; otherwise everything is frozen. An embedding
    with more rows than the model's resizes it, a head that differs from its embedding unties it,
    and where the adapter was trained on the first layers alone (n_layer) the others are dropped.
    Raises ValueError for a kind of adapter that is not supported (DoRA, trained biases, ...), and
    for missing, unexpected or misshapen tensors, by name.
    """
    if lora_layers(model):
        raise ValueError("load_adapter: the model has an adapter already, merge it first")
    folder, c = resolve_folder(folder), model.config
    wanted, present = peft.attention_of(folder), "causal" if c.causal else "bidirectional"
    if wanted not in (None, present):
        problem = f"belongs to a {wanted} model, this one is {present}"
        raise ValueError(f"{folder} {problem}: load the base with attention={wanted!r}")
    model.keep_layers(peft.n_layer_of(folder) or c.n_layer)
    # lm_head is no layer for LoRA: the model reads its matrix and never calls it
    modules = model.named_modules()
    linear = {n: m for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"}
    tensors, layers, along = peft.read_adapter(folder, c, list(model.state_dict()), linear)

    embed = tensors.get("embed.weight", model.embed.weight)
    if len(embed) > c.vocab_size:
        model.resize_vocab(len(embed))
    if c.tied and c.head != "none":
        head = tensors.get("lm_head.weight", model.embed.weight)
        if torch.equal(head, embed.to(head)):
            tensors.pop("lm_head.weight", None)
        else:
            c.tied = False
            model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    for name, settings in layers.items():
        model.set_submodule(name, LoRALinear(linear[name], **settings))
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        p, trains = parameters[name], trainable and (name in along or ".lora_" in name)
        if tensor.shape != p.shape:
            found, expected = tuple(tensor.shape), tuple(p.shape)
            raise ValueError(f"{folder}: {name} is {found}, the model's is {expected}")
        dtype = torch.float32 if trains else torch.promote_types(tensor.dtype, p.dtype)
        p.data = tensor.to(p.device, dtype)
        p.requires_grad_(trains)
    model.trained_along = [name for name in parameters if name in along]


def load_merged(
    base, adapters=(), attention=None, dtype=torch.float32, rope_theta=None, n_layer=None
):
    """`from_pretrained`, with adapters merged into it in this order: added in fp32, and the result
    rounded once to dtype. attention: None asks what stands beside the adapters, then the base.
    n_layer: only the first n layers of the result."""
    attention = attention or peft.attention_of_chain(base, adapters)
    first = torch.float32 if adapters else dtype
    model = from_pretrained(base, attention, rope_theta=rope_theta, dtype=first)
    for adapter in adapters:
        load_adapter(model, adapter)
        merge(model)
    model.keep_layers(n_layer or model.config.n_layer)
    if adapters and dtype != torch.float32:
        model.stream_dtype = dtype
        model.to(dtype)
    return model


# ---- the model of a training run ----


def _adapter_folder(checkpoint):
    """Beside the merged model of a checkpoint, or the checkpoint itself (pretraining, MNTP)."""
    folder = f"{checkpoint}/adapter"
    return folder if os.path.isdir(folder) else checkpoint


def load_for_training(s, last=None, attention=None, rope_theta=None):
    """-> (model, base, adapters): the model without its LoRA, which `add_lora` puts on, and what it
    was made of, for save_adapter and merged_state: out_dirs pinned to the checkpoint read now.
    last: the checkpoint to go on from. It is the base itself, but for LoRA: then the base and the
    adapters are those that its adapter was trained on."""
    if last and not s.lora_rank:
        base, adapters = last, []
    elif last:
        base, *adapters = peft.pinned_chain(_adapter_folder(last))
        if not adapters:
            raise SystemExit(f"{last} has no adapter: it was trained with lora_rank=0")
        adapters.pop()  # the checkpoint's own, which add_lora loads
    else:
        base, *adapters = peft.pinned_chain(s.init_from)
        adapters += map(pinned, getattr(s, "adapters", ()))
    if attention == "encoder" and (s.lora_rank or adapters):
        attention = "bidirectional"  # an adapter fits the folder of its base
    frozen = s.lora_rank or getattr(s, "freeze_backbone", False)
    dtype = s.compute_dtype if frozen else torch.float32  # what trains is fp32
    n_layer = getattr(s, "n_layer", None)
    model = load_merged(base, adapters, attention, dtype, rope_theta, n_layer)
    positions, wanted = model.config.max_seq_len, getattr(s, "max_seq_len", None) or 0
    if wanted > positions:
        print0(f"{base} was made for {positions:,} positions, this run trains {wanted:,}")
        model.config.max_seq_len = wanted
    model.set_dropout(attn=getattr(s, "attn_dropout", None))
    return model, base, adapters


def add_lora(model, s, last):
    """Fresh LoRA by the settings, or that of the checkpoint `last`; nothing if lora_rank is 0."""
    if s.lora_rank and last:
        load_adapter(model, _adapter_folder(last), trainable=True)
    elif s.lora_rank:
        settings = s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets
        inject(model, *settings, train_also=s.train_also)
