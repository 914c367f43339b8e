"""
Folders of sentence-transformers in and out, and our nanoembed.json.

prefix + instruction become the folder's prompts, the suffix its tokenizer's post-processor.
"""

import copy
import json
import string
import tempfile
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import processors
from torch import nn

from common import print0
from data import require
from formats import read_json, write_json
from formats.huggingface import config_to_hf, finite, open_tensors
from tokenizer import Template, body_length, load_tokenizer

PROJECTION = "1_Dense/model.safetensors"
SETTINGS = {  # of nanoembed.json
    "pooling": str, "prompts": dict, "normalize": bool, "max_length": int,
    "pool_instruction": bool, "pool_bos": bool, "doc_max_length": int, "instructions": dict,
    "token_scores": bool,
}  # fmt: skip

POOLINGS = {  # newer versions of sentence-transformers write "cls", "mean" and "weightedmean"
    "cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last",
    "weightedmean_tokens": "weighted_mean",
}  # fmt: skip

# Keys of a module that ask for what we do not do, unless they are false or empty
REFUSED = (
    "do_lower_case query_expansion query_length document_length skiplist_words keep_only_token_ids"
).split()

# Texts whose tokens depend on what stands next to them, or that tokenizers clean
PROBES = [
    "", "a", " ", "\n", "Hello, world!", " space before", "space behind ", "\n\nlines\n", "1234",
    "na\xefve cafe\u0301 \u4f60\u597d \U0001f642", "'s", "...",
    *(f"{c} {c}" for c in string.printable),
]  # fmt: skip


def st_problem(embedder):
    """Why sentence-transformers would not give equal embeddings from a saved folder, or None. The
    ids of PROBES from the files are compared with ours, in a second or two: ask before training."""
    family, pooling = embedder.model.config.family, embedder.pooling
    if pooling == "splade" and family not in ("modernbert", "neobert"):
        return f"its sparse models are masked language models, and {family} has no such class"
    if pooling in ("splade", "tokens", "weighted_mean") and not embedder.pool_instruction:
        return f"there, pooling {pooling!r} counts the instruction's tokens, too"
    with tempfile.TemporaryDirectory() as folder:
        write_json(config_to_hf(embedder.model.config), folder, "config.json")
        write_tokenizer(embedder, folder)
        theirs = load_tokenizer(folder)

    probes = [*PROBES, "".join(theirs.all_special_tokens), "too long " * embedder.max_length]
    for name, instruction in embedder.prompts.items():
        prompt, length = embedder.template.head(instruction), 0
        if prompt and not embedder.pool_instruction:  # this is how it measures a prompt
            ids = theirs(prompt, truncation=True)["input_ids"]
            length = len(ids) - (ids[-1] in theirs.all_special_ids)
        encoded = embedder.tokenize(probes, instruction)
        expected = theirs([prompt + text for text in probes], truncation=True)["input_ids"]
        for text, (ids, (start, _)), their in zip(probes, encoded, expected):
            shown = f"prompt {name!r} ({prompt!r}), text {text[:20]!r}"
            if ids != (their or [0]):
                return f"{shown}: its tokens would be {their[:30]}, ours are {ids[:30]}"
            if start != length:
                return (f"{shown}: it would leave {length} tokens out of the pool, we {start}. No "
                        "instruction may end in a space that the text's first token takes in, and "
                        "no more than one token, a special one, may follow the text")  # fmt: skip
    return None


def write_tokenizer(embedder, folder):
    """The tokenizer as sentence-transformers needs it, with the suffix in its post-processor."""
    tokenizer, template = copy.deepcopy(embedder.tokenizer), embedder.template
    tokenizer.model_max_length, tokenizer.truncation_side = embedder.max_length, "right"
    if tokenizer.pad_token is None:  # any token will do: it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if template.suffix:
        plain = tokenizer.backend_tokenizer.encode(template.prefix + "a")
        ((ids, _),) = embedder.tokenize(["a"])
        parts = {"front": plain.ids[: plain.special_tokens_mask.index(0)]}  # BOS or CLS
        parts["back"] = ids[body_length(plain) :]  # suffix, then EOS or SEP
        special_tokens = [
            {"id": name, "ids": part, "tokens": tokenizer.convert_ids_to_tokens(part)}
            for name, part in parts.items()
        ]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "front $A back", "front $A back $B", special_tokens
        )
    tokenizer.save_pretrained(folder)


def write_modules(embedder, folder):
    """modules.json, the folder of each module, and the prompts."""
    kind, similarity = "SentenceTransformer", "cosine" if embedder.normalize else "dot"
    top = {"max_seq_length": embedder.max_length, "do_lower_case": False}
    modules, target = [("models.Transformer", top)], {}  # target: what Dense and Normalize change
    if embedder.pooling == "splade":
        kind, top["transformer_task"] = "SparseEncoder", "fill-mask"
        config = {"pooling_strategy": "max", "activation_function": "relu"}
        modules.append(("sparse_encoder.modules.SpladePooling", config))
    elif embedder.pooling == "tokens":
        kind, similarity = "MultiVectorEncoder", "maxsim"
        target = {"module_input_name": "token_embeddings"}
        if embedder.projection is not None:
            config = {"in_features": embedder.model.config.n_embd, "out_features": embedder.dim}
            config |= {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
            modules.append(("base.modules.Dense", config | target))
        modules.append(("multi_vector_encoder.modules.MultiVectorMask", {}))
    else:  # the keys of its older versions, which the newer read, too
        config = {f"pooling_mode_{k}": v == embedder.pooling for k, v in POOLINGS.items()}
        config["word_embedding_dimension"] = embedder.dim
        modules.append(("models.Pooling", config | {"include_prompt": embedder.pool_instruction}))
    if embedder.normalize:
        modules.append(("base.modules.Normalize" if target else "models.Normalize", target))
    listed = []
    for i, (name, config) in enumerate(modules):  # the model, 0, lies in the folder itself
        path = f"{i}_{name.rpartition('.')[2]}" if i else ""
        name = f"sentence_transformers.{name}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": name})
        write_json(config, folder, path, "config.json" if i else "sentence_bert_config.json")
    write_json(listed, folder, "modules.json")
    prefix = embedder.template.prefix
    prompts = {name: embedder.template.head(text) for name, text in embedder.prompts.items()}
    config = {"model_type": kind, "similarity_fn_name": similarity, "prompts": prompts}
    if prefix and "document" in embedder.prompts:  # texts without a prompt get the template, too
        config["default_prompt_name"] = "document"
    write_json(config, folder, "config_sentence_transformers.json")


def write_settings(embedder, folder, projection=None):
    """nanoembed.json, and beside it projection, the matrix [D, C] of late interaction."""
    settings = {key: getattr(embedder, key) for key in SETTINGS}
    settings["template"] = asdict(embedder.template)
    backend = json.loads(embedder.tokenizer.backend_tokenizer.to_str())
    settings["post_processor"] = backend["post_processor"]  # load_tokenizer puts it back
    write_json(settings, folder, "nanoembed.json")
    if projection is not None:
        path = Path(folder, PROJECTION)
        path.parent.mkdir(exist_ok=True)
        save_file({"linear.weight": projection.detach().contiguous().cpu()}, path)


def read_settings(folder):
    """What a folder says about embedding, as arguments of Embedder: from our own file, or
    sentence-transformers'; {} for a plain model. Beside them path, the model's within a folder that
    sentence-transformers wrote."""
    if settings := read_json(folder, "nanoembed.json"):
        where = f"{folder}/nanoembed.json"
        # older files lack these
        missing = dict(pool_bos=True, doc_max_length=None, instructions={}, token_scores=False)
        settings = missing | settings
        for key, kind in (SETTINGS | {"template": dict}).items():
            if key != "doc_max_length" or settings[key] is not None:
                require(settings, key, kind, where, 0)
        texts = settings["prompts"] | settings["template"]
        for name in ("prefix", "suffix", *texts):
            require(texts, name, str, where, 0)
        if min(settings["max_length"], settings["doc_max_length"] or 1) < 1:
            raise ValueError(f"{where}: max_length {settings['max_length']}, expected 1 or more")
        template = Template(**settings["template"])
        settings = {key: settings[key] for key in SETTINGS} | {"template": template}
        path = Path(folder, PROJECTION)
        return settings | ({"projection": read_projection(path)} if path.exists() else {})
    if not (modules := read_json(folder, "modules.json", kind=list)):
        return {}

    settings = {"normalize": False}
    top = read_json(folder, "config_sentence_transformers.json")
    if prompts := top.get("prompts"):
        settings["prompts"] = {name: text or "" for name, text in prompts.items()}
    if default := top.get("default_prompt_name"):
        print0(f"{folder}: sentence-transformers adds prompt {default!r} to texts without one; "
               "encode adds what you give it")  # fmt: skip
    for module in modules:
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if path.startswith("/") or ".." in path:
            raise ValueError(f"{folder}/modules.json: path {path!r}, expected a folder in it")
        transformer = kind in ("Transformer", "MLMTransformer")
        name = "sentence_bert_config.json" if transformer else "config.json"
        config = read_json(folder, path, name)
        bad = [key for key in REFUSED if config.get(key)]
        if transformer:
            settings["path"] = path
            tokenizer = read_json(folder, path, "tokenizer_config.json")
            bad += ["truncation_side"] * (tokenizer.get("truncation_side") == "left")
            length = config.get("max_seq_length") or tokenizer.get("model_max_length", 1e30)
            if length < 1e9:  # transformers writes 1e30 where there is no limit
                settings["max_length"] = length
        elif kind == "Pooling":
            on = [key for key, value in config.items() if "pooling_mode_" in key and value]
            modes = config.get("pooling_mode") or on
            modes = [modes] if isinstance(modes, str) else modes
            mode = modes[0].removeprefix("pooling_mode_")
            ours = [ours for key, ours in POOLINGS.items() if key.startswith(mode)]
            settings["pooling"] = ours[0] if ours else None
            settings["pool_instruction"] = config.get("include_prompt", True)
            bad = modes if len(modes) > 1 or not ours else None
        elif kind == "SpladePooling":
            settings["pooling"] = "splade"
            kinds = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
            bad = kinds if kinds != ("max", "relu") else None
        elif kind == "MultiVectorMask":
            settings["pooling"] = "tokens"
        elif kind == "Dense":
            plain = config.get("module_input_name") == "token_embeddings" and not config["bias"]
            if plain and config["activation_function"].endswith(".Identity"):
                settings["projection"] = read_projection(Path(folder, path, "model.safetensors"))
            else:
                bad = config
        elif kind == "Normalize":
            settings["normalize"] = True
        else:
            bad = "the whole module"
        if bad:
            raise ValueError(f"{folder}: {module['type']}: not supported: {bad}")
    return settings


def read_projection(path):
    tensors = open_tensors(path)
    if list(tensors) != ["linear.weight"]:
        raise ValueError(f"{path}: tensors {list(tensors)}, expected linear.weight alone")
    weight = finite(tensors["linear.weight"](), "linear.weight", path).float()
    projection = nn.Linear(*weight.T.shape, bias=False)
    projection.weight.data = weight
    return projection
