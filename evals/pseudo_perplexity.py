"""
Pseudo-perplexity by length: how well an encoder uses a long text to fill in one token of it.

    python -m evals.pseudo_perplexity --model=out/mlm_pydocs_tiny --lengths=128,512

Salazar et al. 2020 (arXiv 1910.14659, section 2.3), on n tokens of each text, each masked alone:

    PPPL = exp( - 1/N * sum over texts and their i of log p(x_i | the text with i masked) )

Of a causal model it is the perplexity, of all tokens but a text's first. Texts are the documents of
val.bin with at least so many tokens, cut there; out_dir/results.json gets the table.
"""

import usage  # noqa: F401  --help ends here, without torch

import math
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import common
from attention import make_seqs
from formats import read_json, write_json
from formats.huggingface import from_pretrained, resolve_folder
from tokenizer import check_tokenizer
from tokens import open_tokens, tokenizer_of

# ---- defaults ----
out_dir = "out/pseudo_perplexity"  # like .+
model = ""  # a model's folder, an out_dir or a hub id owner/name[@revision]; no adapter
data = "data/pydocs"  # a folder of val.bin, meta.json, tokenizer/: see data/*/prepare.py
lengths: tuple[int, ...] = (128, 256, 512, 1024)  # >= 2; in tokens
n_texts = 50  # >= 1; of each length, drawn from the seed
n_masks = 100  # >= 1; tokens of each text that are predicted, drawn likewise
device_batch_tokens = 16384  # >= 1; of one forward
seed = 1337  # >= 0 and < 1e18
# device
attention_backend = "auto"  # one of auto, flash_attn, varlen, sdpa; auto: the first that can run
dtype = "auto"  # one of auto, bf16, fp32; auto: what the device is good at


@torch.no_grad()
def negative_log_likelihood(model, ids, places, mask_id, limit):
    """The sum over `places` [n] of -log p(ids[place] | the other ids), ids [T] one text. n copies
    of it go through the model end to end, as many at a time as have `limit` tokens, or one."""
    total, device = 0.0, model.embed.weight.device
    for part in np.array_split(places, -(-len(places) // max(1, limit // len(ids)))):
        rows = np.arange(len(part)) * len(ids) + part  # [n]
        copies = np.tile(ids, len(part))  # [n T]
        copies[rows] = mask_id
        tokens, rows, targets = (torch.from_numpy(x).to(device) for x in (copies, rows, ids[part]))
        total += model(tokens, make_seqs([len(ids)] * len(part), device), rows, targets)[0].item()
    return total


@torch.no_grad()
def causal_negative_log_likelihood(model, ids):
    """The sum of -log p(x_i | x_1 .. x_(i-1)) of a text ids [T], but for its first token."""
    tokens = torch.from_numpy(ids).to(model.embed.weight.device)
    rows = torch.arange(len(ids) - 1, device=tokens.device)
    return model(tokens, make_seqs([len(ids)], tokens.device), rows, tokens[1:])[0].item()


if __name__ == "__main__":
    # ---- configure, data and model ----
    s = SimpleNamespace(**common.configure(globals()))
    if not s.model:
        raise SystemExit("give --model=...")
    device = common.setup_distributed()[3]
    file, tokenizer = open_tokens(s.data, "val"), tokenizer_of(s.data)
    dtype, folder = common.dtype_of(s.dtype, device), resolve_folder(s.model)
    if read_json(folder, "mntp.json"):
        raise SystemExit(f"{folder} is of train_mntp.py, read one place before the masked token")
    model = from_pretrained(folder, dtype=dtype).to(device).eval()
    check_tokenizer(tokenizer, model.config.vocab_size)
    if not model.config.causal and tokenizer.mask_token_id is None:
        raise SystemExit(f"{s.data}: its tokenizer has no mask token")
    model.set_backend(s.attention_backend, device, dtype)

    # ---- a row for each length ----
    rows, n_tokens = [], np.diff(file.starts)  # [documents]
    for length in s.lengths:
        if length > model.config.max_seq_len:
            print(f"{length:,} tokens: {s.model} was trained for {model.config.max_seq_len:,}")
        rng, total, count = np.random.default_rng((s.seed, length)), 0.0, 0
        documents = np.flatnonzero(n_tokens >= length)
        documents = rng.permutation(documents)[: s.n_texts]
        for i in tqdm(documents, f"{length:,} tokens"):
            ids = file.tokens[file.starts[i] : file.starts[i] + length].astype(np.int64)
            if model.config.causal:
                total += causal_negative_log_likelihood(model, ids)
                count += length - 1
                continue
            ordinary = np.flatnonzero(~np.isin(ids, file.meta["special_ids"]))
            places = rng.permutation(ordinary)[: s.n_masks]
            total += negative_log_likelihood(
                model, ids, places, tokenizer.mask_token_id, s.device_batch_tokens
            )
            count += len(places)
        value = math.exp(total / count) if count else None
        rows.append({"length": length, "texts": len(documents), "tokens": count, "value": value})
        print(f"{length:6,} tokens: {value or math.nan:10.2f}   {len(documents)} texts, "
              f"{count:,} predictions")  # fmt: skip
    name = "perplexity" if model.config.causal else "pseudo-perplexity"
    write_json({"model": s.model, "measure": name, "rows": rows}, s.out_dir, "results.json")
