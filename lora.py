"""
LoRA: low-rank adapters on a frozen model, and PEFT folders in and out.

    inject(model, rank=16, alpha=32, dropout=0.05, targets="all")     # freeze, add the adapter
    save_adapter(model, "out/adapter", base_name="owner/name")        # what `peft` loads
    model = from_pretrained(base)                                     # LLM2Vec's chain:
    load_adapter(model, "out/mntp"); merge(model)                     #   base + merged adapter 1
    load_adapter(model, "out/simcse")                                 #   + adapter 2

An adapter belongs to one base: the same weights (earlier adapters merged), and the same attention.
A PEFT folder does not say whether the model was bidirectional: who loads it has to know, unless a
nanoembed_adapter.json beside it says so, as save_adapter writes it.
"""

import json
import math
import os
import re
from collections import Counter

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model import Norm, _interleave_qkv, hf_module, our_module, resolve_folder

# ---- the layer ----


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), W and b frozen (Hu et al. 2021, arXiv 2106.09685).

    rslora: alpha / sqrt(r) instead (arXiv 2312.03732). A [r, in] and B [out, r] are fp32 whatever
    type W has; the result has the type that W x + b has. B starts at zero: at first y is unchanged.
    """

    def __init__(self, base, rank, alpha, dropout, rslora=False):
        super().__init__()
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.dropout = dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        fp32 = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft does

    def forward(self, x):  # [L, in] -> [L, out]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.base.weight.dtype)  # a trained fp32 embedding in front of bf16 layers
        y = self.base(x)
        a = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # [L, r]
        # scaled while it is narrow
        return y + F.linear(a * self.scale, self.lora_B.to(x.dtype))

    def merged_weight(self):
        return self.add_to(self.base.weight, self.lora_A, self.lora_B)

    def add_to(self, w, a, b):
        """W + scale B A, added in fp32, in the type of W."""
        return (w.float() + self.scale * (b @ a)).to(w.dtype)


def lora_layers(model):
    """{our module name: LoRALinear}"""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def _linear_layers(model):
    # lm_head is none of them: the model reads its matrix and never calls it
    both = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: m for n, m in both.items() if n != "lm_head"}


def trained_names(model):
    """The names of all parameters that train."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ---- inject ----


def inject(model, rank, alpha, dropout, targets, rslora=False, train_also=""):
    """Freezes the model and puts LoRA on its linear layers, in place.

    targets: "all" (every linear layer of the blocks) or our names, "q_proj,k_proj,down_proj".
    train_also: what trains beside the adapter, in fp32: any of "embed,norm,head".
        embed: the embedding; where the head is tied to it, that is the head's matrix, too.
        norm: every norm. head: lm_head with its bias, and ModernBERT's head.dense. The matrix of a
        tied head belongs to embed: head by itself leaves it frozen (Llama's tied head has no more).
    Raises ValueError for a target or group that names nothing, and on a model with an adapter.
    """
    if lora_layers(model):
        raise ValueError("inject: the model has an adapter already, merge it first")
    if rank < 1:
        raise ValueError(f"inject: rank {rank}, expected 1 or more")
    linear = {n: m for n, m in _linear_layers(model).items() if n.startswith("blocks.")}
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    wanted = _listed("targets", targets, ["all"] + leaves)
    if not wanted:
        raise ValueError(f"targets={targets!r}: expected all, or some of {leaves}")
    own = dict(model.named_parameters())  # a tied head's matrix is not in here a second time
    groups = dict(embed=["embed.weight"], norm=[], head=[])
    for name in own:
        module = name.rpartition(".")[0]
        if isinstance(model.get_submodule(module), Norm):
            groups["norm"].append(name)
        elif module in ("lm_head", "head.dense"):
            groups["head"].append(name)
    groups = {group: names for group, names in groups.items() if names}
    also = [n for group in _listed("train_also", train_also, list(groups)) for n in groups[group]]

    model.requires_grad_(False)
    for name, module in linear.items():
        if "all" in wanted or name.rpartition(".")[2] in wanted:
            model.set_submodule(name, LoRALinear(module, rank, alpha, dropout, rslora))
    for name in also:
        own[name].data = own[name].data.float()
        own[name].requires_grad_(True)
    model.trained_along = also  # save_adapter asks: a frozen adapter is saved whole, too


def _listed(key, text, names):
    items = [item.strip() for item in text.split(",") if item.strip()]
    for item in items:
        if item not in names:
            raise ValueError(f"{key}={text!r}: no {item!r} in this model, expected some of {names}")
    return items


# ---- merge ----


@torch.no_grad()
def merge(model, keep=False):
    """Adds the adapter into the weights, in place: plain Linear layers, every parameter trains
    again, as after `from_pretrained`. With keep=True it returns what `unmerge` needs. (The old
    weights themselves: W + D - D is not W in floating point.)"""
    names = list(lora_layers(model))
    if not names:
        raise ValueError("merge: the model has no adapter")
    kept = {"trained": trained_names(model), "layers": {}}
    for name in names:
        lora = model.get_submodule(name)
        plain = nn.Linear(lora.base.in_features, lora.base.out_features, device="meta")
        plain.weight, plain.bias = nn.Parameter(lora.merged_weight()), lora.base.bias
        model.set_submodule(name, plain)
        if keep:
            kept["layers"][name] = lora
    model.requires_grad_(True)
    return kept if keep else None


def unmerge(model, kept):
    """Back to what the model was before `kept = merge(model, keep=True)`, bit by bit."""
    for name, lora in kept["layers"].items():
        model.set_submodule(name, lora)
    for name, p in model.named_parameters():
        p.requires_grad_(name in kept["trained"])


# ---- PEFT folders ----
# peft's name of a tensor is "base_model.model." + Hugging Face's module + ".lora_A.weight",
# ".lora_B.weight" or, for a module that trained whole (`modules_to_save`), ".weight" or ".bias".
# A model without a head is Hugging Face's inner class (LlamaModel), whose names have no "model.".

PREFIX = "base_model.model."


def _peft_module(name, config):
    theirs = hf_module(name, config.family)
    return theirs.removeprefix("model.") if config.head == "none" else theirs


def save_adapter(model, folder, base_name, state_dict=None, merged=()):
    """Writes adapter_config.json and adapter_model.safetensors, which `peft` loads.

    Everything that trained is in there, and the embedding and head if the vocabulary grew (a user
    of peft resizes the base first). base_name: the folder or hub id `owner/name[@revision]` that
    the adapter belongs to. state_dict: full tensors gathered elsewhere (FSDP). merged: adapters
    that were merged into the base before. These and the model's attention stand in
    nanoembed_adapter.json, for adapter_chain and attention_of.
    Raises ValueError for a model without LoRA and for trained tensors that have no place there.
    """
    c, layers = model.config, lora_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapter")
    state = model.state_dict() if state_dict is None else state_dict
    tensors, peft = {}, {n: _peft_module(n, c) for n in layers}
    for name in layers:
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        if c.family == "neobert" and name.endswith("qkv_proj"):
            b = _interleave_qkv(b, c, back=True)
        tensors[f"{PREFIX}{peft[name]}.lora_A.weight"] = a
        tensors[f"{PREFIX}{peft[name]}.lora_B.weight"] = b

    along = {n for n in trained_names(model) if ".lora_" not in n} | set(model.trained_along)
    trained = {name.rpartition(".")[0] for name in along}
    tied = c.tied and c.head != "none"
    if "embed" in trained and tied:
        trained.add("lm_head")
    grown = {"embed"} if c.vocab_size > c.hf.get("vocab_size", c.vocab_size) else set()
    if grown and c.head != "none":
        grown.add("lm_head")
    for name in trained | grown:
        try:
            theirs = _peft_module(name, c)
        except KeyError:
            raise ValueError(f"save_adapter: {name!r} trained, {c.family} has no such") from None
        for leaf, _ in model.get_submodule(name).named_parameters():
            source = "embed.weight" if tied and name == "lm_head" and leaf == "weight" else None
            tensors[f"{PREFIX}{theirs}.{leaf}"] = state[source or f"{name}.{leaf}"]

    # "self_attn.q_proj" where all blocks have it, else the whole name
    short = {n: re.sub(r"^.*?\.\d+\.", "", theirs) for n, theirs in peft.items()}
    count = Counter(short.values())
    targets = {end if count[end] == c.n_layer else peft[n] for n, end in short.items()}
    first = next(iter(layers.values()))
    local = os.path.isdir(base_name)
    base, _, revision = (base_name, "", "") if local else base_name.partition("@")
    config = dict(
        peft_type="LORA", base_model_name_or_path=base, revision=revision or None, task_type=None,
        inference_mode=True, r=first.rank, lora_alpha=first.alpha, lora_dropout=first.dropout,
        use_rslora=first.rslora, bias="none", target_modules=sorted(targets),
        modules_to_save=sorted(_peft_module(n, c) for n in trained) or None,
        rank_pattern={peft[n]: m.rank for n, m in layers.items() if m.rank != first.rank},
        alpha_pattern={peft[n]: m.alpha for n, m in layers.items() if m.alpha != first.alpha},
        # peft ties the two again, but cannot tie a head that has a bias: that gets its own copy
        ensure_weight_tying=tied and "embed" in trained and c.head == "linear" and not c.head_bias,
    )  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    tensors = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}
    # peft saves modules whole; which of their parameters train on, we keep for ourselves
    notes = {"format": "pt", "trained_along": " ".join(sorted(along))}
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), notes)
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)
    with open(os.path.join(folder, "nanoembed_adapter.json"), "w") as f:
        json.dump({"is_causal": c.causal, "merged_adapters": list(merged)}, f)


# What adapter_config.json may say. Any other key with a value other than null, false or empty
# asks for something that we do not do.
_READ = (
    "peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules "
    "exclude_modules modules_to_save layers_to_transform layers_pattern ensure_weight_tying"
).split()
_NO_MATTER = (
    "base_model_name_or_path revision task_type auto_mapping peft_version inference_mode "
    "runtime_config megatron_core loftq_config eva_config qalora_group_size"
).split()


def load_adapter(model, folder, trainable=False):
    """Puts the adapter of a PEFT folder (or hub id) on the model: ours, peft's or LLM2Vec's.

    trainable: what trained before trains on, in fp32; otherwise everything is frozen. An embedding
    with more rows than the model's resizes it. Where the adapter gives a tied embedding and head
    different values, as peft may, the model unties.
    Raises ValueError for a kind of adapter that is not supported (DoRA, trained biases, ...), and
    for missing, unexpected or misshapen tensors, by name.
    """
    if lora_layers(model):
        raise ValueError("load_adapter: the model has an adapter already, merge it first")
    folder, c = resolve_folder(folder), model.config
    with open(os.path.join(folder, "adapter_config.json")) as f:
        config = json.load(f)
    for key, value in config.items():
        harmless = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
        if value and key not in _READ + _NO_MATTER and value not in harmless.get(key, ()):
            raise ValueError(f"{folder}: adapter_config.json has {key} = {value!r}: not supported")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder}: peft_type {config['peft_type']!r}, expected LORA")
    wanted, present = attention_of(folder), "causal" if c.causal else "bidirectional"
    if wanted not in (None, present):
        raise ValueError(f"{folder} belongs to a {wanted} model, this one is {present}: load the "
                         f"base with attention={wanted!r}")  # fmt: skip

    own, linear = dict(model.named_parameters(remove_duplicate=False)), _linear_layers(model)
    tensors = {}  # by our names: blocks.0.attn.q_proj.lora_A, embed.weight
    state, notes = _read_tensors(folder, model.embed.weight.device)
    for key, tensor in state.items():
        path = key.removeprefix(PREFIX).removesuffix(".weight" if ".lora_" in key else "")
        module, _, leaf = path.rpartition(".")
        name = our_module(module, c.family)
        if not (name in linear if leaf in ("lora_A", "lora_B") else f"{name}.{leaf}" in own):
            raise ValueError(f"{folder}: unexpected tensor {key!r} for this {c.family} model")
        if c.family == "neobert" and leaf == "lora_B" and name.endswith("qkv_proj"):
            tensor = _interleave_qkv(tensor, c, back=False)
        tensors[f"{name}.{leaf}"] = tensor

    # complete? `whole` are the parameters of modules_to_save. What is neither LoRA nor whole is an
    # embedding that grew and did not train.
    layers = list(dict.fromkeys(n.rpartition(".")[0] for n in tensors if ".lora_" in n))
    embed = tensors.get("embed.weight", model.embed.weight)
    grows = embed.size(0) > c.vocab_size
    whole, needed = set(), {f"{name}.lora_{side}" for name in layers for side in "AB"}
    for name in own:
        module = name.rpartition(".")[0]
        theirs = hf_module(module, c.family)
        if any(f"{end}." in f"{theirs}." for end in config.get("modules_to_save") or []):
            whole.add(name)  # peft's rule: the module's name ends with it
        elif module in linear and name.startswith("blocks.") and _targeted(config, theirs):
            needed |= {f"{module}.lora_A", f"{module}.lora_B"}
        elif grows and module == "lm_head":
            needed.add(name)
    if missing := sorted((needed | whole) - tensors.keys()):
        raise ValueError(f"{folder}: missing tensors: {', '.join(missing)}")

    if grows:
        model.resize_vocab(embed.size(0))
    if c.tied and c.head != "none":
        head = tensors.get("lm_head.weight", model.embed.weight)
        if head.shape == embed.shape and torch.equal(head, embed.to(head.dtype)):
            tensors.pop("lm_head.weight", None)
        else:
            c.tied = False
            model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    for name in layers:
        theirs, patterns = hf_module(name, c.family), config.get("alpha_pattern") or {}
        hits = (a for end, a in patterns.items() if re.fullmatch(rf"(.*\.)?({end})", theirs))
        alpha, rank = next(hits, config["lora_alpha"]), tensors[f"{name}.lora_A"].size(0)
        dropout, rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
        model.set_submodule(name, LoRALinear(linear[name], rank, alpha, dropout, rslora))
    along = notes.get("trained_along", " ".join(whole)).split()
    model.requires_grad_(False)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        p, trains = own[name], trainable and (name in along or ".lora_" in name)
        if tensor.shape != p.shape:
            shapes = tuple(tensor.shape), tuple(p.shape)
            raise ValueError(f"{folder}: {name} is {shapes[0]}, the model's is {shapes[1]}")
        p.data = tensor.to(torch.float32 if trains else torch.promote_types(tensor.dtype, p.dtype))
        p.requires_grad_(trains)
    model.trained_along = [name for name in own if name in along]


def adapter_chain(name):
    """Folders of a model and of the adapters that go on it, in order: [base, .., the adapter] where
    `name` is an adapter, with those that were merged into the base before it trained."""
    folder = resolve_folder(name)
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(path):
        return [folder]
    with open(path) as f:
        config = json.load(f)
    base, revision = config["base_model_name_or_path"], config.get("revision")
    at = f"@{revision}" if revision and not os.path.isdir(base) else ""
    before = [resolve_folder(adapter) for adapter in _beside(folder).get("merged_adapters", ())]
    return [*adapter_chain(base + at), *before, folder]


def _beside(folder):
    """nanoembed_adapter.json, {} where there is none."""
    path = os.path.join(folder, "nanoembed_adapter.json")
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def attention_of(folder):
    """"causal" or "bidirectional": what the adapter's model was, for `from_pretrained`; None where
    nothing beside the adapter says it."""
    return {None: None, True: "causal", False: "bidirectional"}[_beside(folder).get("is_causal")]


def _read_tensors(folder, device):
    path = os.path.join(folder, "adapter_model.safetensors")
    if os.path.exists(path):
        with safe_open(path, "pt", device=str(device)) as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    path = os.path.join(folder, "adapter_model.bin")
    return torch.load(path, map_location=device, weights_only=True), {}


def _targeted(config, name):
    """peft's rule: target_modules are ends of names, or one regular expression."""

    def hit(rule):
        if isinstance(rule, str):
            return any(re.fullmatch(rule, n) for n in (name, name.removeprefix("model.")))
        return any(name == end or name.endswith("." + end) for end in rule or ())

    only, layer = config.get("layers_to_transform"), int(re.search(r"\.(\d+)\.", name)[1])
    if only is not None and layer not in ([only] if isinstance(only, int) else only):
        return False
    wanted = config.get("target_modules")
    return (wanted == "all-linear" or hit(wanted)) and not hit(config.get("exclude_modules"))
