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
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import transformers

import common
from attention import BACKENDS, attention, choose_backend, make_seqs
from embedder import Embedder
from formats import modeling_neobert
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


@dataclass
class Case:
    """What the checks look at: a model, its folder, and texts of random tokens."""

    net: Transformer
    folder: str
    texts: list[torch.Tensor]  # [n] each
    hidden: list[torch.Tensor]  # [n, C] each


# ---- texts and comparisons ----


def random_texts(c, device):
    """Ragged, two equal neighbours, one longer than the local window."""
    # a window of thousands (Mistral) would cost minutes here; `backend_agrees` reaches it
    longest = c.window + 16 if 0 < c.window <= 256 else 80
    lengths = [min(n, c.max_seq_len) for n in (8, 12, 12, longest, 1, 5)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.vocab_size, (sum(lengths),), generator=generator)
    return tokens.to(device).split(lengths)


def states(net, texts):
    """Hidden states [n, C] of each text, in one packed row."""
    lengths = [len(text) for text in texts]
    return net(torch.cat(texts), make_seqs(lengths, texts[0].device)).split(lengths)


def moves(case, texts):
    """How far each hidden state moves if the texts become these: [n] of each."""
    pairs = zip(states(case.net, texts), case.hidden)
    return [(changed - before).abs().amax(-1) for changed, before in pairs]


def outputs(net, texts):
    """Logits [T, V], or hidden states [T, C] of a model without a head."""
    hidden = torch.cat(states(net, texts))
    return hidden if net.config.head == "none" else net.logits(hidden)


def compare(found, expected):
    """(whether they are equal within TOLERANCE, the largest difference); NaN is never equal."""
    difference, size = (found - expected).abs().max().item(), expected.abs().max().item()
    limit = TOLERANCE * size
    figure = f"{difference:.1e} apart, values up to {size:.3g} (tolerance {limit:.1e})"
    return difference <= limit, figure


# ---- the checks: each returns (True, False or None for skipped, the figure) ----


def equals_transformers(case, folder=None):
    """transformers' model of the folder, in fp32, on each text alone: no padding could hide or make
    a difference."""
    c = case.net.config
    # not the code that a folder carries: it could do anything
    library = modeling_neobert if c.family == "neobert" else transformers
    cls = getattr(library, ARCHITECTURES[c.family][c.head == "none"])
    model, info = cls.from_pretrained(
        folder or case.folder, dtype=torch.float32, attn_implementation="sdpa",
        output_loading_info=True,
    )  # fmt: skip
    if info["missing_keys"]:  # it would make them up
        return False, f"transformers finds no {', '.join(sorted(info['missing_keys']))}"
    model.to(case.texts[0].device).eval()
    # logits, or the last hidden state of a model without a head; the mask is all ones
    expected = [model(text[None], torch.ones_like(text[None]))[0][0] for text in case.texts]
    ok, figure = compare(outputs(case.net, case.texts), torch.cat(expected))  # [T, V or C]
    if max(map(len, case.texts)) <= c.window:
        figure += f"; no text reaches the window of {c.window} tokens"
    return ok, figure


def direction(case):
    """Another last token in each text: what do the hidden states before it know of that?"""
    c = case.net.config
    changed = [torch.cat((text[:-1], (text[-1:] + 1) % c.vocab_size)) for text in case.texts]
    moved = moves(case, changed)
    if not all(text[-1] > 0 for text in moved):
        return False, "a text's last hidden state does not depend on its last token"
    if c.causal:
        largest = torch.cat([text[:-1] for text in moved]).max().item()
        return largest == 0, f"another last token moves the states before it by {largest:.1e}"
    # the first state, or where all layers are local the first that sees the end through one layer
    longest = max(map(len, moved))
    reach = longest if "global" in c.layer_kinds else c.window
    least = min(text[-1 - min(len(text) - 1, reach)].item() for text in moved)
    at = "first" if reach >= longest else f"{reach}th last"
    return least > 0, f"another last token moves the {at} state by {least:.1e} and more"


def packed_equals_alone(case):
    alone = [states(case.net, [text])[0] for text in case.texts]
    return compare(torch.cat(case.hidden), torch.cat(alone))


def isolation(case):
    """Other tokens in every second text; the texts between them must not notice."""
    moved, vocab_size = [], case.net.config.vocab_size
    for odd in (0, 1):
        texts = list(case.texts)
        texts[odd::2] = [(text + 1) % vocab_size for text in texts[odd::2]]
        largest = [text.max().item() for text in moves(case, texts)]
        if not min(largest[odd::2]) > 0:
            return False, "a text does not depend on its own tokens"
        moved += largest[1 - odd :: 2]
    figure = f"{len(moved)} texts move by up to {max(moved):.1e} with their neighbours"
    return all(x == 0 for x in moved), figure


def masked_softmax(q, k, v, causal, window):
    """Attention over the whole square of one text, in fp64. q [n, H, D], k and v [n, H_kv, D]."""
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))
    left, right = (len(q) if w < 0 else w for w in window)
    seen = (j >= i - left) & (j <= i + right) & ((j <= i) | (not causal))  # [n, n]
    q, k, v = (x.cpu().double().transpose(0, 1)[None] for x in (q, k, v))  # [1, H, n, D]
    out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    return out[0].transpose(0, 1)


def backend_agrees(case, backend):
    """Its attention against masked_softmax, with each kind of layer's own mask; and where it is
    another one than sdpa, the whole model against sdpa's, in bf16."""
    net, c, device = case.net, case.net.config, case.texts[0].device
    dtype, tolerance = (torch.float32, 1e-5) if backend == "sdpa" else (torch.bfloat16, 1e-2)
    try:
        gqa = c.n_head != c.n_kv_head
        choose_backend(backend, device, dtype, gqa=gqa, head_dim=c.head_dim)
    except ValueError as error:
        return None, str(error).partition("cannot run: ")[2]
    beyond = min(c.window, 4096) + 100  # longer than the window, and than a block of queries
    lengths, n_kv = [7, 300, 300, 1, beyond], min(c.n_kv_head, 2)
    n_head = n_kv * (c.n_head // c.n_kv_head)  # all heads alike: two groups of them will do
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), n_head + 2 * n_kv, c.head_dim, generator=generator)
    qkv = qkv.to(device, dtype).split((n_head, n_kv, n_kv), dim=1)
    texts = list(zip(*(x.split(lengths) for x in qkv)))
    errors, windows = [], list({block.attn.window for block in net.blocks})
    for window in windows:
        expected = torch.cat([masked_softmax(*text, c.causal, window) for text in texts])
        found = attention(*qkv, make_seqs(lengths, device), c.causal, window, 0.0, backend)
        errors.append((found.cpu() - expected).abs().max() / expected.abs().max())
    worst = torch.stack(errors).max().item()  # NaN if there is one
    figure = f"{worst:.1e} of the largest value from a masked softmax, windows {windows}"
    if backend == "sdpa":
        return worst <= tolerance, figure

    hidden = []
    for net.backend in (backend, "sdpa"):
        with torch.autocast(device.type, dtype):
            hidden.append(torch.cat(states(net, case.texts)).float())
    apart = ((hidden[0] - hidden[1]).norm() / hidden[1].norm()).item()
    ok = worst <= tolerance and apart < 0.03
    return ok, f"{figure}; the model, {apart:.1%} from sdpa's (3%)"


def save_and_reload(case):
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(case.net, folder)
        again = from_pretrained(folder).to(case.texts[0].device).eval()
        before, after, none = case.net.state_dict(), again.state_dict(), torch.empty(0)
        names = sorted(before | after)
        wrong = [k for k in names if not torch.equal(before.get(k, none), after.get(k, none))]
        if wrong:
            return False, f"{len(wrong)} tensors are not as saved: {', '.join(wrong[:3])}"
        if not torch.equal(outputs(again, case.texts), outputs(case.net, case.texts)):
            return False, "the same weights, other outputs: config.json lost something"
        del again, after
        ok, figure = equals_transformers(case, folder)
    same = f"{len(names)} tensors and the outputs are bit-equal; transformers: {figure}"
    return ok is not False, same


def has(case, *names):
    return any(os.path.exists(f"{case.folder}/{name}") for name in names)


def tokenizer_fits(case):
    if not has(case, "tokenizer.json", "tokenizer_config.json"):
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
    modules = has(case, "modules.json")
    if not has(case, "modules.json", "nanoembed.json"):
        return None, "no embedder's folder"
    with contextlib.redirect_stdout(io.StringIO()):
        embedder = Embedder.load(case.folder, device="cpu", dtype="fp32")
    if embedder.doc_max_length:
        return None, "texts are read as by LLM2Vec"
    embedder.max_length = embedder.max_length if modules else 10**9
    plain = transformers.AutoTokenizer.from_pretrained(case.folder)
    suffix = "" if modules else embedder.template.suffix
    instructions = set(embedder.prompts.values())
    for instruction, text in itertools.product(instructions, PROBES):
        joined = embedder.template.head(instruction) + text + suffix
        ids = plain(joined, truncation=modules, max_length=embedder.max_length)["input_ids"]
        if ids != embedder.tokenize([text], instruction)[0][0]:
            return False, f"{joined!r} has other ids by transformers"
    return True, f"{len(PROBES)} texts, each with {len(instructions)} instructions"


def attempt(function, *inputs):
    """What it returns, or (False, its error): the other checks still tell something."""
    try:
        return function(*inputs)
    except Exception as error:
        return False, " ".join(f"{type(error).__name__}: {error}".split())


def read(name, device):
    folder = resolve_folder(name)
    net = from_pretrained(folder).to(device).eval()
    texts = random_texts(net.config, device)
    return Case(net, folder, texts, states(net, texts)), None


@torch.no_grad()
def check(name, device):
    """Yields (check, True, False or None for skipped, the figure), each as soon as it is known."""
    case, error = attempt(read, name, device)
    read_all = f"none missing or left over: {case.net.describe()}" if case else error
    yield "the weights are read", bool(case), read_all
    if not case:
        return
    c = case.net.config
    checks = {
        f"{'hidden states' if c.head == 'none' else 'logits'} equal transformers'":
            equals_transformers,
        f"{'causal' if c.causal else 'bidirectional'}, truly": direction,
        "packed = each text alone": packed_equals_alone,
        "no text sees another": isolation,
        **{f"attention: {b}": partial(backend_agrees, backend=b) for b in reversed(BACKENDS)},
        "save -> reload": save_and_reload,
        "tokenizer": tokenizer_fits,
        "training ids = encode ids": same_ids,
    }  # fmt: skip
    for title, function in checks.items():
        yield title, *attempt(function, case)


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
