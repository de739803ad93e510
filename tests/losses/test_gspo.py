"""GSPO: one ratio a response, by hand."""

import math

import numpy as np
import pytest
from losses_rollouts import (
    assert_first_step_is_reinforce,
    assert_no_variance_no_gradient,
    assert_oracle,
    cost,
    group,
    slopes,
)
from oracles import losses as oracle

from alignax.losses import gspo

loss = gspo.loss
WIDE = dict(clip_low=0.2, clip_high=0.2)


def test_golden_number():
    """s = e^0.1 and 1.5 (above 1.2); advantages 2 and -1: -(2.2103 - 1.5) / 2."""
    got = cost(loss, [[0.3, -0.1], [math.log(1.5)]], [[2, 2], [-1]], **WIDE)
    assert got == pytest.approx(-(2 * math.exp(0.1) - 1.5) / 2, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_first_step_is_reinforce(make_batch, reduction):
    assert_first_step_is_reinforce(loss, make_batch, reduction)


def test_a_group_without_variance_has_no_gradient(make_batch):
    assert_no_variance_no_gradient(loss, make_batch, **WIDE)


def test_tokens_share_the_gradient_of_their_response():
    got = slopes(loss, [[2.0, -1.9, 0.05]], [[1, 1, 1]], **WIDE)
    np.testing.assert_allclose(got, -math.exp(0.05) / 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("log_s", "advantage", "flows"),
    [(0.3, 1, False), (0.3, -1, True), (-0.3, 1, True), (-0.3, -1, False)],
)
def test_a_response_is_clipped_whole_and_on_one_side(log_s, advantage, flows):
    rows = [[log_s - 5, log_s + 5]], [[advantage] * 2]
    got = slopes(loss, *rows, **WIDE)
    want = -math.exp(log_s) * advantage / 2 if flows else 0.0
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_papers_bounds_are_narrow():
    assert cost(loss, [[0.1] * 4], [[1] * 4]) == pytest.approx(-1.0004, abs=1e-6)
    assert cost(loss, [[-0.1] * 4], [[-1] * 4]) == pytest.approx(0.9997, abs=1e-6)


def test_one_hopeless_token_does_not_silence_a_bad_response():
    got = slopes(loss, [[1e4, 0.0]], [[-1, -1]])
    assert np.isfinite(got).all()
    assert (got > 1e6).all()


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_random_rollouts_are_those_of_the_oracle(make_batch, reduction):
    hyper = dict(clip_low=0.02, clip_high=0.05, reduction=reduction)
    assert_oracle(loss, oracle.gspo, make_batch, **hyper)


def test_metrics_are_of_the_responses_ratio():
    metrics = loss(*group([[1.0, 0.0]], [[1, 1]]))[1]
    assert float(metrics["ratio"][0]) == pytest.approx(math.exp(0.5), rel=1e-5)
    assert float(metrics["clipped"][0]) == 1
