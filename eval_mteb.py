r"""
Evaluate embedders: MTEB tasks by name, or tasks from your own files. One table, a column a model.

    python eval_mteb.py --model=out/x --tasks=STSBenchmark,SciFact
    torchrun --standalone --nproc_per_node=8 eval_mteb.py --model=out/x \
        --benchmark="MTEB(eng, v2)"
    python eval_mteb.py --model=out/a,out/b,st:owner/name --local=my_tasks
    python eval_mteb.py --benchmark="MTEB(eng, v2)" \
        --model=McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised
    python eval_mteb.py --model=owner/base --attention=bidirectional \
        --adapters="('owner/mntp', 'owner/supervised')" --instructions=llm2vec \
        --benchmark="MTEB(eng, v1)" --query_template="{instruction} " \
        --prefix="[INST] " --suffix=" [/INST]"

With torchrun, --local needs `--` before eval_mteb.py: torchrun has options of similar names.
The mteb package scores (Muennighoff et al. 2022, arXiv 2210.07316; Enevoldsen et al. 2025, arXiv
2502.13595), whoever brings the data. --local is a task's folder, a folder of such folders, or a
file of training pairs. Where it says .jsonl a .tsv with a header will do, but for lists:

    files in the folder           fields                              score
    corpus.jsonl, queries.jsonl   _id, text, perhaps title            nDCG@10
      qrels/<split>.tsv (BEIR)    query-id, corpus-id, score
    <training pairs>.jsonl        query, pos [..], perhaps neg [..],  nDCG@10
      by itself                   prompt, which goes before the query
    reranking.jsonl               query, positive [..], negative [..] MAP
    sts.jsonl                     sentence1, sentence2, score         Spearman
    pairs.jsonl                   sentence1, sentence2, label 0 or 1  max AP
    train.jsonl, <split>.jsonl    text, label: logistic regression on accuracy
                                  8 texts a label, mean of 10 draws
    clustering.jsonl              text, label: mini-batch k-means     V-measure

The query's prompt stands before queries and before all texts of symmetric tasks, the document's
before the passages of retrieval and reranking. out_dir/results.md and .json get the table,
out_dir/scores/ all of mteb's numbers as they come, and of each query nDCG@10 and the best 100
passages, which `python -m evals.compare` reads; what is there from an earlier run by name is used
where weights, template, prompts, data revision and mteb are the very same.
"""

import usage  # noqa: F401  --help ends here, without torch

import copy
import hashlib
import json
import re
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import mteb
import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from mteb import abstasks
from mteb.models import ModelMeta, SearchEncoderWrapper
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.results import TaskResult
from mteb.types import PromptType

import common
from bm25 import BM25, K1, B, stems_of, words_of
from data import open_pairs, read_jsonl, read_line, read_pair, require, text_lines
from embedder import Embedder
from formats import parse_json, write_json
from formats.huggingface import resolve_folder
from formats.llm2vec import TASKS
from tokenizer import Template, load_tokenizer, tokenize_passage

# ---- defaults ----
out_dir = "out/eval"  # like .+
# models: folders or hub ids, separated by commas; st:name is any dense sentence-transformers model
model = ""
# columns beside them. bm25 does retrieval and reranking only; bm25:stem:k1=0.9:b=0.4:cut=128 splits
# identifiers, takes stems, has another k1 and b (1.2, 0.75), cuts texts at 128 of a model's tokens
baselines = "bm25,random"
adapters: tuple[str, ...] = ()  # PEFT folders or hub ids merged into the model, in order
attention: str | None = None  # one of causal, bidirectional; None: the model's own
pooling: str | None = None  # one of mean, weighted_mean, last, cls, splade, tokens; None: its own
max_length: int | None = None  # >= 1; tokens of a text, template included; None: the model's own
pool_instruction: bool | None = None  # are its tokens pooled, too? None: the model's own
merge = True  # False: the last adapter is computed beside the weights, as in LLM2Vec
similarity: str | None = None  # one of cosine, dot; None: cosine if the model normalizes, else dot
# tasks: one of these three
tasks = ""  # names of mteb, separated by commas
benchmark = ""  # a name of mteb, such as "MTEB(eng, v2)"
local = ""  # a task's folder, a folder of such, or a .jsonl file of training pairs
languages = ""  # with tasks: only subsets in these, such as "eng,deu"; "": all
corpus: tuple[str, ...] = ()  # with a local file of pairs: others whose passages are ranked, too
split = "test"  # with local: which qrels/<split>.tsv, which <split>.jsonl of a classification
# prompts: "model" for those saved with it, "mteb" for the instructions that mteb's tasks have,
# "llm2vec" for LLM2Vec's, or a JSON file {task: instruction}, or {task: {"query": instruction,
# "document": instruction}}
instructions = "model"
prefix: str | None = None  # the template around every text, such as a chat wrap; \n: new line
suffix: str | None = None  # None: the model's own
# around an instruction that is not the model's own, whose separator follows it; \n: new line
query_template = "{instruction}"
# device
device_batch_tokens: int | None = None  # >= 1; of one forward; None: CPU 2,048, GPU 16,384
dtype = "auto"  # one of auto, bf16, fp32; auto: what the device is good at


# ---- tasks ----


def named_tasks(names, benchmark="", languages=""):
    """mteb's tasks of comma-separated names, or of a benchmark. SystemExit for unknown ones."""
    try:
        if benchmark:
            return list(mteb.get_benchmark(benchmark).tasks)
        names = [name.strip() for name in names.split(",")]
        only = languages.split(",") if languages else None  # exclusive: not the en-de of STS17
        found = mteb.get_tasks(tasks=names, languages=only, exclusive_language_filter=bool(only))
    except KeyError as e:
        raise SystemExit(f"{e.args[0]} (mteb {mteb.__version__})") from e
    if missing := set(names) - {task.metadata.name for task in found}:
        raise SystemExit(f"{', '.join(sorted(missing))}: nothing in these languages: {languages}")
    return list(found)


def parts(task):
    """The tasks whose mean a task is (CQADupstack has 12), or the task itself."""
    return task.metadata.tasks if task.is_aggregate else [task]


KINDS = {  # the file that makes a folder a task: its type, mteb's class, main score, fields
    "corpus": ("Retrieval", abstasks.AbsTaskRetrieval, "ndcg_at_10", {"_id": str, "text": str}),
    "reranking": ("Reranking", abstasks.AbsTaskRetrieval, "map_at_1000",
                  {"query": str, "positive": [str], "negative": [str]}),
    "sts": ("STS", abstasks.AbsTaskSTS, "cosine_spearman",
            {"sentence1": str, "sentence2": str, "score": float}),
    "pairs": ("PairClassification", abstasks.AbsTaskPairClassification, "max_ap",
              {"sentence1": str, "sentence2": str, "label": int}),
    "train": ("Classification", abstasks.AbsTaskClassification, "accuracy",
              {"text": str, "label": str}),
    "clustering": ("Clustering", abstasks.AbsTaskClustering, "v_measure",
                   {"text": str, "label": str}),
}  # fmt: skip


def local_tasks(path, split="test", corpus=()):
    """The tasks of a folder and its subfolders, or of a .jsonl file of training pairs, to which
    `corpus` adds the passages of other files. Prints which subfolders are none."""
    path, tasks, wanted = Path(path).absolute(), [], f"{', '.join(KINDS)}.jsonl or .tsv"
    if path.is_file():
        return [local_task("corpus", path, split, corpus)]
    if corpus:
        raise SystemExit(f"{path}: corpus goes with a file of pairs, this is none")
    for folder in (path, *sorted(path.glob("*/"))):
        kinds = [kind for kind in KINDS if file_of(folder, kind).exists()]
        if len(kinds) > 1:
            raise SystemExit(f"{folder}: expected a folder with one file of {wanted}, not {kinds}")
        if kinds:
            tasks.append(local_task(kinds[0], folder, split))
        elif folder.name != "qrels" and folder != path:
            common.print0(f"skipped {folder}: no task's folder, it has no {wanted}")
    if not tasks:
        gone = "" if path.exists() else "no such file or folder; expected a file of pairs, "
        raise SystemExit(f"{path}: {gone}a task's folder, or folders, with one file of {wanted}")
    return tasks


def local_task(kind, path, split, corpus=()):
    """A task of mteb's class that reads files when mteb asks for its data."""
    type_name, base, main_score, fields = KINDS[kind]
    search = base is abstasks.AbsTaskRetrieval
    read = partial(read_search, more=corpus) if search else read_columns

    class LocalTask(base):
        metadata = mteb.TaskMetadata(
            name="+".join(Path(p).stem for p in (path, *corpus)), description=str(path),
            type=type_name, category="t2t", main_score=main_score, eval_splits=[split],
            dataset={"path": str(path), "revision": "local"}, eval_langs=["eng-Latn"],
        )  # fmt: skip
        label_column_name, input_column_name = "label", "text"
        max_fraction_of_documents_to_embed = None  # of clustering, which else takes 4 %

        def load_data(self, **_):
            self.dataset, self.data_loaded = {"default": read(kind, path, split, fields)}, True

    return LocalTask()


def file_of(folder, stem):
    """folder/stem.tsv if it is there, else folder/stem.jsonl."""
    return next(folder.glob(f"{stem}.tsv"), folder / f"{stem}.jsonl")


def read_rows(path, fields):
    """The rows of a .jsonl, or of a .tsv with a header, each with these fields {name: kind}, not
    empty but for the text of a corpus. ValueError names file, line and field, and an id, or a pair
    of them, that comes twice."""
    tsv = path.suffix == ".tsv"
    rows = list((read_tsv if tsv else read_jsonl)(str(path)))[tsv:]  # without the header
    if not rows:
        raise ValueError(f"{path} has no rows")
    seen = {}  # ids: their line
    for line, row in rows:
        for name, kind in fields.items():
            if tsv or (name == "label" and type(row.get(name)) is int):
                with suppress(ValueError, TypeError, KeyError):  # require will say it
                    row[name] = kind(row[name])
            filled = path.stem != "corpus" or name != "text"
            require(row, name, kind, str(path), line, filled)
        ids = tuple(row[name] for name in fields if name.endswith("id"))
        if ids and seen.setdefault(ids, line) != line:
            raise ValueError(f"{path} line {line}: {' '.join(ids)} stands in line {seen[ids]}, too")
    return [row for _, row in rows]


def read_tsv(path):
    """Yield (line number, {column: text}) of a .tsv, the header among them."""
    header = None
    for line, text in text_lines(path):
        cells = text.split("\t")
        header = header or cells
        if len(cells) != len(header):
            problem = f"{len(cells)} columns, the header has {len(header)}"
            raise ValueError(f"{path} line {line}: {problem}")
        yield line, dict(zip(header, cells))


def read_columns(kind, path, split, fields):
    """The columns of each split; labels as numbers."""
    files = {"train": "train", split: split} if kind == "train" else {split: kind}
    rows = {key: read_rows(file_of(path, stem), fields) for key, stem in files.items()}
    gold = list(fields)[-1]  # label or score
    labels = sorted({row[gold] for row in next(iter(rows.values()))})
    if kind == "pairs" and labels != [0, 1]:
        raise ValueError(f"{file_of(path, kind)}: labels are 0 and 1, and both must occur")
    if len(labels) < 2:
        raise ValueError(f"{file_of(path, kind)}: field '{gold}' is {labels[0]!r} in every line")
    if gold == "label":
        if extra := {row["label"] for row in rows[split]}.difference(labels):
            raise ValueError(f"{file_of(path, split)}: label {min(extra)!r} is not in train")
        for row in sum(rows.values(), []):
            row["label"] = labels.index(row["label"])
    return {
        key: Dataset.from_dict({field: [row[field] for row in part] for field in fields})
        for key, part in rows.items()
    }


def read_search(kind, path, split, fields, more=()):
    """Corpus, queries, which passages are relevant to which query, and the candidates if given.
    more: files of pairs whose passages are in the corpus, too."""
    candidates = None  # {query id: [passage id, ..]}
    modules = {}  # {query: module}, where the file says it
    if kind == "reranking":
        rows = read_rows(file_of(path, kind), fields)
        corpus, queries, relevant = number_texts([row[field] for field in fields] for row in rows)
        candidates = {query: list(grades) for query, grades in relevant.items()}
    elif path.is_dir():
        corpus, queries, relevant = read_beir(path, split, fields)
    else:
        file = open_pairs(str(path))
        pairs = [read_pair(file, i) for i in range(len(file))]
        asked = [(p["prompt"] or "") + p["query"] for p in pairs]
        modules = {query: read_line(file, i)[0].get("module", "") for i, query in enumerate(asked)}
        lines = [(query, p["pos"], p["neg"]) for query, p in zip(asked, pairs)]
        corpus, queries, relevant = number_texts(lines)
        texts = dict.fromkeys(corpus.values())  # in order, equal ones are one
        for pair in (read_pair(f, i) for f in map(open_pairs, more) for i in range(len(f))):
            texts |= dict.fromkeys(pair["pos"] + pair["neg"])
        corpus |= {f"b{i}": text for i, text in enumerate(texts) if i >= len(corpus)}
    data = {"relevant_docs": relevant, "top_ranked": candidates}
    for name, texts in (("corpus", corpus), ("queries", queries)):
        data[name] = Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
    if any(modules.values()):
        of_queries = [modules[text] for text in queries.values()]
        data["queries"] = data["queries"].add_column("module", of_queries)
    return {split: data}


def read_beir(path, split, fields):
    """-> (corpus {id: text}, queries {id: text}, {query id: {passage id: grade}}) of a folder as
    BEIR has it."""
    corpus, queries = (
        {row["_id"]: " ".join(filter(None, [row.get("title"), row["text"]])) for row in rows}
        for rows in (read_rows(file_of(path, stem), fields) for stem in ("corpus", "queries"))
    )
    qrels, relevant = path / "qrels" / f"{split}.tsv", {}
    for row in read_rows(qrels, {"query-id": str, "corpus-id": str, "score": int}):
        for field, texts in (("query-id", queries), ("corpus-id", corpus)):
            if row[field] not in texts:
                raise ValueError(f"{qrels}: there is no text for {field} {row[field]!r}")
        if row["score"] < 0:
            raise ValueError(f"{qrels}: score {row['score']} of {row['query-id']!r}, expected 0..")
        relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    relevant = {query: grades for query, grades in relevant.items() if any(grades.values())}
    if not relevant:
        raise ValueError(f"{qrels}: no query has a passage with a score above 0")
    empty = sum(not text.strip() for text in corpus.values())
    common.print0(
        f"{path}: {len(relevant):,} of {len(queries):,} queries have a passage with a score above "
        f"0, the others are left out; {empty:,} of {len(corpus):,} passages are empty"
    )
    return corpus, queries, relevant


def number_texts(lines):
    """The same of (query, right passages, wrong passages) lines; equal texts are one."""
    queries, corpus, relevant = {}, {}, {}  # queries, corpus: {text: id}
    for query, right, wrong in lines:
        grades = relevant.setdefault(queries.setdefault(query, f"q{len(queries)}"), {})
        # of equal scores the larger id is ranked first: a positive gains nothing by a tie
        for text in right:
            grades[corpus.setdefault(text, f"a{len(corpus)}")] = 1
        for text in wrong:
            grades.setdefault(corpus.setdefault(text, f"b{len(corpus)}"), 0)
    return *({i: text for text, i in ids.items()} for ids in (corpus, queries)), relevant


# ---- prompts ----


def task_prompts(tasks, instructions, template, saved):
    """-> {task: {"query": prompt, "document": prompt}}. saved: the model's prompts, under "query"
    and "document", or the name or type of a task; hotpot_qa is HotpotQA. Prints which tasks go
    without an instruction though the model has some. SystemExit where a file lacks a task."""

    def plain(name):
        return re.sub(r"[\W_]", "", name).lower()

    file, prompts, missing, by_name = {}, {}, [], {plain(name): x for name, x in saved.items()}
    if instructions not in ("model", "mteb"):
        path = TASKS if instructions == "llm2vec" else Path(instructions)
        file = parse_json(path.read_bytes(), path)
    for whole, part in [(t, part) for t in tasks for part in parts(t)]:
        name, kind = part.metadata.name, part.metadata.type
        if instructions == "model":
            names = (plain(x) for x in (name, whole.metadata.name, kind, "query"))
            given = next((by_name[x] for x in names if x in by_name), "")
        elif instructions == "mteb":
            given = part.metadata.prompt or part.abstask_prompt
        elif (given := file.get(name, file.get(whole.metadata.name))) is None:
            missing.append(name)
        given = given if isinstance(given, dict) else {"query": given}
        prompts[name] = {"query": "", "document": saved.get("document", "")} | given
        if instructions != "model" and (text := prompts[name]["query"]):
            prompts[name]["query"] = template.replace("\\n", "\n").replace("{instruction}", text)
    bare = [name for name, given in prompts.items() if not given["query"]]
    known = [name for name, text in saved.items() if text and name != "document"]
    if instructions == "model" and known and bare:
        some = ", ".join(known[:3]) + ", .." * (len(known) > 3)
        common.print0(f"the model was trained with instructions ({some}) and has none for "
                      f"{', '.join(bare)}: see --instructions")  # fmt: skip
    if missing:
        raise SystemExit(f'{instructions} has no line for {", ".join(missing)}; "" is for none')
    return prompts


# ---- models ----


class Encoder(AbsEncoder):
    """A model as mteb calls it. embed(texts, prompt) -> array [N, D], or N arrays [tokens, D] where
    scores is "MaxSim". hashed: stands for everything that makes its embeddings."""

    def __init__(self, name, embed, scores, saved, dim, hashed):
        self.name, self.embed, self.saved, self.hashed = name, embed, saved, hashed
        self.search_only = scores == "MaxSim"
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "similarity_fn_name": ScoringFunction(scores)}
        )
        self.chunk = max(1000, min(50_000, 2**29 // dim))  # documents scored at once: 2 GB of fp32

    def encode(self, inputs, *, task_metadata, prompt_type=None, **_):
        side = "document" if prompt_type == PromptType.document else "query"
        texts = [text for batch in inputs for text in batch["text"]]
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # equal texts: once
        vectors = self.embed(list(place), self.prompts[task_metadata.name][side])
        rows = [place[text] for text in texts]
        return [torch.as_tensor(vectors[i]) for i in rows] if self.search_only else vectors[rows]


class BM25Search:
    """bm25.BM25 as mteb calls a model that does retrieval and reranking only. Titles stand before
    the texts; there are no prompts. name: bm25, and what is changed of it, in the order of
    bm25:stem:k1=0.9:b=0.4:cut=128; cut: texts end where `tokenizer` has given so many ids."""

    search_only, saved = True, {}
    mteb_model_meta = ModelMeta.create_empty({"name": "bm25"})

    def __init__(self, name="bm25", tokenizer=None):
        form = r"bm25(:stem)?(?::k1=([\d.]+))?(?::b=([\d.]+))?(?::cut=(\d+))?"
        if not (found := re.fullmatch(form, name)):
            raise SystemExit(f"{name}: expected bm25 or such as bm25:stem:k1=0.9:b=0.4:cut=128")
        stem, k1, b, cut = found.groups()
        self.settings = float(k1 or K1), float(b or B), stems_of if stem else words_of
        self.cut, self.tokenizer = int(cut or 0), tokenizer
        self.name, self.hashed = name, (name, tokenizer and tokenizer.backend_tokenizer.to_str())

    def begin(self, text):
        """What an embedder reads of a text that is cut at so many tokens, the tokenizer's own
        ones included."""
        if not self.cut:
            return text
        ids, _, spans = tokenize_passage(self.tokenizer, text, "", Template())
        return text[: spans[self.cut - len(ids) - 1, 1]] if len(ids) > self.cut else text

    def index(self, corpus, **_):
        self.ids, texts = list(corpus["id"]), corpus["text"]
        if "title" in corpus.column_names:
            texts = (f"{title or ''} {text}" for title, text in zip(corpus["title"], texts))
        self.bm25 = BM25(map(self.begin, texts), *self.settings)

    def search(self, queries, *, top_k, top_ranked=None, **_):
        results, row_of = {}, {name: row for row, name in enumerate(self.ids)}
        for query, text in zip(queries["id"], queries["text"]):
            scores = self.bm25.scores(self.begin(text))  # [N]
            if top_ranked is None:
                rows = np.argsort(-scores, kind="stable")[: min(top_k, (scores > 0).sum())]
            else:
                rows = [row_of[name] for name in top_ranked[query]]
            results[query] = {self.ids[row]: float(scores[row]) for row in rows}
        return results


def random_vectors(texts, prompt):
    """[N, 64] vectors that say which text it is and nothing about it: the floor of every score."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    return np.stack([np.random.default_rng(s).standard_normal(64, np.float32) for s in seeds])


def fingerprint(module, *settings):
    """A hash of a module's tensors and of what else makes its embeddings."""
    sha = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_encoder(name, s, device):
    """A column of the table: bm25, random, st:name, or an Embedder. s: the script's settings."""
    bar = sys.stderr.isatty()
    if name.startswith("bm25"):
        first = s.model.split(",")[0].strip().removeprefix("st:")
        if "cut=" in name and not first:
            raise SystemExit(f"{name}: cut counts the tokens of the first --model, there is none")
        return BM25Search(name, load_tokenizer(resolve_folder(first)) if "cut=" in name else None)
    if name == "random":
        return Encoder(name, random_vectors, "cosine", {}, 64, name)
    if name.startswith("st:"):
        from sentence_transformers import SentenceTransformer

        e = SentenceTransformer(name.removeprefix("st:"), device=str(device))
        if s.max_length:
            e.max_seq_length = s.max_length
        scores, dim = s.similarity or e.similarity_fn_name, e.get_embedding_dimension()
        settings, saved = (e, e.max_seq_length, sorted(e.tokenizer.get_vocab().items())), e.prompts

        def embed(texts, prompt):
            return e.encode(texts, prompt=prompt, show_progress_bar=bar)

    else:
        template = None
        if s.prefix is not None or s.suffix is not None:
            template = Template(*((x or "").replace("\\n", "\n") for x in (s.prefix, s.suffix)))
        adapters = s.adapters if name == s.model else ()
        e = Embedder.load(
            name, adapters, device, s.dtype, s.attention, pooling=s.pooling, template=template,
            max_length=s.max_length, pool_instruction=s.pool_instruction, merge=s.merge,
        )  # fmt: skip
        name, dim, saved = "+".join([name, *adapters]), e.dim, e.instructions | e.prompts
        scores = s.similarity or ("cosine" if e.normalize else "dot")
        scores = "MaxSim" if e.pooling == "tokens" else scores
        settings = (e.model.config, e.pooling, e.template, e.normalize, e.max_length, e.dtype,
                    e.pool_instruction, e.pool_bos, e.doc_max_length,
                    e.tokenizer.backend_tokenizer.to_str())  # fmt: skip

        def embed(texts, prompt):
            return e.encode(texts, prompt, s.device_batch_tokens, progress=bar)

    return Encoder(name, embed, scores, saved, dim, fingerprint(e, settings, scores))


# ---- evaluation ----


def keep_queries(task, kept):
    """Has a search task put each query into `kept` when mteb scores it: its id, text and module,
    nDCG@10, the ids of the best 100 passages, and {id: grade} of the relevant ones."""
    scores_of_task = task.task_specific_scores  # the place where mteb hands out single queries

    def keep(scores, relevant, found, hf_split, hf_subset):
        for query in task.dataset[hf_subset][hf_split]["queries"]:
            i = query["id"]
            if i in scores:
                order = sorted(found[i], key=lambda d: (found[i][d], d), reverse=True)  # trec_eval
                facts = {key: query[key] for key in ("id", "text", "module") if key in query}
                kept.append(facts | {"ndcg_at_10": scores[i]["ndcg_cut_10"], "top": order[:100],
                                     "relevant": relevant[i]})  # fmt: skip
        return scores_of_task(scores, relevant, found, hf_split, hf_subset)

    task.task_specific_scores = keep


def evaluate(encoder, tasks, folder, reuse=False):
    """-> a dict for each task: model, task, type, metric, score, how, prompts, and of a search the
    file with its queries. All ranks call it.

    mteb's own file of all scores goes to `folder`; with `reuse` it is read if it is there already.
    Its name, not mteb's cache, which goes by the model's name, says what it belongs to.
    """
    rows, rank = [], common.get_rank()
    for task in tasks:
        meta, members, start = task.metadata, parts(task), time.time()
        search = all(isinstance(part, abstasks.AbsTaskRetrieval) for part in members)
        if encoder.search_only and not search:
            continue
        prompts = {t.metadata.name: encoder.prompts[t.metadata.name] for t in members}
        data = [(t.metadata.name, t.metadata.dataset, t.eval_splits, t.hf_subsets) for t in members]
        key = hashlib.sha256(repr((encoder.hashed, prompts, data, mteb.__version__)).encode())
        path = Path(folder) / f"{meta.name}-{key.hexdigest()[:16]}.json"
        by_query, kept = path.with_name(f"queries-{path.name}"), []
        if common.all_reduce_sum([rank == 0 and reuse and path.exists()])[0]:
            result, how = TaskResult.from_disk(path) if rank == 0 else None, f"from {path}"
        else:
            try:
                for part in members:
                    part.load_data()
            except Exception as e:  # hub, cache and builders raise what they like
                raise SystemExit(
                    f"{meta.name}: cannot load {meta.dataset['path']}: {type(e).__name__}: {e}\n"
                    "Tasks by name come from the Hugging Face hub, --local reads files.\n"
                    "What is done by name is kept for the next run."
                ) from e
            for part in members if search else []:
                keep_queries(part, kept)
            model = encoder
            if isinstance(encoder, Encoder):
                model = SearchEncoderWrapper(encoder, corpus_chunk_size=encoder.chunk)
            result = mteb.evaluate(
                model, task, cache=None, co2_tracker=False, show_progress_bar=False,
                encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
            ).task_results[0]  # fmt: skip
            for part in members:
                part.unload_data()
            how = common.format_time(time.time() - start)
            if rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                result.to_disk(path)
                if search:
                    by_query.write_text(json.dumps(kept, ensure_ascii=False), "utf-8")
        if rank == 0:
            score = float(result.get_score())
            rows.append({"model": encoder.name, "task": meta.name, "type": meta.type,
                         "metric": meta.main_score, "score": score, "how": how,
                         "prompts": prompts})  # fmt: skip
            if search and by_query.exists():
                rows[-1]["queries"] = by_query.name
            print(f"{encoder.name} {meta.name} {100 * score:.2f} ({how})", flush=True)
    return rows


def table(rows, narrow=False):
    """Markdown, scores x 100: a line a task, a column a model. The means, which stand where a model
    has every task, are those of MTEB: over tasks, and over the means of the types. narrow: for a
    screen, models by a letter and without the types."""
    models, types = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "type"))
    lines = {}  # {(task, type, metric): scores [models], NaN where a model has none}
    for row in sorted(rows, key=lambda row: types.index(row["type"])):
        key = row["task"], row["type"], row["metric"]
        scores = lines.setdefault(key, np.full(len(models), np.nan))
        scores[models.index(row["model"])] = 100 * row["score"]
    by_type = [np.mean([x for key, x in lines.items() if key[1] == kind], 0) for kind in types]
    if len(lines) > 1:
        lines["mean over tasks", "", ""] = np.mean(list(lines.values()), 0)
    if len(types) > 1:
        lines["mean over types", "", ""] = np.mean(by_type, 0)
    letters = [chr(ord("A") + i) for i in range(len(models))]
    cells = [["task", "type", "metric", *(letters if narrow else models)]]
    for key, scores in lines.items():
        cells.append([*key, *("" if np.isnan(x) else f"{x:.2f}" for x in scores)])
    sides = "<<<" + ">" * len(models)  # numbers stand at the right
    if narrow:
        cells, sides = [[line[0], *line[2:]] for line in cells], sides[1:]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * (w - 1) + "-:"[side == ">"] for side, w in zip(sides, widths)])
    form = " | ".join(f"{{:{side}{w}}}" for side, w in zip(sides, widths))
    legend = [f"{letter}: {name}" for letter, name in zip(letters, models)] if narrow else []
    return "\n".join([*legend, *(f"| {form.format(*line)} |" for line in cells)])


if __name__ == "__main__":
    # ---- configure ----
    s = SimpleNamespace(**common.configure(globals()))
    names = [name.strip() for name in f"{s.model},{s.baselines}".split(",") if name.strip()]
    if not names or [s.tasks, s.benchmark, s.local].count("") != 2:
        raise SystemExit("give --model=... and one of --tasks=..., --benchmark=..., --local=..., "
                         "such as --local=data/pydocs/test.jsonl")
    if s.corpus and not s.local:
        raise SystemExit("corpus goes with --local, a file of pairs")
    if s.adapters and "," in s.model:
        raise SystemExit("adapters belong to one model, several are given")

    # ---- distributed ----
    rank, _, _, device = common.setup_distributed()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="sklearn")  # a label that was never predicted

    # ---- evaluate ----
    if s.local:
        chosen = local_tasks(s.local, s.split, s.corpus)
    else:
        chosen = named_tasks(s.tasks, s.benchmark, s.languages)
    rows = []
    for name in names:
        tasks = copy.deepcopy(chosen)  # clustering draws on its task's random state
        encoder = load_encoder(name, s, device)
        encoder.prompts = task_prompts(tasks, s.instructions, s.query_template, encoder.saved)
        rows += evaluate(encoder, tasks, f"{s.out_dir}/scores", reuse=not s.local)

    # ---- save ----
    if rank == 0:
        text = table(rows) + "\n"
        print("", text if text.index("\n") <= 80 else table(rows, narrow=True) + "\n", sep="\n")
        results = {"mteb": mteb.__version__, "config": vars(s), "rows": rows}
        write_json(results, s.out_dir, "results.json")
        Path(s.out_dir, "results.md").write_text(text, "utf-8")
        print(f"saved: {s.out_dir}/results.md, results.json, scores/")
    if dist.is_initialized():
        dist.destroy_process_group()
