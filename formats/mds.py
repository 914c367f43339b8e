"""
Folders of MosaicML's MDS: index.json, and shards of samples, plain or compressed by zstd. Layout by
github.com/mosaicml/streaming, whose package needs what this project cannot have beside it.

    shard    uint32 n, uint32 [n + 1] where samples begin (and the last ends), JSON, the samples
    sample   uint32 size of each value whose encoding has no fixed size, then all values
"""

import json
import os

import numpy as np

from data import require
from formats import read_json

SCALARS = "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()


def mds_folders(folder):
    """-> `folder` if it has an index.json, else those below it that do, by name. Ettin's data are
    a folder with one for each source."""
    if os.path.exists(os.path.join(folder, "index.json")):
        return [folder]
    found = [path for path, _, files in os.walk(folder) if "index.json" in files]
    if not found:
        told = "no index.json in it or below, expected an MDS folder, or a pattern of files"
        raise FileNotFoundError(f"{folder}: {told}")
    return sorted(found)


def read_index(folder):
    """-> the shards that index.json names, each with the "path" and "bytes" of its file."""
    index = read_json(folder, "index.json")
    shards = require(index, "shards", [dict], index.where, 0)
    for shard in shards:
        kind = shard["format"], shard["version"]
        if kind != ("mds", 2):
            raise ValueError(f"{index.where}: a shard of {kind}, expected ('mds', 2)")
        path = os.path.join(folder, shard["raw_data"]["basename"])
        raw = os.path.exists(path) or not shard["zip_data"]  # a reader may have unpacked it
        if not raw and not shard["compression"].startswith("zstd"):
            told = f"compression {shard['compression']!r}, expected 'zstd' or none"
            raise ValueError(f"{index.where}: {told}")
        file = shard["raw_data" if raw else "zip_data"]
        shard |= {"path": os.path.join(folder, file["basename"]), "bytes": file["bytes"]}
        size = os.path.getsize(shard["path"])  # errors name the path
        if size != file["bytes"]:
            told = f"{size} bytes, by {index.where} it should have {file['bytes']}"
            raise ValueError(f"{shard['path']} has {told}")
    return shards


def read_shard(shard, columns):
    """Yield (values of `columns`) of each sample of one of read_index's. Holds a shard in memory.
    ValueError for a column that is not there, one whose encoding is none of `decode`, bad bytes."""
    names, encodings = shard["column_names"], shard["column_encodings"]
    path = shard["path"]
    for column in columns:
        if column not in names:
            raise ValueError(f"{path}: no column '{column}', it has {', '.join(names)}")
    with open(path, "rb") as f:
        data = f.read()
    if path.endswith(".zstd"):
        import pyarrow

        size = shard["raw_data"]["bytes"]
        try:
            data = pyarrow.Codec("zstd").decompress(data, size, asbytes=True)
        except OSError as error:
            raise ValueError(f"{path}: not {size} bytes by zstd: {error}") from None
    n = int.from_bytes(data[:4], "little")
    if n != shard["samples"] or 4 * n + 8 > len(data):
        raise ValueError(f"{path}: {n} samples, by index.json it should have {shard['samples']}")
    starts = np.frombuffer(data, "<u4", n + 1, 4).tolist()
    variable = [name for name, size in zip(names, shard["column_sizes"]) if not size]
    for i in range(n):
        at, sizes = starts[i], dict(zip(names, shard["column_sizes"]))
        for name in variable:
            sizes[name] = int.from_bytes(data[at : at + 4], "little")
            at += 4
        if at + sum(sizes.values()) != starts[i + 1] or starts[i + 1] > len(data):
            told = f"{sum(sizes.values())} bytes of values at {at}, expected {starts[i + 1] - at}"
            raise ValueError(f"{path}: sample {i} has {told}")
        values = {}
        for name, encoding in zip(names, encodings):
            if name in columns:
                try:
                    values[name] = decode(encoding, data[at : at + sizes[name]])
                except (ValueError, IndexError) as error:
                    told = f"sample {i}, column '{name}' of {encoding}: {error}"
                    raise ValueError(f"{path}: {told}") from None
            at += sizes[name]
        yield tuple(values[column] for column in columns)


def decode(encoding, data):
    """A value of bytes, str, int, a scalar of SCALARS, json, or ndarray[:dtype[:sizes]]: an array
    that names what the encoding leaves open, dtype and shape, in its first bytes."""
    kind, *fixed = encoding.split(":")
    if kind == "bytes":
        return data
    if kind == "str":
        return data.decode("utf-8")
    if kind == "json":
        return json.loads(data)
    if kind == "int" or kind in SCALARS:
        (value,) = np.frombuffer(data, np.dtype("int64" if kind == "int" else kind))
        return value.item()
    if kind != "ndarray":
        raise ValueError("this encoding is not known here")
    if fixed:
        dtype = fixed[0]
    else:  # a byte: bits, plus 1 where it is signed, 2 where it is a float
        dtype, data = "uif"[data[0] % 8] + str(data[0] // 8), data[1:]
    if len(fixed) > 1:
        shape = [int(size) for size in fixed[1].split(",")]
    else:  # a byte: 4 x dimensions, plus the power of 2 that is the width of each size
        n, width = data[0] // 4, 1 << data[0] % 4
        shape, data = np.frombuffer(data, f"<u{width}", n, 1), data[1 + n * width :]
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
