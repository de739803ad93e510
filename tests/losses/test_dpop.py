"""DPO-Positive: numbers by hand, and where the penalty acts."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import dpo, dpop


def test_golden_number():
    """h = 2, chosen fell by 1, λ = 3, β = ½: log(1 + e^½)."""
    got = cost(dpop.loss, -1.0, -3.0, beta=0.5, lam=3.0)
    assert got == pytest.approx(np.log1p(np.exp(0.5)), abs=1e-6)


@pytest.mark.parametrize("chosen", [2.0, 0.0])
def test_where_chosen_has_not_fallen_it_is_dpo_in_value_and_gradient(chosen):
    """At 0 too: that is where every run starts."""
    sides = (chosen, -1.0)
    assert cost(dpop.loss, *sides, beta=0.5) == cost(dpo.loss, *sides, beta=0.5)
    assert slopes(dpop.loss, *sides, beta=0.5) == slopes(dpo.loss, *sides, beta=0.5)


def test_where_chosen_has_fallen_it_is_raised_first():
    up, down = slopes(dpop.loss, -1.0, -3.0, lam=3.0)
    assert up < 0 < down
    assert up / down == pytest.approx(-4, rel=1e-5)  # 1 + λ


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(dpop.loss, oracle.dpop, make_batch, beta=0.3, lam=5.0)
