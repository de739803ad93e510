"""APO-down: numbers by hand."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import apo_down


def test_golden_number():
    """r = 2, -1: σ(2) + σ(-3)."""
    got = cost(apo_down.loss, 4.0, -2.0, beta=0.5)
    assert got == pytest.approx(0.880797 + 0.047426, abs=1e-5)


def test_it_is_one_at_the_reference():
    assert cost(apo_down.loss) == 1


def test_with_a_margin_won_both_sides_fall():
    """The margin's sigmoid is flat, what is left lowers chosen and leaves rejected."""
    down, still = slopes(apo_down.loss, 0.0, -100.0, beta=0.4)
    assert down == pytest.approx(0.1, rel=1e-5)
    assert still == pytest.approx(0, abs=1e-6)


def test_gradient_lowers_rejected():
    assert slopes(apo_down.loss, 0.5, 0.2)[1] > 0


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(apo_down.loss, oracle.apo_down, make_batch, beta=0.3)
