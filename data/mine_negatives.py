"""
Hard negatives: for each query, texts that a model ranks high and that are no known positive.

    python data/mine_negatives.py --model=out/x/step1000 --pairs=data/pydocs/train.jsonl \\
        --out=data/pydocs/mined.jsonl --range=10:100 --negatives=7 --margin=0.05
    python data/mine_negatives.py --model=Qwen/Qwen3-Embedding-0.6B --pairs=pairs.jsonl \\
        --out=scored.jsonl --keep --negatives=0        # a teacher's scores for the texts given
    python data/mine_negatives.py --model=bm25 --pairs=pairs.jsonl --out=mined.jsonl

The rule, for each line:
1. Candidates are all texts of the corpus: by default the positives and negatives of the pairs file.
2. Out go the line's own query and every positive of any line with the same query, by their text.
3. The rest is ranked by its score, the dot product of embeddings or BM25's, exactly; equal scores
   by their place in the corpus. Of this order, places lo to hi - 1 (--range=lo:hi, from 0) stay.
   The first ones are the likeliest to be unlabelled positives.
4. Out goes what scores above the line's worst positive - margin. (A difference, not a share: shares
   turn around where scores are negative. The worst, for training draws any of the positives.)
5. --negatives of what is left are drawn, with a seed, and written by falling score. A line gets
   fewer where fewer are left; the end says how often.

Written are {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"?}. A line's prompt stands
in front of its query, as in training. Memory: the texts, the queries' vectors (the corpus's lie in
a file) and one block of scores.
"""

import argparse
import json
import os
import sys
import tempfile

import numpy as np
import torch
from scipy.sparse import issparse
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # the project
from bm25 import BM25  # noqa: E402
from data import open_pairs, read_jsonl, read_pair, require  # noqa: E402


def dots(queries, corpus, device="cpu"):
    """[b, C] and [n, C] -> fp32 tensor [b, n]. Float32 arrays, maybe mapped from files, or BM25's
    sparse rows, a column a word: there is no dense [n, words]."""
    if issparse(corpus):
        return torch.from_numpy((queries @ corpus.T).toarray().astype(np.float32)).to(device)
    queries, corpus = (torch.from_numpy(np.array(x)).to(device) for x in (queries, corpus))
    return queries @ corpus.t()


def ranked(queries, corpus, excluded, k, device="cpu", query_block=512, corpus_block=32768):
    """Yield (first query, scores [b, k], places [b, k]) for blocks of b queries, best first.

    queries [Q, C] and corpus [N, C]: what `dots` takes; excluded: Q arrays of places in the corpus
    that do not count. Exact: all dot products in fp32; equal scores by place. Where a query has
    fewer than k candidates, the rest has score -inf. Memory: one block.
    """
    for q in range(0, queries.shape[0], query_block):
        block = excluded[q : q + query_block]
        rows = np.repeat(np.arange(len(block)), [len(texts) for texts in block])
        columns = np.concatenate([np.empty(0, np.int64), *block]).astype(np.int64)
        best = torch.zeros(len(block), 0, device=device)
        places = torch.zeros(len(block), 0, dtype=torch.int64, device=device)
        for n in range(0, corpus.shape[0], corpus_block):
            scores = dots(queries[q : q + query_block], corpus[n : n + corpus_block], device)
            in_block = np.flatnonzero((columns >= n) & (columns < n + scores.size(1)))
            out = torch.from_numpy(np.stack((rows[in_block], columns[in_block] - n))).to(device)
            scores[out[0], out[1]] = -torch.inf
            some, found = top(scores, k)
            # the best so far stand left of what comes: among equal scores left is first
            best, order = top(torch.cat((best, some), 1), k)
            places = torch.cat((places, found + n), 1).gather(1, order)
        yield q, best.cpu().numpy(), places.cpu().numpy()


def top(scores, k):
    """(the k best of each row, their columns), best first; of equal scores the leftmost."""
    k = min(k, scores.size(1))
    best, columns = scores.topk(k, dim=1)  # [b, k]; where the last ones are equal, any of them
    last = best[:, -1:]
    if ((scores >= last).sum(1) > k).any():
        room = k - (scores > last).sum(1, keepdim=True)
        equal = scores == last
        keep = (scores > last) | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
        columns = keep.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(dim=1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


def choose(scores, places, ceiling, lo, hi, n, rng):
    """One row of `ranked` -> (scores, places) of at most n negatives, by falling score."""
    fits = np.flatnonzero((scores[lo:hi] <= ceiling) & (scores[lo:hi] > -np.inf)) + lo
    fits = np.sort(rng.choice(fits, min(n, len(fits)), replace=False))
    return scores[fits], places[fits]


def mine(lines, corpus_texts, queries, corpus, lo, hi, n, margin, keep, seed, device="cpu"):
    """Yield a pair with negatives and scores for each line.

    lines: what `read_pair` gives; queries [len(lines), C] their embeddings. corpus_texts: {text:
    place}; corpus [N, C] the embeddings in this order; or BM25's, see `dots`. All texts of the
    lines must be in it. margin None: no ceiling. keep: the line's own negatives stay in front,
    scored.
    """
    positives = {}
    for line in lines:
        positives.setdefault(line["query"], set()).update(line["pos"])
    excluded = []
    for line in lines:
        out = {line["query"], *positives[line["query"]], *(line["neg"] if keep else [])}
        excluded.append(np.array(sorted(corpus_texts[t] for t in out if t in corpus_texts)))
    text_at = list(corpus_texts)
    for first, *block in ranked(queries, corpus, excluded, max(hi, 1), device):
        for i, (scores, places) in enumerate(zip(*block, strict=True), first):
            line = lines[i]
            given = [corpus_texts[t] for t in line["pos"] + (line["neg"] if keep else [])]
            given_scores = dots(queries[i : i + 1], corpus[given])[0].tolist()
            pos_scores = given_scores[: len(line["pos"])]
            neg_scores = given_scores[len(line["pos"]) :]
            ceiling = np.inf if margin is None else min(pos_scores) - margin
            rng = np.random.default_rng((seed, i))
            scores, places = choose(scores, places, ceiling, lo, hi, n, rng)
            pair = {"query": line["query"], "pos": line["pos"]}
            pair["neg"] = (line["neg"] if keep else []) + [text_at[place] for place in places]
            pair |= {"pos_scores": pos_scores, "neg_scores": neg_scores + scores.tolist()}
            yield pair | ({"prompt": line["prompt"]} if line["prompt"] else {})


def embed_queries(embedder, lines, instruction, device_batch_tokens):
    """[len(lines), C]: one call for each prompt among the lines."""
    groups = {}
    for i, line in enumerate(lines):
        groups.setdefault(line["prompt"] or instruction, []).append(i)
    vectors = np.empty((len(lines), embedder.dim), np.float32)
    for prompt, which in groups.items():
        texts = [lines[i]["query"] for i in which]
        vectors[which] = embedder.encode(texts, prompt, device_batch_tokens, progress=True)
    return vectors


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder or hub id that Embedder.load reads; or bm25")
    add("--pairs", required=True, help="JSONL of pairs or triplets")
    add("--out", required=True, help="the .jsonl to write")
    add("--corpus", help='JSONL with a field "text": more candidates than the pairs file has')
    add("--range", default="10:100", help="lo:hi, places in the ranking that may be drawn")
    add("--negatives", type=int, default=7, help="for each line; 0 only scores")
    add("--margin", type=float, help="below the worst positive's score; without it no ceiling")
    add("--keep", action="store_true", help="the negatives of the file stay, in front, with scores")
    add("--query_instruction", help="for lines without a prompt; default: the model's own")
    add("--passage_instruction", help="default: the model's own")
    add("--device_batch_tokens", type=int,
        help="of one forward; else 2,048 on the CPU, 16,384 on a GPU")  # fmt: skip
    add("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    try:
        args.lo, args.hi = map(int, args.range.split(":"))
    except ValueError:
        parser.error(f"--range={args.range}: expected lo:hi, as in 10:100")
    if not 0 <= args.lo < args.hi or not 0 <= args.negatives <= args.hi - args.lo:
        parser.error(f"--range={args.range} does not hold {args.negatives} negatives")
    if os.path.realpath(args.out) in map(os.path.realpath, (args.pairs, args.corpus or "")):
        parser.error(f"--out={args.out} is what is read: give another file")
    if args.model == "bm25" and (args.query_instruction or args.passage_instruction):
        parser.error("--model=bm25 scores bare texts: it has no instructions")
    return args


def main(argv=None):
    args = arguments(argv)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    from embedder import Embedder

    file = open_pairs(args.pairs)
    lines = [read_pair(file, i) for i in tqdm(range(len(file)), args.pairs, unit=" lines")]
    texts = {}  # text: place
    for line in lines:
        for text in line["pos"] + line["neg"]:
            texts.setdefault(text, len(texts))
    if args.corpus:
        for number, record in tqdm(read_jsonl(args.corpus), args.corpus, unit=" lines"):
            texts.setdefault(require(record, "text", str, args.corpus, number), len(texts))
    rule = args.lo, args.hi, args.negatives, args.margin, args.keep, args.seed
    if args.model == "bm25":
        index = BM25(list(texts))
        queries = index.rows(line["query"] for line in lines)
        return write(args, lines, mine(lines, texts, queries, index.weights.T.tocsr(), *rule))
    embedder = Embedder.load(args.model)
    if embedder.pooling == "tokens":
        raise SystemExit(f"{args.model} gives several vectors a text: mine with one that gives one")
    query_instruction, passage_instruction = args.query_instruction, args.passage_instruction
    if query_instruction is None:
        query_instruction = embedder.prompts.get("query", "")
    if passage_instruction is None:
        passage_instruction = embedder.prompts.get("document", "")
    print(f"{len(lines):,} queries (instruction {query_instruction!r}), {len(texts):,} texts "
          f"({passage_instruction!r})")  # fmt: skip
    budget = args.device_batch_tokens
    queries = embed_queries(embedder, lines, query_instruction, budget)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(args.out))) as folder:
        path = os.path.join(folder, "corpus.npy")
        corpus = embedder.encode(list(texts), passage_instruction, budget, progress=True, out=path)
        write(args, lines, mine(lines, texts, queries, corpus, *rule, embedder.device))


def write(args, lines, pairs):
    """What `mine` yields, to args.out."""
    short = n_neg = 0
    with open(args.out + ".tmp", "wb") as out:
        for line, pair in zip(lines, tqdm(pairs, "mining", len(lines)), strict=True):
            mined = len(pair["neg"]) - (len(line["neg"]) if args.keep else 0)
            short, n_neg = short + (mined < args.negatives), n_neg + len(pair["neg"])
            text = json.dumps(pair, ensure_ascii=False) + "\n"
            out.write(text.encode("utf-8", "replace"))
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {len(lines):,} lines, {n_neg / len(lines):.2f} negatives a line, "
          f"{short:,} lines with fewer than {args.negatives} mined ones")  # fmt: skip


if __name__ == "__main__":
    main()
