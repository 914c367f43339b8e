"""
One minute of trust in a model folder, on this machine.

    python verify.py out/mlm_pydocs_tiny
    python verify.py owner/name@revision

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

import torch

import common
import model as M
from data import check_tokenizer, load_tokenizer, make_seqs
from embedder import Embedder

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


# ---- texts and comparisons ----


def random_texts(c, device):
    """(tokens [T], lengths): ragged, two equal neighbours, one longer than the local window."""
    # a window of thousands (Mistral) would cost minutes here; `backend_agrees` reaches it
    longest = c.window + 16 if 0 < c.window <= 256 else 80
    lengths = [min(n, c.max_seq_len) for n in (8, 12, 12, longest, 1, 5)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.vocab_size, (sum(lengths),), generator=generator)
    return tokens.to(device), lengths


def outputs(net, tokens, lengths):
    """Logits [T, V], or hidden states [T, C] of a model without a head."""
    rows = None if net.config.head == "none" else torch.arange(len(tokens), device=tokens.device)
    return net(tokens, make_seqs(lengths, tokens.device), rows)


def compare(got, want):
    """(whether they are equal within TOLERANCE, the largest difference); NaN is never equal."""
    difference, size = (got - want).abs().max().item(), want.abs().max().item()
    limit = TOLERANCE * size
    return (
        difference <= limit,
        f"{difference:.1e} apart, values up to {size:.3g} (tolerance {limit:.1e})",
    )


def load_theirs(net, folder):
    """transformers' model of a folder, fp32. ValueError where it would make up missing weights."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    c = net.config
    name = M.ARCHITECTURES[c.family][c.head == "none"]
    kinds = {"CausalLM": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM}
    auto = next((kind for end, kind in kinds.items() if name.endswith(end)), AutoModel)
    theirs, info = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"transformers finds no {', '.join(sorted(info['missing_keys']))}")
    if type(theirs).__name__ != name:
        raise ValueError(f"transformers makes it a {type(theirs).__name__}, expected {name}")
    return theirs.to(net.embed.weight.device).eval()


def their_outputs(theirs, tokens, lengths):
    """Each text alone: no padding that could hide or make a difference."""
    out = []
    for text in tokens.split(lengths):
        got = theirs(input_ids=text[None], attention_mask=torch.ones_like(text[None]))
        out.append(got["logits" if "logits" in got else "last_hidden_state"][0])
    return torch.cat(out)  # [T, V or C]


NOT_THERE = "NeoBERT is not in transformers; the code published with it is not run here"


# ---- the checks: each returns (True, False or None for skipped, the figure) ----


def equals_transformers(net, folder, tokens, lengths):
    if net.config.family == "neobert":
        return None, NOT_THERE
    want = their_outputs(load_theirs(net, folder), tokens, lengths)
    ok, figures = compare(outputs(net, tokens, lengths), want)
    if max(lengths) <= net.config.window:
        figures += f"; no text reaches the window of {net.config.window} tokens"
    return ok, figures


def direction(net, tokens, lengths, hidden):
    """Another last token in each text: what do the hidden states before it know of that?"""
    c, ends = net.config, torch.tensor(lengths).cumsum(0) - 1
    other = tokens.clone()
    other[ends] = (other[ends] + 1) % c.vocab_size
    moved = (net(other, make_seqs(lengths, tokens.device)) - hidden).abs().amax(-1)  # [T]
    if not moved[ends].min() > 0:
        return False, "a text's last hidden state does not depend on its last token"
    if c.causal:
        before = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        before[ends] = False
        largest = moved[before].max().item()
        if largest:
            return False, f"states before the last token move by {largest:.1e} when it changes"
        return True, f"{int(before.sum())} states before the last token are bit-equal"
    # the first state, or where all layers are local the first that sees the end through one layer
    reach = max(lengths) if "global" in c.layer_kinds else c.window
    moves = {}  # length -> the least move of such texts
    for n, end in zip(lengths, ends.tolist(), strict=True):
        moves[n] = min(moves.get(n, math.inf), moved[end - min(n - 1, reach)].item())
    shown = ", ".join(f"{moves[n]:.1e} in {n} tokens" for n in (lengths[0], max(lengths)))
    at = "first" if reach >= max(lengths) else f"{reach}th last"
    return min(moves.values()) > 0, f"another last token moves the {at} state by {shown}"


def packed_equals_alone(net, tokens, lengths, hidden):
    alone = [net(text, make_seqs([len(text)], tokens.device)) for text in tokens.split(lengths)]
    return compare(hidden, torch.cat(alone))


def isolation(net, tokens, lengths, hidden):
    """Other tokens in every second text; the texts between them must not notice."""
    noticed = []
    for odd in (0, 1):
        texts = list(tokens.split(lengths))
        for i in range(odd, len(texts), 2):
            texts[i] = (texts[i] + 1) % net.config.vocab_size
        changed = net(torch.cat(texts), make_seqs(lengths, tokens.device))
        pairs = list(zip(changed.split(lengths), hidden.split(lengths), strict=True))
        for i, (a, b) in enumerate(pairs):
            if i % 2 != odd and not torch.equal(a, b):
                noticed.append((a - b).abs().max().item())
            if i % 2 == odd and torch.equal(a, b):
                return False, f"text {i} does not depend on its own tokens"
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


def backend_agrees(net, backend, tokens, lengths):
    """Its attention against masked_softmax, with each kind of layer's own mask; and where it is
    another one than sdpa, the whole model against sdpa's, in bf16."""
    c, device = net.config, tokens.device
    dtype, tolerance = (torch.float32, 1e-5) if backend == "sdpa" else (torch.bfloat16, 1e-2)
    try:
        M.choose_backend(backend, device, dtype, gqa=c.n_head != c.n_kv_head)
    except ValueError as error:
        return None, str(error).partition("cannot run: ")[2]
    masks = list(dict.fromkeys((c.causal, block.attn.window) for block in net.blocks))
    beyond = min(c.window, 4096) + 100  # longer than the window, and than a block of queries
    sizes, n_kv = [7, 300, 300, 1, beyond], min(c.n_kv_head, 2)
    n_head = n_kv * (c.n_head // c.n_kv_head)  # all heads alike: two groups of them will do
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(sizes), n, c.head_dim, generator=generator).to(device, dtype)
        for n in (n_head, n_kv, n_kv)
    )
    texts = list(zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True))
    good, worst = True, 0.0
    for causal, window in masks:
        want = torch.cat([masked_softmax(*text, causal, window) for text in texts])
        got = M.attention(q, k, v, make_seqs(sizes, device), causal, window, 0.0, backend)
        difference = (got.cpu().double() - want).abs().max().item()
        good, worst = good and difference <= tolerance * want.abs().max(), max(worst, difference)
    shown = ", ".join(f"{'causal ' if causal else ''}{window}" for causal, window in masks)
    figures = f"largest difference {worst:.1e} from a masked softmax, windows {shown}"
    if backend == "sdpa":
        return bool(good), figures

    seqs, states = make_seqs(lengths, device), {}
    for net.backend in ("sdpa", backend):
        with torch.autocast(device.type, dtype):
            states[net.backend] = net(tokens, seqs).float()
    net.backend = "sdpa"
    apart = ((states[backend] - states["sdpa"]).norm() / states["sdpa"].norm()).item()
    return bool(good and apart < 0.03), f"{figures}; the model, {apart:.1%} from sdpa's (3%)"


def save_and_reload(net, tokens, lengths):
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        back = M.from_pretrained(folder).to(tokens.device).eval()
        before, after = net.state_dict(), back.state_dict()
        wrong = [k for k in before.keys() | after.keys() if k not in before or k not in after]
        wrong += [k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])]
        if wrong:
            return False, f"{len(wrong)} tensors are not as saved: {', '.join(sorted(wrong)[:3])}"
        ours = outputs(net, tokens, lengths)
        if not torch.equal(outputs(back, tokens, lengths), ours):
            return False, "the same weights, other outputs: config.json lost something"
        del back, after
        bits = f"{len(before)} tensors and the outputs are bit-equal; transformers: "
        if net.config.family == "neobert":
            return True, bits + "skipped, " + NOT_THERE.partition(";")[0]
        ok, figures = compare(ours, their_outputs(load_theirs(net, folder), tokens, lengths))
        return ok, bits + figures


def tokenizer_fits(net, folder):
    files = ("tokenizer.json", "tokenizer_config.json")
    if not any(os.path.exists(os.path.join(folder, name)) for name in files):
        return None, "there is no tokenizer in the folder"
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, net.config.vocab_size)
    exact = True
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        again = load_tokenizer(saved)
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
        f"the vocabulary of {len(tokenizer):,} fits the model's {net.config.vocab_size:,}"
    )


def same_ids(folder):
    """An embedder's ids, by which it was trained, are those of the folder's plain tokenizer."""
    from transformers import AutoTokenizer

    in_post_processor = os.path.exists(os.path.join(folder, "modules.json"))  # the suffix is, and
    if not in_post_processor and not os.path.exists(os.path.join(folder, "nanoembed.json")):
        return None, "no embedder's folder"  # else a plain tokenizer would cut it
    with contextlib.redirect_stdout(io.StringIO()):
        embedder = Embedder.load(folder, device="cpu", dtype="fp32")
    theirs, instructions = AutoTokenizer.from_pretrained(folder), set(embedder.prompts.values())
    prefix, suffix = embedder.template.prefix, embedder.template.suffix
    embedder.max_length = embedder.max_length if in_post_processor else 10**9
    for instruction in sorted(instructions):
        for text in PROBES:
            joined = prefix + instruction + text + ("" if in_post_processor else suffix)
            ids = theirs(joined, truncation=in_post_processor, max_length=embedder.max_length)
            ids = ids["input_ids"]
            if ids != embedder.tokenize([text], instruction)[0][0]:
                return False, f"{joined!r} has other ids by transformers"
    return True, f"{len(PROBES)} texts, each with {len(instructions)} instructions"


def in_one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


@torch.no_grad()
def check(name, device):
    """Yields (check, True, False or None for skipped, the figure), each as soon as it is known."""
    try:
        folder = M.resolve_folder(name)
        if not os.path.exists(os.path.join(folder, "config.json")):
            raise FileNotFoundError(
                f"no config.json in {folder}: expected a model, such as the step500 of a run (an "
                "adapter is none: it goes with a base)"
            )
        net = M.from_pretrained(folder).to(device).eval()
    except Exception as error:
        yield "the weights are read", False, in_one_line(error)
        return
    c = net.config
    kind, n = "causal" if c.causal else "bidirectional", sum(p.numel() for p in net.parameters())
    about = (
        f"{c.family}, {kind}, {c.n_layer} layers, {n / 1e6:.1f}M weights; none missing or left over"
    )
    yield "the weights are read", True, about
    tokens, lengths = random_texts(c, device)
    hidden = net(tokens, make_seqs(lengths, device))  # [T, C]
    packed = (net, tokens, lengths, hidden)
    what = "hidden states" if c.head == "none" else "logits"
    checks = [
        (f"{what} equal transformers'", equals_transformers, (net, folder, tokens, lengths)),
        (f"{kind}, truly", direction, packed),
        ("packed = each text alone", packed_equals_alone, packed),
        ("no text sees another", isolation, packed),
    ]
    for backend in ("sdpa", "varlen", "flash_attn"):
        checks.append((f"attention: {backend}", backend_agrees, (net, backend, tokens, lengths)))
    checks.append(("save -> reload", save_and_reload, (net, tokens, lengths)))
    checks.append(("tokenizer", tokenizer_fits, (net, folder)))
    checks.append(("training ids = encode ids", same_ids, (folder,)))
    for title, function, arguments in checks:
        try:
            ok, figure = function(*arguments)
        except Exception as error:  # whatever it is, it is no pass; the other checks still tell
            ok, figure = False, in_one_line(error)
        yield title, ok, figure


def main(name):
    """Prints the checks of a model folder or hub id; 1 if any failed, else 0."""
    import transformers

    transformers.logging.set_verbosity_error()  # what it has to say is in the checks
    transformers.logging.disable_progress_bar()
    device, start, results = common.setup_distributed()[3], time.perf_counter(), []
    print(f"{name} on {device}, fp32, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    for title, ok, figure in check(name, device):
        results.append(ok)
        word = {True: "PASS", False: "FAIL", None: "skipped"}[ok]
        print(f"{word:<8} {title:<27} {figure}", flush=True)
    counts = [sum(r is kind for r in results) for kind in (True, False, None)]
    print("{} passed, {} failed, {} skipped".format(*counts), end="")
    print(f" in {common.format_time(time.perf_counter() - start)}")
    return int(False in results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder, or a hub id owner/name[@revision]")
    sys.exit(main(parser.parse_args().model))
