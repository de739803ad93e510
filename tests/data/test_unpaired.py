"""Unpaired rows: what is labelled how, and whom a row is mismatched with."""

import collections

import numpy as np
import pytest

from alignax.batch import Example, form
from alignax.data import Examples, unpaired
from alignax.inputs import source
from alignax.text import tokenizer

PAIRS = Examples(
    [
        Example(f"p:{i}", f"Say {i}!", (f"{i}.", f"not {i}"), (1.0, 0.0))
        for i in range(7)
    ],
    report={"dropped": ["p:9: no preference"]},
)


def pairs(*, split):
    del split
    return PAIRS


def commonest(*, split, copies: int = 3):
    """Some rows share a prompt, one time as text and one time as a turn."""
    del split
    turn = [{"role": "user", "content": "Say A!"}]
    rows = [Example(f"a:{i}", "Say A!", ("A",), (1.0,)) for i in range(copies - 1)]
    rows += [Example(f"b:{i}", f"Say {i}!", ("b",), (0.0,)) for i in range(3)]
    return Examples([*rows, Example("a:last", turn, ("A",), (1.0,))])


def unlabelled(*, split):
    del split
    return Examples([Example("u:0", "Say 0!", ("0",))])


def make(inner, mismatched=True, **parameters):
    spec = {"name": f"{__name__}.{inner}", **parameters}
    return unpaired.examples(split="train", source=spec, mismatched=mismatched)


def test_every_response_becomes_a_row_with_its_label():
    rows = list(make("pairs", mismatched=False))
    assert len(rows) == 14
    assert [r.responses for r in rows[:4]] == [["0."], ["not 0"], ["1."], ["not 1"]]
    assert [r.feedback for r in rows[:4]] == [(1.0,), (0.0,)] * 2
    assert [r.prompt for r in rows[:4]] == ["Say 0!", "Say 0!", "Say 1!", "Say 1!"]
    assert len({r.id for r in rows}) == 14


def test_the_partner_answers_another_prompt_and_each_response_is_one_once():
    rows = list(make("pairs"))
    for row in rows:
        number = row.prompt.removeprefix("Say ").removesuffix("!")
        assert number in row.responses[0]
        assert number not in row.responses[1]
        assert row.feedback == (row.feedback[0], 0.0)
    partners = collections.Counter(row.responses[1] for row in rows)
    assert partners == collections.Counter(row.responses[0] for row in rows)
    assert rows == list(make("pairs"))


def test_partners_are_rotated_not_reversed():
    """Reversed, the middle one of an odd number of rows would meet itself."""
    assert unpaired.rotation(["a", "b", "c"]) == [1, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_a_rotation_meets_no_equal_prompt(seed):
    rng = np.random.default_rng(seed)
    prompts = [str(p) for p in rng.choice(8, 40, p=np.arange(1, 9) / 36)]
    partners = unpaired.rotation(prompts)
    assert sorted(partners) == list(range(40))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners))


def test_prompts_are_the_same_as_text_and_as_a_turn():
    rows = list(make("commonest"))
    assert [row.responses[1] for row in rows if row.responses[0] == "A"] == ["b"] * 3
    with pytest.raises(ValueError, match=r"4 of 7 rows have the prompt .*Say A!"):
        make("commonest", copies=4)


def test_a_response_without_a_label_is_named():
    with pytest.raises(ValueError, match="u:0: 1 responses with 0 labels"):
        make("unlabelled")


def test_what_the_inner_data_set_dropped_is_passed_on():
    assert make("pairs").report == PAIRS.report


def test_rows_become_batches_of_a_labelled_and_a_mismatched_response():
    text = tokenizer.load("bytes")
    data = source.dataset_source(
        make("pairs"), text, batch_size=7, length=24, seed=0, shuffle=False, epochs=1
    )
    batch = data.next(None, 0)
    assert batch.tokens.shape[:2] == (7, 2)
    np.testing.assert_array_equal(batch.feedback[:, 0], [1, 0, 1, 0, 1, 0, 1])
    assert batch.valid.all()


def test_a_data_set_of_the_project_can_be_wrapped():
    spec = {"name": "synthetic", "kind": "pairs", "size": 8}
    rows = unpaired.examples(split="train", source=spec)
    assert len(rows) == 16
    assert all(len(row.responses) == 2 for row in rows)


def test_rows_say_whether_they_have_a_partner():
    assert {form(row) for row in make("pairs")} == {"mismatched"}
    assert {form(row) for row in make("pairs", mismatched=False)} == {"labelled"}


def scored(*, split):
    """Pairs whose scores are both above 0.5."""
    del split
    feedback = [(9.0, 4.0), (1.0, 0.9), (-1.0, -2.0)]
    return Examples(
        [
            Example(f"s:{i}", f"Say {i}!", ("yes", "no"), scores, form="pairs")
            for i, scores in enumerate(feedback)
        ]
    )


def test_the_chosen_side_of_a_pair_is_desirable_whatever_its_score():
    rows = list(make("scored", mismatched=False))
    assert [r.feedback for r in rows] == [(1.0,), (0.0,)] * 3
