"""The Hugging Face Hub, by a stand-in: a folder that plays the part of the hub."""

import shutil
import sys
import types

import pytest

from alignax.records import fetch


class HubError(Exception):
    """What the package raises where there is no such repository, or no network."""


def stand_in(folder, calls):
    """A module in place of huggingface_hub, whose repositories are folders."""

    def there(repo):
        if not (folder / repo).is_dir():
            raise HubError(f"404: no {repo}\nmore lines")
        return folder / repo

    def hf_hub_download(repo, name, *, repo_type, revision):
        calls.append((repo, name, repo_type, revision))
        return str(there(repo) / name)

    def snapshot_download(repo, *, revision, allow_patterns):
        calls.append((repo, revision))
        target = folder / "cache" / repo
        ignored = shutil.ignore_patterns(*allow_patterns)
        source = there(repo)
        unread = ignored(str(source), [p.name for p in source.iterdir()])
        shutil.copytree(
            source, target, dirs_exist_ok=True,
            ignore=lambda _, files: {*files} - unread,
        )  # fmt: skip
        return str(target)

    class HfApi:
        def list_repo_files(self, repo, *, repo_type, revision):
            calls.append((repo, repo_type, revision))
            files = there(repo).rglob("*")
            return [str(p.relative_to(folder / repo)) for p in files if p.is_file()]

    module = types.ModuleType("huggingface_hub")
    module.__dict__.update(
        HfApi=HfApi,
        hf_hub_download=hf_hub_download,
        snapshot_download=snapshot_download,
    )
    return module


@pytest.fixture
def calls(tmp_path, monkeypatch):
    calls = []
    module = stand_in(tmp_path, calls)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_files_are_named_and_fetched(tmp_path, calls):
    (tmp_path / "me/data/sub").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / "me/data" / name).touch()
    assert fetch.names("me/data") == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert fetch.file("me/data", "a.jsonl", "v1") == str(tmp_path / "me/data/a.jsonl")
    assert calls == [("me/data", "dataset", None), ("me/data", "a.jsonl", "dataset", "v1")]  # fmt: skip


def test_a_model_is_a_folder_of_what_is_read(tmp_path, calls):
    (tmp_path / "me/model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "README.md"):
        (tmp_path / "me/model" / name).touch()
    got = fetch.model("hf:me/model@main")
    assert calls == [("me/model", "main")]
    names = sorted(p.name for p in (tmp_path / "cache/me/model").iterdir())
    assert got == str(tmp_path / "cache/me/model")
    assert names == ["config.json", "model.safetensors"]


def test_what_cannot_be_fetched_says_so_in_one_line(calls):
    for call in (
        lambda: fetch.model("hf:me/none"),
        lambda: fetch.file("me/none", "x"),
        lambda: fetch.names("me/none"),
    ):
        with pytest.raises(ValueError, match=r"me/none.* cannot be fetched \(HubError: 404: no me/none\): check") as caught:  # fmt: skip
            call()
        assert "\n" not in str(caught.value)
    assert calls


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'alignax\[hub\]'"):
        fetch.model("hf:me/model")
