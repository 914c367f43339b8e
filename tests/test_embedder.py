"""embedder.py against sentence-transformers, transformers and plain loops."""

import json
import os
import sys
import warnings
from collections import UserList

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

import embedder as module
from embedder import POOLINGS, Embedder
from formats.huggingface import from_pretrained, save_pretrained
from harness import FAMILIES, raises, run_ranks
from lora import inject, save_adapter
from model import Transformer, from_scratch
from pooling import groups, pack, pool
from quantize import quantize, ranges_of, scores
from tokenizer import TEMPLATES, Template, tokenize, tokenize_words

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)

WORDS = "the cat sat on a mat and the dog ran to an old house where it found many words in a book"
TEXTS = ["the old cat", "", " where  it ran ", "a", "a", "1234 words, (a book).",
         "caf\u00e9 \U0001f642", f"{WORDS} " * 30, "the dog\n"]  # fmt: skip
CHAT = Template("<|user|>", "<|end|>")
ASKED = [f"find {i}: " * (i % 3) for i in range(len(TEXTS))]  # an instruction for each
ONE_PROMPT = {"query": "find a book:", "document": ""}


def make_tokenizer(front="", back=""):
    """A byte-level BPE with the tokens `front` and `back` around every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder, special = decoders.ByteLevel(), ["[PAD]", "<s>", "</s>", "<|user|>", "<|end|>"]
    bpe.train_from_iterator([WORDS, WORDS.title()], trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    single = [part for part in (front, "$A", back) if part]
    bpe.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=[("<s>", 1), ("</s>", 2)])  # fmt: skip
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


def make_model(name):
    small = dict(n_head=4, n_embd=32, n_hidden=48, n_layer=3, vocab_size=400, max_seq_len=128)
    size, changes = FAMILIES[name]
    torch.manual_seed(0)
    model = from_scratch(size, **(small | changes))
    for p in model.parameters():  # larger than at init, so that attention does something
        p.data.normal_(0, 0.3) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    ids = dict(pad=0, bos=1, eos=2, cls=1, sep=2)
    model.config.hf = {f"{key}_token_id": i for key, i in ids.items()}
    return model.eval()


def make(name, tokens, pooling="mean", **settings):
    settings = dict(prompts=ONE_PROMPT, max_length=60) | settings
    return Embedder(make_model(name), TOKENIZERS[tokens], pooling, **settings).eval()


def add_lora(model, seed=0, **settings):
    inject(model, 4, 8, 0.0, "all", **settings)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.normal_(0, 0.3)


def load(folder, **settings):
    return Embedder.load(str(folder), **(dict(device="cpu", dtype="fp32") | settings))


def differ(a, b):
    """Largest difference of two arrays or lists of arrays of equal shapes."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True)]
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


# ---- ids ----
def test_prompt_and_text_are_tokenized_as_one_string():
    tokenizer, instructions, text = TOKENIZERS["encoder"], ["find a book: ", ""], "the cat"
    (ids, (start, end)), = tokenize(tokenizer, [text], instructions[0], Template(), 48, False)
    bare = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (instructions[0], text)]
    assert ids[1:-1] != sum(bare, [])  # the space has moved into the text's first token
    assert tokenizer.decode(ids[start:end]) == " the cat</s>"  # which then belongs to the text
    one, other = (tokenize(tokenizer, [text], i, CHAT, 48, False) for i in instructions)
    assert tokenize(tokenizer, [text] * 2, instructions, CHAT, 48, False) == one + other


@pytest.mark.parametrize("tokens", ["encoder", "bos", "eos", "bare"])  # they decode exactly
@pytest.mark.parametrize("text", TEXTS + ["<|user|> the </s> cat", "\u3000x\n\n"])
def test_pooled_range_begins_with_the_text(tokens, text):
    tokenizer, instruction = TOKENIZERS[tokens], "find a book:"
    for template in [Template("<|user|>\n", "<|end|>"), *TEMPLATES.values()]:
        (ids, (start, end)), = tokenize(tokenizer, [text], instruction, template, 9999, False)
        whole = template.prefix + instruction + text + template.suffix
        assert ids == tokenizer(whole)["input_ids"] and end == len(ids)
        front = tokenizer.decode(ids[:start]).removeprefix("<s>")
        assert front == template.prefix + instruction
        assert tokenizer.decode(ids[start:]).removesuffix("</s>") == text + template.suffix
    # without prefix and instruction nothing is left out, the tokenizer's own tokens included
    (ids, span), = tokenize(tokenizer, [text], "", Template(), 9999, False)
    assert span == (0, len(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_only_the_text_is_cut(tokens):
    tokenizer, template = TOKENIZERS[tokens], Template("<|user|>", " in a book<|end|>")
    long = f"{WORDS} " * 30
    (whole, (first, _)), = tokenize(tokenizer, [long], "find:", template, 9999, False)
    (short, (start, end)), = tokenize(tokenizer, [long], "find:", template, 40, False)
    tail = " in a book<|end|>" + ("</s>" if tokens in ("encoder", "eos") else "")
    n = len(tokenizer(tail, add_special_tokens=False)["input_ids"])
    assert short == whole[: 40 - n] + whole[-n:] and tokenizer.decode(short).endswith(tail)
    assert (start, end) == (first, 40)
    (exact, _), = tokenize(tokenizer, [long], "find:", template, len(whole))
    assert exact == whole
    with pytest.raises(ValueError, match="max_length 12 leaves no room for the text"):
        tokenize(tokenizer, [long], "find an old book and a house:", template, 12)


def test_max_length_leaves_room_for_a_word():
    (ids, places, words), = tokenize_words(TOKENIZERS["encoder"], [["the", "cat"]], 3)
    assert (len(ids), places.tolist(), words.tolist()) == (3, [1], [0])
    with pytest.raises(ValueError, match="max_length 2 leaves no room for the text: 1 tokens"):
        tokenize_words(TOKENIZERS["encoder"], [["the", "cat"]], 2)


# ---- pooling ----
def pooled_rows(hidden, encoded):
    """hidden [T, C] -> a list of B arrays [n, C]: what is pooled of each text"""
    starts = np.cumsum([0, *(len(ids) for ids, _ in encoded[:-1])])
    return [hidden[at + i : at + j] for at, (_, (i, j)) in zip(starts, encoded, strict=True)]


def loops(hidden, encoded, pooling):
    """The same with padding-free loops. hidden [T, C] -> [B, C]"""
    out = []
    for h in pooled_rows(hidden, encoded):
        n = len(h)
        weights = dict(mean=[1] * n, weighted_mean=range(1, n + 1), cls=[1] + [0] * (n - 1),
                       last=[0] * (n - 1) + [1])[pooling]  # fmt: skip
        out.append(sum(w * x for w, x in zip(weights, h, strict=True)) / sum(weights) if n else
                   torch.zeros_like(hidden[0]))  # fmt: skip
    return torch.stack(out)


ENCODED = [([1, 2, 3], (0, 3)), ([4], (0, 1)), ([5, 6, 7, 8], (2, 4)), ([9, 9], (2, 2)),
           ([0], (0, 0)), ([1, 2], (1, 2))]  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "cls"])
def test_pool_equals_loops(pooling):
    _, _, pooled = pack(ENCODED, "cpu")
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    got, wanted = pool(hidden, pooled, pooling), loops(hidden, ENCODED, pooling)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    weight = torch.randn_like(got)
    grads = [torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)
    half = hidden.detach().bfloat16()
    assert pool(half, pooled, pooling).dtype == torch.float32  # and summed there, not in bf16
    exact = loops(half.double(), ENCODED, pooling)
    torch.testing.assert_close(pool(half, pooled, pooling).double(), exact, rtol=1e-5, atol=1e-6)


def test_splade_and_tokens_equal_loops(monkeypatch):
    model = make_model("modernbert").double()
    encoded = [one for one in ENCODED if one[1][0] < one[1][1]]
    tokens, seqs, pooled = pack(encoded, "cpu")
    monkeypatch.setattr("pooling.groups", lambda lengths, limit: groups(lengths, 3))  # some texts

    got = Embedder(model, TOKENIZERS["bare"], "splade")(tokens, seqs, pooled)
    logits = pooled_rows(model(tokens, seqs, rows=torch.arange(len(tokens))), encoded)
    wanted = torch.stack([torch.log1p(F.relu(x)).amax(0) for x in logits])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert (got > 0).any() and (got == 0).any()
    weight, params = torch.randn_like(got), list(model.parameters())
    a, b = (torch.autograd.grad((x * weight).sum(), params) for x in (got, wanted))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # norms are in fp32

    projection = torch.nn.Linear(32, 8, bias=False).double()
    late = Embedder(model, TOKENIZERS["bare"], "tokens", projection=projection)
    vectors, lengths = late(tokens, seqs, pooled)
    hidden = pooled_rows(model(tokens, seqs), encoded)
    assert lengths == [len(x) for x in hidden]
    wanted = F.normalize(projection(torch.cat(hidden)), dim=-1)
    torch.testing.assert_close(vectors, wanted, rtol=0, atol=1e-12)


# ---- encode ----
def test_order_and_odd_texts():
    ours = make("modernbert", "encoder")
    got = ours.encode(TEXTS, "find:")
    assert got.shape == (len(TEXTS), 32) and got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    alone = np.concatenate([ours.encode([text], "find:") for text in TEXTS])
    small = ours.encode(TEXTS, "find:", device_batch_tokens=1)
    assert differ(got, alone) < 1e-6 and differ(got, small) < 1e-6
    assert differ(got[3:4], got[4:5]) < 1e-6  # equal texts
    other = np.delete(got, 4, axis=0)  # all others differ from each other
    apart = np.abs(other[:, None] - other[None]).max(-1)
    assert apart[~np.eye(len(other), dtype=bool)].min() > 1e-3 and ours.encode([]).shape == (0, 32)
    for pool_instruction, instruction in ((True, ""), (False, "find:")):  # nothing to pool
        bare = make("qwen3", "bare", pool_instruction=pool_instruction)
        got = bare.encode(["", "the cat"], instruction)
        assert (got[0] == 0).all() and np.linalg.norm(got[1]) > 0.99
    raises(TypeError, "a list of texts, not one string", ours.encode, "the cat")


@pytest.mark.parametrize(("tokens", "suffix", "told"), [
    ("bare", "", True), ("eos", "", False), ("bare", "</s>", False)])  # fmt: skip
def test_last_pooling_without_an_end_token_is_told(tokens, suffix, told, capsys):
    make("qwen3", tokens, pooling="last", template=Template("", suffix))
    assert ("no end token" in capsys.readouterr().out) == told


def test_training_and_encoding_agree():
    ours = make("modernbert", "encoder", template=CHAT)
    ours.encode(TEXTS)  # what it leaves in caches must serve training, too
    ours.train()
    ours.model.set_dropout(out=0.0)
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
    ours, late, rng = make("llama", "eos"), make("llama", "eos", "tokens"), np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), rng.integers(1, 9))) for _ in range(600)]

    class Lazy(UserList):  # a sequence that is no list, and that is read once
        seen = []

        def __getitem__(self, i):
            self.seen.append(i)
            return self.data[i]

    whole, many = ours.encode(texts), late.encode(texts)
    asked = [f"find {i % 5}: " for i in range(600)]
    each = ours.encode(texts, asked)
    monkeypatch.setattr(module, "PART", 32 * 130)  # 130 texts at a time; of tokens 2
    assert differ(ours.encode(texts, asked), each) < 1e-6 < differ(each, whole)
    assert differ(ours.encode([[a, text] for a, text in zip(asked, texts)]), each) < 1e-6
    assert differ(late.encode(texts[:99]), many[:99]) < 1e-6
    path = str(tmp_path / "vectors.npy")
    got = ours.encode(Lazy(texts), out=path, progress=True)
    assert isinstance(got, np.memmap) and sorted(Lazy.seen) == list(range(600))
    assert differ(got, whole) < 1e-6 and differ(np.load(path), whole) < 1e-6
    assert ours.encode([], out=path).shape == (0, 32)


def test_fewer_numbers_and_fewer_bits(tmp_path, monkeypatch):
    """Equal to sentence-transformers' truncate_dim and quantize_embeddings, and their scores to
    loops; in parts, and into a file."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import quantize_embeddings

    ours, rng = make("modernbert", "encoder"), np.random.default_rng(0)
    ours.save(tmp_path / "m")
    theirs = SentenceTransformer(str(tmp_path / "m"), device="cpu")
    texts = [" ".join(rng.choice(WORDS.split(), rng.integers(1, 9))) for _ in range(150)]
    short = ours.encode(texts, dim=16)
    want = theirs.encode(texts, truncate_dim=16, normalize_embeddings=True)
    assert short.shape == (150, 16) and differ(short, want) < 1e-6
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    bare = make("modernbert", "encoder", normalize=False)
    assert np.array_equal(bare.encode(texts, dim=16), bare.encode(texts)[:, :16])
    late = make("llama", "eos", "tokens").encode(texts[:2], dim=8)
    assert [x.shape[1] for x in late] == [8, 8] and abs((late[0] ** 2).sum(1) - 1).max() < 1e-6

    monkeypatch.setattr(module, "PART", 32 * 60)  # 60 texts at a time
    ranges, path = ranges_of(short[:100]), str(tmp_path / "codes.npy")
    for precision, given in (("int8", None), ("int8", ranges), ("binary", None)):
        got = ours.encode(texts, dim=16, precision=precision, ranges=given)
        want = quantize_embeddings(short, precision, given)
        assert got.dtype == want.dtype == np.int8 and got.shape == want.shape
        # a value at the border of two steps
        assert (got != want).mean() < 0.01 and len(np.unique(got)) > 50
        assert np.array_equal(quantize(short, precision, given), want)
        if precision == "binary" or given is not None:
            more = dict(dim=16, precision=precision, ranges=given, out=path)
            assert np.array_equal(ours.encode(texts, **more), got)

    codes, bits = quantize(short, "int8", ranges), quantize(short, "binary")
    sign, step = np.where(short > 0, 1.0, -1.0), (ranges[1] - ranges[0]) / 255
    wanted = {"int8": short[:5] @ (ranges[0] + (codes + 128.0) * step).T,
              "binary": short[:5] @ sign.T}  # fmt: skip
    for precision, texts_of in (("int8", codes), ("binary", bits)):
        got = scores(short[:5], texts_of, precision, ranges)
        np.testing.assert_allclose(got, wanted[precision], atol=1e-5)
    inside = ((short >= ranges[0]) & (short <= ranges[1])).all(1)
    error = np.abs(wanted["int8"] - short[:5] @ short.T)[:, inside]
    assert error.max() < np.abs(short[:5]).sum(1).max() * step.max()
    np.testing.assert_allclose(scores(codes[:5], codes, "int8"), codes[:5].astype(int) @ codes.T)
    hamming = (sign[:5, None] != sign[None]).sum(-1)
    assert np.array_equal(scores(bits[:5], bits, "binary"), 16 - 2 * hamming)
    assert scores(short, bits[:0], "binary").shape == (150, 0)
    raises(ValueError, "dim=33 of 32", ours.encode, texts, dim=33)
    raises(ValueError, "needs ranges=", ours.encode, texts, precision="int8", out=path)
    raises(ValueError, "from 1 vectors", ours.encode, texts[:1], precision="int8")
    raises(ValueError, "12 numbers, expected a multiple", quantize, short[:, :12], "binary")
    raises(ValueError, "precision='fp8'", ours.encode, texts, precision="fp8")


def encode_in_all_ways(out):
    """What each rank of a group, or one process alone, gives."""
    ours, late = make("llama", "eos"), make("llama", "eos", "tokens")
    return dict(whole=ours.encode(TEXTS), few=ours.encode(TEXTS[:1]),
                each=ours.encode(TEXTS, ASKED), pairs=ours.encode([*zip(ASKED, TEXTS)]),
                mapped=ours.encode(TEXTS, out=str(out)), many=np.concatenate(late.encode(TEXTS)))


def test_two_ranks_give_what_one_gives(tmp_path):
    run_ranks(2, [[__file__, str(tmp_path)]])
    wanted = encode_in_all_ways(tmp_path / "one.npy")
    for rank in (0, 1):
        got = np.load(tmp_path / f"rank{rank}.npz")
        assert all(differ(got[key], wanted[key]) < 1e-6 for key in wanted)
    one = make("llama", "eos")
    alone = [one.encode([text], asked)[0] for text, asked in zip(TEXTS, ASKED)]
    assert max(differ(wanted[key], alone) for key in ("each", "pairs")) < 1e-6
    raises(ValueError, "2 instructions for 1 texts", one.encode, ["a"], ["b", "c"])
    raises(ValueError, "give one", one.encode, [("a", "b")], "c")


# ---- folders ----
CASES = [  # model, tokenizer, pooling, settings
    ("modernbert", "encoder", "mean", dict(template=CHAT)),
    ("modernbert", "encoder", "mean", dict(pool_instruction=False)),
    ("modernbert", "encoder", "weighted_mean", dict(template=Template("a dog: "))),
    ("modernbert", "encoder", "cls", {}), ("modernbert", "encoder", "last", dict(normalize=False)),
    ("llama", "bos", "last", dict(template=CHAT, pool_instruction=False)),
    ("llama", "bos", "cls", dict(template=CHAT, pool_instruction=False)),
    ("llama-bidirectional", "bos", "mean", dict(template=CHAT, pool_instruction=False)),
    ("llama-bidirectional", "llama2", "mean", dict(template=TEMPLATES["llama2"])),
    ("llama", "llama2", "mean", dict(template=Template("", "</s>"), pool_instruction=False)),
    ("llama-bidirectional", "eos", "weighted_mean", dict(template=Template("", "<|end|>"))),
    ("qwen3", "bare", "last", dict(template=Template("", "</s>"))),
    ("qwen3", "eos", "mean", dict(pool_instruction=False)),
    ("gemma3-bidirectional", "bos", "mean", dict(template=CHAT, pool_instruction=False)),
    ("neobert", "encoder", "mean", dict(template=CHAT)), ("neobert", "encoder", "splade", {}),
    ("modernbert", "encoder", "splade", dict(template=CHAT)),
    ("modernbert", "encoder", "tokens", dict(projection=torch.nn.Linear(32, 8, bias=False))),
    ("llama-bidirectional", "eos", "tokens", {})]  # fmt: skip


@pytest.mark.parametrize("name, tokens, pooling, settings", CASES)
def test_equals_sentence_transformers(name, tokens, pooling, settings, tmp_path):
    import sentence_transformers as st

    ours = make(name, tokens, pooling, **settings)
    ours.save(tmp_path / "step4")
    os.symlink("step4", tmp_path / "final")  # as a run leaves it in its out_dir
    kind = {"splade": st.SparseEncoder, "tokens": st.MultiVectorEncoder}
    theirs = kind.get(pooling, st.SentenceTransformer)(
        str(tmp_path / "final"), device="cpu", trust_remote_code=name == "neobert")
    again = load(tmp_path / "final")
    for key, their_encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        got, wanted = ours.encode(TEXTS, ours.prompts[key]), their_encode(TEXTS)
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
    files = [(tmp_path / folder / "tokenizer.json").read_text() for folder in ("step4", "twice")]
    assert files[0] == files[1]


def test_reads_what_sentence_transformers_writes(tmp_path, capsys):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    save_pretrained(make("llama", "eos").model, tmp_path / "model")
    tokenizer = make_tokenizer("", "</s>")
    tokenizer.truncation_side = "right"
    tokenizer.save_pretrained(tmp_path / "model")
    parts = [Transformer(str(tmp_path / "model"), max_seq_length=40),
             Pooling(32, "lasttoken", include_prompt=False), Normalize()]  # fmt: skip
    theirs = SentenceTransformer(modules=parts, prompts=ONE_PROMPT, device="cpu")
    theirs.save(str(tmp_path / "st"))
    ours = load(tmp_path / "st")
    assert (ours.pooling, ours.max_length, ours.normalize) == ("last", 40, True)
    assert ours.prompts == ONE_PROMPT and ours.pool_instruction  # the same vector for "last"
    assert differ(ours.encode(TEXTS, ours.prompts["query"]), theirs.encode_query(TEXTS)) < 2e-5
    assert differ(ours.encode(TEXTS), theirs.encode_document(TEXTS)) < 2e-5

    space, mean = {"query": "find a book: "}, Pooling(32, "mean", include_prompt=False)
    space = SentenceTransformer(modules=[parts[0], mean], prompts=space, device="cpu")
    space.save(str(tmp_path / "space"))
    capsys.readouterr()
    load(tmp_path / "space")
    assert "not in all as sentence-transformers has it: prompt 'query'" in capsys.readouterr().out

    for extra, word in ((Dense(32, 8), "Dense"), (Pooling(32, ("mean", "max")), "max")):
        SentenceTransformer(modules=[*parts[:2], extra], device="cpu").save(str(tmp_path / word))
        raises(ValueError, f"{word}.*not supported|not supported.*{word}", load, tmp_path / word)


def test_plain_folder_and_overrides(tmp_path, capsys):
    save_pretrained(make_model("llama"), tmp_path)
    TOKENIZERS["bos"].save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert "does not say how it pools: mean" in capsys.readouterr().out
    assert (ours.pooling, ours.max_length) == ("mean", 128)
    wanted = make("llama", "bos", max_length=128).encode(TEXTS)
    assert differ(ours.encode(TEXTS), wanted) < 1e-6
    given = dict(pooling="last", template=CHAT, max_length=20)
    other = load(tmp_path, attention="bidirectional", **given)
    same = Embedder(from_pretrained(tmp_path, "bidirectional"), TOKENIZERS["bos"], **given)
    assert differ(other.encode(TEXTS), same.encode(TEXTS)) == 0
    assert differ(other.encode(TEXTS), ours.encode(TEXTS)) > 0.1
    half = load(tmp_path, dtype="bf16")
    assert half.model.embed.weight.dtype == torch.bfloat16
    assert 0 < differ(half.encode(TEXTS), ours.encode(TEXTS)) < 0.1
    raises(FileNotFoundError, "no such folder", load, "./nothing/here")


def test_adapter_chain_equals_peft(tmp_path):
    """LLM2Vec's layout: a base, an adapter that is merged, a second one on top of it."""
    from peft import PeftModel

    paths = {key: str(tmp_path / key) for key in ("base", "mntp", "simcse")}
    base = make_model("llama-bidirectional")
    base.config.causal = True  # the base's config.json does not say that the adapters want it off
    save_pretrained(base, paths["base"])
    TOKENIZERS["bos"].save_pretrained(paths["base"])
    for key, max_length in (("mntp", 50), ("simcse", 30)):  # the last one's word counts
        model = from_pretrained(paths["base"], "bidirectional")
        add_lora(model, seed=max_length)
        save_adapter(model, paths[key], paths["base"])
        os.remove(f"{paths[key]}/nanoembed_adapter.json")  # LLM2Vec's folders have none
        if key == "mntp":  # its run_mntp.py writes the adapter alone
            continue
        llm2vec = dict(pooling_mode="mean", max_length=max_length, skip_instruction=True)
        with open(f"{paths[key]}/llm2vec_config.json", "w") as f:
            json.dump(llm2vec | {"doc_max_length": 20}, f)

    ours = load(paths["mntp"], adapters=[paths["simcse"]])
    assert (ours.pooling, ours.max_length, ours.pool_instruction) == ("mean", 30, False)
    theirs = AutoModelForCausalLM.from_pretrained(paths["base"], is_causal=False)
    theirs.config.is_causal = False
    theirs = PeftModel.from_pretrained(theirs, paths["mntp"]).merge_and_unload()
    theirs = PeftModel.from_pretrained(theirs, paths["simcse"]).eval()
    encoded, got = ours.tokenize(TEXTS, "find:"), ours.encode(TEXTS, "find:")
    with torch.no_grad():
        rows = [theirs(torch.tensor([ids]), output_hidden_states=True) for ids, _ in encoded]
    hidden = torch.cat([row.hidden_states[-1][0] for row in rows])
    assert differ(got, F.normalize(loops(hidden, encoded, "mean"), dim=-1)) < 2e-5
    explicit = load(paths["base"], adapters=[paths["mntp"], paths["simcse"]])
    assert differ(explicit.encode(TEXTS, "find:"), got) == 0
    one = load(paths["mntp"], attention="bidirectional")
    assert differ(one.encode(TEXTS, "find:"), got) > 0.1
    half = load(paths["mntp"], adapters=[paths["simcse"]], dtype="bf16").state_dict()
    for name, weight in ours.state_dict().items():  # the sum of all is rounded once
        assert torch.equal(half[name], weight.bfloat16()), name


def test_lora_is_merged_in_the_files_only(tmp_path):
    ours = make("qwen3", "eos", "tokens", projection=torch.nn.Linear(32, 8, bias=False))
    add_lora(ours.model, train_also="norm")
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
        assert differ(load(tmp_path / folder).encode(TEXTS), before) < 2e-5


@pytest.mark.parametrize("tokens, pooling, settings, reason", [
    ("encoder", "mean", dict(prompts={"query": "find: ", "document": ""}, pool_instruction=False),
     "prompt 'query' .'find: '.*leave . tokens out of the pool, we"),
    ("encoder", "mean", dict(template=CHAT, pool_instruction=False), "than one token, a special"),
    ("bos", "mean", dict(template=Template("", "t in a book")), "its tokens would be"),
    ("bos", "mean", dict(pool_instruction=False, pool_bos=False),
     "prompt 'document'.*leave 0 tokens out of the pool, we 1"),
    ("encoder", "weighted_mean", dict(pool_instruction=False), "counts the instruction's"),
    ("encoder", "splade", dict(pool_instruction=False), "counts the instruction's")])  # fmt: skip
def test_a_save_that_would_differ_is_refused(tokens, pooling, settings, reason, tmp_path):
    ours = make("modernbert", tokens, pooling, **settings)
    raises(ValueError, f"would give other embeddings: .*{reason}", ours.save, tmp_path / "refused")
    assert not os.path.exists(tmp_path / "refused")
    ours.save(tmp_path / "own", sentence_transformers=False)
    again = load(tmp_path / "own")
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


if __name__ == "__main__":  # one rank
    dist.init_process_group("gloo")
    found = encode_in_all_ways(f"{sys.argv[1]}/out.npy")
    np.savez(f"{sys.argv[1]}/rank{dist.get_rank()}.npz", **found)
    dist.destroy_process_group()
