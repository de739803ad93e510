"""Data sets by name, from a stand-in for the hub."""

import json

import pytest

from alignax import plugin
from alignax.data import hub
from alignax.records import fetch


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """me/data, whose files are in tmp_path."""
    names = []

    def write(name, *rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(name)

    monkeypatch.setattr(fetch, "names", lambda repo, revision: sorted(names))
    monkeypatch.setattr(
        fetch, "file", lambda repo, name, revision: str(tmp_path / name)
    )
    return write


def pair(i, **keys):
    return {"prompt": f"p{i}", "chosen": "c", "rejected": "r", **keys}


def read(split="train", **hyper):
    return plugin.load("data", "hub", {"split": split, "repo": "me/data", **hyper})()


def test_all_files_of_a_split_are_read_in_order(tmp_path, repo):
    repo("data/train-00001-of-00002.jsonl", pair(2), pair(3, id="a"), {})
    repo("data/train-00000-of-00002.jsonl", pair(0, id="a"), pair(1), {})
    repo("data/test-00000-of-00001.jsonl", pair(9))
    repo("README.md")
    rows = read()
    assert [r.prompt for r in rows] == ["p0", "p1", "p2", "p3"]
    assert [rows[i] for i in range(4)] == list(rows)
    assert rows[-1].prompt == "p3"
    assert [r.id for r in rows] == [
        "a", "train-00000-of-00002.jsonl:2", "train-00001-of-00002.jsonl:1",
        "a (train-00001-of-00002.jsonl:2)",
    ]  # fmt: skip
    assert len(rows.report["malformed"]) == 2
    names = [f"data/train-0000{i}-of-00002.jsonl" for i in (0, 1)]
    assert rows.files == tuple(str(tmp_path / name) for name in names)
    assert [r.prompt for r in read("test")] == ["p9"]


def test_a_split_may_be_held_out_of_train(repo):
    repo("train.jsonl", *[pair(i) for i in range(40)])
    train, test = (read(split, test_fraction=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 40
    assert not {r.prompt for r in train} & {r.prompt for r in test}


def test_a_file_may_be_named_and_keys_renamed(repo):
    repo("odd.jsonl", {"question": "q"})
    rows = read(file="odd.jsonl", columns={"question": "prompt"}, kind="prompts")
    assert [r.prompt for r in rows] == ["q"]


def test_what_is_not_there_is_said_with_what_is(repo):
    repo("a/train.jsonl", pair(1))
    repo("b/train.jsonl", pair(2))
    with pytest.raises(ValueError, match=r"in \['a', 'b'\]: set config to one"):
        read()
    assert [r.prompt for r in read(config="b")] == ["p2"]
    with pytest.raises(
        ValueError, match=r"no file of split 'dev' to read; it has \['a/tr"
    ):
        read("dev")
    with pytest.raises(ValueError, match=r"split 'train' to read in 'c'; it has"):
        read(config="c")


@pytest.mark.parametrize(
    "name, split, there",
    [
        ("data/train-00000-of-00001-abc.parquet", "train", True),
        ("train.jsonl", "train", True),
        ("en/my_train.json", "train", True),
        ("train/0000.parquet", "train", True),
        ("training.jsonl", "train", False),
        ("train_sft-00000.parquet", "train_sft", True),
        ("train.csv", "train", False),
        ("test.jsonl.gz", "test", True),
    ],
)
def test_a_split_is_a_word_of_the_path(name, split, there):
    assert hub.chosen([name], split) == ([name] if there else [])
