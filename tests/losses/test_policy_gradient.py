"""Clipped policy gradient: numbers by hand, and what it is under the papers' settings."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from losses_rollouts import (
    assert_first_step_is_reinforce,
    assert_no_variance_no_gradient,
    assert_oracle,
    cost,
    gradient,
    group,
    slopes,
)
from oracles import losses as oracle

from alignax.losses import policy_gradient

loss = policy_gradient.loss
HALF, MORE = math.log(0.5), math.log(1.5)


@pytest.mark.parametrize(
    ("reduction", "want"),
    [
        ("token", -(2.4 - 0.8 - 1) / 3),
        ("sequence", -(2.4 + (-0.8 - 1) / 2) / 2),
        ("constant", -(2.4 - 0.8 - 1) / (2 * 4)),  # a row has four tokens
    ],
)
def test_golden_number(reduction, want):
    """Ratios 1.5 | 0.5, 1 and advantages 2 | -1, -1: gains 1.2 * 2 | -0.8, -1."""
    got = cost(loss, [[MORE], [HALF, 0.0]], [[2], [-1, -1]], reduction=reduction)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_first_step_is_reinforce(make_batch, reduction):
    assert_first_step_is_reinforce(loss, make_batch, reduction)


def test_a_group_without_variance_has_no_gradient(make_batch):
    assert_no_variance_no_gradient(loss, make_batch)


@pytest.mark.parametrize(
    ("rho", "advantage", "flows"),
    [
        (1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False),
        (1.1, 1, True), (1.1, -1, True), (0.9, 1, True), (0.9, -1, True),
    ],
)  # fmt: skip
def test_a_ratio_is_clipped_where_it_moved_with_its_advantage(rho, advantage, flows):
    (got,) = slopes(loss, [[math.log(rho)]], [[advantage]])
    assert got == pytest.approx(-rho * advantage if flows else 0.0, rel=1e-5)


def test_dapo_follows_further_up_than_down():
    hyper = dict(clip_low=0.2, clip_high=0.28)
    (up,) = slopes(loss, [[math.log(1.25)]], [[1]], **hyper)
    (down,) = slopes(loss, [[math.log(0.75)]], [[-1]], **hyper)
    assert up == pytest.approx(-1.25, rel=1e-5)
    assert down == 0
    assert cost(loss, [[math.log(2)]], [[1]], **hyper) == pytest.approx(-1.28)


@pytest.mark.parametrize(
    ("rho", "advantage", "want"), [(5, -1, 3), (2, -1, 2), (0.5, -1, 0.8), (5, 1, -1.2)]
)
def test_the_cap_bounds_what_a_bad_token_costs(rho, advantage, want):
    log_rho = [[math.log(rho)]]
    assert cost(loss, log_rho, [[advantage]], cap=3.0) == pytest.approx(want, rel=1e-5)
    (slope,) = slopes(loss, log_rho, [[advantage]], cap=3.0)
    assert slope == pytest.approx(rho if want == rho else 0, rel=1e-5)


def test_constant_weights_know_no_length():
    """Dr. GRPO: a token of a short response counts as much as one of a long one."""
    rows = [[[0.0], [0.0] * 4], [[1], [1] * 4]]
    got = slopes(loss, *rows, reduction="constant")
    np.testing.assert_allclose(got, -1 / (2 * 6), rtol=1e-6)
    by_length = slopes(loss, *rows, reduction="sequence")
    np.testing.assert_allclose(by_length, [-1 / 2, *[-1 / 8] * 4], rtol=1e-6)


def test_a_bad_token_beyond_all_bounds_is_still_pushed_down():
    got = slopes(loss, [[30.0], [1e4]], [[-1], [-1]])
    assert np.isfinite(got).all()
    assert (got > 1e6).all()


def test_without_bounds_it_is_importance_sampling():
    hyper = dict(clip_low=1.0, clip_high=math.inf)
    got = cost(loss, [[MORE], [HALF]], [[3], [-2]], **hyper)
    assert got == pytest.approx(-(4.5 - 1) / 2, rel=1e-5)


def test_metrics_count_what_is_clipped():
    """log ρ 1 and -1 are beyond, 0 is not; k3 of ±1 is e^±1 - 1 ∓ 1."""
    policy, batch = group(
        [[1.0, -1.0, 0.0], [9.0]], [[1] * 3, [1]], valid=[True, False]
    )
    metrics = loss(policy, batch)[1]
    assert float(metrics["clipped"][0]) == pytest.approx(2 / 3)
    assert float(metrics["ratio"][0]) == pytest.approx((math.e + 1 / math.e + 1) / 3)
    want = (math.e - 2 + 1 / math.e) / 3
    assert float(metrics["approx_kl"][0]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_random_rollouts_are_those_of_the_oracle(make_batch, reduction):
    hyper = dict(clip_low=0.1, clip_high=0.3, cap=1.4, reduction=reduction)
    assert_oracle(loss, oracle.policy_gradient, make_batch, **hyper)


def test_a_batch_that_is_no_rollout_is_an_error():
    policy, batch = group([[0.0]], [[1]])
    with pytest.raises(ValueError, match="rollouts bring them"):
        loss(policy, batch._replace(advantages=None))


def test_without_old_log_probabilities_the_gradient_is_that_of_a_ratio_of_one():
    policy, batch = group([[0.0, 0.0], [0.0]], [[1, -2], [3]])
    far = policy._replace(logps=jnp.where(batch.mask, -7.0, 0.0))
    want = gradient(loss, policy, batch)
    got = gradient(loss, far, batch._replace(old_logps=None))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.abs(got).max() > 0
