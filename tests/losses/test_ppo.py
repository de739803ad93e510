"""PPO: the critic's part by hand; the policy's part is the clipped policy gradient."""

import math

import numpy as np
import pytest
from losses_rollouts import (
    assert_first_step_is_reinforce,
    assert_no_variance_no_gradient,
    assert_oracle,
    cost,
    gradient,
    group,
    random_rollout,
    slopes,
)
from oracles import losses as oracle

from alignax.losses import policy_gradient, ppo

loss = ppo.loss


def test_golden_number():
    """Ratio 1.5, A = 1: gain 1.2. V = 0.5 from 0, R = 2: clipped to 0.2, error 1.8²."""
    got = cost(
        loss, [[math.log(1.5)]], [[1]], values=[[0.5]], old_values=[[0.0]],
        returns=[[2.0]], value_weight=0.1,
    )  # fmt: skip
    assert got == pytest.approx(-1.2 + 0.1 * 1.8**2 / 2, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_first_step_of_the_policy_is_reinforce(make_batch, reduction):
    assert_first_step_is_reinforce(loss, make_batch, reduction)


def test_a_group_without_variance_has_no_gradient(make_batch):
    assert_no_variance_no_gradient(loss, make_batch)


def test_the_policys_gradient_is_that_of_the_clipped_surrogate(make_batch):
    policy, batch = random_rollout(make_batch)
    np.testing.assert_allclose(
        gradient(loss, policy, batch, clip=0.3),
        gradient(policy_gradient.loss, policy, batch, clip_low=0.3, clip_high=0.3),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("value", "returns", "slope"),
    [
        (0.0, 1.0, -1.0),  # where it was: towards the return
        (0.1, 1.0, -0.9),
        (0.5, 1.0, 0.0),  # far enough for now
        (0.5, -1.0, 1.5),  # the wrong way: back
        (-0.5, 1.0, -1.5),
    ],
)
def test_a_value_is_not_followed_beyond_its_clip(value, returns, slope):
    (got,) = slopes(
        loss, [[0.0]], [[0]], values=[[value]], old_values=[[0.0]], returns=[[returns]],
        value_weight=1.0, field="state_values",
    )  # fmt: skip
    assert got == pytest.approx(slope, abs=1e-6)


def test_the_critic_learns_the_returns_mean_square():
    """The minimum over V of the error on returns 0 and 1 is at their mean."""
    rows = dict(returns=[[0.0], [1.0]], field="state_values", value_clip=math.inf)
    got = slopes(loss, [[0.0]] * 2, [[0]] * 2, values=[[0.5], [0.5]], **rows)
    assert got.sum() == pytest.approx(0, abs=1e-7)
    assert got[0] > 0 > got[1]


def test_the_critic_has_no_weight_on_invalid_responses():
    rows = dict(values=[[1.0], [9.0]], field="state_values", valid=[True, False])
    got = slopes(loss, [[0.0]] * 2, [[1]] * 2, **rows)
    assert got[0] > 0
    assert got[1] == 0


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_random_rollouts_are_those_of_the_oracle(make_batch, reduction):
    hyper = dict(clip=0.3, value_clip=0.2, value_weight=0.5, reduction=reduction)
    assert_oracle(loss, oracle.ppo, make_batch, **hyper)


def test_without_returns_it_is_an_error():
    policy, batch = group([[0.0]], [[1]])
    with pytest.raises(ValueError, match=r"config.shaping.gae"):
        loss(policy, batch._replace(extra=None))
    with pytest.raises(ValueError, match=r"config.shaping.gae"):
        loss(policy._replace(state_values=None), batch)
