"""README and docs: every command names keys, files and options that exist; hack.md's diffs apply
and train; first_hour.md runs from its data to sentence-transformers, on a tiny model."""

import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from glob import glob

import numpy as np
import pytest
import torch

import common
from attention import make_seqs
from harness import ROOT, WORDS, execute, losses, model_folder, write_jsonl
from tokenizer import load_tokenizer

PAGES = ["README.md", *sorted(os.path.relpath(p, ROOT) for p in glob(f"{ROOT}/docs/*.md"))]
STEPS = "--num_epochs=None --max_steps=3 --batch_size=8 --log_interval=1".split()


def blocks(page, kind=""):
    """The texts between ```kind and ``` of a page."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as f:
        found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", f.read())
    return [text for name, text in found if name == kind]


def commands(text):
    """[[script, argument, ..], ..] of the lines that run a script of ours, under python or
    torchrun; `-m tools.bench` is tools/bench.py."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if not part.strip().startswith(("python", "torchrun")):
                continue
            words = shlex.split(part, comments=True)
            if words and words[0] == "torchrun":
                words = ["python", *(w for w in words[1:] if not w.startswith(("--st", "--np")))]
            others = words[1:3] == ["-m", "venv"] or words[1].startswith("llama.cpp/")
            if words[0] != "python" or others:
                continue
            if words[1] == "-m":
                words[1:3] = [words[2].replace(".", "/") + ".py"]
            found.append(words[1:])
    return found


def printed(page):
    """The commands of a page's blocks, and of README's table, whose cells go without python."""
    cells = []
    if page == "README.md":
        with open(os.path.join(ROOT, page), encoding="utf-8") as f:
            cells = re.findall(r"(?<=[|;]) `(-m [^`]+|[\w/]+\.py [^`]+)`(?= \||;)", f.read())
    return commands("\n".join([*blocks(page), *(f"python {cell}" for cell in cells)]))


def configurable(path):
    with open(path, encoding="utf-8") as f:
        return "configure(globals())" in f.read()


def keys_of(path):
    """A script's globals as far as its keys: what `common.configure` reads."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    space = {"__file__": path, "__doc__": ""}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            try:
                exec(compile(ast.Module([node], []), path, "exec"), space)
            except NameError:
                pass  # a constant that is made of what the script imports
    return space


SCRIPTS = sorted({argv[0] for page in PAGES for argv in printed(page)} - {"data/faq/prepare.py"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_each_script_that_is_named(script):
    path = os.path.join(ROOT, script)
    if configurable(path):
        module = script.removesuffix(".py").replace("/", ".")
        run = [sys.executable, "-X", "importtime", "-m", module, "--help"]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "| usage" in done.stderr and "torch" not in done.stderr  # which takes seconds
        assert len(done.stdout) > 200 and max(map(len, done.stdout.splitlines())) <= 80
        return
    with pytest.raises(SystemExit) as end, redirect_stdout(io.StringIO()) as out:
        execute([path, "--help"])
    assert end.value.code == 0 and len(out.getvalue()) > 200


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/hack.md"])
def test_commands_name_keys_and_files_that_are_there(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = printed(page)
    assert found or page == "docs/bench.md"
    for script, *arguments in found:
        assert os.path.exists(script), (page, script)
        if configurable(script):
            arguments = [a for a in arguments if a not in ("--help", "my/config.py")]
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            with redirect_stdout(io.StringIO()):
                common.configure(keys_of(script))
        else:  # argparse
            with open(script, encoding="utf-8") as f:
                source = f.read()
            for option in (a.partition("=")[0] for a in arguments if a.startswith("--")):
                assert f'"{option}"' in source or option == "--help", (page, script, option)


def test_pages_are_found_and_short():
    assert os.path.getsize(os.path.join(ROOT, "README.md")) <= 12_000
    for page in PAGES:
        with open(os.path.join(ROOT, page), encoding="utf-8") as f:
            links = re.findall(r"\]\(([^):#]+)[^)]*\)", f.read())
        for link in links:
            there = os.path.join(ROOT, os.path.dirname(page), link)
            assert os.path.exists(there), (page, link)


# ---- commands that run, in a copy of the tree ----
@contextmanager
def project_in(folder):
    """In this block `folder` is the current one, and the project's modules are imported from it."""
    not_ours = (os.path.join(ROOT, "tests"), sys.prefix)  # .venv may lie in the project
    ours = {n: m for n, m in sys.modules.items() if (getattr(m, "__file__", "") or "").startswith(
        ROOT + os.sep) and not m.__file__.startswith(not_ours)}  # fmt: skip
    old, path = os.getcwd(), list(sys.path)
    for name in ours:
        del sys.modules[name]
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in path if os.path.abspath(p) != ROOT)]
    try:
        yield
    finally:
        os.chdir(old)
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", "") or "").startswith(str(folder) + os.sep):
                del sys.modules[name]
        sys.modules.update(ours)


def execute_here(argv):
    with redirect_stdout(io.StringIO()) as out:
        execute([os.path.join(os.getcwd(), argv[0]), *argv[1:]])
    return out.getvalue()


def pairs(n):
    rng = np.random.default_rng(n)
    for _ in range(n):
        words = rng.choice(WORDS, 12).tolist()
        yield {"query": " ".join(words[:3]), "pos": [" ".join(words)]}


@pytest.fixture
def tree(tmp_path, toy_tokens):
    """A copy of the project with what the pages' commands start from, all of it tiny."""
    for path in glob("*.py", root_dir=ROOT):
        shutil.copy(os.path.join(ROOT, path), tmp_path)
    for name in ("configs", "formats", "evals", "tools"):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name)
    for name in ("data/pydocs", "my"):
        write_jsonl(tmp_path / name / "train.jsonl", pairs(40))
        write_jsonl(tmp_path / name / "val.jsonl", pairs(9))
    tokenizer = load_tokenizer(f"{toy_tokens}/tokenizer")
    model_folder(tmp_path / "out" / "mlm_pydocs_tiny", "modernbert", tokenizer)
    model_folder(tmp_path / "models" / "SmolLM2-135M-Instruct", "llama", tokenizer)
    return tmp_path


def ernie(folder, tokenizer):
    """ERNIE 4.5 as transformers saves it."""
    from transformers import Ernie4_5Config, Ernie4_5Model

    torch.manual_seed(0)
    model = Ernie4_5Model(Ernie4_5Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, use_bias=True,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


CHANGES = ["A new loss", "A new pooling", "A Llama-like architecture", "A new data set",
           "A new schedule"]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_of_hack_md_applies_and_trains(change, tree, toy_tokens):
    with open(os.path.join(ROOT, "docs", "hack.md"), encoding="utf-8") as f:
        section = re.search(rf"(?ms)^## {change}$(.*?)(?=^## |\Z)", f.read())[1]
    (_, diff), (_, command) = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", section)
    changed = re.findall(r"(?m)^[+-](?!\+\+ |-- ).*$", diff)
    assert 0 < len(changed) <= 10
    plain = "train_contrastive.py configs/contrastive_pydocs_tiny.py --out_dir=out/plain".split()
    with project_in(tree):
        execute_here([*plain, *STEPS])
        subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True)
    with open(tree / "faq.tsv", "w") as f:
        rows = [f"{pair['query']}\t{pair['pos'][0]}\n" for pair in pairs(99)]
        f.writelines(["question\tanswer\n", *rows])
    reference = ernie(tree / "baidu/ERNIE-4.5-0.3B-PT", load_tokenizer(f"{toy_tokens}/tokenizer"))
    with project_in(tree):
        for argv in commands(command):
            is_training = argv[0].startswith("train_")
            execute_here([*argv, *(STEPS if is_training else [])])
        found = losses(next(a for a in argv if "out_dir" in a).partition("=")[2])
        assert list(found) == [1, 2, 3] and np.isfinite(list(found.values())).all()
        assert found != losses("out/plain")  # the change acts
        if change == "A Llama-like architecture":
            from formats.huggingface import from_pretrained

            ids = torch.arange(5, 40)
            with torch.no_grad():
                want = reference(ids[None]).last_hidden_state[0]
                model = from_pretrained("baidu/ERNIE-4.5-0.3B-PT").eval()
                torch.testing.assert_close(model(ids, make_seqs([35])), want, atol=1e-4, rtol=1e-4)


def test_first_hour_runs_as_printed(tree):
    page = "docs/first_hour.md"
    python = blocks(page, "python")
    config, uses = python[0], python[1:]
    lines = blocks(page, "json")[0].splitlines()
    (tree / "my" / "config.py").write_text(config)
    (tree / "my" / "texts.txt").write_text("\n".join(WORDS))
    with open(tree / "my" / "train.jsonl", "a") as f:
        f.writelines(line + "\n" for line in lines)
    with project_in(tree):
        for argv in commands("\n".join(blocks(page))):
            if argv[0].startswith("data/"):
                continue  # the network
            tiny = [*STEPS, "--dtype=fp32"] if argv[0].startswith("train_") else []
            try:
                said = execute_here([*argv, *tiny])
            except SystemExit as end:
                assert not end.code and "--show_batch=True" in argv, argv
                continue
            if "--dry_run=True" in argv:
                assert "peak memory" in said
            elif tiny:  # what the end says is the code that loads what was saved
                lines = said.partition("to use it:\n")[2].splitlines()
                assert len(lines) == 2
                with redirect_stdout(io.StringIO()):
                    exec("\n".join(lines), {})
        space = {}
        with redirect_stdout(io.StringIO()):
            for code in uses:
                exec(compile(code, page, "exec"), space)
        assert os.path.exists("out/after/results.md") and len(losses("out/mine")) == 3
    np.testing.assert_allclose(space["vectors"], space["queries"], atol=1e-5)
