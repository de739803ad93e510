"""CD-FUDGE: numbers by hand, and its minimum on a world that is known."""

import pytest
from losses_values import World, cost, slopes

from alignax.losses import value_mean

loss = value_mean.loss


def test_golden_number():
    """Errors 1.5 and 1 of one response, 1 of the other: (1.125 + 0.5) / 2 and 0.5."""
    assert cost(loss, [[0.5, 1.0]], [2]) == pytest.approx(0.8125)
    assert cost(loss, [[0.5, 1.0], [0.0]], [2, 1]) == pytest.approx((0.8125 + 0.5) / 2)


def test_gradient_moves_every_token_to_the_reward():
    got = slopes(loss, [[0.5, 3.0], [9.0]], [2, 0], valid=[True, False])
    assert got == pytest.approx([-0.75, 0.5, 0.0])


def test_a_range_is_approached_and_never_left():
    """1 + 2 tanh(x / 2): far out it is 3, and nothing pulls the head any further."""
    assert cost(loss, [[1e4]], [5], centre=1.0, radius=2.0) == pytest.approx(2.0)
    assert slopes(loss, [[1e4]], [5], centre=1.0, radius=2.0) == pytest.approx([0.0])
    assert slopes(loss, [[0.0]], [2], centre=1.0, radius=2.0) == pytest.approx([-1.0])


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_minimum_is_the_expected_reward(reduction):
    world = World()
    at_rest = world.gradient(loss, world.mean, reduction=reduction)
    assert max(map(abs, at_rest.values())) < 1e-15
    off = world.gradient(loss, lambda s: world.mean(s) + 0.1, reduction=reduction)
    assert min(off.values()) > 1e-5
