"""
A saved classifier on a file of labelled words or texts, as it was trained.

    python -m evals.classifier --model=out/classifier_pos_ud \\
        --eval_data=data/ud/test.jsonl
    torchrun --standalone --nproc_per_node=8 -m evals.classifier \\
        --model=out/x --eval_data=...

The metrics are those that train_classifier.py has at its end; out_dir/results.json gets them, as
{file: {"task", "metrics"}}, beside those of other files.
"""

import usage  # noqa: F401  --help ends here, without torch

from types import SimpleNamespace

import torch
import torch.distributed as dist

import common
from formats import read_json
from formats.classifier import read_classifier, write_results
from formats.huggingface import from_pretrained, resolve_folder
from labels import read_examples
from tokenizer import load_tokenizer
from train_classifier import Classifier, evaluate

# ---- defaults ----
out_dir = "out/classifier"  # like .+
model = ""  # a folder that train_classifier.py saved, an out_dir or a hub id
eval_data = ""  # words: JSONL, or columns as CoNLL has them; texts: JSONL
eval_lines = 0  # >= 0; of eval_data, from its start; 0: all
label_field = "labels"  # words: the field of JSONL lines that holds the labels
label_column = -1  # != 0; words: the column of a CoNLL file that holds the label, -1 is the last
device_batch_size = 8  # >= 1; texts of one forward on one device
# device
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
dtype = "auto"  # one of auto, bf16, fp32; bf16 by autocast; auto: if it is fast

if __name__ == "__main__":
    # ---- configure ----
    s = SimpleNamespace(**common.configure(globals()))
    if not s.model or not s.eval_data:
        raise SystemExit("give --model=... and --eval_data=...")
    s.rank, s.world_size, _, s.device = common.setup_distributed()
    dtype = common.dtype_of(s.dtype, s.device)
    s.autocast = lambda: torch.autocast(s.device.type, dtype, enabled=dtype != torch.float32)

    # ---- classifier ----
    folder = resolve_folder(s.model)
    saved, last_layers = read_classifier(folder)
    vars(s).update(saved)
    common.print0("as it was trained:", saved)
    # a frozen model's type is that it was trained with; the last layers are fp32
    model = from_pretrained(folder, dtype=getattr(torch, read_json(folder, "config.json")["dtype"]))
    classifier = Classifier(model, None, s)
    classifier.last_layers.load_state_dict(last_layers)
    model.set_backend(s.attention_backend, s.device, dtype)
    classifier.to(s.device)

    # ---- evaluate ----
    examples = read_examples(s.eval_data, s, s.eval_lines)
    found = evaluate(classifier, examples, load_tokenizer(folder), s)
    write_results(found, s)
    common.print0(s.eval_data, found)
    if dist.is_initialized():
        dist.destroy_process_group()
