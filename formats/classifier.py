"""
Folders of classifiers: a model, its last layers and what makes its logits what they are.

Where a class of transformers computes the same, the folder is that of its ...ForTokenClassification
or ...ForSequenceClassification; where none does, its weights are nanoembed.safetensors, which all
of them refuse. nanoembed_classifier.json says in every case how it was trained.
results.json, which lies beside the checkpoints of a run, has the metrics of its evaluations.
"""

import math
import re
from pathlib import Path

from formats import read_json, write_json
from formats.huggingface import (
    ARCHITECTURES,
    CLASSIFIERS,
    OURS_ALONE,
    _read_tensors,
    finite,
    write_folder,
)

# The settings that belong to a classifier and not to the run that trained it.
SAVED = (
    "task loss_kind labels label_position merge_subwords pooling prefix suffix separator "
    "max_length prediction_head dropout pos_weight"
).split()

_PROBLEM_TYPES = {
    "softmax": "single_label_classification", "bce": "multi_label_classification",
    "mse": "regression",
}  # fmt: skip


def transformers_class(c, s):
    """-> (the class of transformers that computes the same, None), or (None, why there is none)."""
    words = s.task == "words"
    if c.family == "neobert":
        return None, "the NeoBERT code in a saved folder has no such class"
    if words and s.label_position == "next_token":
        return None, "its classes read a token's label where the token stands, not one before"
    if words and c.family in ("modernbert-decoder", "gemma3_text"):
        return None, f"transformers labels no tokens with a {c.family}"
    if c.family.startswith("modernbert") and not s.prediction_head:
        return None, "its ModernBERT classes have a prediction head: prediction_head=True"
    name = ARCHITECTURES[c.family][1].removesuffix("Model")
    if words:
        return f"{name}ForTokenClassification", None
    poolings = ("mean", "cls") if c.family == "modernbert" else ("last",)
    if s.pooling not in poolings:
        return None, f"its {name} classes pool {' or '.join(poolings)}"
    return f"{name}ForSequenceClassification", None


def describe_saved(c, s):
    """What a user of transformers has to know about the folder, to be printed before training."""
    name, problem = transformers_class(c, s)
    if problem:
        return f"saved for nanoembed alone; transformers would differ: {problem}"
    if s.task == "texts":
        text = s.prefix + "text" + s.separator + "text_pair" + s.suffix
        name += f", whose tokenizer takes a pair as one text, {text!r}"
    return f"saved for transformers' {name}"


def save_classifier(folder, c, tokenizer, s, weights, last_layers):
    """Writes the folder. c: the model's ModelConfig. weights: the model's full tensors, with LoRA
    merged. last_layers: the tensors of the linear layer and the prediction head."""
    # transformers' decoders read a text at its last token that is no padding: a token for padding
    # that no text ends with
    last = tokenizer("a" + s.suffix)["input_ids"][-1]
    for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, "!"):
        if token and tokenizer.convert_tokens_to_ids(token) not in (None, last):
            tokenizer.pad_token = token
            break
    name, problem = transformers_class(c, s)
    labels = dict(enumerate(s.labels or ["score"]))
    keys = {
        "id2label": labels,
        "label2id": {label: i for i, label in labels.items()},
        "problem_type": _PROBLEM_TYPES[s.loss_kind],
        "classifier_dropout": s.dropout,
        "pad_token_id": tokenizer.pad_token_id,
    }
    layer = "linear."  # which no class of transformers takes for its own
    if name:
        keys["architectures"] = [name]
        layer = "classifier." if c.family.startswith("modernbert") else "score."
    if s.task == "texts" and c.family == "modernbert":
        keys["classifier_pooling"] = s.pooling
    last_layers = {key.replace("linear.", layer): t for key, t in last_layers.items()}
    # any class of transformers would fill a last layer that it misses with random numbers
    files = "model" if name else OURS_ALONE
    write_folder(folder, c, weights, (last_layers, keys), files)
    tokenizer.save_pretrained(folder)
    notes = {key: getattr(s, key) for key in SAVED} | {"transformers": name, "problem": problem}
    write_json(notes, folder, "nanoembed_classifier.json")


def read_classifier(folder, s=None):
    """-> (the settings it was saved with, {our name: tensor} of its last layers). ValueError for a
    folder that save_classifier did not write, SystemExit where s has other settings."""
    saved = read_json(folder, "nanoembed_classifier.json")
    if not saved:
        raise ValueError(f"{folder}: no nanoembed_classifier.json: no classifier saved by us, such "
                         "as train_classifier.py makes")
    saved.setdefault("max_length", saved.get("max_seq_len"))  # its name in earlier versions
    changed = {key: saved[key] for key in SAVED if s and saved[key] != getattr(s, key)}
    if changed:
        raise SystemExit(f"{folder} was trained with {changed}: choose another out_dir")
    tensors = {
        re.sub(r"^(score|classifier)\.", "linear.", name): finite(read(), name, folder)
        for name, read in _read_tensors(folder).items()
        if name.startswith(("head.", *CLASSIFIERS))
    }
    return saved, tensors


def write_results(found, s):
    """Adds what evaluate found on s.eval_data to results.json in s.out_dir, beside other files':
    {file: {"task", "n", "metrics"}}."""
    if s.rank > 0:
        return
    if found["missing"]:
        print(f"{found['missing']} of {found['n']} words have no token: counted wrong")
    metrics = {name: x if math.isfinite(x) else None for name, x in found.items()}
    entry = {"task": s.task, "n": found["n"], "metrics": metrics}
    path = Path(s.out_dir, "results.json")
    write_json(read_json(path) | {s.eval_data: entry}, path)
