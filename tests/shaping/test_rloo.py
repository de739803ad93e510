"""RLOO: the others' mean, by hand, and its sum over a group."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import firsts, group, tokens

from alignax.shaping import rloo


def test_golden_number():
    """1 against (2 + 6)/2, 2 against (1 + 6)/2, 6 against (1 + 2)/2; then 3 against 5."""
    got = firsts(rloo.shape(group([[1.0, 2.0, 6.0]]), None))
    np.testing.assert_allclose(got, [[-3.0, -1.5, 4.5]], rtol=1e-6)
    got = firsts(rloo.shape(group([[3.0, 5.0]]), None))
    np.testing.assert_allclose(got, [[-2.0, 2.0]], rtol=1e-6)


@pytest.mark.parametrize("g", [2, 5, 16])
def test_it_is_the_centred_reward_times_g_over_g_less_one_and_sums_to_nothing(g):
    rewards = np.random.default_rng(g).normal(3, 2, (4, g))
    got = firsts(rloo.shape(group(rewards), None))
    want = g / (g - 1) * (rewards - rewards.mean(1, keepdims=True))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-5)


def test_every_token_of_a_response_has_the_same():
    got = np.asarray(rloo.shape(group([[1.0, 3.0]], lengths=[[1, 3]]), None))
    np.testing.assert_array_equal(got[0], [[0, 0, -2, 0, 0, 0], [0, 0, 2, 2, 2, 0]])


def test_only_valid_responses_are_compared():
    batch = group([[1.0, 99.0, 4.0], [7.0, 99.0, 99.0]],
                  valid=np.array([[True, False, True], [True, False, False]]))  # fmt: skip
    want = [[-3.0, 0.0, 3.0], [0.0, 0.0, 0.0]]  # a lone one has nothing to compare with
    np.testing.assert_allclose(firsts(rloo.shape(batch, None)), want, rtol=1e-6)


@pytest.mark.parametrize("reward", [0.1, -12345.678, 12345.678])
def test_a_group_without_a_difference_is_exactly_zero(reward):
    """Whatever an eighth that is not valid earned."""
    batch = group([[reward] * 7 + [1.0]], valid=np.arange(8) < 7)
    got = rloo.shape(batch, None)
    np.testing.assert_array_equal(got, 0)


def test_rewards_of_tokens_are_summed():
    """Per token -1 and -1, then 4: a response of 2 against one of 5."""
    batch = group([[0.0, 0.0]], lengths=[[3, 1]])
    batch = batch._replace(advantages=tokens(batch, [[[-1, -1, 4], [5]]]))
    np.testing.assert_allclose(firsts(rloo.shape(batch, None)), [[-3.0, 3.0]])


def test_a_better_response_gets_more():
    rewards = np.sort(np.random.default_rng(0).normal(size=(1, 8)), 1)
    got = firsts(rloo.shape(group(rewards), None))
    assert (np.diff(got) > 0).all()
    assert got[0, 0] < 0 < got[0, -1]
    assert jnp.isfinite(got).all()
