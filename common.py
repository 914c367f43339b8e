"""
What every script needs and no script should differ in: the config, the ranks, what wraps a model
for training, and the log. Checkpoints are in checkpoint.py, optimizers and schedules in optim.py.
"""

from usage import fill, show_help

import ast
import csv
import difflib
import math
import operator
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from glob import glob
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import attention
from formats import read_json

# ---- config: the script's defaults, then config files, then --key=value ----
# What a key accepts stands in the script's defaults: its type, and the comment's first clause.
#
#     mask_prob = 0.3  # > 0 and <= 1: of the tokens that are not special
#     schedule = "linear"  # one of linear, cosine, constant; after the warmup
#     prefix = "step"  # like [a-z]+; a regular expression
#     ratios: tuple[int, ...] = (16, 8)  # >= 1; holds for each of them

COMPARE = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "!=": operator.ne
}  # fmt: skip
KINDS = {k.__name__: k for k in (int, float, bool, str, tuple, dict)} | {"None": type(None)}
RENAMED = {  # keys of earlier versions, where the script has the new one and not the old
    "data_dir": "data", "batch_size": "batch_tokens", "device_batch_size": "device_batch_tokens",
    "chunk_tokens": "device_batch_tokens", "batch_tokens": "device_batch_tokens",
    "eval_pairs": "eval_lines", "max_seq_len": "max_length",
}  # fmt: skip
_EVALS = "python -m evals.token_retrieval and evals.classifier evaluate"
MOVED = {"eval_only": _EVALS, "ratios": _EVALS}


class _Namespace(dict):
    """Where a config file runs: assigning a key that the command line gave does nothing."""

    def __init__(self, values, pinned):
        super().__init__(values | pinned)
        self.pinned = pinned

    def __setitem__(self, name, value):
        if name not in self.pinned:
            super().__setitem__(name, value)


def _fits(value, rule):
    """Is the value, or each of a tuple, what the rule says? Every float must be finite."""
    if type(value) is tuple:
        return all(_fits(x, rule) for x in value)
    if value is None or type(value) is float and not math.isfinite(value):
        return value is None
    if rule.startswith("one of "):
        return value in rule.removeprefix("one of ").replace('"', "").split(", ")
    if rule.startswith("like "):
        return bool(re.fullmatch(rule.removeprefix("like "), value))
    limits = [limit.split() for limit in rule.split(" and ")] if rule else []
    is_number = type(value) in (int, float)
    return all(is_number and COMPARE[sign](value, float(limit)) for sign, limit in limits)


def _accept(key, value, kinds, item, rule):
    """The value in a type the key takes. Converted are an int to float, a list to a tuple, and one
    string or int to a tuple of it. kinds, item: types of the value, and of a tuple's items."""
    if type(value) is item and item in (str, int):
        value = (value,)
    for kind, wanted in ((int, float), (list, tuple)):
        if type(value) is kind and kind not in kinds and wanted in kinds:
            value = wanted(value)
    items = value if type(value) is tuple and item else ()
    if type(value) not in kinds or any(type(x) is not item for x in items):  # True is no int here
        names = " or ".join(name for name, kind in KINDS.items() if kind in kinds)
        names += f" of {item.__name__}" if item else ""
        raise ValueError(f"{key} takes {names}, not {value!r}")
    if not _fits(value, rule):
        raise ValueError(f"{key} takes {rule or 'a finite number'}, not {value!r}")
    return value


def _unknown(key, keys):
    if RENAMED.get(key) in keys:
        return f"the key {key!r} is now called {RENAMED[key]!r}."
    if key in MOVED:
        return f"{key!r} is no key any more: {MOVED[key]}."
    near = difflib.get_close_matches(key, keys, 1, cutoff=0.5)
    return f"unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else "see --help")


def _run_config(path, space, keys, parents=()):
    """Run a config file in `space`, its `base` first. Errors name the file and the line."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read(), path)
    except OSError as e:
        raise SystemExit(f"{' -> '.join((*parents, path))}: {e.strerror}") from e
    except SyntaxError as e:
        raise SystemExit(f"{path}:{e.lineno}: {e.msg}") from e
    except ValueError as e:  # no UTF-8
        raise SystemExit(f"{path}: {e}") from e
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "base":
            base = getattr(node.value, "value", None)
            if not isinstance(base, str):
                raise SystemExit(f"{path}:{node.lineno}: base takes a quoted path, nothing else")
            base = os.path.normpath(os.path.join(os.path.dirname(path), base))
            if base in (*parents, path):
                raise SystemExit(f"{path}:{node.lineno}: base {base} leads back to itself")
            _run_config(base, space, keys, (*parents, path))
    try:
        exec(compile(tree, path, "exec"), space)
    except Exception as e:
        line = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path][-1]
        raise SystemExit(f"{path}:{line}: {type(e).__name__}: {e}") from e
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    for name, line in {n.id: n.lineno for n in sorted(names, key=lambda n: n.lineno)}.items():
        if name.startswith("_") or name == "base" or name not in space:
            continue  # a helper, or local to a function
        if name not in keys:
            raise SystemExit(f"{path}:{line}: {_unknown(name, keys)} Helper names start with _.")
        try:
            dict.__setitem__(space, name, _accept(name, space[name], *keys[name]))
        except ValueError as e:
            raise SystemExit(f"{path}:{line}: {e}") from e


def configure(script_globals):
    """Read `python script.py [config.py ...] [--key=value ...]` into the script's globals.

    Keys are the names that the script's top level assigns an int, float, bool, str, tuple or None,
    but for a leading _. A key takes its default's type, or what its annotation says
    (`x: float | None = None`, `x: str | dict = ""`), and of that what the comment says.
    Command-line values hold while the files run, so what a file derives from them follows. Returns
    the resolved {key: value}.
    SystemExit on an unknown key or a wrong value. --help prints the docstring and the commented
    defaults; --traceback=True shows where an error was raised, which is one line otherwise."""
    with open(script_globals["__file__"], encoding="utf-8") as f:
        source = f.read()
    keys, lines = {}, source.encode().splitlines()  # ast counts bytes
    for node in ast.parse(source).body:  # not dir(): a constant that was imported is no key
        hint = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else None
        targets = getattr(node, "targets", [node.target] if hint else [])
        comment = lines[node.end_lineno - 1][node.end_col_offset :].decode()
        rule = re.match(r" *# ((?:one of|like|[<>!]=?) .*?)(?:[;:] |$)", comment)
        for name in [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]:
            kind = type(script_globals.get(name, ...))
            if name.startswith("_") or kind not in KINDS.values() or kind is dict and not hint:
                continue
            if kind is type(None) and not hint:
                raise TypeError(f"{name} = None needs a type: `{name}: float | None = None`")
            # "tuple[int, ...] | None" -> {tuple, NoneType}, int
            hints = hint.split("|") if hint else [kind.__name__]
            kinds = {KINDS[h.split("[")[0].strip()] for h in hints}
            item = re.search(r"tuple\[(\w+), \.\.\.\]", hint or "")
            keys[name] = kinds, item and KINDS[item[1]], rule[1] if rule else ""
    defaults = {k: _accept(k, script_globals[k], *keys[k]) for k in keys}

    pinned, files, sys.excepthook = {}, [], one_line
    for arg in sys.argv[1:]:
        if not arg.isascii() and re.search("[\ud800-\udfff]", arg):
            raise SystemExit(f"{arg!a}: this is no UTF-8")
        if arg == "--traceback=True":
            sys.excepthook = sys.__excepthook__
            continue
        if arg in ("-h", "--help"):
            show_help(script_globals["__file__"])
        if not arg.startswith("-"):
            files.append(os.path.normpath(arg))
            continue
        key, equals, text = arg.removeprefix("--").partition("=")
        if key not in keys:
            raise SystemExit(f"{arg}: {_unknown(key, keys)}")
        if not equals:
            raise SystemExit(f"{arg}: options are written --key=value")
        kinds, item, _ = keys[key]
        value = text  # of strings as it is: a text may be long, and have quotes
        is_text = str in kinds or item is str and text[:1] not in "(["
        if not is_text or dict in kinds and text[:1] == "{":
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = ast.literal_eval(text)
        elif text == "None":
            value = None
        try:
            pinned[key] = _accept(key, value, *keys[key])
        except ValueError as e:
            raise SystemExit(f"{arg}: {e}") from e
    space = _Namespace(defaults, pinned)
    for path in files:
        _run_config(path, space, keys)
    config = {k: space[k] for k in keys}
    script_globals.update(config)
    changed = [f"{k}={v!r}" for k, v in config.items() if v != defaults[k]]
    print0(fill(f"config: {' '.join(sys.argv[1:])}"))
    print0(fill(f"not the defaults: {'  '.join(changed)}"))
    return config


def one_line(kind, error, tb):
    """sys.excepthook: what our own code raises, what a file or a missing package is to blame for,
    and what follows when another rank ends is one line; of a bug all is shown."""
    last = traceback.extract_tb(tb)[-1:]
    is_ours = [f for f in last if f.filename.startswith(os.path.dirname(os.path.abspath(__file__)))
               and "site-packages" not in f.filename and f.line.startswith("raise ")]  # fmt: skip
    text = " ".join(str(error).splitlines())
    if dist.is_initialized() and re.search("gloo|NCCL|TCPStore", text):
        text = f"rank {get_rank()} ends, for another one has ended ({text[:80]})"
    elif not is_ours and not isinstance(error, (OSError, ModuleNotFoundError)):
        return sys.__excepthook__(kind, error, tb)
    elif isinstance(error, FileNotFoundError) and "python " not in text:
        text += made_by(error.filename or text.partition(":")[0])
    # past torch, which takes stderr from a hook, and past its clean-up, which may wait for others
    print(f"{kind.__name__}: {text}", file=sys.__stderr__, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(1)


def made_by(path):
    """The end of an error about a file or folder that is not there: what makes it, where that is
    known by its name."""
    folder = "/".join(os.path.normpath(path).split("/")[:2])  # data/pydocs, out/clm_pydocs_tiny
    config = f"configs/{folder.removeprefix('out/')}.py"
    if os.path.exists(config):
        return f". The first lines of {config} have the command that makes it"
    for script in glob("data/*/prepare.py"):
        with open(script, encoding="utf-8") as f:
            if script == f"{folder}/prepare.py" or folder in f.read() and folder[:7] == "models/":
                return f". First: python {script}"
    return ". README.md and docs/ have the form of its lines" if path.endswith(".jsonl") else ""


def save_config(config, path):
    """Write the resolved config as a config file that runs the same again."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{key} = {value!r}\n" for key, value in config.items())


# ---- ranks, devices, seeds ----


def get_rank():
    """This process's rank, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))  # torchrun's; known before the process group is


def print0(*args):
    if get_rank() == 0:
        print(*args, flush=True)


def setup_distributed():
    """-> (rank, world_size, local_rank, device). Under torchrun it joins the process group, one
    rank a GPU (nccl) or CPU ranks (gloo); a plain `python script.py` is one rank without a group.
    """
    rank, world_size = get_rank(), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise SystemExit(f"local rank {local_rank}: {count} GPUs here, lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        mps = torch.backends.mps.is_available() and world_size == 1
        device = torch.device("mps" if mps else "cpu")
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # torchrun sets one thread a rank where the user says nothing: share the cores instead
        if local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, os.cpu_count() // local_world))
    if "RANK" in os.environ:
        # rank 0 may take long to write a large model while the others wait for it
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=timedelta(hours=1))
        else:
            dist.init_process_group("gloo")
    return rank, world_size, local_rank, device


def start(config):
    """-> the settings of a run as one namespace: the config's keys, and what they lead to: rank,
    world_size, local_rank, device, compute_dtype, autocast() and config itself. Joins the process
    group and seeds torch. SystemExit for keys, the same in all stages, that do not go together."""
    s = SimpleNamespace(**config, config=config, lock=None, saved=None, skipped=[], stream=None)
    if (s.fsdp or config.get("zero1")) and "RANK" not in os.environ:
        raise SystemExit("fsdp and zero1 share work between ranks: start with torchrun")
    if s.init_from == "resume":
        raise SystemExit("init_from='resume' is now --resume=True, with init_from as it was")
    if s.train_also and not s.lora_rank:
        raise SystemExit(
            f"train_also={s.train_also!r} goes with LoRA; lora_rank=0 trains every weight"
        )
    s.rank, s.world_size, s.local_rank, s.device = setup_distributed()
    if s.deterministic:  # the same bits in every run on one machine, CUDA too; slower
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before any CUDA work
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(s.seed)  # the same fresh weights on every rank
    if s.config.get("batch_size", 0) % s.world_size:
        raise SystemExit(f"batch_size={s.batch_size} must be a multiple of {s.world_size} ranks")
    s.compute_dtype = dtype_of(s.dtype, s.device)
    half = s.compute_dtype != torch.float32
    s.autocast = lambda: torch.autocast(s.device.type, s.compute_dtype, enabled=half)
    return s


def count_micro_batches(s, unit):
    """How many micro-batches make a step of a rank; unit: "size" (examples) or "tokens". SystemExit
    where that is no whole number."""
    total, part = getattr(s, f"batch_{unit}"), getattr(s, f"device_batch_{unit}") * s.world_size
    if total < part or total % part:
        raise SystemExit(
            f"batch_{unit}={total} must be k x device_batch_{unit}={part // s.world_size} x "
            f"world_size={s.world_size}"
        )
    return total // part


def dtype_of(name, device):
    """The torch dtype of "bf16", "fp32" or "auto": bf16 where the device is fast at it (Ampere and
    later, CPUs with AVX512-BF16 or AMX), else fp32. A T4 emulates bf16, slowly: it gets fp32."""
    if name not in ("auto", "bf16", "fp32"):
        raise SystemExit(f'dtype takes "auto", "bf16" or "fp32", not {name!r}')
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every version
        fast = device.type == "cpu" and any(getattr(torch.cpu, t, bool)() for t in tests)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else torch.float32


def zeros(n, device):
    """[n] zeros for sums of losses, in the widest type that the device has."""
    wide = torch.float32 if device.type == "mps" else torch.float64  # a Mac has no float64
    return torch.zeros(n, dtype=wide, device=device)


def all_reduce_sum(values, op=dist.ReduceOp.SUM):
    """[n] numbers -> [n] floats, their sums over all ranks, in float64 and one all_reduce."""
    values = [float(value) for value in values]
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, op)
    return values.tolist()


def all_reduce_max(number):
    """The largest of a whole number over all ranks."""
    return int(all_reduce_sum([number], dist.ReduceOp.MAX)[0])


def seed_step(seed, step, rank, chunk=0):
    """Seed torch for one step of one rank. Called as every step begins it makes what is random in a
    step a function of (seed, step, rank): nothing to save, and evaluation cannot disturb training.
    """
    x = 0
    for n in (seed, step, rank, chunk):  # splitmix64: the CPU generator keeps only the low 32 bits
        x = (x + n + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
    torch.manual_seed(x)


def catch_stop(s):
    """-> stop_requested(): has SIGTERM or Ctrl-C come to this rank? Neither ends the process any
    more: the script sums the flag over ranks at each step, so that all of them save and leave after
    the same one. A second Ctrl-C ends it at once, and a dry run has nothing to save."""
    seen = []

    def stop(number, _):
        seen.append(number)
        os.write(2, b"\nstopping: this step ends and is saved; Ctrl-C once more ends at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in () if s.dry_run else (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return lambda: bool(seen)


def finish(s, step, batches):
    """The end of a run: stops reading ahead, says how to load what was saved, or how a run that was
    stopped goes on, and leaves the process group."""
    batches.close()
    if step == s.stop_step and s.rank == 0 and not s.dry_run:
        print(f"to use it:\n{loading_code(s.out_dir)}", flush=True)
    if step < s.stop_step and not s.dry_run:
        print0(f"stopped after step {step}; this goes on:", resume_command())
    if s.lock:
        s.lock.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def loading_code(out_dir):
    """What loads the folder that a run saved last: Python, or for a classifier that is ours alone a
    command."""
    folder = f"{out_dir}/merged" if os.path.isdir(f"{out_dir}/merged") else f"{out_dir}/final"
    config = read_json(folder, "config.json")
    other = read_json(folder, "config_sentence_transformers.json").get("model_type")
    if other or not config or os.path.exists(f"{folder}/nanoembed.json"):
        code = f"from embedder import Embedder; model = Embedder.load({out_dir!r})"
        # which computes in the folder's type: as given here its vectors equal ours
        plain = config.get("dtype", "float32") == "float32"
        fp32 = "" if plain else ", model_kwargs={'dtype': 'float32'}"
        theirs = f"from sentence_transformers import {other}; model = {other}({folder!r}{fp32})"
        return f"{code}\n{theirs}" if other else code
    if read_json(folder, "nanoembed_classifier.json").get("problem"):
        return f"python -m evals.classifier --model={out_dir} --eval_data=..."
    [name], remote = config["architectures"], ""
    if "auto_map" in config:  # not in transformers: its code lies in the folder
        name, remote = "AutoModelForMaskedLM", ", trust_remote_code=True"
    return f"from transformers import {name}; model = {name}.from_pretrained({folder!r}{remote})"


def resume_command():
    """The command that goes on with this run."""
    launch = "torchrun ... " if "RANK" in os.environ else "python "
    return launch + shlex.join([*sys.argv, "--resume=True"])


# ---- what wraps a model for training ----


def place(model, s):
    """Readies a Transformer for training on this rank's device, in place."""
    model.gradient_checkpointing = s.gradient_checkpointing
    model.set_backend(s.attention_backend, s.device, s.compute_dtype)
    model.to(s.device).train()


def wrap(module, blocks, s):
    """Compiles each block, then shards the module (FSDP) or copies it to each rank (DDP), as the
    settings ask -> what training calls."""
    if s.compile:
        # Texts of another number or length, evaluation and each kind of layer have code of their
        # own. Past dynamo's limit of 8 blocks would run uncompiled, with no more than a warning.
        torch._dynamo.config.recompile_limit = 64
        # a loop over lengths, which change with every batch, is no graph
        attention.sdpa_packed = torch.compiler.disable(attention.sdpa_packed)
        for block in blocks:
            block.compile(backend=getattr(s, "compile_backend", "inductor"),
                          dynamic=getattr(s, "compile_dynamic", None))  # fmt: skip
    if s.fsdp:
        from torch.distributed.fsdp import fully_shard  # slow to import

        for block in blocks:
            fully_shard(block)
        return fully_shard(module)
    if s.world_size > 1:
        return DDP(module, device_ids=[s.local_rank] if s.device.type == "cuda" else None)
    return module


def sync_gradients(wrapped, now):
    """Ranks exchange gradients in the backward passes from here on, or not: once a step, in its
    last backward, is enough."""
    if isinstance(wrapped, DDP):
        wrapped.require_backward_grad_sync = now
    elif hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP
        wrapped.set_requires_gradient_sync(now)


def settle_buckets(wrapped, trial, n):
    """DDP orders its buckets anew after the first backward, and with them the sums over ranks: one
    backward that counts for nothing lets a resumed run sum as the unbroken one does. trial(n): a
    forward and backward of n rows, whose gradient it drops."""
    if isinstance(wrapped, DDP):
        trial(n)


def bad_step(s, step, loss, gnorm, batch):
    """Says which batch gave a loss or gradient that is no number, and notes the step in s.skipped:
    checkpoint.saving does not save after such a one. SystemExit at the fourth in 1,000 steps."""
    print0(f"step {step + 1}: loss {loss}, gradient norm {gnorm}: skipped. {batch}")
    s.skipped.append(step)
    if sum(other > step - 1000 for other in s.skipped) == 4:
        good = last_good(s, step)
        raise SystemExit(f"stopped at the 4th such step; checkpoints before step{good} are good")


def last_good(s, step):
    """The step, counted from 1, after which all up to `step` were skipped."""
    return last_good(s, step - 1) if step in s.skipped else step + 1


def shown(items, n=8):
    """The first n items of a list, for messages."""
    return f"{list(items[:n])}{'...' if len(items) > n else ''}"


# ---- reading ahead ----


def prefetch(iterable, depth: int = 2):
    """Yield from `iterable`, which a thread runs up to `depth` items ahead.

    Its exceptions are raised here. The thread ends with it, or when the consumer stops.
    """
    iterator, end = iter(iterable), object()
    executor = ThreadPoolExecutor(1)
    try:
        ahead = deque(executor.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(executor.submit(next, iterator, end))
            yield item
    finally:
        executor.shutdown(cancel_futures=True)  # waits for the item that is being made


# ---- the log ----

# dense bf16 flop/s by words of torch's device name, the more particular name first
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "A30": 165e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX A6000": 155e12, "RTX 5090": 210e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device):
    """The device's dense bf16 peak in flop/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= words), None)


def format_time(seconds):
    """45s, 3m12s, 2h05m"""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s // 60 % 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


SHAPES = {
    "gnorm": "gnorm {:.2f}", "lr": "lr {:.2e}", "ex_s": "{:,.1f} ex/s", "tok_s": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
}  # fmt: skip


class Rates:
    """Counts a second between two lines of the log, evaluation and saving left out."""

    def __init__(self):
        self.seconds, self.counts = 0.0, {}

    def add(self, start, **counts):
        """A step that began at `start`, and how many of what it took: add(start, tok_s=8192)."""
        self.seconds += time.perf_counter() - start
        for name, n in counts.items():
            self.counts[name] = self.counts.get(name, 0) + n

    def read(self):
        """-> {name: count / second} since the last call."""
        rates = {name: n / self.seconds for name, n in self.counts.items()}
        self.__init__()
        return rates


def open_log(s, columns, start_step=0):
    """-> log(step, values), which prints a line and appends it to out_dir/log.csv (rank 0 only);
    the config goes to out_dir/config.py. A dry run leaves nothing behind, and its log is silent.

    columns: all keys that values may have in this run, evaluation's too, in the order of printing.
    A key that is absent or None is empty in the csv. A line with "loss" gets an eta.
    start_step: the checkpoint's step on resume; later rows are dropped, so curves never overlap.
    """
    if s.rank != 0 or s.dry_run:
        return lambda step, values: None
    out_dir, tracker, max_steps = s.out_dir, s.tracker, s.stop_step
    if (s.keep_best or s.patience) and not (s.eval_interval and s.config.get("eval_data", True)):
        print0("keep_best and patience do nothing: there is no evaluation in this run")
    if s.save_interval > max_steps:
        print0(f"save_interval={s.save_interval} is beyond this run: its end is saved"
               + ", and the best step" * s.keep_best)  # fmt: skip
    path, rows, columns = os.path.join(out_dir, "log.csv"), [], ["step", *columns, "eta"]
    os.makedirs(out_dir, exist_ok=True)
    save_config(s.config, os.path.join(out_dir, "config.py"))
    if start_step and os.path.exists(path):
        with open(path, encoding="utf-8") as f:  # a killed run may end in half a line
            old = csv.DictReader([line for line in f if line.endswith("\n")])
        names = old.fieldnames or ["step"]  # empty: the disk was full
        if "step" not in names:
            raise ValueError(f"{path} has no column 'step': it is no log of a run, move it away")
        rows = [row for row in old if int(row["step"]) <= start_step]
        columns += [c for c in names if c not in columns]
    with open(path + ".new", "w", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".new", path)
    if tracker == "wandb":
        import wandb

        run = wandb.init(project="nanoembed", name=os.path.basename(out_dir), config=s.config)
    elif tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(out_dir, purge_step=start_step + 1)
    first = []  # (step, time) of the first training line, from which the eta is reckoned

    def log(step, values):
        if set(values) - set(columns):
            raise KeyError(f"{sorted(set(values) - set(columns))} not among the columns {columns}")
        numbers = {c: float(values[c]) for c in columns if values.get(c) is not None}
        parts = [f"step {step:{len(str(max_steps)) + 1}d}/{max_steps}"]
        for key, x in numbers.items():
            digits = ".4f" if key.endswith("loss") else ".3f" if key.endswith("acc") else ".4g"
            parts.append(SHAPES[key].format(x) if key in SHAPES else f"{key} {x:{digits}}")
        if "loss" in numbers:
            first[:] = first or [(step, time.perf_counter())]
            if step > first[0][0]:
                pace = (time.perf_counter() - first[0][1]) / (step - first[0][0])
                numbers["eta"] = (max_steps - step) * pace
                parts.append(f"eta {format_time(numbers['eta'])}")
        print(" | ".join(parts), flush=True)
        row = [step, *(numbers.get(c, "") for c in columns[1:])]  # floats to their last bit
        with open(path, "a", encoding="utf-8") as f:
            f.write(",".join(map(str, row)) + "\n")
        if tracker == "wandb":
            run.log(numbers, step=step)
        elif tracker == "tensorboard":
            for key, x in numbers.items():
                board.add_scalar(key, x, step)
            board.flush()

    return log


def logged(out_dir, step):
    """{column: number} of the lines of log.csv at this step; without the file, or such a line, {}.
    """
    path, found = os.path.join(out_dir, "log.csv"), {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for row in csv.DictReader(f):
                if int(row["step"]) == step:
                    found |= {key: float(x) for key, x in row.items() if x}
    return found


# ---- memory ----


def peak_memory(device):
    """Most bytes held so far: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def largest_batch(forward_backward, n, device):
    """-> (how many rows of one forward fit in memory, peak in GB at n rows), from the peaks at n
    and 2n, on a straight line. An estimate; nothing is known beyond n where 2n does not fit."""
    forward_backward(n)
    one = peak_memory(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:  # macOS tells only how much there is
        pages = "SC_PHYS_PAGES" if sys.platform == "darwin" else "SC_AVPHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    try:
        forward_backward(2 * n)
    except torch.OutOfMemoryError:
        return n, one / 1e9
    each = max((peak_memory(device) - one) / n, 1.0)
    return n + int(0.9 * free / each), one / 1e9


def report_dry_run(s, start, counts, key="", trial=None, n=0, size=1):
    """Prints the time of a step that began at `start` and of the run, what a second does (`counts`
    of the step), memory and, where there is trial(n), a forward and backward of n rows of `size`,
    how large the key that sets the device's batch may be."""
    seconds, fits = time.perf_counter() - start, ""
    if trial:
        fit, peak = largest_batch(trial, n, s.device)
        fits = f"; {key} up to about {fit * size:,} fits"
    else:
        peak = peak_memory(s.device) / 1e9
    speeds = ", ".join(f"{count / seconds:,.1f} {name}/s" for name, count in counts.items())
    print0(
        f"dry run: {seconds:.2f} s/step, {speeds}, peak memory {peak:.2f} GB;\nthe whole "
        f"run takes {format_time(seconds * s.stop_step)} without evaluation{fits}"
    )
