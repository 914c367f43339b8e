"""
Byte-level BPE tokenizers as tiktoken encodings, for tokenizing in bulk.
"""

import json
import re

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenizer import whole_backend

# Texts that tell two byte-level tokenizers apart: all kinds of space, digits, contractions, code,
# scripts, joined emoji, spelled special tokens, long runs, every character of the basic plane.
PROBES = [
    *("", " ", "  ", "\n", "\t\t x", "a  b   c\n\n\n  d \r\n e\xa0\u2003\u3000f\x85g\u180eh\x1ci "),
    "I'll they've we're it's don't I'M HE'LL 'tis ''s it\u2019s x'y O'Reilly's -- (a).b; c... $5%",
    "1 12 123 1234 12345678901234567890 3.14e-10 1,000,000 0x1F \u0663\u0664 \xbd\xb2 \u2167",
    "def f(x: int = 3, *a) -> str:\n\treturn f'{x!r:>10}'  # why?\n\n    if x != y: x <<= 2;",
    "na\xefve cafe\u0301 \u1e9b\u0323 \ufb01 \u212b \u0130 \u01c5 \u4f60\u597d\u3002\u3053\uc548",
    "\u041f\u0440 \u0645\u0631 \u0928\u092e\u0947 \u0e01\u0e34 \u2764\ufe0f \U0001f468\u200d\u2640",
    "[CLS] [SEP][MASK] [PAD] <s></s> <|endoftext|> <|im_start|>user <mask> <|begin_of_text|>",
    "a" * 3000 + " " * 900 + "\n" * 300 + "!?" * 300 + "12" * 300 + "aB" * 300 + "\U0010ffff\0",
    "".join(f"{chr(c)}a{chr(c)} {chr(c)}" for c in range(0x10000) if not 0xD800 <= c < 0xE000),
]


def fast_encode(tokenizer, verbose=True):
    """A function from a list of texts to a list of lists of ids, specials included. Byte-level BPE
    runs in `tiktoken` where its ids are equal, everything else in the tokenizer itself. On 3 MB of
    speeches, with GPT-2's vocabulary, tiktoken did 34 MB/s on one core, the tokenizer 4.5."""

    def plain(texts):
        return [encoding.ids for encoding in whole_backend(tokenizer).encode_batch_fast(texts)]

    encoding, equal = tiktoken_for(tokenizer), False
    if encoding:
        (full,) = plain(["a"])
        at = full.index(*encoding.encode_ordinary("a"))
        head, tail = full[:at], full[at + 1 :]  # what the tokenizer adds around any text
        # Texts that spell an added token are left to the tokenizer, which has rules of its own for
        # them (strip, single word). So are texts with long runs of space: tiktoken's regular
        # expression overflows its stack on enough of it.
        added = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()]
        is_odd = re.compile("|".join([*added, r"\s{1000}"])).search
        normalizer = tokenizer.backend_tokenizer.normalizer  # None or NFC, which keeps ASCII

        def encode(text):
            if is_odd(text):
                return plain([text])[0]
            if normalizer and not text.isascii():
                text = normalizer.normalize_str(text)
            return [*head, *encoding.encode_ordinary(text), *tail]

        def fast(texts):
            return [encode(text) for text in texts]

        equal = fast(PROBES) == plain(PROBES)
    if verbose:
        print("tokenizing with", "tiktoken" if equal else "the tokenizer itself (not tiktoken)")
    return fast if equal else plain


def tiktoken_for(tokenizer):
    """A tiktoken.Encoding that merges like this tokenizer's byte-level BPE; None where none does.

    tiktoken joins any two tokens that spell a third, in the order of ids. The results are equal
    where (1) the merges make tokens in the order of their ids and (2) each token, spelled out,
    merges back to itself. For then, once all earlier merges are done, its spelling has become the
    two halves of its own merge; as that does not depend on the text around, no other two tokens
    that spell it are ever neighbours. How text is cut into words before is a regular expression,
    run by another library: for that, `fast_encode` compares ids on PROBES.
    """
    try:
        import tiktoken
    except ImportError:
        return None
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, cut = spec["model"], spec["pre_tokenizer"] or {}
    cut = cut.get("pretokenizers", [cut])  # how text is cut into words
    if bpe["type"] != "BPE" or cut[-1].get("type") != "ByteLevel" or cut[-1]["add_prefix_space"]:
        return None
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if len(cut) == 1 and cut[0]["use_regex"]:  # GPT-2's
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    elif len(cut) == 2 and "Regex" in cut[0].get("pattern", {}) and not cut[1]["use_regex"]:
        pattern = cut[0]["pattern"]["Regex"]
    else:
        return None

    added = {token["content"] for token in spec["added_tokens"]}
    vocab = {token: i for token, i in bpe["vocab"].items() if token not in added}
    merges = [m if isinstance(m, list) else m.split(" ") for m in bpe["merges"]]
    made = [vocab.get(a + b, -1) for a, b in merges]
    bpe["ignore_merges"] = False  # Llama 3 first looks a whole word up, as tiktoken always does
    merge = Tokenizer.from_str(json.dumps(spec)).model.tokenize
    byte_of = {c: b for b, c in bytes_to_unicode().items()}  # GPT-2's spelling of bytes
    whole = all(len(merge(token)) == 1 for token in vocab)
    if made != sorted(made) or not whole or not byte_of.keys() <= vocab.keys():
        return None
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}
    return tiktoken.Encoding("bulk", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
