"""
Texts to embeddings, with the ids, the template and the pooling of training.

    embedder = Embedder.load("any/model")
    vectors = embedder.encode(["my text"])                        # float32 [1, C]
    scores, spans = score_tokens(embedder, queries, passage)      # how much each token matters

Shapes: B texts, T tokens of the packed row, P pooled tokens, C n_embd, V vocabulary, N all texts.
"""

import math
import os
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attention import make_seqs
from common import dtype_of, logged, prefetch, print0
from formats import llm2vec, read_json
from formats import sentence_transformers as st
from formats.huggingface import resolve_folder, save_pretrained
from formats.peft import attention_of_chain, pinned_chain
from lora import load_adapter, load_merged, lora_layers, merged_state, save_adapter
from pooling import groups, pack, pool, splade
from quantize import quantize
from token_scores import cosines, windows_of
from tokenizer import (
    TEMPLATES,
    check_text,
    check_tokenizer,
    load_tokenizer,
    puts_end,
    tokenize,
    tokenize_llm2vec,
    tokenize_passage,
)

POOLINGS = ("mean", "weighted_mean", "last", "cls", "splade", "tokens")
PART = 2**26  # numbers that a rank's share of `encode` holds at a time: 256 MB


def chunks_of(encoded, limit):
    """Indices of texts, longest first, in lists of at most `limit` tokens together."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    parts = groups([len(encoded[i][0]) for i in order], limit)
    return [[order[i] for i in part] for part in parts]


class Embedder(nn.Module):
    """A model and all that makes its embeddings what they are.

    pooling: "mean", "weighted_mean", "last" or "cls" give [C] a text; "splade" a weight for each
    entry of the vocabulary [V]; "tokens" a vector for each token (late interaction), through
    `projection`, an nn.Linear without bias or None.
    prompts: {"query": instruction, "document": instruction, ...}, for evaluations and for
    sentence-transformers; `encode` takes the instruction itself. normalize: to length 1, except
    with splade. dtype: what evaluation and use compute in (autocast), fp32 or bf16.
    instructions: {data set or task of MTEB: instruction}, for eval_mteb.py. doc_max_length: ids are
    made by tokenize_llm2vec. token_scores: was the model trained for score_tokens?

    All that has parameters runs in one forward call: DDP(embedder)(*packed).
    """

    def __init__(
        self, model, tokenizer, pooling="mean", template=TEMPLATES["none"], prompts=None,
        normalize=True, max_length=512, pool_instruction=True, projection=None,
        dtype=torch.float32, pool_bos=True, doc_max_length=None, instructions=None,
        token_scores=False,
    ):  # fmt: skip
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        if pooling == "splade" and model.config.head == "none":
            raise ValueError("pooling 'splade' needs a language modelling head, the model has none")
        if projection and (pooling != "tokens" or projection.bias is not None):
            raise ValueError("a projection goes with pooling 'tokens', and has no bias")
        check_tokenizer(tokenizer, model.config.vocab_size)
        if pooling == "last" and not template.suffix and not puts_end(tokenizer):
            print0("pooling='last' reads a text's last word: no end token, see the key suffix")
        self.model, self.tokenizer, self.projection = model, tokenizer, projection
        self.pooling, self.template = pooling, template
        self.prompts = prompts or {"query": "", "document": ""}
        self.normalize = normalize and pooling != "splade"
        self.max_length, self.dtype = max_length, dtype
        self.pool_instruction = pool_instruction or pooling == "last"  # the same vector there
        self.pool_bos, self.doc_max_length = pool_bos, doc_max_length
        self.instructions, self.token_scores = instructions or {}, token_scores

    @property
    def dim(self):
        if self.projection:
            return self.projection.out_features
        c = self.model.config
        return c.vocab_size if self.pooling == "splade" else c.n_embd

    @property
    def device(self):
        return self.model.embed.weight.device

    def tokenize(self, texts, instruction=""):
        """`tokenize` with this embedder's template, length and pooled range."""
        settings = self.template, self.max_length, self.pool_instruction
        if self.doc_max_length:
            return tokenize_llm2vec(
                self.tokenizer, texts, instruction, *settings, self.doc_max_length
            )
        return tokenize(self.tokenizer, texts, instruction, *settings, self.pool_bos)

    def forward(self, tokens, seqs, pooled):
        """What `pack` returned -> fp32 [B, dim], with gradients; for "tokens" (vectors [P, dim],
        their number in each text)."""
        hidden = self.model(tokens, seqs)  # [T, C]
        if self.pooling == "splade":
            return splade(self.model, hidden, pooled)
        with torch.autocast(hidden.device.type, enabled=False):
            x = pool(hidden, pooled, self.pooling)  # [B, C], or [P, C]
            if self.projection:
                x = F.linear(x, self.projection.weight.to(x.dtype))
            x = F.normalize(x, dim=-1) if self.normalize else x
        return (x, pooled.lengths) if self.pooling == "tokens" else x

    def embed(self, encoded):
        """What `tokenize` returned -> see forward."""
        return self(*pack(encoded, self.device))

    @contextmanager
    def evaluating(self):
        """Without dropout and gradients, in `dtype`."""
        was_training, half = self.training, self.dtype != torch.float32
        self.eval()
        # not inference_mode: masks that the model keeps must serve training, too
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=half):
            try:
                yield
            finally:
                self.train(was_training)

    def encode(
        self, texts, instruction="", device_batch_tokens=None, progress=False, out=None, dim=None,
        precision=None, ranges=None,
    ):  # fmt: skip
        """A sequence of texts -> float32 array [N, dim]; for "tokens" a list of N arrays.

        instruction: one for all texts, or one for each. [instruction, text] pairs, as LLM2Vec takes
        them, stand for both.
        dim: only the first of the numbers (Matryoshka), again of length 1 where the model
        normalizes. precision: "int8" [N, dim], by `ranges` or by those of these texts, or "binary"
        [N, dim / 8]: see quantize.py, which has their scores. device_batch_tokens: the most tokens
        of one forward call (None: 16,384, and 2,048 on a CPU, whose caches are small). out: path of
        a .npy to write part by part and give back mapped.
        Under torchrun all ranks call it together: each embeds its share, all get the whole.
        """
        many, device = self.pooling == "tokens", self.device
        if isinstance(texts, str) or instruction is None:
            raise TypeError("encode takes a list of texts, not one string; no instruction is ''")
        if many and out is not None:
            raise ValueError("out= holds one vector a text, pooling 'tokens' gives several")
        if not isinstance(instruction, str) and len(instruction) != len(texts):
            raise ValueError(f"{len(instruction)} instructions for {len(texts)} texts")
        if dim and (self.pooling == "splade" or not 1 <= dim <= self.dim):
            raise ValueError(f"dim={dim} of {self.dim} numbers, by pooling {self.pooling!r}")
        if precision and self.pooling in ("splade", "tokens"):
            raise ValueError(f"precision={precision!r} is not for pooling {self.pooling!r}")
        calibrate = precision == "int8" and ranges is None  # when all texts are there
        if calibrate and out is not None:
            raise ValueError("precision='int8' with out= needs ranges= (quantize.ranges_of)")
        finish = partial(quantize, precision=None if calibrate else precision, ranges=ranges)
        usual = finish(np.empty((0, dim or self.dim), np.float32))
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        limit = device_batch_tokens or (2048 if device.type == "cpu" else 16384)
        numbers = self.dim * (self.max_length if many else 1)  # of a text, at most
        size = max(1, min(8192, PART // numbers)) * world  # texts of a part
        n, result = len(texts), None
        if many:
            result = [None] * n
        elif out is None:
            result = np.empty((n, usual.shape[1]), usual.dtype)
        elif rank == 0:
            result = np.lib.format.open_memmap(out, "w+", usual.dtype, (n, usual.shape[1]))

        def parts():  # the next one is tokenized while the model runs
            for begin in range(0, n, size):
                rows = range(begin + rank, min(begin + size, n), world)
                share, given = [texts[i] for i in rows], instruction
                if not isinstance(given, str):
                    given = [check_text(given[i], f"instruction {i}") for i in rows]
                if share and isinstance(share[0], (list, tuple)):
                    if given:
                        raise ValueError("instruction= and [instruction, text] pairs: give one")
                    for i, pair in zip(rows, share):
                        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                            raise TypeError(f"text {i} is {pair!r:.60}, expected a pair of two str")
                    given, share = zip(*share)
                share = [check_text(text, f"text {i}") for i, text in zip(rows, share)]
                encoded = []  # few texts at a time: a tokenizer needs 50 times the room of the ids
                for i in range(0, len(share), 256):
                    few = given if isinstance(given, str) else given[i : i + 256]
                    few = self.tokenize(share[i : i + 256], few)
                    encoded += [(np.array(ids, np.int32), span) for ids, span in few]
                yield begin, encoded

        bar = tqdm(total=n, desc="encode", unit=" texts", disable=not progress or rank > 0)
        with self.evaluating(), bar:
            for begin, encoded in prefetch(parts(), 1):
                chunks = chunks_of(encoded, limit)
                vectors, counts = [torch.empty(0, self.dim, device=device)], []
                for chunk in chunks:
                    x = self.embed([encoded[i] for i in chunk])
                    vectors.append(x[0] if many else x)
                    counts += x[1] if many else []
                    bar.update(len(chunk) * world)
                vectors = torch.cat(vectors)[:, :dim].cpu()  # once a part: the device need not wait
                if not vectors.isfinite().all():
                    raise ValueError(f"encode: NaN or infinity in a vector of texts {begin}..")
                if dim and self.normalize:
                    vectors = F.normalize(vectors, dim=-1)
                places = np.argsort([i for chunk in chunks for i in chunk])  # of the texts' vectors
                if many:
                    vectors = vectors.split(counts)
                    share = [vectors[i].numpy() for i in places]
                else:
                    share = finish(vectors.numpy()[places])
                shares = [share] * world
                if world > 1:
                    dist.all_gather_object(shares, share)
                if result is not None:
                    for r, share in enumerate(shares):
                        result[begin + r : begin + size : world] = share
        if out is None:
            return quantize(result, precision, ranges) if calibrate else result
        if rank == 0:
            result.flush()
        if world > 1:
            dist.barrier()
        return np.load(out, mmap_mode="r")

    # ---- folders ----

    st_problem = st.st_problem  # why sentence-transformers would give other embeddings, or None

    def save(self, folder, sentence_transformers=True, state_dict=None):
        """Writes a sentence-transformers folder: a dense model, for "splade" a SparseEncoder, for
        "tokens" a MultiVectorEncoder; with sentence_transformers=False one for Embedder.load alone.
        LoRA is merged in the files, not in the model. state_dict: full weights from elsewhere, by
        the model's names, and "projection.weight" where there is one.
        Raises ValueError, before anything is written, where embeddings there would differ.
        """
        if sentence_transformers and (problem := self.st_problem()):
            raise ValueError(f"{folder}: sentence-transformers would give other embeddings: "
                             f"{problem}. Or save it with sentence_transformers=False")  # fmt: skip
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        projection = state.pop("projection.weight", getattr(self.projection, "weight", None))
        if any(".lora_" in name for name in state):
            state = merged_state(self.model, state)
        save_pretrained(self.model, folder, state)
        st.write_settings(self, folder, projection)
        if sentence_transformers:
            st.write_tokenizer(self, folder)
            st.write_modules(self, folder)
        else:
            self.tokenizer.save_pretrained(folder)

    def save_trained(self, folder, weights, base, adapters, sentence_transformers=True):
        """`save` of a training run: LoRA merged from the precision of the base's files, and beside
        it the adapter. weights: the model's full tensors; base, adapters: see load_for_training."""
        self.save(folder, sentence_transformers, merged_state(self.model, weights, base, adapters))
        if lora_layers(self.model):
            save_adapter(self.model, f"{folder}/adapter", base, weights, adapters)
            st.write_settings(self, f"{folder}/adapter")  # load asks an adapter how it embeds
            self.tokenizer.save_pretrained(f"{folder}/adapter")  # it may not be the base's

    @classmethod
    def load(
        cls, name, adapters=(), device=None, dtype="auto", attention=None,
        attention_backend="auto", pooling=None, template=None, prompts=None, normalize=None,
        max_length=None, pool_instruction=None, merge=True,
    ):  # fmt: skip
        """An Embedder, ready to encode, from a folder or a hub id `owner/name[@revision]`.

        name: a folder of `save`, a sentence-transformers folder, a plain Hugging Face model, or a
        PEFT adapter, whose base is loaded first; of an out_dir, its newest checkpoint. Of LLM2Vec's
        published adapters (formats/llm2vec.py) all that belongs to the model is loaded. adapters:
        more of them, merged in this order (LLM2Vec: base, MNTP, then SimCSE or supervised).
        merge=False leaves the last one beside the weights, which is slower and not rounded with
        them. attention: "causal" or "bidirectional" where the files do not say. dtype: "auto",
        "bf16" or "fp32". The other arguments replace what the folder says. Where nobody says it:
        mean over all tokens, normalised, up to 512 of them.
        Raises ValueError for a sentence-transformers folder with a part that is not supported, for
        an adapter whose attention nothing says, and for one of LLM2Vec's that needs others before.
        """
        device = torch.device(device or torch.accelerator.current_accelerator(True) or "cpu")
        dtype = dtype_of(dtype, device)
        names = [*pinned_chain(name), *adapters]
        folders = [resolve_folder(x) for x in names]
        family, settings = read_json(folders[0], "config.json").get("model_type"), {}
        for known_as, folder in zip(names, folders):  # the last one's word counts
            settings |= st.read_settings(folder) or llm2vec.read_settings(known_as, folder, family)
        given = dict(pooling=pooling, template=template, prompts=prompts, normalize=normalize,
                     max_length=max_length, pool_instruction=pool_instruction)  # fmt: skip
        settings |= {key: value for key, value in given.items() if value is not None}
        path = settings.pop("path", None)

        base = f"{folders[0]}/{path or ''}"
        attention = attention or attention_of_chain(base, names[1:])
        merged = names[1:] if merge else names[1:-1]
        model = load_merged(base, merged, attention, dtype=dtype)
        for adapter in names[1 + len(merged) :]:
            load_adapter(model, adapter)
        model.eval().set_backend(attention_backend, device, dtype)
        # LLM2Vec takes the tokenizer of the model that its second adapter is put on
        sources = [
            folder for known_as, folder in zip(names, folders)
            if os.path.exists(f"{folder}/tokenizer.json")
            and not llm2vec.is_second(known_as, folder)
        ]  # fmt: skip
        tokenizer = load_tokenizer([base, *sources][-1])
        if "pooling" not in settings:
            print0(f"{name} does not say how it pools: mean over all tokens")
        settings.setdefault("max_length", min(512, model.config.max_seq_len))
        embedder = cls(model, tokenizer, **settings, dtype=dtype).to(device).eval()
        foreign = path is not None and not embedder.pool_instruction
        if foreign and (problem := embedder.st_problem()):
            print0(f"{name}: not in all as sentence-transformers has it: {problem}")
        if len(names) > 1:
            print0(f"{name} is {' + '.join(names)}, in this order")
        print0(f"{name}: {model.describe()}\n{dtype} on {device}; {embedder.pooling} -> "
               f"{embedder.dim} numbers, up to {embedder.max_length} tokens")  # fmt: skip
        return embedder


def compare_saved(s, step, trained, evaluate):
    """Ends a run: prints the scores before training, of step 0 in log.csv, and those of the folder
    saved last, loaded as a user loads it. evaluate: a function of an Embedder -> {name: score}, on
    all ranks. trained: what was trained, which leaves the device and makes room."""
    if s.dry_run or step < s.stop_step:
        return
    if s.fsdp:
        print0("not loaded again: under FSDP the whole model may not fit on one device")
        return
    trained.cpu()
    name, given = f"{s.out_dir}/step{step}", dict(device=s.device, dtype=s.dtype)
    after = evaluate(Embedder.load(name, attention_backend=s.attention_backend, **given))
    before = logged(s.out_dir, 0)
    changes = (f"{key} {before.get(f'eval_{key}', math.nan):.4g} -> {x:.4g}"
               for key, x in after.items())  # fmt: skip
    print0(f"{name} loaded again, before -> after training:\n{', '.join(changes)}")


def score_tokens(embedder, queries, passage, window=0, overlap=0, progress=False):
    """-> (scores float32 [Q, n], spans int64 [n, 2]): for each query the cosine of its embedding
    and of every token of the passage; and each token's characters [start, end) in the raw passage.

    queries get the instruction prompts["query"], the passage prompts["document"]; it is never cut.
    window: the number of tokens that are encoded at a time, 0 for the whole; neighbours share
    `overlap`. Ids and spans are the whole's. Scores differ a little, because a token sees no
    further than its window.
    """
    model, device, prompts = embedder.model, embedder.device, embedder.prompts
    if embedder.pooling in ("splade", "tokens"):
        raise ValueError(f"score_tokens compares with one vector, not with {embedder.pooling!r}")
    if isinstance(queries, str):
        raise TypeError("score_tokens takes a list of queries, not one string")
    queries = [check_text(query, f"query {i}") for i, query in enumerate(queries)]
    check_text(passage, "passage")
    instruction = prompts.get("document", "")
    ids, rows, spans = tokenize_passage(embedder.tokenizer, passage, instruction, embedder.template)
    scores = []
    with embedder.evaluating():
        vectors = embedder.embed(embedder.tokenize(queries, prompts.get("query", "")))
        vectors = F.normalize(vectors, dim=-1)  # [Q, C]
        windows = windows_of(len(ids), window, overlap, model.config.causal)
        windows = tqdm(windows, "score", unit=" windows", disable=not progress)
        for start, stop, first, last in windows:
            tokens = torch.tensor(ids[start:stop], device=device)
            hidden = model(tokens, make_seqs([stop - start], device))  # [window, C]
            inside = torch.from_numpy(rows[(rows >= first) & (rows < last)] - start).to(device)
            scores.append(cosines(vectors, hidden[inside]).cpu())
    scores = torch.cat(scores, dim=1)
    if not scores.isfinite().all():
        raise ValueError("score_tokens: scores have NaN or infinity")
    return scores.numpy(), spans
