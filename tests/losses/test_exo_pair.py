"""EXO on pairs: a KL between two Bernoulli distributions."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import exo_pair


def test_golden_number():
    """βh = 0: KL((½, ½) ‖ (0.9, 0.1)) = log ½ - ½ log 0.09."""
    got = cost(exo_pair.loss, beta=0.5, label_smoothing=0.1)
    assert got == pytest.approx(0.510826, abs=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_it_is_least_where_the_policy_prefers_as_the_label_does(eps):
    best = float(np.log((1 - eps) / eps))
    hyper = dict(beta=1.0, label_smoothing=eps)
    assert cost(exo_pair.loss, best, 0.0, **hyper) == pytest.approx(0, abs=1e-6)
    assert slopes(exo_pair.loss, best, 0.0, **hyper) == pytest.approx((0, 0), abs=1e-5)
    assert min(cost(exo_pair.loss, best + d, 0.0, **hyper) for d in (-1.0, 1.0)) > 0


def test_gradient_raises_chosen_and_lowers_rejected():
    up, down = slopes(exo_pair.loss, 0.5, 0.2)
    assert up < 0 < down


def test_a_hopeless_pair_has_no_gradient():
    """The price of the reverse KL: it ignores a mode that the policy left (DPO does not)."""
    assert slopes(exo_pair.loss, -500.0, 0.0, beta=1.0) == (0, 0)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(
        exo_pair.loss, oracle.exo_pair, make_batch, beta=0.3, label_smoothing=0.1
    )
