"""tools/publish.py against a stand-in of the hub's client that keeps what it is given."""

import inspect
import os
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi

import harness
from tools import publish


class Hub:
    """One repository, {tag: {path: bytes}}: uploads change the branch, a tag keeps its files."""

    tags, files, private = {}, {}, None

    def create_repo(self, repo_id, private, exist_ok):
        Hub.private = private

    def list_repo_refs(self, repo_id):
        return SimpleNamespace(tags=[SimpleNamespace(name=tag) for tag in self.tags])

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns, ignore_patterns):
        for path in [path for path in self.files if fnmatch(path, delete_patterns)]:
            del self.files[path]
        for name in os.listdir(folder_path):
            if not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                with open(os.path.join(folder_path, name), "rb") as f:
                    self.files[name] = f.read()

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.files[path_in_repo] = path_or_fileobj

    def create_tag(self, repo_id, tag):
        assert tag not in self.tags
        self.tags[tag] = dict(self.files)


def test_each_checkpoint_is_a_revision(toy_tokens, tmp_path, monkeypatch, capsys):
    for name, ours in inspect.getmembers(Hub, inspect.isfunction):  # as the real one is called
        theirs = inspect.signature(getattr(HfApi, name)).parameters
        assert set(inspect.signature(ours).parameters) <= set(theirs)
    config = harness.write_config(
        tmp_path, data=toy_tokens, model_size="modernbert-tiny", vocab_size=512, max_seq_len=64,
        batch_tokens=128, device_batch_tokens=128, max_steps=2, eval_interval=1, eval_tokens=64,
        save_interval=1, keep_models=1, keep_last=1, dtype="fp32")  # fmt: skip
    out, ext = str(tmp_path / "out"), str(tmp_path / "ext")
    harness.run("pretrain_mlm.py", config, out)
    monkeypatch.setattr(publish, "HfApi", Hub)
    publish.publish([out + "/"], "me/model", True)
    assert list(Hub.tags) == ["step1", "step2"] and Hub.private
    for tag, files in Hub.tags.items():
        assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "README.md",
                              "tokenizer_config.json"}  # fmt: skip
        assert files["model.safetensors"] == harness.saved(out, int(tag[-1]))
        head, text = files["README.md"].decode().split("---\n", 2)[1:]
        assert yaml.safe_load(head) == {"library_name": "transformers", "tags": ["nanoembed", tag]}
        assert "model = ModernBertForMaskedLM.from_pretrained('me/model')" in text
        assert text.count("\n| | ") == int(tag[-1]) and "batch_tokens = 128" in text
        assert str(harness.losses(out, "eval_loss")[1]) in text

    # a second phase, when the first is there
    harness.run("pretrain_mlm.py", config, ext, f"--init_from={out}", "--max_steps=1",
                "--checkpoint_prefix=ext")  # fmt: skip
    publish.publish([out, ext], "me/model", True)
    assert list(Hub.tags) == ["step1", "step2", "ext1"]
    assert capsys.readouterr().out.count("has its tag already") == 2
    with pytest.raises(SystemExit, match="two checkpoints have one name"):
        publish.publish([out, out], "me/model", True)
    with pytest.raises(SystemExit, match="no checkpoint such as step500"):
        publish.publish([str(tmp_path / "nothing")], "me/model", True)
