r"""
Token retrieval: how well a model finds the tokens of a passage that matter for a query, in one
table with orders of the tokens that learn nothing.

    python -m evals.token_retrieval --model=out/token_retrieval_pydocs_tiny \
        --eval_data=data/pydocs/spans_test.jsonl
    torchrun --standalone --nproc_per_node=8 -m evals.token_retrieval --model=out/x --eval_data=...

The scores are those of use, embedder.score_tokens; passages are not cut. Lines are as in
train_token_retrieval.py, the numbers are those of metrics.token_metrics, means over the queries.
out_dir gets results.json and results.md.
"""

import json
import os
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import common
from data import open_pairs
from embedder import Embedder, score_tokens
from formats.huggingface import pinned
from metrics import baseline_scores, names_of, token_metrics
from spans import find_runs, gold_tokens, read_spans, squeezed
from tokenizer import tokenize_passage

# ---- defaults ----
out_dir = "out/eval_token_retrieval"
model = ""  # a folder, an out_dir or a hub id; it says how it pools and its instructions
eval_data = ""  # JSONL of {"query", "passage", "spans", perhaps "answer"}
eval_lines = 1000  # of eval_data, from its start; 0: all
queries_per_passage = 8  # most following lines with the same passage that are scored together
passage_window = 0  # tokens encoded at a time; 0: the whole
window_overlap = 0  # tokens that neighbouring windows share
ratios: tuple[int, ...] = (16, 8, 4)  # 1/16, 1/8 and 1/4 of a passage's tokens are kept
temperature = 0.02  # of the loss, which results.json has
seed = 1337  # of the random order, and of what ties in the others
# device
attention_backend = "auto"  # flash_attn, varlen, sdpa, or the first of them that can run
dtype = "auto"  # bf16, fp32, or what the device is good at


def spelling(embedder, passage):
    """What gold_tokens needs: indices of the passage's tokens -> what their ids decode to; None
    where the tokenizer does not give the passage back."""
    instruction, tokenizer = embedder.prompts.get("document", ""), embedder.tokenizer
    ids, rows, _ = tokenize_passage(tokenizer, passage, instruction, embedder.template)

    def spell(tokens):
        return tokenizer.decode([ids[row] for row in rows[tokens]])

    return spell if squeezed(spell(slice(None))) == squeezed(passage) else None


def evaluate(embedder, file, runs, s):
    """-> {"random", "first", "overlap", "bm25", "model": {name: mean over all queries}}, for the
    model its "loss" and "acc" (a gold token is first), too. Every rank takes its share of runs."""
    names = ["loss", "acc", *names_of(s.ratios)]
    orders = ["random", "first", "overlap", "bm25", "model"]
    totals = {(order, name): np.zeros(2) for order in orders for name in names}  # sum, count
    for first, n in tqdm(runs[s.rank :: s.world_size].tolist(), "evaluate", disable=s.rank > 0):
        records = [read_spans(file, i) for i in range(first, first + n)]
        queries, passage = [record["query"] for record in records], records[0]["passage"]
        scores, spans = score_tokens(
            embedder, queries, passage, s.passage_window, s.window_overlap
        )  # [Q, n], [n, 2]
        spell = spelling(embedder, passage)
        for record, row in zip(records, scores, strict=True):
            gold = np.unique(np.concatenate(gold_tokens(record, spans, spell)))
            rng = np.random.default_rng((s.seed, record["line"]))
            for order, x in (baseline_scores(record, spans, rng) | {"model": row}).items():
                found = token_metrics(x, gold, spans, record, s.ratios)
                if order == "model":
                    logits = x.astype(float) / s.temperature
                    loss = np.logaddexp.reduce(logits) - logits[gold].mean()
                    found |= {"loss": loss, "acc": x.argmax() in gold}
                for name, value in found.items():
                    totals[order, name] += value, 1
    sums = np.reshape(common.all_reduce_sum(np.concatenate(list(totals.values()))), (-1, 2))
    out = {order: {} for order in orders}
    for (order, name), (total, count) in zip(totals, sums, strict=True):
        if count:  # only the model has a loss, and lines may have no answer
            out[order][name] = total / count
    return out


def write_results(found, folder, facts):
    """results.json and results.md in the folder; prints the table."""
    names = [name for name in found["model"] if name not in ("loss", "acc")]
    rows = [["", *names], ["---"] * (1 + len(names))]
    rows += [[order, *(f"{x[name]:.3f}" for name in names)] for order, x in found.items()]
    table = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "results.json"), "w", encoding="utf-8") as f:
        json.dump(facts | {"results": found}, f, indent=1)
    with open(os.path.join(folder, "results.md"), "w", encoding="utf-8") as f:
        f.write(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n\n" + table)
    print(table)


if __name__ == "__main__":
    # ---- configure ----
    s = SimpleNamespace(**common.configure(globals()))
    if not s.model or not s.eval_data:
        raise SystemExit("give --model=... and --eval_data=...")
    if any(type(r) is not int or r < 1 for r in (*s.ratios, s.queries_per_passage)):
        raise SystemExit(
            f"ratios={s.ratios}, queries_per_passage={s.queries_per_passage}: expected whole "
            "numbers from 1; 16 keeps 1/16 of the tokens"
        )
    s.rank, s.world_size, _, device = common.setup_distributed()

    # ---- data, model ----
    file = open_pairs(s.eval_data)
    runs = find_runs(file, s.queries_per_passage, s.eval_lines)
    backend = s.attention_backend
    embedder = Embedder.load(s.model, device=device, dtype=s.dtype, attention_backend=backend)

    # ---- evaluate ----
    found = evaluate(embedder, file, runs, s)
    facts = {"model": pinned(s.model), "eval_data": s.eval_data, "queries": int(runs[:, 1].sum())}
    if s.rank == 0:
        write_results(found, s.out_dir, facts)
    common.print0(f"peak memory {common.peak_memory(device) / 1e9:.2f} GB")
    if dist.is_initialized():
        dist.destroy_process_group()
