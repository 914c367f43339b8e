"""
LLM2Vec's folders (BehnamGhader et al. 2024, arXiv 2404.05961) and its published checkpoints.

Its files leave out most of what makes a model: an adapter names the raw base, not the adapters that
were merged into it before, and neither the attention nor the wrap, which its code knows by the
base's name. llm2vec_tasks.json: its instructions of MTEB's tasks (MIT, llm2vec_tasks.LICENSE), and
the same under the names that MTEB v2 has for these tasks.
"""

import os
import re
from pathlib import Path

from common import print0
from formats import read_json
from tokenizer import TEMPLATES, Template

TASKS = Path(__file__).with_name("llm2vec_tasks.json")

# McGill-NLP/LLM2Vec-<name>-<stage>: name, base, wrap. The base of Llama 3.1 is not among the names
# that its code has a wrap for, so that model was trained, and is evaluated, without one.
BASES = (
    ("Sheared-LLaMA", "princeton-nlp/Sheared-LLaMA-1.3B", "none"),
    ("Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-chat-hf", "llama2"),
    ("Mistral-7B-Instruct-v2", "mistralai/Mistral-7B-Instruct-v0.2", "mistral"),
    ("Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
    ("Meta-Llama-31-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct", "none"),
)
# Stage as it is spelled: the repository's stage, the stages merged before it. README's model list
# leaves "mntp" out of some names.
STAGES = {
    "mntp": ("mntp", ()),
    "mntp-unsup-simcse": ("mntp-unsup-simcse", ("mntp",)),
    "unsup-simcse": ("mntp-unsup-simcse", ("mntp",)),
    "mntp-supervised": ("mntp-supervised", ("mntp",)),
    "supervised": ("mntp-supervised", ("mntp",)),
}
# Attention, pooled range and cut are the same for all: every token sees every other, the mean is
# over the text and what closes the wrap, a text is cut to 400 tokens, all together to 512.
DEFAULTS = dict(pooling_mode="mean", skip_instruction=True, max_length=512, doc_max_length=400)
PUBLISHED = {  # repository: its right name, base, adapters merged before it, attention
    f"McGill-NLP/LLM2Vec-{name}-{spelled}": (
        f"McGill-NLP/LLM2Vec-{name}-{stage}", base,
        [f"McGill-NLP/LLM2Vec-{name}-{before}" for before in merged], "bidirectional",
    )
    for name, base, _ in BASES
    for spelled, (stage, merged) in STAGES.items()
}  # fmt: skip

WRAPS = {base.split("/")[1]: wrap for _, base, wrap in BASES}
WRAPS |= {"Qwen2-1.5B-Instruct": "qwen", "Qwen2-7B-Instruct": "qwen"}
# What pooling_mode "eos_token" puts behind the wrap, by model_type, and the bases that differ
EOS = {"llama": " </s>", "mistral": " </s>", "gemma": "<eos>", "qwen2": "<|endoftext|>"}
EOS_OF = {"Meta-Llama-3-8B": "<|end_of_text|>", "Meta-Llama-3-8B-Instruct": ""}


def published(name):
    """The entry of PUBLISHED for a hub id, or for a folder that has the name of a repository or
    lies in the hub's cache; None for any other, and for adapters of our own."""
    *_, cached, _, last = "", "", "", *Path(name).parts
    if os.path.exists(f"{name}/nanoembed_adapter.json"):
        return None
    if not os.path.isdir(name):
        return PUBLISHED.get(name.partition("@")[0])
    names = last, cached.replace("models--McGill-NLP--", "")
    return next((PUBLISHED[x] for n in names if (x := f"McGill-NLP/{n}") in PUBLISHED), None)


def names_class(folder):
    """Do its files name one of LLM2Vec's classes? peft notes the class of an adapter's model."""
    mapping = read_json(folder, "adapter_config.json").get("auto_mapping") or {}
    architectures = read_json(folder, "config.json").get("architectures") or []
    kinds = r"(Llama|Mistral|Gemma|Qwen2)(Bi|Encoder)(Model|ForMNTP)"
    classes = (mapping.get("base_model_class"), *architectures)
    return any(re.fullmatch(kinds, name or "") for name in classes)


def says_bidirectional(folder):
    """Did LLM2Vec write it? By default its models see both ways, and its classes always do."""
    return names_class(folder) or os.path.exists(f"{folder}/llm2vec_config.json")


def is_second(name, folder):
    """Is this an adapter of run_simcse.py or run_supervised.py, which merge MNTP's before? Only
    these two write llm2vec_config.json beside an adapter."""
    files = ("adapter_config.json", "llm2vec_config.json")
    known = published(name)
    return bool(known[2]) if known else all(os.path.exists(f"{folder}/{x}") for x in files)


def chain_of(name, folder, base):
    """(base, adapters merged into it) that an adapter was trained on, where the table knows it;
    base: what its files say. Of a copy, the copies beside it. ValueError for another adapter that
    was trained on a merged base."""
    if known := published(name):
        beside = [f"{Path(name).parent}/{adapter.split('/')[1]}" for adapter in known[2]]
        local = [path if os.path.isdir(path) else hub for path, hub in zip(beside, known[2])]
        return (base if os.path.isdir(base) else known[1]), local
    if is_second(name, folder):
        raise ValueError(
            f"{name}: LLM2Vec trains such an adapter on a base with its MNTP adapter merged, and "
            f"the folder names {base} alone. Load the MNTP adapter, or {base} if none was merged, "
            f"and this with adapters=[{str(name)!r}]"
        )
    return base, []


def read_settings(name, folder, family):
    """What LLM2Vec's code does with a folder that it wrote, as arguments of Embedder; {} for any
    other folder. family: model_type of the base."""
    saved, known = read_json(folder, "llm2vec_config.json"), published(name)
    if not (known or says_bidirectional(folder)):
        return {}
    if not (known or names_class(folder)):
        print0(f"{name}: bidirectional, as LLM2Vec is by default; attention='causal' if it was "
               "trained with enable_bidirectional=False")  # fmt: skip
    saved = DEFAULTS | saved
    base = read_json(folder, "adapter_config.json").get("base_model_name_or_path")
    base = known[1] if known else base or read_json(folder, "config.json").get("_name_or_path", "")
    base = Path(base.partition("@")[0]).name
    wrap, mode = TEMPLATES[WRAPS.get(base, "none")], saved["pooling_mode"]
    end = EOS_OF.get(base, EOS.get(family, "")) if mode == "eos_token" else ""
    modes = {"eos_token": "last", "last_token": "last", "bos_token": "cls"}
    return dict(
        pooling=modes.get(mode, mode), template=Template(wrap.prefix, wrap.suffix + end, " "),
        # theirs takes the BOS wherever the pool begins
        pool_instruction=not saved["skip_instruction"] or mode == "bos_token",
        max_length=saved["max_length"], doc_max_length=saved["doc_max_length"],
        instructions=read_json(TASKS),
    )  # fmt: skip
