"""Cal-DPO: numbers by hand."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import cal_dpo


def test_golden_number():
    """β = ¼, target 2: log(1 + e^-4) + ½ (1² + 1²)."""
    got = cost(cal_dpo.loss, 3.0, -1.0, beta=0.25)
    assert got == pytest.approx(np.log1p(np.exp(-4)) + 1, abs=1e-5)


def test_the_same_margin_off_its_targets_costs_more():
    """Unlike DPO, it pins both rewards."""
    assert cost(cal_dpo.loss, 4.0, 0.0, beta=0.25) == pytest.approx(
        cost(cal_dpo.loss, 2.0, -2.0, beta=0.25) + 4, abs=1e-5
    )


def test_gradient_at_the_reference_is_the_target_and_a_half():
    got = slopes(cal_dpo.loss, 0.0, 0.0, beta=0.25)
    assert got == pytest.approx((-2.5, 2.5), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(cal_dpo.loss, oracle.cal_dpo, make_batch, beta=0.3)
