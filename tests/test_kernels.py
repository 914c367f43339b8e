"""What runs on a GPU alone: attention kernels, compiled blocks, copies, tools/gpu_check.py. Here
CPU kernels stand in for torch's varlen attention; with CUDA the same test runs on the real ones."""

import inspect
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

import attention as A
import common
from attention import make_seqs
from model import from_scratch
from tools import gpu_check

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
A.varlen_attn = varlen_attn  # without a GPU it is not imported
# torch 2.11 may have no grouped heads there: choose_backend then takes another
GROUPED = {"enable_gqa": True} if "enable_gqa" in str(inspect.signature(A.varlen_attn)) else {}
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])


def probabilities(q, k, cu, causal, scale, window):
    """softmax of the scores, [H, T, T] over the whole row, 0 between texts. q, k [T, H, D] fp64."""
    i = torch.arange(len(q))
    text = torch.bucketize(i, cu[1:], right=True)  # [T], the number of each token's text
    left, right = (len(q) if w < 0 else w for w in window)
    seen = (text == text[:, None]) & (i >= i[:, None] - left) & (i <= i[:, None] + right)
    seen &= (i <= i[:, None]) | (not causal)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (scale or q.size(-1) ** -0.5)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """CPU kernels, a masked softmax in fp64, for torch's varlen attention: its op, the shapes that
    the compiler sees and autograd are then torch's own, as on a GPU."""
    from torch.nn.attention import varlen

    def wide(*tensors, heads):  # k and v get as many heads as q
        return (x.double().repeat_interleave(heads // x.size(1), 1) for x in tensors)

    def like(*pairs):  # new tensors in the layout that torch promises, too
        return tuple(torch.empty_like(x).copy_(value) for x, value in pairs)

    def forward(q, k, v, cu, _, max_q, max_k, causal=False, scale=None, window=(-1, -1), *more):
        assert max_q == max_k == cu.diff().max()
        wide_q, wide_k, wide_v = wide(q, k, v, heads=q.size(1))
        p = probabilities(wide_q, wide_k, cu, causal, scale, window)
        [out] = like((q, torch.einsum("hij,jhd->ihd", p, wide_v)))
        return out, torch.zeros(q.size(1), len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(
        d_out, q, k, v, out, lse, cu, _, max_q, max_k, causal, rng, scale=None, window=(), *more
    ):  # fmt: skip
        d_out, wide_q, wide_k, wide_v = wide(d_out, q, k, v, heads=q.size(1))
        p = probabilities(wide_q, wide_k, cu, causal, scale, window)
        dv = torch.einsum("hij,ihd->jhd", p, d_out)
        dp = torch.einsum("ihd,jhd->hij", d_out, wide_v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * (scale or q.size(-1) ** -0.5)
        dq, dk = torch.einsum("hij,jhd->ihd", ds, wide_k), torch.einsum("hij,ihd->jhd", ds, wide_q)
        dk, dv = (x.unflatten(1, (k.size(1), -1)).sum(2) for x in (dk, dv))  # sums over a group
        return like((q, dq), (k, dk), (v, dv))

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash_attn_varlen_func of flash-attn 2.x, by its signature."""
    seqs = make_seqs(cu_seqlens_q.diff().tolist())
    return A.sdpa_packed(q, k, v, seqs, causal, window_size, dropout_p)


def test_kernels_are_called_by_their_signatures(monkeypatch):
    if A.flash_attn_varlen_func:  # installed here
        names = inspect.signature(A.flash_attn_varlen_func).parameters
        assert list(names)[:8] == list(inspect.signature(flash_2).parameters)[:8]
        assert {"causal", "window_size", "deterministic"} <= set(names)
    monkeypatch.setattr(A, "flash_attn_varlen_func", flash_2)
    x = torch.randn(9, 4, 8)
    given = x, x, x, make_seqs([5, 4]), True, (2, 0), 0.0
    assert torch.equal(A.attention(*given, "flash_attn"), A.attention(*given))
    inspect.signature(A.varlen_attn).bind(*range(7), window_size=(-1, 0), **GROUPED)


SLOW_QWEN3 = pytest.param("qwen3-tiny", marks=pytest.mark.slow)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("size", ["modernbert-tiny", *[SLOW_QWEN3] * bool(GROUPED)])
def test_a_block_is_one_graph_whatever_the_lengths(size, device, varlen_on_cpu):
    """fullgraph: without a break. Training with checkpoints, and evaluation, against sdpa without
    a compiler; texts reach beyond the window of 64."""
    cuda, rng = device == "cuda", np.random.default_rng(0)
    rows = [rng.integers(1, 150, n).tolist() for n in (5, 3, 7)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    kinds, found = ["global", "local"] if size == "modernbert-tiny" else ["global"], {}
    model = from_scratch(size, out_dropout=0.0, n_layer=len(kinds), layer_kinds=kinds).to(device)
    for backend in ("sdpa", "varlen"):
        model.backend, found[backend] = backend, []
        model.gradient_checkpointing = backend == "varlen"
        for block in model.blocks if backend == "varlen" else ():
            block.compile(fullgraph=True, backend="inductor" if cuda else "aot_eager")
        for lengths in rows:
            tokens = torch.from_numpy(np.arange(sum(lengths)) * 7 % 8192).to(device)
            seqs, at = make_seqs(lengths, device), torch.arange(0, len(tokens), 3, device=device)
            limits = dict(recompile_limit=64, error_on_recompile=lengths is rows[-1])
            half = torch.autocast(device, torch.bfloat16, enabled=cuda)
            with torch._dynamo.config.patch(**limits), half:
                with torch.no_grad():
                    hidden = model.eval()(tokens, seqs)
                loss, _ = model.train()(tokens, seqs, at, tokens[at])
                loss.backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters()])
            found[backend].append((hidden, loss / len(at), grads))
            model.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8 * len(kinds) and not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    for plain, compiled in zip(*found.values(), strict=True):
        for a, b in zip(plain, compiled, strict=True):
            assert (a - b).norm() <= (0.05 if cuda else 1e-4) * a.norm()


def test_compile_raises_the_limit_past_which_blocks_would_run_uncompiled():
    blocks, s = [torch.nn.Linear(2, 2)], SimpleNamespace(compile=True, fsdp="", world_size=1)
    with torch._dynamo.config.patch(recompile_limit=8):
        common.wrap(blocks[0], blocks, s)
        assert torch._dynamo.config.recompile_limit >= 64


def test_keys_choose_the_compiler(monkeypatch):
    given, s = [], SimpleNamespace(compile=True, fsdp="", world_size=1)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: given.append(more))
    common.wrap(None, [torch.nn.Linear(2, 2)], s)
    s.compile_backend, s.compile_dynamic = "aot_eager", True
    common.wrap(None, [torch.nn.Linear(2, 2)], s)
    assert given[0] == dict(backend="inductor", dynamic=None)
    assert given[1] == dict(backend="aot_eager", dynamic=True)


def test_move_pins_what_a_gpu_copies_and_keeps_the_rest(monkeypatch):
    """Tensors of lists and dataclasses; lists of numbers stay as they are."""
    pinned, copies, seqs = [], [], make_seqs([2, 3])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: copies.append((*a, k)) or x.clone())
    moved, lengths = A.move([seqs, seqs.positions, None], "cuda:0"), seqs.lengths
    assert len(pinned) == 3 and copies == [("cuda:0", {"non_blocking": True})] * 3
    assert moved[0].lengths is lengths and moved[0].max_seqlen == 3 and moved[2] is None
    assert torch.equal(moved[0].positions, seqs.positions) and moved[1] is not seqs.positions
    A.move(seqs, "cpu")
    assert len(pinned) == 3 and copies[3:] == [("cpu", {})] * 2


@pytest.mark.slow
def test_gpu_check_goes_on_past_a_row_that_fails_and_names_the_open_ones(tmp_path, monkeypatch):
    def command(s, code):
        return {"figure": gpu_check.run(s, "-c", code).strip()}

    rows = [
        gpu_check.Row("broken", 30, partial(command, code="raise ValueError('a | b')"), True),
        gpu_check.Row("endless", 2, partial(command, code="import time; time.sleep(99)"), True),
        gpu_check.Row("absent", 30, None, True, needs="no_such_package"),
        *(row for row in gpu_check.ROWS if row.name in ("verify Qwen3", "bench mlm")),
        gpu_check.Row("other", 30, None, True)]  # fmt: skip
    monkeypatch.setattr(gpu_check, "ROWS", rows)
    argv = [f"--out_dir={tmp_path}", "--only=broken,endless,absent,verify,bench"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *argv])
    assert gpu_check.main()  # one failed
    found = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    verdicts = {name: row["verdict"] for name, row in found.items()}
    assert verdicts == {"broken": "FAIL", "endless": "FAIL", "absent": "open",
                        "verify Qwen3": "pass", "bench mlm": "open"}  # fmt: skip
    assert "ValueError: a | b" in found["broken"]["figure"] and "time" in found["endless"]["figure"]
    assert found["endless"]["seconds"] < 20 and "0 failed" in found["verify Qwen3"]["figure"]
    report = (tmp_path / "report.md").read_text()
    assert "Still open: absent; bench mlm" in report and report.count("\n| ") == 7
