"""
Checkpoints: whole or not there, whenever a run is killed.

out_dir/step120/ is a folder of the ecosystem (a model, an embedder or an adapter), with
training_state.pt for resuming and complete.json ({file: bytes} of all others), written last.
out_dir/final leads to the newest one.

    last = find(s)                                      # what --resume=True goes on from, or None
    step, best = load_state(last, optimizers)
    with saving(s, step, best, optimizers) as folder:   # on all ranks
        if folder:                                      # on rank 0
            ...                                         # write the model there
"""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from common import get_rank, print0


def find(s, prefix="step"):
    """-> the newest whole checkpoint in s.out_dir if s.resume, else None. SystemExit where there is
    one that a new run would overwrite."""
    last = None if s.dry_run else latest_checkpoint(s.out_dir, prefix)
    if last and not s.resume:
        raise SystemExit(f"{last} exists: --resume=True goes on, or choose another out_dir")
    return last


def load_state(last, optimizers):
    """-> (step, best) of a checkpoint, its optimizer state loaded; of a run that begins, too. best:
    the lowest evaluation loss so far, and the checkpoint that has it."""
    if not last:
        return 0, {"loss": math.inf, "folder": ""}
    path = os.path.join(last, "training_state.pt")  # mmap: the ranks of a host share the pages
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    load_optimizer_state(optimizers, state["optimizers"])
    print0(f"resumed {last}, after step {state['step']}")
    return state["step"], state["best"]


def is_patience_over(s, step, best):
    """Is the lowest evaluation loss s.patience evaluations old? Says so before the run ends."""
    if not s.patience or not best["folder"]:
        return False
    age = (step - int(re.search(r"\d+$", best["folder"])[0])) / s.eval_interval
    if age >= s.patience:
        print0(f"no lower evaluation loss since {best['folder']}, {best['loss']:.4f}: the run ends")
    return age >= s.patience


@contextmanager
def saving(s, step, best, optimizers, prefix="step", keep_models=False):
    """Around the code that writes the model of a checkpoint: gives its folder on rank 0, None on
    the others; adds the optimizers' state, publishes the folder and removes old ones."""
    states = optimizer_state(optimizers)
    tmp = begin_checkpoint(s.out_dir, f"{prefix}{step}")
    yield tmp if s.rank == 0 else None
    if s.rank == 0:
        state = {"step": step, "best": best, "optimizers": states}
        torch.save(state, os.path.join(tmp, "training_state.pt"))
    print0(f"saved {commit_checkpoint(tmp)}")
    kept = best["folder"] if s.keep_best else ""
    prune_checkpoints(s.out_dir, prefix, s.keep_last, keep_models, kept)


# ---- folders ----


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
        sizes = {}
        for path in (path for path in Path(tmp).rglob("*") if path.is_file()):
            with path.open("rb+") as f:
                os.fsync(f.fileno())
            sizes[path.relative_to(tmp).as_posix()] = path.stat().st_size
        _write_sizes(tmp, sizes)
    final = _publish(tmp)
    _barrier()
    return final


def latest_checkpoint(out_dir, prefix):
    """-> the newest whole out_dir/<prefix><number> that holds a training_state.pt, or None. Prints
    why it skips one. Rank 0 looks; all ranks get its answer."""
    found = [None]
    if get_rank() == 0:
        for tmp in _numbered(out_dir, f".tmp-{prefix}"):
            if not _inspect(tmp)[1]:
                _publish(tmp)
        for path in _numbered(out_dir, prefix):
            sizes, fault = _inspect(path)
            if "training_state.pt" in sizes:
                found = [path]
                break
            print0(f"checkpoint {path} skipped: {fault or 'a model only, no training_state.pt'}")
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def prune_checkpoints(out_dir, prefix, keep_last, keep_models, best=""):
    """Keeps the newest `keep_last` checkpoints (0: all), and `best` (a path or name); of the others
    nothing, or with keep_models the model without training_state.pt. Also removes what a killed
    save left, so call it after a commit."""
    if get_rank() == 0:
        for path in _numbered(out_dir, f".tmp-{prefix}"):
            shutil.rmtree(path)
        kept = 0
        for path in _numbered(out_dir, prefix) if keep_last else []:
            sizes, _ = _inspect(path)
            if kept < keep_last:
                kept += "training_state.pt" in sizes
            elif os.path.basename(path) == os.path.basename(best):
                pass
            elif not keep_models:
                shutil.rmtree(path)
            elif sizes.pop("training_state.pt", None) is not None:
                _write_sizes(path, sizes)  # first: killed before the next line, the model is whole
                os.remove(os.path.join(path, "training_state.pt"))
    _barrier()


# ---- full tensors of sharded ones ----


def _full(value):
    """On rank 0 the whole of a sharded tensor, on the CPU; None elsewhere. Collective."""
    if isinstance(value, DTensor):
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
    if isinstance(param, DTensor) and torch.is_tensor(value) and value.shape == param.shape:
        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    return value
