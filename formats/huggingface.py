"""
Hugging Face model folders: config.json and safetensors, key by key what `transformers` has.
"""

import os
import re
import shutil
from dataclasses import replace
from functools import partial, reduce
from glob import glob
from pathlib import Path

import torch
from huggingface_hub import HfApi, save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from data import require
from formats import llm2vec, read_json, write_json
from model import ACTIVATIONS, DEFAULTS, ModelConfig, Transformer

# Our module names on the left, each family's on the right; "-" where it has no such module.
_NAMES = """
ours             llama                    modernbert                      neobert
embed            model.embed_tokens       model.embeddings.tok_embeddings model.encoder
embed_norm       -                        model.embeddings.norm           -
blocks           model.layers             model.layers                    model.transformer_encoder
norm             model.norm               model.final_norm                model.layer_norm
head.dense       -                        head.dense                      -
head.norm        -                        head.norm                       -
lm_head          lm_head                  decoder                         decoder
attn_norm        input_layernorm          attn_norm                       attention_norm
attn.qkv_proj    -                        attn.Wqkv                       qkv
attn.q_proj      self_attn.q_proj         attn.q_proj                     -
attn.k_proj      self_attn.k_proj         attn.k_proj                     -
attn.v_proj      self_attn.v_proj         attn.v_proj                     -
attn.q_norm      self_attn.q_norm         -                               -
attn.k_norm      self_attn.k_norm         -                               -
attn.o_proj      self_attn.o_proj         attn.Wo                         wo
mlp_norm         post_attention_layernorm mlp_norm                        ffn_norm
mlp.gate_up_proj -                        mlp.Wi                          ffn.w12
mlp.gate_proj    mlp.gate_proj            -                               -
mlp.up_proj      mlp.up_proj              -                               -
mlp.down_proj    mlp.down_proj            mlp.Wo                          ffn.w3
"""
(_, *_ours), *_columns = zip(*map(str.split, _NAMES.strip().splitlines()))
NAMES = {head: {o: t for o, t in zip(_ours, names) if t != "-"} for head, *names in _columns}
NAMES |= dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma"), NAMES["llama"])
NAMES["gemma3_text"] = NAMES["llama"] | {
    "attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm"}  # fmt: skip
# its encoder has qkv_proj, the decoder the three apart
NAMES["modernbert-decoder"] = NAMES["modernbert"] | {
    "head.dense": "lm_head.dense", "head.norm": "lm_head.norm"}  # fmt: skip

ARCHITECTURES = {  # with a language modelling head, without
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"),
    "gemma": ("GemmaForCausalLM", "GemmaModel"),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextModel"),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertModel"),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", "ModernBertDecoderModel"),
    "neobert": ("NeoBERTLMHead", "NeoBERT"),
}

GEMMAS = ("gemma", "gemma3_text")
SOFT_CAPS = "no attention kernel that is used here has Gemma 2's soft caps on scores and logits"

LAYER_TYPES = {"global": "full_attention", "local": "sliding_attention"}

# Fields of ModelConfig and their keys in config.json. The first five must be there; for others
# that are missing see DEFAULTS in model.py.
_SHAPE = {
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_embd": "hidden_size", "n_hidden": "intermediate_size",
}  # fmt: skip
_BOTH = _SHAPE | {
    "max_seq_len": "max_position_embeddings", "mlp_bias": "mlp_bias",
    "tied": "tie_word_embeddings", "attn_dropout": "attention_dropout",
}  # fmt: skip
_BIASES = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_LLAMA_KEYS = _BOTH | {
    "n_kv_head": "num_key_value_heads", "head_dim": "head_dim", "causal": "is_causal",
    "norm_eps": "rms_norm_eps", "activation": "hidden_act",
}  # fmt: skip
_MODERNBERT_KEYS = _BOTH | _BIASES | {
    "norm_eps": "norm_eps", "norm_bias": "norm_bias", "activation": "hidden_activation",
    "head_bias": "decoder_bias", "head_dense_bias": "classifier_bias",
}  # fmt: skip
KEYS = {
    "llama": _LLAMA_KEYS | _BIASES, "mistral": _LLAMA_KEYS | _BIASES, "qwen2": _LLAMA_KEYS,
    "qwen3": _LLAMA_KEYS | _BIASES, "gemma": _LLAMA_KEYS | _BIASES,
    "gemma3_text": _LLAMA_KEYS | _BIASES | {
        "activation": "hidden_activation", "query_pre_attn_scalar": "query_pre_attn_scalar"},
    "modernbert": _MODERNBERT_KEYS,
    "modernbert-decoder": _MODERNBERT_KEYS | {"causal": "is_causal"},
    "neobert": _SHAPE | {
        "max_seq_len": "max_length", "causal": "is_causal", "norm_eps": "norm_eps",
        "tied": "tie_word_embeddings", "head_bias": "decoder_bias"},
}  # fmt: skip

OURS = ("out", "data", "models", "configs", "runs")  # folders here, never owners on the hub
OURS_ALONE = "nanoembed"  # weights of a classifier that transformers would fill up at random
CLASSIFIERS = ("score.", "classifier.", "linear.")  # the last layer of a classifier's folder


def hf_module(module, family):
    """blocks.3.attn.q_proj -> model.layers.3.self_attn.q_proj"""
    names = NAMES[family]
    if not module.startswith("blocks."):
        return names[module]
    _, i, inner = module.split(".", 2)
    return f"{names['blocks']}.{i}.{names[inner]}"


def our_module(module, family):
    """The way back; None for a name that the family does not have. "model." may be missing."""
    back = {theirs: ours for ours, theirs in NAMES[family].items()}
    for name in (module, "model." + module):
        block = re.match(rf"{NAMES[family]['blocks']}\.(\d+)\.", name)
        ours = back.get(name[block.end() :] if block else name)
        if ours:
            return f"blocks.{block[1]}.{ours}" if block else ours
    return None


def _rope_from_hf(hf, kind, theta):
    """{"theta", "scaling"} from `rope_parameters`, or the older rope_scaling and `theta`."""
    new = hf.get("rope_parameters") or {}
    require({"rope_parameters": new}, "rope_parameters", dict, "config.json", 0)
    new = new.get(LAYER_TYPES[kind], new)
    old = hf.get("rope_scaling") or {}
    if kind == "local" and hf["model_type"] == "gemma3_text":
        old = {}  # it stretches the global layers alone
    scaling = {"rope_type": old.get("type", "default")} | old | new
    scaling = {k: v for k, v in scaling.items() if k not in ("rope_theta", "type")}
    theta, plain = new.get("rope_theta") or theta, scaling["rope_type"] == "default"
    needed = ["rope_theta"] + ["factor"] * (not plain)
    needed += ["low_freq_factor", "high_freq_factor"] * (scaling["rope_type"] == "llama3")
    for key in needed:
        if require(scaling | {"rope_theta": theta}, key, float, "config.json", 0) <= 0:
            raise ValueError(f"config.json: {key} of RoPE, expected a number above 0")
    return {"theta": theta, "scaling": None if plain else scaling}


def config_from_hf(hf):
    """config.json as a dictionary -> ModelConfig. Missing keys get transformers' defaults."""
    family = hf.get("model_type")
    if family == "gemma2":
        raise ValueError(f"config.json: model_type 'gemma2': {SOFT_CAPS}")
    if not isinstance(family, str) or family not in NAMES:
        raise ValueError(f"config.json: model_type {family!r}, expected one of {list(NAMES)}")
    if hf.get("attn_logit_softcapping") or hf.get("final_logit_softcapping"):
        raise ValueError(f"config.json: {SOFT_CAPS}")
    c = DEFAULTS[family] | {"family": family, "hf": hf}
    for field, key in KEYS[family].items():
        if field in _SHAPE or hf.get(key) is not None:
            kind = ModelConfig.__annotations__[field]
            c[field] = require(hf, key, kind, "config.json", 0)
            if kind is int and not 0 < hf[key] <= (10_000 if field == "n_layer" else 2**31):
                raise ValueError(f"config.json: {key} is {hf[key]}: no model has so many")
    bidirectional = family in GEMMAS and hf.get("use_bidirectional_attention")
    if bidirectional:
        c["causal"] = False
    if family == "gemma" and c["activation"] == "gelu":  # the first folders say so, and mean tanh
        c["activation"] = "gelu_pytorch_tanh"
    if family.startswith("modernbert"):
        every = hf.get("global_attn_every_n_layers", 3)
        kinds = ["sliding" if i % every else "full" for i in range(c["n_layer"])]
        window = hf.get("local_attention", 128) // 2  # the config counts both sides
        theta = hf.get("global_rope_theta") or 160_000.0
        thetas = {"global": theta, "local": hf.get("local_rope_theta", 10_000.0) or theta}
        # ours; transformers has one number for both
        c["out_dropout"] = hf.get("attention_out_dropout", c.get("attn_dropout", 0.0))
    elif family == "gemma3_text":
        every = hf.get("sliding_window_pattern", 6)
        kinds = ["sliding" if (i + 1) % every else "full" for i in range(c["n_layer"])]
        window = hf.get("sliding_window", 4096)
        window = window // 2 if bidirectional else window  # with this key it counts both sides
        thetas = {
            "global": hf.get("rope_theta") or 1e6, "local": hf.get("rope_local_base_freq") or 1e4}
    else:
        qwen = family in ("qwen2", "qwen3")
        used = hf.get("use_sliding_window") if qwen else family == "mistral"
        window = (used and hf.get("sliding_window")) or None  # None: all layers are global
        from_layer = hf.get("max_window_layers", 28) if qwen else 0
        kinds = ["sliding" if i >= from_layer else "full" for i in range(c["n_layer"])]
        thetas = dict.fromkeys(LAYER_TYPES, hf.get("rope_theta") or 10_000.0)
    if family == "neobert":  # the published config counts before the factor 2/3: 3072 for 2048
        c["n_hidden"] = (int(2 * c["n_hidden"] / 3) + 7) // 8 * 8
    if hf.get("layer_types"):
        kinds = require(hf, "layer_types", [str], "config.json", 0)
        if not set(kinds) <= set(LAYER_TYPES.values()):
            raise ValueError(f"config.json: layer_types {kinds}, expected full or sliding ones")
    kinds = ["local" if window is not None and kind.startswith("sliding") else "global"
             for kind in kinds]  # fmt: skip
    rope = {kind: _rope_from_hf(hf, kind, theta) for kind, theta in thetas.items()}
    config = ModelConfig(**c, window=window or 0, layer_kinds=kinds, rope=rope)
    if config.activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json: activation {config.activation!r}, expected {expected}")
    return config


def config_to_hf(c):
    """ModelConfig -> config.json. Keys of the folder that was read and mean nothing to us stay."""
    gone = (
        "rope_theta rope_scaling global_rope_theta local_rope_theta rope_local_base_freq "
        "sliding_window_pattern use_bidirectional_attention torch_dtype"
    ).split()
    hf = {key: value for key, value in c.hf.items() if key not in gone}
    hf |= {key: getattr(c, field) for field, key in KEYS[c.family].items()}
    rope = {
        LAYER_TYPES[kind]: {"rope_type": "default", "rope_theta": rope["theta"]}
        | (rope["scaling"] or {})
        for kind, rope in c.rope.items()
    }
    hf |= dict(
        model_type=c.family, architectures=[ARCHITECTURES[c.family][c.head == "none"]],
        is_causal=c.causal, rope_parameters=rope["full_attention"],
    )  # fmt: skip
    kinds = [LAYER_TYPES[kind] for kind in c.layer_kinds]
    if "layer_types" in hf:  # also where the family needs none; as many as there are layers
        hf["layer_types"] = kinds
    if c.family.startswith("modernbert"):
        hf |= dict(layer_types=kinds, local_attention=2 * c.window, rope_parameters=rope)
        hf["attention_out_dropout"] = c.out_dropout
    elif c.family == "neobert":
        hf["intermediate_size"] = c.n_hidden * 3 // 2
        classes = dict(AutoConfig="NeoBERTConfig", AutoModel="NeoBERT",
                       AutoModelForMaskedLM="NeoBERTLMHead")  # fmt: skip
        hf["auto_map"] = {auto: f"modeling_neobert.{cls}" for auto, cls in classes.items()}
        if c.n_hidden % 8:
            raise ValueError(f"NeoBERT's n_hidden must be a multiple of 8, not {c.n_hidden}")
    else:
        hf["sliding_window"] = c.window or None
    if c.family == "gemma3_text":
        hf |= dict(layer_types=kinds, rope_parameters=rope, sliding_window=c.window)
    if c.family == "gemma3_text" and not c.causal:
        # its own key; with is_causal too, transformers would see one token more on each side
        hf |= dict(use_bidirectional_attention=True, sliding_window=2 * c.window)
        del hf["is_causal"]
    if c.family in ("qwen2", "qwen3"):
        hf |= dict(layer_types=kinds, use_sliding_window=bool(c.window))
    return hf


def interleave_qkv(name, w, c, back):
    """NeoBERT stores q, k and v head by head: [H, 3, D, C] there, [3, H, D, C] here. LoRA's B has
    the same rows; any other tensor comes back as it is. name: ours."""
    if c.family != "neobert" or "qkv_proj" not in name or name.endswith("lora_A"):
        return w
    shape = (3, c.n_head) if back else (c.n_head, 3)
    return w.reshape(*shape, c.head_dim, -1).transpose(0, 1).reshape(w.shape)


def write_folder(folder, c, state, classifier=None, weights="model"):
    """`state`: our names -> tensors, of any device. Writes config.json and safetensors.
    `classifier`: (tensors by transformers' names, keys of config.json) of a ...Classification
    model, whose other names are those of a model with a head. weights: what the files' names begin
    with; those that begin otherwise than "model" no class of transformers loads."""
    bare = c.head == "none" and not classifier
    last_layers, keys = classifier or ({}, {})
    out = dict(last_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and c.tied:
            continue
        module, leaf = name.rsplit(".", 1)
        key = f"{hf_module(module, c.family)}.{leaf}"
        key = key.removeprefix("model.") if bare else key
        out[key] = interleave_qkv(name, tensor, c, back=True)
    out = {key: tensor.detach().contiguous() for key, tensor in out.items()}
    os.makedirs(folder, exist_ok=True)
    if c.family == "neobert":  # which transformers loads with trust_remote_code=True
        shutil.copy(Path(__file__).with_name("modeling_neobert.py"), folder)
    save_torch_state_dict(out, folder, filename_pattern=weights + "{suffix}.safetensors",
                          max_shard_size="5GB", metadata={"format": "pt"})  # fmt: skip
    dtype = str(state["embed.weight"].dtype).removeprefix("torch.")
    write_json(config_to_hf(c) | {"dtype": dtype} | keys, folder, "config.json")


def save_pretrained(model, folder, state_dict=None):
    """Writes config.json and safetensors that `transformers` loads with equal outputs.
    `state_dict`: full weights gathered elsewhere (FSDP)."""
    write_folder(folder, model.config, model.state_dict() if state_dict is None else state_dict)


def newest_model(folder):
    """The folder itself, or if it is the out_dir of a run its checkpoint with the largest number:
    of step500 and ext800 the latter."""
    files = ("config.json", "adapter_config.json", "modules.json")
    if any(os.path.exists(os.path.join(folder, name)) for name in files):
        return folder
    # a save that is under way, or was killed, has a dot in front: glob leaves such names out
    found = [path for name in files for path in glob(f"*[0-9]/{name}", root_dir=folder)]
    if not found:
        raise FileNotFoundError(f"{folder}: no config.json, and no checkpoint such as step500: "
                                "expected a model's folder, or the out_dir of a run")
    return os.path.join(folder, max(map(os.path.dirname, found), key=step_of))


def step_of(checkpoint):
    """The number that the name of a checkpoint ends in: 500 of out/x/step500."""
    return int(re.search(r"\d+$", checkpoint)[0])


def checkpoints(out_dir):
    """The whole checkpoints of a run, in the order of their steps."""
    found = [os.path.dirname(path) for path in glob(f"{out_dir}/*[0-9]/complete.json")]
    if not found:
        raise SystemExit(f"{out_dir}: no checkpoint such as step500 with its complete.json")
    return sorted(found, key=step_of)


def pinned(name):
    """The folder that a local name means now: of an out_dir its newest checkpoint, of a link (such
    as out_dir/final) the folder behind it. A hub id stays as it is."""
    if not os.path.isdir(name):
        return name
    folder = newest_model(name).rstrip("/")
    if os.path.islink(folder):
        folder = os.path.join(os.path.dirname(folder), os.readlink(folder))
    return folder


def resolve_folder(name):
    """A local folder (of an out_dir its newest checkpoint), or a hub id `owner/name[@revision]`,
    downloaded to the cache."""
    if os.path.isdir(name):
        return newest_model(name)
    return download(name, ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"])


def download(name, patterns):
    """The folder in the cache of a hub id `owner/name[@revision]`, with files of these patterns."""
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@.+)?", name) or repo.split("/")[0] in OURS:
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id (owner/name[@revision])")
    try:
        return snapshot(repo, revision or None, patterns)
    except (OSError, ValueError) as error:  # no network, no such repository: perhaps it is a path
        known = llm2vec.published(name)
        if known and known[0] != repo:  # a shorter spelling
            return download(f"{known[0]}@{revision}" if revision else known[0], patterns)
        raise OSError(f"{name}: no such folder, and from the hub: {error}") from error


def snapshot(repo, revision, patterns):
    """snapshot_download, which waits for ever on a hub that takes the request and is silent: here
    for 4 s. Then, as without a network, what an earlier download has left is taken."""
    silent = None
    try:
        HfApi().repo_info(repo, revision=revision, timeout=4)
    except Exception as error:  # its kinds differ by version
        silent = error
    try:
        return snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=silent is not None)
    except (OSError, ValueError) as error:
        raise OSError(silent or error) from error


def open_tensors(path):
    """{name: function that reads it} of a .safetensors or old .bin. ValueError names the file."""
    try:
        if Path(path).suffix == ".safetensors":
            file = safe_open(path, "pt")
            return {key: partial(file.get_tensor, key) for key in file.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: tensor.detach for key, tensor in state.items()}
    except Exception as error:  # of safetensors, pickle, zip
        raise ValueError(f"{path}: no whole file of tensors: {error}") from None


def finite(tensor, name, folder):
    """The tensor. ValueError names it where its numbers are whole ones, or not all finite."""
    # a sum needs no memory; in fp32 it overflows for no weights that are any good
    if not tensor.is_floating_point() or not tensor.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"{folder}: tensor {name!r}, {tensor.dtype}: expected finite floats alone")
    return tensor


def _read_tensors(folder):
    """{name: function that reads it} from safetensors, one file or sharded, or an old .bin."""
    readers, folder = {}, Path(folder)
    names = "model*.safetensors", f"{OURS_ALONE}*.safetensors", "pytorch_model*.bin"
    paths = next(filter(None, (list(folder.glob(name)) for name in names)), [])
    for path in paths:
        readers |= open_tensors(path)
    if not readers:
        raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin")
    tables = ("inv_freq", "freqs_cis")  # of positions; old files carry them
    return {key: read for key, read in readers.items() if not key.endswith(tables)}


def stored_dtype(folder):
    """The type of a folder's weights, the widest if there are several."""
    return reduce(torch.promote_types, (read().dtype for read in _read_tensors(folder).values()))


class WithoutInit(TorchFunctionMode):
    """New modules get no initial weights. To draw those of an embedding on the meta device, torch
    imports its compiler: seconds, and 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_init = getattr(function, "__module__", "") == "torch.nn.init"
        return kwargs["tensor"] if is_init else function(*args, **kwargs)


def from_pretrained(
    name, attention=None, window=None, rope_theta=None, dtype=torch.float32, n_layer=None
):
    """A Transformer from a Hugging Face folder or a hub id `owner/name[@revision]`.

    attention: "causal" or "bidirectional" instead of the folder's own; "bidirectional" on a Llama
    is LLM2Vec's model. An encoder read as causal becomes a ModernBERT-decoder. "encoder" is
    "bidirectional", and makes a ModernBERT of a ModernBERT-decoder: saved, it is what transformers'
    AutoModelForMaskedLM loads.
    window: of the local layers (see ModelConfig.window_of), 0 makes every layer global.
    rope_theta: for training at a longer context. dtype: of the weights in memory; None: that of the
    folder. n_layer: only the first n layers. ValueError for a missing, unexpected or misshapen
    weight; a folder without any language modelling head, a classifier's too, gives a model without
    one."""
    folder = resolve_folder(name)
    hf = read_json(folder, "config.json")
    if not hf:
        raise FileNotFoundError(f"{folder}: no config.json (an adapter goes with its base)")
    source = config_from_hf(hf)
    if attention not in (None, "causal", "bidirectional", "encoder"):
        raise ValueError(f"attention={attention!r}: expected causal, bidirectional or encoder")
    c = replace(source, causal=source.causal if attention is None else attention == "causal")
    if attention == "encoder" and c.family == "modernbert-decoder":
        c = replace(c, family="modernbert", fused_qkv=True)
    if window is not None:
        c.window = window
        if not window:
            c.layer_kinds = ["global"] * c.n_layer
        elif "local" not in c.layer_kinds:
            raise ValueError(f"{folder}: window={window}, but none of its layers is local")
    for rope in c.rope.values():
        rope["theta"] = rope_theta or rope["theta"]

    # The folder's tensors have to show which head it has.
    files, dtype = _read_tensors(folder), dtype or stored_dtype(folder)
    if any(key.startswith(CLASSIFIERS) for key in files):
        # a classifier: train_classifier.py reads its last layers
        c.head = "none"
        files = {k: read for k, read in files.items() if not k.startswith((*CLASSIFIERS, "head."))}
    elif c.tied and c.head == "linear" and not c.head_bias:
        pass  # a tied head has no tensors: it is always there
    elif not any(key.startswith(("model.", "head.", "lm_head.", "decoder.")) for key in files):
        # saved from AutoModel: a model with a head has "model." before its other names
        c.head = "none"

    state = {}
    for key, read in files.items():
        module, _, leaf = key.rpartition(".")
        module = our_module(module, source.family)
        if module is None:
            raise ValueError(f"{folder}: unexpected tensor {key!r} for {source.family}")
        parts = {module: interleave_qkv(module, finite(read(), key, folder), c, back=False)}
        if module.endswith("qkv_proj") and c.fused_qkv < source.fused_qkv:  # encoder to decoder
            parts = {module.replace("qkv", x): w for x, w in zip("qkv", parts[module].chunk(3))}
        # copies: a mapped file may lie unaligned, and then other kernels sum in other orders
        state |= {f"{ours}.{leaf}": part.to(dtype, copy=True) for ours, part in parts.items()}

    if c.fused_qkv > source.fused_qkv:  # decoder to encoder
        for q in [name for name in state if ".q_proj." in name]:
            names = [q.replace("q_proj", f"{x}_proj") for x in "qkv"]
            if all(name in state for name in names):
                state[q.replace("q_proj", "qkv_proj")] = torch.cat([*map(state.pop, names)])

    if c.tied:
        state.pop("lm_head.weight", None)
    with torch.device("meta"), WithoutInit():
        model = Transformer(c)
    wanted = {k: tuple(p.shape) for k, p in model.named_parameters()}
    found = {k: tuple(tensor.shape) for k, tensor in state.items()}
    for key in wanted | found:
        shape, expected = found.get(key, "missing"), wanted.get(key, "no such tensor")
        if shape != expected:
            module, _, leaf = key.rpartition(".")
            theirs = f"{hf_module(module, c.family)}.{leaf}"
            raise ValueError(f"{folder}: tensor {theirs!r} is {shape}, expected {expected}")
    model.load_state_dict(state, strict=False, assign=True)  # all names are checked above
    model.tie()
    model.stream_dtype = dtype if dtype != torch.float32 else None
    if n_layer is not None:
        model.keep_layers(n_layer)
    return model
