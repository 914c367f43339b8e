"""
One minute of trust in a model folder, on this machine.

    python -m tools.verify out/mlm_pydocs_tiny
    python -m tools.verify owner/name@revision

A line for each check: PASS, FAIL or skipped, and the figure behind it. The exit code is 1 if one
failed. The texts are random tokens, few and short: what can go wrong in the code shows on any. On
two CPU cores a model of 150M weights takes 10 seconds, one of 1B a minute or two.
"""

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import transformers

import common
from attention import attention, choose_backend, make_seqs
from embedder import Embedder
from formats.huggingface import ARCHITECTURES, from_pretrained, resolve_folder, save_pretrained
from model import Transformer
from tokenizer import check_tokenizer, load_tokenizer

# Of the largest number that is compared. Two fp32 implementations differ by the rounding of their
# largest numbers, about 1e-6 of them; a wrong mask or a wrong weight by more than 1e-3.
TOLERANCE = 1e-4

# Ordinary text, code, accents and other scripts, runs of space.
PROBES = [
    "Return the number of items in the list.",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'",
    "na\xefve caf\xe9, \u041f\u0440\u0438\u0432\u0435\u0442, \u4f60\u597d",
    "a  b   c, 12345 and 3.14e-10",
]


NOT_THERE = "NeoBERT is not in transformers; the code published with it is not run here"


@dataclass
class Case:
    """What the checks look at."""

    net: Transformer
    folder: str
    tokens: torch.Tensor  # [T]
    lengths: list[int]
    hidden: torch.Tensor  # [T, C]


# ---- texts and comparisons ----


def random_texts(c, device):
    """(tokens [T], lengths): ragged, two equal neighbours, one longer than the local window."""
    # a window of thousands (Mistral) would cost minutes here; `backend_agrees` reaches it
    longest = c.window + 16 if 0 < c.window <= 256 else 80
    lengths = [min(n, c.max_seq_len) for n in (8, 12, 12, longest, 1, 5)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.vocab_size, (sum(lengths),), generator=generator)
    return tokens.to(device), lengths


def states(net, tokens, lengths):
    """Hidden states [T, C] of a packed row."""
    return net(tokens, make_seqs(lengths, tokens.device))


def outputs(net, tokens, lengths):
    """Logits [T, V], or hidden states [T, C] of a model without a head."""
    hidden = states(net, tokens, lengths)
    return hidden if net.config.head == "none" else net.logits(hidden)


def compare(found, expected):
    """(whether they are equal within TOLERANCE, the largest difference); NaN is never equal."""
    difference, size = (found - expected).abs().max().item(), expected.abs().max().item()
    limit = TOLERANCE * size
    figure = f"{difference:.1e} apart, values up to {size:.3g} (tolerance {limit:.1e})"
    return difference <= limit, figure


def transformers_outputs(case, folder):
    """`outputs` of transformers' model of the folder, in fp32, on each text alone: no padding could
    hide or make a difference. ValueError where it would make up missing weights."""
    c = case.net.config
    cls = getattr(transformers, ARCHITECTURES[c.family][c.head == "none"])
    model, info = cls.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"transformers finds no {', '.join(sorted(info['missing_keys']))}")
    model.to(case.tokens.device).eval()
    texts = [text[None] for text in case.tokens.split(case.lengths)]  # [1, n] each
    out = [model(input_ids=text, attention_mask=torch.ones_like(text)) for text in texts]
    field = "last_hidden_state" if c.head == "none" else "logits"
    return torch.cat([one[field][0] for one in out])  # [T, V or C]


# ---- the checks: each returns (True, False or None for skipped, the figure) ----


def equals_transformers(case):
    c = case.net.config
    if c.family == "neobert":
        return None, NOT_THERE
    expected = transformers_outputs(case, case.folder)
    ok, figure = compare(outputs(case.net, case.tokens, case.lengths), expected)
    if max(case.lengths) <= c.window:
        figure += f"; no text reaches the window of {c.window} tokens"
    return ok, figure


def direction(case):
    """Another last token in each text: what do the hidden states before it know of that?"""
    c, lengths, changed = case.net.config, case.lengths, case.tokens.clone()
    ends = torch.tensor(lengths).cumsum(0) - 1
    changed[ends] = (changed[ends] + 1) % c.vocab_size
    moved = (states(case.net, changed, lengths) - case.hidden).abs().amax(-1).cpu()  # [T]
    if not moved[ends].min() > 0:
        return False, "a text's last hidden state does not depend on its last token"
    if c.causal:
        moved[ends] = 0
        largest = moved.max().item()
        if largest:
            return False, f"states before the last token move by {largest:.1e} when it changes"
        return True, f"{len(moved) - len(ends)} states before the last token are bit-equal"
    # the first state, or where all layers are local the first that sees the end through one layer
    reach = max(lengths) if "global" in c.layer_kinds else c.window
    moves = {}  # length -> the least move of such texts
    for n, end in zip(lengths, ends.tolist(), strict=True):
        moves[n] = min(moves.get(n, math.inf), moved[end - min(n - 1, reach)].item())
    shown = ", ".join(f"{moves[n]:.1e} in {n} tokens" for n in (lengths[0], max(lengths)))
    at = "first" if reach >= max(lengths) else f"{reach}th last"
    return min(moves.values()) > 0, f"another last token moves the {at} state by {shown}"


def packed_equals_alone(case):
    texts = case.tokens.split(case.lengths)
    return compare(case.hidden, torch.cat([states(case.net, text, [len(text)]) for text in texts]))


def isolation(case):
    """Other tokens in every second text; the texts between them must not notice."""
    noticed, lengths = [], case.lengths
    for odd in (0, 1):
        texts = list(case.tokens.split(lengths))
        texts[odd::2] = [(text + 1) % case.net.config.vocab_size for text in texts[odd::2]]
        changed = states(case.net, torch.cat(texts), lengths).split(lengths)
        for i, (after, before) in enumerate(zip(changed, case.hidden.split(lengths), strict=True)):
            same = torch.equal(after, before)
            if i % 2 == odd and same:
                return False, f"text {i} does not depend on its own tokens"
            if i % 2 != odd and not same:
                noticed.append((after - before).abs().max().item())
    if noticed:
        return False, f"{len(noticed)} texts move by up to {max(noticed):.1e} with their neighbours"
    return True, f"{len(lengths)} texts are bit-equal whatever their neighbours are"


def masked_softmax(q, k, v, causal, window):
    """Attention over one text by its definition. q [n, H, D], k and v [n, H_kv, D], in fp64."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))[None, :]
    left, right = (len(q) if w < 0 else w for w in window)
    hidden = (j < i - left) | (j > i + right) | (causal & (j > i))  # [n, n]
    out = torch.empty_like(q)
    for h in range(q.size(1)):
        kv = h * k.size(1) // q.size(1)  # neighbouring heads share k and v
        scores = q[:, h] @ k[:, kv].T / math.sqrt(q.size(2))  # [n, n]
        out[:, h] = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, kv]
    return out


def backend_agrees(case, backend):
    """Its attention against masked_softmax, with each kind of layer's own mask; and where it is
    another one than sdpa, the whole model against sdpa's, in bf16."""
    net, c, device = case.net, case.net.config, case.tokens.device
    dtype, tolerance = (torch.float32, 1e-5) if backend == "sdpa" else (torch.bfloat16, 1e-2)
    try:
        choose_backend(backend, device, dtype, gqa=c.n_head != c.n_kv_head)
    except ValueError as error:
        return None, str(error).partition("cannot run: ")[2]
    masks = list(dict.fromkeys((c.causal, block.attn.window) for block in net.blocks))
    beyond = min(c.window, 4096) + 100  # longer than the window, and than a block of queries
    lengths, n_kv = [7, 300, 300, 1, beyond], min(c.n_kv_head, 2)
    n_head = n_kv * (c.n_head // c.n_kv_head)  # all heads alike: two groups of them will do
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), n, c.head_dim, generator=generator).to(device, dtype)
        for n in (n_head, n_kv, n_kv)
    )
    texts = list(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True))
    ok, worst = True, 0.0
    for causal, window in masks:
        expected = torch.cat([masked_softmax(*text, causal, window) for text in texts])
        found = attention(q, k, v, make_seqs(lengths, device), causal, window, 0.0, backend)
        difference = (found.cpu().double() - expected).abs().max().item()
        ok &= difference <= tolerance * expected.abs().max().item()
        worst = max(worst, difference)
    shown = ", ".join(f"{'causal ' if causal else ''}{window}" for causal, window in masks)
    figure = f"largest difference {worst:.1e} from a masked softmax, windows {shown}"
    if backend == "sdpa":
        return ok, figure

    hidden = {}
    for net.backend in (backend, "sdpa"):
        with torch.autocast(device.type, dtype):
            hidden[net.backend] = states(net, case.tokens, case.lengths).float()
    apart = ((hidden[backend] - hidden["sdpa"]).norm() / hidden["sdpa"].norm()).item()
    return ok and apart < 0.03, f"{figure}; the model, {apart:.1%} from sdpa's (3%)"


def save_and_reload(case):
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(case.net, folder)
        again = from_pretrained(folder).to(case.tokens.device).eval()
        before, after = case.net.state_dict(), again.state_dict()
        wrong = before.keys() ^ after.keys()
        wrong |= {k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])}
        if wrong:
            return False, f"{len(wrong)} tensors are not as saved: {', '.join(sorted(wrong)[:3])}"
        found = outputs(case.net, case.tokens, case.lengths)
        if not torch.equal(outputs(again, case.tokens, case.lengths), found):
            return False, "the same weights, other outputs: config.json lost something"
        del again, after
        bits = f"{len(before)} tensors and the outputs are bit-equal; transformers: "
        if case.net.config.family == "neobert":
            return True, bits + "skipped, " + NOT_THERE.partition(";")[0]
        ok, figure = compare(found, transformers_outputs(case, folder))
        return ok, bits + figure


def tokenizer_fits(case):
    files = ("tokenizer.json", "tokenizer_config.json")
    if not any(os.path.exists(os.path.join(case.folder, name)) for name in files):
        return None, "there is no tokenizer in the folder"
    tokenizer, vocab_size = load_tokenizer(case.folder), case.net.config.vocab_size
    check_tokenizer(tokenizer, vocab_size)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        again = load_tokenizer(saved)
    exact = True
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer(decoded, add_special_tokens=False)["input_ids"] != ids:
            return False, f"{text!r} is decoded as {decoded!r}, which has other ids"
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            return False, f"{text!r} has other ids after saving and loading the tokenizer"
        exact &= decoded == text
    return True, (
        f"{len(PROBES)} texts come back from their ids {'exactly' if exact else '(normalized)'}, "
        f"the vocabulary of {len(tokenizer):,} fits the model's {vocab_size:,}"
    )


def same_ids(case):
    """An embedder's ids, by which it was trained, are those of the folder's plain tokenizer."""
    # for sentence-transformers the suffix is in the post-processor, which keeps it in cut texts;
    # other tokenizers get it as text, and whole
    modules, ours = (
        os.path.exists(os.path.join(case.folder, name))
        for name in ("modules.json", "nanoembed.json")
    )
    if not (modules or ours):
        return None, "no embedder's folder"
    with contextlib.redirect_stdout(io.StringIO()):
        embedder = Embedder.load(case.folder, device="cpu", dtype="fp32")
    embedder.max_length = embedder.max_length if modules else 10**9
    plain = transformers.AutoTokenizer.from_pretrained(case.folder)
    template, instructions = embedder.template, sorted(set(embedder.prompts.values()))
    for instruction in instructions:
        for text in PROBES:
            joined = template.prefix + instruction + text + ("" if modules else template.suffix)
            ids = plain(joined, truncation=modules, max_length=embedder.max_length)["input_ids"]
            if ids != embedder.tokenize([text], instruction)[0][0]:
                return False, f"{joined!r} has other ids by transformers"
    return True, f"{len(PROBES)} texts, each with {len(instructions)} instructions"


@torch.no_grad()
def check(name, device):
    """Yields (check, True, False or None for skipped, the figure), each as soon as it is known."""
    try:
        folder = resolve_folder(name)
        if not os.path.exists(os.path.join(folder, "config.json")):
            raise FileNotFoundError(
                f"no config.json in {folder}: expected a model, such as the step500 of a run (an "
                "adapter is none: it goes with a base)"
            )
        net = from_pretrained(folder).to(device).eval()
    except Exception as error:
        yield "the weights are read", False, in_one_line(error)
        return
    c, n = net.config, sum(p.numel() for p in net.parameters())
    kind = "causal" if c.causal else "bidirectional"
    about = f"{c.family}, {kind}, {c.n_layer} layers, {n / 1e6:.1f}M weights"
    yield "the weights are read", True, f"{about}; none missing or left over"
    tokens, lengths = random_texts(c, device)
    case = Case(net, folder, tokens, lengths, states(net, tokens, lengths))
    what = "hidden states" if c.head == "none" else "logits"
    checks = {
        f"{what} equal transformers'": equals_transformers,
        f"{kind}, truly": direction,
        "packed = each text alone": packed_equals_alone,
        "no text sees another": isolation,
        "attention: sdpa": partial(backend_agrees, backend="sdpa"),
        "attention: varlen": partial(backend_agrees, backend="varlen"),
        "attention: flash_attn": partial(backend_agrees, backend="flash_attn"),
        "save -> reload": save_and_reload,
        "tokenizer": tokenizer_fits,
        "training ids = encode ids": same_ids,
    }
    for title, function in checks.items():
        try:
            ok, figure = function(case)
        except Exception as error:  # whatever it is, it is no pass; the other checks still tell
            ok, figure = False, in_one_line(error)
        yield title, ok, figure


def in_one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def main(name):
    """Prints the checks of a model folder or hub id; 1 if any failed, else 0."""
    transformers.logging.set_verbosity_error()  # what it has to say is in the checks
    transformers.logging.disable_progress_bar()
    device, start = common.setup_distributed()[3], time.perf_counter()
    print(f"{name} on {device}, fp32, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    words, counts = {True: "PASS", False: "FAIL", None: "skipped"}, Counter()
    for title, ok, figure in check(name, device):
        counts[ok] += 1
        print(f"{words[ok]:<8} {title:<27} {figure}", flush=True)
    print(f"{counts[True]} passed, {counts[False]} failed, {counts[None]} skipped in "
          f"{common.format_time(time.perf_counter() - start)}")  # fmt: skip
    return int(counts[False] > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder, or a hub id owner/name[@revision]")
    sys.exit(main(parser.parse_args().model))
