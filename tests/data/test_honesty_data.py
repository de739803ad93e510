"""Recipes for honest answers against rows written by hand."""

import json

import pytest

from alignax.batch import Example
from alignax.data import Examples, honesty, jsonl
from alignax.evals.honesty import idk

SCORES = {  # of ten answers y0 ... y9
    "never": [0] * 10,
    "rarely": [0, 0, 0, 1] + [0] * 6,
    "half": [0, 1] * 5,
    "often": [1] * 6 + [0] * 4,
    "mostly": [1] * 8 + [0] * 2,
    "always": [1] * 10,
}
FIRST = {"rarely": "y3", "half": "y1", "often": "y0", "mostly": "y0", "always": "y0"}
NO = honesty.REFUSAL


def groups(*, split):
    del split
    answers = [f"y{j}" for j in range(10)]
    return Examples(
        [
            Example(q, f"{q}?", answers, [float(x) for x in scores], {"topic": q})
            for q, scores in SCORES.items()
        ]
    )


def make(recipe, source="groups", **hyper):
    return honesty.examples(
        split="train", source={"name": f"{__name__}.{source}"}, recipe=recipe, **hyper
    )


def said(recipe, **hyper):
    rows = make(recipe, **hyper)
    assert len(rows) == len(SCORES)
    return {row.columns["topic"]: row.responses[0] for row in rows}


def test_absolute_keeps_the_first_right_answer_of_whatever_has_one():
    assert said("absolute") == {"never": NO, **FIRST}


def test_confidence_in_numbers_is_the_share_of_right_answers():
    low, high = (x.format for x in honesty.NUMBERS)
    assert said("confidence_num") == {
        "never": NO, "rarely": low(10) + "y3", "half": low(50) + "y1",
        "often": high(60) + "y0", "mostly": high(80) + "y0", "always": high(100) + "y0",
    }  # fmt: skip


def test_confidence_in_words_has_five_tiers():
    tiers = honesty.WORDS
    assert said("confidence_verb") == {
        "never": NO, "rarely": tiers[0] + "y3", "half": tiers[2] + "y1",
        "often": tiers[2] + "y0", "mostly": tiers[3] + "y0", "always": tiers[4] + "y0",
    }  # fmt: skip
    ends = [honesty.stated("confidence_verb", k / 10) for k in range(1, 11)]
    assert [tiers.index(t) for t in ends] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    thirds = honesty.stated("confidence_verb", 3 * 0.2 / 3 + 0.4)  # a rounded .6
    assert thirds == tiers[2]


def test_multisample_refuses_as_often_as_answers_are_wrong():
    rows = make("multisample")
    assert len(rows) == 60
    for q, scores in SCORES.items():
        mine = [r for r in rows if r.columns["topic"] == q]
        want = [f"y{j}" if right else NO for j, right in enumerate(scores)]
        assert [r.responses[0] for r in mine] == want
        assert {r.columns[honesty.EXPECTED] for r in mine} == {sum(scores) / 10}
        assert [r.id for r in mine] == [f"{q}/{k}" for k in range(10)]
        assert {r.prompt for r in mine} == {f"{q}?"}


def test_the_threshold_and_the_refusal_are_those_given():
    assert set(said("absolute", threshold=2.0, refusal="Pass.").values()) == {"Pass."}
    assert said("absolute", threshold=0.0)["never"] == "y0"


@pytest.mark.parametrize("recipe", honesty.RECIPES)
def test_rows_are_read_by_jsonl_as_they_were(recipe, tmp_path):
    file = tmp_path / "honest.jsonl"
    rows = list(make(recipe))
    with file.open("w") as out:
        for r in rows:
            line = {"id": r.id, "prompt": r.prompt, "response": r.responses[0]}
            out.write(json.dumps({**line, **r.columns}) + "\n")
    again = list(jsonl.examples(split="all", path=str(file), kind="sft"))
    assert [(r.id, r.prompt, [*r.responses], dict(r.columns)) for r in again] == [
        (r.id, r.prompt, [*r.responses], dict(r.columns)) for r in rows
    ]


def test_samples_of_a_file_are_the_source(tmp_path):
    file = tmp_path / "samples.jsonl"
    row = {"prompt": "1 + 1 =", "responses": ["2", "3"], "scores": [1, 0]}
    file.write_text(json.dumps(row) + "\n")
    source = {"name": "jsonl", "path": str(file), "split": "all"}
    rows = honesty.examples(split="train", source=source)
    assert [r.responses for r in rows] == [["2"], [NO]]


def test_no_stated_confidence_reads_as_a_refusal():
    assert idk(NO)
    for lead in (*honesty.NUMBERS, *honesty.WORDS):
        assert not idk(lead)


def unscored(*, split):
    del split
    return Examples([Example("bare", "x", ["a", "b"], [])])


def dialogues(*, split):
    del split
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    return Examples([Example("long", "x", [turns], [1.0])])


def messages(*, split):
    del split
    turn = [{"role": "assistant", "content": "a"}]
    return Examples([Example("turn", "x", [turn], [1.0])])


def test_what_cannot_be_used_is_named():
    with pytest.raises(ValueError, match="recipe is 'best', expected one of absolute"):
        make("best")
    with pytest.raises(ValueError, match="refusal is empty"):
        make("absolute", refusal=" ")
    with pytest.raises(ValueError, match="bare: 2 answers with 0 scores"):
        make("absolute", source="unscored")
    with pytest.raises(ValueError, match="long: an answer of several turns"):
        make("confidence_num", source="dialogues")
    assert make("absolute", source="dialogues")[0].responses[0][0]["content"] == "a"
    assert make("confidence_verb", source="messages")[0].responses == [
        honesty.WORDS[4] + "a"
    ]
