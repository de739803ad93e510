"""AFT on rankings: numbers by hand, and what it has in common with two labels."""

import math

import numpy as np
import pytest
from losses_lists import assert_oracle, cost, group, slopes
from oracles import losses as oracle

from alignax.losses import aft, aft_ranking

SCORES, FEEDBACK = [-1.0, -2.0, -1.5], [2, 1, 0]


def test_golden_number():
    """B = (-1.5, -2.5) of the second and third; the best has nll 1."""
    pairs = math.exp(-2 + 1) + math.exp(-1.5 + 1) + math.exp(-1.5 + 2)
    bounds = math.exp(-3 + 1 + 2) + math.exp(-5 + 1 + 1.5) + math.exp(-5 + 2 + 1.5)
    for constraint, more in {"none": 0, "detached": 0, "boundary": bounds}.items():
        got = cost(
            aft_ranking.loss,
            SCORES,
            FEEDBACK,
            constraint=constraint,
            slack=0.5,
            lam=2.0,
        )
        assert got == pytest.approx(math.log(1 + pairs + more) + 2, rel=1e-6)


@pytest.mark.parametrize("constraint", aft.CONSTRAINTS)
def test_two_levels_are_the_binary_loss(constraint):
    scores, labels = [-1.0, -2.0, -1.5, -0.7], [1, 1, 0, 0]
    hyper = dict(constraint=constraint, slack=0.3, lam=0.5)
    assert cost(aft_ranking.loss, scores, labels, **hyper) == pytest.approx(
        cost(aft.loss, scores, labels, **hyper), rel=1e-6
    )
    np.testing.assert_allclose(
        slopes(aft_ranking.loss, scores, labels, **hyper),
        slopes(aft.loss, scores, labels, **hyper),
        rtol=1e-5,
    )


def test_the_last_is_at_rest_below_the_least_likely_of_the_better():
    slope = slopes(aft_ranking.loss, [-1.0, -2.0, -2.3], FEEDBACK, slack=0.3)
    assert slope[2] == pytest.approx(0, abs=1e-6)


def test_detached_raises_without_lowering():
    slope = slopes(aft_ranking.loss, SCORES, FEEDBACK, constraint="detached", lam=0.0)
    assert (slope[:2] < 0).all()
    assert slope[2] == 0


@pytest.mark.parametrize("constraint", aft_ranking.CONSTRAINTS)
def test_ragged_groups_are_those_of_the_oracle(make_batch, constraint):
    assert_oracle(
        aft_ranking.loss, oracle.aft_ranking, make_batch, constraint=constraint,
        slack=0.3, lam=0.7,
    )  # fmt: skip


def test_an_unknown_constraint_and_a_single_response_are_errors():
    with pytest.raises(ValueError, match="'bound'; known: none, detached, boundary"):
        aft_ranking.loss(*group(SCORES, FEEDBACK), constraint="bound")
    with pytest.raises(ValueError, match=r"aft_ranking ranks .* one per prompt: use"):
        aft_ranking.loss(*group([-1.0], [1]))


@pytest.mark.parametrize(
    "feedback, imitated",
    [
        ([0, 0, 0], False),  # all wrong: there is nothing to learn from
        ([1, 1, 1], True),  # all right
        ([0, 0, 1], True),
        ([0.3, 0.1, 0], False),  # the best of wrong ones is wrong
    ],
)
def test_a_wrong_answer_is_never_imitated(feedback, imitated):
    slope = slopes(aft_ranking.loss, SCORES, feedback, constraint="detached")
    raised = (slope < 0).nonzero()[0].tolist()
    best = int(np.argmax(feedback))
    compared = len(set(feedback)) > 1
    assert (best in raised) == (imitated or compared)
    got = cost(aft_ranking.loss, SCORES, feedback, lam=1.0)
    alone = cost(aft_ranking.loss, SCORES, feedback, lam=0.0)
    assert got - alone == pytest.approx(-SCORES[best] * imitated, abs=1e-6)
    anyway = cost(aft_ranking.loss, SCORES, feedback, lam=1.0, right=-math.inf)
    assert anyway - alone == pytest.approx(-SCORES[best], abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 1, 1]])
def test_on_any_labels_the_loss_is_the_binary_one(labels):
    assert cost(aft_ranking.loss, SCORES, labels) == pytest.approx(
        cost(aft.loss, SCORES, labels), rel=1e-6, abs=1e-7
    )
