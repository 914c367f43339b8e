"""
Publishes runs on the Hugging Face hub: each checkpoint a revision tagged with its name, the last
one also what the repository shows. It may be run again while training goes on: what has a tag
stays.

    python -m tools.publish out/ettin-17m/mlm owner/name
    python -m tools.publish out/x out/x-ext out/x-decay owner/name --private     # phases, in order

Needs a login (`hf auth login`). The card, README.md, is made of config.py and log.csv.
"""

import argparse
import csv
import os
import re
import runpy

from huggingface_hub import HfApi

from common import loading_code
from formats import read_json
from formats.huggingface import OURS, checkpoints, step_of

NOT_PUBLISHED = ["training_state.pt", "complete.json", "README.md"]  # the card is made anew
CARD = """---
library_name: {library}
{base}tags: [nanoembed, {tag}]
---
# {repo}

`{tag}`, checkpoint {number} of {count} that were kept, trained by nanoembed. Each is a revision of
its name: `from_pretrained({repo!r}, revision={tag!r})`.

```python
{code}
```

| evaluation | {columns} |
|{rule}|
{rows}

<details><summary>all settings</summary>

```python
{settings}
```
</details>
"""


def card(folder, repo, number, count):
    """The text of README.md for one checkpoint."""
    out_dir, tag = os.path.split(folder)
    with open(os.path.join(out_dir, "config.py"), encoding="utf-8") as f:
        settings = f.read().strip()
    start = runpy.run_path(os.path.join(out_dir, "config.py")).get("init_from", "")
    with open(os.path.join(out_dir, "log.csv"), encoding="utf-8", newline="") as f:
        rows = [row for row in csv.DictReader(f) if any(row[k] for k in row if "eval" in k)]
    columns = ["step", *(key for key in (rows or [{}])[0] if key.startswith("eval_"))]
    rows = [row for row in rows if int(row["step"]) <= step_of(tag)]
    lines = [" | ".join(row[key] for key in columns) for row in rows]
    library = "transformers"
    if os.path.exists(f"{folder}/modules.json"):
        library = "sentence-transformers"
    elif os.path.exists(f"{folder}/adapter_config.json"):
        library, start = "peft", read_json(folder, "adapter_config.json")["base_model_name_or_path"]
    code = loading_code(out_dir).replace(f"{out_dir}/final", repo).replace(out_dir, repo)
    if library == "peft":
        code = f"from embedder import Embedder; model = Embedder.load({repo!r})"
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", start) and start.split("/")[0] not in OURS
    return CARD.format(
        library=library, tag=tag, repo=repo, number=number, count=count, settings=settings,
        base=f"base_model: {start}\n" if on_hub else "",
        code=code,
        columns=" | ".join(columns), rule="---|" * len(columns) + "---",
        rows="\n".join(f"| | {line} |" for line in lines),
    )  # fmt: skip


def publish(runs, repo, private):
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    there = {tag.name for tag in api.list_repo_refs(repo).tags}
    folders = [folder for run in runs for folder in checkpoints(os.path.normpath(run))]
    if len({os.path.basename(x) for x in folders}) < len(folders):
        raise SystemExit("two checkpoints have one name: runs of one repository need different "
                         "values of checkpoint_prefix, as step, ext and decay")  # fmt: skip
    for number, folder in enumerate(folders, 1):
        tag = os.path.basename(folder)
        if tag in there:
            print(f"{tag}: has its tag already")
            continue
        # weights that an earlier checkpoint had and this one has not go; the card follows
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=tag,
                          delete_patterns="*.safetensors", ignore_patterns=NOT_PUBLISHED)
        text = card(folder, repo, number, len(folders)).encode()
        api.upload_file(repo_id=repo, path_or_fileobj=text, path_in_repo="README.md",
                        commit_message=f"card of {tag}")  # fmt: skip
        api.create_tag(repo, tag=tag)
        print(f"{tag}: published")


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", help="out_dirs, in the order of their training")
    parser.add_argument("repo", help="owner/name on the hub")
    parser.add_argument("--private", action="store_true", help="where the repository is new")
    args = parser.parse_args()
    publish(args.runs, args.repo, args.private)
