"""REINFORCE: the gradient of the expected reward, by enumeration of all responses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import Batch, Scores
from alignax.losses import policy_gradient, reinforce


def made(logps, advantages):
    """One prompt with G responses of L tokens behind one token of prompt."""
    g, n = logps.shape
    mask = jnp.broadcast_to(jnp.arange(n + 1) > 0, (1, g, n + 1))
    pad = ((0, 0), (1, 0))
    batch = Batch(
        jnp.zeros((1, g, n + 1), int), mask, jnp.full((1, g), n + 1),
        jnp.zeros((1, g)), jnp.ones((1, g), bool),
        advantages=jnp.pad(advantages, pad)[None],
    )  # fmt: skip
    return Scores(jnp.pad(logps, pad)[None]), batch


def test_by_hand_in_each_reduction():
    logps, advantages = (
        jnp.array([[-1.0, -2.0], [-3.0, -4.0]]),
        jnp.array([[1.0, 1], [-2, -2]]),
    )
    policy, batch = made(logps, advantages)
    for reduction, want in (
        ("token", -2.75),
        ("sequence", -2.75),
        ("constant", -11 / 3 / 2),
    ):
        values, metrics = reinforce.loss(policy, batch, reduction=reduction)
        assert float(values[0]) == pytest.approx(want), reduction
        assert float(metrics["nll"][0]) == pytest.approx(2.5)


def test_its_expected_gradient_is_that_of_the_expected_reward():
    """Two tokens of a softmax each; all nine responses, with the weight of their chance."""
    logits = jnp.array([[0.2, -0.5, 0.1], [0.4, 0.0, -0.3]])
    responses = np.array([*itertools.product(range(3), repeat=2)])
    reward = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)

    def logp(logits):
        each = jax.nn.log_softmax(logits, -1)
        return jnp.stack([each[t, responses[:, t]] for t in range(2)], 1)

    want = jax.grad(lambda z: (jnp.exp(logp(z).sum(1)) * reward).sum())(logits)
    chance = jnp.exp(logp(logits).sum(1))

    def cost(z):  # a mean over all tokens: 18 of them
        advantages = jnp.broadcast_to((chance * reward)[:, None], (9, 2))
        return reinforce.loss(*made(logp(z), advantages))[0][0] * 18

    np.testing.assert_allclose(-jax.grad(cost)(logits), want, atol=1e-6)


def test_on_fresh_responses_its_gradient_is_that_of_the_clipped_ratios():
    rng = np.random.default_rng(1)
    logps = jnp.asarray(rng.uniform(-3, 0, (4, 5)), jnp.float32)
    advantages = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)

    def cost(loss, z):
        policy, batch = made(z, advantages)
        old = jax.lax.stop_gradient(policy.logps)
        return loss(policy, batch._replace(old_logps=old))[0].sum()

    got, want = (
        jax.grad(lambda z, loss=loss: cost(loss, z))(logps)
        for loss in (reinforce.loss, policy_gradient.loss)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
