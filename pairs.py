"""
The pairs of a contrastive batch: which are drawn, who is whose among their texts, and their ids.
"""

import re
from pathlib import Path

import numpy as np
import torch

import optim
from common import print0
from data import open_pairs, read_pair, require
from formats import parse_json
from order import rows_of_step
from tokenizer import tokenize


def open_files(s):
    """-> the files of s.data, and which of them each step reads. Sets the lengths of the run."""
    files = [open_pairs(path) for path in s.data]
    for key in ("query_instruction", "passage_instruction"):
        if len(getattr(s, key)) not in (1, len(files)):
            raise SystemExit(f"{key}: {len(getattr(s, key))} texts for {len(files)} data files")
    if s.batch_size % s.consecutive:
        raise SystemExit(f"consecutive={s.consecutive}: batch_size={s.batch_size} is no multiple")
    n_lines = sum(len(file) for file in files)
    optim.set_lengths(s, n_lines, s.batch_size)
    for file in files:
        print0(f"{file.path}: {len(file):,} lines")
    print0(
        f"{s.stop_step:,} steps of {s.batch_size:,} pairs = "
        f"{s.stop_step * s.batch_size / n_lines:.2f} epochs; warmup {s.warmup:,} steps"
    )
    return files, choose_files(files, s.max_steps, s.sampling_alpha, s.seed)


def choose_files(files, max_steps, alpha, seed):
    """The file of each step [max_steps], drawn with probability ~ (its lines) ** alpha."""
    p = np.array([len(file) for file in files]) ** alpha
    return np.random.default_rng(seed).choice(len(files), size=max_steps, p=p / p.sum())


def lines_of_step(files, step, choices, batch_size, seed, n=1):
    """(which file, [(epoch, line), ..]) of the batch of `step`: batch_size lines of one file, whose
    last batch takes what it lacks from its next epoch. choices: what choose_files returned. n: how
    many lines follow one another; each epoch cuts the file into such runs one line further."""
    which = int(choices[step])
    nth = int((choices[:step] == which).sum())  # how many batches this file has given
    n_lines = len(files[which])
    epochs, runs = rows_of_step(nth, batch_size // n, n_lines // n, seed + which)
    places = zip(epochs.repeat(n).tolist(), runs.repeat(n).tolist(), [*range(n)] * len(runs))
    return which, [(e, (run * n + i + (e if n > 1 else 0)) % n_lines) for e, run, i in places]


def pairs_of_step(files, step, choices, s):
    """-> (batch_size pairs of one file, which file), a function of (seed, step)."""
    which, lines = lines_of_step(files, step, choices, s.batch_size, s.seed, s.consecutive)
    pairs = []
    for epoch, line in lines:
        rng = np.random.default_rng((s.seed, which, epoch, line))
        pairs.append(sample_pair(files[which], line, s.group_size, rng, s.crop))
    if s.no_duplicates:
        rng = np.random.default_rng((s.seed, step))
        pairs = without_duplicates(pairs, files[which], s.group_size, rng, s.crop)
    return pairs, which


def random_crop(text, share, rng):
    """A run of this share of the text's words, one at least, that begins anywhere."""
    words = [word.span() for word in re.finditer(r"\S+", text)]
    if not words:
        return text
    n = max(1, round(share * len(words)))
    first = rng.integers(len(words) - n + 1)
    return text[words[first][0] : words[first + n - 1][1]]


def sample_pair(file, line, group_size, rng, crop=0.0):
    """One line with one of its positives and up to group_size - 1 of its negatives, drawn. crop: a
    text that is its own positive gives two crops of itself."""
    pair = read_pair(file, line)
    if crop and pair["pos"] == [pair["query"]]:
        pair["query"], *pair["pos"] = (random_crop(pair["query"], crop, rng) for _ in range(2))
    positive = rng.integers(len(pair["pos"]))
    n_neg = min(group_size - 1, len(pair["neg"]))
    negatives = sorted(rng.choice(len(pair["neg"]), n_neg, replace=False)) if n_neg else []
    passages = [pair["pos"][positive]] + [pair["neg"][i] for i in negatives]
    scores = None
    if pair["pos_scores"] and (pair["neg_scores"] or not n_neg):
        scores = [pair["pos_scores"][positive]] + [pair["neg_scores"][i] for i in negatives]
    return {"query": pair["query"], "known": pair["pos"], "passages": passages, "scores": scores,
            "prompt": pair["prompt"]}  # fmt: skip


def without_duplicates(pairs, file, group_size, rng, crop=0.0):
    """A pair that shares a text with an earlier one gives way to a drawn one, in up to 20 tries."""
    seen, out = set(), []
    for pair in pairs:
        for _ in range(20):
            if not seen & {pair["query"], *pair["passages"]}:
                break
            pair = sample_pair(file, rng.integers(len(file)), group_size, rng, crop)
        seen |= {pair["query"], *pair["passages"]}
        out.append(pair)
    return out


def layout(pairs):
    """-> group [B, G], teacher [B, G], known [K, 2] of Batch. A passage is known as right for a
    query if its text is a positive of that query, or of another line with the same query."""
    n_group = max(len(pair["passages"]) for pair in pairs)
    group = np.full((len(pairs), n_group), -1)
    teacher = np.full((len(pairs), n_group), np.nan, dtype=np.float32)
    places, positives, n = {}, {}, 0  # text -> passages that have it; query -> its positive texts
    for b, pair in enumerate(pairs):
        positives.setdefault(pair["query"], set()).update(pair["known"])
        for g, text in enumerate(pair["passages"]):
            group[b, g] = n
            places.setdefault(text, []).append(n)
            n += 1
        if pair["scores"]:
            teacher[b, : len(pair["scores"])] = pair["scores"]
    known = [
        (b, n)
        for b, pair in enumerate(pairs)
        for text in positives[pair["query"]]
        for n in places.get(text, [])
        if n != group[b, 0]
    ]
    known = np.array(known, dtype=np.int64).reshape(-1, 2)
    return torch.from_numpy(group), torch.from_numpy(teacher), torch.from_numpy(known)


def may_be_negative(known, anchors, candidates, n):
    """-> bool [b, n]: which of n candidates may be negatives of each anchor. An anchor is a query
    and a candidate a passage, or the other way round.

    anchors [b]: ascending numbers in the batch; known [K, 2]: pairs (anchor, candidate) that are
    right, so that the candidate is no negative; candidates: the slice that negatives come from.
    """
    allowed = torch.zeros(len(anchors), n, dtype=torch.bool, device=anchors.device)
    allowed[:, candidates] = True
    anchor, candidate = known.t().contiguous()  # [K] each
    row = torch.searchsorted(anchors, anchor).clamp(max=len(anchors) - 1)
    is_here = anchors[row] == anchor  # the pairs whose anchor is one of the b
    allowed[row[is_here], candidate[is_here]] = False
    return allowed


def mask_negatives(scores, positive, allowed, margin):
    """scores [b, N] with -inf for what is no negative: what is not allowed, and with a margin what
    scores above the positive + margin. The positive keeps its score, whatever the masks say."""
    positive_score = scores.gather(1, positive[:, None])  # [b, 1]
    scores = scores.masked_fill(~allowed, -torch.inf)
    if margin is not None:
        scores = scores.masked_fill(scores > positive_score.detach() + margin, -torch.inf)
    return scores.scatter(1, positive[:, None], positive_score)


def encode(texts, prompts, max_length, tokenizer, s):
    """`tokenize` as the settings say; prompts: the instruction of each text."""
    pooled = s.pool_instruction, s.pool_bos
    return tokenize(tokenizer, texts, prompts, s.template, max_length, *pooled)


def prompts_of(pairs, instruction, s):
    """The instruction of each query: its line's own prompt, or else the one given."""
    own = [None if s.ignore_prompts else pair["prompt"] for pair in pairs]
    return [instruction if prompt is None else prompt for prompt in own]


def encode_pairs(pairs, which, tokenizer, s):
    """-> what `tokenize` gives for the queries of these pairs, then for their passages. A line's
    own prompt goes before the query_instruction of its file."""
    ask, answer = (x[min(which, len(x) - 1)] for x in (s.query_instruction, s.passage_instruction))
    prompts = prompts_of(pairs, ask, s)
    queries = [pair["query"] for pair in pairs]
    passages = [text for pair in pairs for text in pair["passages"]]
    return [*encode(queries, prompts, s.query_max_length, tokenizer, s),
            *encode(passages, answer, s.passage_max_length, tokenizer, s)]  # fmt: skip


def instructions_of(files, s):
    """{data file: its queries' instruction, by its first line; task: instruction} that evaluation
    finds with the model."""
    path, found = s.task_instructions, {}
    if path:
        found = dict(parse_json(Path(path).read_bytes(), path))
    for task in found:
        require(found, task, str, path, 0)
    for i, file in enumerate(files):
        ask = s.query_instruction[min(i, len(s.query_instruction) - 1)]
        if text := prompts_of([read_pair(file, 0)], ask, s)[0]:
            found[Path(file.path).stem] = text
    return found


def show_pairs(pairs, which, tokenizer, s):
    """Prints queries and passages of the first pairs as a reader wants them; what is pooled stands
    inverted."""
    pairs = pairs[:4]
    for i, (ids, (start, end)) in enumerate(encode_pairs(pairs, which, tokenizer, s)):
        before, pooled, behind = map(tokenizer.decode, (ids[:start], ids[start:end], ids[end:]))
        name = f"query {i}" if i < len(pairs) else f"passage {i - len(pairs)}"
        print(f"--- {name}: {len(ids)} tokens")
        print(f"{before}\033[7m{pooled}\033[0m{behind}")
