"""Rows on the disk: a second start reads no text, and nothing stale is taken."""

import json
import pathlib

import numpy as np
import pytest

from alignax import plugin
from alignax.batch import Example
from alignax.inputs import plan, row_store, rows, source
from alignax.text import tokenizer

TK = tokenizer.load("bytes")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Files of a few rows are kept, too."""
    monkeypatch.setattr(row_store, "SMALL", 4)


@pytest.fixture
def made(tmp_path):
    """(section, folder) of a file of pairs, with cut and malformed rows among them."""
    lines = [
        json.dumps(
            {"prompt": f"p{i}" * (1 + i % 3), "chosen": "c" * i, "rejected": "r"}
        )
        for i in range(1, 40)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([*lines, "no json"]) + "\n")
    section = {"name": "jsonl", "path": str(path), "split": "train"}
    return section, str(tmp_path / "cache")


def read(section, folder, tk=TK, length=24, **more):
    return row_store.read(section, tk, length=length, folder=folder, **more)


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.id == y.id
        np.testing.assert_array_equal(x.prompt, y.prompt)
        for name in ("responses", "scored"):
            for u, v in zip(getattr(x, name), getattr(y, name), strict=True):
                np.testing.assert_array_equal(u, v)
                assert u.dtype == v.dtype
        assert (x.feedback, dict(x.columns), x.distinct) == (
            y.feedback, dict(y.columns), y.distinct,
        )  # fmt: skip


def test_a_record_holds_a_row():
    columns = {"weight": 0.5}
    example = Example("né:1", "q", ["a", "bc"], (1.0, 0.25), columns)
    (row,) = rows.read([example], TK, length=16)
    same([row_store.unpack(row_store.pack(row))], [row])


def test_a_second_start_reads_no_text(made, monkeypatch):
    section, folder = made
    first = read(section, folder)
    assert isinstance(first, row_store.Kept)
    monkeypatch.setattr(plugin, "load_examples", None)
    again = read(section, folder)
    same(again, first)
    assert again.counts == first.counts
    assert plan.identity([again], ("s",)) == plan.identity([first], ("s",))


def test_kept_rows_are_those_of_the_examples(made):
    section, folder = made
    examples = plugin.load_examples(section)
    fresh = rows.read(examples, TK, length=24)
    kept = read(section, folder)
    same(kept, fresh)
    for name in ("lengths", "distinct", "tokens"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(fresh, name))
    assert (kept.group, kept.top, kept.columns) == (
        fresh.group,
        fresh.top,
        fresh.columns,
    )
    assert kept.counts == fresh.counts
    assert kept.counts["cut"] > 0
    assert kept.counts["malformed"] == 1
    assert plan.identity([kept], ()) == plan.identity([fresh], ())
    a, b = (
        source.dataset_source(d, TK, batch_size=4, length=24, seed=0, epochs=1)
        for d in (kept, examples)
    )
    assert a.state() == b.state()
    for _ in range(3):
        np.testing.assert_array_equal(a.next().tokens, b.next().tokens)


def test_a_changed_file_is_tokenised_again(made):
    section, folder = made
    first = read(section, folder)
    with open(section["path"], "a") as file:
        file.write(json.dumps({"prompt": "new", "chosen": "x", "rejected": "y"}) + "\n")
    again = read(section, folder)
    assert len(again) == len(first) + 1
    same(read(section, folder), again)


@pytest.mark.parametrize(
    "change", ["length", "tokenizer", "reading", "section", "variables"]
)
def test_other_settings_are_another_entry(made, change):
    section, _ = made
    names = {row_store.key(section, TK, 24)}
    reading = TK.reading
    names.add(
        {
            "length": lambda: row_store.key(section, TK, 25),
            "tokenizer": lambda: row_store.key(
                section, tokenizer.dataclasses.replace(TK, eos_id=258), 24
            ),
            "reading": lambda: row_store.key(
                section, TK.read_as(reading._replace(truncate="drop")), 24
            ),
            "variables": lambda: row_store.key(
                section, TK.read_as(reading._replace(variables={"tools": []})), 24
            ),
            "section": lambda: row_store.key({**section, "kind": "sft"}, TK, 24),
        }[change]()
    )
    assert len(names) == 2
    assert row_store.key({**section, "ratio": 0.5}, TK, 24) in names


def test_code_of_a_data_set_from_outside_is_a_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_rows.py").write_text("def examples(*, split): return []\n")
    section = {"name": "own_rows.examples", "split": "train"}
    before = row_store.key(section, TK, 24)
    outer = row_store.key({"name": "unpaired", "source": section}, TK, 24)
    monkeypatch.setattr(row_store.inspect, "getsource", lambda module: "other")
    assert row_store.key(section, TK, 24) != before
    assert row_store.key({"name": "unpaired", "source": section}, TK, 24) != outer


@pytest.mark.parametrize("name", ["rows.array_record", "sizes.npz", "entry.json"])
@pytest.mark.parametrize("damage", ["half", "gone", "other"])
def test_a_damaged_entry_is_made_again_or_refused(made, tmp_path, name, damage):
    section, folder = made
    first = read(section, folder)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    held = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "half":
        path.write_bytes(held[: len(held) // 2])
    else:
        middle = len(held) // 2
        path.write_bytes(held[:middle] + bytes(8) + held[middle + 8 :])
    try:
        again = read(section, folder)
        plan.identity([again], ())  # a run reads all rows before its first step
    except (ValueError, RuntimeError, OSError) as error:
        assert damage == "other"
        assert "damaged" in str(error) or "array_record" in str(error) or str(error)
        return
    same(again, first)


def test_a_data_set_in_memory_and_few_rows_are_not_kept(made, tmp_path, monkeypatch):
    section, folder = made
    read({"name": "synthetic", "split": "train"}, folder)
    monkeypatch.setattr(row_store, "SMALL", 1000)
    read(section, folder)
    read(section, row_store.OFF)
    assert not list(tmp_path.glob("cache/*"))


def test_the_data_are_checked_before_and_after_they_are_kept(made):
    section, folder = made
    seen = []

    def check(counts):
        seen.append(counts["forms"])
        if len(seen) == 1:
            raise ValueError("another form")

    with pytest.raises(ValueError, match="another form"):
        read(section, folder, check=check)
    assert not list(pathlib.Path(folder).glob("*"))  # known from the first rows
    read(section, folder, check=check)
    read(section, folder, check=check)
    assert [list(forms) for forms in seen] == [["pairs"]] * 4
    assert seen[3]["pairs"] == [39, "pairs.jsonl:1"]


def test_what_is_stopped_half_way_leaves_no_entry(made, tmp_path, monkeypatch):
    section, folder = made

    def stop(row):
        raise KeyboardInterrupt

    monkeypatch.setattr(row_store, "pack", stop)
    with pytest.raises(KeyboardInterrupt):
        read(section, folder)
    assert not list(tmp_path.glob("cache/*"))


def test_a_folder_that_cannot_be_written_is_no_error(made, tmp_path, caplog):
    section, _ = made
    (tmp_path / "file").touch()
    found = read(section, str(tmp_path / "file"))
    same(found, rows.read(plugin.load_examples(section), TK, length=24))
    assert "cannot be kept" in caplog.text


def test_two_processes_may_keep_the_same_rows(made, monkeypatch):
    section, folder = made
    placed = row_store._placed

    def late(scratch, entry):
        monkeypatch.setattr(row_store, "_placed", placed)
        read(section, folder)  # another process, which is faster
        return placed(scratch, entry)

    monkeypatch.setattr(row_store, "_placed", late)
    first = read(section, folder)
    same(first, read(section, folder))
    assert len(list(pathlib.Path(folder).iterdir())) == 1
