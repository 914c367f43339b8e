"""tools/verify.py: it passes on every family, and fails where the code or a folder is broken."""

import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import attention as A
import formats.huggingface as HF
import harness
import model as M
from conftest import ROOT
from embedder import Embedder
from formats import read_json, write_json
from harness import FAMILIES, model_folder
from tokenizer import Template, load_tokenizer
from tools import verify

COMPARED = {"logits equal transformers'", "save -> reload"}  # with transformers


def verdicts(folder):
    """{check: True, False or None}, {check: its figure}"""
    results = list(verify.check(str(folder), torch.device("cpu")))
    return {t: ok for t, ok, _ in results}, {t: figure for t, _, figure in results}


def failures(folder):
    """{check that failed: its figure}"""
    ok, figures = verdicts(folder)
    return {title: figures[title] for title in ok if ok[title] is False}


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_passes(family, folders):
    ok, figures = verdicts(folders[family])
    skipped = {"attention: varlen", "attention: flash_attn", "training ids = encode ids"}
    assert ok == {title: None if title in skipped else True for title in ok}, figures
    causal = family in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "modernbert-decoder")
    assert len(ok) == 11 and ("causal, truly" if causal else "bidirectional, truly") in ok


@pytest.mark.parametrize("whole", [True, False], ids=["for sentence-transformers", "ours alone"])
def test_verify_compares_an_embedders_ids(whole, folders, tmp_path):
    model, tokenizer = HF.from_pretrained(folders["qwen3"]), load_tokenizer(folders["qwen3"])
    model.drop_head()
    prompts = {"query": "find: ", "document": ""}
    embedder = Embedder(model, tokenizer, "last", Template("<< ", " >>"), prompts, max_length=30)
    embedder.save(tmp_path, whole)
    ok, figures = verdicts(tmp_path)
    assert ok["training ids = encode ids"] is True, figures
    settings = read_json(tmp_path, "nanoembed.json")
    settings["template"]["prefix"] = "<<< "
    write_json(settings, tmp_path, "nanoembed.json")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    assert verdicts(tmp_path)[0]["training ids = encode ids"] is False


# ---- sabotage ----
def swap_gate_and_up(real, mlp, x):
    up, gate = mlp.gate_up_proj(x).chunk(2, dim=-1)
    return mlp.down_proj(mlp.act(gate) * up)


WEIGHT = "blocks.1.mlp.down_proj.weight"
# what is broken: (where, what, (real function, its arguments) -> result, what fails of an encoder)
SABOTAGE = {
    "all texts of a row become one": (
        A, "sdpa_packed",
        lambda real, q, k, v, _, *more: real(q, k, v, A.make_seqs([len(q)]), *more),
        COMPARED | {"packed = each text alone", "no text sees another", "attention: sdpa"}),
    "a trace of the row's mean in every output, far below any tolerance": (
        A, "sdpa_packed", lambda real, q, k, v, *more: real(q, k, v, *more) + 1e-6 * v.mean(),
        {"no text sees another"}),
    "a wider window": (
        M.ModelConfig, "window_of",
        lambda real, c, i: (real(c, i)[0] + (real(c, i)[0] > 0), real(c, i)[1]), COMPARED),
    "another theta": (
        M, "rope_frequencies",
        lambda real, rope, *rest: real(rope | {"theta": rope["theta"] * 1.1}, *rest), COMPARED),
    "gate and up swapped": (M.MLP, "forward", swap_gate_and_up, COMPARED),
    "the other direction": (
        A, "sdpa_window", lambda real, q, k, v, causal, w, p: real(
            q, k, v, not causal, (w[0], w[0] if causal else 0), p),
        COMPARED | {"bidirectional, truly", "attention: sdpa"}),
    "long texts forget the window": (
        A, "sdpa_window", lambda real, q, k, v, causal, w, p: real(
            q, k, v, causal, w if q.size(2) <= 256 else (-1, -1), p), {"attention: sdpa"}),
    "saved rows in another order": (
        HF, "write_folder", lambda real, folder, config, state: real(
            folder, config, state | {WEIGHT: state[WEIGHT].flip(0)}), {"save -> reload"}),
    "a key that is not saved": (
        HF, "config_to_hf",
        lambda real, c: {k: v for k, v in real(c).items() if k != "local_attention"},
        {"save -> reload"})}  # fmt: skip


@pytest.mark.parametrize("broken", SABOTAGE)
def test_verify_fails_where_the_code_is_wrong(broken, folders, monkeypatch):
    module, name, replacement, expected = SABOTAGE[broken]
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs: replacement(real, *inputs))
    assert failures(folders["modernbert"]).keys() == expected
    if broken == "the other direction":  # a decoder that looks ahead
        assert "causal, truly" in failures(folders["llama"])
        assert "causal, truly" in failures(folders["mistral"])


# ---- broken folders, and the command ----
@pytest.fixture
def broken(folders, tmp_path):  # a copy of an encoder's folder
    return shutil.copytree(folders["modernbert"], tmp_path / "step12")


def test_verify_fails_on_missing_and_bad_weights(broken, tmp_path):
    state = load_file(broken / "model.safetensors")
    weight = state.pop("model.layers.1.attn.Wo.weight")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    [(title, figure)] = failures(broken).items()
    assert title == "the weights are read" and "is missing" in figure
    state["model.layers.1.attn.Wo.weight"] = weight.index_fill(0, torch.tensor(3), math.nan)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    [(title, figure)] = failures(broken).items()
    assert title == "the weights are read" and "model.layers.1.attn.Wo.weight" in figure
    (tmp_path / "empty").mkdir()
    assert "no config.json" in failures(tmp_path / "empty")["the weights are read"]


def test_verify_fails_on_a_tokenizer_that_does_not_fit(broken):
    good, tokenizer = read_json(broken, "tokenizer.json"), load_tokenizer(str(broken))
    tokenizer.add_tokens([f"<new {i}>" for i in range(400)])
    tokenizer.save_pretrained(broken)
    [(title, figure)] = failures(broken).items()
    assert title == "tokenizer" and "ids up to 711" in figure and "vocab_size is 512" in figure
    # without a decoder tokens are joined by spaces
    write_json(good | {"decoder": None}, broken, "tokenizer.json")
    assert failures(broken).keys() == {"tokenizer"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    assert verdicts(broken)[0]["tokenizer"] is None


def test_verify_fails_on_names_that_transformers_does_not_know(folders, tmp_path, monkeypatch):
    """We write and read them; it would make weights up."""
    monkeypatch.setitem(HF.NAMES["modernbert"], "attn.o_proj", "attn.out")
    model_folder(tmp_path, "modernbert", load_tokenizer(folders["modernbert"]))
    figures = failures(tmp_path)
    assert figures.keys() == COMPARED
    assert all("transformers finds no" in figure for figure in figures.values())
    assert figures["save -> reload"].count("Wo.weight") == 3


def test_command(folders, broken, capsys):
    write_json(read_json(broken, "config.json") | {"vocab_size": 500}, broken, "config.json")
    with pytest.raises(SystemExit) as ended:
        harness.execute([os.path.join(ROOT, "tools", "verify.py"), str(broken)])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "FAIL     the weights are read" in out
    assert "0 passed, 1 failed, 0 skipped" in out and verify.main(folders["qwen3"]) == 0
