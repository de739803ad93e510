"""Plackett-Luce: numbers by hand, and what an order of responses means."""

import math

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import dpo, plackett_luce


def test_golden_number():
    """r = (1, 0, -1): log(1 + e^-1 + e^-2) + log(1 + e^-1)."""
    got = cost(plackett_luce.loss, [1.0, 0.0, -1.0], [2, 1, 0], beta=0.5)
    assert got == pytest.approx(0.40760596 + 0.31326169, abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_policy_equal_to_reference_finds_all_orders_equally_likely(size):
    scores = [-1.0] * size
    got = cost(plackett_luce.loss, scores, list(range(size)), ref=scores)
    assert got == pytest.approx(math.log(math.factorial(size)), rel=1e-6)


@pytest.mark.parametrize("feedback, order", [((1, 0), (0, 1)), ((-3, 7), (1, 0))])
def test_two_responses_are_dpo(feedback, order):
    scores = np.array([-0.4, -1.1])
    got = cost(plackett_luce.loss, scores, feedback, beta=0.7)
    chosen_first = cost(dpo.loss, scores[list(order)], (1, 0), beta=0.7)
    assert got == pytest.approx(chosen_first, rel=1e-6)


def test_ties_are_never_compared():
    """r = (1, 0, -1), the first two tied: each only against the third."""
    got = cost(plackett_luce.loss, [1.0, 0.0, -1.0], [1, 1, 0], beta=0.5)
    assert got == pytest.approx(0.12692801 + 0.31326169, abs=1e-6)
    _, metrics = plackett_luce.loss(*group([1.0, 0.0, -1.0], [1, 1, 0]), beta=0.5)
    assert float(metrics["accuracy"][0]) == 1
    assert float(metrics["margin"][0]) == pytest.approx(1.5, rel=1e-6)


def test_gradient_raises_the_best_and_lowers_the_worst():
    slope = slopes(plackett_luce.loss, [-1.0, -1.5, -0.7], [0, 2, 1])
    assert slope[1] < 0 < slope[0]
    assert slope.sum() == pytest.approx(0, abs=1e-6)


def test_random_orders_are_those_of_the_oracle(make_batch):
    assert_oracle(plackett_luce.loss, oracle.plackett_luce, make_batch, beta=0.8)


def test_a_single_response_is_no_ranking():
    with pytest.raises(
        ValueError, match=r"plackett_luce orders .* one per prompt: use"
    ):
        plackett_luce.loss(*group([-1.0], [1]))
