"""
Lines of token retrieval: a query, a passage, and the spans of its characters that matter.
"""

import numpy as np

from data import read_line, require


def join_spans(spans) -> list[list[int]]:
    """[start, end) spans in order; those that overlap or touch become one."""
    out = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


def read_spans(file, i):
    """{"query", "passage", "spans": [[start, end], ..], "answer": [start, end] or None, "where",
    "line"} of the i-th line; "where" is its file and line, for messages. ValueError names file,
    line and field."""
    record, line = read_line(file, i)
    where = f"{file.path} line {line}"
    query, passage, spans = (
        require(record, key, kind, file.path, line, filled=True)
        for key, kind in (("query", str), ("passage", str), ("spans", [list]))
    )
    answer = record.get("answer")
    for field, span in [("spans", span) for span in spans] + [("answer", answer)] * bool(answer):
        pair = isinstance(span, list) and [type(x) for x in span] == [int, int]
        if not pair or not 0 <= span[0] < span[1] <= len(passage):
            raise ValueError(
                f"{where}: field '{field}' has {span}, expected [start, end] with 0 <= start < end "
                f"<= {len(passage)}, the passage's characters"
            )
        if not passage[span[0] : span[1]].strip():
            raise ValueError(f"{where}: field '{field}' has {span}, spaces alone")
    fields = {"query": query, "passage": passage, "spans": spans, "answer": answer}
    return fields | {"where": where, "line": line}


def find_runs(file, most, max_lines=0):
    """Following lines that share a passage, at most `most` a run -> int64 [R, 2]: the first line,
    and how many. Reads, and so checks, every line, or the first max_lines."""
    runs, before = [], None
    for i in range(len(file))[: max_lines or None]:
        passage = read_spans(file, i)["passage"]
        if passage == before and runs[-1][1] < most:
            runs[-1][1] += 1
        else:
            runs.append([i, 1])
        before = passage
    return np.array(runs, dtype=np.int64)


def covered(spans, n):
    """Which of n characters lie in one of the spans [k, 2] -> bool [n]"""
    steps, spans = np.zeros(n + 1, dtype=np.int64), np.reshape(spans, (-1, 2)).astype(np.int64)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return steps[:n].cumsum() > 0


def squeezed(text):
    """A text without its spaces and in lower case, as tokenizers may give it back."""
    return "".join(text.split()).lower()


def speller(tokenizer, ids, passage):
    """-> indices of a passage's tokens -> what their ids [n] decode to; None where the tokenizer
    changes the passage, so that this says nothing. For gold_tokens."""

    def spell(tokens):
        return tokenizer.decode(ids[tokens])

    return spell if squeezed(spell(slice(None))) == squeezed(passage) else None


def gold_tokens(record, token_spans, spell=None):
    """The tokens that hold a character of a span, a list of indices [g] for each span.

    Back from the tokens must come the span's text, or ValueError names file and line; spaces at its
    ends, which tokenizers may leave out, do not count. token_spans [n, 2]: the characters of each
    token. spell: indices -> what these tokens decode to, which finds offsets that have moved; None
    where the tokenizer changes its text.
    """
    passage, out = record["passage"], []
    for start, end in record["spans"]:
        inside = np.flatnonzero((token_spans[:, 0] < end) & (token_spans[:, 1] > start))
        text, back = passage[start:end].strip(), ""
        if len(inside):
            back = passage[token_spans[inside, 0].min() : token_spans[inside, 1].max()]
        decoded = spell(inside) if spell else text
        # a decoded \ufffd is half a character, of which nothing can be said
        moved = squeezed(text) not in squeezed(decoded) and "\ufffd" not in decoded
        if not text or text not in back or moved:
            back = decoded if moved else back
            shown = f"[{start}, {end}], {text[:60]!r}, comes back from its tokens as {back[:60]!r}"
            raise ValueError(f"{record['where']}: span {shown}")
        out.append(inside)
    return out
