"""CISPO: truncated weights by hand, and gradients that no clipping takes away."""

import math

import numpy as np
import pytest
from losses_rollouts import (
    OLD,
    assert_first_step_is_reinforce,
    assert_no_variance_no_gradient,
    assert_oracle,
    cost,
    slopes,
)
from oracles import losses as oracle

from alignax.losses import cispo

loss = cispo.loss


def test_golden_number():
    """Ratios 5 (3 at most) and 0.1; log π = OLD + log ρ; advantages 1 and -2."""
    up, down = math.log(5), math.log(0.1)
    want = -(3 * (OLD + up) - 0.1 * 2 * (OLD + down)) / 2
    assert cost(loss, [[up], [down]], [[1], [-2]]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_first_step_is_reinforce(make_batch, reduction):
    assert_first_step_is_reinforce(loss, make_batch, reduction)


def test_a_group_without_variance_has_no_gradient(make_batch):
    assert_no_variance_no_gradient(loss, make_batch)


@pytest.mark.parametrize("advantage", [1, -1])
@pytest.mark.parametrize(
    ("rho", "weight"), [(9, 1.5), (1.2, 1.2), (0.9, 0.9), (0.1, 0.6)]
)
def test_the_gradient_is_weighted_and_never_lost(rho, weight, advantage):
    hyper = dict(clip_low=0.4, clip_high=0.5)
    (got,) = slopes(loss, [[math.log(rho)]], [[advantage]], **hyper)
    assert got == pytest.approx(-weight * advantage, rel=1e-5)


def test_a_ratio_beyond_all_bounds_has_the_weight_of_the_bound():
    got = slopes(loss, [[1e4], [-1e4]], [[1], [1]])
    np.testing.assert_allclose(got, [-3 / 2, 0], atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_random_rollouts_are_those_of_the_oracle(make_batch, reduction):
    hyper = dict(clip_low=0.3, clip_high=0.2, reduction=reduction)
    assert_oracle(loss, oracle.cispo, make_batch, **hyper)
