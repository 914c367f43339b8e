"""Malformed lines, files, weights, configs, hub names and texts: each is refused in one line that
names what is wrong, or is taken as documented."""

import contextlib
import gzip
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import eval_mteb
import lora
from data import open_pairs, read_jsonl, read_pair, text_lines
from embedder import Embedder, score_tokens
from formats import peft, read_json
from formats.classifier import read_classifier
from formats.huggingface import config_from_hf, from_pretrained, resolve_folder
from formats.sentence_transformers import read_settings
from harness import model_folder
from labels import join_texts, read_examples
from recorder import WORDS
from spans import read_spans
from tokenizer import Template, load_tokenizer, tokenize, tokenize_words, whole_backend
from tokens import open_tokens, tokenizer_of

ERRORS = (ValueError, TypeError, OSError, SystemExit)


def refused(fragments, call, *args, **keys):
    """The message's first line has all fragments; they are apart by " & "."""
    with pytest.raises(ERRORS) as error:
        call(*args, **keys)
    assert not isinstance(error.value, UnicodeError) and "__" not in type(error.value).__name__
    line = str(error.value).splitlines()[0]
    assert all(part in line for part in fragments.split(" & ")), line


# ---- lines of pairs ----
PAIR = {"query": "q", "pos": ["a", "b"], "neg": ["c"]}
TRIPLE = {"query": "q", "positive": "a", "negative": "b"}
LINES = [
    ('{"query": "q", "pos": ["a"]', "not JSON"), ("[1, 2]", "a list, expected an object"),
    ('"text"', "a str, expected an object"), ("null", "a NoneType"), ("7", "an object"),
    ("NaN", "a float, expected an object"), ("{}", "'query' is missing"), ("{'query': 1}", "not JSON"),
    ('{"query": "q", "query": "r", "pos": ["a"]}', "key 'query' comes twice"),
    ('{"query": "q", "pos": ["a"], "neg": ["b"], "neg": []}', "key 'neg' comes twice"),
    ('{"query": "q", "pos": ["a"], "id": {"x": 1, "x": 2}}', "key 'x' comes twice"),
    ("[" * 100_000, "not JSON"), ('{"a":' * 100_000, "not JSON"), ('{"query": "q"} {}', "Extra data"),
    (b'{"query": "\xff"}', "not JSON"), (b"\x00\x01", "not JSON"), (b"\x1f\x8b\x08", "not JSON"),
    ('{"query": ' + "9" * 5000 + "}", "not JSON"),
]  # fmt: skip
FIELDS = [  # of a line: what is changed of PAIR or TRIPLE, and what is said
    (PAIR, {"query": None}, "'query'"), (PAIR, {"query": ""}, "'query' is empty"),
    (PAIR, {"query": "  \n"}, "'query' is empty"), (PAIR, {"query": 5}, "'query' is 5"),
    (PAIR, {"query": True}, "'query' is True"), (PAIR, {"query": ["q"]}, "'query' is ['q']"),
    (PAIR, {"query": {"text": "q"}}, "'query' is"), (PAIR, {"query": "\ud800"}, "'query' & surrogate"),
    (PAIR, {"pos": None}, "'pos'"), (PAIR, {"pos": []}, "'pos' is empty"),
    (PAIR, {"pos": "a"}, "'pos' is 'a'"), (PAIR, {"pos": [""]}, "'pos' has an empty text"),
    (PAIR, {"pos": ["a", " "]}, "'pos' has an empty text"), (PAIR, {"pos": ["a", 1]}, "'pos' is"),
    (PAIR, {"pos": ["a", None]}, "'pos' is"), (PAIR, {"pos": [["a"]]}, "'pos' is"),
    (PAIR, {"pos": {"a": 1}}, "'pos' is"), (PAIR, {"pos": ["\udfff"]}, "'pos' & surrogate"),
    (PAIR, {"neg": "c"}, "'neg' is 'c'"), (PAIR, {"neg": [""]}, "'neg' has an empty text"),
    (PAIR, {"neg": [None]}, "'neg' is"), (PAIR, {"neg": 3}, "'neg' is 3"),
    (PAIR, {"neg": ["c", "\n"]}, "'neg' has an empty text"), (PAIR, {"neg": False}, "'neg' is False"),
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
    (TRIPLE, {"positive": ""}, "'positive' is empty"), (TRIPLE, {"negative": ""}, "'negative' is empty"),
    (TRIPLE, {"positive": ["a"]}, "'positive' is ['a']"), (TRIPLE, {"negative": 1}, "'negative' is 1"),
    (TRIPLE, {"query": None}, "'query'"), (TRIPLE, {"negative": [""]}, "'negative' is"),
    ({"text": "a"}, {"text": ""}, "'text' is empty"), ({"text": "a"}, {"text": 1}, "'text' is 1"),
    ({"text": "a"}, {"pos": ["a"]}, "'pos' & 'text' & one form"),
    (PAIR, {"pos_scores": [float("nan"), 1]}, "'pos_scores' & finite"),
    (PAIR, {"pos_scores": [float("inf"), 1]}, "'pos_scores' & finite"),
    (PAIR, {"neg_scores": [-float("inf")]}, "'neg_scores' & finite"),
    (PAIR, {"neg_scores": [10**400]}, "'neg_scores' & finite"),
    (PAIR, {"neg_scores": [1e39]}, "'neg_scores' & finite"),
    (PAIR, {"pos_scores": [1]}, "'pos_scores' has 1 numbers for 2"),
    (PAIR, {"pos_scores": [1, 2, 3]}, "'pos_scores' has 3 numbers for 2"),
    (PAIR, {"neg_scores": [1, 2]}, "'neg_scores' has 2 numbers for 1"),
    (PAIR, {"pos_scores": ["1", "2"]}, "'pos_scores' is"), (PAIR, {"pos_scores": 1.0}, "'pos_scores' is"),
    (PAIR, {"pos_scores": [True, True]}, "'pos_scores' is"),
    (PAIR, {"pos_scores": [None, 1]}, "'pos_scores' is"),
    (PAIR, {"prompt": 5}, "'prompt' is 5"), (PAIR, {"prompt": ["x"]}, "'prompt' is ['x']"),
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
    for extra in ({"id": 3, "query_id": "x"}, {"neg": None}, {"pos_scores": None}, {"prompt": ""},
                  {"pos_scores": []}, {"negative": None}, {"module": "a", "name": "b"}):  # fmt: skip
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
    ({"spans": [[1, 1]]}, "[1, 1]"), ({"spans": [[-1, 1]]}, "[-1, 1]"), ({"spans": [[1, 2]]}, "spaces"),
    ({"spans": [[0, 1.0]]}, "[0, 1.0]"), ({"spans": [[0, True]]}, "[0, True]"),
    ({"spans": [[0, 1, 2]]}, "[0, 1, 2]"), ({"spans": [0, 1]}, "'spans' is"), ({"spans": {}}, "'spans' is"),
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
    ("x.jsonl", "words", WORD + '{"words": ["a"], "labels": ["A", "B"]}', "line 2: & 1 words and 2"),
    ("x.jsonl", "words", WORD + '{"words": [], "labels": []}', "line 2: & 'labels' is empty"),
    ("x.jsonl", "words", WORD + '{"words": ["a"], "labels": [""]}', "line 2: & 'labels' has an empty"),
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
    ("x.txt", "words", b"a A\nb B\n\xe2\x82", "line 3: & utf-8"), ("x.json", "words", "[]", "expected .jsonl"),
    ("x.jsonl", "softmax", TEXT + '{"text": "", "label": 1}', "line 2: & 'text' is empty"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": ""}', "line 2: & 'label' is empty"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": 0.5}', "line 2: & 'label' is 0.5"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": NaN}', "line 2: & 'label' is nan"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": true}', "line 2: & 'label' is True"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": null}', "line 2: & 'label' is None"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b"}', "line 2: & 'label' is missing"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "label": 1, "label": 0}', "line 2: & comes twice"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "text_pair": "", "label": 1}', "line 2: & 'text_pair' is"),
    ("x.jsonl", "softmax", TEXT + '{"text": "b", "text_pair": 2, "label": 1}', "line 2: & 'text_pair' is"),
    ("x.jsonl", "softmax", TEXT + TEXT, "every label is '0'"),
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
    ("x.jsonl.gz", "mse", gzip.compress(TEXTS.encode())[:-9], "no whole .gz"),
    ("x.jsonl.gz", "mse", gzip.compress(TEXTS.encode())[:12] + b"junk", "no whole .gz"),
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
    (("A",), -1, "label 'B' is none of the 1 labels"), ((), 0, "no label in 0"), ((), 5, "no label in 5"),
    ((), -3, "no label in -3")])  # fmt: skip
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
    ({"sts.jsonl": '{"sentence1": "", "sentence2": "b", "score": 1}'}, "line 1: & 'sentence1' is empty"),
    ({"sts.jsonl": ""}, "sts.jsonl has no rows"), ({"sts.tsv": "sentence1\tsentence2\tscore\n"}, "no rows"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\tnan\nc\td\t1\n"}, "sts.tsv line 2: & 'score'"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\tx\nc\td\t1\n"}, "sts.tsv line 2: & 'score' is 'x'"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\n"}, "sts.tsv line 2: 2 columns, the header has 3"),
    ({"sts.tsv": "sentence1\tsentence2\tscore\na\tb\t1\t2\n"}, "sts.tsv line 2: 4 columns"),
    ({"sts.tsv": b"sentence1\tsentence2\tscore\n\xff\tb\t1\n"}, "sts.tsv line 2: & utf-8"),
    ({"sts.tsv": "a\tb\tc\na\tb\t1\n"}, "sts.tsv line 2: & 'sentence1' is missing"),
    ({"pairs.jsonl": TWO % 1 + TWO % 1}, "pairs.jsonl & 'label' is 1 in every line"),
    ({"pairs.jsonl": TWO % 1 + TWO % 2}, "pairs.jsonl & labels are 0 and 1"),
    ({"pairs.jsonl": TWO % 1 + TWO % 0.5}, "pairs.jsonl line 2: & 'label' is 0.5"),
    ({"pairs.jsonl": TWO % 1 + TWO % "true"}, "pairs.jsonl line 2: & 'label' is True"),
    ({"clustering.jsonl": LABELLED % "x" * 2}, "clustering.jsonl & 'label' is 'x' in every line"),
    ({"clustering.jsonl": LABELLED % "x" + LABELLED % ""}, "clustering.jsonl line 2: & 'label' is empty"),
    ({"train.jsonl": LABELLED % "x" * 2, "test.jsonl": LABELLED % "x"}, "train.jsonl & in every line"),
    ({"train.jsonl": LABELLED % "x" + LABELLED % "y", "test.jsonl": LABELLED % "z"},
     "test.jsonl & label 'z' is not in train"),
    ({"train.jsonl": LABELLED % "x" + LABELLED % "y", "test.jsonl": ""}, "test.jsonl has no rows"),
    ({"train.jsonl": LABELLED % "x" + LABELLED % "y"}, "test.jsonl"),
    ({"reranking.jsonl": '{"query": "q", "positive": [], "negative": ["b"]}'}, "line 1: & 'positive' is empty"),
    ({"reranking.jsonl": '{"query": "q", "positive": ["a"], "negative": []}'}, "'negative' is empty"),
    ({"reranking.jsonl": '{"query": "q", "positive": ["a"], "negative": [""]}'}, "'negative' has an empty"),
    ({"reranking.jsonl": '{"query": "", "positive": ["a"], "negative": ["b"]}'}, "'query' is empty"),
    (CORPUS | {"corpus.jsonl": CORPUS["corpus.jsonl"] + '{"_id": "1", "text": "c"}'},
     "corpus.jsonl line 3: 1 stands in line 1, too"),
    (CORPUS | {"queries.jsonl": CORPUS["queries.jsonl"] + '{"_id": "r", "text": "c"}'},
     "queries.jsonl line 3: r stands in line 2, too"),
    (CORPUS | {"queries.jsonl": '{"_id": "q", "text": " "}'}, "queries.jsonl line 1: & 'text' is empty"),
    (CORPUS | {"queries.jsonl": '{"_id": 1, "text": "a"}'}, "queries.jsonl line 1: & '_id' is 1"),
    (CORPUS | {"corpus.jsonl": '{"_id": "", "text": "a"}'}, "corpus.jsonl line 1: & '_id' is empty"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t1\nq\t1\t0\n"}, "test.tsv line 3: q 1 stands in line 2"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t9\t1\n"}, "test.tsv & no text for corpus-id '9'"),
    (CORPUS | {"qrels/test.tsv": QRELS + "x\t1\t1\n"}, "test.tsv & no text for query-id 'x'"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t-1\n"}, "test.tsv & score -1"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t0\n"}, "test.tsv & no query has a passage"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q\t1\t1.5\n"}, "test.tsv line 2: & 'score' is '1.5'"),
    (CORPUS | {"qrels/test.tsv": QRELS + "q 1 1\n"}, "test.tsv line 2: 1 columns, the header has 3"),
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
