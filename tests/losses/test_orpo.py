"""ORPO: numbers by hand and odds at the edge of certainty."""

import itertools

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import orpo

FREE = (0.0, 0.0)  # no reference


def test_golden_number():
    """Mean probabilities ½ and 0.2: odds 1 and ¼, σ(log 4) = 0.8."""
    chosen, rejected = 2 * np.log(0.5), 3 * np.log(0.2)
    got = cost(orpo.loss, chosen, rejected, lengths=(2, 3), ref=FREE, lam=0.5)
    assert got == pytest.approx(np.log(2) - 0.5 * np.log(0.8), abs=1e-6)


def test_without_lambda_it_is_the_likelihood_of_the_chosen():
    got = cost(orpo.loss, -3.0, -1.0, lengths=(2, 3), ref=FREE, lam=0.0)
    assert got == pytest.approx(1.5, abs=1e-6)
    assert slopes(orpo.loss, -3.0, -1.0, ref=FREE, lam=0.0)[1] == 0


def test_gradient_raises_chosen_and_lowers_rejected():
    up, down = slopes(orpo.loss, -3.0, -1.0, ref=FREE)
    assert up < 0 < down


def test_odds_are_finite_from_certain_to_hopeless():
    for sides in itertools.product([0.0, -1e-9, -1e-6, -1e4], repeat=2):
        assert np.isfinite(cost(orpo.loss, *sides, ref=FREE))
        assert np.isfinite(slopes(orpo.loss, *sides, ref=FREE)).all()


@pytest.mark.parametrize("mean", [-1e-6, -0.1, -np.log(2), -1.0, -30.0])
def test_log_odds_are_exact_on_both_sides_of_their_branch(mean):
    """Against a rejected response of odds 1."""
    got = cost(orpo.loss, 2 * mean, 2 * np.log(0.5), ref=FREE, lam=1.0)
    odds = np.exp(mean) / -np.expm1(mean)
    assert got + mean == pytest.approx(np.log1p(1 / odds), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(orpo.loss, oracle.orpo, make_batch, lam=0.3)
