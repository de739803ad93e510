"""GSM8K: rows, prompts, solutions to imitate, and what is no problem of it."""

import json

import pytest
import tiny

from alignax.data import gsm8k

REAL = tiny.ROOT.parent / "shared/data/gsm8k/train.jsonl"
ROWS = [
    ("How many apples?", "2+3=<<2+3=5>>5 apples.\n#### 5"),
    ("How many\ngrains?", "Many.\n#### 1,234,567"),
    ("How cold?", "It is 3-5=<<3-5=-2>>-2 degrees.\n#### -2\n"),
    ("How long?", "Half.\n#### 0.50"),
]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    return write


def test_a_problem_is_a_prompt_with_its_answer_in_the_columns(write):
    found = gsm8k.examples(
        split="train", path=write(ROWS), instruction="End with ####."
    )
    assert [x.columns["answer"] for x in found] == ["5", "1234567", "-2", "0.50"]
    assert [x.prompt for x in found] == [f"{q}\n\nEnd with ####." for q, _ in ROWS]
    assert [x.columns["solution"] for x in found] == [a for _, a in ROWS]
    assert all(not x.responses for x in found)
    assert found[1].id == "train.jsonl:2"
    assert found.report == {}
    assert found.carried == ()


def test_the_prompt_asks_for_the_mark_unless_told_otherwise(write):
    path = write(ROWS)
    assert "####" in gsm8k.examples(split="train", path=path)[0].prompt
    found = gsm8k.examples(split="train", path=path, instruction="", system="Be brief.")
    assert found[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many apples?"},
    ]


def test_a_solution_can_be_imitated_with_and_without_marks(write):
    path = write(ROWS)
    found = gsm8k.examples(split="train", path=path, kind="sft")
    assert found[0].responses == ["2+3=5 apples.\n#### 5"]
    assert found[0].columns["answer"] == "5"
    found = gsm8k.examples(split="train", path=path, kind="sft", marks=True)
    assert found[0].responses == [ROWS[0][1]]


def test_questions_are_held_out_whatever_the_instruction(write):
    path = write([(f"Question {i}?", f"#### {i}") for i in range(200)])
    kept = {}
    for text in ("", "Answer!"):
        parts = [
            gsm8k.examples(split=s, path=path, test_fraction=0.3, instruction=text)
            for s in ("train", "test")
        ]
        assert sum(map(len, parts)) == 200
        assert 35 < len(parts[1]) < 85
        kept[text] = [x.columns["answer"] for x in parts[1]]
    assert kept[""] == kept["Answer!"]
    assert len(gsm8k.examples(split="train", path=path, size=7)) == 7


def test_the_files_of_two_splits(write, tmp_path):
    write(ROWS)
    write(ROWS[:1], "test.jsonl")
    path = str(tmp_path / "{split}.jsonl")
    assert len(gsm8k.examples(split="train", path=path)) == 4
    assert len(gsm8k.examples(split="test", path=path)) == 1


@pytest.mark.parametrize(
    "bad",
    ["no mark", "#### ", "#### five", "#### 5 and more", "5 ####", "", "#### 1/2"],
)
def test_a_solution_without_a_number_is_malformed(write, bad):
    path = write([*ROWS, ("What?", bad)])
    found = gsm8k.examples(split="train", path=path)
    assert len(found) == 4
    assert len(found.report["malformed"]) == 1
    assert found.report["malformed"][0].startswith("train.jsonl:5: ")
    with pytest.raises(ValueError, match=r"train\.jsonl:5"):
        gsm8k.examples(split="train", path=path, strict=True)


def test_errors_say_what_to_do(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*other\.jsonl; files"):
        gsm8k.examples(split="train", path=str(tmp_path / "other.jsonl"))
    with pytest.raises(ValueError, match=r"path is empty, expected a file of GSM8K"):
        gsm8k.examples(split="train", path="")
    path = write(ROWS)
    with pytest.raises(
        ValueError, match=r"kind is 'pairs', expected one of prompts, sft"
    ):
        gsm8k.examples(split="train", path=path, kind="pairs")
    with pytest.raises(ValueError, match="size is -1"):
        gsm8k.examples(split="train", path=path, size=-1)
    with pytest.raises(ValueError, match="test_fraction"):
        gsm8k.examples(split="test", path=path)
    with pytest.raises(
        ValueError, match=r"no usable row; first: train\.jsonl:1: 'answer'"
    ):
        gsm8k.examples(split="train", path=write([("a", "b")]))


@pytest.mark.skipif(not REAL.is_file(), reason="needs the GSM8K file")
def test_every_row_of_the_real_file_is_read():
    found = gsm8k.examples(split="all", path=str(REAL))
    assert len(found) == 3000
    assert found.report == {}
    for example in found:
        number = str(example.columns["solution"]).rsplit("#### ")[-1]
        assert float(str(example.columns["answer"])) == float(number.replace(",", ""))
