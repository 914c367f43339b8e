"""
An embedder as training has it: ids -> packed row -> vectors, and the folder that is saved.

embedder.py adds what use needs beside it, Embedder.encode and Embedder.load.
Shapes: B texts, T tokens of the packed row, P pooled tokens, C n_embd, V vocabulary.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from common import print0
from formats import sentence_transformers as st
from formats.huggingface import save_pretrained
from lora import lora_layers, merged_state, save_adapter
from pooling import groups, pack, pool, splade
from tokenizer import TEMPLATES, check_tokenizer, tokenize, tokenize_llm2vec

POOLINGS = ("mean", "weighted_mean", "last", "cls", "splade", "tokens")


def chunks_of(encoded, limit):
    """Indices of texts, longest first, in lists of at most `limit` tokens together."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    parts = groups([len(encoded[i][0]) for i in order], limit)
    return [[order[i] for i in part] for part in parts]


class EmbeddingModel(nn.Module):
    """A model and all that makes its embeddings what they are.

    pooling: "mean", "weighted_mean", "last" or "cls" give [C] a text; "splade" a weight for each
    entry of the vocabulary [V]; "tokens" a vector for each token (late interaction), through
    `projection`, an nn.Linear without bias or None.
    prompts: {"query": instruction, "document": instruction, ...}, for evaluations and for
    sentence-transformers; `encode` takes the instruction itself. normalize: to length 1, except
    with splade. dtype: what evaluation and use compute in (autocast), fp32 or bf16.
    instructions: {data set or task of MTEB: instruction}, for eval_mteb.py. doc_max_length: ids are
    made by tokenize_llm2vec.

    All that has parameters runs in one forward call: DDP(embedder)(*packed).
    """

    def __init__(
        self, model, tokenizer, pooling="mean", template=TEMPLATES["none"], prompts=None,
        normalize=True, max_length=512, pool_instruction=True, projection=None,
        dtype=torch.float32, pool_bos=True, doc_max_length=None, instructions=None,
    ):  # fmt: skip
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        if pooling == "splade" and model.config.head == "none":
            raise ValueError("pooling 'splade' needs a language modelling head, the model has none")
        if projection and (pooling != "tokens" or projection.bias is not None):
            raise ValueError("a projection goes with pooling 'tokens', and has no bias")
        check_tokenizer(tokenizer, model.config.vocab_size)
        if pooling == "last" and not template.suffix:
            end = tokenizer("a")["input_ids"][-1]
            if end not in tokenizer.all_special_ids:
                print0("pooling='last' reads a text's last word: no end token, see the key suffix")
        self.model, self.tokenizer, self.projection = model, tokenizer, projection
        self.pooling, self.template = pooling, template
        self.prompts = prompts or {"query": "", "document": ""}
        self.normalize = normalize and pooling != "splade"
        self.max_length, self.dtype = max_length, dtype
        self.pool_instruction = pool_instruction or pooling == "last"  # the same vector there
        self.pool_bos, self.doc_max_length = pool_bos, doc_max_length
        self.instructions = instructions or {}

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
