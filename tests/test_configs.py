"""Every file of configs/, resolved with its script, against what papers and originals say."""

import ast
import glob
import os
import re
import shlex
from types import SimpleNamespace

import pytest

import harness
import optim

with open(os.path.join(harness.ROOT, "tests/published.md"), encoding="utf-8") as f:
    TABLE, _, NO_PAPER = f.read().partition("# Not of a paper")
PATHS = sorted(glob.glob(os.path.join(harness.ROOT, "configs", "*.py")))
NAMES = [os.path.basename(path).removesuffix(".py") for path in PATHS]
SCRIPTS = {"clm": "pretrain_mlm.py", "mlm": "pretrain_mlm.py", "pretrain": "pretrain_mlm.py",
           "token": "train_token_retrieval.py"}  # fmt: skip


def resolved(name, *argv):
    kind = name.partition("_")[0]
    return harness.configured(SCRIPTS.get(kind, f"train_{kind}.py"), name, *argv)


SECTIONS = re.findall(r"(?m)^## (.+)\n\|.*\n\|---.*\n((?:\|.*\n)+)", TABLE)


@pytest.mark.parametrize(("heading", "rows"), SECTIONS, ids=[heading for heading, _ in SECTIONS])
def test_numbers_are_the_published_ones_or_say_why_not(heading, rows):
    config = resolved(*shlex.split(heading))
    for row in rows.splitlines():
        key, published, ours, source = (
            cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]
        )
        assert source, row
        published = eval(published)
        want = eval(ours) if ours else published
        assert not ours or want != published, f"{row}: no difference"
        found = config[key]
        close = isinstance(want, float) and found == pytest.approx(want, rel=1e-12)
        assert close or found == want, f"{heading}: {key} is {found!r}, {row}"


def test_the_table_has_every_config():
    assert len(SECTIONS) == TABLE.count("\n## ") and len(SECTIONS) > 40
    assert {heading.split()[0] for heading, _ in SECTIONS} | set(re.findall(r"\w+", NO_PAPER)) == {
        *NAMES
    }


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_config_is_whole(path):
    name = os.path.basename(path).removesuffix(".py")
    s = SimpleNamespace(**resolved(name))
    with open(path, encoding="utf-8") as f:
        source = f.read()
    if name == "contrastive_echo_data":  # the base of others
        return
    assert f"configs/{name}.py" in source  # its command
    optim.set_lengths(s, 10**9, getattr(s, "batch_tokens", None) or s.batch_size)
    assert s.warmup < s.stop_step and s.min_lr <= s.learning_rate
    assert s.lora_rank == 0 or s.lora_alpha == 2 * s.lora_rank
    for gpus in (1, 8) if "nproc_per_node=8" in source else (1,):
        for unit in ("size", "tokens"):
            if hasattr(s, f"batch_{unit}"):
                part = getattr(s, f"device_batch_{unit}", 1)
                assert getattr(s, f"batch_{unit}") % (part * gpus) == 0
    if hasattr(s, "batch_tokens"):
        assert s.device_batch_tokens % s.max_seq_len == 0
    if isinstance(s.data, tuple):
        assert {len(s.query_instruction), len(s.passage_instruction)} <= {1, len(s.data)}
        for file in (*s.data, s.eval_data):  # somebody makes it, as the readme says
            folder = os.path.dirname(os.path.join(harness.ROOT, file))
            if file and not file.startswith("my/"):
                assert os.path.exists(os.path.join(folder, "prepare.py")), file
    # a key that the file sets has the value that it was given: none is overwritten further down
    names = [n.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
             for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]  # fmt: skip
    again = {"pretrain_ettin_decay": ["learning_rate"]}.get(name, [])
    assert sorted(names) == sorted({*names, *again}), name


def test_every_size_of_ettin_divides():
    for size in ("17m", "32m", "68m", "150m", "400m", "1b"):
        for phase in ("", "_ext", "_decay", "_cross"):
            for objective in ("mlm", "clm"):
                argv = f"--model_size=ettin-{size}", f"--objective={objective}"
                s = SimpleNamespace(**resolved(f"pretrain_ettin{phase}", *argv))
                assert s.batch_tokens % (8 * s.device_batch_tokens) == 0
                assert s.device_batch_tokens % s.max_seq_len == 0
