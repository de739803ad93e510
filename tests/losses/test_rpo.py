"""RPO: numbers by hand."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import dpo, rpo


def test_golden_number():
    """βh = 2; chosen has log-prob -3 + 1 over 4 tokens, α = 0.4."""
    hyper = dict(lengths=(4, 2), ref=(-3.0, -4.0), beta=0.5, alpha=0.4)
    got = cost(rpo.loss, 1.0, -3.0, **hyper)
    assert got == pytest.approx(0.126928 + 0.4 * 2 / 4, abs=1e-5)


def test_without_alpha_it_is_dpo():
    got = cost(rpo.loss, 3.0, -1.0, alpha=0.0)
    assert got == pytest.approx(cost(dpo.loss, 3.0, -1.0), rel=1e-6)


def test_chosen_is_raised_even_where_the_margin_is_won():
    up, down = slopes(rpo.loss, 500.0, -500.0, lengths=(4, 2), alpha=0.4)
    assert (up, down) == pytest.approx((-0.1, 0), abs=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(rpo.loss, oracle.rpo, make_batch, beta=0.3, alpha=0.7)
    assert np.isfinite(cost(rpo.loss, -1e4, 1e4))
