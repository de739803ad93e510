"""CD-Q: numbers by hand, and where it is at rest on a world that is known."""

import pytest
from losses_values import World, cost, slopes

from alignax.losses import value_bootstrap

loss = value_bootstrap.loss


def test_golden_number():
    """Steps 0.5 -> 1 -> reward 2: (0.25 + 1) / 2 / 2."""
    assert cost(loss, [[0.5, 1.0]], [2]) == pytest.approx(0.3125)


def test_the_target_has_no_gradient():
    """V - u over the number of tokens; the last value is not pulled to the one before."""
    assert slopes(loss, [[0.5, 1.0]], [2]) == pytest.approx([-0.25, -0.5])
    assert slopes(loss, [[0.5, 2.0]], [2]) == pytest.approx([-0.75, 0.0])


def test_responses_do_not_reach_into_each_other():
    got = slopes(loss, [[0.5], [1.0, 4.0], [7.0]], [2, 3, 0], valid=[True, True, False])
    assert got == pytest.approx([-1.5 / 2, -3.0 / 4, 1.0 / 4, 0.0])


def test_a_range_is_approached_and_never_left():
    assert cost(loss, [[1e4]], [5], centre=1.0, radius=2.0) == pytest.approx(2.0)


def test_it_is_at_rest_where_the_value_is_the_expected_reward():
    world = World()
    at_rest = world.gradient(loss, world.mean)
    assert max(map(abs, at_rest.values())) < 1e-15
    off = world.gradient(loss, lambda s: world.mean(s) + 0.1 * (len(s) == 2))
    assert min(g for s, g in off.items() if len(s) == 2) > 1e-5
    assert max(g for s, g in off.items() if len(s) == 1) < -1e-5
