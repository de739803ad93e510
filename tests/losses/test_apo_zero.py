"""APO-zero: numbers by hand."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import apo_zero


def test_golden_number():
    """r = 2, -1: σ(-2) + σ(-1)."""
    got = cost(apo_zero.loss, 4.0, -2.0, beta=0.5)
    assert got == pytest.approx(0.119203 + 0.268941, abs=1e-5)


def test_it_is_one_at_the_reference_and_between_zero_and_two():
    assert cost(apo_zero.loss) == 1
    assert cost(apo_zero.loss, 500.0, -500.0) == pytest.approx(0, abs=1e-6)
    assert cost(apo_zero.loss, -500.0, 500.0) == pytest.approx(2, abs=1e-6)


def test_gradient_raises_chosen_and_lowers_rejected():
    """From the reference both move as fast: β/4."""
    got = slopes(apo_zero.loss, 0.0, 0.0, beta=0.4)
    assert got == pytest.approx((-0.1, 0.1), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(apo_zero.loss, oracle.apo_zero, make_batch, beta=0.3)
