"""Malformed lines, files, weights, configs, hub names and texts: each is refused in one line that
names what is wrong, or is taken as documented."""

import gzip
import json
import math
import os
import pickle
import re
import shutil
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import eval_mteb
import lora
from data import open_pairs, read_pair
from embedder import Embedder, score_tokens
from evals.compare import read_runs
from formats import llm2vec, peft
from formats.classifier import read_classifier
from formats.huggingface import from_pretrained, resolve_folder
from formats.sentence_transformers import read_settings
from labels import join_texts, read_examples
from pairs import instructions_of
from recorder import WORDS
from sample import read_lines
from spans import read_spans
from tokenizer import Template, load_tokenizer, tokenize, tokenize_words
from tokens import open_tokens, tokenizer_of
from tools.plot import read_curve

ERRORS = (ValueError, TypeError, OSError, SystemExit)


def refused(fragments, call, *args, **keys):
    """The message's first line has all fragments; they are apart by " & "."""
    with pytest.raises(ERRORS) as error:
        call(*args, **keys)
    assert not isinstance(error.value, UnicodeError)  # of which none names a file
    line = str(error.value).splitlines()[0]
    assert all(part in line for part in fragments.split(" & ")), line


# ---- lines of pairs ----
PAIR = {"query": "q", "pos": ["a", "b"], "neg": ["c"]}
TRIPLE = {"query": "q", "positive": "a", "negative": "b"}
LINES = [
    ('{"query": "q", "pos": ["a"]', "not JSON"), ("[1, 2]", "a list, expected an object"),
    ('"text"', "a str, expected an object"), ("null", "a NoneType"), ("7", "an object"),
    ("NaN", "a float, expected an object"), ("{}", "'query' is missing"),
    ("{'query': 1}", "not JSON"),
    ('{"query": "q", "query": "r", "pos": ["a"]}', "key 'query' comes twice"),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "neg": []}', "key 'neg' comes twice"),
    ('{"query": "q", "pos": ["a"], "id": {"x": 1, "x": 2}}', "key 'x' comes twice"),
    ("[" * 100_000, "not JSON"), ('{"a":' * 100_000, "not JSON"),
    ('{"query": "q"} {}', "Extra data"), (b'{"query": "\xff"}', "not JSON"),
    (b"\x00\x01", "not JSON"), (b"\x1f\x8b\x08", "not JSON"),
    ('{"query": ' + "9" * 5000 + "}", "not JSON"),
]  # fmt: skip
FIELDS = [  # of a line: what is changed of PAIR or TRIPLE, and what is said
    (PAIR, {"query": None}, "'query'"), (PAIR, {"query": ""}, "'query' is empty"),
    (PAIR, {"query": "  \n"}, "'query' is empty"), (PAIR, {"query": 5}, "'query' is 5"),
    (PAIR, {"query": True}, "'query' is True"), (PAIR, {"query": ["q"]}, "'query' is ['q']"),
    (PAIR, {"query": {"text": "q"}}, "'query' is"),
    (PAIR, {"query": "\ud800"}, "'query' & surrogate"), (PAIR, {"pos": None}, "'pos'"),
    (PAIR, {"pos": []}, "'pos' is empty"), (PAIR, {"pos": "a"}, "'pos' is 'a'"),
    (PAIR, {"pos": [""]}, "'pos' has an empty text"),
    (PAIR, {"pos": ["a", " "]}, "'pos' has an empty text"), (PAIR, {"pos": ["a", 1]}, "'pos' is"),
    (PAIR, {"pos": ["a", None]}, "'pos' is"), (PAIR, {"pos": [["a"]]}, "'pos' is"),
    (PAIR, {"pos": {"a": 1}}, "'pos' is"), (PAIR, {"pos": ["\udfff"]}, "'pos' & surrogate"),
    (PAIR, {"neg": "c"}, "'neg' is 'c'"), (PAIR, {"neg": [""]}, "'neg' has an empty text"),
    (PAIR, {"neg": [None]}, "'neg' is"), (PAIR, {"neg": 3}, "'neg' is 3"),
    (PAIR, {"neg": ["c", "\n"]}, "'neg' has an empty text"),
    (PAIR, {"neg": False}, "'neg' is False"),
    (PAIR, {"negs": ["c"]}, "'negs' & did you mean 'neg'"),
    (PAIR, {"Neg": ["c"]}, "'Neg' & did you mean 'neg'"),
    (PAIR, {"negatives": ["c"]}, "'negatives' & did you mean 'negative'"),
    (PAIR, {"positives": ["c"]}, "'positives' & did you mean 'positive'"),
    (PAIR, {"texts": ["c"]}, "'texts' & did you mean 'text'"),
    (PAIR, {"pos_score": [1]}, "'pos_score' & did you mean 'pos_scores'"),
    (PAIR, {"neg_score": [1]}, "'neg_score' & did you mean 'neg_scores'"),
    (PAIR, {"prompts": "x"}, "'prompts' & did you mean 'prompt'"),
    (PAIR, {"negative": "c"}, "'negative' & 'pos' & one form"),
    (PAIR, {"positive": "c"}, "'pos' & 'positive' & one form"),
    (PAIR, {"text": "c"}, "'query' & 'text' & one form"),
    (PAIR, {"anchor": "c"}, "'anchor' & 'query' & one form"),
    (TRIPLE, {"neg": ["c"]}, "'neg' & 'positive' & one form"),
    (TRIPLE, {"text": "c"}, "'positive' & 'text' & one form"),
    (TRIPLE, {"anchor": "c"}, "'anchor' & 'query' & one form"),
    (TRIPLE, {"positive": ""}, "'positive' is empty"),
    (TRIPLE, {"negative": ""}, "'negative' is empty"),
    (TRIPLE, {"positive": ["a"]}, "'positive' is ['a']"),
    (TRIPLE, {"negative": 1}, "'negative' is 1"), (TRIPLE, {"query": None}, "'query'"),
    (TRIPLE, {"negative": [""]}, "'negative' is"), ({"text": "a"}, {"text": ""}, "'text' is empty"),
    ({"text": "a"}, {"text": 1}, "'text' is 1"),
    ({"text": "a"}, {"pos": ["a"]}, "'pos' & 'text' & one form"),
    (PAIR, {"pos_scores": [float("nan"), 1]}, "'pos_scores' & finite"),
    (PAIR, {"pos_scores": [float("inf"), 1]}, "'pos_scores' & finite"),
    (PAIR, {"neg_scores": [-float("inf")]}, "'neg_scores' & finite"),
    (PAIR, {"neg_scores": [10**400]}, "'neg_scores' & finite"),
    (PAIR, {"neg_scores": [1e39]}, "'neg_scores' & finite"),
    (PAIR, {"pos_scores": [1]}, "'pos_scores' has 1 numbers for 2"),
    (PAIR, {"pos_scores": [1, 2, 3]}, "'pos_scores' has 3 numbers for 2"),
    (PAIR, {"neg_scores": [1, 2]}, "'neg_scores' has 2 numbers for 1"),
    (PAIR, {"pos_scores": ["1", "2"]}, "'pos_scores' is"),
    (PAIR, {"pos_scores": 1.0}, "'pos_scores' is"),
    (PAIR, {"pos_scores": [True, True]}, "'pos_scores' is"),
    (PAIR, {"pos_scores": [None, 1]}, "'pos_scores' is"), (PAIR, {"prompt": 5}, "'prompt' is 5"),
    (PAIR, {"prompt": ["x"]}, "'prompt' is ['x']"),
    (PAIR, {"prompt": "\ud800"}, "'prompt' & surrogate"),
]  # fmt: skip


def pair_of(tmp_path, line):
    path, good = tmp_path / "pairs.jsonl", json.dumps(PAIR).encode()
    path.write_bytes(good + b"\n\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    file = open_pairs(str(path))
    assert read_pair(file, 0)["pos"] == ["a", "b"]
    return read_pair(file, 1)


@pytest.mark.parametrize("line, message", LINES, ids=lambda x: str(x)[:30])
def test_pair_lines(line, message, tmp_path):
    refused(f"pairs.jsonl line 3: & {message}", pair_of, tmp_path, line)


@pytest.mark.parametrize("whole, change, message", FIELDS, ids=lambda x: str(x)[:30])
def test_pair_fields(whole, change, message, tmp_path):
    line = json.dumps(whole | change)
    refused(f"pairs.jsonl line 3: & {message}", pair_of, tmp_path, line)


def test_pairs_that_are_fine(tmp_path, capsys):
    for extra in ({"id": 3, "query_id": "x"}, {"neg": None}, {"pos_scores": None},
                  {"prompt": ""}, {"pos_scores": []}, {"negative": None}, {"module": "a"}):
        assert pair_of(tmp_path, json.dumps(PAIR | extra))["query"] == "q"
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("line 3: ")[1] for line in printed] == [
        "field 'id' is not read", "field 'query_id' is not read"]  # fmt: skip
    for content in (b"", b"\n \n"):
        (tmp_path / "pairs.jsonl").write_bytes(content)
        refused("pairs.jsonl & no line", open_pairs, str(tmp_path / "pairs.jsonl"))


# ---- spans, labels ----
SPAN = {"query": "q", "passage": "a passage", "spans": [[0, 1]]}
SPANS = [
    ({"query": ""}, "'query' is empty"), ({"passage": " "}, "'passage' is empty"),
    ({"spans": []}, "'spans' is empty"), ({"spans": [[0, 99]]}, "'spans' has [0, 99]"),
    ({"spans": [[1, 1]]}, "[1, 1]"), ({"spans": [[-1, 1]]}, "[-1, 1]"),
    ({"spans": [[1, 2]]}, "spaces"), ({"spans": [[0, 1.0]]}, "[0, 1.0]"),
    ({"spans": [[0, True]]}, "[0, True]"), ({"spans": [[0, 1, 2]]}, "[0, 1, 2]"),
    ({"spans": [0, 1]}, "'spans' is"), ({"spans": {}}, "'spans' is"),
    ({"spans": [[0, float("nan")]]}, "nan"), ({"answer": [0, 99]}, "'answer' has [0, 99]"),
    ({"answer": "a"}, "'answer' has a"), ({"passage": "\ud800 passage"}, "'passage' & surrogate"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", SPANS, ids=str)
def test_spans(change, message, tmp_path):
    path = tmp_path / "spans.jsonl"
    path.write_text(json.dumps(SPAN | change))
    refused(f"spans.jsonl line 1: & {message}", read_spans, open_pairs(str(path)), 0)


WORD, TEXT = '{"words": ["a", "b"], "labels": ["A", "B"]}\n', '{"text": "a", "label": 0}\n'
TEXTS = TEXT + '{"text": "b", "label": 1}\n'
LABELS = [  # file, kind of loss ("words": softmax), what is in it, message
    ("x.jsonl", "words", WORD + '{"words": ["a"], "labels": ["A", "B"]}',
     "line 2: & 1 words and 2"),
    ("x.jsonl", "words", WORD + '{"words": [], "labels": []}', "line 2: & 'labels' is empty"),
    ("x.jsonl", "words", WORD + '{"words": ["a"], "labels": [""]}',
     "line 2: & 'labels' has an empty"),
    ("x.jsonl", "words", WORD + '{"words": ["a"], "labels": "A"}', "line 2: & 'labels' is 'A'"),
    ("x.jsonl", "words", WORD + '{"words": "a", "labels": ["A"]}', "line 2: & 'words' is 'a'"),
    ("x.jsonl", "words", WORD + '{"words": ["a"]}', "line 2: & 'labels' is missing"),
    ("x.jsonl", "words", WORD + '{"labels": ["A"]}', "line 2: & 'words' is missing"),
    ("x.jsonl", "words", WORD + '{"words": [null], "labels": ["A"]}', "line 2: & 'words' is"),
    ("x.jsonl", "words", '{"words": ["a"], "labels": ["A"]}', "every label is 'A'"),
    ("x.jsonl", "words", "", "no example"), ("x.txt", "words", "\n\n", "no example"),
    ("x.txt", "words", "a A\nb B\nc C D\n", "line 3: 3 columns, the first has 2"),
    ("x.txt", "words", "a A\nb B\n\nc\n", "line 4: 1 columns, the first has 2"),
    ("x.txt", "words", "a\nb\n", "line 1: 1 columns, no label in -1"),
    ("x.txt", "words", "a\tA\nb\t\n", "line 2: 2 columns, no label in -1"),
    ("x.txt", "words", "a A\nb A\n", "every label is 'A'"),
    ("x.txt", "words", b"a A\n\xff B\n", "line 2: & utf-8"),
    ("x.txt", "words", b"a A\nb B\n\xe2\x82", "line 3: & utf-8"),
    ("x.json", "words", "[]", "expected .jsonl"),
    ("x.jsonl", "softmax", TEXT + '{"text": "", "label": 1}', "line 2: & 'text' is empty"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": ""}', "line 2: & 'label' is empty"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": 0.5}', "line 2: & 'label' is 0.5"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": NaN}', "line 2: & 'label' is nan"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": true}', "line 2: & 'label' is True"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": null}', "line 2: & 'label' is None"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b"}', "line 2: & 'label' is missing"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": 1, "label": 0}', "line 2: & comes twice"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "text_pair": "", "label": 1}',
     "line 2: & 'text_pair' is"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "text_pair": 2, "label": 1}',
     "line 2: & 'text_pair' is"), ("x.jsonl", "softmax", TEXT + TEXT, "every label is '0'"),
    ("x.jsonl", "bce", TEXT + '{"text": "b", "label": 2}', "line 2: & expected 0 to 1"),
    ("x.jsonl", "bce", TEXT + '{"text": "b", "label": -0.1}', "line 2: & expected 0 to 1"),
    ("x.jsonl", "bce", TEXT + '{"text": "b", "label": NaN}', "line 2: & 'label' & finite"),
    ("x.jsonl", "bce", TEXT + TEXT, "every label is 0.0"),
    ("x.jsonl", "bce", '{"query": "q", "pos": ["a"]}', "every label is 1.0"),
    ("x.jsonl", "bce", '{"query": "q", "pos": [""]}', "line 1: & 'pos' has an empty text"),
    ("x.jsonl", "mse", TEXT + '{"text": "b", "label": Infinity}', "line 2: & 'label' & finite"),
    ("x.jsonl", "mse", TEXT + '{"text": "b", "label": "1"}', "line 2: & 'label' is '1'"),
    ("x.jsonl", "mse", TEXT + TEXT, "every label is 0.0"),
    ("x.jsonl.gz", "mse", TEXTS, "no whole .gz"),
    ("x.jsonl.gz", "mse", gzip.compress(TEXTS.encode(), mtime=0)[:-9], "no whole .gz"),
    ("x.jsonl.gz", "mse", gzip.compress(TEXTS.encode(), mtime=0)[:12] + b"junk", "no whole .gz"),
    ("x.jsonl.gz", "mse", b"", "no example"),
]  # fmt: skip


@pytest.mark.parametrize("name, kind, content, message", LABELS, ids=lambda x: str(x)[:40])
def test_labels(name, kind, content, message, tmp_path):
    path, words = tmp_path / name, kind == "words"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    s = SimpleNamespace(task="words" if words else "texts", loss_kind="softmax" if words else kind,
                        label_field="labels", label_column=-1, labels=[])  # fmt: skip
    refused(f"{name} & {message}", read_examples, str(path), s)


@pytest.mark.parametrize("names, column, message", [
    (("A", "A", "B"), -1, "label_names & different"), (("A", ""), -1, "label_names & none empty"),
    (("A",), -1, "label 'B' is none of the 1 labels"), ((), 0, "no label in 0"),
    ((), 5, "no label in 5"), ((), -3, "no label in -3")])  # fmt: skip
def test_label_names(names, column, message, tmp_path):
    (tmp_path / "x.txt").write_text("a A\nb B\n")
    s = SimpleNamespace(task="words", loss_kind="softmax", label_column=column, labels=list(names),
                        label_field="")  # fmt: skip
    refused(message, read_examples, str(tmp_path / "x.txt"), s)


# ---- local tasks ----
STS = '{"sentence1": "a", "sentence2": "b", "score": %s}\n'
TWO = '{"sentence1": "a", "sentence2": "b", "label": %s}\n'
LABELLED = '{"text": "a", "label": "%s"}\n'
CORPUS = {"corpus.jsonl": '{"_id": "1", "text": "a"}\n{"_id": "2", "text": "b"}\n',
          "queries.jsonl": '{"_id": "q", "text": "c"}\n{"_id": "r", "text": "d"}\n',
          "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\t1\t1\n"}  # fmt: skip
QRELS = "query-id\tcorpus-id\tscore\n"
TASKS = [  # files, message
    ({"sts.jsonl": STS % 1}, "sts.jsonl & 'score' is 1 in every line"),
    ({"sts.jsonl": STS % 1 + STS % "1.0"}, "sts.jsonl & 'score' is 1 in every line"),
    ({"sts.jsonl": STS % 1 + STS % "NaN"}, "sts.jsonl line 2: & 'score' & finite"),
    ({"sts.jsonl": STS % 1 + STS % "1e999"}, "sts.jsonl line 2: & 'score' & finite"),
    ({"sts.jsonl": STS % 1 + STS % '"2"'}, "sts.jsonl line 2: & 'score' is '2'"),
    ({"sts.jsonl": STS % 1 + STS % "null"}, "sts.jsonl line 2: & 'score' is None"),
    ({"sts.jsonl": '{"sentence1": "a", "score": 1}'}, "sts.jsonl line 1: & 'sentence2' is missing"),
    ({"sts.jsonl": '{"sentence1": "", "sentence2": "b", "score": 1}'},
     "line 1: & 'sentence1' is empty"), ({"sts.jsonl": ""}, "sts.jsonl has no rows"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\n"}, "no rows"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\tnan\nc\td\t1\n"}, "sts.tsv line 2: & 'score'"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\tx\nc\td\t1\n"},
     "sts.tsv line 2: & 'score' is 'x'"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\n"},
     "sts.tsv line 2: 2 columns, the header has 3"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\t1\t2\n"}, "sts.tsv line 2: 4 columns"),
    ({"sts.tsv": b"sentence1\tsentence2\tscore\n\xff\tb\t1\n"}, "sts.tsv line 2: & utf-8"),
    ({"sts.tsv": "a\tb\tc\na\tb\t1\n"}, "sts.tsv line 2: & 'sentence1' is missing"),
    ({"pairs.jsonl": TWO % 1 + TWO % 1}, "pairs.jsonl & labels are 0 and 1"),
    ({"pairs.jsonl": TWO % 1 + TWO % 2}, "pairs.jsonl & labels are 0 and 1"),
    ({"pairs.jsonl": TWO % 1 + TWO % 0.5}, "pairs.jsonl line 2: & 'label' is 0.5"),
    ({"pairs.jsonl": TWO % 1 + TWO % "true"}, "pairs.jsonl line 2: & 'label' is True"),
    ({"clustering.jsonl": LABELLED % "x" * 2}, "clustering.jsonl & 'label' is 'x' in every line"),
    ({"clustering.jsonl": LABELLED % "x" + LABELLED % ""},
     "clustering.jsonl line 2: & 'label' is empty"),
    ({"train.jsonl": LABELLED % "x" * 2, "test.jsonl": LABELLED % "x"},
     "train.jsonl & in every line"),
    ({"train.jsonl": LABELLED % "x" + LABELLED % "y", "test.jsonl": LABELLED % "z"},
     "test.jsonl & label 'z' is not in train"),
    ({"train.jsonl": LABELLED % "x" + LABELLED % "y", "test.jsonl": ""}, "test.jsonl has no rows"),
    ({"train.jsonl": LABELLED % "x" + LABELLED % "y"}, "test.jsonl"),
    ({"reranking.jsonl": '{"query": "q", "positive": [], "negative": ["b"]}'},
     "line 1: & 'positive' is empty"),
    ({"reranking.jsonl": '{"query": "q", "positive": ["a"], "negative": []}'},
     "'negative' is empty"),
    ({"reranking.jsonl": '{"query": "q", "positive": ["a"], "negative": [""]}'},
     "'negative' has an empty"),
    ({"reranking.jsonl": '{"query": "", "positive": ["a"], "negative": ["b"]}'},
     "'query' is empty"),
    (CORPUS | {"corpus.jsonl": CORPUS["corpus.jsonl"] + '{"_id": "1", "text": "c"}'},
     "corpus.jsonl line 3: 1 stands in line 1, too"),
    (CORPUS | {"queries.jsonl": CORPUS["queries.jsonl"] + '{"_id": "r", "text": "c"}'},
     "queries.jsonl line 3: r stands in line 2, too"),
    (CORPUS | {"queries.jsonl": '{"_id": "q", "text": " "}'},
     "queries.jsonl line 1: & 'text' is empty"),
    (CORPUS | {"queries.jsonl": '{"_id": 1, "text": "a"}'}, "queries.jsonl line 1: & '_id' is 1"),
    (CORPUS | {"corpus.jsonl": '{"_id": "", "text": "a"}'},
     "corpus.jsonl line 1: & '_id' is empty"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t1\nq\t1\t0\n"},
     "test.tsv line 3: q 1 stands in line 2"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t9\t1\n"}, "test.tsv & no text for corpus-id '9'"),
    (CORPUS | {"qrels/test.tsv": QRELS + "x\t1\t1\n"}, "test.tsv & no text for query-id 'x'"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t-1\n"}, "test.tsv & score -1"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t0\n"}, "test.tsv & no query has a passage"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t1.5\n"}, "test.tsv line 2: & 'score' is '1.5'"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q 1 1\n"},
     "test.tsv line 2: 1 columns, the header has 3"),
    (CORPUS | {"qrels/test.tsv": QRELS}, "test.tsv has no rows"),
    ({k: v for k, v in CORPUS.items() if "qrels" not in k}, "test.tsv"),
]  # fmt: skip


def task_data(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / "task" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    [task] = eval_mteb.local_tasks(str(tmp_path / "task"))
    task.load_data()
    return task.dataset["default"]


@pytest.mark.parametrize("files, message", TASKS, ids=lambda x: str(x)[:40])
def test_local_tasks(files, message, tmp_path):
    refused(message, task_data, tmp_path, files)


def test_counts_of_a_task_are_printed(tmp_path, capsys):
    corpus = CORPUS["corpus.jsonl"] + '{"_id": "3", "text": ""}\n'
    qrels = QRELS + "q\t1\t2\nr\t2\t0\n"
    data = task_data(tmp_path, CORPUS | {"corpus.jsonl": corpus, "qrels/test.tsv": qrels})["test"]
    assert data["relevant_docs"] == {"q": {"1": 2}}
    printed = capsys.readouterr().out
    assert "1 of 2 queries have a passage" in printed and "1 of 3 passages are empty" in printed


# ---- files of a folder ----
@pytest.fixture(scope="module")
def made(folders, toy_tokens, tmp_path_factory):
    """Folders to be copied: a llama, its adapter, an embedder with a projection, token files."""
    root, llama = tmp_path_factory.mktemp("made"), folders["llama"]
    model = from_pretrained(llama)
    lora.inject(model, 4, 8, 0.0, "q_proj,v_proj")
    lora.save_adapter(model, str(root / "adapter"), llama)
    tokenizer = load_tokenizer(llama)
    projection = torch.nn.Linear(64, 8, bias=False)
    tokens = Embedder(from_pretrained(llama), tokenizer, "tokens", projection=projection)
    tokens.save(str(root / "tokens"), sentence_transformers=False)
    Embedder(from_pretrained(llama), tokenizer, "mean").save(str(root / "st"))
    (root / "st/nanoembed.json").unlink()
    shutil.copytree(toy_tokens, root / "data")
    shutil.copytree(llama, root / "llama")
    torch.save(load_file(f"{llama}/model.safetensors"), root / "pytorch_model.bin")
    return root


def load_adapter(folder, llama):
    lora.load_adapter(from_pretrained(llama), folder)


READERS = {  # a file: which reader meets it
    "llama/config.json": lambda f: from_pretrained(f),
    "llama/tokenizer.json": lambda f: load_tokenizer(f),
    "adapter/adapter_config.json": lambda f: peft.pinned_chain(f),
    "adapter/nanoembed_adapter.json": lambda f: peft.attention_of(f),
    "tokens/nanoembed.json": lambda f: read_settings(f),
    "st/modules.json": lambda f: read_settings(f),
    "st/1_Pooling/config.json": lambda f: read_settings(f),
    "st/config_sentence_transformers.json": lambda f: read_settings(f),
    "data/meta.json": lambda f: open_tokens(f, "train"),
    "llama/nanoembed_classifier.json": lambda f: read_classifier(f),
    "llama/llm2vec_config.json": lambda f: llm2vec.read_settings(f, f, "llama"),
}
BROKEN = {
    "truncated": lambda b: b[: len(b) // 2], "no UTF-8": lambda b: b"{\xff" + b[1:],
    "text": lambda b: b"once upon a time", "a number": lambda b: b"5", "empty": lambda b: b"",
    "deep": lambda b: b"[" * 100_000, "an object too many": lambda b: b + b"{}",
    "twice": lambda b: b'{"a": 1, "a": 2}', "a .gz": gzip.compress,
}  # fmt: skip


def copied(made, tmp_path, name):
    folder = tmp_path / name.split("/")[0]
    shutil.copytree(made / folder.name, folder)
    return str(folder), tmp_path / name


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", READERS)
def test_broken_json(name, how, made, tmp_path):
    folder, path = copied(made, tmp_path, name)
    path.write_bytes(BROKEN[how](path.read_bytes() if path.exists() else b'{"labels": ["a"]}'))
    said = str(folder) if path.name == "tokenizer.json" else str(path)
    refused(said, READERS[name], folder)


CONFIGS = [  # llama's config.json
    ({"vocab_size": None}, "vocab_size"), ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": "512"}, "'vocab_size' is '512'"),
    ({"vocab_size": 512.0}, "'vocab_size' is 512.0"), ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": True}, "'hidden_size' is True"),
    ({"hidden_size": 63}, "embed_tokens & (512, 63)"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"), ({"num_hidden_layers": 4}, "layers.3"),
    ({"num_hidden_layers": 2}, "layers.2"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": [4]}, "'num_attention_heads' is [4]"),
    ({"num_key_value_heads": 3}, "k_proj & (48, 64)"),
    ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
    ({"intermediate_size": 10**12}, "intermediate_size is 10"),
    ({"intermediate_size": 95}, "mlp.gate_proj"), ({"head_dim": 15}, "head_dim"),
    ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
    ({"max_position_embeddings": "2k"}, "'max_position_embeddings' is '2k'"),
    ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' is '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "finite"),
    ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes'"),
    ({"is_causal": 1}, "'is_causal' is 1"), ({"attention_bias": 0}, "'attention_bias' is 0"),
    ({"hidden_act": "relu"}, "'relu'"), ({"hidden_act": 5}, "'hidden_act' is 5"),
    ({"model_type": "bert"}, "'bert'"), ({"model_type": None}, "model_type"),
    ({"model_type": ["x"]}, "['x'] & expected one of"),
    ({"rope_parameters": {"rope_type": "magic", "rope_theta": 9.0, "factor": 2.0}}, "magic"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -5}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2}}, "factor"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"layer_types": ["full_attention"]}, "1 layer_kinds for 3"),
    ({"layer_types": 3}, "layer_types"), ({"layer_types": ["lstm"] * 3}, "layer_types"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", CONFIGS, ids=str)
def test_config(change, message, made, tmp_path):
    folder, path = copied(made, tmp_path, "llama/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(message, from_pretrained, folder)


OTHERS = [  # file, change (... takes the key away), message
    ("data/meta.json", {"dtype": "float16"}, "dtype 'float16'"),
    ("data/meta.json", {"dtype": ...}, "'dtype'"),
    ("data/meta.json", {"dtype": 16}, "'dtype' is 16"),
    ("data/meta.json", {"vocab_size": ...}, "'vocab_size'"),
    ("data/meta.json", {"vocab_size": "x"}, "'vocab_size' is 'x'"),
    ("data/meta.json", {"vocab_size": 10**6}, "vocab_size is 1000000"),
    ("data/meta.json", {"splits": []}, "'splits' is []"),
    ("data/meta.json", {"splits": {}}, "no split"),
    ("data/meta.json", {"splits": {"train": 5}}, "'train' is 5"),
    ("data/meta.json", {"splits": {"train": {}}}, "'docs' is missing"),
    ("data/meta.json", {"splits": {"train": {"docs": 350}}}, "'tokens' is missing"),
    ("data/meta.json", {"splits": {"train": {"docs": 3.5, "tokens": 9}}}, "'docs' is 3.5"),
    ("data/meta.json", {"splits": {"train": {"docs": -1, "tokens": 9}}}, "bytes"),
    ("data/meta.json", {"mask_id": 4}, "mask_id is 4"),
    ("data/meta.json", {"mask_id": None}, "mask_id is None"),
    ("data/meta.json", {"mask_id": 10**6}, "mask_id is 1000000"),
    ("data/meta.json", {"mask_id": ...}, "'mask_id'"),
    ("data/meta.json", {"special_ids": []}, "special_ids is []"),
    ("data/meta.json", {"special_ids": [0, 1, 99]}, "special_ids is [0, 1, 99]"),
    ("data/meta.json", {"special_ids": ...}, "'special_ids'"),
    ("data/meta.json", {"tokenizer_sha256": "0" * 64}, "tokenizer_sha256 is 000"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": None},
     "'base_model_name_or_path' is None"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": ""},
     "'base_model_name_or_path' is empty"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": ...},
     "'base_model_name_or_path' is missing"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": "out/gone"},
     "out/gone: no such folder"),
    ("adapter/adapter_config.json", {"base_model_name_or_path": "../gone"},
     "../gone: no such folder"),
    ("adapter/adapter_config.json", {"lora_alpha": ...}, "'lora_alpha' is missing"),
    ("adapter/adapter_config.json", {"lora_alpha": "16"}, "'lora_alpha' is '16'"),
    ("adapter/adapter_config.json", {"lora_alpha": float("nan")}, "'lora_alpha' & finite"),
    ("adapter/adapter_config.json", {"lora_dropout": "x"}, "'lora_dropout' is 'x'"),
    ("adapter/adapter_config.json", {"target_modules": 5}, "'target_modules' is 5"),
    ("adapter/adapter_config.json", {"target_modules": [5]}, "'target_modules' is [5]"),
    ("adapter/adapter_config.json", {"target_modules": ["q_proj", "v_proj", "o_proj"]},
     "missing tensors"),
    ("adapter/adapter_config.json", {"target_modules": "((.+)+)+X"},
     "((.+)+)+X & names of modules"),
    ("adapter/adapter_config.json", {"target_modules": "(a|a)*X"}, "(a|a)*X & names of modules"),
    ("adapter/adapter_config.json", {"target_modules": "(.{1,9}){9}X"}, "names of modules"),
    ("adapter/adapter_config.json", {"target_modules": r"(.*)\1\1X"}, "names of modules"),
    ("adapter/adapter_config.json", {"target_modules": ".*" * 12 + "X"}, "names of modules"),
    ("adapter/adapter_config.json", {"target_modules": "a?" * 30 + "a" * 30}, "names of modules"),
    ("adapter/adapter_config.json", {"target_modules": "(q_proj"}, "(q_proj & pattern"),
    ("adapter/adapter_config.json", {"exclude_modules": "((.+)+)+X"}, "names of modules"),
    ("adapter/adapter_config.json", {"alpha_pattern": {"((.+)+)+X": 3}}, "names of modules"),
    ("adapter/adapter_config.json", {"peft_type": "IA3"}, "peft_type = 'IA3'"),
    ("adapter/adapter_config.json", {"use_dora": True}, "use_dora = True"),
    ("tokens/nanoembed.json", {"pooling": "best"}, "'best'"),
    ("tokens/nanoembed.json", {"pooling": 5}, "'pooling' is 5"),
    ("tokens/nanoembed.json", {"pooling": ...}, "'pooling' is missing"),
    ("tokens/nanoembed.json", {"prompts": "query: "}, "'prompts' is 'query: '"),
    ("tokens/nanoembed.json", {"prompts": {"query": 5}}, "'query' is 5"),
    ("tokens/nanoembed.json", {"normalize": "yes"}, "'normalize' is 'yes'"),
    ("tokens/nanoembed.json", {"max_length": "512"}, "'max_length' is '512'"),
    ("tokens/nanoembed.json", {"max_length": -5}, "max_length"),
    ("tokens/nanoembed.json", {"template": "[INST]"}, "'template' is '[INST]'"),
    ("tokens/nanoembed.json", {"template": {"prefix": ""}}, "'suffix' is missing"),
    ("tokens/nanoembed.json", {"template": {"prefix": 5, "suffix": ""}}, "'prefix' is 5"),
    ("tokens/nanoembed.json", {"post_processor": ...}, "'post_processor'"),
    ("llama/nanoembed_classifier.json", {"a": 1}, "nanoembed_classifier.json & no key"),
]  # fmt: skip


def load_all(folder, name, llama):
    if name == "meta.json":
        open_tokens(folder, "train")
        tokenizer_of(folder)
    elif name == "adapter_config.json":
        list(map(resolve_folder, peft.pinned_chain(folder)))
        load_adapter(folder, llama)
    elif name == "nanoembed_classifier.json":
        read_classifier(folder, SimpleNamespace())
    else:
        Embedder.load(folder, device="cpu")


@pytest.mark.parametrize("name, change, message", OTHERS, ids=str)
def test_settings(name, change, message, made, tmp_path):
    folder, path = copied(made, tmp_path, name)
    found = (json.loads(path.read_text()) if path.exists() else {}) | change
    path.write_text(json.dumps({key: x for key, x in found.items() if x is not ...}))
    start = time.time()
    refused(message, load_all, folder, path.name, str(made / "llama"))
    assert time.time() - start < 5


# ---- weights ----
def filled(value):
    def change(state):
        name = sorted(state)[-1]
        state[name].view(-1)[3] = value

    return change


def typed(dtype):
    return lambda state: state.update({sorted(state)[-1]: state[sorted(state)[-1]].to(dtype)})


WEIGHTS = {"llama/model.safetensors": lambda f, _: from_pretrained(f),
           "llama/pytorch_model.bin": lambda f, _: from_pretrained(f),
           "adapter/adapter_model.safetensors": load_adapter,
           "tokens/1_Dense/model.safetensors": lambda f, _: read_settings(f)}  # fmt: skip
SPOILT = {
    "NaN": filled(float("nan")), "infinity": filled(math.inf), "-infinity": filled(-math.inf),
    "int8": typed(torch.int8), "int64": typed(torch.int64), "bool": typed(torch.bool),
    "complex": typed(torch.complex64), "missing": lambda state: state.pop(sorted(state)[-1]),
    "unexpected": lambda state: state.update({"foreign.weight": torch.ones(2)}),
    "shape": lambda state: state.update({sorted(state)[-1]: torch.ones(3, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, how, made, tmp_path):
    folder, path = copied(made, tmp_path, name)
    if path.suffix == ".bin":
        os.remove(f"{folder}/model.safetensors")
        state = torch.load(made / path.name)
    else:
        state = load_file(path)
    tensor = "foreign.weight" if how == "unexpected" else sorted(state)[-1]
    SPOILT[how](state)
    (torch.save if path.suffix == ".bin" else save_file)(state, path)
    if how == "shape" and "1_Dense" in name:  # its shape is what it projects to
        return
    tensor = tensor.removeprefix(peft.PREFIX) if how in ("missing", "shape") else tensor
    tensor = re.sub(r"^model\.layers\.|\.weight$", "", tensor).replace("self_attn", "attn")
    refused(f"{folder}", WEIGHTS[name], folder, str(made / "llama"))
    with pytest.raises(ValueError) as error:
        WEIGHTS[name](folder, str(made / "llama"))
    assert tensor in str(error.value).replace("self_attn", "attn"), error.value


@pytest.mark.parametrize("how", ["truncated", "text", "empty", "a .gz", "header", "pickle"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_broken_weights(name, how, made, tmp_path):
    folder, path = copied(made, tmp_path, name)
    if path.suffix == ".bin":
        os.remove(f"{folder}/model.safetensors")
        shutil.copy(made / path.name, path)
    good, more = path.read_bytes(), {"header": b"\xff" * 7 + b"\x7f", "pickle": pickle.dumps(print)}
    path.write_bytes(more.get(how) or BROKEN[how](good))
    refused(str(path), WEIGHTS[name], folder, str(made / "llama"))


# ---- files of tools ----
LOG = "step,loss\n"
TOOL_FILES = [  # who reads it, what is in it, message
    ("plot", "", "no column 'step'"), ("plot", "a,loss\n1,2\n", "no column 'step'"),
    ("plot", "step,other\n1,2\n", "no column 'loss'"), ("plot", LOG + "1,x\n", "'x'"),
    ("plot", LOG + "x,1\n", "'x'"), ("plot", b"\xff\xfe", "utf-8"),
    ("compare", '{"rows": 5}', "'rows' is 5"), ("compare", '{"a": 5}', "'rows' is missing"),
    ("compare", '{"rows": [5]}', "'rows' is [5]"), ("compare", "[]", "expected an object"),
    ("sample", "", "no text"), ("sample", " \n\n", "no text"), ("sample", b"a\n\xff", "line 2"),
    ("instructions", "[1]", "expected an object"), ("instructions", "{", "not JSON"),
    ("instructions", '{"a": 5}', "'a' is 5"), ("instructions", b'{"a": "\xff"}', "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize("tool, content, message", TOOL_FILES, ids=str)
def test_files_of_tools(tool, content, message, tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    read = {"plot": lambda: read_curve(str(tmp_path), "loss"),
            "sample": lambda: read_lines(str(path)), "compare": lambda: read_runs([path], {}),
            "instructions": lambda: instructions_of([], SimpleNamespace(task_instructions=path))}
    refused(f"{path} & {message}", read[tool])


# ---- the hub ----
NAMES = [
    "out/mlm", "out/x@main", "data/gone", "data/x", "models/llama", "configs/x", "runs/x", "./x/y",
    "/x/y", "~/x", "a/b/c", "x", "", "/", "a/", "/b", "../x", "a b/c", "a/b?", "a/b@", "-x/y",
    "C:\\x\\y", "https://huggingface.co/a/b", "a/b/", "owner/..", "./owner", "é/", "x" * 200,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_never_go_to_the_hub(name, monkeypatch):
    def download(*_, **__):
        pytest.fail("asked")

    monkeypatch.setattr("formats.huggingface.snapshot", download)
    for call in (resolve_folder, load_tokenizer, Embedder.load):
        refused("no such folder" if name != "/" else "", call, name)


def test_the_hub_is_asked_for_what_is_named(made, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repo, revision, patterns):
        asked.append((repo, revision))
        raise OSError("no network")

    monkeypatch.setattr("formats.huggingface.snapshot", download)
    refused("owner/name: no such & the hub: no network", resolve_folder, "owner/name")
    refused("o.w-n/n.1_x@v1", resolve_folder, "o.w-n/n.1_x@v1")
    assert asked == [("owner/name", None), ("o.w-n/n.1_x", "v1")]
    folder, path = copied(made, tmp_path, "adapter/adapter_config.json")
    changed = {"base_model_name_or_path": "owner/base", "revision": "r2"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    refused("owner/base@r2", Embedder.load, folder)
    assert f"{folder}: its base, owner/base@r2, is no folder here" in capsys.readouterr().out
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": folder}))
    refused("its base leads back to itself", Embedder.load, folder)
    # data without its tokenizer, named as a hub id could be
    monkeypatch.chdir(made)
    shutil.copytree("data", tmp_path / "mydata")
    shutil.rmtree(tmp_path / "mydata/tokenizer")
    monkeypatch.chdir(tmp_path)
    refused("mydata/tokenizer: no such folder", tokenizer_of, "mydata")
    os.mkdir("mydata/tokenizer")
    refused("mydata/tokenizer", tokenizer_of, "mydata")
    assert asked[2:] == [("owner/base", "r2")]


def test_a_hub_that_takes_the_request_and_is_silent(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        url = f"http://127.0.0.1:{hub.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        start = time.time()
        refused("owner/name: no such & the hub: timed out", resolve_folder, "owner/name")
        assert 3 < time.time() - start < 8


def test_patterns_of_names():
    name = "model.layers.3.self_attn.q_proj"
    for rule in (["q_proj"], ["self_attn.q_proj"], [name], r".*\.(q_proj|v_proj)",
                 r"^(?!.*vision).*q_proj$", r"model\.layers\.\d+\.self_attn\.[qkv]_proj",
                 r"(.*\.)?(q_proj)"):  # fmt: skip
        assert peft.matches(name, rule), rule
    for rule in ([], ["proj"], ["_proj"], [".*"], ["k_proj"], "q_proj", r".*\.mlp\..*"):
        assert not peft.matches(name, rule), rule


# ---- texts ----
@pytest.fixture(scope="module")
def embedder(folders):
    return Embedder.load(folders["llama"], device="cpu", dtype="fp32")


BAD_TEXTS = [
    (["a", None], "text 1 is None"), ([5], "text 0 is 5"), ([["a"]], "text 0 is ['a']"),
    ([b"a"], "text 0 is b'a'"), ([True], "text 0 is True"),
    ([("a", 5)], "text 0 is 5"), ([("a", "b"), "c"], "text 1 is 'c'"),
    (["a", 1.5], "text 1 is 1.5"), ([{"text": "a"}], "text 0 is"),
    (["a", "b\ud800"], "text 1 & surrogate"), (["\udfff"], "text 0 & surrogate"),
    ("a text", "a list of texts"), ([float("nan")], "text 0 is nan"),
    (np.array([1, 2]), "text 0 is"), ((["a"] * 9000) + [None], "text 9000 is None"),
]  # fmt: skip


@pytest.mark.parametrize("texts, message", BAD_TEXTS, ids=lambda x: str(x)[:30])
def test_texts_of_encode(texts, message, embedder):
    embedder.train()
    if len(texts) < 9000:
        refused(message, embedder.encode, texts)
    else:  # the first part is whole
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedder, "embed", lambda encoded: torch.zeros(len(encoded), 64))
            refused(message, embedder.encode, texts)
    assert embedder.training and torch.is_grad_enabled()
    embedder.eval()


@pytest.mark.parametrize("queries, passage, message", [
    ("abc", "a passage", "a list of queries"), (["a", None], "a passage", "query 1 is None"),
    ([1], "a passage", "query 0 is 1"), (["a"], None, "passage is None"),
    (["a"], ["b"], "passage is ['b']"), (["\ud800"], "a passage", "query 0 & surrogate"),
    (["a"], "\ud800", "passage & surrogate")])  # fmt: skip
def test_texts_of_score_tokens(queries, passage, message, embedder):
    refused(message, score_tokens, embedder, queries, passage)


def test_instruction_that_is_none(embedder):
    refused("no instruction is ''", embedder.encode, ["a"], None)
    refused("instruction 0 is 5", embedder.encode, ["a"], [5])
    refused("2 instructions for 1 texts", embedder.encode, ["a"], ["b", "c"])


def test_vectors_that_are_not_finite(folders):
    model = from_pretrained(folders["llama"])
    model.norm.weight.data.fill_(3e38)
    overflowing = Embedder(model, load_tokenizer(folders["llama"]), "last", normalize=False).train()
    refused("encode & NaN or infinity", overflowing.encode, ["a text"])
    refused("score_tokens & NaN or infinity", score_tokens, overflowing, ["a"], "some passage")
    assert overflowing.training


# ---- texts that are far too long ----
def wordpiece():
    words = {w: i for i, w in enumerate(["[UNK]", *WORDS, "##ta", "##n", "t", "a"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def bpe_without_words():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS), "aaaa ab"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_long_texts_have_the_ids_of_the_whole(toy_tokens):
    rng = np.random.default_rng(0)
    words = rng.choice(WORDS, 14_000).tolist()
    texts = [" ".join(words), "".join(words), "a" * 70_001, "ta" * 30_000, "tan\n" * 15_000,
             " " * 60_000 + "tan. " * 3000, "x" + " 012345" * 9000, "short"]

    def encoded(tokenizer, template):
        s = SimpleNamespace(prefix="", suffix="", separator=" ", max_length=16)
        both = [{"text": a, "pair": b} for a, b in zip(texts[:3], texts[::-1])]
        words = tokenize_words(tokenizer, [text.split() for text in texts], 16)
        return (tokenize(tokenizer, texts, "a ", template, 16, False),
                tokenize(tokenizer, join_texts(both, tokenizer, s), "", template, 16),
                [[*map(list, parts)] for parts in words])  # fmt: skip

    for tokenizer in (load_tokenizer(f"{toy_tokens}/tokenizer"), wordpiece(), bpe_without_words()):
        for template in (Template(), Template("query: ", " tan]"), Template("", "a")):
            found = encoded(tokenizer, template)
            with pytest.MonkeyPatch.context() as patch:
                for module in ("tokenizer", "labels"):
                    patch.setattr(f"{module}.without_middle", lambda backend, text, n: text)
                assert found == encoded(tokenizer, template)
            assert max(len(ids) for ids, _ in found[0]) == 16


def test_a_line_of_20_mb(tmp_path, embedder):
    line = json.dumps({"query": "tan mos " * 2_500_000, "pos": ["tamalo" * 1_000_000]})
    (tmp_path / "x.jsonl").write_text(line)
    start = time.time()
    pair = read_pair(open_pairs(str(tmp_path / "x.jsonl")), 0)
    encoded = tokenize(embedder.tokenizer, [pair["query"], *pair["pos"]], "", Template(), 512)
    assert [len(ids) for ids, _ in encoded] == [512, 512] and time.time() - start < 5
