"""LLM2Vec's published checkpoints, as folders that its scripts leave, against LLM2Vec itself:
llm2vec_vectors.json is what llm2vec 0.2.3 gives for them, see llm2vec_reference.py."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel
from transformers import PreTrainedTokenizerFast as Fast

WORDS = "the old cat sat on a mat and the dog ran to an old house where it found a query in a book"
ASK = "Given a web search query, retrieve relevant passages that answer the query:"
PAIRS = [[ASK, "old cat"], [f" {ASK} ", "where it ran "], [ASK, f"{WORDS} " * 9], ["", "the dog\n"],
         [ASK, "query"]]  # fmt: skip
TEXTS = ["the old cat", " where  it ran ", f"{WORDS}. " * 9, "1234 words, (a_book)."]
# name: class, base, tokenizer
MODELS = {
    "Sheared-LLaMA": ("Llama", "princeton-nlp/Sheared-LLaMA-1.3B", "metaspace"),
    "Mistral-7B-Instruct-v2": ("Mistral", "mistralai/Mistral-7B-Instruct-v0.2", "metaspace"),
    "Meta-Llama-3-8B-Instruct": ("Llama", "meta-llama/Meta-Llama-3-8B-Instruct", "bytes"),
}
CLASSES = {"Llama": (LlamaConfig, LlamaModel), "Mistral": (MistralConfig, MistralModel)}
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def make_tokenizer(kind):
    """Llama-2's kind or Llama-3's, small, with a BOS; the training is the same every time."""
    special = ["<s>", "</s>", *(HEADERS if kind == "bytes" else [])]
    bpe = Tokenizer(models.BPE(byte_fallback=kind != "bytes"))
    if kind == "bytes":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        special, alphabet = [*special, *(f"<0x{i:02X}>" for i in range(256))], []
    bpe.train_from_iterator([*f"{WORDS} {ASK} [INST] [/INST]".split()] * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False))  # fmt: skip
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return Fast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def fill(model, seed):
    """Weights that depend on the seed alone, not on torch's version."""
    rng = np.random.default_rng(seed)
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad:
            x = rng.normal(1.0 if "norm" in name else 0.0, 0.25, p.shape)
            p.data = torch.tensor(x, dtype=torch.float32)
    return model


def write_base(folder, family, tokenizer):
    config, kind = CLASSES[family]
    config = config(vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                    bos_token_id=0, eos_token_id=1)  # fmt: skip
    config.sliding_window = None
    fill(kind(config), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return kind


def write_adapter(folder, base, name, kind, seed, class_name):
    """As peft writes it of an inner model that was loaded as `name`; the class is LLM2Vec's own,
    which is not installed."""
    bidirectional = type(class_name, (kind,), {})
    model = bidirectional.from_pretrained(base)
    model.name_or_path = model.config._name_or_path = name
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    fill(peft, seed).save_pretrained(folder, save_embedding_layers=False)


def write_hub(root):
    """Bases, and for each the repositories -mntp, -mntp-unsup-simcse, -mntp-supervised."""
    bases = {}
    for name, (family, base, kind) in MODELS.items():
        tokenizer, bases[base] = make_tokenizer(kind), base.split("/")[1]
        cls = write_base(root / bases[base], family, tokenizer)
        for seed, stage in enumerate(("mntp", "mntp-unsup-simcse", "mntp-supervised"), 1):
            folder = root / f"LLM2Vec-{name}-{stage}"
            write_adapter(folder, root / bases[base], base, cls, seed, f"{family}BiModel")
            if stage == "mntp":  # run_mntp.py: adapter, tokenizer; uploaded with a config.json
                mask = make_tokenizer(kind)
                mask.mask_token = "_"
                mask.save_pretrained(folder)
                config = json.loads((root / bases[base] / "config.json").read_text())
                config["_name_or_path"] = base
                (folder / "config.json").write_text(json.dumps(config))
            else:  # LLM2Vec.save
                tokenizer.save_pretrained(folder)
                settings = dict(pooling_mode="mean", max_length=512, doc_max_length=60,
                                skip_instruction=True)  # fmt: skip
                (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    inputs = dict(names=list(MODELS), bases=bases, pairs=PAIRS, texts=TEXTS)
    (root / "inputs.json").write_text(json.dumps(inputs))


if __name__ == "__main__":
    write_hub(Path(sys.argv[1]))
    raise SystemExit

import formats.huggingface  # noqa: E402
from embedder import Embedder  # noqa: E402
from formats import llm2vec  # noqa: E402
from formats.peft import pinned_chain  # noqa: E402
from harness import ROOT, raises  # noqa: E402
from tokenizer import TEMPLATES, Template  # noqa: E402

with open(f"{ROOT}/tests/llm2vec_vectors.json", encoding="utf-8") as f:
    WANTED = json.load(f)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


@pytest.fixture(autouse=True)
def hub(root, monkeypatch):
    def download(repo, *_):
        folder = root / repo.split("/")[1]
        if not folder.exists():
            raise OSError(f"there is no {repo}")
        return str(folder)

    monkeypatch.setattr(formats.huggingface, "snapshot", download)


def load(name, *adapters, **settings):
    usual = dict(device="cpu", dtype="fp32", normalize=False)  # theirs does not normalize
    return Embedder.load(str(name), adapters, **usual | settings)


def assert_equal(embedder, key):
    for kind, texts in (("pairs", PAIRS), ("texts", TEXTS)):
        want = np.array(WANTED[f"{key} {kind}"])
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(embedder.encode(texts), want, atol=5e-5)


@pytest.mark.parametrize("name", MODELS)
def test_published_equals_llm2vec(name):
    repo = f"McGill-NLP/LLM2Vec-{name}"
    assert_equal(load(f"{repo}-mntp"), f"{name}-mntp")
    ours = load(f"{repo}-mntp-supervised")
    assert_equal(ours, f"{name}-mntp-supervised")
    assert_equal(load(f"{repo}-supervised@main"), f"{name}-mntp-supervised")  # a shorter spelling
    chain = [MODELS[name][1], f"{repo}-mntp", f"{repo}-unsup-simcse"]
    assert pinned_chain(chain[-1]) == chain
    assert ours.instructions["FEVERHardNegatives"].startswith("Given a claim")
    # the adapter beside the weights, which is what their quick start has
    apart = load(f"{repo}-mntp-supervised", merge=False)
    assert any(".lora_A" in name for name, _ in apart.named_parameters())
    assert_equal(apart, f"{name}-mntp-supervised")


def test_every_spelling_is_in_the_table():
    names = "Sheared-LLaMA Llama-2-7b-chat-hf Mistral-7B-Instruct-v2 Meta-Llama-3-8B-Instruct"
    for name in [*names.split(), "Meta-Llama-31-8B-Instruct"]:
        for stage in ("mntp", "unsup-simcse", "mntp-unsup-simcse", "supervised", "mntp-supervised"):
            right, base, before, _ = llm2vec.published(f"McGill-NLP/LLM2Vec-{name}-{stage}@v1")
            kind = stage.removeprefix("mntp").removeprefix("-")
            assert right == f"McGill-NLP/LLM2Vec-{name}-mntp" + f"-{kind}" * bool(kind)
            merged = [] if stage == "mntp" else [f"McGill-NLP/LLM2Vec-{name}-mntp"]
            assert before == merged and base.count("/") == 1
    wraps = {base: wrap for _, base, wrap in llm2vec.BASES}
    assert wraps["meta-llama/Meta-Llama-3.1-8B-Instruct"] == "none"
    assert llm2vec.published("someone/LLM2Vec-Sheared-LLaMA-mntp") is None


def test_copies(root, tmp_path):
    """By the repositories' names; under other names, where the files say enough, and where not."""
    for stage in ("mntp", "mntp-supervised"):
        name = f"LLM2Vec-Sheared-LLaMA-{stage}"
        shutil.copytree(root / name, tmp_path / name)
        shutil.copytree(root / name, tmp_path / stage)
    named = tmp_path / "LLM2Vec-Sheared-LLaMA-mntp-supervised"
    assert_equal(load(named), "Sheared-LLaMA-mntp-supervised")
    assert pinned_chain(str(named))[1] == str(tmp_path / "LLM2Vec-Sheared-LLaMA-mntp")
    cache = tmp_path / "models--McGill-NLP--LLM2Vec-Sheared-LLaMA-mntp-supervised/snapshots/1a2b"
    shutil.copytree(named, cache)
    assert_equal(load(cache), "Sheared-LLaMA-mntp-supervised")

    first, second = tmp_path / "mntp", tmp_path / "mntp-supervised"
    assert_equal(load(first), "Sheared-LLaMA-mntp")
    assert_equal(load(first, str(second)), "Sheared-LLaMA-mntp-supervised")
    raises(ValueError, r"princeton-nlp/Sheared-LLaMA-1.3B alone.*adapters=\['.*mntp-superv",
           load, second)  # fmt: skip


def test_settings_are_honoured(root, tmp_path):
    """llm2vec_config.json of a model that was merged before it was saved."""
    folder = tmp_path / "merged"
    shutil.copytree(root / "Mistral-7B-Instruct-v0.2", folder)
    config = json.loads((folder / "config.json").read_text())
    base = MODELS["Mistral-7B-Instruct-v2"][1]
    config |= {"architectures": ["MistralBiModel"], "_name_or_path": base}
    (folder / "config.json").write_text(json.dumps(config))
    for mode, pooling, suffix in (
        ("weighted_mean", "weighted_mean", " [/INST]"), ("last_token", "last", " [/INST]"),
        ("eos_token", "last", " [/INST] </s>"), ("bos_token", "cls", " [/INST]"),
    ):  # fmt: skip
        settings = dict(pooling_mode=mode, max_length=90, doc_max_length=30, skip_instruction=True)
        (folder / "llm2vec_config.json").write_text(json.dumps(settings))
        ours = load(folder)
        assert not ours.model.config.causal
        assert (ours.pooling, ours.max_length, ours.doc_max_length) == (pooling, 90, 30)
        assert ours.template == Template("[INST] ", suffix, " ")
        [(ids, (start, _))] = ours.tokenize(["old cat"], ASK)
        assert ids[0] == 0 and (start == 0) == (mode in ("bos_token", "last_token", "eos_token"))
        # saved as ours, it is the same
        ours.save(tmp_path / "ours", sentence_transformers=False)
        again = load(tmp_path / "ours")
        assert again.tokenize(TEXTS, ASK) == ours.tokenize(TEXTS, ASK)
        np.testing.assert_array_equal(again.encode(PAIRS), ours.encode(PAIRS))
        assert again.instructions == ours.instructions and again.instructions
    (long,) = ours.tokenize(["cat" * 200])  # a word that is longer than the limit is cut
    assert 20 < len(long[0]) < 60


def test_attention_that_nobody_says(root, tmp_path):
    base, folder = str(root / "Sheared-LLaMA-1.3B"), str(tmp_path / "adapter")
    write_adapter(folder, base, base, LlamaModel, 5, "LlamaModel")
    raises(ValueError, "adapter: nothing says .*attention='causal' or", load, folder)
    vectors = [load(folder, attention=x).encode(TEXTS) for x in ("causal", "bidirectional")]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    np.testing.assert_array_equal(load(folder).encode(TEXTS), vectors[0])
    path.write_text(json.dumps(config | {"auto_mapping": {"base_model_class": "LlamaBiModel"}}))
    assert not load(folder).model.config.causal


def test_separator():
    task, marks = "Given a claim, find it", Template("<", ">", "; ")
    assert {marks.head(task + end) for end in ("", ":", "; ", ";")} == {f"<{task}; "}
    assert marks.head("") == "<" and TEMPLATES["none"].head(f" {task}: ") == f" {task}: "
