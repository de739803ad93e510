"""Hinge: numbers by hand."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import hinge


def test_golden_number():
    """h = 4: 1 - 0.1 · 4."""
    assert cost(hinge.loss, 3.0, -1.0, beta=0.1) == pytest.approx(0.6, abs=1e-6)


def test_a_margin_beyond_one_costs_nothing_and_teaches_nothing():
    assert cost(hinge.loss, 3.0, -1.0, beta=0.5) == 0
    assert slopes(hinge.loss, 3.0, -1.0, beta=0.5) == (0, 0)


def test_gradient_is_beta_whatever_the_margin():
    for rejected in (3.0, 400.0):
        got = slopes(hinge.loss, 0.0, rejected, beta=0.1)
        assert got == pytest.approx((-0.1, 0.1), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(hinge.loss, oracle.hinge, make_batch, beta=0.4)
