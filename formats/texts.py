"""
Texts of a corpus of any kind: .txt, .jsonl and .parquet files, MDS folders, or a data set of the
hub. It is cut into parts, dicts that say where texts are and go through JSON, so that workers read
them apart:

    for part in parts_of_files(["corpus/*.jsonl"]):
        for text in texts_of(part):
            ...
"""

import glob
import json
import os
from functools import lru_cache

from data import read_jsonl, require
from formats.mds import mds_folders, read_index, read_shard

PART_BYTES = 32 << 20
PART_ROWS = 50_000
EVAL_SPLITS = ("validation", "valid", "val", "eval", "test", "dev")  # the first that a data set has


def parts_of_files(patterns, field="text", txt="blank", part_bytes=PART_BYTES):
    """-> the parts of all files of the patterns, in the order of their names. A document is the
    field of a line of .jsonl, the value of the column of a .parquet, and of a .txt what stands
    between blank lines (txt="blank") or a line ("line"). A row group of a .parquet is a part, and
    a shard of an MDS folder."""
    parts, seen = [], set()
    for pattern in patterns:
        for path in sorted(glob.glob(pattern, recursive=True)) or [pattern]:
            if os.path.realpath(path) in seen:  # by two patterns: val would be trained on
                continue
            seen.add(os.path.realpath(path))
            for folder in mds_folders(path) if os.path.isdir(path) else []:
                for shard in read_index(folder):
                    part = {"kind": "mds", "path": shard["path"], "field": field, "shard": shard}
                    parts.append({**part, "changed": os.stat(shard["path"]).st_mtime_ns})
            if os.path.isdir(path):
                continue
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{pattern}: there is no such file")
            kind = os.path.splitext(path)[1][1:]
            if kind == "parquet":
                from pyarrow.parquet import ParquetFile

                borders = range(ParquetFile(path).num_row_groups + 1)
            elif kind in ("txt", "jsonl"):
                borders = _cuts_of(path, part_bytes, blank_line=kind == "txt" and txt == "blank")
            else:
                raise ValueError(f"{path}: expected a .txt, .jsonl or .parquet file")
            file = {"kind": kind, "path": path, "field": field, "txt": txt}
            file |= {"size": os.path.getsize(path), "changed": os.stat(path).st_mtime_ns}
            for start, end in zip(borders[:-1], borders[1:], strict=True):
                parts.append({**file, "start": start, "end": end})
    return parts


def _cuts_of(path, part_bytes, blank_line):
    """Byte offsets that cut a file about every part_bytes, after a line or after a blank line."""
    cuts, size = [0], os.path.getsize(path)
    with open(path, "rb") as f:
        while cuts[-1] + part_bytes < size:
            f.seek(cuts[-1] + part_bytes)
            line = f.readline()  # the rest of one
            while blank_line and line:
                line = f.readline()
                if not line.strip():
                    break
            cuts.append(f.tell())
    return [*cuts, size] if cuts[-1] < size else cuts


def eval_split_of(name, config, train):
    """-> the first split of the data set that is one to evaluate on, or None. ValueError where it
    has no split `train`, of which a slice may be asked for: "train[:1%]"."""
    from datasets import get_dataset_split_names

    names, train = get_dataset_split_names(name, config), train.split("[")[0]
    if train not in names:
        raise ValueError(f"{name} has no split {train!r}, only {', '.join(names)}")
    return next((split for split in EVAL_SPLITS if split in names and split != train), None)


def parts_of_dataset(name, config, split, field="text", streaming=False):
    """-> the parts of a split of a data set of the hub, or of a folder that `datasets` can read.
    streaming: it is not stored, and each of its files is a part."""
    data = {"kind": "hub", "path": name, "config": config, "split": split, "field": field}
    data["streaming"] = streaming
    dataset = _open_dataset(name, config, split, streaming)
    if streaming:
        borders = range(dataset.num_shards + 1)
    else:
        borders = [*range(0, len(dataset), PART_ROWS), len(dataset)]
    pairs = zip(borders[:-1], borders[1:], strict=True)
    return [{**data, "start": start, "end": end, "of": borders[-1]} for start, end in pairs]


@lru_cache(4)  # a stream reads many parts, and the hub takes its time
def _open_dataset(path, config, split, streaming):
    from datasets import load_dataset

    return load_dataset(path, config, split=split, streaming=streaming)


def texts_of(part):
    """Yield the texts of a part; what is missing or blank is "". A column of an MDS folder may hold
    token ids instead: arrays of integers. ValueError says where something else is."""
    if part["kind"] == "hub":
        dataset = _open_dataset(part["path"], part["config"], part["split"], part["streaming"])
        if part["streaming"]:
            dataset = dataset.shard(part["of"], part["start"])
        else:
            dataset = dataset.select(range(part["start"], part["end"]))
        for batch in dataset.iter(1024):
            yield from _column(batch, part["field"], f"{part['path']}, split {part['split']}")
    elif part["kind"] == "mds":
        for (value,) in read_shard(part["shard"], [part["field"]]):
            if isinstance(value, str) or hasattr(value, "dtype") and value.dtype.kind in "iu":
                yield value
            else:
                what = f"column '{part['field']}' has {value!r:.60}, expected a text or token ids"
                raise ValueError(f"{part['path']}: {what}")
    elif part["kind"] == "parquet":
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(part["path"])
        columns = [part["field"]] if part["field"] in file.schema_arrow.names else None
        for batch in file.iter_batches(1024, [part["start"]], columns):
            yield from _column(batch.to_pydict(), part["field"], part["path"])
    else:
        lines, at = [], part["start"]
        with open(part["path"], "rb") as f:
            f.seek(at)
            while at < part["end"]:
                line = f.readline()
                at += len(line)
                if part["kind"] == "jsonl":
                    yield _of_json(line, part["path"], part["field"])
                elif part["txt"] == "line":
                    yield _of_txt(line, part["path"])
                elif line.strip():
                    lines.append(line)
                elif lines:
                    yield _of_txt(b"".join(lines), part["path"])
                    lines = []
        if lines:
            yield _of_txt(b"".join(lines), part["path"])


def _column(batch, field, source):
    if field not in batch:
        raise ValueError(f"{source}: no column '{field}', it has {', '.join(batch)}")
    for text in batch[field]:
        if not isinstance(text, str | None):
            raise ValueError(f"{source}: column '{field}' has {text!r:.60}, expected a text")
        yield text or ""  # a missing text is an empty one


def _of_txt(text, path):
    try:
        return text.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}, in {text[:60]!r}") from None


def _of_json(line, path, field):
    if not line.strip():
        return ""
    try:
        text = json.loads(line)[field]
        return "" if text is None else require({field: text}, field, str, path, 0)
    except (ValueError, TypeError, KeyError):
        # a part does not know its line numbers: find the line again from the top of the file
        for number, record in read_jsonl(path):
            if record.get(field, "missing") is not None:
                require(record, field, str, path, number)
        raise
