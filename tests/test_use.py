"""sample.py and verify.py: against transformers and plain loops, and under sabotage.

    pytest tests/test_use.py

About 20 s on 2 CPU cores, most of it three started scripts.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora
import model as M
import sample
import verify
from conftest import ROOT
from data import load_tokenizer, make_seqs
from embedder import Embedder, Template

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CPU = torch.device("cpu")
SMALL = dict(n_embd=64, n_hidden=96, n_head=4, n_layer=3, vocab_size=512, max_seq_len=256)
KINDS = ["global", "local", "local"]
FAMILIES = {
    "llama": ("llama-tiny", dict(n_kv_head=2)),
    "llama-bidirectional": ("llama-tiny", dict(causal=False, tied=False)),
    "mistral": ("llama-tiny", dict(family="mistral", layer_kinds=["local"] * 3, window=9)),
    "qwen2": ("llama-tiny", dict(family="qwen2", qkv_bias=True)),
    "qwen3": ("qwen3-tiny", {}),
    "modernbert": ("modernbert-tiny", dict(layer_kinds=KINDS, window=6)),
    "modernbert-decoder": ("modernbert-tiny", dict(layer_kinds=KINDS, window=6, causal=True)),
    "modernbert-headless": ("modernbert-tiny", dict(layer_kinds=KINDS, window=6, head="none")),
    "neobert": ("neobert-250m", {}),
}


def make_folder(folder, family, tokenizer):
    """A model folder with random weights, as the training scripts write it."""
    size, changes = FAMILIES[family]
    torch.manual_seed(0)
    net = M.from_scratch(size, **(SMALL | changes))
    with torch.no_grad():
        for p in net.parameters():  # no norm is 1, no bias 0, and logits of a few
            p.add_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.1))
    names = ("pad", "bos", "eos", "cls", "sep", "mask")
    net.config.hf = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in names}
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(toy_tokens, tmp_path_factory):
    """{family: its model folder}"""
    root, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer(f"{toy_tokens}/tokenizer")
    return {name: make_folder(str(root / name), name, tokenizer) for name in FAMILIES}


def loaded(folder):
    return M.from_pretrained(folder).eval(), load_tokenizer(folder)


# ---- filters and sampling ----


def loop_top_k(row, k):
    best = sorted(row, reverse=True)[k - 1]
    return [x if x >= best else -math.inf for x in row]


def loop_top_p(row, p):
    mass = [math.exp(x) for x in row]
    total, kept, reached = sum(mass), set(), 0.0
    for i in sorted(range(len(row)), key=lambda i: -mass[i]):
        if reached >= p:
            break
        kept.add(i)
        reached += mass[i] / total
    return [x if i in kept else -math.inf for i, x in enumerate(row)]


def test_filters_equal_plain_loops():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).double() * 3
    logits[0, 7] = logits[0].max()  # a tie at the top
    for k in (1, 2, 17, 49):
        want = torch.tensor([loop_top_k(row, k) for row in logits.tolist()], dtype=torch.float64)
        assert torch.equal(sample.keep_top_k(logits, k), want)
    for p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        want = torch.tensor([loop_top_p(row, p) for row in logits.tolist()], dtype=torch.float64)
        got = sample.keep_top_p(logits, p)
        assert torch.equal(got[1:], want[1:])
        assert (got > -math.inf).any(-1).all()
        # the smallest set that reaches p: it does, and without its least probable it does not
        for row, kept in zip(logits.softmax(-1), got > -math.inf, strict=True):
            assert row[kept].sum() >= p > row[kept].sum() - row[kept].min()
    # a mass that is reached exactly is enough
    halves = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log()
    assert (sample.keep_top_p(halves, 0.75) > -math.inf).tolist() == [[True, True, False, False]]
    for same in (sample.keep_top_k(logits, 0), sample.keep_top_k(logits, 50),
                 sample.keep_top_k(logits, 99), sample.keep_top_p(logits, 1.0)):  # fmt: skip
        assert torch.equal(same, logits)


def test_draws_have_the_probabilities_that_were_asked_for():
    logits, n = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0]), 6000
    mass = [math.exp(x / 1.5) for x in logits[:4].tolist()]  # top_k = 4 at temperature 1.5
    probs = [x / sum(mass) for x in mass]
    assert probs[0] + probs[1] < 0.75 < sum(probs[:3])  # so top_p = 0.75 leaves three
    want = [x / sum(probs[:3]) for x in probs[:3]] + [0, 0, 0]
    generators = [torch.Generator().manual_seed(0)] * n
    got = sample.draw(logits.expand(n, 6), 1.5, 4, 0.75, generators)
    for i, p in enumerate(want):
        assert abs(got.count(i) / n - p) <= 4.5 * math.sqrt(p * (1 - p) / n), i
    assert sample.draw(logits[None], 0, 0, 1.0, generators[:1]) == [0]


# ---- generation ----


@pytest.mark.parametrize("family", ["llama", "modernbert-decoder", "mistral"])
def test_greedy_generation_equals_transformers(family, folders):
    net, tokenizer = loaded(folders[family])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    prompt = [0, 77, 300, 41, 9]
    ids = torch.tensor([prompt])

    def reference(eos):
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=eos, pad_token_id=2,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    long = reference(None)  # past every local window
    assert len(set(long)) > 5  # not one token for ever
    assert sample.generate(net, prompt, 24, temperature=0) == [long]
    eos = long[10]
    short = reference(eos)
    assert len(short) <= 11 and short[-1] == eos
    assert sample.generate(net, prompt, 24, temperature=0, num_samples=2, eos_ids={eos}) == [
        short, short
    ]  # fmt: skip


def test_a_sample_is_a_function_of_its_seed(folders):
    net, _ = loaded(folders["llama"])
    settings = dict(temperature=1.0, top_k=50, top_p=0.95)
    three = sample.generate(net, [0, 5], 12, **settings, num_samples=3, seed=1)
    assert len({tuple(s) for s in three}) == 3
    for i, one in enumerate(three):
        assert sample.generate(net, [0, 5], 12, **settings, seed=1 + i) == [one]
    # one sample ends early, the others go on as they would
    eos = next(i for i in three[0][:6] if i not in three[1] + three[2])
    ended = sample.generate(net, [0, 5], 12, **settings, num_samples=3, seed=1, eos_ids={eos})
    assert ended == [three[0][: three[0].index(eos) + 1], *three[1:]]


def test_prompts(folders):
    net, tokenizer = loaded(folders["llama"])
    ids, eos_ids = sample.encode_prompt(net, tokenizer, "tan molo")
    plain = tokenizer("tan molo", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.cls_token_id, *plain]  # and no [SEP], which would end the text
    assert eos_ids == {tokenizer.sep_token_id}
    net.config.hf["eos_token_id"] = [7, 8]
    assert sample.encode_prompt(net, tokenizer, "tan")[1] == {tokenizer.sep_token_id, 7, 8}
    with pytest.raises(SystemExit, match="256 positions"):
        sample.encode_prompt(net, tokenizer, "tan " * 300)
    bidirectional, _ = loaded(folders["modernbert"])
    with pytest.raises(SystemExit, match=r"bidirectional.*--text with a \[MASK\]"):
        sample.encode_prompt(bidirectional, tokenizer, "tan")
    for wrong in (dict(temperature=-1), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1)):
        with pytest.raises(SystemExit, match=next(iter(wrong))):
            sample.generate(net, [0], 1, **wrong)


# ---- fills ----


@pytest.mark.parametrize("family", ["modernbert", "llama-bidirectional"])
def test_fills_equal_transformers(family, folders):
    net, tokenizer = loaded(folders[family])
    auto = transformers.AutoModelForMaskedLM
    auto = auto if family == "modernbert" else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(folders[family]).eval()
    texts = ["tan [MASK] mo", "[MASK]", "rilo rima " * 9 + "[MASK] suke[MASK] ta"]
    results = sample.fill(net, tokenizer, texts, 5)
    assert [len(places) for _, places, _, _ in results] == [1, 1, 2]
    for ids, places, p, best in results:
        with torch.no_grad():
            logits = theirs(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=int)
            ).logits[0]
        assert [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id] == places
        want = logits[places].softmax(-1).topk(5)
        assert torch.equal(best, want.indices)
        torch.testing.assert_close(p, want.values, atol=1e-5, rtol=0)


def test_the_mask_takes_the_space_before_it(folders, capsys):
    """As the word does that it stands for: no lone space token, and none lost when filled."""
    net, tokenizer = loaded(folders["modernbert"])
    [(ids, places, _, _)] = sample.fill(net, tokenizer, ["tan [MASK] mo"], 5)
    word, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" lo", " mo"))
    tan = tokenizer("tan", add_special_tokens=False)["input_ids"]
    assert ids == [0, *tan, tokenizer.mask_token_id, *after, 1]
    p = torch.tensor([[0.75, 0.25]])
    best = torch.tensor([[word[0], tokenizer.sep_token_id]])
    sample.print_fill(tokenizer, "tan [MASK] mo", ids, places, p, best)
    out = capsys.readouterr().out
    first = tokenizer.decode(word[:1])
    assert f"75.0% {first!r}" in out and "25.0% '[SEP]'" in out
    assert f"best: tan{first} mo" in out
    assert "no token" in sample.shown(tokenizer, 511)  # the embedding has more rows than words


def test_fill_errors(folders):
    net, tokenizer = loaded(folders["modernbert"])
    with pytest.raises(SystemExit, match=r"no \[MASK\] to fill in the text 'tan mo'"):
        sample.fill(net, tokenizer, ["tan [MASK]", "tan mo"], 5)
    with pytest.raises(SystemExit, match="causal.*--prompt"):
        sample.check_fills(loaded(folders["llama"])[0], tokenizer, {})
    tokenizer.mask_token = None
    with pytest.raises(SystemExit, match="no mask token"):
        sample.check_fills(net, tokenizer, {})
    with pytest.raises(SystemExit, match="no language modelling head"):
        sample.load(folders["modernbert-headless"], CPU, torch.float32)


# ---- which model ----


def test_newest_model(tmp_path):
    for name in ("step500", "ext800", "step90", ".tmp-step2000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step3000").mkdir()  # nothing in it
    assert M.resolve_folder(str(tmp_path)) == str(tmp_path / "ext800")
    assert M.resolve_folder(str(tmp_path / "step90")) == str(tmp_path / "step90")
    with pytest.raises(FileNotFoundError, match="no config.json, and no checkpoint"):
        M.resolve_folder(str(tmp_path / "step3000"))


def test_an_adapter_is_read_with_its_base(folders, tmp_path):
    net, tokenizer = loaded(folders["modernbert"])
    lora.inject(net, 4, 8.0, 0.0, "all")
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    lora.save_adapter(net, str(tmp_path / "step5"), folders["modernbert"])
    tokenizer.save_pretrained(tmp_path / "step5")
    both, _, folder = sample.load(str(tmp_path), CPU, torch.float32)
    assert folder == str(tmp_path / "step5")
    tokens = torch.arange(20)
    with torch.no_grad():
        want = net.eval()(tokens, make_seqs([20]))
        base = loaded(folders["modernbert"])[0](tokens, make_seqs([20]))
        got = both(tokens, make_seqs([20]))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (want - base).abs().max() > 0.1


# ---- verify ----


def verdicts(folder):
    """{check: True, False or None}, {check: its figure}"""
    results = list(verify.check(folder, CPU))
    return {t: ok for t, ok, _ in results}, {t: figure for t, _, figure in results}


def failures(folder):
    return {title for title, ok in verdicts(folder)[0].items() if ok is False}


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_passes(family, folders):
    ok, figures = verdicts(folders[family])
    skipped = {"attention: varlen", "attention: flash_attn", "training ids = encode ids"}
    skipped |= {"logits equal transformers'"} if family == "neobert" else set()
    assert {title for title in ok if ok[title] is None} == skipped
    assert all(ok[title] for title in ok.keys() - skipped), figures
    assert len(ok) == 11
    causal = family in ("llama", "mistral", "qwen2", "qwen3", "modernbert-decoder")
    assert ("causal, truly" if causal else "bidirectional, truly") in ok


@pytest.mark.parametrize("whole", [True, False], ids=["for sentence-transformers", "ours alone"])
def test_verify_compares_an_embedders_ids(whole, folders, tmp_path):
    net, tokenizer, _ = sample.load(folders["qwen3"], CPU, torch.float32)
    net.drop_head()
    prompts = {"query": "find: ", "document": ""}
    embedder = Embedder(net, tokenizer, "last", Template("<< ", " >>"), prompts, max_length=30)
    embedder.save(tmp_path, whole)
    title = "training ids = encode ids"
    assert verdicts(str(tmp_path))[0][title] is True, verdicts(str(tmp_path))[1][title]
    settings = json.loads((tmp_path / "nanoembed.json").read_text())
    settings["template"]["prefix"] = "<<< "
    (tmp_path / "nanoembed.json").write_text(json.dumps(settings))
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    assert verdicts(str(tmp_path))[0][title] is False


def _leak(monkeypatch):
    """All texts of a row become one."""
    real = M.sdpa_packed

    def leaky(q, k, v, lengths, *rest):
        return real(q, k, v, [sum(lengths)], *rest)

    monkeypatch.setattr(M, "sdpa_packed", leaky)


def _leak_a_little(monkeypatch):
    """A trace of the row's mean in every output: far below any tolerance."""
    real = M.sdpa_packed
    monkeypatch.setattr(M, "sdpa_packed", lambda q, k, v, *r: real(q, k, v, *r) + 1e-6 * v.mean())


def _wide_window(monkeypatch):
    real = M.ModelConfig.window_of

    def wider(self, layer):
        left, right = real(self, layer)
        return (left + 1, right) if left > 0 else (left, right)

    monkeypatch.setattr(M.ModelConfig, "window_of", wider)


def _rope_theta(monkeypatch):
    real = M.rope_frequencies

    def other(rope, *rest):
        return real(rope | {"theta": rope["theta"] * 1.1}, *rest)

    monkeypatch.setattr(M, "rope_frequencies", other)


def _swap_gate_and_up(monkeypatch):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)

    monkeypatch.setattr(M.MLP, "forward", forward)


def _other_direction(monkeypatch):
    real = M.sdpa_window

    def other(q, k, v, causal, window, p):
        if not causal:
            return real(q, k, v, True, (window[0], 0), p)
        return real(q, k, v, False, (window[0], window[0]), p)

    monkeypatch.setattr(M, "sdpa_window", other)


def _no_query_blocks_beyond_the_first(monkeypatch):
    """The window of long texts is forgotten: texts of up to 256 tokens do not show it."""
    real = M.sdpa_window

    def other(q, k, v, causal, window, p):
        return real(q, k, v, causal, window if q.size(2) <= 256 else (-1, -1), p)

    monkeypatch.setattr(M, "sdpa_window", other)


def _save_swaps_rows(monkeypatch):
    real = M.write_folder

    def swapped(folder, config, state):
        weight = state["blocks.1.mlp.down_proj.weight"]
        real(folder, config, state | {"blocks.1.mlp.down_proj.weight": weight.flip(0)})

    monkeypatch.setattr(M, "write_folder", swapped)


def _save_forgets_a_key(monkeypatch):
    real = M.config_to_hf

    def forgetful(config):
        return {k: v for k, v in real(config).items() if k != "local_attention"}

    monkeypatch.setattr(M, "config_to_hf", forgetful)


SABOTAGE = {  # what is broken -> which checks of an encoder must fail, and no others
    _leak: {"logits equal transformers'", "packed = each text alone", "no text sees another",
            "attention: sdpa", "save -> reload"},
    _leak_a_little: {"no text sees another"},
    _wide_window: {"logits equal transformers'", "save -> reload"},
    _rope_theta: {"logits equal transformers'", "save -> reload"},
    _swap_gate_and_up: {"logits equal transformers'", "save -> reload"},
    _other_direction: {"logits equal transformers'", "bidirectional, truly", "attention: sdpa",
                       "save -> reload"},
    _no_query_blocks_beyond_the_first: {"attention: sdpa"},
    _save_swaps_rows: {"save -> reload"},
    _save_forgets_a_key: {"save -> reload"},
}  # fmt: skip


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda f: f.__name__)
def test_verify_fails_where_the_code_is_wrong(sabotage, folders, monkeypatch):
    sabotage(monkeypatch)
    assert failures(folders["modernbert"]) == SABOTAGE[sabotage]


def test_verify_sees_a_decoder_that_looks_ahead(folders, monkeypatch):
    _other_direction(monkeypatch)
    assert "causal, truly" in failures(folders["llama"])
    assert "causal, truly" in failures(folders["mistral"])


def copy_of(folder, to):
    """A copy of a model folder, to be broken."""
    to.mkdir()
    for name in os.listdir(folder):
        (to / name).write_bytes(open(os.path.join(folder, name), "rb").read())
    return to


def test_verify_fails_on_broken_folders(folders, toy_tokens, tmp_path, monkeypatch):
    good = folders["modernbert"]
    # no model at all
    (tmp_path / "empty").mkdir()
    [(_, ok, figure)] = verify.check(str(tmp_path / "empty"), CPU)
    assert ok is False and "no config.json" in figure

    # a tensor is missing
    broken = copy_of(good, tmp_path / "missing")
    state = load_file(broken / "model.safetensors")
    gone = state.pop("model.layers.1.attn.Wo.weight")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    ok, figures = verdicts(str(broken))
    assert ok == {"the weights are read": False}
    assert "is missing" in figures["the weights are read"]

    # a NaN
    broken = copy_of(good, tmp_path / "nan")
    state["model.layers.1.attn.Wo.weight"] = gone.index_fill(0, torch.tensor(3), math.nan)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert {"logits equal transformers'", "no text sees another"} <= failures(str(broken))

    # the tokenizer of another model
    broken = copy_of(good, tmp_path / "vocabulary")
    tokenizer = load_tokenizer(good)
    tokenizer.add_tokens([f"<new {i}>" for i in range(400)])
    tokenizer.save_pretrained(broken)
    ok, figures = verdicts(str(broken))
    assert {t for t in ok if ok[t] is False} == {"tokenizer"}
    assert "ids up to 711" in figures["tokenizer"] and "vocab_size is 512" in figures["tokenizer"]

    # a tokenizer that loses spaces, and none at all
    broken = copy_of(good, tmp_path / "spaces")
    spec = json.loads((broken / "tokenizer.json").read_text())
    spec["decoder"] = None  # tokens are joined by spaces
    (broken / "tokenizer.json").write_text(json.dumps(spec))
    assert failures(str(broken)) == {"tokenizer"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    assert verdicts(str(broken))[0]["tokenizer"] is None

    # names that we write and read, and transformers does not know: it would make weights up
    names = dict(M.NAMES["modernbert"], **{"attn.o_proj": "attn.out"})
    monkeypatch.setitem(M.NAMES, "modernbert", names)
    make_folder(str(tmp_path / "names"), "modernbert", load_tokenizer(good))
    ok, figures = verdicts(str(tmp_path / "names"))
    bad = {"logits equal transformers'", "save -> reload"}
    assert {t for t in ok if ok[t] is False} == bad
    assert all("transformers finds no" in figures[t] for t in bad)
    assert figures["save -> reload"].count("Wo.weight") == 3


# ---- the scripts as users start them ----


def start(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True
    )


def test_scripts(folders, tmp_path):
    copy_of(folders["modernbert"], tmp_path / "step12")
    run = start("sample.py", f"--model={tmp_path}", "--text=-", stdin="tan [MASK]\nmo [MASK] ri\n")
    assert run.returncode == 0, run.stderr
    assert "step12: modernbert, bidirectional, 0." in run.stdout
    assert run.stdout.count("%") == 10 and "mask 2:" in run.stdout and "best: tan" in run.stdout

    run = start("sample.py", f"--model={folders['llama']}", "--prompt=tan molo", "--num_samples=2",
                "--max_new_tokens=7")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "--- sample 2: " in run.stdout and run.stdout.count("\ntan molo") == 2

    config = tmp_path / "step12" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 500'))
    run = start("verify.py", str(tmp_path / "step12"))
    assert run.returncode == 1 and "FAIL     the weights are read" in run.stdout, run.stdout
    assert "0 passed, 1 failed, 0 skipped" in run.stdout
    assert verify.main(folders["qwen3"]) == 0
