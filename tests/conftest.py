"""pytest from the project root: `python -m pytest`, or `python -m pytest --slow` for all of it."""

import os
import sys

import pytest

# Test models are tiny: one thread is as fast as two there, and ranks do not fight for the cores.
# Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def hide(patch):
    import torch

    patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start
    patch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session", autouse=True)
def hide_cuda():
    """Tests compare bits and start more ranks than there are GPUs: on the CPU, even where CUDA is,
    but for those that are marked with pytest.mark.cuda."""
    with pytest.MonkeyPatch.context() as patch:
        hide(patch)
        yield patch


@pytest.fixture(autouse=True)
def show_cuda(request, hide_cuda):
    marked = request.node.get_closest_marker("cuda")
    if marked:
        hide_cuda.undo()
    yield
    if marked:
        hide(hide_cuda)


@pytest.fixture(scope="session")
def toy_tokens(tmp_path_factory):
    """A folder of token files: 400 documents of made-up but regular text, vocabulary 512."""
    import numpy as np

    from recorder import WORDS as words
    from recorder import toy_tokenizer
    from tokenizer import vocab_size_of
    from tokens import write_meta, write_tokens

    rng, docs = np.random.default_rng(0), []
    for _ in range(400):
        i, n = rng.integers(len(words)), rng.integers(5, 60)
        docs.append(" ".join(words[(i + k * k) % len(words)] for k in range(n)))
    tokenizer = toy_tokenizer(docs)
    folder, n = tmp_path_factory.mktemp("toy_tokens"), vocab_size_of(tokenizer)
    ids = tokenizer(docs)["input_ids"]
    splits = {"train": write_tokens(folder, "train", ids[:350], n)}
    splits["val"] = write_tokens(folder, "val", ids[350:], n)
    write_meta(folder, tokenizer, "toy", splits)
    return str(folder)


@pytest.fixture(scope="session")
def folders(toy_tokens, tmp_path_factory):
    """{family: a folder of a small model}, with the tokenizer of toy_tokens. Not to be changed."""
    from harness import FAMILIES, model_folder
    from tokenizer import load_tokenizer

    root, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer(f"{toy_tokens}/tokenizer")
    return {name: model_folder(root / name, name, tokenizer) for name in FAMILIES}


@pytest.fixture(scope="module")
def unbroken(request, tiny, tmp_path_factory):
    """The out_dir of a stage's smallest run, that other runs are compared with: the module has the
    script's name in SCRIPT, and a fixture `tiny`, the config file."""
    import harness

    out_dir = tmp_path_factory.mktemp("unbroken")
    harness.run(request.module.SCRIPT, tiny, out_dir)
    return out_dir
