"""DPO for unlearning: numbers by hand."""

import numpy as np
import pytest
from losses_lists import cost, group, random_groups, slopes
from oracles import losses as oracle

from alignax.losses import dpo, unlearn_dpo


def test_golden_number():
    """beta = 0.5, log-ratios 3 and -1: 4 log(1 + e^-2)."""
    got = cost(unlearn_dpo.loss, [1.5, -0.5], [1, 0], beta=0.5)
    assert got == pytest.approx(4 * 0.126928011, rel=1e-6)


def test_a_forget_prompt_is_dpo_at_another_scale():
    scores = [-1.0, -0.4]
    got = cost(unlearn_dpo.loss, scores, [1, 0], beta=0.2, retain_weight=9.0)
    assert got == pytest.approx(10 * cost(dpo.loss, scores, [1, 0], beta=0.2), rel=1e-6)


@pytest.mark.parametrize("feedback, valid", [([1, 0], [True, False]), ([1, 1], None)])
def test_a_retain_prompt_costs_the_nll_of_its_answer(feedback, valid):
    """A group of one is filled up with an invalid row."""
    hyper = dict(valid=valid, retain_weight=2.0)
    assert cost(unlearn_dpo.loss, [-1.5, -9.0], feedback, **hyper) == pytest.approx(3.0)
    slope = slopes(unlearn_dpo.loss, [-1.5, -9.0], feedback, **hyper)
    np.testing.assert_allclose(slope, [-2, 0])


def test_without_its_refusal_a_forget_prompt_costs_nothing():
    assert cost(unlearn_dpo.loss, [-1.0, -1.0], [1, 0], valid=[False, True]) == 0


def test_random_prompts_are_those_of_the_oracle(make_batch):
    scores, batch = random_groups(make_batch, labels=True, g=2)
    hyper = dict(beta=0.4, retain_weight=1.7)
    got = unlearn_dpo.loss(scores, batch, **hyper)[0]
    rows = oracle.groups(scores, batch)
    want = [oracle.unlearn_dpo(*group, **hyper) for group in rows]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_other_groups_are_errors():
    with pytest.raises(ValueError, match="pairs got 1 responses"):
        unlearn_dpo.loss(*group([-1.0], [1]))


@pytest.mark.parametrize("feedback", [[9, 4], [1, 0.9], [0.2, 0.1]])
def test_a_pair_with_scores_is_to_be_forgotten(feedback):
    scores = [-1.5, -0.4]
    want = cost(unlearn_dpo.loss, scores, [1, 0])
    assert cost(unlearn_dpo.loss, scores, feedback) == pytest.approx(want)
