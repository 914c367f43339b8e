"""
The MDS folders beside this, and what the library reads from them, samples.json. In an environment
of its own: pip install mosaicml-streaming==0.13.0; python tests/mds/make.py
"""

import json
import os
import shutil
import tempfile

import numpy as np
from streaming import MDSWriter, StreamingDataset

HERE = os.path.dirname(os.path.abspath(__file__))
COLUMNS = {
    "text": "str", "input_ids": "ndarray", "ids": "ndarray:uint32", "grid": "ndarray:int16:2,3",
    "step": "int", "raw": "bytes", "score": "float32", "small": "uint8", "record": "json",
}  # fmt: skip
rng = np.random.default_rng(0)
kinds = [np.uint16, np.int64, np.float16, np.uint8, np.float64]
samples = [
    {
        "text": ["", "caf\u00e9 \U0001f642"][i % 2] + " a model of text" * i,
        "input_ids": rng.integers(0, 100, [i + 1, 30][: 1 + (i == 3)]).astype(kinds[i % 5]),
        "ids": rng.integers(0, 60, 4 + i).astype(np.uint32), "step": i // 2 + 10,
        "grid": rng.integers(-99, 99, (2, 3)).astype(np.int16), "raw": bytes(range(i)),
        "score": i / 4, "small": 250 + i, "record": {"n": [i, None], "s": "x"},
    }
    for i in range(6)
]  # fmt: skip
for name in ("plain", "zstd", "order"):
    shutil.rmtree(os.path.join(HERE, name), ignore_errors=True)
for name, compression in ("plain", None), ("zstd", "zstd"):
    folder = os.path.join(HERE, name)
    with MDSWriter(columns=COLUMNS, out=folder, compression=compression, size_limit=1200) as out:
        for sample in samples:
            out.write(sample)
order = {"input_ids": "ndarray:uint16", "step": "int"}  # two rows a step
with MDSWriter(columns=order, out=os.path.join(HERE, "order"), size_limit=300) as out:
    for sample in samples:
        out.write({"input_ids": sample["ids"][:4].astype(np.uint16), "step": sample["step"]})


def plain(value):
    if isinstance(value, np.ndarray):
        return [value.dtype.name, value.tolist()]
    return list(value) if isinstance(value, bytes) else getattr(value, "item", lambda: value)()


read = {}
for name in ("plain", "zstd", "order"):
    with tempfile.TemporaryDirectory() as cache:
        data = StreamingDataset(remote=os.path.join(HERE, name), local=cache, batch_size=1)
        read[name] = [{key: plain(value) for key, value in data[i].items()} for i in range(6)]
with open(os.path.join(HERE, "samples.json"), "w") as f:
    assert read["plain"] == read["zstd"]
    json.dump({name: read[name] for name in ("zstd", "order")}, f)
