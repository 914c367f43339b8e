"""Runs of the scripts for tests: in this process, in one to be killed, on several ranks; and the
checks that are the same for every stage."""

import atexit
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
from attention import make_seqs
from formats.huggingface import from_pretrained, save_pretrained
from model import DEFAULTS, from_scratch
from recorder import WORDS as WORDS
from token_scores import windows_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
pool = []  # of run_ranks: (torchrun, its folder, the numbers of its jobs)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def arguments(script, config, out_dir, *more):
    return [os.path.join(ROOT, script), config, f"--out_dir={out_dir}", *more]


def run(script, config, out_dir, *more):
    """The script in this process, as `python script config` runs it -> its globals."""
    return execute(arguments(script, config, out_dir, *more))


def execute(argv):
    """The same of any command line; its script is the first."""
    old, sys.argv = sys.argv, argv
    try:
        return types.SimpleNamespace(**runpy.run_path(sys.argv[0], run_name="__main__"))
    finally:
        sys.argv = old
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(ranks, script, config, out_dir, *more):
    """The script in processes of its own group, to be waited for or killed."""
    launch = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    return subprocess.Popen(
        launch + arguments(script, config, out_dir, *more), cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def run_ranks(ranks, argvs):
    """Several runs (lists from `arguments`) one after another on the same ranks, the first of three
    that go on from call to call: see run_many.py -> what they printed"""
    if not pool or pool[-1][0].poll() is not None:
        folder = tempfile.TemporaryDirectory()
        launch = [*TORCHRUN, "--nproc_per_node=3", os.path.join(ROOT, "tests", "run_many.py")]
        with open(os.path.join(folder.name, "out"), "w") as out:
            pool.append((subprocess.Popen(
                [*launch, folder.name, str(os.getpid())], cwd=ROOT, start_new_session=True,
                stdout=out, stderr=subprocess.STDOUT), folder, itertools.count()))  # fmt: skip
        atexit.register(kill, pool[-1][0])
    process, folder, jobs = pool[-1]
    path, done = os.path.join(folder.name, str(next(jobs))), False
    with open(os.path.join(folder.name, "out"), "rb") as out:
        out.seek(0, os.SEEK_END)
        with open(path, "w") as f:
            json.dump([ranks, argvs], f)
        os.rename(path, path + ".json")  # whole from the first moment
        deadline = time.time() + 300
        while not done and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
            done = all(os.path.exists(f"{path}.done{rank}") for rank in range(3))
        if not done:  # ranks that wait for each other
            kill(process)
        printed = out.read().decode()
    assert done, printed[-6000:]
    return printed


def printed_by(ranks, argv):
    if ranks > 1:
        return run_ranks(ranks, [argv])
    with redirect_stdout(io.StringIO()) as out:
        execute(argv)
    return out.getvalue()


def losses(out_dir, column="loss"):
    """{step: value} of log.csv, every bit of it."""
    with open(os.path.join(out_dir, "log.csv"), newline="") as f:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(f) if row[column]}


def saved(out_dir, step, name="model.safetensors"):
    with open(os.path.join(out_dir, f"step{step}", name), "rb") as f:
        return f.read()


def wait_for_step(process, out_dir, step):
    """Until log.csv has the step; fails if the process ends before."""
    path, deadline = os.path.join(out_dir, "log.csv"), time.time() + 120
    while not os.path.exists(path) or step not in losses(out_dir):
        assert process.poll() is None and time.time() < deadline, process.stdout.read()[-3000:]
        time.sleep(0.005)


def kill_at_step(process, out_dir, step):
    wait_for_step(process, out_dir, step)
    kill(process)


def kill(process):
    """SIGKILL to a process of `start`, and to torchrun's ranks; nothing if it has ended."""
    if process.poll() is None:
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)])
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# ---- checks that are the same for every stage ----
def curves(out_dir):
    """{column: {step: value}} of log.csv, but for what depends on the clock."""
    with open(os.path.join(out_dir, "log.csv"), newline="") as f:
        columns = set(next(csv.reader(f))) - {"step", "ex_s", "tok_s", "mfu", "eta"}
    return {column: losses(out_dir, column) for column in columns}


def assert_equal_bits(got, want):
    """The same numbers in two logs, and the same weights in what was saved last."""
    got_curves, want_curves = curves(got), curves(want)
    assert got_curves["loss"] and got_curves["eval_loss"] and got_curves == want_curves
    folders = [want / f"step{max(want_curves['loss'])}", want / "merged"]
    paths = [p.relative_to(want) for f in folders for p in f.rglob("*.safetensors")]
    assert paths
    for path in paths:
        if path.name == "model.safetensors":
            assert (got / path).read_bytes() == (want / path).read_bytes(), path
        else:  # the order of notes in an adapter's header is not fixed
            a, b = load_file(got / path), load_file(want / path)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), path


def assert_close(got, want, folder, weights=1e-3, **columns):
    """Columns of two logs to these tolerances, weights of the saved model in norm."""
    for column, tolerance in columns.items():
        expected = losses(want, column)
        assert expected and losses(got, column) == pytest.approx(expected, rel=tolerance), got
    a, b = (from_pretrained(str(out_dir / folder)).state_dict() for out_dir in (got, want))
    for name in b:
        assert (a[name] - b[name]).norm() <= weights * b[name].norm(), (got, name)


def assert_compared(printed, out_dir, step, *names):
    """A run ends with the scores of step 0 and of the saved folder, which are those logged there.
    """
    [line] = re.findall(rf"{out_dir}/step{step} loaded again, before -> after.*\n.*", printed)
    for name in names:
        before, after = map(float, re.search(rf"[ \n]{name} (\S+) -> ([^\s,]+)", line).groups())
        logged = losses(out_dir, f"eval_{name}")
        assert before == pytest.approx(logged[0], rel=1e-3), name
        assert after == pytest.approx(logged[step], rel=1e-3), name


def gradients(model):
    """{name: gradient}, which the model no longer has."""
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


def assert_same_gradients(got, want, tolerance):
    assert got.keys() == want.keys() and len(got) > 10
    for name, x in want.items():
        assert x.norm() > 1e-9, name
        assert (got[name] - x).norm() <= tolerance * x.norm(), name


def assert_masked(ids, inputs, masked, targets, n, s):
    """What masking makes of `ids`, of which 0-4 are special and n may be masked."""
    assert (ids[masked] == targets).all() and (targets >= 5).all()
    untouched = np.setdiff1d(np.arange(len(ids)), masked)
    assert (inputs[untouched] == ids[untouched]).all() and abs(len(masked) / n - s.mask_prob) < 5e-3
    hidden, kept = (inputs[masked] == 3).mean(), (inputs[masked] == targets).mean()
    swapped = inputs[masked][(inputs[masked] != 3) & (inputs[masked] != targets)]
    if s.mask_all:
        assert hidden == 1
    else:  # 10 % stay, and some draw themselves
        assert abs(hidden - 0.8) < 0.01 and abs(kept - (0.1 + 0.1 / 95)) < 0.01
        assert (swapped >= 5).all()


def assert_killed_and_resumed_is_bit_equal(script, config, folder, steps, *more, ranks=1):
    """A whole run, and one that is killed at one of `steps` (first, last) and resumed."""
    whole, broken = folder / "whole", folder / "broken"
    process, step = start(ranks, script, config, broken, *more), random.randint(*steps)
    with ThreadPoolExecutor(1) as threads:  # beside the whole run: a process takes long to start
        killed = threads.submit(kill_at_step, process, broken, step)
        printed_by(ranks, arguments(script, config, whole, *more))
        killed.result()
    printed = printed_by(ranks, arguments(script, config, broken, *more, "--resume=True"))
    assert int(re.search(r"resumed .*, after step (\d+)", printed)[1]) < max(losses(whole))
    assert losses(whole, "eval_loss")
    assert_equal_bits(broken, whole)


def stopped_and_resumed(script, config, out_dir, step, *more):
    """A run that a signal ends after `step` saves and says how to go on -> what going on gives."""
    calls = []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(common, "catch_stop", lambda s: lambda: calls.append(1) or len(calls) > step)
        run(script, config, out_dir, *more)
    printed = out.getvalue()
    assert f"saved {out_dir}/step{step}\n" in printed and max(losses(out_dir)) == step
    assert " ".join([f"--out_dir={out_dir}", *more, "--resume=True"]) in printed
    assert not os.path.exists(out_dir / "merged")  # which MNTP writes at the end
    return run(script, config, out_dir, *more, "--resume=True")


def shown_and_dry(script, config, unbroken, folder, *more):
    """What --show_batch=True and --dry_run=True print; neither writes, and a run's folder is not
    written over. folder: an empty one; unbroken: the out_dir of a run of this config"""
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
        run(script, config, folder, *more, "--show_batch=True")
    assert not os.listdir(folder)
    before = sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("[!.]*"))
    with redirect_stdout(io.StringIO()) as dry:
        run(script, config, unbroken, "--dry_run=True")
    with pytest.raises(SystemExit, match="--resume=True"):
        run(script, config, unbroken)
    assert sorted((p, p.stat().st_mtime_ns) for p in unbroken.rglob("[!.]*")) == before
    assert re.search(r"dry run: [\d.]+ s/step, .* peak memory [\d.]+ GB;", dry.getvalue())
    return shown.getvalue(), dry.getvalue()


def printed_before_the_4th_bad_step(script, config, out_dir, *more):
    with pytest.raises(SystemExit, match="4th such step"), redirect_stdout(io.StringIO()) as out:
        run(script, config, out_dir, "--save_interval=1", *more)
    return out.getvalue()


def raises(kind, message, function, *args, **keys):
    with pytest.raises(kind, match=message):
        function(*args, **keys)


def assert_refused(message, script, config, out_dir, *more):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        run(script, config, out_dir, *more)
    assert message in str(error.value)


# ---- files ----
def ndcg(ranked, grades, k=None):
    """By plain loops; ranked: ids, the best first; grades: {id: grade} of the right ones."""
    gain = sum(grades.get(d, 0) / math.log2(i + 2) for i, d in enumerate(ranked[:k]))
    best = sorted(grades.values(), reverse=True)[:k]
    return gain / sum(g / math.log2(i + 2) for i, g in enumerate(best))


def script(path):
    """A script that is no module of the project, such as data/echo/prepare.py, as a module."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_jsonl(path, records):
    """One line for each record; folders that lack are made -> the path as str."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return str(path)


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def spans_file(path, n_passages=12, seed=1):
    """Passages of ragged lengths with 1 to 4 queries each; a query's gold are the 1 to 3 places
    where its word stands in the passage, the answer the first of them (of two lines in three)."""
    rng, lines = np.random.default_rng(seed), []
    for i in range(n_passages):
        words = rng.choice(WORDS, 5 + (i * 13) % 37).tolist()
        starts = np.cumsum([0] + [len(w) + 1 for w in words]).tolist()
        for word in rng.permutation(sorted(set(words)))[: 1 + i % 4]:
            at = [k for k, w in enumerate(words) if w == word][:3]
            spans = [[starts[k], starts[k] + len(word)] for k in at]
            line = {"query": f"{word} {rng.choice(WORDS)}", "passage": " ".join(words)}
            line |= {"spans": spans} | ({"answer": spans[0]} if len(lines) % 3 else {})
            lines.append(line)
    return write_jsonl(path, lines)


def plain_scores(model, tokenizer, record, s):
    """(cosines [n] of the passage's tokens, numbers of the gold ones) of one line, with loops: each
    text alone through the model; windows by hand."""
    ids = tokenizer(s.template.prefix + s.query_instruction + record["query"] + s.template.suffix)
    ids = ids["input_ids"]
    q = model(torch.tensor(ids), make_seqs([len(ids)]))[-1]
    head = s.template.prefix + s.passage_instruction
    both = tokenizer(head + record["passage"] + s.template.suffix, return_offsets_mapping=True)
    ids, hidden, cosines, gold = both["input_ids"], [], [], []
    for start, stop, first, last in windows_of(len(ids), s.passage_window, s.window_overlap, True):
        part = model(torch.tensor(ids[start:stop]), make_seqs([stop - start]))
        hidden += part[first - start : last - start]
    for vector, offsets in zip(hidden, both["offset_mapping"], strict=True):
        a, b = (x - len(head) for x in offsets)
        if max(a, 0) < min(b, len(record["passage"])):
            if any(a < end and b > start for start, end in record["spans"]):
                gold.append(len(cosines))
            cosines.append((q / q.norm()) @ (vector / vector.norm()))
    return torch.stack(cosines), gold


# ---- small models of each family ----
_SMALL = dict(n_embd=64, n_hidden=96, n_head=4, n_layer=3, vocab_size=512, max_seq_len=256)
_LOCAL = dict(layer_kinds=["global", "local", "local"], window=6)
GEMMA3 = DEFAULTS["gemma3_text"] | _LOCAL | dict(
    family="gemma3_text", n_kv_head=2, head_dim=24, query_pre_attn_scalar=30, max_seq_len=256)
FAMILIES = {"llama": ("llama-tiny", dict(n_kv_head=2)),
            "llama-bidirectional": ("llama-tiny", dict(causal=False, tied=False)),
            "mistral": ("llama-tiny", dict(family="mistral", layer_kinds=["local"] * 3, window=9)),
            "qwen2": ("llama-tiny", dict(family="qwen2", qkv_bias=True)),
            "qwen3": ("qwen3-tiny", {}), "gemma3": ("llama-tiny", GEMMA3),
            "gemma3-bidirectional": ("llama-tiny", GEMMA3 | dict(causal=False, tied=False)),
            "modernbert": ("modernbert-tiny", _LOCAL),
            "modernbert-decoder": ("modernbert-tiny", _LOCAL | dict(causal=True)),
            "modernbert-headless": ("modernbert-tiny", _LOCAL | dict(head="none")),
            "neobert": ("neobert-250m", {})}  # fmt: skip


def model_folder(folder, family, tokenizer, **more):
    """A folder of a small model with random weights, as the training scripts write it -> str."""
    size, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = from_scratch(size, **(_SMALL | changes | more))
    with torch.no_grad():
        for p in model.parameters():  # no norm is 1, no bias 0, and logits of a few
            p.add_(torch.randn_like(p) * (0.15 if p.dim() == 2 else 0.1))
    names = ("pad", "bos", "eos", "cls", "sep", "mask")
    model.config.hf = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in names}
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_config(folder, **keys):
    """A config file with these keys -> its path."""
    path = os.path.join(folder, "config.py")
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{key} = {value!r}\n" for key, value in keys.items())
    return path


def configured(script, name, *argv):
    """The resolved config of configs/<name>.py (""; none), by the defaults of the script."""
    path = os.path.join(ROOT, script)
    with open(path, encoding="utf-8") as f:
        space = {"__file__": path, "__doc__": ""}
        defaults = re.split(r"(?m)^# ---- ", f.read())[1]
        exec(compile("# " + defaults, path, "exec"), space)
    configs = [os.path.join(ROOT, "configs", f"{name}.py")] if name else []
    old, sys.argv = sys.argv, [script, *configs, *argv]
    try:
        return common.configure(space)
    finally:
        sys.argv = old
