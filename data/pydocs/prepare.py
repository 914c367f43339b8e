"""
The embedded data set: the documentation that ships with Python, numpy and torch on this machine.

    python data/pydocs/prepare.py

No download. Docstrings are read with `ast` from source files; nothing of them is imported. Written
beside this file (or in --out): tokenizer/, train.bin, val.bin and so on, pairs in train.jsonl,
val.jsonl and test.jsonl, in val_summary.jsonl and test_summary.jsonl queries without the name, and
spans_train.jsonl and so on for token retrieval. See readme.md for what is in them and what the end
should look like.
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import platform
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from importlib.metadata import version

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the project

SEED = 41  # of the split and the order: at 41 each source gives about 5 % to val and to test
VOCAB_SIZE = 8192
MIN_WORDS = 20  # of a document
MIN_BODY_WORDS = 12  # of a pair's positive
MIN_ENTRIES = 4  # documents of a passage: what is looked for is a small part of it
PASSAGE_CHARS = 20_000  # a longer module is several passages, about 4,500 tokens each
RUN = 8  # words: documents that share most of their runs of 8 are taken for the same

# tests, other people's code inside torch, and what programs wrote
SKIP_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "__pycache__", "_vendor", "_internal"),
    *("vendored_templates", "artifacts", "lib-dynload", "ensurepip"),
}
SKIP_FILES = re.compile(r"(test_.*|.*_test|conftest|setup|_appdirs|_sysconfigdata.*)\.py")


# ---- where the docstrings are ----


def source_files(root: str, package: str) -> list[tuple[str, str]]:
    """(module name, path) of each source file under `root`, in a fixed order."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIP_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py") and not SKIP_FILES.fullmatch(file):
                path = os.path.join(folder, file)
                parts = os.path.relpath(path, root)[:-3].split(os.sep)
                parts = [package, *parts] if package else parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found.append((module, path))
    return found


def docs_of_file(module_and_path: tuple[str, str]) -> list[dict]:
    """{"module", "name", "signature", "summary", "body"} for each docstring of a source file."""
    module, path = module_and_path
    with open(path, "rb") as f:
        source = f.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = []
    for name, signature, text in docstrings(tree, module):
        summary, body, written = clean(text)
        if is_english(f"{summary} {body}"):
            signature = written or signature
            fields = {"signature": signature, "summary": summary, "body": body}
            found.append({"module": module, "name": name, **fields})
    return found


def docstrings(tree: ast.Module, module: str):
    """Yield (name, signature, docstring): of the module, classes, functions; and of what C code
    implements, whose docstrings are given by calls of add_docstr and add_newdoc."""
    if text := ast.get_docstring(tree, clean=False):
        yield module, module, text
    tables = keyword_tables(tree)
    todo = [(node, "") for node in reversed(tree.body)]
    while todo:
        node, owner = todo.pop()
        if isinstance(node, ast.ClassDef):
            name = f"{owner}.{node.name}" if owner else node.name
            if text := ast.get_docstring(node, clean=False):
                init = [n for n in node.body if getattr(n, "name", None) == "__init__"]
                yield name, signature_of(name, init[0], True) if init else name, text
            todo += [(child, name) for child in reversed(node.body)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{owner}.{node.name}" if owner else node.name
            if text := ast.get_docstring(node, clean=False):
                yield name, signature_of(name, node, bool(owner)), text
        elif isinstance(node, ast.If | ast.Try):
            todo += [(child, owner) for child in reversed(node.body)]
        elif isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Call):
            call = node.value
            called = ast.unparse(call.func).split(".")[-1].lstrip("_")
            if called in ("add_docstr", "add_docstr_all", "add_newdoc"):
                *names, last = call.args
                if isinstance(last, ast.Tuple) and len(last.elts) == 2:  # ('method', 'text')
                    names, last = [*names, last.elts[0]], last.elts[1]
                names = [n.value if isinstance(n, ast.Constant) else ast.unparse(n) for n in names]
                name = ".".join(str(n) for n in names)
                yield name, name, string_of(last, tables)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("__doc__"):
            name = ast.unparse(node.targets[0]).removesuffix("__doc__").rstrip(".") or module
            yield name, name, string_of(node.value, tables)


def signature_of(name: str, node, is_method: bool) -> str:
    """name(a, b=1, *, c=None), without annotations and without long defaults."""
    args = node.args
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg:
            arg.annotation = None
    long = ast.Constant(...)
    args.defaults = [d if len(ast.unparse(d)) <= 20 else long for d in args.defaults]
    args.kw_defaults = [d and (d if len(ast.unparse(d)) <= 20 else long) for d in args.kw_defaults]
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    if is_method and not static:
        (args.posonlyargs or args.args or [None]).pop(0)  # self
    return f"{name}({ast.unparse(args)})"


def keyword_tables(tree: ast.Module) -> dict[str, dict[str, str]]:
    """torch/_torch_docs.py and its like fill placeholders from tables made by `parse_kwargs` and
    `merge_dicts` at the top level: {name of the table: {placeholder: text}}."""
    tables = {}

    def table(node):
        if isinstance(node, ast.Name):
            return tables.get(node.id, {})
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return {k.value: string_of(v, {}) for k, v in pairs if isinstance(k, ast.Constant)}
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "merge_dicts":
            return {k: v for arg in node.args for k, v in table(arg).items()}
        if called == "parse_kwargs":
            blocks = re.split(r"\n {4}(?=\S)", string_of(node.args[0], {}))
            return {b.split(maxsplit=1)[0]: b.strip() for b in blocks if b.strip()}
        return {}

    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = table(node.value)
    return tables


def string_of(node, tables) -> str:
    """The text of a string expression: constants, sums, f-strings and .format(**table)."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp):
        return string_of(node.left, tables) + string_of(node.right, tables)
    if isinstance(node, ast.JoinedStr):
        return "".join(string_of(part, tables) for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = string_of(node.func.value, tables)
        if node.func.attr == "format":
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Name):
                    for key, value in tables.get(keyword.value.id, {}).items():
                        text = text.replace("{" + key + "}", value)
            text = text.replace("{{", "{").replace("}}", "}")
        return text
    return ""


# ---- from reStructuredText to English ----

# directives whose content is prose: it stays, under this name. All others go with their content.
KEPT = {"note": "Note:", "warning": "Warning:", "tip": "Tip:", "important": "Important:"}
KEPT |= {"caution": "Caution:", "seealso": "See also:", "deprecated": "Deprecated", "rubric": ""}
HEADINGS = set(
    """parameters params returns return yields raises warns warnings notes note examples example see
    also references attributes methods args arguments keyword keywords shape inputs outputs usage
    other receives optional variables quickstart""".split()
)
# - point    1) point    name, name (type): meaning    name -- meaning    name   meaning
ENTRY = re.compile(
    r"[-*+:@] ?|\(?\w{1,2}[.)] |\w+ {2,}|[*\w.`]+(, [*\w.`]+)*( \(.*\))?( ?:( |$)| -- )"
)
WRITTEN = re.compile(r"[\w.]+\([^()]*(\([^()]*\)[^()]*)*\)( *(->|=) *[^.]*)?")  # a signature
LATEX = {r"\ast": "*", r"\times": "x", r"\ldots": "...", r"\leq": "<=", r"\geq": ">="}


def clean(docstring: str) -> tuple[str, str, str | None]:
    """(summary, body, signature or None): the prose of a docstring, one paragraph a line.

    The signature is one that the docstring begins with, as those of C functions do.
    """
    paragraphs = prose(docstring)
    written = None
    while paragraphs and (WRITTEN.fullmatch(paragraphs[0]) or paragraphs[0] == "--"):
        written = written or paragraphs[0].split("->")[0].split(" = ")[0].strip()
        paragraphs.pop(0)
    if not paragraphs:
        return "", "", None
    # the summary is the first paragraph, or its first sentence where it has more
    first, *rest = paragraphs
    if cut := re.search(r"(?<=[a-z)\]\"'])[.!?](?= +[A-Z])", first):
        first, rest = first[: cut.end()], [first[cut.end() :].strip(), *rest]
    return first, "\n".join(rest), written


def prose(text: str) -> list[str]:
    """The paragraphs and list entries of a docstring without code, formulas, tables and markup."""
    lines = []
    drop = None  # the indentation of what began a block to leave out, which ends where it ends
    doctest = fence = False
    for line in inspect.cleandoc(text).split("\n"):
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith("```"):
            fence = not fence
            continue
        doctest = bool(bare) and (doctest or bare.startswith(">>>"))
        if fence or doctest or (drop is not None and (not bare or indent > drop)):
            continue
        drop = None
        if directive := re.match(r"\.\. ?([\w:-]+?) ?::(.*)", bare):
            name, rest = directive[1].lower(), directive[2].strip()
            if name not in KEPT:
                drop = indent
                continue
            lines += [(0, ""), (indent, f"{KEPT[name]} {rest}".strip())]
            continue
        if bare.startswith((".. ", "..\t")) or bare == "..":  # comments, targets, footnotes
            drop = indent
            continue
        if bare.endswith("::"):  # code follows
            drop, bare = indent, bare[:-1]
        if len(bare) > 1 and not re.search(r"[A-Za-z0-9]", bare):  # rules and underlines
            if set(bare) != {"-"} or len(bare) > 2:
                continue
        if bare.startswith(("|", "+-", "+=", "{")) or bare.count("|") > 3:  # tables, placeholders
            continue
        lines.append((indent, bare))

    paragraphs, above = [""], None  # undo line breaks; above: indentation and text of the last line
    for indent, line in lines:
        fresh = not line or above is None or indent < above[0] or ENTRY.match(line)
        wrapped = above and (len(above[1]) >= 50 or (len(above[1]) >= 30 and line[:1].islower()))
        if fresh or not wrapped:
            paragraphs.append(line)
            above = (indent, line) if line else None
        else:
            paragraphs[-1] += " " + line
            above = (above[0], line)
    paragraphs = [re.sub(r"\s+", " ", inline(p)) for p in paragraphs]
    paragraphs = [p for p in paragraphs if p and not p.startswith(("TODO", "FIXME", "XXX"))]
    # headings of what is now empty go, from the end to the front
    kept = []
    for p in reversed(paragraphs):
        if not (is_heading(p) and (not kept or is_heading(kept[-1]))):
            kept.append(p)
    return kept[::-1]


def is_heading(paragraph: str) -> bool:
    return HEADINGS.issuperset(paragraph.rstrip(":").lower().split())


def inline(text: str) -> str:
    """A paragraph without reStructuredText's roles, quotes, stars and links."""
    text = re.sub(r":[\w:.+-]+:`~?[\w.]*?\.?([\w]+)`", r"\1", text)  # :func:`~torch.add`
    text = re.sub(r":[\w:.+-]+:`~?!?([^`<]*?)\s*(<[^`]*>)?`", r"\1", text)  # :ref:`text <x>`
    text = re.sub(r"`+([^`<]+?)\s*<[^`]*>`+_*", r"\1", text)  # `text <link>`_
    text = re.sub(r"`+([^`]*)`+_*", r"\1", text)  # ``code`` `name` `link`_
    text = re.sub(r"\*\*([^*\s][^*]*)\*\*|(?<![\w*])\*([^*\s][^*]*)\*(?!\w)", r"\1\2", text)
    text = re.sub(r"^[:@](param|arg|keyword|raises?|attr|type|rtype)\s*([^:]*):", r"\2:", text)
    text = re.sub(r"^[:@](returns?):?", "Returns:", text)
    text = re.sub(r"\[(\d+)\]_|\|(\w+)\|", "", text)  # footnotes, substitutions
    text = re.sub(r"\\[a-z]*(text|math)[a-z]*\{([^{}]*)\}", r"\2", text)
    text = re.sub(r"\\[a-z]+", lambda found: LATEX.get(found[0], found[0]), text)
    return re.sub(r"\\([*_|`])", r"\1", text).strip().removeprefix(": ")


COMMON = set(
    """a an and any are as at be been but by can do does each for from has have if in into is it its
    may must no not of on only or other should so than that the their them then there these they
    this to used using was when where which will with you your""".split()
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def is_english(text: str) -> bool:
    """Enough words, enough of them the common ones of prose, and mostly letters."""
    words = re.findall(r"[A-Za-z]+", text)
    if len(words) < MIN_WORDS:
        return False
    common = sum(word.lower() in COMMON for word in words)
    letters = sum(c.isalpha() or c == " " for c in text)
    return common >= 0.15 * len(words) and letters >= 0.75 * len(text)


# ---- documents, splits, pairs ----


def topics() -> list[dict]:
    """The chapters of the language reference that `help()` shows, less those inside others."""
    path = os.path.join(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    chapters = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    chapters = {name: "\n".join(prose(text)) for name, text in sorted(chapters.items())}
    found = []
    for name, text in chapters.items():
        inside = any(text in other and text != other for other in chapters.values())
        if is_english(text) and not inside:
            title, _, body = text.partition("\n")
            fields = {"signature": title, "summary": title, "body": body}
            found.append({"module": "pydoc_data.topics", "name": name, **fields})
    return found


def split_of(module: str) -> str:
    """train, val or test by a hash of the first three parts of a module's name, so that a module
    and what is below it stay together. The topics, which are one module, are for training."""
    group = ".".join(module.split(".")[:3])
    draw = int(hashlib.sha256(f"{SEED} {group}".encode()).hexdigest()[:8], 16) / 2**32
    if module == "pydoc_data.topics" or draw < 0.9:
        return "train"
    return "val" if draw < 0.95 else "test"


def runs_of(text: str) -> set[int]:
    words = words_of(text)
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def without_repeats(docs: list[dict]) -> list[dict]:
    """Drop documents that repeat earlier ones: of the runs of 8 words in them, or in their bodies
    alone, half in val and test or 80 % in train. Training documents come first."""
    seen = set()
    kept = []
    for split, limit in (("train", 0.8), ("val", 0.5), ("test", 0.5)):
        for doc in docs:
            if split_of(doc["module"]) == split:
                whole, body = runs_of(f"{doc['summary']} {doc['body']}"), runs_of(doc["body"])
                if all(len(runs & seen) < limit * len(runs) for runs in (whole, body) if runs):
                    kept.append(doc)
                    seen |= whole
    return kept


def pair_of(doc: dict) -> dict | None:
    """{"query": signature and summary, "pos": [body], "module", "name"}, where there is a body."""
    summary, body = words_of(doc["summary"]), words_of(doc["body"])
    if doc["module"] == doc["name"]:  # a module's documentation has no signature
        query = f"{doc['name']}: {doc['summary']}"
    else:
        query = f"{doc['signature']}: {doc['summary']}"
    told = " ".join(summary) in " ".join(body)
    if doc["module"] == "pydoc_data.topics" or told or not 3 <= len(summary) <= 60:
        return None
    if len(body) < MIN_BODY_WORDS:
        return None
    return {"query": query, "pos": [doc["body"]], "module": doc["module"], "name": doc["name"]}


def by_summary(pairs: dict[str, list[dict]], split: str) -> list[dict]:
    """The pairs of a split with the summary alone as the query: how people search who do not know
    the name. Left out are summaries that two pairs of any splits share, and those that spell the
    name where it is no plain word, such as read_csv, DataLoader or conv2d."""
    told = Counter(" ".join(words_of(pair["summary"])) for of in pairs.values() for pair in of)
    found = []
    for pair in pairs[split]:
        summary, name = pair["summary"], pair["name"].split(".")[-1]
        named = name in summary and not re.fullmatch("[A-Z]?[a-z]+", name)
        if told[" ".join(words_of(summary))] == 1 and not named:
            found.append(pair | {"query": summary})
    return found


# ---- spans, for token retrieval ----


def passages_of(docs: list[dict]) -> list[list[dict]]:
    """The documents of each module, in the order of its source; a long module in several parts."""
    modules = {}
    for doc in docs:
        if doc["module"] != "pydoc_data.topics":
            modules.setdefault(doc["module"], []).append(doc)
    passages = []
    for of_module in modules.values():
        size = PASSAGE_CHARS
        for doc in of_module:
            if size + len(entry_of(doc)) > PASSAGE_CHARS or doc is of_module[0]:
                passages.append([])
                size = 0
            passages[-1].append(doc)
            size += len(entry_of(doc))
    return [passage for passage in passages if len(passage) >= MIN_ENTRIES]


def entry_of(doc: dict) -> str:
    """What a passage has of a document: its body. The summary is what a query asks for it with, so
    it stands in the passage only where there is nothing else."""
    return doc["body"] or doc["summary"]


def span_lines(docs: list[dict]):
    """Yield {"query": summary, "passage", "spans": [its document's body], "module", "name"} for the
    documents of a passage that make a pair, and whose summary is not written anywhere in it and
    not another document's as well."""
    passage = "\n\n".join(map(entry_of, docs))
    words = f" {' '.join(words_of(passage))} "
    summaries = [" ".join(words_of(doc["summary"])) for doc in docs]
    start = 0
    for doc, summary in zip(docs, summaries, strict=True):
        end = start + len(entry_of(doc))
        if pair_of(doc) and f" {summary} " not in words and summaries.count(summary) == 1:
            line = {"query": doc["summary"], "passage": passage, "spans": [[start, end]]}
            yield line | {"module": doc["module"], "name": doc["name"]}
        start = end + 2


def write_spans(docs: list[dict], out: str):
    """Write spans_{split}.jsonl. The lines of a passage follow one another."""
    for split in ("train", "val", "test"):
        passages = passages_of([doc for doc in docs if split_of(doc["module"]) == split])
        path, lines = os.path.join(out, f"spans_{split}.jsonl"), 0
        with open(path, "w", encoding="utf-8", newline="\n") as f:
            for line in (line for passage in passages for line in span_lines(passage)):
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines += 1
        print(f"{split} spans {lines:>8,}, of {len(passages):,} passages")


# ---- files ----


def train_tokenizer(texts):
    """Byte-level BPE, [CLS] text [SEP]. They are BOS and EOS too: one tokenizer for encoders and
    decoders."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    specials = ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    # a word's token has the space in front of it: the mask that stands for a word takes it, too
    mask_token = AddedToken("[MASK]", lstrip=True, normalized=False, special=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*specials[:3], mask_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    cls, sep, pad, _ = specials
    names = {"cls_token": cls, "sep_token": sep, "pad_token": pad, "mask_token": mask_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=cls,
        eos_token=sep,
        **names,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_all(docs: list[dict], out: str) -> dict:
    """Write every file into `out`. Returns the counts."""
    from formats.tiktoken_bpe import fast_encode
    from tokenizer import vocab_size_of
    from tokens import write_meta, write_tokens

    random.Random(SEED).shuffle(docs)
    by_split = {"train": [], "val": [], "test": []}
    for doc in docs:
        by_split[split_of(doc["module"])].append(doc)
    texts = {s: [f"{d['summary']}\n{d['body']}".strip() for d in ds] for s, ds in by_split.items()}
    tokenizer = train_tokenizer(texts["train"])
    encode, size = fast_encode(tokenizer), vocab_size_of(tokenizer)
    splits = {s: write_tokens(out, s, encode(texts[s]), size) for s in ("train", "val")}
    write_meta(out, tokenizer, "data/pydocs/tokenizer", splits)
    counts = {f"{s} {what}": n for s in splits for what, n in splits[s].items()}
    pairs, seen = {}, set()  # seen: queries and positives, none is there twice, in no two splits
    for split, of_split in by_split.items():
        pairs[split] = []
        for doc in of_split:
            if pair := pair_of(doc):
                keys = {" ".join(words_of(text)) for text in (pair["query"], pair["pos"][0])}
                if not keys & seen:
                    pairs[split].append(pair | {"summary": doc["summary"]})
                    seen |= keys
    written = pairs | {f"{split}_summary": by_summary(pairs, split) for split in ("val", "test")}
    written["train_by_module"] = sorted(pairs["train"], key=lambda pair: pair["module"])
    for name, lines in written.items():
        with open(os.path.join(out, f"{name}.jsonl"), "w", encoding="utf-8", newline="\n") as f:
            for line in lines:
                fields = {key: line[key] for key in ("query", "pos", "module", "name")}
                f.write(json.dumps(fields, ensure_ascii=False) + "\n")
        counts[f"{name} pairs"] = len(lines)
    return counts


def manifest_of(out: str, counts: dict) -> dict:
    """What was made, by which versions: two runs are equal where their manifests are."""
    versions = {p: version(p).split("+")[0] for p in ("numpy", "torch", "tokenizers")}
    files = ["tokenizer/tokenizer.json", "train.bin", "train.idx", "val.bin", "val.idx"]
    sums = {}
    names = ("train", "train_by_module", "val", "test", "val_summary", "test_summary")
    files += [f"{name}.jsonl" for name in names]
    for file in files:
        with open(os.path.join(out, file), "rb") as f:
            sums[file] = hashlib.sha256(f.read()).hexdigest()
    versions = {"python": platform.python_version(), **versions}
    return {"versions": versions, "counts": counts, "sha256": sums}


def compare(made: dict, expected: dict) -> str:
    """One line or a few: whether this run is the one of manifest.json, and if not, why."""
    if made == expected:
        return "equal to manifest.json"
    told = []
    for key, value in made["versions"].items():
        if value != expected["versions"][key]:
            told.append(f"{key} {value}, in manifest.json {expected['versions'][key]}")
    told = told or ["versions are the same, so sources differ or this script does"]
    for key, value in made["counts"].items():
        if value != expected["counts"][key]:
            told.append(f"{key}: {value:,} here, {expected['counts'][key]:,} there")
    files = [file for file, digest in made["sha256"].items() if digest != expected["sha256"][file]]
    told.append(f"files that differ: {', '.join(files) or 'none'}")
    return "not equal to manifest.json, so neither will your numbers be:\n  " + "\n  ".join(told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=HERE, help="folder to write to")
    parser.add_argument("--freeze", action="store_true", help="write manifest.json from this run")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)

    files = source_files(sysconfig.get_path("stdlib"), "")
    for package in ("numpy", "torch"):  # found, not imported
        root = importlib.util.find_spec(package).submodule_search_locations[0]
        files += source_files(root, package)
    with multiprocessing.Pool() as pool:
        found = tqdm(pool.imap(docs_of_file, files, 16), "reading", len(files), unit="file")
        docs = [doc for of_file in found for doc in of_file] + topics()
    kept = without_repeats(docs)
    print(f"{len(docs):,} docstrings, {len(docs) - len(kept):,} left out as repeats")
    write_spans(kept, args.out)  # first: write_all shuffles
    made = manifest_of(args.out, write_all(kept, args.out))
    for key, value in made["counts"].items():
        print(f"{key:18s} {value:>11,}")

    path = os.path.join(HERE, "manifest.json")
    if args.freeze:
        with open(path, "w", encoding="utf-8") as f:
            f.write(json.dumps(made, indent=1) + "\n")
    with open(path, encoding="utf-8") as f:
        print(compare(made, json.load(f)))

# The end, under the versions of manifest.json (15 seconds on 2 cores):
# 12,703 docstrings, 1,077 left out as repeats
# train spans    7,595, of 771 passages
# val spans      413, of 43 passages
# test spans      404, of 39 passages
# tokenizing with tiktoken
# train docs              10,538
# train tokens         1,436,737
# val docs                   525
# val tokens              65,651
# train pairs              9,248
# val pairs                  456
# test pairs                 499
# val_summary pairs          439
# test_summary pairs         479
# equal to manifest.json
