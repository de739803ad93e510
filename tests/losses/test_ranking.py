"""ACT's ranking loss: numbers by hand."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import ranking, rrhf

SCORES, FEEDBACK = [-1.0, -2.0, -0.5], [2, 1, 0]


def test_golden_number():
    """Gaps 0.5 + 0.1 * 2 and 1.5 + 0.1 * 1; the best has nll 1."""
    got = cost(ranking.loss, SCORES, FEEDBACK, margin=0.1, lam=1.0)
    assert got == pytest.approx(0.7 + 1.6 + 1.0, rel=1e-6)


def test_without_a_margin_it_is_rrhf():
    got = cost(ranking.loss, SCORES, FEEDBACK, margin=0.0, lam=0.3)
    assert got == pytest.approx(cost(rrhf.loss, SCORES, FEEDBACK, lam=0.3))


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0])
def test_a_pair_is_left_alone_once_it_is_as_far_apart_as_its_feedback_asks(gap):
    def slope(score):
        return slopes(ranking.loss, [score, -1.0], [gap, 0], margin=0.4, lam=0.0)

    np.testing.assert_array_equal(slope(-1.0 + 0.4 * gap + 0.01), [0, 0])
    np.testing.assert_array_equal(slope(-1.0 + 0.4 * gap - 0.01), [-1, 1])


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(ranking.loss, oracle.ranking, make_batch, margin=0.2, lam=0.7)


def test_a_single_response_is_no_ranking():
    with pytest.raises(ValueError, match=r"ranking compares .* one per prompt: use"):
        ranking.loss(*group([-1.0], [1]))
