"""Plackett-Luce reward model: numbers by hand, and its freedom of a constant."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import reward_model, reward_plackett_luce


def test_golden_number():
    """r = (1, 0, -1): log(1 + e^-1 + e^-2) + log(1 + e^-1), on the last scored tokens."""
    got = cost(
        reward_plackett_luce.loss, [1.0, 0.0, -1.0], [2, 1, 0], lengths=[3, 1, 2]
    )
    assert got == pytest.approx(0.40760596 + 0.31326169, abs=1e-6)


def test_two_responses_are_bradley_terry():
    rewards = [-0.4, 1.1]
    got = cost(reward_plackett_luce.loss, rewards, [0, 3])
    want = cost(reward_model.loss, rewards[::-1], [1, 0])
    assert got == pytest.approx(want, rel=1e-6)


def test_rewards_are_free_up_to_a_constant():
    rewards, feedback = np.array([0.5, -1.0, 2.0]), [2, 0, 1]
    shifted = cost(reward_plackett_luce.loss, rewards + 10, feedback)
    assert shifted == pytest.approx(
        cost(reward_plackett_luce.loss, rewards, feedback), rel=1e-5
    )


def test_gradient_raises_the_best_and_lowers_the_worst():
    slope = slopes(reward_plackett_luce.loss, [1.0, 0.5, 0.7], [0, 2, 1])
    assert slope[1] < 0 < slope[0]


def test_random_orders_are_those_of_the_oracle(make_batch):
    assert_oracle(reward_plackett_luce.loss, oracle.reward_plackett_luce, make_batch)


def test_a_single_response_is_no_ranking():
    with pytest.raises(ValueError, match=r"one per prompt: use .*reward_regression"):
        reward_plackett_luce.loss(*group([-1.0], [1]))
