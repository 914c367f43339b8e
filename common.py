"""What every script needs and no script should differ in: the config, the ranks, checkpoints, the
log, and the one optimizer torch lacks. A stage's schedule and parameter groups stand in its script.
"""

import ast
import csv
import difflib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

# ---- config: the script's defaults, then config files, then --key=value ----

KINDS = {k.__name__: k for k in (int, float, bool, str, tuple, list)} | {"None": type(None)}


class _Namespace(dict):
    """Where a config file runs: assigning a key that the command line gave does nothing."""

    def __init__(self, values, pinned):
        super().__init__(values | pinned)
        self.pinned = pinned

    def __setitem__(self, name, value):
        if name not in self.pinned:
            super().__setitem__(name, value)


def _accept(key, value, kinds):
    """The value in a type the key takes: only int -> float and tuple <-> list are converted."""
    if type(value) in kinds:  # exact: True is no int here
        return value
    if type(value) is int and float in kinds:
        return float(value)
    if type(value) in (tuple, list) and kinds & {tuple, list}:
        return tuple(value) if tuple in kinds else list(value)
    names = " or ".join(name for name, kind in KINDS.items() if kind in kinds)
    raise ValueError(f"{key} takes {names}, not {value!r}")


def _unknown(key, keys):
    near = difflib.get_close_matches(key, keys, 1, cutoff=0.5)
    return f"unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else "see --help")


def _run_config(path, space, kinds, parents=()):
    """Run a config file in `space`, its `base` first. Errors name the file and the line."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read(), path)
    except OSError as e:
        raise SystemExit(f"{' -> '.join((*parents, path))}: {e.strerror}") from e
    except SyntaxError as e:
        raise SystemExit(f"{path}:{e.lineno}: {e.msg}") from e
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "base":
            base = getattr(node.value, "value", None)
            if not isinstance(base, str):
                raise SystemExit(f"{path}:{node.lineno}: base takes a quoted path, nothing else")
            base = os.path.normpath(os.path.join(os.path.dirname(path), base))
            if base in (*parents, path):
                raise SystemExit(f"{path}:{node.lineno}: base {base} leads back to itself")
            _run_config(base, space, kinds, (*parents, path))
    try:
        exec(compile(tree, path, "exec"), space)
    except Exception as e:
        line = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path][-1]
        raise SystemExit(f"{path}:{line}: {type(e).__name__}: {e}") from e
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    for name, line in {n.id: n.lineno for n in sorted(names, key=lambda n: n.lineno)}.items():
        if name.startswith("_") or name == "base" or name not in space:
            continue  # a helper, or local to a function
        if name not in kinds:
            raise SystemExit(f"{path}:{line}: {_unknown(name, kinds)} Helper names start with _.")
        try:
            dict.__setitem__(space, name, _accept(name, space[name], kinds[name]))
        except ValueError as e:
            raise SystemExit(f"{path}:{line}: {e}") from e


def configure(script_globals):
    """Read `python script.py [config.py ...] [--key=value ...]` into the script's globals.

    Keys are the names that the script's top level assigns an int, float, bool, str, tuple, list or
    None, but for a leading _. A key takes its default's type, or what its annotation says
    (`x: float | None = None`). Command-line values hold while the files run, so what a file derives
    from them follows. Returns the resolved {key: value}. SystemExit on an unknown key or a wrong
    value. --help prints the docstring and the commented defaults."""
    with open(script_globals["__file__"], encoding="utf-8") as f:
        source = f.read()
    kinds = {}
    for node in ast.parse(source).body:  # not dir(): a constant that was imported is no key
        hint = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else None
        targets = getattr(node, "targets", [node.target] if hint else [])
        for name in [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]:
            kind = type(script_globals.get(name, ...))
            if name.startswith("_") or kind not in KINDS.values():
                continue
            if kind is type(None) and not hint:
                raise TypeError(f"{name} = None needs a type: `{name}: float | None = None`")
            # "tuple[int, int] | None" -> {tuple, NoneType}
            hints = hint.split("|") if hint else [kind.__name__]
            kinds[name] = {KINDS[h.split("[")[0].strip()] for h in hints}
    defaults = {k: _accept(k, script_globals[k], kinds[k]) for k in kinds}

    pinned, files = {}, []
    for arg in sys.argv[1:]:
        if arg in ("-h", "--help"):
            text = re.split(r"(?m)^# ---.*\bdefaults\b.*$", source, maxsplit=1)[-1]
            text = re.split(r"(?m)^(?:# ---|def |class |@|if )", text)[0]
            print((script_globals["__doc__"] or "").strip(), text.rstrip(), sep="\n")
            raise SystemExit(0)
        if not arg.startswith("-"):
            files.append(os.path.normpath(arg))
            continue
        key, equals, text = arg.removeprefix("--").partition("=")
        if key not in kinds:
            raise SystemExit(f"{arg}: {_unknown(key, kinds)}")
        if not equals:
            raise SystemExit(f"{arg}: options are written --key=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = text
        try:
            pinned[key] = _accept(key, value, kinds[key])
        except ValueError as e:
            if str not in kinds[key] or value is None:
                raise SystemExit(f"{arg}: {e}") from e
            pinned[key] = text  # --out_dir=123
    space = _Namespace(defaults, pinned)
    for path in files:
        _run_config(path, space, kinds)
    config = {k: space[k] for k in kinds}
    script_globals.update(config)
    items = [f"{'*' if v != defaults[k] else ''}{k}={v!r}" for k, v in config.items()]
    print0(f"config: {' '.join(sys.argv[1:])} (* = not the default)")
    print0(textwrap.fill("  ".join(items), 100, break_long_words=False, break_on_hyphens=False))
    return config


def save_config(config, path):
    """Write the resolved config as a config file that runs the same again (rank 0 writes)."""
    if _rank() == 0:
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(f"{key} = {value!r}\n" for key, value in config.items())


# ---- ranks, devices, seeds ----


def _rank():
    return int(os.environ.get("RANK", 0))  # torchrun's; known before the process group is


def print0(*args):
    if _rank() == 0:
        print(*args, flush=True)


def setup_distributed():
    """-> (rank, world_size, local_rank, device). Under torchrun it joins the process group, one
    rank a GPU (nccl) or CPU ranks (gloo); a plain `python script.py` is one rank without a group.
    """
    rank, world_size = _rank(), int(os.environ.get("WORLD_SIZE", 1))
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
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return rank, world_size, local_rank, device


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


def all_reduce_sum(values):
    """[n] numbers -> [n] floats, their sums over all ranks, in float64 and one all_reduce."""
    if not dist.is_initialized():
        return [float(v) for v in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


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


def set_deterministic():
    """The same bits in every run on one machine, CUDA too; slower. Call before any CUDA work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def catch_sigterm():
    """-> stop_requested(): has SIGTERM come to this rank? It no longer ends the process: the script
    sums the flag over ranks at each step, so that all of them save and leave after the same one."""
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    return lambda: bool(seen)


# ---- checkpoints ----
# out_dir/step120/ is a Hugging Face model folder, with training_state.pt for resuming and
# complete.json ({file: bytes} of all others, written last). To save, on all ranks:
#     weights, optim = full_state_dict(model), optimizer_state(optimizers)
#     tmp = begin_checkpoint(out_dir, f"step{step}")
#     if rank == 0: (write the model folder and torch.save training_state.pt in tmp)
#     commit_checkpoint(tmp)
# and to resume, on all ranks: torch.load(f"{latest_checkpoint(out_dir, 'step')}/training_state.pt",
#     map_location="cpu", weights_only=True, mmap=True)       mmap: the ranks of a host share pages


def _barrier():
    if dist.is_initialized():
        dist.barrier()


def _inspect(folder):
    """({file: bytes} by complete.json, why the folder is not whole or "")."""
    try:
        with open(os.path.join(folder, "complete.json"), encoding="utf-8") as f:
            sizes = json.load(f)
    except (OSError, ValueError) as e:
        return {}, f"complete.json is missing or broken ({type(e).__name__})"
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.isfile(path) else "no file"
        if found != size:
            return {}, f"{name} should have {size} bytes, found {found}"
    return sizes, ""


def _write_sizes(folder, sizes):
    path = os.path.join(folder, "complete.json")
    with open(path + ".new", "w", encoding="utf-8") as f:
        json.dump(sizes, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".new", path)


def _publish(tmp):
    """.tmp-step120 -> step120. Killed between the two calls it is found whole under .tmp- later."""
    final = os.path.join(os.path.dirname(tmp), os.path.basename(tmp).removeprefix(".tmp-"))
    if _rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
    return final


def _numbered(out_dir, prefix):
    """The folders out_dir/<prefix><number>, highest number first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    numbers = [int(n.removeprefix(prefix)) for n in names if re.fullmatch(prefix + r"\d+", n)]
    return [os.path.join(out_dir, f"{prefix}{n}") for n in sorted(numbers, reverse=True)]


def begin_checkpoint(out_dir, name):
    """-> the empty folder out_dir/.tmp-<name>, for rank 0 to fill."""
    tmp = os.path.join(out_dir, f".tmp-{name}")
    if _rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
    _barrier()
    return tmp


def commit_checkpoint(tmp):
    """Sync the files in begin_checkpoint's folder, list them in complete.json and give the folder
    its name. Killed at any moment, the new checkpoint is whole or it is not there. -> its path"""
    _barrier()  # every rank has written what it had to
    if _rank() == 0:
        sizes = {}
        for root, _, names in os.walk(tmp):
            for path in (os.path.join(root, name) for name in names):
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
                sizes[os.path.relpath(path, tmp).replace(os.sep, "/")] = os.path.getsize(path)
        _write_sizes(tmp, sizes)
    final = _publish(tmp)
    _barrier()
    return final


def latest_checkpoint(out_dir, prefix):
    """-> the newest whole out_dir/<prefix><number> that holds a training_state.pt, or None. Prints
    why it skips one. Rank 0 looks; all ranks get its answer."""
    found = [None]
    if _rank() == 0:
        for tmp in _numbered(out_dir, f".tmp-{prefix}"):
            if not _inspect(tmp)[1]:
                _publish(tmp)
        for path in _numbered(out_dir, prefix):
            sizes, fault = _inspect(path)
            if "training_state.pt" in sizes:
                found = [path]
                break
            fault = fault or "a model only, without training_state.pt"
            print(f"checkpoint {path} skipped: {fault}", flush=True)
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def prune_checkpoints(out_dir, prefix, keep_last, keep_models, best=None):
    """Keep the newest `keep_last` checkpoints (0 = all); of older ones keep nothing, or with
    keep_models the model without training_state.pt. `best` (a path or name) is left as it is. Also
    removes what a killed save left, so call it after a commit."""
    if _rank() == 0:
        for path in _numbered(out_dir, f".tmp-{prefix}"):
            shutil.rmtree(path)
        kept = 0
        for path in _numbered(out_dir, prefix) if keep_last else []:
            sizes, _ = _inspect(path)
            if kept < keep_last:
                kept += "training_state.pt" in sizes
            elif os.path.basename(path) == os.path.basename(best or ""):
                continue
            elif not keep_models:
                shutil.rmtree(path)
            elif sizes.pop("training_state.pt", None) is not None:
                _write_sizes(path, sizes)  # first: killed before the next line, the model is whole
                os.remove(os.path.join(path, "training_state.pt"))
    _barrier()


def _full(value):
    """On rank 0 the whole of a sharded tensor, on the CPU; None elsewhere. Collective."""
    if isinstance(value, DTensor):
        value = value.full_tensor().clone()  # uneven shards: a view of padded storage otherwise
    if _rank() != 0:
        return None
    return value.cpu() if torch.is_tensor(value) else value


def full_state_dict(model):
    """-> {name: CPU tensor} of a plain, DDP, compiled or fully_shard model under the plain model's
    names, on rank 0; {} elsewhere. Collective. On CPU they are the live tensors, not copies."""
    state = {
        name.replace("_orig_mod.", "").removeprefix("module."): _full(tensor)
        for name, tensor in model.state_dict().items()
    }
    return state if _rank() == 0 else {}


def optimizer_state(optimizers):
    """-> the optimizers' state_dicts with full CPU tensors, on rank 0; [] elsewhere. Collective.
    One format for plain, DDP, ZeroRedundancyOptimizer and fully_shard, at any number of ranks."""
    states = []
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer
            optimizer.consolidate_state_dict(to=0)
            if _rank() != 0:
                continue
        saved = optimizer.state_dict()
        saved["state"] = {  # sorted: gathered in the same order on every rank
            i: {name: _full(value) for name, value in state.items()}
            for i, state in sorted(saved["state"].items())
        }
        states.append(saved)
    return states if _rank() == 0 else []


def load_optimizer_state(optimizers, states):
    """Load optimizer_state's list, on every rank. The hyperparameters stay the script's own, so a
    key changed for the resumed run acts. ValueError if the parameter groups are other ones."""
    for optimizer, saved in zip(optimizers, states, strict=True):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        counts = [len(group["params"]) for group in optimizer.param_groups]
        found = [len(group["params"]) for group in saved["param_groups"]]
        if found != counts:
            raise ValueError(f"{type(optimizer).__name__}: tensors per group {found}, not {counts}")
        groups = [
            {**now, "params": then["params"]}
            for now, then in zip(optimizer.param_groups, saved["param_groups"], strict=True)
        ]
        state = {
            i: {name: _shard_like(value, params[i]) for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _shard_like(value, param):
    """This rank's part of a full tensor where the parameter is sharded. A step count stays."""
    if isinstance(param, DTensor) and torch.is_tensor(value) and value.shape == param.shape:
        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    return value


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


SHAPES = {"gnorm": "gnorm {:.2f}", "lr": "lr {:.2e}", "tok_s": "{:,.0f} tok/s", "mfu": "mfu {:.1%}"}


def open_log(out_dir, columns, max_steps, start_step=0, tracker="", config=None):
    """-> log(step, values), which prints a line and appends it to out_dir/log.csv (rank 0 only).

    columns: all keys that values may have in this run, evaluation's too, in the order of printing.
    A key that is absent or None is empty in the csv. A line with "loss" gets an eta.
    start_step: the checkpoint's step on resume; later rows are dropped, so curves never overlap.
    tracker: "", "wandb" or "tensorboard"."""
    if tracker not in ("", "wandb", "tensorboard"):
        raise SystemExit(f'tracker takes "", "wandb" or "tensorboard", not {tracker!r}')
    if _rank() != 0:
        return lambda step, values: None
    path, rows, columns = os.path.join(out_dir, "log.csv"), [], ["step", *columns, "eta"]
    os.makedirs(out_dir, exist_ok=True)
    if start_step and os.path.exists(path):
        with open(path, encoding="utf-8") as f:  # a killed run may end in half a line
            old = csv.DictReader([line for line in f if line.endswith("\n")])
        rows = [row for row in old if int(row["step"]) <= start_step]
        columns += [c for c in old.fieldnames if c not in columns]
    with open(path + ".new", "w", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".new", path)
    if tracker == "wandb":
        import wandb

        run = wandb.init(project="nanoembed", name=os.path.basename(out_dir), config=config)
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


# ---- StableAdamW ----


class StableAdamW(torch.optim.Optimizer):
    """AdamW with Adafactor's update clipping (Wortsman et al. 2023, arXiv 2304.13013, section 3.5),
    to be used without gradient clipping. For each tensor, with gradient g and its moments m and v:

        RMS = sqrt(mean(g^2 / max(v, eps^2)))    above 1 when v lags behind a jump of the gradient
        lr_t = lr / max(1, RMS)
        theta -= lr_t * (m / (sqrt(v) + eps) + weight_decay * theta)

    Bias correction is inside the betas: beta_t = beta (1 - beta^(t-1)) / (1 - beta^t). The decay is
    scaled by lr, as in torch's AdamW. ModernBERT's and Ettin's "decoupled" decay is
    lr_t / lr_max * decay, so divide theirs by the peak lr: 1e-5 at lr 8e-4 is 0.0125 here.
    Parameters may be plain or sharded by fully_shard: the RMS is always the whole tensor's."""

    def __init__(self, params, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for p, s in zip(params, states, strict=True):
                if not s:
                    s.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                s["step"] += 1
            # all but the RMS is elementwise: work on this rank's shards
            theta, g = _local(params), _local([p.grad for p in params])
            m, v = (_local([s[name] for s in states]) for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = (
                [b * (1 - b ** (s["step"] - 1)) / (1 - b ** s["step"]) for s in states]
                for b in group["betas"]
            )
            torch._foreach_lerp_(m, g, [1 - b for b in beta1])
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, g, g, [1 - b for b in beta2])

            u = torch._foreach_sqrt(v)  # the one temporary of the parameters' size
            torch._foreach_clamp_min_(u, group["eps"])  # sqrt(max(v, eps^2))
            torch._foreach_reciprocal_(u)
            torch._foreach_mul_(u, g)
            sums = torch.stack(torch._foreach_norm(u)).square()  # [tensors]
            sharded = [i for i, p in enumerate(params) if isinstance(p, DTensor)]
            if sharded:  # on one mesh, as fully_shard has them: one all-reduce for all
                p = params[sharded[0]]
                parts = [Partial() if x.is_shard() else x for x in p.placements]
                total = DTensor.from_local(sums[sharded], p.device_mesh, parts).full_tensor()
                sums[sharded] = total
            rms = (sums / sums.new_tensor([p.numel() for p in params])).sqrt()

            torch._foreach_copy_(u, v)
            torch._foreach_sqrt_(u)
            torch._foreach_add_(u, group["eps"])
            torch._foreach_reciprocal_(u)
            torch._foreach_mul_(u, m)
            torch._foreach_add_(u, theta, alpha=group["weight_decay"])
            torch._foreach_mul_(u, list((1 / rms.clamp(min=1)).unbind()))  # no synchronisation
            torch._foreach_add_(theta, u, alpha=-group["lr"])


def _local(tensors):
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


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
