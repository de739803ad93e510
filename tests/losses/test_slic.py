"""SLiC-HF: numbers by hand; the log-ratios of `pair` are log-probs here."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import slic

FREE = (0.0, 0.0)  # no reference


def test_golden_number():
    """Δ = ½ of δ = 2; chosen costs 1 nat over 4 tokens."""
    got = cost(slic.loss, -1.0, -1.5, lengths=(4, 2), ref=FREE, delta=2.0, lam=0.4)
    assert got == pytest.approx(1.5 + 0.1, abs=1e-6)


def test_a_margin_beyond_delta_leaves_the_likelihood():
    hyper = dict(lengths=(4, 2), ref=FREE, delta=2.0, lam=0.4)
    assert cost(slic.loss, -1.0, -9.0, **hyper) == pytest.approx(0.1, abs=1e-6)
    assert slopes(slic.loss, -1.0, -9.0, **hyper) == pytest.approx((-0.1, 0), abs=1e-6)


def test_gradient_raises_chosen_and_lowers_rejected():
    got = slopes(slic.loss, -1.0, -1.5, ref=FREE, lam=0.0)
    assert got == pytest.approx((-1, 1), rel=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(slic.loss, oracle.slic, make_batch, delta=1.5, lam=0.7)
