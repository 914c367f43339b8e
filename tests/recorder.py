"""
Losses and gradient norms of the first 20 steps of every stage, to the last bit.

    python tests/recorder.py write losses.json             # of this tree
    python tests/recorder.py write losses.json --tree=old  # of another checkout
    python tests/recorder.py compare a.json b.json

For a change that must not change what is computed: record before, record after, compare. Both on
one machine, for another processor sums in another order. Data and models are made here, without
the project's own code. Options are written in today's names; OLD has those of earlier trees.
"""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS = 20
WORDS = [f"{a}{b}" for a in ("ta", "mo", "ri", "su", "ke") for b in ("n", "lo", "ma", "s")]

OLD = {  # script: {today's key: what it was called}
    "pretrain_mlm.py": {"data": "data_dir", "batch_tokens": "batch_size",
                        "device_batch_tokens": "device_batch_size"},
    "train_mntp.py": {"data": "data_dir", "batch_tokens": "batch_size",
                      "device_batch_tokens": "device_batch_size"},
    "train_contrastive.py": {"device_batch_tokens": "chunk_tokens"},
    "train_token_retrieval.py": {"device_batch_tokens": "chunk_tokens"},
    "train_classifier.py": {"max_length": "max_seq_len"}}  # fmt: skip

TOKEN_KEYS = dict(data="tokens", max_seq_len=64, batch_tokens=512, device_batch_tokens=128,
                  eval_interval=10, eval_tokens=512)  # fmt: skip
PAIR_KEYS = dict(data="('pairs.jsonl',)", eval_data="pairs.jsonl", batch_size=16, eval_interval=10,
                 query_max_length=32, passage_max_length=48, warmup_ratio=0.1)  # fmt: skip
LORA = dict(lora_rank=4, lora_dropout=0.05)
RUNS = {  # name: (ranks, script, keys)
    "mlm": (1, "pretrain_mlm.py", TOKEN_KEYS | dict(
        model_size="modernbert-tiny", vocab_size=512, warmup_steps=4)),
    "mlm bf16": (1, "pretrain_mlm.py", TOKEN_KEYS | dict(
        model_size="modernbert-tiny", vocab_size=512, dtype="bf16", gradient_checkpointing=True)),
    "clm": (1, "pretrain_mlm.py", TOKEN_KEYS | dict(
        model_size="qwen3-tiny", vocab_size=512, objective="clm", optimizer="stable_adamw",
        schedule="wsd", decay_ratio=0.5, grad_clip=0.0)),
    "muon": (1, "pretrain_mlm.py", TOKEN_KEYS | dict(
        model_size="llama-tiny", vocab_size=512, objective="clm", optimizer="muon")),
    "mlm, 2 ranks": (2, "pretrain_mlm.py", TOKEN_KEYS | dict(
        model_size="modernbert-tiny", vocab_size=512, warmup_steps=4)),
    "mntp": (1, "train_mntp.py", TOKEN_KEYS | LORA | dict(init_from="llama", mask_token="eos")),
    "contrastive": (1, "train_contrastive.py", PAIR_KEYS | dict(
        init_from="modernbert", device_batch_tokens=200, both_directions=True)),
    "contrastive lora": (1, "train_contrastive.py", PAIR_KEYS | LORA | dict(
        init_from="llama", attention="bidirectional", pooling="last", attn_dropout=0.1,
        device_batch_tokens=300, matryoshka_dims="(64, 16)")),
    "contrastive, 2 ranks": (2, "train_contrastive.py", PAIR_KEYS | dict(
        init_from="modernbert", device_batch_tokens=200, no_duplicates=True)),
    "splade": (1, "train_contrastive.py", PAIR_KEYS | dict(
        init_from="modernbert", pooling="splade", device_batch_tokens=300)),
    "multi-vector": (1, "train_contrastive.py", PAIR_KEYS | dict(
        init_from="modernbert", pooling="tokens", projection_dim=32, device_batch_tokens=300)),
    "reconstruct": (1, "train_reconstruct.py", PAIR_KEYS | dict(
        init_from="llama", suffix="[SEP]", device_batch_size=8)),
    "token retrieval": (1, "train_token_retrieval.py", LORA | dict(
        init_from="llama", data="spans.jsonl", eval_data="spans.jsonl", batch_size=12,
        passage_window=24, window_overlap=8, device_batch_tokens=200, queries_per_passage=3,
        eval_interval=10, warmup_ratio=0.1)),
    "words": (1, "train_classifier.py", dict(
        init_from="modernbert", task="words", data="words.jsonl", eval_data="words.jsonl",
        batch_size=16, device_batch_size=4, freeze_backbone=False, max_length=48,
        learning_rate=1e-3, eval_interval=10)),
    "texts": (1, "train_classifier.py", LORA | dict(
        init_from="llama", task="texts", data="texts.jsonl", eval_data="texts.jsonl",
        batch_size=16, device_batch_size=8, pooling="last", max_length=48, eval_interval=10)),
}  # fmt: skip


def toy_tokenizer(texts):
    """A byte-level BPE that puts [CLS] and [SEP] around a text; they are also its BOS and EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    bpe.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, cls_token="[CLS]", sep_token="[SEP]", bos_token="[CLS]",
        eos_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")  # fmt: skip


def make_data(folder):
    """Token files, JSONL files and two models in `folder`, the same every time."""
    rng, texts = np.random.default_rng(0), []
    for _ in range(300):
        i, n = rng.integers(len(WORDS)), rng.integers(4, 60)
        texts.append(" ".join(WORDS[(i + k * k) % len(WORDS)] for k in range(n)))
    tokenizer = toy_tokenizer(texts)
    vocab_size = max(tokenizer.get_vocab().values()) + 1

    os.makedirs(os.path.join(folder, "tokens"))
    tokenizer.save_pretrained(os.path.join(folder, "tokens", "tokenizer"))
    splits = {}
    for split, part in (("train", texts[:250]), ("val", texts[250:])):
        ids, path = tokenizer(part)["input_ids"], os.path.join(folder, "tokens", split)
        np.concatenate(ids).astype("<u2").tofile(path + ".bin")
        np.cumsum([0, *map(len, ids)]).astype("<i8").tofile(path + ".idx")
        splits[split] = {"docs": len(ids), "tokens": sum(map(len, ids))}
    meta = dict(dtype="uint16", vocab_size=vocab_size, tokenizer="", special_ids=[0, 1, 2, 3],
                mask_id=3, splits=splits, tokenizer_sha256="")  # fmt: skip
    with open(os.path.join(folder, "tokens", "meta.json"), "w") as f:
        json.dump(meta, f)

    def write(name, rows):
        with open(os.path.join(folder, name), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)

    some = list(zip(texts[:100], texts[100:200], texts[200:], strict=True))
    write("pairs.jsonl", [{"query": a[:40], "pos": [b], "neg": [c]} for a, b, c in some])
    spans = []
    for i, (a, b, _) in enumerate(some):
        passage = " ".join(texts[i // 2 * 2 :][:3])  # two lines share a passage
        start = passage.index(" ", i % 7) + 1
        spans.append({"query": f"{a[:20]} {i}", "passage": passage,
                      "spans": [[start, passage.index(" ", start + 9)]]})  # fmt: skip
        del b
    write("spans.jsonl", spans)
    words = [text.split() for text in texts[:100]]
    write("words.jsonl", [{"words": w, "labels": [x[-1] for x in w]} for w in words])
    write("texts.jsonl", [{"text": a, "text_pair": b, "label": a[0]} for a, b, _ in some])

    torch.manual_seed(0)
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, vocab_size=vocab_size)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    llama = transformers.LlamaConfig(
        **shape, **ids, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    modernbert = transformers.ModernBertConfig(
        **shape, **ids, cls_token_id=0, sep_token_id=1, max_position_embeddings=256,
        local_attention=16, global_attn_every_n_layers=2)  # fmt: skip
    both = (("llama", transformers.LlamaForCausalLM(llama)),
            ("modernbert", transformers.ModernBertForMaskedLM(modernbert)))  # fmt: skip
    for name, model in both:
        model.save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))


def record(tree):
    """-> {run: {column of log.csv: {step: number}}}"""
    found, tree = {}, os.path.abspath(tree)
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        for name, (ranks, script, keys) in RUNS.items():
            with open(os.path.join(tree, script)) as f:
                source = f.read()
            usual = dict(max_steps=STEPS, log_interval=1, save_interval=1000, dtype="fp32",
                         out_dir=f"out/{name}")  # fmt: skip
            argv = []
            for key, value in (usual | keys).items():
                if not re.search(rf"^{key}\b", source, re.M):
                    key = OLD[script][key]
                argv.append(f"--{key}={value}")
            launch = [sys.executable]
            if ranks > 1:
                launch += ["-m", "torch.distributed.run", "--standalone"]
                launch += [f"--nproc_per_node={ranks}"]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tree}
            done = subprocess.run(
                [*launch, os.path.join(tree, script), *argv], cwd=folder, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{name}: {' '.join(argv)}\n{done.stdout[-3000:]}")
            with open(os.path.join(folder, "out", name, "log.csv")) as f:
                rows = list(csv.DictReader(f))
            found[name] = {column: {row["step"]: float(row[column]) for row in rows if row[column]}
                           for column in ("loss", "gnorm", "lr", "eval_loss")}  # fmt: skip
            print(f"{name}: {list(found[name]['loss'].values())[-1]!r}", flush=True)
    return found


def compare(a, b):
    """Prints each run's largest relative difference; 1 if any number differs, else 0."""
    differ = sorted(set(a) ^ set(b))
    for name in sorted(set(a) & set(b)):
        columns = []
        for column, values in a[name].items():
            other = b[name][column]
            if values != other:
                gaps = [abs(values.get(s, np.inf) - other.get(s, np.inf)) for s in values | other]
                columns.append(f"{column} by {max(gaps):.1e}")
        differ += [name] * bool(columns)
        steps = len(a[name]["loss"])
        print(f"{name}: {f'{steps} steps equal' if not columns else ', '.join(columns)}")
    print(f"{len(differ)} runs differ" if differ else "all bits are equal")
    return int(bool(differ))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"] and len(sys.argv) in (3, 4):
        tree = sys.argv[3].removeprefix("--tree=") if len(sys.argv) == 4 else ROOT
        losses = record(tree)
        with open(sys.argv[2], "w") as f:
            json.dump(losses, f, indent=1)
    elif sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        both = []
        for path in sys.argv[2:]:
            with open(path) as f:
                both.append(json.load(f))
        sys.exit(compare(*both))
    else:
        raise SystemExit(__doc__)
