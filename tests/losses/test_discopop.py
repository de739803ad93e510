"""DiscoPOP: numbers by hand and both limits."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import discopop, dpo


def test_golden_number():
    """z = 1, τ = ½: σ(-2) softplus(-1) + σ(2) / e."""
    got = cost(discopop.loss, 3.0, 1.0, beta=0.5, tau=0.5)
    assert got == pytest.approx(0.119203 * 0.313262 + 0.880797 / np.e, abs=1e-5)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_policy_equal_to_reference_is_half_of_each(tau):
    want = (np.log(2) + 1) / 2
    assert cost(discopop.loss, tau=tau) == pytest.approx(want, abs=1e-6)


def test_far_left_it_is_dpo_and_far_right_an_exponential():
    left = cost(discopop.loss, -8.0, 0.0, beta=0.5)
    assert left == pytest.approx(cost(dpo.loss, -8.0, 0.0, beta=0.5), rel=1e-6)
    right = cost(discopop.loss, 8.0, 0.0, beta=0.5)
    assert right == pytest.approx(np.exp(-4), rel=1e-5)


def test_gradient_raises_chosen_and_lowers_rejected_away_from_the_bump():
    for h in (-40.0, 40.0):
        up, down = slopes(discopop.loss, h, 0.0)
        assert up < 0 < down


@pytest.mark.parametrize("tau", [0.05, 5.0])
def test_hopeless_margins_stay_finite(tau):
    for h in (-1e4, 1e4):
        assert np.isfinite(cost(discopop.loss, h, 0.0, beta=1.0, tau=tau))
        assert np.isfinite(slopes(discopop.loss, h, 0.0, beta=1.0, tau=tau)).all()


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(discopop.loss, oracle.discopop, make_batch, beta=0.2, tau=0.3)
