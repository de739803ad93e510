"""Reward regression: numbers by hand."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import reward_regression


def test_golden_number():
    """Errors 0.5 and -2: (0.25 + 4) / 2."""
    assert cost(reward_regression.loss, [1.5, -2.0], [1, 0]) == pytest.approx(2.125)
    _, metrics = reward_regression.loss(*group([1.5, -2.0], [1, 0]))
    assert float(metrics["reward"][0]) == pytest.approx(-0.25)
    assert float(metrics["bias"][0]) == pytest.approx(-0.75)


def test_it_is_at_rest_where_the_reward_is_the_feedback():
    np.testing.assert_array_equal(
        slopes(reward_regression.loss, [3.5, -2.0], [3.5, -2.0]), 0
    )


def test_gradient_moves_the_reward_to_the_feedback():
    """2 (r - f) / G."""
    np.testing.assert_allclose(
        slopes(reward_regression.loss, [1.5, -2.0], [1, 0]), [0.5, -2.0]
    )


def test_a_single_response_will_do():
    assert cost(reward_regression.loss, [0.5], [2.0]) == pytest.approx(2.25)


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(reward_regression.loss, oracle.reward_regression, make_batch)
