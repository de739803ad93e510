"""SPPO with hard labels: numbers by hand."""

import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import sppo_hard


def test_golden_number():
    """β = 0.25, target 2: (3 - 2)² + (-1 + 2)²."""
    assert cost(sppo_hard.loss, 3.0, -1.0, beta=0.25) == pytest.approx(2, abs=1e-5)


def test_both_log_ratios_have_a_target():
    assert cost(sppo_hard.loss, 2.0, -2.0, beta=0.25) == pytest.approx(0, abs=1e-6)
    assert cost(sppo_hard.loss, 4.0, 0.0, beta=0.25) > 1  # the margin is not enough


def test_policy_equal_to_reference_is_pushed_apart_by_one_over_beta():
    got = slopes(sppo_hard.loss, 0.0, 0.0, beta=0.25)
    assert got == pytest.approx((-4, 4), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(sppo_hard.loss, oracle.sppo_hard, make_batch, beta=0.3)
