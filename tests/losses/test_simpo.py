"""SimPO: numbers by hand; the log-ratios of `pair` are log-probs here."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import simpo

FREE = (0.0, 0.0)  # no reference


def test_golden_number():
    """-1 nat over 2 tokens, -4 over 4: β = 2 and γ = ½ leave a margin of ½."""
    hyper = dict(lengths=(2, 4), ref=FREE, beta=2.0, gamma=0.5)
    got = cost(simpo.loss, -1.0, -4.0, **hyper)
    assert got == pytest.approx(np.log1p(np.exp(-0.5)), abs=1e-6)


def test_equal_rewards_cost_what_the_margin_asks():
    got = cost(simpo.loss, -1.0, -2.0, lengths=(2, 4), ref=FREE, gamma=1.5)
    assert got == pytest.approx(np.log1p(np.exp(1.5)), abs=1e-6)


def test_gradient_is_shared_by_the_tokens_of_a_response():
    up, down = slopes(
        simpo.loss, -1.0, -2.0, lengths=(2, 4), ref=FREE, beta=2.0, gamma=0.0
    )
    assert (up, down) == pytest.approx((-0.5, 0.25), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(simpo.loss, oracle.simpo, make_batch, beta=2.5, gamma=0.3)
