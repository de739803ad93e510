"""IPO: numbers by hand, and whose lengths divide."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import ipo


def test_golden_number():
    """3 nats over 2 tokens, -1 over 4: (1.5 + 0.25 - 1)²."""
    got = cost(ipo.loss, 3.0, -1.0, lengths=(2, 4), beta=0.5)
    assert got == pytest.approx(0.5625, abs=1e-6)


def test_summed_it_is_the_equation_as_printed():
    """(3 + 1 - 1)²."""
    got = cost(ipo.loss, 3.0, -1.0, lengths=(2, 4), beta=0.5, average=False)
    assert got == pytest.approx(9, abs=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_the_best_margin_is_finite(beta):
    """h = 1/(2β) costs nothing; a larger one is pulled back."""
    best = 2 / (2 * beta)  # two tokens
    assert cost(ipo.loss, best, 0.0, beta=beta) == pytest.approx(0, abs=1e-6)
    up, down = slopes(ipo.loss, best + 1, 0.0, beta=beta)
    assert up > 0 > down


@pytest.mark.parametrize("average", [True, False])
def test_random_pairs_are_those_of_the_oracle(make_batch, average):
    assert_oracle(ipo.loss, oracle.ipo, make_batch, beta=0.3, average=average)
