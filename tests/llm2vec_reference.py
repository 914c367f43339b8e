"""Writes tests/llm2vec_vectors.json with LLM2Vec itself, in an environment of its own:

    python tests/test_llm2vec.py FOLDER                                # the project's environment
    pip install --no-deps llm2vec==0.2.3 transformers==4.44.2 tokenizers==0.19.1 peft==0.12.0 \
        accelerate==0.33.0 huggingface_hub==0.24.7                     # another, with torch
    python tests/llm2vec_reference.py FOLDER > tests/llm2vec_vectors.json

FOLDER's files are changed so that these versions read them: they go by local paths, adapter keys
that are newer than this peft go, tokenizers are read from tokenizer.json.
"""

import inspect
import json
import sys
from pathlib import Path

from llm2vec import LLM2Vec, llm2vec
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

root = Path(sys.argv[1])
inputs = json.loads((root / "inputs.json").read_text())
known = inspect.signature(LoraConfig).parameters
for path in root.glob("*/adapter_config.json"):
    config = {k: v for k, v in json.loads(path.read_text()).items() if k in known}
    base = inputs["bases"][config["base_model_name_or_path"]]
    config |= {"base_model_name_or_path": str(root / base), "peft_type": "LORA"}
    path.write_text(json.dumps(config))
for path in root.glob("*/tokenizer.json"):  # merges were strings
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    path.write_text(json.dumps(tokenizer))


class Tokenizer:
    def from_pretrained(folder):
        config = json.loads(Path(folder, "tokenizer_config.json").read_text())
        names = {
            key: value for key, value in config.items() if key.endswith("s_token") or "mask" in key
        }
        names["model_input_names"] = ["input_ids", "attention_mask"]
        return PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", **names)


llm2vec.AutoTokenizer = Tokenizer
vectors = {}
for name in inputs["names"]:
    first = root / f"LLM2Vec-{name}-mntp"
    for stage in ("mntp", "mntp-supervised"):
        second = None if stage == "mntp" else str(root / f"LLM2Vec-{name}-{stage}")
        model = LLM2Vec.from_pretrained(str(first), peft_model_name_or_path=second)
        for key, texts in (("pairs", inputs["pairs"]), ("texts", inputs["texts"])):
            found = model.encode(texts, show_progress_bar=False, device="cpu")
            vectors[f"{name}-{stage} {key}"] = [
                [round(x, 5) for x in row] for row in found.tolist()
            ]
print(json.dumps(vectors))
