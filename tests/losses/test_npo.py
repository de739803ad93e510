"""NPO: numbers by hand, and what it has in common with gradient ascent."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import npo


def test_golden_number():
    """beta = 0.5: a log-ratio of 2 costs 4 softplus(1); a retain row of nll 1.5 costs 3."""
    assert cost(npo.loss, [1.0], [0], beta=0.5) == pytest.approx(5.25304675, rel=1e-6)
    assert cost(npo.loss, [-1.5], [1], retain_weight=2.0) == pytest.approx(3.0)


def test_a_prompt_with_both_kinds_costs_their_mean():
    got = cost(npo.loss, [1.0, -1.5], [0, 1], beta=0.5, retain_weight=2.0)
    assert got == pytest.approx((5.25304675 + 3) / 2, rel=1e-6)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_at_the_reference_the_gradient_is_that_of_gradient_ascent(beta):
    """By log pi(y): 1, whatever beta; the score of two tokens counts twice."""
    slope = slopes(npo.loss, [-1.0], [0], ref=[-1.0], beta=beta)
    np.testing.assert_allclose(slope, 2.0, rtol=1e-6)


@pytest.mark.parametrize("ratio", [-8.0, -1.0, 3.0])
def test_gradient_is_gradient_ascent_times_a_weight_that_vanishes(ratio):
    weight = 2 / (1 + np.exp(-0.5 * ratio))
    slope = slopes(npo.loss, [ratio / 2], [0], beta=0.5)
    np.testing.assert_allclose(slope, 2 * weight, rtol=1e-5)
    _, metrics = npo.loss(*group([ratio / 2], [0]), beta=0.5)
    assert float(metrics["forget_weight"][0]) == pytest.approx(weight, rel=1e-5)


def test_small_beta_is_gradient_ascent():
    """L - 2/beta log 2 = rho + beta rho^2 / 4 - ..., here with rho = -3."""
    value = cost(npo.loss, [-1.5], [0], beta=0.01)
    assert value - 200 * np.log(2) == pytest.approx(-3 + 0.0225, abs=1e-3)


def test_a_forgotten_row_costs_nothing_and_is_left_alone():
    assert cost(npo.loss, [-500.0], [0]) == pytest.approx(0, abs=1e-6)
    assert slopes(npo.loss, [-500.0], [0]) == pytest.approx(0, abs=1e-6)


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(
        npo.loss, oracle.npo, make_batch, labels=True, beta=0.6, retain_weight=1.7
    )


def test_metrics_are_means_over_the_rows_of_a_kind():
    _, metrics = npo.loss(*group([-1.0, -2.0, -0.6], [0, 0, 1]))
    assert float(metrics["forget_log_ratio"][0]) == pytest.approx(-3)
    assert float(metrics["retain_nll"][0]) == pytest.approx(0.6)
