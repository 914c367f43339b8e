"""embedder.py against sentence-transformers, transformers and plain loops.

python -m pytest tests/test_embedder.py
"""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import embedder as module
from data import load_tokenizer
from embedder import POOLINGS, TEMPLATES, Embedder, Template, pack, pool, tokenize
from lora import inject, save_adapter
from model import Transformer, from_pretrained, from_scratch

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)

WORDS = "the cat sat on a mat and the dog ran to an old house where it found many words in a book"
TEXTS = ["the old cat", "", " where  it ran ", "a", "a", "1234 words, (a book).",
         "caf\u00e9 \U0001f642", f"{WORDS} " * 30, "the dog\n"]  # fmt: skip
CHAT = Template("<|user|>", "<|end|>")
ONE_PROMPT = {"query": "find a book:", "document": ""}


def make_tokenizer(front="", back=""):
    """A byte-level BPE with the tokens `front` and `back` around every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["[PAD]", "<s>", "</s>", "<|user|>", "<|end|>"]
    bpe.train_from_iterator([WORDS, WORDS.title()], trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    single = [part for part in (front, "$A", back) if part]
    ids = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
    bpe.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="[PAD]",
        truncation_side="left", extra_special_tokens=["<|user|>", "<|end|>"])  # fmt: skip


def make_llama_tokenizer():
    """Llama-2's kind: no words, spaces as tokens; a class and settings that build a BOS."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator([*WORDS.split(), "[INST]", "[/INST]"] * 3, trainers.BpeTrainer(
        vocab_size=396, special_tokens=special, show_progress=False))  # fmt: skip
    made = json.loads(bpe.to_str())["model"]
    return LlamaTokenizer(made["vocab"], [tuple(m) for m in made["merges"]], add_bos_token=True)


TOKENIZERS = {
    "encoder": make_tokenizer("<s>", "</s>"), "bos": make_tokenizer("<s>"),
    "eos": make_tokenizer("", "</s>"), "bare": make_tokenizer(), "llama2": make_llama_tokenizer(),
}  # fmt: skip


def make_model(name, seed=0):
    small = dict(n_head=4, n_embd=32, n_hidden=48, vocab_size=400, max_seq_len=128)
    size, changes = {
        "modernbert": ("modernbert-tiny", dict(
            n_layer=3, layer_kinds=["global", "local", "local"], window=6)),
        "llama": ("llama-tiny", dict(n_layer=2, n_kv_head=2)),
        "llama-bi": ("llama-tiny", dict(n_layer=2, causal=False)),
        "qwen3": ("qwen3-tiny", dict(n_layer=2, n_kv_head=2)),
    }[name]  # fmt: skip
    torch.manual_seed(seed)
    model = from_scratch(size, **(small | changes))
    for p in model.parameters():  # larger than at init, so that attention does something
        p.data.normal_(0, 0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    ids = dict(pad=0, bos=1, eos=2, cls=1, sep=2)
    model.config.hf = {f"{key}_token_id": i for key, i in ids.items()}
    return model.eval()


def make(name, tokens, pooling="mean", **settings):
    settings = dict(prompts=ONE_PROMPT, max_length=60) | settings
    return Embedder(make_model(name), TOKENIZERS[tokens], pooling, **settings).eval()


def differ(a, b):
    """Largest difference of two arrays or lists of arrays of equal shapes."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert np.shape(x) == np.shape(y)
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)]
    return max(float(np.abs(x - y).max()) for x, y in pairs)


# ---- ids ----


def test_prompt_and_text_are_tokenized_as_one_string():
    tokenizer, instruction, text = TOKENIZERS["encoder"], "find a book: ", "the cat"
    (ids, span), = tokenize(tokenizer, [text], instruction, Template(), 48)
    joined = tokenizer(instruction + text)["input_ids"]
    bare = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (instruction, text)]
    assert ids == joined and span == (0, len(ids))
    assert ids[1:-1] != sum(bare, [])  # the space has moved into the text's first token
    # which then belongs to the text
    (again, (start, end)), = tokenize(tokenizer, [text], instruction, Template(), 48, False)
    assert again == ids and end == len(ids)
    assert tokenizer.decode(ids[start:end]) == " the cat</s>"


@pytest.mark.parametrize("tokens", ["encoder", "bos", "eos", "bare"])  # they decode exactly
@pytest.mark.parametrize("text", TEXTS + ["<|user|> the </s> cat", "\u3000x\n\n"])
def test_pooled_range_begins_with_the_text(tokens, text):
    tokenizer, instruction = TOKENIZERS[tokens], "find a book:"
    template = Template("<|user|>\n", "<|end|>")
    (ids, (start, end)), = tokenize(tokenizer, [text], instruction, template, 9999, False)
    whole = template.prefix + instruction + text + template.suffix
    assert ids == tokenizer(whole)["input_ids"] and end == len(ids)
    front = tokenizer.decode(ids[:start]).removeprefix("<s>")
    assert front == template.prefix + instruction
    assert tokenizer.decode(ids[start:]).removesuffix("</s>") == text + template.suffix
    # without prefix and instruction nothing is left out, the tokenizer's own tokens included
    (ids, span), = tokenize(tokenizer, [text], "", Template(), 9999, False)
    assert span == (0, len(tokenizer(text)["input_ids"]))


def test_a_list_of_instructions():
    tokenizer, instructions = TOKENIZERS["bos"], ["a:", "", "the dog:"]
    got = tokenize(tokenizer, ["cat"] * 3, instructions, CHAT, 48, False)
    for one, instruction in zip(got, instructions, strict=True):
        assert [one] == tokenize(tokenizer, ["cat"], instruction, CHAT, 48, False)


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_only_the_text_is_cut(tokens):
    tokenizer, template = TOKENIZERS[tokens], Template("<|user|>", " in a book<|end|>")
    long = f"{WORDS} " * 30
    (whole, (first, _)), = tokenize(tokenizer, [long], "find:", template, 9999, False)
    (short, (start, end)), = tokenize(tokenizer, [long], "find:", template, 40, False)
    tail = " in a book<|end|>" + ("</s>" if tokens in ("encoder", "eos") else "")
    n = len(tokenizer(tail, add_special_tokens=False)["input_ids"])
    assert short == whole[: 40 - n] + whole[-n:]
    assert tokenizer.decode(short).endswith(tail)
    assert (start, end) == (first, 40)
    (exact, _), = tokenize(tokenizer, [long], "find:", template, len(whole))
    assert exact == whole
    with pytest.raises(ValueError, match="max_length 12 leaves no room for the text"):
        tokenize(tokenizer, [long], "find an old book and a house:", template, 12)


def test_templates_go_around_the_text():
    assert TEMPLATES["none"] == Template("", "")
    for template in TEMPLATES.values():
        (ids, _), = tokenize(TOKENIZERS["bare"], ["a cat"], "find:", template, 99)
        assert TOKENIZERS["bare"].decode(ids) == f"{template.prefix}find:a cat{template.suffix}"


# ---- pooling ----


def loops(hidden, encoded, pooling):
    """The same with padding-free loops. hidden [T, C] -> [B, C]"""
    out, at = [], 0
    for ids, (start, end) in encoded:
        h = hidden[at + start : at + end]
        at += len(ids)
        if len(h) == 0:
            out.append(torch.zeros_like(hidden[0]))
        elif pooling == "mean":
            out.append(sum(h) / len(h))
        elif pooling == "weighted_mean":
            weights = range(1, len(h) + 1)
            out.append(sum(w * x for w, x in zip(weights, h, strict=True)) / sum(weights))
        else:
            out.append(h[-1] if pooling == "last" else h[0])
    return torch.stack(out)


ENCODED = [([1, 2, 3], (0, 3)), ([4], (0, 1)), ([5, 6, 7, 8], (2, 4)), ([9, 9], (2, 2)),
           ([0], (0, 0)), ([1, 2], (1, 2))]  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "cls"])
def test_pool_equals_loops(pooling):
    _, seqs, where = pack(ENCODED, "cpu")
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    got, wanted = pool(hidden, where, pooling), loops(hidden, ENCODED, pooling)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    weight = torch.randn_like(got)
    grads = [torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)
    half = hidden.detach().bfloat16()
    assert pool(half, where, pooling).dtype == torch.float32  # and summed there, not in bf16
    exact = loops(half.double(), ENCODED, pooling)
    torch.testing.assert_close(pool(half, where, pooling).double(), exact, rtol=1e-5, atol=1e-6)


def test_splade_and_tokens_equal_loops(monkeypatch):
    model = make_model("modernbert").double()
    encoded = [one for one in ENCODED if one[1][0] < one[1][1]]
    tokens, seqs, where = pack(encoded, "cpu")
    rows = [list(range(*span)) for _, span in encoded]
    starts = np.cumsum([0] + [len(ids) for ids, _ in encoded])
    rows = [torch.tensor([r + s for r in row]) for row, s in zip(rows, starts, strict=False)]
    small = module.groups
    monkeypatch.setattr(module, "groups", lambda lengths, limit: small(lengths, 3))  # some texts

    params = list(model.parameters())
    got = Embedder(model, TOKENIZERS["bare"], "splade")(tokens, seqs, where)
    logits = model(tokens, seqs, rows=torch.arange(len(tokens)))
    wanted = torch.stack([torch.log1p(F.relu(logits[r])).amax(0) for r in rows])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert (got > 0).any() and (got == 0).any()
    weight = torch.randn_like(got)
    a, b = (torch.autograd.grad((x * weight).sum(), params) for x in (got, wanted))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # norms are in fp32

    projection = torch.nn.Linear(32, 8, bias=False).double()
    late = Embedder(model, TOKENIZERS["bare"], "tokens", projection=projection)
    vectors, lengths = late(tokens, seqs, where)
    hidden = model(tokens, seqs)
    wanted = [F.normalize(projection(hidden[r]), dim=-1) for r in rows]
    assert lengths == [len(r) for r in rows]
    torch.testing.assert_close(vectors, torch.cat(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, tokens", [("modernbert", "encoder"), ("llama-bi", "bos"),
                                          ("llama", "eos"), ("qwen3", "bare")])  # fmt: skip
def test_equals_transformers_with_padding(name, tokens, tmp_path):
    ours = make(name, tokens, max_length=4000, normalize=False)
    texts = [text for text in TEXTS if text]
    ours.model.save_pretrained(tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    batch = ours.tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    assert mask.size(1) > 128 and mask.sum(1).min() < 4
    with torch.no_grad():
        hidden = theirs(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    encoded = [([0] * n, (0, n)) for n in mask.sum(1).tolist()]
    hidden = torch.cat([h[:n] for h, (_, (_, n)) in zip(hidden, encoded, strict=True)])
    for pooling in ("mean", "weighted_mean", "last", "cls"):
        ours.pooling = pooling
        wanted = loops(hidden, encoded, pooling)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # longer than the model's positions
            got = ours.encode(texts)
        assert differ(got, wanted.numpy()) < 2e-5 * float(wanted.abs().max())


# ---- encode ----


def test_order_and_odd_texts():
    ours = make("modernbert", "encoder")
    got = ours.encode(TEXTS, "find:")
    assert got.shape == (len(TEXTS), 32) and got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    alone = np.concatenate([ours.encode([text], "find:") for text in TEXTS])
    small = ours.encode(TEXTS, "find:", batch_tokens=1)
    assert differ(got, alone) < 1e-6 and differ(got, small) < 1e-6
    assert differ(got[3:4], got[4:5]) < 1e-6  # equal texts
    other = np.delete(got, 4, axis=0)  # all others differ from each other
    apart = np.abs(other[:, None] - other[None]).max(-1)
    assert apart[~np.eye(len(other), dtype=bool)].min() > 1e-3
    shuffled = np.random.default_rng(0).permutation(len(TEXTS))
    assert differ(ours.encode([TEXTS[i] for i in shuffled], "find:"), got[shuffled]) < 1e-6
    assert ours.encode([]).shape == (0, 32)
    with pytest.raises(TypeError, match="a list of texts, not one string"):
        ours.encode("the cat")


def test_nothing_to_pool_is_the_zero_vector():
    ours = make("qwen3", "bare")
    got = ours.encode(["", "the cat"])
    assert (got[0] == 0).all() and np.linalg.norm(got[1]) > 0.99
    skip = make("qwen3", "bare", pool_instruction=False)
    got = skip.encode(["", "the cat"], "find:")
    assert (got[0] == 0).all() and np.linalg.norm(got[1]) > 0.99


def test_training_and_encoding_agree():
    ours = make("modernbert", "encoder", template=CHAT)
    ours.encode(TEXTS)  # what it leaves in caches must serve training, too
    ours.train()
    ours.model.config.out_dropout = 0.0
    texts = [text for text in TEXTS if text]
    encoded = ours.tokenize(texts, "find:")
    vectors = ours(*pack(encoded, "cpu"))
    assert vectors.dtype == torch.float32
    vectors.square().sum().backward()
    assert ours.model.blocks[2].attn.qkv_proj.weight.grad is not None
    assert differ(ours.encode(texts, "find:"), vectors.detach().numpy()) < 1e-6
    assert ours.training  # encode has put it back
    with torch.autocast("cpu", torch.bfloat16):
        half = ours.embed(encoded)
    assert half.dtype == torch.float32 and 0 < differ(half.detach(), vectors.detach()) < 0.1


def test_parts_and_memory_map(tmp_path, monkeypatch):
    ours = make("llama", "eos")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), rng.integers(1, 9))) for _ in range(600)]

    class Lazy:  # a sequence that is no list, and that is read once
        seen = []

        def __len__(self):
            return len(texts)

        def __getitem__(self, i):
            self.seen.append(i)
            return texts[i]

    whole = ours.encode(texts)
    monkeypatch.setattr(module, "PART", 32 * 130)  # 130 texts at a time
    path = str(tmp_path / "vectors.npy")
    got = ours.encode(Lazy(), out=path, progress=True)
    assert isinstance(got, np.memmap) and sorted(Lazy.seen) == list(range(600))
    assert differ(got, whole) < 1e-6
    assert differ(np.load(path), whole) < 1e-6
    assert ours.encode([], out=path).shape == (0, 32)


RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch.distributed as dist
import numpy as np
from test_embedder import TEXTS, make
dist.init_process_group("gloo")
rank = dist.get_rank()
ours, late = make("llama-bi", "eos"), make("llama-bi", "eos", "tokens")
whole, few = ours.encode(TEXTS), ours.encode(TEXTS[:1])
mapped = ours.encode(TEXTS, out={out!r})
np.savez({folder!r} + f"/rank{{rank}}.npz", whole=whole, few=few, mapped=mapped,
         many=np.concatenate(late.encode(TEXTS)))
dist.destroy_process_group()
"""


def test_two_ranks_give_what_one_gives(tmp_path):
    here = os.path.dirname(os.path.abspath(__file__))
    script = RANKS.format(root=os.path.dirname(here), tests=here, folder=str(tmp_path),
                          out=str(tmp_path / "out.npy"))  # fmt: skip
    (tmp_path / "ranks.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(tmp_path / "ranks.py")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, late = make("llama-bi", "eos"), make("llama-bi", "eos", "tokens")
    for rank in (0, 1):
        got = np.load(tmp_path / f"rank{rank}.npz")
        assert differ(got["whole"], ours.encode(TEXTS)) < 1e-6
        assert differ(got["mapped"], ours.encode(TEXTS)) < 1e-6
        assert differ(got["few"], ours.encode(TEXTS[:1])) < 1e-6
        assert differ(got["many"], np.concatenate(late.encode(TEXTS))) < 1e-6


# ---- folders ----

CASES = [  # model, tokenizer, pooling, settings
    ("modernbert", "encoder", "mean", dict(template=CHAT)),
    ("modernbert", "encoder", "mean", dict(pool_instruction=False)),
    ("modernbert", "encoder", "weighted_mean", dict(template=Template("a dog: "))),
    ("modernbert", "encoder", "cls", {}),
    ("modernbert", "encoder", "last", dict(normalize=False)),
    ("llama", "bos", "last", dict(template=CHAT, pool_instruction=False)),
    ("llama", "bos", "cls", dict(template=CHAT, pool_instruction=False)),
    ("llama-bi", "bos", "mean", dict(template=CHAT, pool_instruction=False)),
    ("llama-bi", "llama2", "mean", dict(template=TEMPLATES["llama2"])),
    ("llama", "llama2", "mean", dict(template=Template("", "</s>"), pool_instruction=False)),
    ("llama-bi", "eos", "weighted_mean", dict(template=Template("", "<|end|>"))),
    ("qwen3", "bare", "last", dict(template=Template("", "</s>"))),
    ("qwen3", "eos", "mean", dict(pool_instruction=False)),
    ("modernbert", "encoder", "splade", dict(template=CHAT)),
    ("modernbert", "encoder", "tokens", dict(projection=torch.nn.Linear(32, 8, bias=False))),
    ("llama-bi", "eos", "tokens", {}),
]


@pytest.mark.parametrize("name, tokens, pooling, settings", CASES)
def test_equals_sentence_transformers(name, tokens, pooling, settings, tmp_path):
    import sentence_transformers as st

    ours = make(name, tokens, pooling, **settings)
    ours.save(tmp_path)
    kind = {"splade": st.SparseEncoder, "tokens": st.MultiVectorEncoder}
    theirs = kind.get(pooling, st.SentenceTransformer)(str(tmp_path), device="cpu")
    again = Embedder.load(str(tmp_path), device="cpu", dtype="fp32")
    for key in ("query", "document"):
        got = ours.encode(TEXTS, ours.prompts[key])
        wanted = theirs.encode_query(TEXTS) if key == "query" else theirs.encode_document(TEXTS)
        if pooling == "splade":
            wanted = wanted.to_dense().numpy()
            assert 0 < (got > 0).mean() < 1
        assert differ(got, wanted) < 2e-5 * max(float(np.abs(x).max()) for x in got)
        assert again.tokenize(TEXTS, ours.prompts[key]) == ours.tokenize(TEXTS, ours.prompts[key])
        assert differ(again.encode(TEXTS, again.prompts[key]), got) == 0
    bare = theirs.encode(TEXTS[:1])  # who names no prompt gets the document's wrap
    bare = bare.to_dense().numpy() if pooling == "splade" else bare
    assert differ(bare, ours.encode(TEXTS[:1], ours.prompts["document"])) < 1e-4
    if pooling not in ("splade", "tokens"):
        assert theirs.similarity_fn_name == ("cosine" if ours.normalize else "dot")
    again.save(tmp_path / "twice")  # and it is still the same model
    twice = load_tokenizer(str(tmp_path / "twice"))
    assert twice(TEXTS)["input_ids"] == load_tokenizer(str(tmp_path))(TEXTS)["input_ids"]


def test_reads_what_sentence_transformers_writes(tmp_path, capsys):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    make("llama", "eos").model.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer("", "</s>")
    tokenizer.truncation_side = "right"
    tokenizer.save_pretrained(tmp_path / "model")
    parts = [Transformer(str(tmp_path / "model"), max_seq_length=40),
             Pooling(32, "lasttoken", include_prompt=False), Normalize()]  # fmt: skip
    theirs = SentenceTransformer(modules=parts, prompts=ONE_PROMPT, device="cpu")
    theirs.save(str(tmp_path / "st"))
    ours = Embedder.load(str(tmp_path / "st"), device="cpu", dtype="fp32")
    assert (ours.pooling, ours.max_length, ours.normalize) == ("last", 40, True)
    assert ours.prompts == ONE_PROMPT
    assert differ(ours.encode(TEXTS, ours.prompts["query"]), theirs.encode_query(TEXTS)) < 2e-5
    assert differ(ours.encode(TEXTS), theirs.encode_document(TEXTS)) < 2e-5

    mean = Pooling(32, "mean", include_prompt=False)
    space = {"query": "find a book: ", "document": ""}
    space = SentenceTransformer(modules=[parts[0], mean], prompts=space, device="cpu")
    space.save(str(tmp_path / "space"))
    capsys.readouterr()
    Embedder.load(str(tmp_path / "space"), device="cpu")
    assert "not in all as sentence-transformers has it: prompt 'query'" in capsys.readouterr().out

    for extra, word in ((Dense(32, 8), "Dense"), (Pooling(32, ("mean", "max")), "max")):
        SentenceTransformer(modules=[*parts[:2], extra], device="cpu").save(str(tmp_path / word))
        with pytest.raises(ValueError, match=f"{word}.*not supported|not supported.*{word}"):
            Embedder.load(str(tmp_path / word))


def test_plain_folder_and_overrides(tmp_path, capsys):
    model = make("llama", "bos").model
    model.save_pretrained(tmp_path)
    TOKENIZERS["bos"].save_pretrained(tmp_path)
    ours = Embedder.load(str(tmp_path), device="cpu", dtype="fp32")
    assert "does not say how it pools: mean" in capsys.readouterr().out
    assert (ours.pooling, ours.max_length) == ("mean", 128)
    wanted = make("llama", "bos", max_length=128).encode(TEXTS)
    assert differ(ours.encode(TEXTS), wanted) < 1e-6
    other = Embedder.load(str(tmp_path), device="cpu", dtype="fp32", pooling="last",
                          template=CHAT, max_length=20, attention="bidirectional")  # fmt: skip
    model = from_pretrained(str(tmp_path), "bidirectional")
    same = Embedder(model, TOKENIZERS["bos"], "last", CHAT, max_length=20)
    assert differ(other.encode(TEXTS), same.encode(TEXTS)) == 0
    assert differ(other.encode(TEXTS), ours.encode(TEXTS)) > 0.1
    half = Embedder.load(str(tmp_path), device="cpu", dtype="bf16")
    assert half.model.embed.weight.dtype == torch.bfloat16
    assert 0 < differ(half.encode(TEXTS), ours.encode(TEXTS)) < 0.1
    with pytest.raises(ValueError, match="pooling 'max': expected one of mean"):
        Embedder.load(str(tmp_path), pooling="max")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Embedder.load("./nothing/here")


def test_adapter_chain_equals_peft(tmp_path):
    """LLM2Vec's layout: a base, an adapter that is merged, a second one on top of it."""
    from peft import PeftModel

    paths = {key: str(tmp_path / key) for key in ("base", "mntp", "simcse")}
    base = make_model("llama-bi")
    base.config.causal = True  # the base's config.json does not say that the adapters want it off
    base.save_pretrained(paths["base"])
    TOKENIZERS["bos"].save_pretrained(paths["base"])
    for i, key in enumerate(("mntp", "simcse")):
        model = from_pretrained(paths["base"], "bidirectional")
        inject(model, 4, 8, 0.0, "all")
        torch.manual_seed(i)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.data.normal_(0, 0.3)
        save_adapter(model, paths[key], paths["base"])
    for key, max_length in (("mntp", 50), ("simcse", 30)):  # the last one's word counts
        llm2vec = dict(pooling_mode="mean", max_length=max_length, skip_instruction=True)
        with open(os.path.join(paths[key], "llm2vec_config.json"), "w") as f:
            json.dump(llm2vec | {"doc_max_length": 20}, f)

    kept = dict(device="cpu", dtype="fp32", attention="bidirectional")
    ours = Embedder.load(paths["mntp"], adapters=[paths["simcse"]], **kept)
    assert (ours.pooling, ours.max_length, ours.pool_instruction) == ("mean", 30, False)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(paths["base"], is_causal=False)
    theirs.config.is_causal = False
    theirs = PeftModel.from_pretrained(theirs, paths["mntp"]).merge_and_unload()
    theirs = PeftModel.from_pretrained(theirs, paths["simcse"]).eval()
    wanted = []
    for ids, (start, end) in ours.tokenize(TEXTS, "find:"):
        with torch.no_grad():
            hidden = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        wanted.append(hidden[start:end].mean(0))
        if start == end:
            wanted[-1] = torch.zeros(32)
    wanted = F.normalize(torch.stack(wanted), dim=-1).numpy()
    assert differ(ours.encode(TEXTS, "find:"), wanted) < 2e-5
    explicit = Embedder.load(paths["base"], [paths["mntp"], paths["simcse"]], **kept)
    assert differ(explicit.encode(TEXTS, "find:"), ours.encode(TEXTS, "find:")) == 0
    one = Embedder.load(paths["mntp"], **kept)
    assert differ(one.encode(TEXTS, "find:"), ours.encode(TEXTS, "find:")) > 0.1


def test_lora_is_merged_in_the_files_only(tmp_path):
    projection = torch.nn.Linear(32, 8, bias=False)
    ours = make("qwen3", "eos", "tokens", projection=projection)
    inject(ours.model, 4, 8, 0.0, "all", train_also="norm")
    for name, p in ours.model.named_parameters():
        if ".lora_" in name:
            p.data.normal_(0, 0.3)
    before = ours.encode(TEXTS)
    ours.save(tmp_path / "a")
    assert differ(ours.encode(TEXTS), before) == 0
    assert any(".lora_A" in name for name, _ in ours.model.named_parameters())
    # as FSDP gives it: all tensors from elsewhere, none of them the model's own
    state = {name.removeprefix("model."): p.clone() for name, p in ours.state_dict().items()}
    for p in ours.parameters():
        p.data.zero_()
    ours.save(tmp_path / "b", state_dict=state)
    for folder in ("a", "b"):
        again = Embedder.load(str(tmp_path / folder), device="cpu", dtype="fp32")
        assert differ(again.encode(TEXTS), before) < 2e-5


@pytest.mark.parametrize("tokens, pooling, settings, reason", [
    ("encoder", "mean", dict(prompts={"query": "find: ", "document": ""}, pool_instruction=False),
     "prompt 'query' .'find: '.*leave . tokens out of the pool, we"),
    ("encoder", "mean", dict(template=CHAT, pool_instruction=False), "than one token, a special"),
    ("bos", "mean", dict(template=Template("", "t in a book")), "its tokens would be"),
    ("encoder", "weighted_mean", dict(pool_instruction=False), "counts the instruction's"),
    ("encoder", "splade", dict(pool_instruction=False), "counts the instruction's"),
])  # fmt: skip
def test_a_save_that_would_differ_is_refused(tokens, pooling, settings, reason, tmp_path):
    ours = make("modernbert", tokens, pooling, **settings)
    with pytest.raises(ValueError, match=f"would give other embeddings: .*{reason}"):
        ours.save(tmp_path / "refused")
    assert not os.path.exists(tmp_path / "refused")
    ours.save(tmp_path / "own", sentence_transformers=False)
    again = Embedder.load(str(tmp_path / "own"), device="cpu", dtype="fp32")
    for prompt in ours.prompts.values():
        assert again.tokenize(TEXTS, prompt) == ours.tokenize(TEXTS, prompt)
        assert differ(again.encode(TEXTS, prompt), ours.encode(TEXTS, prompt)) == 0
    assert again.prompts == ours.prompts and again.template == ours.template


def test_errors_name_what_was_expected():
    model, tokenizer = make_model("llama"), TOKENIZERS["bare"]
    with pytest.raises(ValueError, match="pooling 'max': expected one of mean, weighted_mean"):
        Embedder(model, tokenizer, "max")
    with pytest.raises(ValueError, match="a projection goes with pooling 'tokens'"):
        Embedder(model, tokenizer, projection=torch.nn.Linear(32, 8, bias=False))
    assert "llama has no such class" in make("llama", "bos", "splade").st_problem()
    model.config.head = "none"
    with pytest.raises(ValueError, match="needs a language modelling head"):
        Embedder(Transformer(model.config), tokenizer, "splade")
    assert set(POOLINGS) == {case[2] for case in CASES}
