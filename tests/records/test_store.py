"""Rows that stay on the disk."""

import concurrent.futures
import gc
import gzip
import json
import os
import pickle

import numpy as np
import pytest

from alignax.records import store

ROWS = [{"n": i, "text": "é" * (i % 7)} for i in range(300)]


def make(path, keep=lambda number: number % 3):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    rows = store.Store(path)
    for number, offset, line in rows.scan():
        if keep(number):
            rows.keep(number, offset, line, number % 2)
    rows.close()
    return rows


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_rows_that_were_kept_are_read_in_any_order(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(store, "BLOCK", block)
    rows = make(tmp_path / name)
    want = [i for i in range(1, 301) if i % 3]
    assert len(rows) == 200
    for some in (list(rows), [rows[i] for i in range(200)]):
        assert [line.number for line in some] == want
        assert [line.mark for line in some] == [i % 2 for i in want]
        assert [json.loads(line.text) for line in some] == [ROWS[i - 1] for i in want]
    assert rows[-1] == rows[199] == rows[198:][1]


@pytest.mark.filterwarnings("ignore:os.fork")  # the child only reads
def test_threads_and_forks_read_at_the_same_time(tmp_path):
    for name in ("d.jsonl", "d.jsonl.gz"):
        rows = make(tmp_path / name)
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            got = list(pool.map(rows.__getitem__, order))
        assert got == [rows[i] for i in order]
        if (child := os.fork()) == 0:
            os._exit(0 if [rows[i] for i in order] == got else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_file_that_changes_is_an_error(tmp_path):
    rows = make(tmp_path / "d.jsonl")
    with (tmp_path / "d.jsonl").open("ab") as f:
        f.write(b"\n{}\n")
    for read in (lambda: rows[0], lambda: list(rows)):
        with pytest.raises(ValueError, match=r"d\.jsonl has changed while it was"):
            read()


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path):
    rows = make(tmp_path / "d.jsonl")
    before = rows[5]
    (tmp_path / "new").write_text("{}")
    os.replace(tmp_path / "new", tmp_path / "d.jsonl")
    assert rows[5] == before


def test_copies_are_deleted_with_their_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    rows = make(tmp_path / "d.jsonl.gz")
    assert len(rows) == 200
    del rows
    gc.collect()
    assert os.listdir(tmp_path / "scratch") == []


def test_lines_in_place_can_be_sent_to_a_process(tmp_path):
    rows = make(tmp_path / "d.jsonl")
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    with pytest.raises(TypeError, match=r"d\.jsonl\.gz cannot be sent"):
        pickle.dumps(make(tmp_path / "d.jsonl.gz"))
