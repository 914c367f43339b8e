"""
PEFT adapter folders. What is done with the tensors stands in lora.py.

peft's name of a tensor is "base_model.model." + Hugging Face's module + ".lora_A.weight",
".lora_B.weight" or, for a module that trained whole (`modules_to_save`), ".weight" or ".bias".
A model without a head is Hugging Face's inner class (LlamaModel), whose names have no "model.".
"""

import os
import re
from pathlib import Path

from safetensors.torch import save_file

from common import print0
from data import require
from formats import llm2vec, read_json, write_json
from formats.huggingface import (
    ARCHITECTURES,
    finite,
    hf_module,
    interleave_qkv,
    open_tensors,
    our_module,
    pinned,
    resolve_folder,
)  # fmt: skip

PREFIX = "base_model.model."
CARD = """\
# A LoRA adapter of nanoembed

It belongs to the class `{name}` with {mask} attention, of `{base}`.
peft notes neither, and gives other outputs on another class or mask.
Adapters that are merged into the base before it, in this order: {merged}.
"""
CODE = """
```python
from peft import PeftModel
from transformers import AutoConfig, {name}

config = AutoConfig.from_pretrained({base!r}, revision={revision!r})
config.is_causal = {causal}
base = {name}.from_pretrained({base!r}, config=config, revision={revision!r})
if base.config.vocab_size < {vocab_size}:
    base.resize_token_embeddings({vocab_size}, mean_resizing=False)
model = PeftModel.from_pretrained(base, ".")  # this folder
```
"""

# What adapter_config.json may say: what we read, then what makes no difference to the numbers.
KNOWN = (
    "r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules "
    "exclude_modules modules_to_save layers_to_transform layers_pattern ensure_weight_tying "
    "base_model_name_or_path revision task_type auto_mapping peft_version inference_mode "
    "runtime_config megatron_core loftq_config eva_config qalora_group_size"
).split()
# Any other key asks for something that we do not do, unless it is null, false, empty or this.
HARMLESS = {
    "peft_type": ("LORA",), "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}  # fmt: skip


def pinned_chain(name, above=()):
    """[base, adapters merged into it, the adapter itself] where `name` is an adapter, else [name];
    each `pinned`."""
    folder = resolve_folder(name)
    config = read_json(folder, "adapter_config.json")
    if not config:
        return [pinned(name)]
    if folder in above:
        raise ValueError(f"{folder}: adapter_config.json: its base leads back to itself")
    base = require(config, "base_model_name_or_path", str, f"{folder}/adapter_config.json", 0, True)
    if (revision := config.get("revision")) and not os.path.isdir(base):
        base = f"{base}@{revision}"
    merged = read_json(folder, "nanoembed_adapter.json").get("merged_adapters")
    if merged is None:  # not ours
        base, merged = llm2vec.chain_of(name, folder, base)
    if not os.path.isdir(base):
        print0(f"{folder}: its base, {base}, is no folder here: asking the hub")
    return [*pinned_chain(base, (*above, folder)), *map(pinned, merged), pinned(name)]


def attention_of(name):
    """What the adapter's model was, "causal" or "bidirectional", for `from_pretrained`; None where
    nothing beside the adapter says it."""
    folder = resolve_folder(name)
    causal = read_json(folder, "nanoembed_adapter.json").get("is_causal")
    if causal is None and (llm2vec.published(name) or llm2vec.says_bidirectional(folder)):
        return "bidirectional"
    return {None: None, True: "causal", False: "bidirectional"}[causal]


def attention_of_chain(base, adapters):
    """What the first of the adapters says, or the base; None, the base's own, where its config.json
    does, or where peft marks the adapters as those of causal language models. Else ValueError: a
    decoder's adapters may have been trained either way, and peft does not note which."""
    if attention := next(filter(None, map(attention_of, [*adapters, base])), None):
        return attention
    hf = read_json(resolve_folder(base), "config.json")
    decoder = hf.get("model_type") not in ("modernbert", "neobert") and "is_causal" not in hf
    for adapter in adapters if decoder else ():
        task = read_json(resolve_folder(adapter), "adapter_config.json").get("task_type")
        if task != "CAUSAL_LM":
            raise ValueError(f"{adapter}: nothing says whether this adapter's model was causal: "
                             "give attention='causal' or attention='bidirectional'")  # fmt: skip
    return None


def n_layer_of(name):
    """The layers of the adapter's model, fewer than its base may have; None where nobody says."""
    return read_json(resolve_folder(name), "nanoembed_adapter.json").get("n_layer")


def write_adapter(folder, c, layers, state, along, base_name, merged):
    """layers: {our module name: LoRALinear}. state: full tensors by our names. along: the names of
    what trained beside LoRA. The rest as in save_adapter."""
    whole = {name.rpartition(".")[0] for name in along}
    if "embed" in whole and c.tied and c.head != "none":
        whole.add("lm_head")
    grown = ("embed", "lm_head") if c.vocab_size > c.hf.get("vocab_size", c.vocab_size) else ()
    names, tensors = {}, {}  # peft's
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module not in {*layers, *whole, *grown}:
            continue
        theirs = hf_module(module, c.family)
        names[module] = theirs.removeprefix("model.") if c.head == "none" else theirs
        tensor = interleave_qkv(name, tensor, c, back=True)
        key = f"{PREFIX}{names[module]}.{leaf}" + (".weight" if module in layers else "")
        tensors[key] = tensor.detach().cpu().clone().contiguous()

    # "self_attn.q_proj" where all blocks have what is adapted, else the whole names
    targets = {re.sub(r"^.*?\.\d+\.", "", names[module]) for module in layers}
    if len(targets) * c.n_layer != len(layers):
        targets = {names[module] for module in layers}
    first = next(iter(layers.values()))
    local = os.path.isdir(base_name)
    base, _, revision = (base_name, "", "") if local else base_name.partition("@")
    config = dict(
        peft_type="LORA", base_model_name_or_path=base, revision=revision or None, r=first.rank,
        lora_alpha=first.alpha, lora_dropout=first.dropout, use_rslora=first.rslora,
        target_modules=sorted(targets),
        modules_to_save=sorted(names[module] for module in whole) or None,
        rank_pattern={names[n]: m.rank for n, m in layers.items() if m.rank != first.rank},
        alpha_pattern={names[n]: m.alpha for n, m in layers.items() if m.alpha != first.alpha},
        # peft ties the two again, but cannot tie a head that has a bias: that gets its own copy
        ensure_weight_tying=c.tied and "embed" in whole and c.head == "linear" and not c.head_bias,
    )  # fmt: skip
    # peft saves modules whole; which of their parameters train on, we keep for ourselves
    ours = dict(is_causal=c.causal, n_layer=c.n_layer, merged_adapters=list(merged))
    ours["trained_along"] = sorted(along)
    write_json(config, folder, "adapter_config.json")
    write_json(ours, folder, "nanoembed_adapter.json")
    save_file(tensors, f"{folder}/adapter_model.safetensors", {"format": "pt"})
    # there NeoBERT is code of its own, and Gemma 3 has another key for another window
    card = CARD + CODE * (not merged and (c.causal or c.family not in ("neobert", "gemma3_text")))
    Path(folder, "README.md").write_text(card.format(
        base=base, revision=revision or None, name=ARCHITECTURES[c.family][c.head == "none"],
        causal=c.causal, mask="causal" if c.causal else "bidirectional", vocab_size=c.vocab_size,
        merged=", ".join(merged) or "none",
    ), "utf-8")  # fmt: skip


def read_adapter(folder, c, parameters, linear):
    """-> tensors by our names, {our module name: arguments of LoRALinear}, and which parameters
    trained along. parameters: the model's names; linear: those of modules that can have LoRA."""
    config = read_json(folder, "adapter_config.json")
    for key, value in config.items():
        if value and key not in KNOWN and value not in HARMLESS.get(key, ()):
            raise ValueError(f"{folder}: adapter_config.json has {key} = {value!r}: not supported")
    names = str if isinstance(config.get("target_modules"), str) else [str]
    for key, kind in (("target_modules", names), ("lora_alpha", float), ("lora_dropout", float)):
        require({"lora_dropout": 0.0} | config, key, kind, f"{folder}/adapter_config.json", 0)
    path = f"{folder}/adapter_model.safetensors"
    if not os.path.exists(path):  # older adapters
        path = path[:-11] + "bin"
    tensors, layers = {}, {}
    for key, read in open_tensors(path).items():
        tensor = finite(read(), key, folder)
        path = key.removeprefix(PREFIX).removesuffix(".weight" if ".lora_" in key else "")
        module, _, leaf = path.rpartition(".")
        module = our_module(module, c.family)
        name = f"{module}.{leaf}"
        if leaf in ("lora_A", "lora_B") and module in linear:
            layers[module] = None
        elif name not in parameters:
            raise ValueError(f"{folder}: unexpected tensor {key!r} for this {c.family} model")
        tensors[name] = interleave_qkv(name, tensor, c, back=False)

    # Complete? `whole` is what modules_to_save names; an embedding may grow without training.
    grows = len(tensors.get("embed.weight", ())) > c.vocab_size
    whole, needed = [], []
    for name in parameters:
        module = name.rpartition(".")[0]
        theirs = hf_module(module, c.family)
        if any(f"{end}." in f"{theirs}." for end in config.get("modules_to_save") or []):
            whole.append(name)  # peft's rule: the module's name ends with it
        elif module in layers or module in linear and targeted(config, theirs):
            needed += [f"{module}.lora_A", f"{module}.lora_B"]
        elif grows and module == "lm_head":
            needed.append(name)
    if missing := sorted({*whole, *needed} - tensors.keys()):
        raise ValueError(f"{folder}: missing tensors: {', '.join(missing)}")

    alphas = (config.get("alpha_pattern") or {}).items()
    for module in layers:
        theirs = hf_module(module, c.family)
        hits = (alpha for end, alpha in alphas if matches(theirs, rf"(.*\.)?({end})"))
        layers[module] = dict(
            rank=len(tensors[f"{module}.lora_A"]), alpha=next(hits, config["lora_alpha"]),
            dropout=config.get("lora_dropout", 0.0), rslora=config.get("use_rslora", False),
        )  # fmt: skip
    return tensors, layers, read_json(folder, "nanoembed_adapter.json").get("trained_along", whole)


def matches(name, rule):
    """peft's rule for names of modules: one regular expression, or a list of their ends. ValueError
    for an expression that could run for long: of a repeated group, or of many repeats."""
    names = name, name.removeprefix("model.")
    if not isinstance(rule, str):
        return any(f".{n}".endswith(f".{end}") for n in names for end in rule)
    repeats = re.findall(r"[*+}]\??|(?<!\()\?", rule)
    if len(repeats) > 5 or re.search(r"\)[*+{]|\\\d|\(\?P=", rule):
        raise ValueError(f"adapter_config.json: pattern {rule[:80]!r}: expected names of modules, "
                         "or up to 5 repeats, none of a group")  # fmt: skip
    try:
        return any(re.fullmatch(rule, n) for n in names)
    except re.error as error:
        raise ValueError(f"adapter_config.json: pattern {rule[:80]!r}: {error}") from None


def targeted(config, name):
    """Does peft put LoRA on this module?"""
    layer, only = re.search(r"\.(\d+)\.", name), config.get("layers_to_transform")
    if layer is None:  # ModernBERT's head.dense, which not every class of peft's has
        return False
    if only is not None and int(layer[1]) not in ([only] if isinstance(only, int) else only):
        return False
    if matches(name, config.get("exclude_modules") or ()):
        return False
    return config["target_modules"] == "all-linear" or matches(name, config["target_modules"])
