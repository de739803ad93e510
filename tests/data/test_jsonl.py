"""People's own files: every form is read, and nothing bad passes silently."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from alignax.batch import Example
from alignax.data import jsonl

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, *rows):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(path, **kwargs):
    return jsonl.examples(split="all", path=path, **kwargs)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_pairs_of_strings(tmp_path, name):
    rows = read(write(tmp_path / name, GOOD, GOOD))
    assert list(rows) == [
        Example(f"{name}:{i}", "p", ["c", "r"], (1.0, 0.0)) for i in (1, 2)
    ]
    assert rows.report == {}


def test_parquet_holds_the_same_rows(tmp_path):
    lists = {
        "prompt": [user("p")],
        "chosen": [assistant("c")],
        "rejected": [assistant("r")],
    }
    for name, row in (("a", GOOD), ("b", lists)):
        file = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), file)
        rows = read(str(file))
        same = read(write(tmp_path / f"{name}.jsonl", row, row))
        assert [r[1:] for r in rows] == [r[1:] for r in same]
        assert rows[1].id == f"{name}.parquet:2"


def test_messages_split_before_the_first_assistant_turn(tmp_path):
    turns = [user("a"), assistant("b"), user("c"), assistant("d"), user("left over")]
    row = read(write(tmp_path / "d.jsonl", {"messages": turns}))[0]
    assert row.prompt == turns[:1]
    assert row.responses == [turns[1:4]]


def test_sides_may_repeat_the_prompt_in_front(tmp_path):
    sides = {
        "chosen": [user("p"), assistant("c")],
        "rejected": [user("p"), assistant("r")],
    }
    with_prompt = read(write(tmp_path / "a.jsonl", {"prompt": "p", **sides}))[0]
    without = read(write(tmp_path / "b.jsonl", sides))[0]
    assert with_prompt.prompt == "p"
    assert without.prompt == [user("p")]
    assert (
        with_prompt.responses
        == without.responses
        == [[assistant("c")], [assistant("r")]]
    )


def test_single_responses_with_a_label_and_prompts_alone(tmp_path):
    file = write(
        tmp_path / "d.jsonl",
        {"prompt": "p", "response": "x"},
        {"prompt": "p", "completion": "x", "label": True},
        {"prompt": "p"},
    )
    got = [(list(r.responses), r.feedback) for r in read(file)]
    assert got == [(["x"], ()), (["x"], (1.0,)), ([], ())]


def test_pairs_serve_as_sft_and_as_prompts(tmp_path):
    file = write(tmp_path / "d.jsonl", GOOD)
    assert read(file, kind="sft")[0][2:4] == (["c"], ())
    assert read(file, kind="prompts")[0][2:4] == ([], ())


BAD = {
    "not JSON": b'{"prompt": "p", ',
    "not UTF-8": b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}',
    "not an object": [1, 2],
    "'chosen' is missing": {"prompt": "p", "rejected": "r"},
    "'chosen' is empty": {"prompt": "p", "chosen": " ", "rejected": "r"},
    "'rejected' is missing": {"prompt": "p", "chosen": "c", "rejected": None},
    "identical": {"prompt": "p", "chosen": "c", "rejected": "c "},
    "'prompt' is missing": {"response": "r"},
    "what data.hh_rlhf reads": {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
    "empty assistant turn": {"messages": [user("a"), assistant("")]},
    "no assistant turn": {"messages": [user("a")]},
    "expected role and content": {"messages": [{"from": "human", "value": "a"}]},
    "it has no prompt": {"messages": [assistant("a")]},
    "whose content is not text": {"messages": [user(3), assistant("a")]},
    "'label' is 'yes'": {"prompt": "p", "response": "r", "label": "yes"},
    "'label' is nan": {"prompt": "p", "response": "r", "label": float("nan")},
}


@pytest.mark.parametrize("reason", BAD)
def test_malformed_line_is_counted_with_file_and_line(tmp_path, reason):
    file = write(tmp_path / "d.jsonl", GOOD, b"", BAD[reason], GOOD)
    rows = read(file)
    assert [r.id for r in rows] == ["d.jsonl:1", "d.jsonl:4"]  # blank lines are no rows
    (line,) = rows.report["malformed"]
    assert line.startswith("d.jsonl:3: ")
    assert reason in line


@pytest.mark.parametrize("reason", BAD)
def test_strict_stops_at_the_first_malformed_line(tmp_path, reason):
    file = write(tmp_path / "d.jsonl", GOOD, BAD[reason])
    with pytest.raises(ValueError, match=r"^d\.jsonl:2: "):
        read(file, strict=True)


def test_identical_sides_are_seen_across_forms(tmp_path):
    row = {"prompt": "p", "chosen": "c", "rejected": [assistant("c")]}
    assert (
        "identical"
        in read(write(tmp_path / "d.jsonl", GOOD, row)).report["malformed"][0]
    )


def test_empty_file_and_file_without_a_usable_row_are_errors(tmp_path):
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(ValueError, match=r"no usable row.*among 0"):
        read(str(tmp_path / "d.jsonl"))
    with pytest.raises(ValueError, match=r"among 1 rows.*d\.jsonl:1: not JSON"):
        read(write(tmp_path / "d.jsonl", b"{"))


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(FileNotFoundError, match=r"trian\.jsonl.*'train\.jsonl'"):
        read(str(tmp_path / "trian.jsonl"))


def test_damaged_files_are_errors(tmp_path):
    file = tmp_path / "d.jsonl.gz"
    write(file, *[GOOD] * 1000)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        read(str(file))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="damaged"):
        read(str(tmp_path / "d.parquet"))
    with pytest.raises(ValueError, match=r"\.jsonl, \.jsonl\.gz, \.parquet"):
        read(write(tmp_path / "d.csv", b"a,b"))


def test_held_out_prompts_are_the_same_in_every_order(tmp_path):
    rows = [GOOD | {"prompt": f"p{i % 50}", "chosen": f"c{i}"} for i in range(200)]
    a, b = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[::-1])

    def prompts(path, split):
        got = jsonl.examples(split=split, path=path, test_fraction=0.3)
        return {r.prompt for r in got}

    assert prompts(a, "test") == prompts(b, "test")
    assert not prompts(a, "test") & prompts(a, "train")
    assert len(prompts(a, "test") | prompts(a, "train")) == 50
    assert 5 <= len(prompts(a, "test")) <= 25  # 15 expected, 3 s.e.


def test_split_may_be_part_of_the_path(tmp_path):
    write(tmp_path / "dev.jsonl", GOOD)
    assert len(jsonl.examples(split="dev", path=str(tmp_path / "{split}.jsonl"))) == 1


def test_test_split_of_a_whole_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="test_fraction"):
        jsonl.examples(split="test", path=write(tmp_path / "d.jsonl", GOOD))


def test_examples_are_random_access(tmp_path):
    rows = read(write(tmp_path / "d.jsonl", *[GOOD] * 4))
    assert rows[-1].id == "d.jsonl:4"
    assert [r.id for r in rows[1:3]] == ["d.jsonl:2", "d.jsonl:3"]
    with pytest.raises(IndexError):
        rows[4]


def test_a_group_has_responses_and_scores():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0, 1.5, -2]}
    example = jsonl.parse("f:1", row)
    assert list(example.responses) == ["a", "b", "c"]
    assert example.feedback == (0.0, 1.5, -2.0)
    assert jsonl.parse("f:1", {**row, "scores": None}).feedback == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "expected 3 numbers"),
        ({"scores": [1.0, True, 2.0]}, "expected 3 numbers"),
        ({"scores": [1.0, float("nan"), 2.0]}, "expected 3 numbers"),
        ({"scores": [1.0, float("inf"), 2.0]}, "expected 3 numbers"),
        ({"responses": []}, "'responses' is empty"),
        ({"responses": ["a", "", "c"]}, "'response' is empty"),
    ],
)
def test_a_group_that_does_not_fit_is_malformed(change, message):
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0, 1, 2], **change}
    with pytest.raises(ValueError, match=message):
        jsonl.parse("f:1", row)


def test_groups_are_pairs_and_scored_responses_and_nothing_else(tmp_path):
    group = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0, 1, 2]}
    file = write(
        tmp_path / "d.jsonl",
        group,
        GOOD,
        {"prompt": "p", "responses": ["a", "b"]},
        {"prompt": "p", "responses": ["a"], "scores": [1]},
        {"prompt": "p"},
    )
    rows = read(file, kind="groups")
    assert [r.feedback for r in rows] == [(0, 1, 2), (1, 0)]
    unscored, single, empty = rows.report["malformed"]
    assert unscored == "d.jsonl:3: a group whose responses have no 'scores'"
    assert single == "d.jsonl:4: a group of 1, expected two responses or more"
    assert empty == "d.jsonl:5: a group of 0, expected two responses or more"


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_rows_with_one_id_are_refused_by_their_lines(tmp_path, split):
    rows = [GOOD | {"id": str(i), "prompt": f"p{i}"} for i in range(40)]
    file = write(tmp_path / "d.jsonl", *rows, GOOD | {"id": "7", "prompt": "other"})
    with pytest.raises(
        ValueError, match=r"^d\.jsonl:41 has the id of d\.jsonl:8, '7'$"
    ):
        jsonl.examples(split=split, path=file, test_fraction=0.3)


def test_an_id_may_not_be_that_of_another_line(tmp_path):
    file = write(tmp_path / "d.jsonl", GOOD | {"id": "d.jsonl:2"}, GOOD)
    with pytest.raises(ValueError, match=r"d\.jsonl:2 has the id of d\.jsonl:1"):
        read(file)


def test_a_malformed_row_takes_no_id(tmp_path):
    bad = {"prompt": "p", "chosen": "", "rejected": "r", "id": "a"}
    rows = read(write(tmp_path / "d.jsonl", bad, GOOD | {"id": "a"}))
    assert [r.id for r in rows] == ["a"]
