"""
Compress a passage for a question: which of its characters are kept, and a page that shows it.

    from tools.compress import compress_text
    text, spans = compress_text(embedder, "How is the pool closed?", passage, ratio=8)

sample.py --compress is the command. The scores are those of embedder.score_tokens.
"""

import itertools
import math
import re
from html import escape

import numpy as np

from data import read_jsonl, require
from embedder import score_tokens
from spans import covered, join_spans


def units_of(passage, spans, unit):
    """Token spans [n, 2] -> units [(first token, end, [first character, end]), ..] in order, ends
    exclusive. Tokens: each is a unit. Words: what stands between spaces; words that share a token
    are one unit, and a token of nothing but spaces is in none."""
    if unit not in ("words", "tokens"):
        raise ValueError(f"unit {unit!r}: expected words or tokens")
    if unit == "tokens":
        return [(i, i + 1, span) for i, span in enumerate(spans.tolist())]
    words = [match.span() for match in re.finditer(r"\S+", passage)]
    units, w = [], 0
    for i, (start, end) in enumerate(spans.tolist()):
        while w < len(words) and words[w][1] <= start:
            w += 1
        held = [word for word in words[w : w + end - start] if word[0] < end]  # perhaps several
        if held:
            first, place = i, [held[0][0], held[-1][1]]
            if units and place[0] < units[-1][2][1]:  # the same word as the last token's
                first, _, (place[0], _) = units.pop()
            units.append((first, i + 1, place))
    return units


def keep(scores, spans, passage, ratio, unit="words", neighbours=0):
    """Scores [n] and spans [n, 2] of a passage's tokens -> the spans that are kept, in order.

    At most ceil(n / ratio) tokens, and just as many with unit="tokens". The best units come first,
    each by its best token, of equal ones the first; with each come its neighbours, the nearest
    first. What has more tokens than are left is passed over; where no word has so few, as in text
    without spaces, single tokens are kept. Units that follow one another are one span, with the
    spaces between them.
    """
    if not ratio >= 1 or neighbours < 0:
        raise ValueError(f"expected {ratio=} >= 1 and {neighbours=} >= 0")
    left = math.ceil(len(scores) / ratio - 1e-9)  # n / (n / 3) may be more than 3
    units = units_of(passage, spans, unit)
    if min((end - first for first, end, _ in units), default=0) > left:
        units = units_of(passage, spans, "tokens")
    best = np.array([scores[first:end].max() for first, end, _ in units])
    near, kept = sorted(range(-neighbours, neighbours + 1), key=abs), set()  # 0, -1, 1, -2, 2
    for i in np.argsort(-best, kind="stable").tolist():
        for j in (i + k for k in near if 0 <= i + k < len(units)):
            size = units[j][1] - units[j][0]
            if j not in kept and size <= left:
                kept.add(j)
                left -= size
            if i not in kept:
                break  # no neighbours of what did not fit
    places = [place for _, _, place in units]
    between = [[places[i][1], places[i + 1][0]] for i in kept if i + 1 in kept]
    return join_spans([places[i] for i in kept] + between)


def text_of(passage, spans):
    """The kept spans as one text: a space stands for what is left out, if none is there already."""
    text = ""
    for start, end in spans:
        piece = passage[start:end]
        text += " " * bool(text and not text[-1].isspace() and not piece[0].isspace()) + piece
    return text


def keep_counted(tokenizer, scores, spans, passage, ratio, unit="words", neighbours=0):
    """`keep`, of as many tokens that the text that comes out has no more of them than
    ceil(the passage's / ratio) -> (kept spans, (tokens of that text, of the passage)).

    The tokens of a text are not those of its pieces: a space between two words that are kept may
    be a token, and a word that follows another one than before be split otherwise. So fewer are
    kept until it is short enough."""

    def count(text):
        return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    n, total = math.inf, count(passage)
    if ratio < 1:
        raise ValueError(f"ratio {ratio}, expected 1 or more")
    left, limit = (math.ceil(x / ratio - 1e-9) for x in (len(scores), total))
    while n > limit:
        kept = keep(scores, spans, passage, len(scores) / left if left > 0 else math.inf, unit,
                    neighbours)  # fmt: skip
        n = count(text_of(passage, kept))
        left -= max(1, n - limit)
    return kept, (n, total)


def compress_text(
    embedder, query, passage, ratio, unit="words", neighbours=0, window=0, overlap=0
):  # fmt: skip
    """-> (kept text, kept spans [[start, end], ..]): the 1/ratio of a passage's tokens that matter
    most for a query, in order; see `keep_counted`, and `score_tokens` for windows."""
    (scores,), spans = score_tokens(embedder, [query], passage, window, overlap)
    kept, _ = keep_counted(embedder.tokenizer, scores, spans, passage, ratio, unit, neighbours)
    return text_of(passage, kept), kept


def share_of(inside, spans):
    """Of the characters in spans, the share that is in the spans `inside`."""
    both = sum(max(0, min(b, d) - max(a, c)) for a, b in inside for c, d in spans)
    return both / max(1, sum(d - c for c, d in spans))


_STYLE = """
:root { color-scheme: light dark; --text: #111; --faint: #4c4c4c; --page: #fff;
  --heat: 255 150 0; --gold: #0a58ca }
@media (prefers-color-scheme: dark) { :root { --text: #fff; --faint: #b5b5b5; --page: #141414;
  --heat: 170 80 0; --gold: #7db4ff } }
body { background: var(--page); color: var(--text); max-width: 46rem; margin: 2rem auto;
  padding: 0 1rem; font: 1rem/1.7 Georgia, serif }
h1 { font-size: 1.4rem; line-height: 1.3 }
.facts, .legend { color: var(--faint); font: .85rem/1.5 system-ui, sans-serif }
.passage { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--faint) }
.k { color: var(--text); font-weight: bold }
.g { text-decoration: underline 2px var(--gold); text-underline-offset: .2em }
"""


def page(query, passage, scores, of_tokens, kept, counts, gold=()):
    """The passage as a heat map of its tokens' scores: one page of HTML that needs no other file.

    The ground of a token is the stronger, the higher its score: 10 steps from the median to the
    best. Kept characters are bold, the others grey; gold spans are underlined. counts: how many
    tokens the kept text has, and the passage.
    """
    heat = np.full(len(passage) + 1, -1)  # [characters], the step of each
    low, high = np.median(scores), scores.max()
    steps = (9 * (scores - low) / max(high - low, 1e-9)).clip(0, 9).round().astype(int)
    for (start, end), step in zip(of_tokens.tolist(), steps):
        heat[start:end] = np.maximum(heat[start:end], step)  # a character may have several
    in_kept, in_gold = (covered(spans, len(heat)) for spans in (kept, gold))
    state = np.stack((heat, in_kept, in_gold))  # [3, characters]
    cuts = (np.flatnonzero((state[:, 1:] != state[:, :-1]).any(0)) + 1).tolist()
    parts = []
    for start, end in itertools.pairwise([0, *cuts, len(passage)]):
        step, bold, underlined = state[:, start].tolist()
        names = [f"h{step}"] * (step > 0) + ["k"] * bold + ["g"] * underlined
        parts.append(f'<span class="{" ".join(names)}">{escape(passage[start:end])}</span>')
    facts = "{:,} of {:,} tokens kept".format(*counts)
    facts += f"; of the gold {share_of(kept, gold):.0%}" if gold else ""
    ground = "".join(f".h{i} {{ background: rgb(var(--heat) / {i / 14:.2f}) }}" for i in range(10))
    legend = "<span class=k>bold: kept</span>, <span class=h9>ground: score</span>"
    legend += ", <span class=g>underlined: gold</span>" if gold else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(query)}</title>
<style>{_STYLE}{ground}</style></head>
<body><h1>{escape(query)}</h1>
<p class="facts">{facts}</p><p class="legend">{legend}</p>
<div class="passage">{"".join(parts)}</div>
</body></html>
"""


def read_passage(path, line):
    """(passage, query or None, gold spans) of a text, or of a line of a .jsonl."""
    if not path.endswith(".jsonl"):
        with open(path, encoding="utf-8", newline="") as f:
            return f.read(), None, []
    for number, record in read_jsonl(path):
        if number == line:
            passage = require(record, "passage", str, path, line)
            return passage, record.get("query"), record.get("spans", [])
    raise SystemExit(f"{path} has no line {line}")
