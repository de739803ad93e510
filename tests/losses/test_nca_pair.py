"""NCA on pairs: numbers by hand."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import nca_pair


def test_golden_number():
    """r = 2, -1: softplus(-2) + ½ softplus(2) + ½ softplus(-1)."""
    got = cost(nca_pair.loss, 4.0, -2.0, beta=0.5)
    assert got == pytest.approx(0.126928 + 2.126928 / 2 + 0.313262 / 2, abs=1e-5)


def test_policy_equal_to_reference_costs_two_log_two():
    assert cost(nca_pair.loss) == pytest.approx(2 * np.log(2), abs=1e-6)


def test_chosen_stops_at_twice_the_reference_and_rejected_never_stops():
    """∂L/∂r⁺ = -(1 - σ) + σ/2 = 0 at σ(r⁺) = 2/3."""
    stop, down = slopes(nca_pair.loss, float(np.log(2)), 0.0, beta=1.0)
    assert stop == pytest.approx(0, abs=1e-6)
    assert down == pytest.approx(0.25, abs=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(nca_pair.loss, oracle.nca_pair, make_batch, beta=0.3)
