"""BCO: a bound on DPO, its best shift, and the optimum of a population."""

import numpy as np
import pytest

from alignax.theory import bco


def triples(n=1_000_000, seed=0):
    return np.random.default_rng(seed).normal(0, 5, (3, n))


def test_the_classifier_bounds_dpo_whatever_the_shift():
    a, b, shift = triples()
    assert (bco.bce(a, b, shift) - bco.dpo(a, b)).min() > 0


def test_excess_is_the_difference_of_exponentials():
    a, b, shift = triples(1000) / 3
    want = np.exp(bco.bce(a, b, shift)) - np.exp(bco.dpo(a, b))
    np.testing.assert_allclose(bco.excess(a, b, shift), want, rtol=1e-9)


def test_the_best_shift_is_the_mean_of_the_two_rewards():
    a, b, _ = triples(200) / 3
    grid = np.linspace(-12, 12, 24_001)
    found = grid[bco.excess(a[:, None], b[:, None], grid).argmin(1)]
    np.testing.assert_allclose(found, bco.best_shift(a, b), atol=1e-3)
    least = bco.excess(a, b, bco.best_shift(a, b))
    np.testing.assert_allclose(least, 2 * np.exp(-(a - b) / 2), rtol=1e-12)


def test_common_shifts_of_rewards_and_delta_change_nothing():
    a, b, shift = triples(10)
    np.testing.assert_allclose(
        bco.bce(a + 7, b + 7, shift + 7), bco.bce(a, b, shift), rtol=1e-9, atol=1e-12
    )


def test_the_population_optimum_is_the_log_density_ratio():
    liked, disliked = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    best = bco.optimum(liked, disliked)

    def cost(r):
        return liked @ np.logaddexp(0, -r) + disliked @ np.logaddexp(0, r)

    for e in np.eye(3):
        assert cost(best) < min(cost(best + 1e-3 * e), cost(best - 1e-3 * e))
    assert best[0] == pytest.approx(np.log(5))
