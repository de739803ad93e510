"""HH-RLHF through TFDS without TensorFlow."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest

from alignax.data import hh_rlhf

ROOT = pathlib.Path(__file__).parents[2]
REAL = (
    pathlib.Path(os.environ.get("ALIGNAX_DATA", ROOT.parent / "shared" / "data"))
    / "hh-rlhf" / "harmless-base.jsonl.gz"
)  # fmt: skip
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs the HH-RLHF file")


def row(question, chosen, rejected, history=""):
    head = f"{history}\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{head} {chosen}", "rejected": f"{head} {rejected}"}


def write(path, rows):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines))
    return str(path)


@pytest.fixture
def file(tmp_path):
    history = "\n\nHuman: hey\n\nAssistant: yes?"
    rows = [row(f"q{i}", "good", "bad", history if i % 2 else "") for i in range(40)]
    rows[3] = row("q3", "", "bad")  # empty last turn
    rows[5] = b"{"
    rows[7] = row("q7", "same", "same")
    rows[9] = {
        "chosen": row("x", "a", "b")["chosen"],
        "rejected": row("y", "a", "b")["chosen"],
    }
    rows[11] = {"chosen": row("x", "a", "b")["chosen"]}
    return write(tmp_path / "hh.jsonl", rows)


def read(file, tmp_path, split="all", **kwargs):
    return hh_rlhf.examples(
        split=split, path=file, cache_dir=str(tmp_path / "cache"), **kwargs
    )


def test_dialogue_becomes_messages_and_one_answer_a_side(file, tmp_path):
    example = read(file, tmp_path)[1]
    assert example.id == "hh.jsonl:2"
    assert example.prompt == [
        {"role": "user", "content": "hey"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "q1"},
    ]
    assert [r[0] for r in example.responses] == [
        {"role": "assistant", "content": "good"},
        {"role": "assistant", "content": "bad"},
    ]
    assert example.feedback == (1.0, 0.0)


def test_unusable_rows_are_counted_with_their_line(file, tmp_path):
    rows = read(file, tmp_path)
    assert len(rows) == 35
    assert [m.split(": ")[0] for m in rows.report["malformed"]] == [
        "hh.jsonl:6",
        "hh.jsonl:12",
    ]
    reasons = dict(line.split(": ", 1) for line in rows.report["dropped"])
    assert "empty" in reasons["hh.jsonl:4"]
    assert "identical" in reasons["hh.jsonl:8"]
    assert "part before" in reasons["hh.jsonl:10"]
    with pytest.raises(ValueError, match=r"hh\.jsonl:"):
        read(file, tmp_path, strict=True)


def test_rows_are_prepared_once_and_anew_when_the_file_changes(
    file, tmp_path, monkeypatch
):
    first = list(read(file, tmp_path))
    monkeypatch.setattr(hh_rlhf, "parse_file", None)  # would fail if it were called
    assert list(read(file, tmp_path)) == first
    with open(file, "a") as f:
        f.write("\n" + json.dumps(row("new", "a", "b")))
    monkeypatch.undo()
    assert len(read(file, tmp_path)) == len(first) + 1


def test_hostile_rows_are_one_each_and_other_keys_are_columns(tmp_path):
    half = json.dumps(row("q", "good \ud83d", "bad")).encode()
    long = json.dumps({**row("q", "good", "bad"), "n": 0})[:-2].encode()
    rows = [
        row("a", "good", "bad"), half, long + b"1" * 5000 + b"}",
        {**row("b", "good", "bad"), "n": 3, "who": "x", "none": None},
    ]  # fmt: skip
    got = read(write(tmp_path / "h.jsonl", rows), tmp_path)
    assert [e.id for e in got] == ["h.jsonl:1", "h.jsonl:4"]
    assert [dict(e.columns) for e in got] == [{}, {"n": 3, "who": "x"}]
    first, second = got.report["malformed"]
    assert first.startswith("h.jsonl:2: 'chosen' holds half of a surrogate pair")
    assert second.startswith("h.jsonl:3: an integer of 5000 digits")
    assert got.files == (str(tmp_path / "h.jsonl"),)


def test_an_empty_split_says_what_to_set_and_zero_is_no_test(file, tmp_path):
    assert len(read(file, tmp_path, "train", test_fraction=0)) == 35
    assert len(read(file, tmp_path, "test", test_fraction=0)) == 0
    with pytest.raises(ValueError, match=r"among 35 rows.*set a larger one"):
        read(file, tmp_path, "test", test_fraction=1e-9)
    with pytest.raises(ValueError, match="test_fraction is 2"):
        read(file, tmp_path, test_fraction=2.0)


def test_splits_share_no_opening(file, tmp_path):
    train, test = (
        read(file, tmp_path, s, test_fraction=0.3) for s in ("train", "test")
    )
    openings = [{e.prompt[0]["content"] for e in part} for part in (train, test)]
    assert not openings[0] & openings[1]
    assert len(train) + len(test) == 35


def test_kinds(file, tmp_path):
    assert len(read(file, tmp_path, kind="sft")[0].responses) == 1
    assert len(read(file, tmp_path, kind="prompts")[0].responses) == 0
    with pytest.raises(ValueError, match="'pair'"):
        read(file, tmp_path, kind="pair")


def test_bad_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        read(str(tmp_path / "nope.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="empty"):
        read(write(tmp_path / "e.jsonl", []), tmp_path)
    with pytest.raises(ValueError, match="not a dialogue"):
        read(write(tmp_path / "f.jsonl", [{"chosen": "a", "rejected": "b"}]), tmp_path)
    with pytest.raises(ValueError, match="'dev'"):
        read(str(tmp_path / "f.jsonl"), tmp_path, "dev")


def test_tensorflow_is_not_imported(file, tmp_path):
    code = (
        "import sys\n"
        "from alignax.data import hh_rlhf\n"
        f"rows = hh_rlhf.examples(split='all', path={file!r}, cache_dir={str(tmp_path)!r})\n"
        "assert len(rows) == 35 and rows[0].prompt\n"
        "found = [m for m in sys.modules if m.split('.')[0] in "
        "('tensorflow', 'torch', 'transformers')]\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_real
def test_real_file_loses_six_rows_and_says_which(tmp_path):
    rows = read(str(REAL), tmp_path)
    assert len(rows) == 1794
    # Lines count from 1; the file's notes name these rows from 0.
    lines = {int(x.split(":")[1]) - 1 for x in rows.report["dropped"]}
    assert lines == {86, 516, 925, 1103, 1254, 1688}
    assert "malformed" not in rows.report
    with gzip.open(REAL, "rt") as f:
        first = json.loads(f.readline())
    assert first["chosen"].endswith(rows[0].responses[0][0]["content"])
    assert first["rejected"].endswith(rows[0].responses[1][0]["content"])


@needs_real
def test_real_splits_have_disjoint_prompts_and_cover_the_file(tmp_path):
    train, test = (read(str(REAL), tmp_path, s) for s in ("train", "test"))
    prompts = [{json.dumps(e.prompt) for e in part} for part in (train, test)]
    assert not prompts[0] & prompts[1]
    assert len(train) + len(test) == 1794
    assert len(test) >= 400
