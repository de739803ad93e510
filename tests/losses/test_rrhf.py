"""RRHF: numbers by hand."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import rrhf

SCORES, FEEDBACK = [-1.0, -2.0, -0.5], [2, 1, 0]


@pytest.mark.parametrize("lam", [0.0, 1.0, 0.5])
def test_golden_number(lam):
    """Pairs in the wrong order: 1 and 3 by 0.5, 2 and 3 by 1.5; the best has nll 1."""
    assert cost(rrhf.loss, SCORES, FEEDBACK, lam=lam) == pytest.approx(2.0 + lam)


def test_scores_are_means_over_tokens():
    got = cost(rrhf.loss, SCORES, FEEDBACK, lengths=[5, 1, 3])
    assert got == pytest.approx(3.0, rel=1e-6)


def test_a_right_order_costs_the_likelihood_of_the_best_alone():
    slope = slopes(rrhf.loss, [-1.0, -0.2, -0.5], [0, 2, 1])
    np.testing.assert_allclose(slope, [0, -1, 0])


def test_gradient_of_a_wrong_pair():
    """Pairs 1 > 3 and 2 > 3 are wrong: each pushes by one."""
    slope = slopes(rrhf.loss, SCORES, FEEDBACK, lam=0.0)
    np.testing.assert_allclose(slope, [-1, -1, 2])


def test_ties_are_never_compared():
    assert cost(rrhf.loss, [-3.0, -1.0], [1, 1], lam=0.0) == 0
    _, metrics = rrhf.loss(*group([-3.0, -1.0], [1, 1]))
    assert float(metrics["accuracy"][0]) == 0.5


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(rrhf.loss, oracle.rrhf, make_batch, lam=0.7)


def test_a_single_response_is_no_ranking():
    with pytest.raises(ValueError, match=r"rrhf ranks .* one per prompt: use"):
        rrhf.loss(*group([-1.0], [1]))
