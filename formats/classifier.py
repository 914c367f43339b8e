"""
Folders of classifiers: a model, its last layers and what makes its logits what they are.

Where a class of transformers computes the same, the folder is that of its ...ForTokenClassification
or ...ForSequenceClassification. nanoembed_classifier.json says in every case how it was trained.
results.json, which lies beside the checkpoints of a run, has the metrics of its evaluations.
"""

import json
import math
import os

from safetensors import safe_open

from formats.huggingface import CLASSIFIERS, write_folder

# The settings that belong to a classifier and not to the run that trained it.
SAVED = (
    "task loss_kind labels label_position merge_subwords pooling prefix suffix separator "
    "max_length prediction_head dropout pos_weight"
).split()

_LLAMAS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_CLASSES = _LLAMAS | {"modernbert": "ModernBert", "modernbert-decoder": "ModernBertDecoder"}
_PROBLEM_TYPES = {
    "softmax": "single_label_classification", "bce": "multi_label_classification",
    "mse": "regression",
}  # fmt: skip


def transformers_class(c, s):
    """-> (the class of transformers that computes the same, None), or (None, why there is none)."""
    words = s.task == "words"
    if c.family not in _CLASSES:
        return None, "transformers has no NeoBERT"
    if words and s.label_position == "next_token":
        return None, "its classes read a token's label where the token stands, not one before"
    if words and c.family == "modernbert-decoder":
        return None, "transformers labels no tokens with a ModernBERT decoder"
    if c.family not in _LLAMAS and not s.prediction_head:
        return None, "its ModernBERT classes have a prediction head: prediction_head=True"
    if words:
        return f"{_CLASSES[c.family]}ForTokenClassification", None
    name = f"{_CLASSES[c.family]}ForSequenceClassification"
    poolings = ("mean", "cls") if c.family == "modernbert" else ("last",)
    if s.pooling not in poolings:
        return None, f"{name} pools {' or '.join(poolings)}"
    return name, None


def describe_saved(tokenizer, c, s):
    """What a user of transformers has to know about the folder, to be printed before training."""
    name, problem = transformers_class(c, s)
    if problem:
        return f"saved for nanoembed alone; transformers would differ: {problem}"
    if s.task == "texts":
        joined, pair = tokenizer("a" + s.separator + "b"), tokenizer("a", "b")
        if s.prefix or s.suffix or joined["input_ids"] != pair["input_ids"]:
            text = s.prefix + "text" + s.separator + "text_pair" + s.suffix
            name += f", whose tokenizer should be given one text, {text!r}, and not two"
    return f"saved for transformers' {name}"


def has_bias(c, s):
    """Does the last layer have a bias? As in transformers' classes."""
    if s.task == "words" or c.family in ("modernbert", "neobert"):
        return True
    return c.family == "modernbert-decoder" and c.head_dense_bias


def set_pad(tokenizer, c, suffix=""):
    """Gives the tokenizer and the config a padding token that no text ends with: transformers'
    decoders read a text at its last token that is no padding."""
    last = tokenizer("a" + suffix)["input_ids"][-1]
    for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, "!"):
        if token and tokenizer.convert_tokens_to_ids(token) not in (None, last):
            tokenizer.pad_token = token
            break
    c.hf = c.hf | {"pad_token_id": tokenizer.pad_token_id}


def save_classifier(folder, c, tokenizer, s, weights, last_layers):
    """Writes the folder. c: the model's ModelConfig. weights: the model's full tensors, with LoRA
    merged. last_layers: the tensors of the linear layer and the prediction head."""
    set_pad(tokenizer, c, s.suffix)
    name, problem = transformers_class(c, s)
    layer = "linear."  # which no class of transformers takes for its own
    if name:
        layer = "score." if c.family in _LLAMAS else "classifier."
    labels = s.labels or ["score"]
    keys = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": _PROBLEM_TYPES[s.loss_kind],
        "classifier_dropout": s.dropout,
    }
    if name:
        keys["architectures"] = [name]
    if s.task == "texts" and c.family == "modernbert":
        keys["classifier_pooling"] = s.pooling
    last_layers = {key.replace("linear.", layer): t for key, t in last_layers.items()}
    write_folder(folder, c, weights, (last_layers, keys))
    tokenizer.save_pretrained(folder)
    notes = {key: getattr(s, key) for key in SAVED} | {"transformers": name, "problem": problem}
    with open(os.path.join(folder, "nanoembed_classifier.json"), "w", encoding="utf-8") as f:
        json.dump(notes, f, indent=1)


def read_classifier(folder, s=None):
    """-> (the settings it was saved with, {our name: tensor} of its last layers). ValueError for a
    folder that save_classifier did not write, SystemExit where s has other settings."""
    path = os.path.join(folder, "nanoembed_classifier.json")
    if not os.path.exists(path):
        raise ValueError(f"{folder}: no nanoembed_classifier.json: no classifier saved by us")
    with open(path, encoding="utf-8") as f:
        saved = json.load(f)
    saved.setdefault("max_length", saved.get("max_seq_len"))  # its name in earlier versions
    for key in SAVED if s else ():
        if saved[key] != getattr(s, key):
            raise SystemExit(
                f"{folder} was trained with {key}={saved[key]!r}, now it is {getattr(s, key)!r}: "
                "choose another out_dir"
            )
    tensors = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                for key in f.keys():
                    if key.startswith("head."):
                        tensors[key] = f.get_tensor(key)
                    elif key.startswith(CLASSIFIERS):
                        tensors["linear." + key.partition(".")[2]] = f.get_tensor(key)
    return saved, tensors


def write_results(found, s):
    """Adds what evaluate found on s.eval_data to results.json in s.out_dir, beside other files':
    {file: {"task", "n", "missing" (words), "metrics"}}."""
    if found.get("missing"):
        print(f"{found['missing']} of {found['n']} words have no token: counted wrong")
    path, results = os.path.join(s.out_dir, "results.json"), {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    counts = {key: found[key] for key in ("n", "missing") if key in found}
    metrics = {k: x if math.isfinite(x) else None for k, x in found.items() if k not in counts}
    results[s.eval_data] = {"task": s.task, **counts, "metrics": metrics}
    os.makedirs(s.out_dir, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(results, f, indent=1)
