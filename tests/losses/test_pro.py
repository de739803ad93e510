"""PRO: numbers by hand."""

import math

import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import pro

SCORES, FEEDBACK = [-1.0, -2.0, -0.5], [2, 1, 0]


def test_golden_number():
    """Best: exponents -1*2, -2*1, -0.5*2; second: -2*1, -0.5*1; the best has nll 1."""
    best = math.log(1 + math.exp(-2 + 2) + math.exp(-1 + 2))
    second = math.log(1 + math.exp(-0.5 + 2))
    assert best + second == pytest.approx(3.252857991)
    got = cost(pro.loss, SCORES, FEEDBACK, lam=0.5)
    assert got == pytest.approx(3.252857991 + 0.5, rel=1e-6)


@pytest.mark.parametrize("gap", [1.0, 3.0])
def test_a_pair_is_a_logistic_loss_at_the_gap_of_its_rewards(gap):
    got = cost(pro.loss, [-0.4, -1.1], [gap, 0], lam=0.0)
    assert got == pytest.approx(math.log(1 + math.exp(-gap * 0.7)), rel=1e-6)


def test_gradient_raises_the_best_and_lowers_the_worst():
    slope = slopes(pro.loss, SCORES, FEEDBACK, lam=0.0)
    assert slope[0] < 0 < slope[2]


def test_ties_are_never_compared():
    assert cost(pro.loss, [-3, -1], [1, 1], lam=0.0) == 0


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(pro.loss, oracle.pro, make_batch, lam=0.7)


def test_a_single_response_is_no_ranking():
    with pytest.raises(ValueError, match=r"pro ranks .* one per prompt: use"):
        pro.loss(*group([-1.0], [1]))
