"""SimNPO: numbers by hand."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import npo, simnpo


def test_golden_number():
    """beta = 2, gamma = 0.5, mean -1: softplus(-1.5), whatever the length."""
    for n in (1, 4):
        got = cost(simnpo.loss, [-1.0], [0], lengths=[n], beta=2.0, gamma=0.5)
        assert got == pytest.approx(0.20141328, abs=1e-6)
    assert cost(simnpo.loss, [-1.5], [1], retain_weight=2.0) == pytest.approx(3.0)


def test_it_is_npo_of_one_token_under_a_reference_of_certainty():
    hyper = dict(beta=0.7, retain_weight=1.3)
    scores, feedback = [-1.2, -0.3], [0, 1]
    assert cost(
        simnpo.loss, scores, feedback, lengths=[1, 1], **hyper
    ) == pytest.approx(cost(npo.loss, scores, feedback, lengths=[1, 1], **hyper))


def test_gradient_lowers_a_forget_row_ever_less_and_raises_a_retain_row():
    near, far, retain = (
        slopes(simnpo.loss, [score], [label])[0]
        for score, label in ((-0.1, 0), (-2.0, 0), (-1.0, 1))
    )
    assert near > far > 0 > retain
    assert far == pytest.approx(2 / (1 + np.exp(5.0)), rel=1e-5)


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(
        simnpo.loss, oracle.simnpo, make_batch, labels=True, beta=1.5, gamma=0.2,
        retain_weight=1.7,
    )  # fmt: skip
