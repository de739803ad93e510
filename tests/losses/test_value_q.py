"""Q of every token: numbers by hand, its minimum on a known distribution, its form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_values import World, prompt

from alignax.losses import value_q


def given(ratio, feedback, *, state_values=None, forward_kl=None):
    """One prompt; lists of tokens for each response, log π / p and the head before it."""
    _, batch = prompt(ratio, feedback)
    rows = [prompt(x or [[0.0] * len(r) for r in ratio], feedback)[0].values
            for x in (ratio, state_values, forward_kl)]  # fmt: skip
    ref = jnp.where(batch.mask, -1.0, 0.0)
    policy, b, kl = rows[0] + ref, rows[1], rows[2]
    scores = prompt(ratio, feedback)[0]._replace(
        logps=policy, state_values=b, forward_kl=kl
    )
    return scores, batch._replace(ref_logps=ref)


def cost(ratio, feedback, *, state_values=None, forward_kl=None, **hyper):
    scores, batch = given(
        ratio, feedback, state_values=state_values, forward_kl=forward_kl
    )
    return float(value_q.loss(scores, batch, **hyper)[0][0])


def test_golden_number():
    """Q = 0.5 + 2 x 0.25 and 1 - 2 x 0.5: errors 1 and 2 to the reward 2."""
    rows = dict(state_values=[[0.5, 1.0]], scale=2.0)
    got = cost([[0.25, -0.5]], [2], penalty=0.0, **rows)
    assert got == pytest.approx((0.5 + 2.0) / 2)
    more = cost([[0.25, -0.5]], [2], penalty=0.3, forward_kl=[[0.1, 0.2]], **rows)
    assert more - got == pytest.approx(0.3 * 4 * 0.15)


def test_a_better_response_becomes_more_likely_and_a_worse_one_less():
    scores, batch = given([[0.0], [0.0]], [1, -1])

    def total(logps):
        return value_q.loss(scores._replace(logps=logps), batch)[0].sum()

    slopes = np.asarray(jax.grad(total)(scores.logps))[np.asarray(batch.mask)]
    assert slopes == pytest.approx([-0.5, 0.5])


def test_the_minimum_is_the_expected_reward_after_each_token():
    world = World()

    def loss(policy, batch):
        ref = jnp.where(batch.mask, -1.0, 0.0)
        policy = policy._replace(
            logps=ref + (policy.values - 0.3) / 0.7, forward_kl=0 * policy.values,
            state_values=jnp.where(batch.mask, 0.3, 0.0),
        )  # fmt: skip
        return value_q.loss(policy, batch._replace(ref_logps=ref), scale=0.7)

    at_rest = world.gradient(loss, world.mean)
    assert max(map(abs, at_rest.values())) < 1e-14
    off = world.gradient(loss, lambda s: world.mean(s) + 0.1)
    assert min(off.values()) > 1e-5


def test_any_q_is_a_ratio_of_distributions():
    """b = c log Σ p e^{Q/c} makes π a distribution, whatever Q is."""
    rng = np.random.default_rng(0)
    p, q, c = rng.dirichlet(np.ones(6)), rng.normal(size=6), 0.4
    b = c * np.log(p @ np.exp(q / c))
    policy = p * np.exp((q - b) / c)
    assert policy.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(b + c * np.log(policy / p), q, atol=1e-12)


def test_the_penalty_of_a_small_q_is_half_its_variance():
    rng = np.random.default_rng(1)
    p, q, c = rng.dirichlet(np.ones(6)), 1e-3 * rng.normal(size=6), 0.4
    policy = p * np.exp(q / c)
    policy /= policy.sum()
    kl = p @ np.log(p / policy)
    variance = p @ q**2 - (p @ q) ** 2
    assert c**2 * kl == pytest.approx(variance / 2, rel=5e-3)
