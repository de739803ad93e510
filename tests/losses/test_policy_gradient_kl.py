"""GRPO's loss with the KL in it: numbers by hand, signs, and no KL at all."""

import math

import numpy as np
import pytest
from losses_rollouts import (
    assert_first_step_is_reinforce,
    assert_oracle,
    cost,
    gradient,
    group,
    random_rollout,
    slopes,
)
from oracles import losses as oracle

from alignax import plugin
from alignax.losses import policy_gradient, policy_gradient_kl

loss = policy_gradient_kl.loss


@pytest.mark.parametrize(
    ("estimator", "want"), [("k2", 0.5), ("k3", 1 / math.e), ("k3+", 1 / math.e)]
)
def test_golden_number(estimator, want):
    """Ratio 1, advantage 3, log π/π_ref = 1: k2 = 1/2, k3 = 1/e."""
    got = cost(loss, [[0.0]], [[3]], log_ref=[[1.0]], beta=0.1, estimator=estimator)
    assert got == pytest.approx(-3 + 0.1 * want, rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_with_hardly_any_kl_the_first_step_is_reinforce(make_batch, reduction):
    assert_first_step_is_reinforce(loss, make_batch, reduction, beta=1e-8)


def test_with_hardly_any_kl_it_is_the_clipped_policy_gradient(make_batch):
    policy, batch = random_rollout(make_batch)
    plain = dict(clip_low=0.1, clip_high=0.2, reduction="sequence")
    np.testing.assert_allclose(
        gradient(loss, policy, batch, beta=1e-8, **plain),
        gradient(policy_gradient.loss, policy, batch, **plain), atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [("k2", (1.0, -1.0)), ("k3", (1 - 1 / math.e, 1 - math.e)), ("k3+", (1.0, -1.0))],
)
def test_without_an_advantage_it_goes_back_to_the_reference(estimator, slope):
    got = slopes(
        loss,
        [[0.0, 0.0]],
        [[0, 0]],
        log_ref=[[1.0, -1.0]],
        beta=2.0,
        estimator=estimator,
    )
    np.testing.assert_allclose(got, slope, rtol=1e-5)  # beta 2, two tokens


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_tokens_that_are_least_likely_under_the_reference_have_the_largest_gradient(
    estimator,
):
    """A clipped log-ratio would let go of the worst tokens."""
    rows = dict(log_ref=[[5.0, 50.0]], beta=1.0, estimator=estimator)
    got = slopes(loss, [[0.0, 0.0]], [[0, 0]], **rows)
    np.testing.assert_allclose(got, [2.5, 25], rtol=1e-6)


def test_tokens_that_only_the_reference_finds_likely_are_raised():
    rows = dict(log_ref=[[-50.0, -1e4]], beta=1.0, estimator="k3")
    got = slopes(loss, [[0.0, 0.0]], [[0, 0]], **rows)
    assert np.isfinite(got).all()
    assert (got < -1e6).all()


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3+"])
def test_random_rollouts_are_those_of_the_oracle(make_batch, estimator):
    hyper = dict(beta=0.7, clip_low=0.1, clip_high=0.3, reduction="sequence")
    assert_oracle(
        loss, oracle.policy_gradient_kl, make_batch, estimator=estimator, **hyper
    )


def test_the_metric_is_the_estimate_a_token():
    policy, batch = group(
        [[0.0, 0.0], [0.0]], [[1, 1], [1]], log_ref=[[1.0, 0.0], [7.0]],
        valid=[True, False],
    )  # fmt: skip
    metrics = loss(policy, batch)[1]
    assert float(metrics["kl"][0]) == pytest.approx(1 / math.e / 2, rel=1e-5)


def test_an_estimator_is_refused_before_anything_compiles():
    with pytest.raises(ValueError, match="estimator='k1' is not one of k2, k3, "):
        plugin.load("losses", "policy_gradient_kl", {"estimator": "k1"})


def test_k1_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="expected gradient is zero: use shaping"):
        cost(loss, [[0.0]], [[1]], estimator="k1")
