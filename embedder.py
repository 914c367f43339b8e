"""
Texts to embeddings: one path for training, evaluation and use.

    embedder = Embedder.load("any/model")
    vectors = embedder.encode(["my text"])                        # float32 [1, C]

    tokenize    texts -> ids and the range that is pooled: the one place where ids are made
    pack, pool  lists of ids -> one packed row; hidden states of a packed row -> vectors
    Embedder    a model with its tokenizer, template, pooling and prompts; embed, encode, save, load
    score_tokens    each token of a passage, by how much it matters for a query

`save` writes a sentence-transformers folder: prefix + instruction become its prompts, the suffix
its tokenizer's post-processor. Where that cannot give equal embeddings, `save` says why.

Shapes: B texts, T tokens of the packed row, P pooled tokens, C n_embd, V vocabulary, N all texts.
"""

import copy
import json
import os
import string
import tempfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import dtype_of, print0
from data import check_tokenizer, load_tokenizer, make_seqs, prefetch
from lora import adapter_chain, attention_of, load_adapter, lora_layers, merge
from model import choose_backend, config_to_hf, from_pretrained, resolve_folder, to_compute

# ---- ids ----


@dataclass(frozen=True)
class Template:
    """What stands around every text: prefix + instruction + text + suffix. Saved with the model,
    never guessed from its name. The tokenizer's own BOS, CLS, EOS, SEP come on top."""

    prefix: str = ""
    suffix: str = ""


TEMPLATES = {  # chat wraps, chosen by name in a config
    "none": Template(),
    "llama3": Template("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama2": Template("[INST] ", " [/INST]"),
    "mistral": Template("[INST] ", " [/INST]"),
    "qwen": Template("<|im_start|>user\n", "<|im_end|>"),
}


def tokenize(tokenizer, texts, instruction, template, max_length, pool_instruction=True):
    """-> [(ids, (start, end)), ...], end exclusive: the tokens of each text and which are pooled.

    prefix + instruction + text + suffix are joined and tokenized once, as transformers does it: a
    special token spelled out in a text is that token. `instruction`: one for all, or a list. When
    there are more than `max_length` tokens, the text loses its last ones; the instruction, the
    suffix and the tokenizer's own EOS or SEP stay.
    Pooled are all tokens, or with pool_instruction=False those from the first that has a character
    of the text to the end, suffix and EOS included (as LLM2Vec and sentence-transformers do; like
    the latter, all tokens where there is neither prefix nor instruction). An empty text may leave
    nothing to pool: it gets the zero vector.
    Raises ValueError where prefix, instruction and suffix leave no room for the text.
    """
    instructions = [instruction] * len(texts) if isinstance(instruction, str) else instruction
    heads = [template.prefix + i for i in instructions]
    joined = [h + t + template.suffix for h, t in zip(heads, texts, strict=True)]
    encodings = whole_backend(tokenizer).encode_batch(joined)
    out = []
    for head, text, e in zip(heads, texts, encodings, strict=True):
        ids, start = e.ids, 0
        skip = head and not pool_instruction
        if skip or len(ids) > max_length:
            # by the last character of each token: one that holds the instruction's last space and
            # the text's first letters is the text's. What the tokenizer adds itself ends at 0.
            ends, added = [end for _, end in e.offsets], e.special_tokens_mask
            body = len(ids)  # without the EOS or SEP that it adds
            while body and added[body - 1]:
                body -= 1
            first = next((i for i, end in enumerate(ends) if end > len(head)), body)
            start = first if skip else 0
        if len(ids) > max_length:
            tail = next((i for i, end in enumerate(ends) if end > len(head) + len(text)), body)
            room = max_length - (len(ids) - tail)
            if room <= first:
                raise ValueError(
                    f"max_length {max_length} leaves no room for the text: {first} tokens stand in "
                    f"front of it, {len(ids) - tail} behind"
                )
            ids = ids[:room] + ids[tail:]
        out.append((ids or [0], (start, len(ids))))  # a row needs a token: it is not pooled
    return out


def whole_backend(tokenizer):
    """The tokenizer without the truncation and padding that its file may ask for."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


# ---- packed rows ----


@dataclass
class Pool:
    """Which tokens of a packed row make which vector."""

    text: torch.Tensor  # [T] int64, the text of each token
    place: torch.Tensor  # [T] int64, 1.. within what is pooled of that text, 0 for what is not
    rows: torch.Tensor  # [P] int64, the pooled tokens
    first: torch.Tensor  # [B] int64, the first pooled token of each text
    last: torch.Tensor  # [B] int64
    count: torch.Tensor  # [B] int64, pooled tokens of each text; 0 gives the zero vector
    lengths: list[int]  # the same on the host


def pack(encoded, device):
    """What `tokenize` returned -> (tokens [T] int64, seqs, pool): built on the CPU, moved once."""
    lengths = [len(ids) for ids, _ in encoded]
    starts = np.cumsum([0, *lengths[:-1]])  # [B]
    low, high = (starts + [span[i] for _, span in encoded] for i in (0, 1))
    count = high - low
    text = np.repeat(np.arange(len(encoded)), lengths)  # [T]
    at = np.arange(len(text))
    place = np.where((at >= low[text]) & (at < high[text]), at - low[text] + 1, 0)
    ends = starts + lengths - 1  # where nothing is pooled, any token of the text: it counts 0
    arrays = [text, place, np.flatnonzero(place), np.minimum(low, ends), np.maximum(high - 1, 0)]
    moved = [torch.from_numpy(a).to(device, non_blocking=True) for a in (*arrays, count)]
    tokens = torch.from_numpy(np.concatenate([ids for ids, _ in encoded]).astype(np.int64))
    tokens = tokens.to(device, non_blocking=True)
    return tokens, make_seqs(lengths, device), Pool(*moved, lengths=count.tolist())


def pool(hidden, where, pooling):
    """hidden [T, C] -> [B, C], in fp32 (fp64 if hidden is). pooling: "mean", "weighted_mean"
    (weights 1, 2, 3, .. over the pooled tokens), "last" or "cls", which is the first."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if pooling in ("cls", "last"):
        rows = where.first if pooling == "cls" else where.last
        return hidden[rows].to(wide) * (where.count > 0).to(wide)[:, None]
    weights = where.place.clamp(max=1) if pooling == "mean" else where.place
    weights, n = weights.to(wide), len(where.lengths)
    sums = hidden.new_zeros(n, hidden.size(1), dtype=wide)
    sums = sums.index_add(0, where.text, hidden.to(wide) * weights[:, None])
    total = weights.new_zeros(n).index_add(0, where.text, weights)
    return sums / total.clamp(min=1)[:, None]


def splade(model, hidden, where):
    """hidden [T, C] -> [B, V] fp32: max over a text's tokens of log(1 + relu(logit)).

    SPLADE v2 (Formal et al. 2021, arXiv 2109.10086, eq. 6). log(1 + relu) only grows, so the max
    is taken first. The logits exist for a few texts at a time, in the backward pass again.
    """

    def largest(x, counts):  # x [n, C] of whole texts, counts [b] -> [b, V]
        if model.head is not None:
            x = model.head(to_compute(x))
        logits = model.lm_head(x.to(model.lm_head.weight.dtype))
        return torch.segment_reduce(logits, "max", lengths=counts, unsafe=True, initial=0)

    limit = 2 ** (25 if hidden.device.type == "cpu" else 28) // model.config.vocab_size
    texts = groups(where.lengths, limit)
    rows = where.rows.split([sum(where.lengths[i] for i in group) for group in texts])
    counts = where.count.split([len(group) for group in texts])
    out = []
    for r, n in zip(rows, counts, strict=True):
        if torch.is_grad_enabled():
            out.append(checkpoint(largest, hidden[r], n, use_reentrant=False))
        else:
            out.append(largest(hidden[r], n))
    out = torch.cat(out)
    return out.to(torch.promote_types(out.dtype, torch.float32)).relu().log1p()


def groups(lengths, limit):
    """Neighbouring indices in lists of at most `limit` tokens together, at least one in each."""
    out, total = [], limit
    for i, n in enumerate(lengths):
        if total + n > limit:
            out.append([])
            total = 0
        out[-1].append(i)
        total += n
    return out


# ---- the embedder ----

PART = 2**26  # numbers that a rank's share of `encode` holds at a time: 256 MB
POOLINGS = ("mean", "weighted_mean", "last", "cls", "splade", "tokens")


class Embedder(nn.Module):
    """A model and all that makes its embeddings what they are.

    pooling: "mean", "weighted_mean", "last" or "cls" give [C] a text; "splade" a weight for each
    entry of the vocabulary [V]; "tokens" a vector for each token (late interaction), through
    `projection`, an nn.Linear without bias or None.
    prompts: {"query": instruction, "document": instruction, ...}, for those who evaluate and for
    sentence-transformers; `encode` takes the instruction itself. normalize: to length 1; splade
    never is. dtype: what `encode` computes in (autocast), fp32 or bf16.

    It is a module so that all that has parameters runs in one forward call: DDP(embedder)(*packed).
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
        if projection is not None and (pooling != "tokens" or projection.bias is not None):
            raise ValueError("a projection goes with pooling 'tokens', and has no bias")
        check_tokenizer(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer, self.projection = model, tokenizer, projection
        self.pooling, self.template = pooling, template
        self.prompts = prompts or {"query": "", "document": ""}
        self.normalize = normalize and pooling != "splade"
        self.max_length, self.dtype = max_length, dtype
        self.pool_instruction = pool_instruction or pooling == "last"  # the same there

    @property
    def dim(self):
        c = self.model.config
        size = c.n_embd if self.projection is None else self.projection.out_features
        return c.vocab_size if self.pooling == "splade" else size

    def tokenize(self, texts, instruction=""):
        """`tokenize` with this embedder's template, length and pooled range."""
        return tokenize(self.tokenizer, texts, instruction, self.template, self.max_length,
                        self.pool_instruction)  # fmt: skip

    def forward(self, tokens, seqs, where):
        """What `pack` returned -> fp32 [B, dim], with gradients; for "tokens" (vectors [P, dim],
        their number in each text)."""
        hidden = self.model(tokens, seqs)  # [T, C]
        if self.pooling == "splade":
            return splade(self.model, hidden, where)
        with torch.autocast(hidden.device.type, enabled=False):
            if self.pooling == "tokens":
                x = hidden[where.rows]  # [P, C]
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                if self.projection is not None:
                    x = F.linear(x, self.projection.weight.to(x.dtype))
            else:
                x = pool(hidden, where, self.pooling)
            x = F.normalize(x, dim=-1) if self.normalize else x
        return (x, where.lengths) if self.pooling == "tokens" else x

    def embed(self, encoded):
        """What `tokenize` returned -> see forward."""
        return self(*pack(encoded, self.model.embed.weight.device))

    def encode(self, texts, instruction="", batch_tokens=None, progress=False, out=None):
        """-> float32 array [N, dim] in the order of `texts`; for "tokens" a list of N arrays.

        texts: any sequence. batch_tokens: most tokens of one forward (None: 16,384, and 2,048 on a
        CPU, whose caches are small). Under torchrun all ranks call it together: each embeds its
        share, all get the whole. out: path of a .npy to write part by part, so that memory does
        not grow with N; the result is that file, mapped (all ranks must see it).
        """
        many = self.pooling == "tokens"
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one string")
        if many and out is not None:
            raise ValueError("out= holds one vector a text, pooling 'tokens' gives several")
        grouped = dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        n, device = len(texts), self.model.embed.weight.device
        batch_tokens = batch_tokens or (2048 if device.type == "cpu" else 16384)
        size = max(1, min(8192, PART // self.dim)) * world  # texts of a part
        result = [None] * n if many else None
        if not many and out is None:
            result = np.empty((n, self.dim), np.float32)
        elif not many and rank == 0:
            result = np.lib.format.open_memmap(out, "w+", np.float32, (n, self.dim))

        def parts():  # the next one is tokenized while the model runs
            for begin in range(0, n, size):
                mine = [texts[i] for i in range(begin + rank, min(begin + size, n), world)]
                yield begin, self.tokenize(mine, instruction)

        was_training = self.training
        self.eval()
        # not inference_mode: masks that the model keeps must serve training, too
        no_grad, half = torch.no_grad(), self.dtype != torch.float32
        bar = tqdm(total=n, desc="encode", unit=" texts", disable=not progress or rank > 0)
        with no_grad, torch.autocast(device.type, self.dtype, enabled=half), bar:
            for begin, encoded in prefetch(parts(), 1):
                order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
                share = [None] * len(encoded) if many else np.empty((len(encoded), self.dim), "f4")
                for group in groups([len(encoded[i][0]) for i in order], batch_tokens):
                    group = [order[i] for i in group]
                    x = self.embed([encoded[i] for i in group])
                    x = x[0].cpu().split(x[1]) if many else x.cpu()
                    for i, vectors in zip(group, x, strict=True):
                        share[i] = vectors.numpy()
                    bar.update(len(group) * world)
                shares = [share]
                if world > 1:
                    shares = [None] * world
                    dist.all_gather_object(shares, share)
                if result is not None:
                    for r, share in enumerate(shares):
                        result[begin + r : begin + size : world] = share
        self.train(was_training)
        if out is None:
            return result
        if rank == 0:
            result.flush()
        if grouped:
            dist.barrier()
        return np.load(out, mmap_mode="r")

    # ---- folders ----

    def st_problem(self):
        """Why sentence-transformers would not give equal embeddings from a saved folder, or None.

        Texts that tokenizers treat in ways of their own are tokenized as it would do it, from
        files, and compared. A second or two, no forward pass: ask before training.
        """
        family, kept = self.model.config.family, self.pool_instruction
        if family == "neobert":
            return "transformers has no NeoBERT"
        if self.pooling == "splade" and family != "modernbert":
            return f"its sparse models are masked language models, and {family} has no such class"
        if self.pooling in ("splade", "tokens", "weighted_mean") and not kept:
            return f"there, pooling {self.pooling!r} counts the instruction's tokens, too"
        with tempfile.TemporaryDirectory() as folder:
            _write_json(config_to_hf(self.model.config), folder, "config.json")
            self._save_st_tokenizer(folder)
            theirs = load_tokenizer(folder)

        def their_ids(texts):
            return theirs(texts, truncation=True, max_length=self.max_length)["input_ids"]

        probes = [*PROBES, "".join(theirs.all_special_tokens), "too long " * self.max_length]
        for name, instruction in self.prompts.items():
            prompt, length = self.template.prefix + instruction, 0
            if prompt and not kept:  # how it measures a prompt
                (ids,) = their_ids([prompt])
                length = len(ids) - (ids[-1] in theirs.all_special_ids)
            ours = self.tokenize(probes, instruction)
            there = their_ids([prompt + text for text in probes])
            for text, (ids, (start, _)), its in zip(probes, ours, there, strict=True):
                shown = f"prompt {name!r} ({prompt!r}), text {text[:20]!r}"
                if ids != (its or [0]):
                    return f"{shown}: its tokens would be {its[:30]}, ours are {ids[:30]}"
                if not kept and start != length:
                    return (
                        f"{shown}: it would leave {length} tokens out of the pool, we {start}. No "
                        "instruction may end in a space that the text's first token takes in, and "
                        "no more than one token, a special one, may follow the text"
                    )
        return None

    def _save_st_tokenizer(self, folder):
        """The tokenizer as sentence-transformers needs it: the suffix in its post-processor."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length, tokenizer.truncation_side = self.max_length, "right"
        if tokenizer.pad_token is None:  # any will do: it is masked
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if self.template.suffix:
            self._suffix_to_post_processor(tokenizer)
        tokenizer.save_pretrained(folder)

    def _suffix_to_post_processor(self, tokenizer):
        plain = tokenizer.backend_tokenizer.encode(self.template.prefix + "a")
        added = plain.special_tokens_mask  # 1 for the BOS, EOS, .. that the tokenizer adds
        ids = self.tokenize(["a"])[0][0]
        parts = {"front": plain.ids[: added.index(0)]}
        parts["back"] = ids[len(plain.ids) - added[::-1].index(0) :]  # the suffix, then those
        single = ["front", "$A", "back"] if parts["front"] else ["$A", "back"]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B"],
            special_tokens=[
                {"id": name, "ids": part, "tokens": tokenizer.convert_ids_to_tokens(part)}
                for name, part in parts.items() if part
            ],
        )  # fmt: skip

    def save(self, folder, sentence_transformers=True, state_dict=None):
        """Writes a sentence-transformers folder: a dense model, for "splade" a SparseEncoder, for
        "tokens" a MultiVectorEncoder. LoRA is merged in the files, not in the model.

        Raises ValueError, before anything is written, where embeddings there would differ: see
        st_problem. With sentence_transformers=False the folder is for Embedder.load alone.
        state_dict: full weights, gathered elsewhere (FSDP): the model's names, and
        "projection.weight" where there is one.
        """
        problem = self.st_problem() if sentence_transformers else None
        if problem:
            raise ValueError(
                f"{folder}: sentence-transformers would give other embeddings: {problem}. "
                "sentence_transformers=False saves the model for nanoembed alone"
            )
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        projection = state.pop("projection.weight", getattr(self.projection, "weight", None))
        self.model.save_pretrained(folder, merged_state(self.model, state))
        self.save_settings(folder)
        if projection is not None:
            os.makedirs(os.path.join(folder, "1_Dense"), exist_ok=True)
            weight = {"linear.weight": projection.detach().contiguous().cpu()}
            save_file(weight, os.path.join(folder, "1_Dense/model.safetensors"))
        if sentence_transformers:
            self._save_st_tokenizer(folder)
            self._save_st_modules(folder)
        else:
            self.tokenizer.save_pretrained(folder)

    def save_settings(self, folder):
        """How it embeds, for `load`: beside an adapter, too."""
        own = {key: getattr(self, key) for key in SETTINGS} | {"template": asdict(self.template)}
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        own["post_processor"] = backend["post_processor"]  # load_tokenizer puts it back
        _write_json(own, folder, "nanoembed.json")

    def _save_st_modules(self, folder):
        kind, similarity = "SentenceTransformer", "cosine" if self.normalize else "dot"
        top = {"max_seq_length": self.max_length, "do_lower_case": False}
        at = {}  # what its Normalize works on, if not on the pooled vector
        if self.pooling == "splade":
            kind, top["transformer_task"] = "SparseEncoder", "fill-mask"
            config = {"pooling_strategy": "max", "activation_function": "relu"}
            modules = [("sparse_encoder.modules.SpladePooling", config)]
        elif self.pooling == "tokens":
            kind, similarity = "MultiVectorEncoder", "maxsim"
            at = {"module_input_name": "token_embeddings"}
            modules = [("multi_vector_encoder.modules.MultiVectorMask", {})]
            if self.projection is not None:
                config = dict(in_features=self.model.config.n_embd, out_features=self.dim)
                config |= dict(bias=False, activation_function="torch.nn.modules.linear.Identity")
                modules.insert(0, ("base.modules.Dense", config | at))
        else:  # the words of its older versions, which the newer read, too
            config = {f"pooling_mode_{k}": v == self.pooling for k, v in ST_POOLINGS.items()}
            config["word_embedding_dimension"] = self.dim
            modules = [("models.Pooling", config | {"include_prompt": self.pool_instruction})]
        if self.normalize:
            modules.append(("base.modules.Normalize" if at else "models.Normalize", at))
        listed = [{"idx": 0, "name": "0", "path": "", "type": f"{ST}.models.Transformer"}]
        for i, (name, config) in enumerate(modules, 1):
            path = f"{i}_{name.rpartition('.')[2]}"
            listed.append({"idx": i, "name": str(i), "path": path, "type": f"{ST}.{name}"})
            _write_json(config, folder, path, "config.json")
        _write_json(listed, folder, "modules.json")
        _write_json(top, folder, "sentence_bert_config.json")
        prefix = self.template.prefix
        config = {"model_type": kind, "similarity_fn_name": similarity}
        config["prompts"] = {name: prefix + text for name, text in self.prompts.items()}
        if prefix and "document" in self.prompts:  # the wrap, also for who names no prompt
            config["default_prompt_name"] = "document"
        _write_json(config, folder, "config_sentence_transformers.json")

    @classmethod
    def load(
        cls, name, adapters=(), device=None, dtype="auto", attention=None,
        attention_backend="auto", pooling=None, template=None, prompts=None, normalize=None,
        max_length=None, pool_instruction=None,
    ):  # fmt: skip
        """An Embedder, ready to encode, from a folder or a hub id `owner/name[@revision]`.

        name: a folder of `save`, a sentence-transformers folder, a plain Hugging Face model, or a
        PEFT adapter, whose base is loaded first. adapters: more of them, merged in this order
        (LLM2Vec: base, MNTP, then SimCSE or supervised). attention: "causal" or "bidirectional"
        where config.json does not say; LLM2Vec's adapters want "bidirectional". dtype: of the
        weights, "auto", "bf16" or "fp32".
        The other arguments replace what the folder says. Where nobody says it: mean over all
        tokens, normalised, up to 512 of them.
        Raises ValueError for a sentence-transformers folder with a part that is not supported.
        """
        if device is None:
            mps = torch.backends.mps.is_available()
            device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        device = torch.device(device)
        folders = adapter_chain(name) + [resolve_folder(adapter) for adapter in adapters]
        said = {}
        for folder in folders:  # the last word counts
            said |= read_settings(folder)
        given = dict(pooling=pooling, template=template, prompts=prompts, normalize=normalize,
                     max_length=max_length, pool_instruction=pool_instruction)  # fmt: skip
        said |= {key: value for key, value in given.items() if value is not None}

        dtype = dtype_of(dtype, device)
        base = os.path.join(folders[0], said.pop("path", ""))
        usual = said.pop("attention", None)
        if attention is None:  # an adapter may say it of its model, as ours do
            attention = next(filter(None, map(attention_of, folders[1:])), usual)
        model = from_pretrained(base, attention, dtype=dtype)
        for folder in folders[1:]:
            load_adapter(model, folder)
            merge(model)
        c = model.config
        gqa = c.n_kv_head != c.n_head
        model.backend = choose_backend(attention_backend, device, dtype, gqa=gqa)
        own = [f for f in (base, *folders) if os.path.exists(os.path.join(f, "tokenizer.json"))]
        tokenizer = load_tokenizer((own or [base])[-1])
        if path := said.pop("projection", None):
            weight = load_file(path)["linear.weight"].float()
            said["projection"] = nn.Linear(weight.size(1), weight.size(0), bias=False)
            said["projection"].weight.data = weight
        if "pooling" not in said:
            print0(f"{name} does not say how it pools: mean over all tokens")
        said.setdefault("max_length", min(512, c.max_seq_len))
        foreign = said.pop("foreign", False)
        embedder = cls(model, tokenizer, **said, dtype=dtype).to(device).eval()
        if foreign and not embedder.pool_instruction and (problem := embedder.st_problem()):
            print0(f"{name}: not in all as sentence-transformers has it: {problem}")
        print0(f"{name}: {c.family}, {'causal' if c.causal else 'bidirectional'}, "
               f"{embedder.pooling} -> {embedder.dim} numbers, up to {embedder.max_length} tokens; "
               f"{dtype} on {device}, attention {model.backend}")  # fmt: skip
        return embedder


# ---- scores of tokens ----
# How much each token of a passage matters for a query: the cosine of the query's embedding and the
# token's hidden state (train_token_retrieval.py trains this). A passage longer than memory goes in
# windows: slices of the whole's ids, so that no token and no character moves.


def tokenize_passage(tokenizer, passage, instruction, template):
    """-> (ids, rows int64 [n], spans int64 [n, 2]): the ids that `tokenize` gives, nothing cut;
    which of them hold a character of the passage; and which characters [start, end) they hold.

    The pieces of one character, bytes of an emoji, have it each. Tokens that hold no character of
    the passage (BOS, the instruction, a space that the tokenizer trims) are none of its n tokens.
    """
    head = template.prefix + instruction
    e = whole_backend(tokenizer).encode(head + passage + template.suffix)
    spans = np.array(e.offsets, dtype=np.int64).reshape(-1, 2) - len(head)
    spans = spans.clip(0, len(passage))
    rows = np.flatnonzero(spans[:, 0] < spans[:, 1])
    return e.ids or [0], rows, spans[rows]


def windows_of(n, window, overlap, causal):
    """n tokens in windows of `window` -> [(start, stop, first, last), ..], ends exclusive.

    Tokens start..stop are encoded together; the hidden states of first..last are taken from there.
    Neighbours share `overlap` tokens, the last two perhaps more. A shared token is taken where it
    sees most: if causal in the earlier window, else where it is further from the border.
    """
    if window and not 0 <= overlap < window:
        raise ValueError(f"windows of {window} tokens cannot share {overlap}")
    if not window or n <= window:
        return [(0, n, 0, n)]
    starts = [*range(0, n - window, window - overlap), n - window]  # the last one is full, too
    borders = [0]
    for before, after in zip(starts[:-1], starts[1:], strict=True):
        borders.append(before + window if causal else (after + before + window) // 2)
    borders.append(n)
    stops = [start + window for start in starts]
    return list(zip(starts, stops, borders[:-1], borders[1:], strict=True))


def cosines(queries, hidden, block=8192):
    """queries [Q, C] of length 1, hidden [n, C] of any type -> [Q, n] fp32 (fp64 if hidden is):

        s_j = q . t_j / |t_j|

    The normalised tokens exist for a block at a time, in the backward pass again.
    """

    def some(queries, part):
        return queries @ F.normalize(part.to(queries.dtype), dim=-1).t()

    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled():
            parts = [checkpoint(some, queries, x, use_reentrant=False) for x in hidden.split(block)]
        else:
            parts = [some(queries, x) for x in hidden.split(block)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def score_tokens(embedder, queries, passage, window=0, overlap=0, progress=False):
    """-> (scores float32 [Q, n], spans int64 [n, 2]): for each query the cosine of its embedding
    and of every token of the passage; and each token's characters [start, end) in the raw passage.

    queries get the instruction prompts["query"], the passage prompts["document"]; it is never cut.
    window: tokens that are encoded at a time, 0 for the whole; neighbours share `overlap`. Ids and
    spans are the whole's, scores differ a little: a token sees no further than its window.
    """
    model, device = embedder.model, embedder.model.embed.weight.device
    if embedder.pooling in ("splade", "tokens"):
        raise ValueError(f"score_tokens compares with one vector, not with {embedder.pooling!r}")
    instruction = embedder.prompts.get("document", "")
    ids, rows, spans = tokenize_passage(embedder.tokenizer, passage, instruction, embedder.template)
    was_training = embedder.training
    embedder.eval()
    half, scores = embedder.dtype != torch.float32, []
    with torch.autocast(device.type, embedder.dtype, enabled=half):
        asked = embedder.embed(embedder.tokenize(queries, embedder.prompts.get("query", "")))
        asked = F.normalize(asked, dim=-1)  # [Q, C]
        bar = windows_of(len(ids), window, overlap, model.config.causal)
        for start, stop, first, last in tqdm(bar, "score", unit=" windows", disable=not progress):
            tokens = torch.tensor(ids[start:stop], device=device)
            hidden = model(tokens, make_seqs([stop - start], device))  # [window, C]
            own = rows[(rows >= first) & (rows < last)] - start
            scores.append(cosines(asked, hidden[torch.from_numpy(own).to(device)]).cpu())
    embedder.train(was_training)
    return torch.cat(scores, dim=1).numpy(), spans


# ---- what folders say ----

SETTINGS = ("pooling", "template", "prompts", "normalize", "max_length", "pool_instruction")
ST = "sentence_transformers"
ST_POOLINGS = {  # newer versions of it write "cls", "mean" and "weightedmean"
    "cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last",
    "weightedmean_tokens": "weighted_mean",
}  # fmt: skip

# Texts whose tokens depend on what stands next to them, or that tokenizers clean
PROBES = [
    *("", "a", " ", "\n", "Hello, world!", " space before", "space behind ", "\n\nlines\n", "1234"),
    *("na\xefve cafe\u0301 \u4f60\u597d \U0001f642", "'s", "..."),
    *(f"{c} {c}" for c in string.printable),
]


def merged_state(model, state):
    """Full tensors by the model's names, with LoRA added into the weights."""
    state = dict(state)
    for name, layer in lora_layers(model).items():
        a, b = state.pop(f"{name}.lora_A"), state.pop(f"{name}.lora_B")
        w = state.pop(f"{name}.base.weight")
        state[f"{name}.weight"] = layer.add_to(w, a, b)
        if f"{name}.base.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.base.bias")
    return state


def read_settings(folder):
    """What a folder says about embedding, as arguments of Embedder: our own file, LLM2Vec's or
    sentence-transformers'; {} for a plain model. Besides: path (the model's, within it), projection
    (a file), post_processor (the tokenizer's), foreign (written by sentence-transformers)."""
    if said := _read_json(folder, "nanoembed.json"):
        said.pop("post_processor")
        said["template"] = Template(**said["template"])
        weight = os.path.join(folder, "1_Dense/model.safetensors")
        return said | ({"projection": weight} if os.path.exists(weight) else {})
    if theirs := _read_json(folder, "llm2vec_config.json"):
        mode = theirs["pooling_mode"]
        return dict(
            pooling={"eos_token": "last", "bos_token": "cls"}.get(mode, mode),
            max_length=theirs["max_length"], pool_instruction=not theirs["skip_instruction"],
            attention="bidirectional",  # which no file of theirs says
        )  # fmt: skip
    if not os.path.exists(os.path.join(folder, "modules.json")):
        return {}

    said = {"normalize": False, "foreign": True}
    top = _read_json(folder, "config_sentence_transformers.json")
    if top.get("prompts"):
        said["prompts"] = {name: text or "" for name, text in top["prompts"].items()}
    if default := top.get("default_prompt_name"):
        print0(f"{folder}: sentence-transformers adds prompt {default!r} to texts without one; "
               "encode adds what you give it")  # fmt: skip
    for module in _read_json(folder, "modules.json"):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        config, bad = _read_json(folder, path, "config.json"), None
        if kind in ("Transformer", "MLMTransformer"):
            said["path"] = path
            config = _read_json(folder, path, "sentence_bert_config.json")
            keys = ("do_lower_case", "query_expansion", "query_length", "document_length")
            bad = [key for key in keys if config.get(key)]
            own = _read_json(folder, path, "tokenizer_config.json")
            bad += ["truncation_side"] * (own.get("truncation_side") == "left")
            length = config.get("max_seq_length") or own.get("model_max_length", 1e30)
            if length < 1e9:  # 1e30 is transformers' word for no limit
                said["max_length"] = length
        elif kind == "Pooling":
            modes = config.get("pooling_mode") or [
                key.removeprefix("pooling_mode_") for key, value in config.items()
                if key.startswith("pooling_mode_") and value
            ]  # fmt: skip
            modes = [modes] if isinstance(modes, str) else modes
            ours = [ours for k, ours in ST_POOLINGS.items() if k.startswith(modes[0])]
            said["pooling"] = ours[0] if ours else None
            said["pool_instruction"] = config.get("include_prompt", True)
            bad = modes if len(modes) > 1 or said["pooling"] is None else None
        elif kind == "SpladePooling":
            said["pooling"] = "splade"
            how = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
            bad = how if how != ("max", "relu") else None
        elif kind == "MultiVectorMask":
            said["pooling"] = "tokens"
            bad = [key for key in ("skiplist_words", "keep_only_token_ids") if config.get(key)]
        elif kind == "Dense":
            said["projection"] = os.path.join(folder, path, "model.safetensors")
            plain = config.get("module_input_name") == "token_embeddings" and not config["bias"]
            bad = None if plain and config["activation_function"].endswith(".Identity") else config
        elif kind == "Normalize":
            said["normalize"] = True
        else:
            bad = "the whole module"
        if bad:
            raise ValueError(f"{folder}: {module['type']}: not supported: {bad}")
    return said


def _read_json(*path):
    """{} where there is no such file."""
    path = os.path.join(*path)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def _write_json(value, *path):
    path = os.path.join(*path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
