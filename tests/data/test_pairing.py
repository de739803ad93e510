"""Pairs from scored groups: by hand."""

import pytest

from alignax.batch import Example, form
from alignax.data import Examples, pairing

GROUPS = Examples(
    [
        Example("g:0", "p", ("a", "b", "c"), (0.5, 0.9, 0.1)),
        Example("g:1", "p", ("a", "b"), (0.5, 0.5)),
        Example("g:2", "p", ("same", "same"), (0.9, 0.1)),
    ]
)


def groups(*, split):
    del split
    return GROUPS


def make(**hyper):
    return pairing.examples(
        split="train", source={"name": f"{__name__}.groups"}, **hyper
    )


def test_best_against_worst_and_ties_are_dropped_and_named():
    rows = make()
    assert [(r.id, r.responses, r.feedback) for r in rows] == [
        ("g:0/0", ("b", "c"), (0.9, 0.1))
    ]
    assert [line.split(":")[1] for line in rows.report["dropped"]] == ["1", "2"]


def test_all_ordered_pairs_beyond_the_margin():
    assert [r.responses for r in make(strategy="all")] == [
        ("b", "a"),
        ("b", "c"),
        ("a", "c"),
    ]
    assert [r.responses for r in make(strategy="all", margin=0.5)] == [("b", "c")]


def test_best_against_random_draws_among_the_worse():
    drawn = {make(strategy="best_random", seed=s)[0].responses for s in range(20)}
    assert drawn == {("b", "a"), ("b", "c")}


def test_no_pair_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"no pair among 3 groups; first: .*g:0"):
        make(margin=1.0)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"strategy": "best"}, "strategy is 'best', expected one of"),
        ({"margin": -1.0}, "margin is -1.0"),
    ],
)
def test_bad_parameters_are_refused(hyper, message):
    with pytest.raises(ValueError, match=message):
        make(**hyper)


def test_a_group_without_scores_is_named(monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.GROUPS", Examples([Example("g:9", "p", ("a", "b"))])
    )
    with pytest.raises(ValueError, match="g:9: 2 responses, but 0 scores"):
        make()


def test_a_source_needs_a_name():
    with pytest.raises(ValueError, match="source has no 'name'"):
        pairing.examples(split="train", source={})


def test_pairs_are_pairs_whatever_their_scores():
    assert {form(row) for row in make(strategy="all")} == {"pairs"}
