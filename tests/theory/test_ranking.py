"""Ranking accuracy: when a low loss ranks, and what the ideal policy could."""

import math

import numpy as np
import pytest

from alignax.theory import ranking


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_a_pair_is_ranked_right_exactly_below_its_loss(beta):
    rng = np.random.default_rng(0)
    policy, ref = rng.normal(0, 5, (2, 20_000, 2))
    c = ranking.difficulty(ref[:, 0], ref[:, 1])
    loss = ranking.dpo_loss((policy - ref) @ [1, -1], beta)
    right = policy[:, 0] >= policy[:, 1]
    np.testing.assert_array_equal(right, loss <= ranking.dpo_loss_that_ranks(c, beta))


def test_an_easy_pair_with_a_loss_of_point_six_is_ranked_right():
    """The paper's proposition: c <= 0 and L <= .6 < ln 2."""
    assert ranking.dpo_loss_that_ranks(0.0, 0.1) == pytest.approx(math.log(2))
    assert (ranking.dpo_loss_that_ranks(-np.arange(5.0), 0.1) >= 0.6).all()


def test_population_optimum_moves_the_reference_by_its_logit():
    """The minimum of α·DPO(h) + (1-α)·DPO(-h) over h, found by a grid."""
    alpha, beta, c = 0.75, 0.5, 1.2
    h = np.linspace(-10, 10, 200_001)
    cost = alpha * ranking.dpo_loss(h, beta) + (1 - alpha) * ranking.dpo_loss(-h, beta)
    assert ranking.ideal_log_ratio(c, alpha, beta) == pytest.approx(
        h[cost.argmin()] - c, abs=1e-3
    )


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
def test_ideal_accuracy_of_gaussian_difficulties_is_a_gaussian_integral(beta):
    c = np.random.default_rng(1).normal(0, 5, 100_000)
    z = math.log(0.75 / 0.25) / beta / 5
    want = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert ranking.ideal_accuracy(c, 0.75, beta) == pytest.approx(want, abs=0.01)


def test_certain_annotators_err_once_in_a_thousand():
    want = math.log(0.999 / 0.001)
    assert ranking.ideal_log_ratio(0.0, 1.0, 1.0) == pytest.approx(want)


def test_ties_are_ranked_right_and_means_are_not_sums():
    assert ranking.accuracy([-3.0, -1.0], [-3.0, -0.5]) == 0.5


def test_zero_ipo_loss_ranks_pairs_that_are_easy_enough():
    """h = 1/(2β) = 5 at zero loss."""
    np.testing.assert_array_equal(ranking.ipo_ranks([4.9, 5.1], 0.1), [True, False])
