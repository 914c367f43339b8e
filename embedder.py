"""
Texts to embeddings: one path for training, evaluation and use.

    embedder = Embedder.load("any/model")
    vectors = embedder.encode(["my text"])                        # float32 [1, C]

    pack, pool      lists of ids -> one packed row; hidden states of a packed row -> vectors
    Embedder        a model with its tokenizer, template, pooling and prompts: encode, save, load

`save` writes a folder that sentence-transformers opens, or says why embeddings there would differ.
Shapes: B texts, T tokens of the packed row, P pooled tokens, C n_embd, V vocabulary, N all texts.
"""

import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import dtype_of, prefetch, print0
from formats import sentence_transformers as st
from formats.huggingface import resolve_folder, save_pretrained
from formats.peft import adapter_chain, attention_of
from lora import load_merged, lora_layers, merged_state, save_adapter
from pooling import groups, pack, pool, splade
from tokenizer import TEMPLATES, check_tokenizer, load_tokenizer, tokenize


def chunks_of(encoded, limit):
    """Indices of texts, longest first, in lists of at most `limit` tokens together."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    parts = groups([len(encoded[i][0]) for i in order], limit)
    return [[order[i] for i in part] for part in parts]


# ---- the embedder ----

PART = 2**26  # numbers that a rank's share of `encode` holds at a time: 256 MB
POOLINGS = ("mean", "weighted_mean", "last", "cls", "splade", "tokens")


class Embedder(nn.Module):
    """A model and all that makes its embeddings what they are.

    pooling: "mean", "weighted_mean", "last" or "cls" give [C] a text; "splade" a weight for each
    entry of the vocabulary [V]; "tokens" a vector for each token (late interaction), through
    `projection`, an nn.Linear without bias or None.
    prompts: {"query": instruction, "document": instruction, ...}, for evaluations and for
    sentence-transformers; `encode` takes the instruction itself. normalize: to length 1, except
    with splade. dtype: what `encode` computes in (autocast), fp32 or bf16.

    All that has parameters runs in one forward call: DDP(embedder)(*packed).
    """

    def __init__(
        self, model, tokenizer, pooling="mean", template=TEMPLATES["none"], prompts=None,
        normalize=True, max_length=512, pool_instruction=True, projection=None,
        dtype=torch.float32,
    ):  # fmt: skip
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        if pooling == "splade" and model.config.head == "none":
            raise ValueError("pooling 'splade' needs a language modelling head, the model has none")
        if projection and (pooling != "tokens" or projection.bias is not None):
            raise ValueError("a projection goes with pooling 'tokens', and has no bias")
        check_tokenizer(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer, self.projection = model, tokenizer, projection
        self.pooling, self.template = pooling, template
        self.prompts = prompts or {"query": "", "document": ""}
        self.normalize = normalize and pooling != "splade"
        self.max_length, self.dtype = max_length, dtype
        self.pool_instruction = pool_instruction or pooling == "last"  # the same vector there

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
        return tokenize(self.tokenizer, texts, instruction, *settings)

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
            yield
        self.train(was_training)

    def encode(self, texts, instruction="", device_batch_tokens=None, progress=False, out=None):
        """A sequence of texts -> float32 array [N, dim]; for "tokens" a list of N arrays.

        device_batch_tokens: the most tokens of one forward call (None: 16,384, and 2,048 on a CPU,
        whose caches are small). out: path of a .npy to write part by part and give back mapped.
        Under torchrun all ranks call it together: each embeds its share, all get the whole.
        """
        many, device = self.pooling == "tokens", self.device
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one string")
        if many and out is not None:
            raise ValueError("out= holds one vector a text, pooling 'tokens' gives several")
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        limit = device_batch_tokens or (2048 if device.type == "cpu" else 16384)
        numbers = self.dim * (self.max_length if many else 1)  # of a text, at most
        size = max(1, min(8192, PART // numbers)) * world  # texts of a part
        n, result = len(texts), None
        if many:
            result = [None] * n
        elif out is None:
            result = np.empty((n, self.dim), np.float32)
        elif rank == 0:
            result = np.lib.format.open_memmap(out, "w+", np.float32, (n, self.dim))

        def parts():  # the next one is tokenized while the model runs
            for begin in range(0, n, size):
                share = [texts[i] for i in range(begin + rank, min(begin + size, n), world)]
                yield begin, self.tokenize(share, instruction)

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
                vectors = torch.cat(vectors).cpu()  # once a part: the device need not wait
                places = np.argsort([i for chunk in chunks for i in chunk])  # of the texts' vectors
                if many:
                    vectors = vectors.split(counts)
                    share = [vectors[i].numpy() for i in places]
                else:
                    share = vectors.numpy()[places]
                shares = [share] * world
                if world > 1:
                    dist.all_gather_object(shares, share)
                if result is not None:
                    for r, share in enumerate(shares):
                        result[begin + r : begin + size : world] = share
        if out is None:
            return result
        if rank == 0:
            result.flush()
        if world > 1:
            dist.barrier()
        return np.load(out, mmap_mode="r")

    # ---- folders ----

    st_problem = st.st_problem  # why sentence-transformers would give other embeddings, or None
    save_settings = st.write_settings  # how it embeds, for `load`: it stands beside an adapter, too

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
        self.save_settings(folder, projection)
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
            self.save_settings(f"{folder}/adapter")

    @classmethod
    def load(
        cls, name, adapters=(), device=None, dtype="auto", attention=None,
        attention_backend="auto", pooling=None, template=None, prompts=None, normalize=None,
        max_length=None, pool_instruction=None,
    ):  # fmt: skip
        """An Embedder, ready to encode, from a folder or a hub id `owner/name[@revision]`.

        name: a folder of `save`, a sentence-transformers folder, a plain Hugging Face model, or a
        PEFT adapter, whose base is loaded first; of an out_dir, its newest checkpoint. adapters:
        more of them, merged in this order (LLM2Vec: base, MNTP, then SimCSE or supervised).
        attention: "causal" or "bidirectional" where config.json does not say. dtype: "auto",
        "bf16" or "fp32". The other arguments replace what the folder says. Where nobody says it:
        mean over all tokens, normalised, up to 512 of them.
        Raises ValueError for a sentence-transformers folder with a part that is not supported.
        """
        device = torch.device(device or torch.accelerator.current_accelerator(True) or "cpu")
        dtype = dtype_of(dtype, device)
        folders = [*adapter_chain(name), *map(resolve_folder, adapters)]
        settings = {}
        for folder in folders:  # a later adapter replaces what an earlier one says
            settings |= st.read_settings(folder)
        given = dict(pooling=pooling, template=template, prompts=prompts, normalize=normalize,
                     max_length=max_length, pool_instruction=pool_instruction)  # fmt: skip
        settings |= {key: value for key, value in given.items() if value is not None}
        path, usual = settings.pop("path", None), settings.pop("attention", None)

        base = f"{folders[0]}/{path or ''}"
        if attention is None and not any(map(attention_of, folders[1:])):
            attention = usual
        model = load_merged(base, folders[1:], attention, dtype=dtype).eval()
        model.set_backend(attention_backend, device, dtype)
        sources = [f for f in folders if os.path.exists(f"{f}/tokenizer.json")]
        tokenizer = load_tokenizer([base, *sources][-1])
        if "pooling" not in settings:
            print0(f"{name} does not say how it pools: mean over all tokens")
        settings.setdefault("max_length", min(512, model.config.max_seq_len))
        embedder = cls(model, tokenizer, **settings, dtype=dtype).to(device).eval()
        foreign = path is not None and not embedder.pool_instruction
        if foreign and (problem := embedder.st_problem()):
            print0(f"{name}: not in all as sentence-transformers has it: {problem}")
        print0(f"{name}: {model.describe()}, {dtype} on {device}; {embedder.pooling} -> "
               f"{embedder.dim} numbers, up to {embedder.max_length} tokens")  # fmt: skip
        return embedder
