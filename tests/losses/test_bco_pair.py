"""BCO on pairs: numbers by hand and the bound on DPO."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import bco_pair, dpo


def test_golden_number():
    """r = 2, -1: softplus(-2) + softplus(-1)."""
    got = cost(bco_pair.loss, 4.0, -2.0, beta=0.5)
    assert got == pytest.approx(0.126928 + 0.313262, abs=1e-5)


def test_policy_equal_to_reference_costs_two_log_two():
    assert cost(bco_pair.loss) == pytest.approx(2 * np.log(2), abs=1e-6)


@pytest.mark.parametrize("delta", [-2.0, 0.0, 0.5])
def test_it_bounds_dpo_from_above(delta):
    for sides in [(3.0, -1.0), (0.0, 0.0), (-2.0, 1.0)]:
        bound = cost(bco_pair.loss, *sides, beta=0.5, delta=delta)
        assert bound > cost(dpo.loss, *sides, beta=0.5)


def test_the_best_shift_is_the_mean_reward():
    """r = 2, -1: δ = ½."""
    at = [cost(bco_pair.loss, 4.0, -2.0, beta=0.5, delta=d) for d in (0.4, 0.5, 0.6)]
    assert at[1] < min(at[0], at[2])


def test_each_side_is_pushed_by_its_own_reward_alone():
    first, _ = slopes(bco_pair.loss, 0.5, -3.0, beta=1.0)
    second, down = slopes(bco_pair.loss, 0.5, 3.0, beta=1.0)
    assert first == second < 0 < down


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(bco_pair.loss, oracle.bco_pair, make_batch, beta=0.3, delta=0.2)
