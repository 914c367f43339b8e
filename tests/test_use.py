"""sample.py: against transformers and plain loops."""

import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import lora
import sample
from attention import make_seqs
from embedder import Embedder
from formats.huggingface import from_pretrained, resolve_folder
from harness import ROOT, execute, raises, write_jsonl
from tokenizer import load_tokenizer

SCRIPT = f"{ROOT}/sample.py"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def loaded(folder):
    return from_pretrained(folder).eval(), load_tokenizer(folder)


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
        assert torch.equal(got[1:], want[1:]) and (got > -math.inf).any(-1).all()
        # the smallest set that reaches p: it does, and without its least probable it does not
        for row, kept in zip(logits.softmax(-1), got > -math.inf):
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


@pytest.mark.parametrize("family", ["llama", "modernbert-decoder", "mistral"])
def test_greedy_generation_equals_transformers(family, folders):
    net, tokenizer = loaded(folders[family])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    prompt = [0, 77, 300, 41, 9]
    ids = torch.tensor([prompt])

    def reference(eos):
        options = dict(max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=2)
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[0, len(prompt) :].tolist()

    long = reference(None)  # past every local window
    assert len(set(long)) > 5  # not one token for ever
    assert sample.generate(net, prompt, 24, temperature=0) == [long]
    eos = long[10]
    short = reference(eos)
    assert len(short) <= 11 and short[-1] == eos
    ended = sample.generate(net, prompt, 24, temperature=0, num_samples=2, eos_ids={eos})
    assert ended == [short, short]


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
    raises(SystemExit, "300 tokens, the model 256 positions", sample.generate, net, [5] * 300, 1)
    assert len(sample.generate(net, [5] * 250, 9)[0]) == 6
    bidirectional, _ = loaded(folders["modernbert"])
    with pytest.raises(SystemExit, match=r"bidirectional.*--text with a \[MASK\]"):
        sample.encode_prompt(bidirectional, tokenizer, "tan")
    for wrong in (dict(temperature=-1), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1)):
        raises(SystemExit, next(iter(wrong)), sample.generate, net, [0], 1, **wrong)


@pytest.mark.parametrize("family", ["modernbert", "llama-bidirectional"])
def test_fills_equal_transformers(family, folders):
    net, tokenizer = loaded(folders[family])
    auto = "AutoModelForMaskedLM" if family == "modernbert" else "AutoModelForCausalLM"
    theirs = getattr(transformers, auto).from_pretrained(folders[family]).eval()
    texts = ["tan [MASK] mo", "[MASK]", "rilo rima " * 9 + "[MASK] suke[MASK] ta"]
    results = sample.fill(net, tokenizer, texts, 5, {})
    assert [len(places) for _, places, _, _ in results] == [1, 1, 2]
    for ids, places, p, best in results:
        with torch.no_grad():
            mask = torch.ones(1, len(ids), dtype=int)
            logits = theirs(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0]
        assert [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id] == places
        want = logits[places].softmax(-1).topk(5)
        assert torch.equal(best, want.indices)
        torch.testing.assert_close(p, want.values, atol=1e-5, rtol=0)


def test_the_mask_takes_the_space_before_it(folders, capsys):
    """As the word does that it stands for: no lone space token, and none lost when filled."""
    net, tokenizer = loaded(folders["modernbert"])
    [(ids, places, _, _)] = sample.fill(net, tokenizer, ["tan [MASK] mo"], 5, {})
    word, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" lo", " mo"))
    tan = tokenizer("tan", add_special_tokens=False)["input_ids"]
    assert ids == [0, *tan, tokenizer.mask_token_id, *after, 1]
    p, best = torch.tensor([[0.75, 0.25]]), torch.tensor([[word[0], tokenizer.sep_token_id]])
    sample.print_fill(tokenizer, "tan [MASK] mo", ids, places, p, best)
    out, first = capsys.readouterr().out, tokenizer.decode(word[:1])
    assert f"75.0% {first!r}" in out and "25.0% '[SEP]'" in out and f"best: tan{first} mo" in out
    assert "no token" in sample.shown(tokenizer, 511)  # the embedding has more rows than words


def test_fill_errors(folders):
    net, tokenizer = loaded(folders["modernbert"])
    with pytest.raises(SystemExit, match=r"no \[MASK\] to fill in the text 'tan mo'"):
        sample.fill(net, tokenizer, ["tan [MASK]", "tan mo"], 5, {})
    with pytest.raises(SystemExit, match="causal.*--prompt"):
        sample.fill(loaded(folders["llama"])[0], tokenizer, ["[MASK]"], 5, {})
    tokenizer.mask_token = None
    raises(SystemExit, "no mask token", sample.fill, net, tokenizer, ["[MASK]"], 5, {})
    raises(SystemExit, "no language modelling head", sample.load, folders["modernbert-headless"])


def test_newest_model(tmp_path):
    for name in ("step500", "ext800", "step90", ".tmp-step2000"):
        write_jsonl(tmp_path / name / "config.json", [{}])
    (tmp_path / "step3000").mkdir()  # nothing in it
    assert resolve_folder(str(tmp_path)) == str(tmp_path / "ext800")
    with pytest.raises(FileNotFoundError, match="no config.json, and no checkpoint"):
        resolve_folder(str(tmp_path / "step3000"))


def test_an_adapter_is_read_with_its_base(folders, tmp_path):
    base = folders["modernbert"]
    net, tokenizer = loaded(base)
    lora.inject(net, 4, 8.0, 0.0, "all")
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    folder = str(tmp_path / "step5")
    lora.save_adapter(net, folder, base)
    tokenizer.save_pretrained(folder)
    both, _, found = sample.load(str(tmp_path))
    assert found == folder
    with torch.no_grad():
        models = (net.eval(), both, loaded(base)[0])
        want, got, base = (model(torch.arange(20), make_seqs([20])) for model in models)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (want - base).abs().max() > 0.1


def test_scripts(folders, tmp_path):
    shutil.copytree(folders["modernbert"], tmp_path / "step12")
    llama = f"--model={folders['llama']}"
    uses = ((f"--model={tmp_path}", "--text=-"),
            (llama, "--prompt=tan molo", "--num_samples=2", "--max_new_tokens=7"))  # fmt: skip
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen([sys.executable, SCRIPT, *use], cwd=ROOT, text=True, **pipes)
            for use in uses]  # fmt: skip
    (out, error), (out2, error2) = (x.communicate("tan [MASK]\nmo [MASK] ri\n") for x in both)
    assert [x.returncode for x in both] == [0, 0], error + error2
    assert "step12: modernbert, bidirectional, 0." in out
    assert out.count("%") == 10 and "mask 2:" in out and "best: tan" in out
    assert "--- sample 2: " in out2 and out2.count("\ntan molo") == 2


def test_a_file_of_lines_is_filled_line_by_line(folders, tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_text("tan [MASK] mo\n\n  rima [MASK]\n")
    execute([SCRIPT, f"--model={folders['modernbert']}", f"--file={path}", "--num_fills=2"])
    out = capsys.readouterr().out
    assert "\ntan [MASK] mo\n" in out and "\nrima [MASK]\n" in out and out.count("best:") == 2


@pytest.mark.parametrize("uses", [
    [], ["--text=a", "--file=b"], ["--prompt=a", "--file=b"], ["--rank=a", "--compress=b"],
    ["--reconstruct=a", "--rank=b", "--file=c"]])  # fmt: skip
def test_one_use_at_a_time(uses):
    with pytest.raises(SystemExit, match="give --model=... and one of --text="):
        execute([SCRIPT, "--model=no/such", *uses])


@pytest.mark.parametrize("kind", ["lines", "pairs"])
def test_rank_is_the_order_by_cosine(kind, folders, tmp_path, capsys):
    model, texts = folders["llama"], ["tan molo", "kes", "suke rima mo", "ris"]
    file = "--file=" + str(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("\n".join(texts))
    if kind == "pairs":
        pairs = [{"query": f"q {text}", "pos": [text, "no"]} for text in texts]
        file = f"--rank_pairs={write_jsonl(tmp_path / 'x.jsonl', pairs)}"
    execute([SCRIPT, f"--model={model}", "--rank=tan kes", file, "--num_ranked=3"])
    vectors = Embedder.load(model, dtype="fp32").encode(["tan kes", *texts])
    scores = vectors[1:] @ vectors[0]
    printed = re.findall(r"(?m)^\d\. (\S+)  (.*)\n(?: {10}(.*)\n)?", capsys.readouterr().out)
    want = [texts[i] for i in np.argsort(-scores)[:3]]
    assert [row[0] for row in printed] == [f"{x:.3f}" for x in sorted(scores, reverse=True)[:3]]
    assert [row[1].removeprefix("q ") for row in printed] == want
    assert [row[2] for row in printed] == (want if kind == "pairs" else [""] * 3)

