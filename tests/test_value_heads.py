"""Values of a scalar head: their range, and the value after each token's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import value_heads
from alignax.batch import from_groups


def test_a_range_is_a_logistic_curve_of_slope_one():
    x = jnp.linspace(-9, 9, 37)
    low, high = 1.0, 4.0  # centre 2.5, radius 1.5
    want = low + (high - low) / (1 + np.exp(-4 * np.asarray(x) / (high - low)))
    np.testing.assert_allclose(value_heads.squash(x, 2.5, 1.5), want, rtol=1e-5)
    slope = jax.grad(lambda x: value_heads.squash(x, 2.5, 1.5))(0.0)
    assert slope == pytest.approx(1)


def test_without_a_radius_it_is_a_shift_and_has_a_gradient():
    x = jnp.array([-1e30, 0.0, 3.0])
    np.testing.assert_array_equal(value_heads.squash(x, 0.0, jnp.inf), x)
    grads = jax.vmap(jax.grad(lambda x: value_heads.squash(x, 1.0, jnp.inf)))(x)
    np.testing.assert_array_equal(grads, 1)


def test_the_value_that_follows_skips_what_is_not_scored():
    """Two turns in a response, a shorter one, and one that is not valid."""
    batch = from_groups(
        [[1]], [[[2] * 5, [2, 2], [2]]], length=8, feedback=[[9.0, 8.0, 7.0]],
        scored=[[[True, True, False, False, True], [True, True], [True]]],
    )  # fmt: skip
    batch = batch._replace(valid=np.array([[True, True, False]]))
    x = jnp.arange(24.0).reshape(1, 3, 8)
    got = value_heads.following(x, jax.tree.map(jnp.asarray, batch))
    want = np.zeros((1, 3, 8))
    want[0, 0, [1, 2, 5]] = [2, 5, 9]
    want[0, 1, [1, 2]] = [10, 8]
    np.testing.assert_array_equal(got, want)
