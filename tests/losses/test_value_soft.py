"""The soft value: numbers by hand, its minimum on a world that is known, its limits."""

import math

import numpy as np
import pytest
from losses_values import World, cost, slopes

from alignax.losses import value_mean, value_soft

loss = value_soft.loss


def test_golden_number():
    """δ = 1.5 and 1 at β = 1: the mean of e^δ - δ - 1."""
    want = (math.exp(1.5) - 2.5 + math.e - 2) / 2
    assert cost(loss, [[0.5, 1.0]], [2], beta=1.0) == pytest.approx(want, rel=1e-6)


def test_gradient_is_the_ratio_of_the_exponentials_less_one():
    """-β (e^δ - 1): below the reward it pulls far harder than above."""
    got = slopes(loss, [[0.0], [2.0]], [1, 1], beta=0.5)
    want = [-0.5 * (math.exp(2) - 1) / 2, 0.5 * (1 - math.exp(-2)) / 2]
    assert got == pytest.approx(want, rel=1e-5)


def test_beyond_the_limit_it_is_a_tangent():
    got = slopes(loss, [[0.0], [-50.0]], [4, 4], beta=1.0, limit=3.0)
    assert got == pytest.approx([-(math.exp(3) - 1) / 2] * 2, rel=1e-5)
    near = [cost(loss, [[-x]], [0], beta=1.0, limit=3.0) for x in (2.999, 3.001)]
    assert near[1] - near[0] == pytest.approx(0.002 * (math.exp(3) - 1), rel=0.01)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_minimum_is_the_soft_value(beta):
    world = World()
    hyper = dict(beta=beta, limit=30.0)
    at_rest = world.gradient(loss, lambda s: world.soft(s, beta), **hyper)
    assert max(map(abs, at_rest.values())) < 1e-14
    off = world.gradient(loss, lambda s: world.soft(s, beta) + 0.1, **hyper)
    assert min(off.values()) > 1e-6
    mean = world.gradient(loss, world.mean, **hyper)
    assert min(mean.values()) < -1e-4, "the mean value is too low"


def test_the_default_limit_moves_the_minimum_by_less_than_its_bound():
    """No response of this world is as unlikely as e^-10."""
    world = World()
    at_rest = world.gradient(loss, lambda s: world.soft(s, 0.2), beta=0.2)
    assert max(map(abs, at_rest.values())) < 1e-14


def test_without_a_tilt_it_is_the_mean():
    """β → ∞; float32 has e^δ - δ - 1 to 1e-7 absolute, times β² = 100."""
    values, rewards = [[0.5, 1.0], [-1.0]], [2, 1]
    want = cost(value_mean.loss, values, rewards)
    assert cost(loss, values, rewards, beta=30.0) == pytest.approx(want, rel=0.03)
    got = slopes(loss, values, rewards, beta=1000.0)
    np.testing.assert_allclose(
        got, slopes(value_mean.loss, values, rewards), rtol=2e-3, atol=1e-3
    )


def test_a_range_is_never_left():
    hyper = dict(centre=1.0, radius=2.0, beta=1.0)
    want = math.exp(2) - 3
    assert cost(loss, [[1e4]], [5], **hyper) == pytest.approx(want, rel=1e-5)
