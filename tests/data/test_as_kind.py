"""What a row becomes as a pair, a group, a response to imitate or a prompt."""

import pytest

from alignax.batch import Example, form
from alignax.data import KINDS, as_kind, best_first


def row(responses, feedback=(), **more):
    return Example("r", "Q", responses, feedback, **more)


PAIR = row(["good", "bad"], (1.0, 0.0))


@pytest.mark.parametrize("scores", [(1.0, 9.0), (0.0, 1.0), (-2.0, -1.5)])
def test_two_scored_responses_are_a_pair_in_the_order_of_their_scores(scores):
    back = scores[::-1]
    for given in (row(["bad", "good"], scores), row(["good", "bad"], back)):
        pair = as_kind(given, "pairs")
        assert (list(pair.responses), pair.feedback) == (["good", "bad"], back)
        assert form(pair) == "pairs"


def test_a_pair_stays_as_it_is():
    assert as_kind(PAIR, "pairs") is PAIR
    declared = row(["good", "bad"], (3.0, 7.0), form="pairs")
    assert as_kind(declared, "pairs") is declared


@pytest.mark.parametrize(
    "example, text",
    [
        (row(["a", "b"], (3.0, 3.0)), "the score 3: a tie.*data.pairing"),
        (row(["a", "b", "c"], (3.0, 2.0, 1.0)), "3 responses.*data.pairing"),
        (row(["a", "b"]), "without 'scores'"),
        (row(["a"], (1.0,)), "no pair, but one response with a label"),
        (row(["a"]), "no pair, but one response to imitate"),
        (row(["a", "b"], (1.0, 0.0), form="mismatched"), "answers another prompt"),
        (row([]), "a prompt alone"),
    ],
)
def test_what_is_no_pair_says_why(example, text):
    with pytest.raises(ValueError, match=text):
        as_kind(example, "pairs")


def test_the_response_to_imitate_is_the_chosen_or_the_best_one():
    want = row(["good"])
    assert as_kind(PAIR, "sft") == want
    assert as_kind(row(["bad", "good", "poor"], (1.0, 9.0, 3.0)), "sft") == want
    assert as_kind(row(["good"], (1.0,)), "sft") == want
    assert as_kind(row(["good", "x"], (1.0, 0.0), form="mismatched"), "sft") == want
    assert form(as_kind(row(["a", "b"], (9.0, 4.0), form="pairs"), "sft")) == (
        "demonstrations"
    )
    for example in (row(["bad"], (0.0,)), row(["bad", "x"], (0, 0), form="mismatched")):
        with pytest.raises(ValueError, match="the label is 0, not above"):
            as_kind(example, "sft")


def test_a_prompt_is_left_of_every_row():
    for example in (PAIR, row(["a"]), row(["a", "b"], (9.0, 4.0), form="pairs")):
        assert form(as_kind(example, "prompts")) == "prompts"


def test_groups_are_pairs_or_more_with_scores():
    assert as_kind(PAIR, "groups") == PAIR
    with pytest.raises(ValueError, match="no 'scores'"):
        as_kind(row(["a", "b"]), "groups")
    with pytest.raises(ValueError, match="a group of 1"):
        as_kind(row(["a"], (1.0,)), "groups")
    with pytest.raises(ValueError, match="answers another prompt"):
        as_kind(row(["a", "b"], (1.0, 0.0), form="mismatched"), "groups")


def test_other_kinds_are_an_error():
    with pytest.raises(ValueError, match="kind is 'pair', expected one of"):
        as_kind(PAIR, "pair")
    assert KINDS == ("pairs", "sft", "prompts", "groups")


def test_the_best_response_of_a_group_comes_first():
    got = best_first(row(["b", "c", "a"], (2.0, 1.0, 3.0)))
    assert list(got.responses) == ["a", "b", "c"]
    assert got.feedback == (3.0, 2.0, 1.0)
    for same in (
        PAIR,
        row(["a"]),
        row(["a", "b"]),
        row(["a", "b"], (1, 2), form="pairs"),
    ):
        assert best_first(same) is same
