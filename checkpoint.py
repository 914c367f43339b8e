"""
Checkpoints: whole or not there, whenever a run is killed.

out_dir/step120/ is a folder of the ecosystem (a model, an embedder or an adapter), with
training_state.pt for resuming and complete.json ({file: [bytes, sha256]} of all others), written
last. out_dir/final leads to the newest one, out_dir/.lock names the process that writes here.

    last = find(s)                                      # what --resume=True goes on from, or None
    step, best = load_state(last, optimizers)
    with saving(s, step, best, optimizers) as folder:   # on all ranks
        if folder:                                      # on rank 0
            ...                                         # write the model there
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from common import all_reduce_sum, get_rank, last_good, print0
from formats.huggingface import step_of

# keys that a run may change when it goes on; all others, and the data, must be what they were
MAY_CHANGE = re.compile(
    "learning_rate|min_lr|weight_decay|beta[12]|adam_eps|grad_clip|schedule|(decay|warmup)_.*|"
    "max_steps|max_tokens|num_epochs|stop_step|patience|(eval|log|save)_.*|keep_.*|device_batch_.*|"
    "attention_backend|dtype|compile.*|gradient_checkpointing|fsdp|zero1|deterministic|data|tracker|"
    "out_dir|checkpoint_prefix|dump_data_order"
)
SHARD = re.compile(r"train(_\d{5})?\.(bin|rows)")


def find(s):
    """-> the newest whole checkpoint in s.out_dir if s.resume, else None. SystemExit where another
    process writes there, where there is a checkpoint that a new run would overwrite, and where the
    run began with other keys or data than are given now (force_resume goes on with these)."""
    if s.dry_run or s.show_batch:
        return None
    taken = ""
    if get_rank() == 0:
        s.lock, taken = _lock(s.out_dir)
    if taken := _shared(taken):
        raise SystemExit(taken)
    last = latest_checkpoint(s.out_dir, getattr(s, "checkpoint_prefix", "step"))
    if last and not s.resume:
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    paths = [s.data] if isinstance(s.data, str) else s.data
    fingerprint = s.stream.fingerprint if s.stream else _fingerprint
    s.files = _shared(get_rank() == 0 and [fingerprint(path) for path in paths])
    if isinstance(s.data, dict):  # of another mixture the rows come otherwise
        s.files = [f"{s.data[path]} x {text}" for path, text in zip(paths, s.files)]
    if last:
        saved = _compare(last, s)
        if s.stream and saved["files"] == s.files:  # another one begins at its start
            s.stream.lanes[saved["step"]] = saved["lanes"]
    s.saved = last
    return last


def _compare(last, s):
    """Prints what has changed since the checkpoint -> what it saved. SystemExit where that may not
    change."""
    saved = _read_state(last)
    then = saved.get("config", {})  # none in those of earlier versions
    changed = [k for k in then if k in s.config and then[k] != s.config[k] and "resume" not in k]
    texts = {key: f"{key}={then[key]!r} -> {s.config[key]!r}" for key in changed}
    if saved.get("files", s.files) != s.files:
        texts["the data"] = f"data: {', '.join(saved['files'])} -> {', '.join(s.files)}"
    held = [text for key, text in texts.items() if not MAY_CHANGE.fullmatch(key)]
    if held and not s.force_resume:
        raise SystemExit(
            f"{last} began otherwise, {'; '.join(held)}: choose another out_dir, or go on with "
            "--force_resume=True"
        )
    if texts:
        print0(f"changed since {last}: {'; '.join(texts.values())}")
    return saved


def _fingerprint(path):
    """Of a data file, or all shards in a folder of tokens: the size, and the hash of samples."""
    paths, digest = [path], hashlib.sha256()
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        paths = [os.path.join(path, name) for name in names if SHARD.fullmatch(name)]
    n_bytes = hash_samples(digest, paths)
    return f"{n_bytes:,} bytes with sha256 {digest.hexdigest()[:16]}"


def hash_samples(digest, paths):
    """Updates the digest by 1,024 MiB of the files, or by all; of more files than that by something
    of each. -> the bytes of all."""
    sizes = [os.path.getsize(path) for path in paths]
    part = 2**30 // max(1024, len(paths))
    for path, size in zip(paths, sizes):
        with open(path, "rb") as f:
            for start in range(0, size, max(2**20, sum(sizes) // 1024)):
                f.seek(start)
                digest.update(f.read(part))
    return sum(sizes)


def _lock(out_dir):
    """-> (the lock file, held as long as it is open, and "" or why it is not held). The system lets
    go of it when the process ends, killed or not, so that what is left of one holds nobody up."""
    os.makedirs(out_dir, exist_ok=True)
    lock = open(os.path.join(out_dir, ".lock"), "a+", encoding="utf-8")
    try:
        import fcntl  # not on Windows

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        return None, f"{out_dir} is in use by {lock.read()}: wait, or choose another out_dir"
    except (ImportError, OSError) as e:
        print0(f"{out_dir} is not locked: {e}")  # a file system without locks
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock, ""


def _read_state(folder):  # mmap: the ranks of a host share the pages
    path = os.path.join(folder, "training_state.pt")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing: this checkpoint has no optimizer's state")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_moments(folder, optimizers, s):
    """A new run's optimizers begin with the state of a checkpoint of an earlier one."""
    state = _read_state(folder)
    if (then := state["config"].get("optimizer")) != s.optimizer:
        raise SystemExit(f"init_state=True: {folder} has {then}'s state, not {s.optimizer}'s")
    load_optimizer_state(optimizers, state["optimizers"])
    print0(f"the optimizer goes on from {folder}")


def load_state(last, optimizers):
    """-> (step, best) of a checkpoint, its optimizer state loaded; of a run that begins, too. best:
    the lowest evaluation loss so far, and the checkpoint that has it."""
    if not last:
        return 0, {"loss": math.inf, "folder": ""}
    state = _read_state(last)
    load_optimizer_state(optimizers, state["optimizers"])
    print0(f"resumed {last}, after step {state['step']}")
    return state["step"], state["best"]


def is_patience_over(s, step, best):
    """Is the lowest evaluation loss s.patience evaluations old? Says so before the run ends."""
    if not s.patience or not best["folder"]:
        return False
    age = (step - step_of(best["folder"])) / s.eval_interval
    if age >= s.patience:
        print0(f"no lower evaluation loss since {best['folder']}, {best['loss']:.4f}: the run ends")
    return age >= s.patience


@contextmanager
def saving(s, step, best, optimizers):
    """Around the code that writes the model of a checkpoint: gives its folder on rank 0, None on
    the others; adds the optimizers' state, publishes the folder and removes old ones. After a step
    that was skipped there is no folder and nothing is removed: the run may have diverged."""
    prefix = getattr(s, "checkpoint_prefix", "step")
    if step - 1 in s.skipped or s.saved == os.path.join(s.out_dir, f"{prefix}{step}"):
        if step == s.stop_step:
            good = f"--resume=True --stop_step={last_good(s, step - 1)}"
            raise SystemExit(f"the last step was skipped, so it is not saved; {good} ends before")
        print0(f"nothing new to save after step {step}")
        yield None
        return
    intervals = getattr(s, "keep_models", 0), getattr(s, "keep_states", 0)
    prune = s.out_dir, prefix, s.keep_last, *intervals, best["folder"] if s.keep_best else ""
    # A good step has followed those that are there, and may yet fail to follow this one. So older
    # ones go before it is written: one more than keep_last is there until the run ends.
    prune_checkpoints(*prune, s.saved or "")
    states = optimizer_state(optimizers)
    lanes = s.stream and all_reduce_sum(s.stream.lanes[step].flat, dist.ReduceOp.MAX)
    tmp = begin_checkpoint(s.out_dir, f"{prefix}{step}")
    try:
        yield tmp if s.rank == 0 else None
        if s.rank == 0:
            state = {"step": step, "best": best, "config": s.config, "files": s.files}
            state |= {"optimizers": states, "lanes": lanes}
            torch.save(state, os.path.join(tmp, "training_state.pt"))
    except (OSError, RuntimeError, SafetensorError) as e:  # a full disk has all of these names
        raise OSError(f"{tmp} could not be written, earlier checkpoints are whole: {e}") from e
    s.saved = commit_checkpoint(tmp)
    print0(f"saved {s.saved}")
    if step == s.stop_step:
        prune_checkpoints(*prune, s.saved)


# ---- folders ----


def _barrier():
    if dist.is_initialized():
        dist.barrier()


def _shared(value):
    """Rank 0's value, on all ranks."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _inspect(folder, check_hashes=False):
    """({file: [bytes, sha256]} by complete.json, why the folder is not whole or "")."""
    try:
        with open(os.path.join(folder, "complete.json"), encoding="utf-8") as f:
            files = dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        return {}, f"complete.json is missing or broken ({type(e).__name__})"
    for name, facts in files.items():
        size, digest = facts if isinstance(facts, list) else (facts, None)  # of earlier versions
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.isfile(path) else "no file"
        if found != size:
            return {}, f"{name} should have {size} bytes, found {found}"
        if check_hashes and digest and _hash(path) != digest:
            return {}, f"{name} is not what was saved, by its sha256"
    return files, ""


def _hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_complete(folder, files):
    path = os.path.join(folder, "complete.json")
    with open(path + ".new", "w", encoding="utf-8") as f:
        json.dump(files, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".new", path)


def _publish(tmp):
    """.tmp-step120 -> step120. Killed between the two calls it is found whole under .tmp- later."""
    out_dir, name = os.path.split(tmp)
    final = os.path.join(out_dir, name.removeprefix(".tmp-"))
    if get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
        link = os.path.join(out_dir, "final")  # a stable name for what was saved last
        try:
            with suppress(FileNotFoundError):  # of a save that was killed here
                os.remove(link + ".new")
            os.symlink(os.path.basename(final), link + ".new")
            os.replace(link + ".new", link)
        except OSError as e:  # no links here, or a folder of that name: the checkpoint is whole
            print0(f"{link} does not lead to {os.path.basename(final)}: {e.strerror}")
    return final


def _numbered(out_dir, prefix):
    """The folders out_dir/<prefix><number>, highest number first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    numbers = [int(n.removeprefix(prefix)) for n in names if re.fullmatch(prefix + r"\d+", n)]
    return [os.path.join(out_dir, f"{prefix}{n}") for n in sorted(numbers, reverse=True)]


def begin_checkpoint(out_dir, name):
    """-> the empty folder out_dir/.tmp-<name>, for rank 0 to fill."""
    tmp = os.path.join(out_dir, f".tmp-{name}")
    if get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
    _barrier()
    return tmp


def commit_checkpoint(tmp):
    """Syncs the files in begin_checkpoint's folder, lists them in complete.json and gives it its
    name. -> its path"""
    _barrier()  # every rank has written what it had to
    if get_rank() == 0:
        files = {}
        for path in (path for path in Path(tmp).rglob("*") if path.is_file()):
            with path.open("rb+") as f:
                os.fsync(f.fileno())
            files[path.relative_to(tmp).as_posix()] = path.stat().st_size, _hash(path)
        _write_complete(tmp, files)
    final = _publish(tmp)
    _barrier()
    return final


def latest_checkpoint(out_dir, prefix):
    """-> the newest whole out_dir/<prefix><number> that holds a training_state.pt, or None. Prints
    why it skips one. Rank 0 looks; all ranks get its answer."""
    found = None
    if get_rank() == 0:
        for tmp in _numbered(out_dir, f".tmp-{prefix}"):
            if not _inspect(tmp)[1]:
                _publish(tmp)
        for path in _numbered(out_dir, prefix):
            files, fault = _inspect(path, check_hashes=True)
            if "training_state.pt" in files:
                found = path
                break
            print0(f"checkpoint {path} skipped: {fault or 'a model only, no training_state.pt'}")
    return _shared(found)


def prune_checkpoints(out_dir, prefix, keep_last, keep_models, keep_states, *best):
    """Keeps the newest `keep_last` checkpoints (0: all), and `best` (paths or names); of the others
    those at multiples of keep_states steps, and at multiples of keep_models the model without
    training_state.pt (0: at none). Also removes what a killed save left, so not to be called within
    one."""
    if get_rank() == 0:
        for path in _numbered(out_dir, f".tmp-{prefix}"):
            shutil.rmtree(path)
        kept, best = 0, [os.path.basename(path) for path in best]
        for path in _numbered(out_dir, prefix) if keep_last else []:
            files, _ = _inspect(path)
            step = step_of(path)
            if kept < keep_last:
                kept += "training_state.pt" in files
            elif os.path.basename(path) in best or (keep_states and step % keep_states == 0):
                pass
            elif not keep_models or step % keep_models:
                shutil.rmtree(path)
            elif files.pop("training_state.pt", None) is not None:
                _write_complete(path, files)  # first: killed now, the model is whole
                os.remove(os.path.join(path, "training_state.pt"))
    _barrier()


# ---- full tensors of sharded ones ----


def _full(value):
    """On rank 0 the whole of a sharded tensor, on the CPU; None elsewhere. Collective."""
    if hasattr(value, "full_tensor"):  # a DTensor, whose module is slow to import
        value = value.full_tensor().clone()  # uneven shards: a view of padded storage otherwise
    if get_rank() != 0:
        return None
    return value.cpu() if torch.is_tensor(value) else value


def full_state_dict(module, prefix=""):
    """-> {name: CPU tensor} of a plain, compiled or fully_shard module, on rank 0; {} elsewhere.
    Collective. On the CPU they are the live tensors, not copies. prefix: a part of the module whose
    names go without it ("model."); other names stay."""
    state = {name: _full(tensor) for name, tensor in module.state_dict().items()}
    if get_rank() != 0:
        return {}
    return {k.replace("_orig_mod.", "").removeprefix(prefix): x for k, x in state.items()}


def optimizer_state(optimizers):
    """-> the optimizers' state_dicts with full CPU tensors, on rank 0; [] elsewhere. Collective.
    One format for plain, DDP, ZeroRedundancyOptimizer and fully_shard, at any number of ranks."""
    states = []
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer
            optimizer.consolidate_state_dict(to=0)
            if get_rank() != 0:
                continue
        saved = optimizer.state_dict()
        saved["state"] = {  # sorted: gathered in the same order on every rank
            i: {name: _full(value) for name, value in state.items()}
            for i, state in sorted(saved["state"].items())
        }
        states.append(saved)
    return states if get_rank() == 0 else []


def load_optimizer_state(optimizers, states):
    """Load optimizer_state's list, on every rank. The hyperparameters stay the script's own, so a
    key changed for the resumed run acts. ValueError if the parameter groups are other ones."""
    for optimizer, saved in zip(optimizers, states, strict=True):  # Muon's run has two
        now, then = optimizer.param_groups, saved["param_groups"]
        counts, found = ([len(group["params"]) for group in groups] for groups in (now, then))
        if found != counts:
            raise ValueError(f"{type(optimizer).__name__}: tensors per group {found}, not {counts}")
        params = [p for group in now for p in group["params"]]
        state = {
            i: {name: _shard_like(value, params[i]) for name, value in values.items()}
            for i, values in saved["state"].items()
        }
        groups = [{**a, "params": b["params"]} for a, b in zip(now, then)]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _shard_like(value, param):
    """This rank's part of a full tensor where the parameter is sharded. A step count stays."""
    if hasattr(param, "placements") and torch.is_tensor(value) and value.shape == param.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    return value
