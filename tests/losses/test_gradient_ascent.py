"""Gradient ascent: numbers by hand."""

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import gradient_ascent


def test_golden_number():
    """A forget row of nll 0.5 costs -0.5, a retain row of nll 1.5 costs 2 * 1.5."""
    assert cost(gradient_ascent.loss, [-0.5], [0]) == pytest.approx(-0.5)
    got = cost(gradient_ascent.loss, [-0.5, -1.5], [0, 1], retain_weight=2.0)
    assert got == pytest.approx((-0.5 + 3.0) / 2)


def test_without_a_retain_term_retain_rows_are_ignored():
    slope = slopes(gradient_ascent.loss, [-0.5, -1.5], [0, 1], retain_weight=0.0)
    np.testing.assert_array_equal(slope, [0.5, 0])


@pytest.mark.parametrize("score", [-0.1, -3.0, -200.0])
def test_it_never_comes_to_rest(score):
    """By the mean log-probability: 1 on a forget row, -1 on a retain row."""
    slope = slopes(gradient_ascent.loss, [score], [0], lengths=[3])
    np.testing.assert_allclose(slope, 1.0, rtol=1e-6)
    slope = slopes(gradient_ascent.loss, [score], [1], lengths=[3])
    np.testing.assert_allclose(slope, -1.0, rtol=1e-6)


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    assert_oracle(
        gradient_ascent.loss, oracle.gradient_ascent, make_batch, labels=True,
        retain_weight=1.7,
    )  # fmt: skip


def test_metrics_are_means_over_the_rows_of_a_kind():
    _, metrics = gradient_ascent.loss(*group([-1.0, -2.0, -0.6], [0, 0, 1]))
    assert float(metrics["forget_nll"][0]) == pytest.approx(1.5)
    assert float(metrics["retain_nll"][0]) == pytest.approx(0.6)
