"""CPO: numbers by hand; the log-ratios of `pair` are log-probs here."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import cpo, dpo

FREE = (0.0, 0.0)  # no reference


def test_golden_number():
    """βΔ = 2; chosen costs 1 nat over 4 tokens."""
    got = cost(cpo.loss, -1.0, -5.0, lengths=(4, 2), ref=FREE, beta=0.5, lam=0.4)
    assert got == pytest.approx(0.126928 + 0.1, abs=1e-5)


def test_without_lambda_it_is_dpo_under_a_uniform_reference():
    got = cost(cpo.loss, -1.0, -5.0, ref=FREE, lam=0.0)
    assert got == pytest.approx(cost(dpo.loss, -1.0, -5.0, ref=FREE), rel=1e-6)


def test_chosen_is_raised_even_where_the_margin_is_won():
    up, down = slopes(cpo.loss, -1.0, -1e4, lengths=(4, 2), ref=FREE, lam=0.4)
    assert (up, down) == pytest.approx((-0.1, 0), abs=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(cpo.loss, oracle.cpo, make_batch, beta=0.3, lam=0.7)
