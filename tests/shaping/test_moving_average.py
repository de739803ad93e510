"""A baseline of earlier rollouts: against sums written out, and where it does not look."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import firsts, group

from alignax import plugin
from alignax.shaping import moving_average


def rolled(rewards, **hyper):
    """[(advantages [B, G], numbers after)] of rollouts with these rewards."""
    bound = plugin.load("shaping", "moving_average", hyper)
    numbers = jnp.float32([[*bound.running.values()]])
    out = []
    for r in rewards:
        batch = group(r)
        advantages = firsts(bound(batch, numbers))
        numbers = bound.update(batch, numbers, **bound.hyper)
        out.append((advantages, np.asarray(numbers)[0]))
    return out


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9])
def test_it_is_the_weighted_mean_of_the_rollouts_before(decay):
    rewards = np.random.default_rng(0).normal(3, 1, (5, 2, 4))
    means = rewards.mean((1, 2))
    for t, (advantages, _) in enumerate(rolled(rewards, decay=decay, start=0.5)):
        weights = decay ** np.arange(t)[::-1]
        want = weights @ means[:t] / weights.sum() if t else 0.5
        np.testing.assert_allclose(advantages, rewards[t] - want, rtol=1e-5, atol=1e-6)


def test_responses_that_do_not_count_are_not_in_the_mean():
    batch = group([[1.0, 9.0], [3.0, 9.0]], valid=np.array([[True, False]] * 2))
    after = moving_average.update(batch, jnp.zeros((1, 2)))
    np.testing.assert_allclose(after, [[2.0, 0.1]], rtol=1e-6)


def test_a_response_is_not_in_its_own_baseline():
    """The advantage of a response has slope 1 in its reward, that of others 0."""
    numbers = jnp.float32([[0.5, 0.3]])
    low = firsts(moving_average.shape(group([[1.0, 2.0]]), numbers))
    high = firsts(moving_average.shape(group([[4.0, 2.0]]), numbers))
    np.testing.assert_allclose(high - low, [[3, 0]])


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"decay=1\.0 is outside \[0, 1\)"):
        plugin.load("shaping", "moving_average", {"decay": 1.0})
