"""Files as rows, whatever they are written in."""

import datetime
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from alignax.records import files, values

ROWS = [{"prompt": f"é {i} \U0001f600", "n": i} for i in range(5)]
ENCODINGS = {
    "utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-32": b"", "utf-16-le": b"",
    "utf-16-be": b"", "utf-32-le": b"", "utf-32-be": b"",
}  # fmt: skip


def read(path):
    return [(number, values.read(line)) for number, _, line in files.lines(path)]


def write(path, text, encoding="utf-8"):
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_lines_are_read_in_every_encoding(tmp_path, encoding, end, name):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    lines.insert(2, "  ")
    path = write(tmp_path / name, end.join([*lines, ""]), encoding)
    assert read(path) == [*zip((1, 2, 4, 5, 6), ROWS, strict=True)]
    plain = name == "d.jsonl" and encoding in ("utf-8", "utf-8-sig")
    assert files.in_place(path) == plain


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["d.json", "d.json.gz", "d.jsonl"])
def test_an_array_is_read_element_by_element(
    tmp_path, monkeypatch, encoding, indent, name
):
    text = json.dumps(ROWS, ensure_ascii=False, indent=indent)
    path = write(tmp_path / name, f" \n{text}\n", encoding)
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(files, "CHUNK", max(chunk, 8))
        assert read(path) == [*enumerate(ROWS, 1)]
    assert not files.in_place(path)


def test_a_number_that_a_chunk_cuts_is_one_element(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 8)
    numbers = [123456789012, 3, 0.12345678]
    path = write(tmp_path / "d.json", json.dumps(numbers))
    assert [value for _, value in read(path)] == numbers


def test_lists_in_lines_are_lines(tmp_path):
    path = write(tmp_path / "d.jsonl", "[1, 2]\n[3]\n")
    assert read(path) == [(1, [1, 2]), (2, [3])]
    path = write(tmp_path / "d.jsonl", '[{"a": 1}]\n[{"a": 2}]\n')
    assert read(path) == [(1, [{"a": 1}]), (2, [{"a": 2}])]


def test_an_element_that_cannot_be_read_is_one_row(tmp_path):
    bad = ['{"a": "\\ud800"}', '{"a": 1%s}' % ("0" * 5000), '{"a": 1, "a": 2}', "3.5e999"]  # fmt: skip
    path = write(tmp_path / "d.json", f'[{{"a": 1}}, {", ".join(bad)}, {{"a": 2}}]')
    first, *others, last = [value for _, value in read(path)]
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert [type(x) for x in others] == [ValueError] * 3 + [float]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1}, {"a"', '[{"a": 1} "b"', "["])
def test_an_array_that_ends_too_early_is_damaged(tmp_path, text):
    path = write(tmp_path / "d.json", text)
    with pytest.raises(ValueError, match="is damaged or no JSON array, behind row"):
        read(path)


def test_a_file_of_utf16_that_ends_within_a_character_is_one_bad_row(tmp_path):
    path = write(tmp_path / "d.jsonl", '{"a": 1}\n{"a": 2}', "utf-16")
    path.write_bytes(path.read_bytes()[:-1])
    (first, value), (second, error) = read(path)
    assert (first, value, second) == (1, {"a": 1}, 2)
    assert "not utf-16-le from here on" in str(error)


def test_half_a_pair_in_utf16_is_one_bad_row(tmp_path):
    lines = ['{"a": 1}', '{"a": "\ud83d"}', '{"a": 2}']
    (tmp_path / "d.jsonl").write_bytes(
        "\n".join(lines).encode("utf-16", "surrogatepass")
    )
    got = read(tmp_path / "d.jsonl")
    assert [number for number, _ in got] == [1, 2, 3]
    assert isinstance(got[1][1], ValueError)


def parquet(path, rows, **schema):
    table = pyarrow.Table.from_pylist(rows, **schema)
    pyarrow.parquet.write_table(table, path)
    return path


def test_parquet_gives_no_null_but_where_it_means_something(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "x": 1}]}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, call], "n": 1},
        {"messages": [{"role": "user", "content": "b", "name": "z"}]},
    ]
    got = [value for _, value in read(parquet(tmp_path / "d.parquet", rows))]
    assert got == rows


def test_what_json_cannot_hold_is_text(tmp_path):
    row = {"day": datetime.date(2026, 1, 2), "raw": b"\x00\xff", "text": "\u2028"}
    got = read(parquet(tmp_path / "d.parquet", [row]))
    assert got == [(1, {"day": "2026-01-02", "raw": "00ff", "text": "\u2028"})]


def test_a_row_of_parquet_that_is_no_text_is_one_bad_row(tmp_path):
    binary = pyarrow.array([b"a", b"\xff", b"c"])
    table = pyarrow.table({"prompt": binary.cast(pyarrow.string(), safe=False)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    first, second, third = [value for _, value in read(tmp_path / "d.parquet")]
    assert (first, third) == ({"prompt": "a"}, {"prompt": "c"})
    assert "not UTF-8" in str(second)


def test_an_empty_file_has_no_row(tmp_path):
    for name in ("d.jsonl", "d.json"):
        assert read(write(tmp_path / name, "")) == []
    assert read(write(tmp_path / "d.json", "[]")) == []
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b""))
    assert read(tmp_path / "d.jsonl.gz") == []
