"""People's own files: every form is read, and nothing bad passes silently."""

import gzip
import json
import pathlib
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from alignax.batch import Example, form
from alignax.data import jsonl

CASES = pathlib.Path(__file__).parents[3] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")
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
    "expected role and content": {"messages": [{"text": "a"}]},
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


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_the_place_is_appended_to_an_id_that_another_row_has(tmp_path, split):
    rows = [GOOD | {"id": str(i), "prompt": f"p{i % 30}"} for i in range(40)]
    more = [GOOD | {"id": x, "prompt": "p7"} for x in ("7", 7, "7 (d.jsonl:41)")]
    file = write(tmp_path / "d.jsonl", *rows, *more)
    got = jsonl.examples(split=split, path=file, test_fraction=0.3)
    ids = [r.id for r in got]
    assert len({*ids}) == len(ids)
    if "7" in ids:
        assert ids[-3:] == [
            "7 (d.jsonl:41)", "7 (d.jsonl:42)", "7 (d.jsonl:41) (d.jsonl:43)",
        ]  # fmt: skip
    assert [r.id for r in got] == [got[i].id for i in range(len(got))]


def test_an_id_may_be_the_place_of_another_row(tmp_path):
    for rows, want in (
        ([GOOD | {"id": "d.jsonl:2"}, GOOD], ["d.jsonl:2", "d.jsonl:2 (d.jsonl:2)"]),
        ([GOOD, GOOD | {"id": "d.jsonl:1"}], ["d.jsonl:1", "d.jsonl:1 (d.jsonl:2)"]),
        ([GOOD | {"id": "d.jsonl:1"}, GOOD], ["d.jsonl:1", "d.jsonl:2"]),
    ):
        assert [r.id for r in read(write(tmp_path / "d.jsonl", *rows))] == want


def test_a_malformed_row_takes_no_id(tmp_path):
    bad = {"prompt": "p", "chosen": "", "rejected": "r", "id": "a"}
    rows = read(write(tmp_path / "d.jsonl", bad, GOOD | {"id": "a"}))
    assert [r.id for r in rows] == ["a"]


def test_rows_are_read_again_and_not_held(tmp_path):
    file = write(tmp_path / "d.jsonl", *[GOOD] * 3)
    rows = read(file)
    assert rows[0] == rows[0]
    assert rows[0] is not rows[0]
    assert rows[0:2][1].id == "d.jsonl:2"
    assert rows.files == (file,)
    write(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(ValueError, match="has changed while it was being read"):
        rows[0]


def test_a_split_that_would_be_empty_says_what_to_set(tmp_path):
    file = write(tmp_path / "d.jsonl", GOOD, GOOD)
    for split, fraction, word in (("test", 1e-9, "larger"), ("train", 1 - 1e-9, "smaller")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"among 2 rows.*set a {word} one, test_fraction=0 for"):  # fmt: skip
            jsonl.examples(split=split, path=file, test_fraction=fraction)
    for bad in (1.5, -0.1, True, float("nan")):
        with pytest.raises(ValueError, match=r"test_fraction is .*, expected 0 to 1"):
            jsonl.examples(split="train", path=file, test_fraction=bad)


def test_a_fraction_of_zero_is_no_test(tmp_path):
    file = write(tmp_path / "d.jsonl", GOOD, b"{", GOOD)
    assert len(jsonl.examples(split="train", path=file, test_fraction=0)) == 2
    none = jsonl.examples(split="test", path=file, test_fraction=0)
    assert len(none) == 0
    assert list(none) == []
    assert len(none.report["malformed"]) == 1


def test_keys_of_the_file_may_have_other_names(tmp_path):
    rows = [{"question": "p", "good": "c", "bad": "r"}, {"question": "q", "bad": "r"}]
    names = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    file = write(tmp_path / "d.jsonl", *rows)
    got = read(file, columns=names)
    assert list(got) == [Example("d.jsonl:1", "p", ["c", "r"], (1.0, 0.0))]
    assert "'chosen' is missing" in got.report["malformed"][0]
    with pytest.raises(ValueError, match=r"'qestion'.*did you mean 'question'"):
        read(file, columns={"qestion": "prompt"})
    with pytest.raises(ValueError, match=r"did you mean 'prompt'"):
        read(file, columns={"question": "promt"})


def test_a_pair_in_the_wrong_order_is_dropped_by_name(tmp_path):
    scored = GOOD | {"score_chosen": 2, "score_rejected": 7}
    file = write(tmp_path / "d.jsonl", GOOD, scored, b"{")
    rows = read(file)
    assert [r.id for r in rows] == ["d.jsonl:1"]
    assert rows.report["dropped"] == ["d.jsonl:2: chosen is scored 2, below rejected with 7"]  # fmt: skip
    assert len(rows.report["malformed"]) == 1
    with pytest.raises(ValueError, match=r"^d\.jsonl:2: chosen is scored 2"):
        read(file, strict=True)
    only = write(tmp_path / "e.jsonl", scored)
    with pytest.raises(
        ValueError, match=r"first dropped row e\.jsonl:1: chosen is scor"
    ):
        read(only)


HOSTILE = {
    "surrogate": b'{"prompt": "p", "chosen": "c\\ud83d", "rejected": "r"}',
    "surrogate in an id": b'{"id": "\\udc00", "prompt": "p"}',
    "long integer": b'{"prompt": "p", "n": 1' + b"0" * 5000 + b"}",
    "label": b'{"prompt": "p", "response": "r", "label": 1' + b"0" * 400 + b"}",
    "score": b'{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1e999]}',
    "infinite column": b'{"prompt": "p", "n": -Infinity}',
    "twice": b'{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}',
    "deep": b'{"prompt": "p", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "label in words": b'{"prompt": "p", "response": "r", "label": "true"}',
}


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_row_is_one_malformed_row(tmp_path, name, kind):
    rows = read(write(tmp_path / name, GOOD, HOSTILE[kind], GOOD))
    assert [r.id for r in rows] == [f"{name}:1", f"{name}:3"]
    (line,) = rows.report["malformed"]
    assert line.startswith(f"{name}:2: ")
    assert len(line) < 200
    line.encode()


@needs_cases
@pytest.mark.parametrize(
    "name, used",
    [("consecutive_user.jsonl", 1), ("content_none_toolcalls.jsonl", 2),
     ("developer_role.jsonl", 1), ("dup_id.jsonl", 2), ("five_pairs.jsonl", 5),
     ("int_id.jsonl", 2), ("kto_label.jsonl", 2), ("one_json_array.json", 2),
     ("pairs_all.jsonl", 64), ("two_system.jsonl", 1), ("utf16.jsonl", 1)],
)  # fmt: skip
def test_the_shared_rows_are_all_used(name, used):
    rows = read(str(CASES / "rows" / name))
    assert len(rows) == used
    assert rows.report == {}
    assert len({r.id for r in rows}) == used
    if name == "dup_id.jsonl":
        assert [r.id for r in rows] == ["x1", "x1 (dup_id.jsonl:2)"]
    if name == "int_id.jsonl":
        assert [r.id for r in rows] == ["1", "1 (int_id.jsonl:2)"]
    if name == "kto_label.jsonl":
        assert [(form(r), r.feedback) for r in rows] == [("labelled", (1.0,)), ("labelled", (0.0,))]  # fmt: skip


@needs_cases
@pytest.mark.parametrize(
    "name", ["bigint_400_label", "bigint_5000", "surrogate_prompt", "surrogate_response"]
)  # fmt: skip
def test_the_shared_hostile_rows_are_one_each(name):
    rows = read(str(CASES / "hostile" / "rows" / f"{name}.jsonl"))
    assert len(rows) == 20
    assert [*rows.report] == ["malformed"]
    assert len(rows.report["malformed"]) == 1


@needs_cases
def test_the_shared_keys_of_messages_stay():
    def first(name):
        return read(str(CASES / "message_keys_dropped" / f"{name}.jsonl"))[0]

    assert first("kwargs").template == {"enable_thinking": False}
    assert first("reasoning").responses[0][0]["reasoning_content"] == "Easy one."
    assert [m.get("weight") for m in first("weight").responses[0]] == [0, None, 1]
    tools = first("tools")
    assert tools.template["tools"][0]["function"]["name"] == "clock"
    assert tools.responses[0][0]["tool_calls"][0]["function"]["name"] == "clock"


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    rows = [{"id": i, "prompt": f"p{i}", "response": "long " * 8000} for i in range(400)]  # fmt: skip
    if name == "d.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        write(tmp_path / name, *rows)
    del rows
    read(str(tmp_path / name))  # what is made once
    tracemalloc.start()
    try:
        got = read(str(tmp_path / name))
        assert sum(len(r.responses[0]) for r in got) == 400 * 40_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8e6  # of 16 MB
