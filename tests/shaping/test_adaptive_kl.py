"""A KL penalty whose coefficient follows a target."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import group, tokens

from alignax import plugin
from alignax.shaping import adaptive_kl, kl


def apart(nats, many=4):
    """One prompt with `many` responses of two tokens, each `nats` from the reference."""
    batch = group([[1.0] * many], lengths=[[2] * many])
    logps = tokens(batch, [[[-1.0, -2.0]] * many])
    less = tokens(batch, [[[0.25 * nats, 0.75 * nats]] * many])
    return batch._replace(old_logps=logps, ref_logps=logps - less)


def test_it_is_the_fixed_penalty_at_the_coefficient_of_the_moment():
    batch = apart(3.0)
    got = adaptive_kl.shape(batch, jnp.float32([[0.3]]), beta=0.01)
    np.testing.assert_array_equal(got, kl.shape(batch, None, beta=jnp.float32(0.3)))


@pytest.mark.parametrize(
    ("nats", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (100.0, 0.2), (0.0, -0.2), (-4.0, -0.2)],
)
def test_the_coefficient_moves_by_the_relative_error_within_a_fifth(nats, error):
    bound = plugin.load("shaping", "adaptive_kl", {"target": 6.0, "horizon": 100.0})
    beta = jnp.float32([[*bound.running.values()]])
    assert float(beta[0, 0]) == pytest.approx(0.05)
    after = bound.update(apart(nats), beta, **bound.hyper)
    assert float(after[0, 0]) == pytest.approx(0.05 * (1 + 4 / 100 * error), rel=1e-5)


def test_the_mean_is_over_responses_that_count():
    batch = apart(6.6)
    batch = batch._replace(valid=batch.valid.at[0, 2:].set(False))
    after = adaptive_kl.update(batch, jnp.float32([[1.0]]), target=6.0, horizon=100.0)
    assert float(after[0, 0]) == pytest.approx(1 + 2 / 100 * 0.1, rel=1e-5)


def test_a_short_horizon_neither_ends_the_penalty_nor_turns_it_around():
    after = adaptive_kl.update(apart(0.0), jnp.float32([[1.0]]), horizon=0.1)
    assert float(after[0, 0]) == pytest.approx(0.1)


def test_it_finds_the_coefficient_that_holds_a_policy_at_the_target():
    """Of a policy whose KL is 2 / beta nats, at any start."""
    for start in (0.02, 5.0):
        beta = jnp.float32([[start]])
        for _ in range(400):
            beta = adaptive_kl.update(
                apart(2 / float(beta[0, 0])), beta, target=4.0, horizon=40.0
            )
        assert float(beta[0, 0]) == pytest.approx(0.5, rel=1e-2)
