"""LongPO: numbers by hand. The two contexts meet in inputs/test_reference_cache.py."""

import pytest
from losses_pairs import assert_oracle, cost, pair, slopes
from oracles import losses as oracle

from alignax.losses import dpo, longpo


def test_golden_number():
    """h = 3 + 1, beta = 0.5, lambda = 2: 2 log(1 + e^-2); log pi = -3 + 3 on 2 tokens."""
    got = cost(longpo.loss, 3.0, -1.0, beta=0.5, lam=2.0)
    assert got == pytest.approx(2 * 0.126928011, rel=1e-5)
    got = cost(longpo.loss, 3.0, -1.0, ref=(-8.0, -4.0), beta=0.5, lam=2.0)
    assert got == pytest.approx(2 * 0.126928011 + 2.5, rel=1e-6)


def test_with_the_same_context_it_is_dpo_plus_nll():
    _, metrics = longpo.loss(*pair(0.5, -0.2))
    got = cost(longpo.loss, 0.5, -0.2, beta=0.3, lam=0.4)
    want = 0.4 * cost(dpo.loss, 0.5, -0.2, beta=0.3) + float(metrics["nll"][0])
    assert got == pytest.approx(want, rel=1e-6)


def test_gradient_raises_chosen_and_lowers_rejected():
    chosen, rejected = slopes(longpo.loss, 0.5, 0.2)
    assert chosen < 0 < rejected


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(longpo.loss, oracle.longpo, make_batch, beta=0.4, lam=0.6)
