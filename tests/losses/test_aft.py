"""AFT: numbers by hand, and what each constraint does to the negatives."""

import math

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import aft

SCORES, LABELS = [-1.0, -2.0, -1.5], [1, 1, 0]  # two positives, one negative


def test_golden_number():
    """B = -2.5, T = (-4, -3); the first positive has nll 1."""
    pairs = math.exp(-1.5 + 1) + math.exp(-1.5 + 2)
    bounds = math.exp(-4 + 1.5) + math.exp(-3 + 1.5)
    for constraint, more in {"none": 0, "detached": 0, "boundary": bounds}.items():
        got = cost(aft.loss, SCORES, LABELS, constraint=constraint, slack=0.5, lam=2.0)
        assert got == pytest.approx(math.log(1 + pairs + more) + 2, rel=1e-6)


@pytest.mark.parametrize("slack", [0.0, 0.1, 0.7])
def test_a_negative_is_at_rest_on_the_boundary(slack):
    def slope(negative):
        scores = [-1.0, -2.0, negative]
        return slopes(aft.loss, scores, LABELS, constraint="boundary", slack=slack)[2]

    boundary = -2.0 - slack
    assert slope(boundary) == pytest.approx(0, abs=1e-6)
    assert slope(boundary + 0.1) > 0.01  # pushed down
    assert slope(boundary - 0.1) < -0.01  # pushed up


def test_the_boundary_is_a_constant_to_the_positives():
    """By s_p: -exp(s_n - s_p) / Z, whatever B and T are made of."""
    pairs = np.array([math.exp(-1.5 + 1), math.exp(-1.5 + 2)])
    total = 1 + pairs.sum() + math.exp(-4 + 1.5) + math.exp(-3 + 1.5)
    slope = slopes(aft.loss, SCORES, LABELS, slack=0.5, lam=0.0)
    np.testing.assert_allclose(slope[:2], -pairs / total, rtol=1e-5)


def test_detached_gives_negatives_no_gradient():
    slope = slopes(aft.loss, SCORES, LABELS, constraint="detached", lam=0.0)
    assert slope[2] == 0
    assert (slope[:2] < 0).all()


def test_without_a_constraint_negatives_are_always_pushed_down():
    for negative in (-1.0, -10.0):
        scores = [-1.0, -2.0, negative]
        assert slopes(aft.loss, scores, LABELS, constraint="none")[2] > 0


@pytest.mark.parametrize("label, value", [(0, 0.0), (1, 1.0)])
def test_with_one_label_alone_the_first_positive_is_imitated(label, value):
    assert cost(aft.loss, SCORES, [label] * 3) == pytest.approx(value)


@pytest.mark.parametrize("constraint", aft.CONSTRAINTS)
def test_ragged_groups_are_those_of_the_oracle(make_batch, constraint):
    assert_oracle(
        aft.loss, oracle.aft, make_batch, labels=True, constraint=constraint, slack=0.3,
        lam=0.7,
    )  # fmt: skip


def test_an_unknown_constraint_and_a_single_response_are_errors():
    with pytest.raises(ValueError, match="'bound'; known: none, detached, boundary"):
        aft.loss(*group(SCORES, LABELS), constraint="bound")
    with pytest.raises(ValueError, match=r"aft compares .* one per prompt: use"):
        aft.loss(*group([-1.0], [1]))


def test_metrics_show_where_the_negatives_are():
    _, metrics = aft.loss(*group(SCORES, LABELS))
    assert float(metrics["score_negative"][0]) == pytest.approx(-1.5)
    assert float(metrics["accuracy"][0]) == 0.5
    np.testing.assert_allclose(metrics["margin"], 0, atol=1e-6)
