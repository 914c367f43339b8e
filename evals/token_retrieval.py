r"""
Token retrieval: how well a model finds the tokens of a passage that matter for a query, in one
table with orders of the tokens that learn nothing.

    python -m evals.token_retrieval --model=out/token_retrieval_pydocs_tiny \
        --eval_data=data/pydocs/spans_test.jsonl
    torchrun --standalone --nproc_per_node=8 -m evals.token_retrieval \
        --model=out/x --eval_data=...

The scores are those of use, embedder.score_tokens; passages are not cut. Lines are as in
train_token_retrieval.py, the numbers are means of token_scores.token_metrics over the queries.
out_dir gets results.json and results.md.
"""

import usage  # noqa: F401  --help ends here, without torch

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import common
from bm25 import BM25, words_of
from data import open_pairs
from embedder import Embedder, score_tokens
from formats import write_json
from formats.huggingface import pinned
from spans import covered, find_runs, gold_tokens, read_spans, speller
from token_scores import names_of, token_metrics
from tokenizer import tokenize_passage

# ---- defaults ----
out_dir = "out/eval_token_retrieval"  # like .+
model = ""  # a folder, an out_dir or a hub id; it says how it pools and its instructions
eval_data = ""  # JSONL of {"query", "passage", "spans", perhaps "answer"}
eval_lines = 1000  # >= 0; of eval_data, from its start; 0: all
queries_per_passage = 8  # >= 1; most lines in a row with one passage that are scored together
passage_window = 0  # >= 0; tokens encoded at a time; 0: the whole
window_overlap = 0  # >= 0; tokens that neighbouring windows share
ratios: tuple[int, ...] = (16, 8, 4)  # >= 1; 1/16, 1/8 and 1/4 of a passage's tokens are kept
temperature = 0.02  # > 0; of the loss, which results.json has
seed = 1337  # >= 0 and < 1e18; of the random order, and of what ties in the others
# device
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
dtype = "auto"  # one of auto, bf16, fp32; auto: what the device is good at


ORDERS = "random", "first", "overlap", "bm25", "model"


def baseline_scores(record, spans, rng):
    """{name: scores [n]} of orders that learn nothing:

    random; first: from the passage's start; overlap: the tokens of words that the query has, too;
    bm25: a token has its sentence's BM25 score for the query's different words, the texts being
    the passage's sentences. Words and sentences that tie come in random order.
    """
    passage, asked = record["passage"], set(words_of(record["query"]))
    words = list(re.finditer(r"\w+", passage))
    starts = [word.start() for word in words]
    word_of = np.searchsorted(starts, spans[:, 1]) - 1  # -1: before the first word
    shared = [word.span() for word in words if word[0].lower() in asked]
    shared = covered(shared, len(passage))[spans[:, 1] - 1]  # [n]
    overlap = shared + 1e-6 * rng.random(len(words) + 1)[word_of]

    cuts = [m.end() for m in re.finditer(r"[.!?]\s+|\n+", passage)]
    sentences = [passage[start:end] for start, end in zip([0, *cuts], [*cuts, None])]
    scores = BM25(sentences).scores(" ".join(asked)) + 1e-6 * rng.random(len(sentences))
    bm25 = scores[np.searchsorted(cuts, spans[:, 0], side="right")]  # [n]
    order = np.arange(len(spans))
    return {"random": rng.random(len(spans)), "first": -order, "overlap": overlap, "bm25": bm25}


def evaluate(embedder, file, runs, s):
    """-> {"random", "first", "overlap", "bm25", "model": {name: mean over all queries}}, for the
    model its "loss" and "acc" (a gold token is first), too. Every rank takes its share of runs."""
    names = ["loss", "acc", *names_of(s.ratios)]
    totals = {order: np.zeros((len(names), 2)) for order in ORDERS}  # sum, count
    for first, n in tqdm(runs[s.rank :: s.world_size].tolist(), "evaluate", disable=s.rank > 0):
        records = [read_spans(file, i) for i in range(first, first + n)]
        queries, passage = [record["query"] for record in records], records[0]["passage"]
        # [Q, n], [n, 2]
        scores, spans = score_tokens(embedder, queries, passage, s.passage_window, s.window_overlap)
        instruction, tokenizer = embedder.prompts.get("document", ""), embedder.tokenizer
        ids, rows, _ = tokenize_passage(tokenizer, passage, instruction, embedder.template)
        spell = speller(tokenizer, np.array(ids)[rows], passage)
        for record, row in zip(records, scores):
            gold = np.unique(np.concatenate(gold_tokens(record, spans, spell)))
            rng = np.random.default_rng((s.seed, record["line"]))
            for order, x in (baseline_scores(record, spans, rng) | {"model": row}).items():
                found = token_metrics(x, gold, spans, record, s.ratios)
                if order == "model":
                    logits = x.astype(float) / s.temperature
                    loss = np.logaddexp.reduce(logits) - logits[gold].mean()
                    found |= {"loss": loss, "acc": x.argmax() in gold}
                for name, value in found.items():
                    totals[order][names.index(name)] += value, 1
    for order, sums in totals.items():
        sums = np.reshape(common.all_reduce_sum(sums.flat), sums.shape)
        # only the model has a loss, and lines may have no answer
        totals[order] = {name: total / n for name, (total, n) in zip(names, sums) if n}
    return totals


if __name__ == "__main__":
    # ---- configure ----
    s = SimpleNamespace(**common.configure(globals()))
    if not s.model or not s.eval_data:
        raise SystemExit("give --model=... and --eval_data=...")
    s.rank, s.world_size, _, device = common.setup_distributed()

    # ---- data, model ----
    file = open_pairs(s.eval_data)
    runs = find_runs(file, s.queries_per_passage, s.eval_lines)
    embedder = Embedder.load(
        s.model, device=device, dtype=s.dtype, attention_backend=s.attention_backend
    )

    # ---- evaluate, save ----
    found = evaluate(embedder, file, runs, s)
    if s.rank == 0:
        n_queries = int(runs[:, 1].sum())
        facts = {"model": pinned(s.model), "eval_data": s.eval_data, "queries": n_queries}
        write_json(facts | {"results": found}, s.out_dir, "results.json")
        rows = [["", *found], ["---"] + ["--:"] * len(found)]
        for name in found["model"]:
            rows.append([name, *(f"{x[name]:.3f}" if name in x else "" for x in found.values())])
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        facts = ", ".join(f"{key} {value}" for key, value in facts.items())
        Path(s.out_dir, "results.md").write_text(f"{facts}\n\n{table}", "utf-8")
        print(table)
    common.print0(f"peak memory {common.peak_memory(device) / 1e9:.2f} GB")
    if dist.is_initialized():
        dist.destroy_process_group()
