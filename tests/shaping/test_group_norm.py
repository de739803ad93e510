"""Rewards in units of their group's deviation: by hand, and what happens without one."""

import numpy as np
import pytest
from shaping_groups import firsts, group

from alignax.shaping import group_norm, rloo


def test_golden_number():
    """1, 2, 6: mean 3, deviation √((4 + 1 + 9)/2) = √7."""
    got = firsts(group_norm.shape(group([[1.0, 2.0, 6.0]]), None))
    want = np.array([[-2.0, -1.0, 3.0]]) / (7**0.5 + 1e-4)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_deviation_has_g_less_one_degrees_of_freedom():
    rewards = np.random.default_rng(0).normal(5, 3, (4, 6))
    got = firsts(group_norm.shape(group(rewards), None, eps=1e-12))
    np.testing.assert_allclose(got.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(got.std(1, ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1e4, 12345.678])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_group_without_a_difference_is_exactly_zero(reward, scale):
    """1e4 is no round number in a mean of seven: what rounding leaves must not count."""
    got = group_norm.shape(group([[reward] * 7]), None, scale=scale)
    np.testing.assert_array_equal(got, 0)


def test_scale_zero_only_centres():
    rewards = [[1.0, 2.0, 6.0], [10.0, 20.0, 60.0]]
    got = firsts(group_norm.shape(group(rewards), None, scale=0.0))
    np.testing.assert_allclose(got, [[-2, -1, 3], [-20, -10, 30]], rtol=1e-6)
    loo = firsts(rloo.shape(group(rewards), None))
    np.testing.assert_allclose(got * 3 / 2, loo, rtol=1e-6)


def test_half_a_scale_divides_by_the_root():
    got = firsts(group_norm.shape(group([[1.0, 2.0, 6.0]]), None, scale=0.5, eps=1e-9))
    np.testing.assert_allclose(got, np.array([[-2, -1, 3]]) / 7**0.25, rtol=1e-5)


def test_neither_shift_nor_unit_of_the_reward_matters():
    rewards = np.random.default_rng(1).normal(size=(3, 5))
    got = [
        firsts(group_norm.shape(group(r), None, eps=1e-12))
        for r in (rewards, 100 * rewards + 7)
    ]
    np.testing.assert_allclose(*got, rtol=1e-4, atol=1e-5)


def test_eps_bounds_what_a_small_difference_gets():
    got = firsts(group_norm.shape(group([[0.0, 1e-6]]), None))
    assert np.abs(got).max() < 0.01
    assert np.abs(got).max() > 0


def test_only_valid_responses_are_compared():
    batch = group([[1.0, 99.0, 4.0], [7.0, 99.0, 99.0]],
                  valid=np.array([[True, False, True], [True, False, False]]))  # fmt: skip
    want = np.array([[-1.5, 0.0, 1.5], [0, 0, 0]]) / (4.5**0.5 + 1e-4)
    np.testing.assert_allclose(firsts(group_norm.shape(batch, None)), want, rtol=1e-6)
