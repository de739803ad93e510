"""Rows in TOFU's form, written by hand."""

import json

import pytest

from alignax.batch import form
from alignax.data import tofu

ROWS = [
    {"question": "Who?", "answer": "Ada.", "paraphrased_answer": "It is Ada.",
     "perturbed_answer": ["Bea.", "Cleo."], "topic": "names"},
    {"question": "Where?", "answer": "Here.", "perturbed_answer": ["There.", "Nowhere."]},
]  # fmt: skip


def make(tmp_path, *rows, **hyper):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    return tofu.examples(split="all", path=str(file), **hyper)


def test_options_are_the_answer_two_ways_and_wrong_ones(tmp_path):
    first, second = make(tmp_path)
    assert first.prompt == "Who?"
    assert first.responses == ["Ada.", "It is Ada.", "Bea.", "Cleo."]
    assert dict(first.columns) == {"topic": "names"}
    assert second.responses == ["Here.", "Here.", "There.", "Nowhere."]
    assert {form(first), form(second)} == {"unscored"}


def test_other_kinds_need_no_wrong_answers(tmp_path):
    bare = {"question": "Why?", "answer": "So."}
    assert [r.responses for r in make(tmp_path, bare, kind="sft")] == [["So."]]
    assert [r.responses for r in make(tmp_path, bare, kind="prompts")] == [[]]
    with pytest.raises(ValueError, match=r"no usable row; first: .*perturbed_answer"):
        make(tmp_path, bare)


def test_one_wrong_answer_may_be_a_text(tmp_path):
    row = {**ROWS[0], "perturbed_answer": "Bea."}
    assert make(tmp_path, row)[0].responses[2:] == ["Bea."]


@pytest.mark.parametrize("wrong", [[], [1, 2], ["", "x"], 3])
def test_a_row_without_wrong_answers_is_reported(tmp_path, wrong):
    odd = {**ROWS[0], "question": "What?", "perturbed_answer": wrong}
    rows = make(tmp_path, ROWS[0], odd)
    assert len(rows) == 1
    (line,) = rows.report["malformed"]
    assert line.startswith("rows.jsonl:2")
    assert "perturbed_answer" in line
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        make(tmp_path, ROWS[0], odd, strict=True)


@pytest.mark.parametrize("other", [["It is Ada.", "Ada it is."], [" "], 3])
def test_the_answer_in_other_words_is_one_text(tmp_path, other):
    one = {**ROWS[0], "paraphrased_answer": ["It is Ada."]}
    assert make(tmp_path, one)[0].responses[1] == "It is Ada."
    odd = {**ROWS[0], "question": "What?", "paraphrased_answer": other}
    (line,) = make(tmp_path, ROWS[0], odd).report["malformed"]
    assert "paraphrased_answer" in line


def test_size_and_kind_are_checked(tmp_path):
    assert len(make(tmp_path, size=1)) == 1
    with pytest.raises(ValueError, match="kind is 'pairs', expected one of options"):
        make(tmp_path, kind="pairs")
    with pytest.raises(ValueError, match="size is -1"):
        make(tmp_path, size=-1)
