"""
Texts to ids. This is the only place that makes ids, for training, evaluation and use.

    tokenize            texts with an instruction and a template, and which tokens are pooled
    tokenize_passage    one passage, nothing cut, and the characters that each token holds
    tokenize_words      sentences given as words, and the word that each token stands for
    load_tokenizer      a fast tokenizer of Hugging Face, from a folder or the hub
"""

import json
import os
from dataclasses import dataclass

import numpy as np

from data import SURROGATE
from formats import read_json


@dataclass(frozen=True)
class Template:
    """What stands around every text: prefix + instruction + text + suffix. It is saved with the
    model. The tokenizer adds its own BOS, CLS, EOS or SEP. separator: what an instruction ends in;
    one that does not gets it."""

    prefix: str = ""
    suffix: str = ""
    separator: str = ""

    def head(self, instruction):
        """All that stands before the text. A visible separator takes the place of a colon."""
        if instruction and self.separator:
            instruction = instruction.strip()
            if mark := self.separator.strip():
                instruction = instruction.removesuffix(mark).rstrip(":")
            instruction += self.separator
        return self.prefix + instruction


TEMPLATES = {  # chat wraps, chosen by name in a config
    "none": Template(),
    "llama3": Template("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "llama2": Template("[INST] ", " [/INST]"),
    "mistral": Template("[INST] ", " [/INST]"),
    "qwen": Template("<|im_start|>user\n", "<|im_end|>"),
}


def tokenize(
    tokenizer, texts, instruction, template, max_length, pool_instruction=True, pool_bos=True
):  # fmt: skip
    """-> [(ids, (start, end)), ...], end exclusive: the tokens of each text and which are pooled.

    prefix + instruction + text + suffix are tokenized as one string: a special token spelled out in
    a text is that token. `instruction` is one for all texts, or a list. Of more than `max_length`
    tokens the text loses its last ones; the suffix and the tokenizer's own EOS or SEP stay.
    All tokens are pooled. With pool_instruction=False the range begins at the first token that has
    a character of the text, as in LLM2Vec and sentence-transformers; without prefix and instruction
    it is everything, as in the latter; with pool_bos=False all but a BOS or CLS, as in LLM2Vec.
    An empty text may leave nothing: it gets the zero vector.
    Raises ValueError where prefix, instruction and suffix leave no room for the text.
    """
    backend = whole_backend(tokenizer)
    texts = [without_middle(backend, text, max_length) for text in texts]
    heads = heads_of(texts, instruction, template)
    joined = [h + t + template.suffix for h, t in zip(heads, texts)]
    encodings = backend.encode_batch(joined)
    encoded = []
    for head, text, encoding in zip(heads, texts, encodings):
        ids, start = encoding.ids, 0
        skip_head = not pool_instruction and (head or not pool_bos)
        if skip_head or len(ids) > max_length:
            # A token is placed by its last character: one that holds the instruction's last space
            # and the text's first letters belongs to the text.
            ends, body = [end for _, end in encoding.offsets], body_length(encoding)
            borders = len(head), len(head) + len(text)
            first, tail = (next((i for i, e in enumerate(ends) if e > b), body) for b in borders)
            ids = _cut(ids, first, tail, max_length)
            start = first if skip_head else 0
        encoded.append((ids or [0], (start, len(ids))))  # a row needs a token: it is not pooled
    return encoded


def heads_of(texts, instruction, template):
    instructions = [instruction] * len(texts) if isinstance(instruction, str) else instruction
    return [template.head(i) for i in instructions]


def tokenize_llm2vec(
    tokenizer, texts, instruction, template, max_length, pool_instruction, doc_max_length
):  # fmt: skip
    """`tokenize` as LLM2Vec's encode does it, for its published models (llm2vec.py, 0.2.3).

    A text loses whole words until it has at most `doc_max_length` tokens by itself, and white space
    at its end if a suffix follows. Of more than `max_length` tokens the last ones go, the suffix
    too. With pool_instruction=False as many tokens are pooled, from the end, as text + suffix have
    by themselves: where the text's first word is cut differently there, one more or fewer.
    Not as in LLM2Vec: a first word of more than `doc_max_length` tokens is cut, not dropped; what
    has no tokens gets the zero vector, not a mean that depends on the batch.
    """
    backend = whole_backend(tokenizer)
    texts = [_cut_words(backend, text, doc_max_length, max_length) for text in texts]
    texts = [text.rstrip() if template.suffix else text for text in texts]
    tails = [text + template.suffix for text in texts]
    whole = map(str.__add__, heads_of(texts, instruction, template), tails)
    whole = backend.encode_batch(list(whole))
    alone = backend.encode_batch(tails, add_special_tokens=False)
    encoded = []
    for encoding, tail in zip(whole, alone):
        ids = _cut(encoding.ids, 0, body_length(encoding), max_length)
        start = 0 if pool_instruction else max(0, len(ids) - len(tail.ids))
        encoded.append((ids or [0], (start, len(ids))))
    return encoded


def _cut_words(backend, text, limit, max_length):
    """The first words of a text, of at most `limit` tokens, in the steps that LLM2Vec takes."""
    while True:
        encoding = backend.encode(text, add_special_tokens=False)
        length = min(len(encoding.ids), max_length)
        if length <= limit:
            return text
        words = text.split()
        n = int(len(words) * (limit / length))
        if n == 0:
            return text[: encoding.offsets[limit - 1][1]]
        text = " ".join(words[:n])


def tokenize_passage(tokenizer, passage, instruction, template):
    """-> (ids, rows int64 [n], spans int64 [n, 2]): the ids that `tokenize` gives, nothing cut;
    which of them hold a character of the passage; and which characters [start, end) they hold.
    Each of the tokens that share one character, such as the bytes of an emoji, has that one."""
    head = template.head(instruction)
    encoding = whole_backend(tokenizer).encode(head + passage + template.suffix)
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) - len(head)
    spans = spans.clip(0, len(passage))
    rows = np.flatnonzero(spans[:, 0] < spans[:, 1])
    return encoding.ids or [0], rows, spans[rows]


def check_text(text, name):
    """The text. TypeError or ValueError, with its name, where it is none that can be tokenized."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r:.60}, expected a str")
    if not text.isascii() and SURROGATE.search(text):
        raise ValueError(f"{name} has half a character (a surrogate)")
    return text


def tokenize_words(tokenizer, sentences, max_length):
    """Lists of words -> [(ids, places [P], words [P]), ..]: the P tokens that stand for a word, and
    the word of each. A word that is cut off, or tokenizes to nothing, has none.

    A sentence is " ".join(words), tokenized once. A token belongs to the word of its last
    character, and a space to the word behind it. A sentence of more than `max_length` tokens loses
    its last ones; the tokenizer's own EOS or SEP stays. Raises ValueError where max_length leaves
    no room for the first word."""
    backend, encoded = whole_backend(tokenizer), []
    joined = [without_middle(backend, " ".join(words), max_length) for words in sentences]
    encodings = backend.encode_batch(joined)
    for words, encoding in zip(sentences, encodings):
        sizes = [len(word) + (i > 0) for i, word in enumerate(words)]
        word_of = np.repeat(np.arange(len(words)), sizes)  # of each character
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        places = np.flatnonzero(ends > starts)  # what the tokenizer adds itself has no characters
        ids, body = encoding.ids, body_length(encoding)
        if len(places):
            ids = _cut(ids, places[0], body, max_length)
            places = places[places < body + len(ids) - len(encoding.ids)]
        encoded.append((ids or [0], places, word_of[ends[places] - 1]))  # a row needs a token
    return encoded


def without_middle(backend, text, max_length):
    """The text, or of one far too long (20 MB take minutes) its two ends, which `_cut` leaves with
    the same ids: tokens depend on what is near, and behind the max_length first tokens as many more
    and 256 stay, and before the last character thousands."""
    n = 64 * max_length + 4096  # characters of each end, at least
    while gap := max(0, len(text) - 2 * n) // 40320 * 40320:  # 8!: repeats stay in step, as in aaaa
        if len(backend.encode(text[:n], add_special_tokens=False)) > 2 * max_length + 256:
            return text[:n] + text[n + gap :]
        n *= 2
    return text


def body_length(encoding):
    """The number of tokens before the EOS or SEP that the tokenizer adds itself."""
    added = encoding.special_tokens_mask  # 1 for these and a BOS or CLS in front
    return len(added) - [*added[::-1], 0].index(0)


def _cut(ids, first, tail, max_length):
    """At most max_length of the ids: the text, which is ids[first:tail], loses its last tokens."""
    room = max_length - (len(ids) - tail)
    if room >= tail:
        return ids
    if room <= first:
        around = f"{first} tokens stand in front of it, {len(ids) - tail} behind"
        raise ValueError(f"max_length {max_length} leaves no room for the text: {around}")
    return ids[:room] + ids[tail:]


def whole_backend(tokenizer):
    """The backend tokenizer without the truncation and padding that its file may ask for. They are
    switched off only where there are any, because another thread may be encoding."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def load_tokenizer(path_or_name):
    """A Hugging Face fast tokenizer, from a folder or a hub id `owner/name[@revision]`.

    For sentence-transformers `Embedder.save` writes the template's suffix into the post-processor;
    here it is as before, because our callers add the suffix themselves."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = path_or_name
    if not os.path.isdir(folder):
        from formats.huggingface import download

        folder = download(path_or_name, ["*.json", "*.txt", "*.model"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers has none of its own
        raise ValueError(f"{folder}: no tokenizer can be read there: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {path_or_name} is a slow one; offsets need a tokenizer.json")
    if settings := read_json(folder, "nanoembed.json"):
        blank = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
        blank = json.dumps(blank | {"post_processor": settings["post_processor"]})
        tokenizer.backend_tokenizer.post_processor = Tokenizer.from_str(blank).post_processor
    return tokenizer


def vocab_size_of(tokenizer):
    """The largest id + 1, which is more than len(tokenizer) where the ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def puts_end(tokenizer):
    """Does it put an end token behind a text, for pooling "last" to read?"""
    return tokenizer("a")["input_ids"][-1] in tokenizer.all_special_ids


def check_tokenizer(tokenizer, model_vocab_size):
    """Raises ValueError where a tokenizer has ids beyond the model's vocabulary."""
    needed = vocab_size_of(tokenizer)
    if needed > model_vocab_size:
        problem = f"ids up to {needed - 1}, the model's vocab_size is {model_vocab_size}"
        raise ValueError(f"the tokenizer gives {problem}: take the model's own tokenizer")
