"""What list losses share: orders, one log-sum, and what they report; numbers by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import group

from alignax import lists

NAN = float("nan")


def pairs_of(mask):
    """The True places of [1, G, G] as pairs (i, j)."""
    return [(int(i), int(j)) for i, j in np.argwhere(np.asarray(mask)[0])]


def test_above_is_a_strict_order_of_valid_responses():
    _, batch = group([0.0] * 4, [1, 3, 1, 2], valid=[True, True, True, False])
    assert pairs_of(lists.above(batch)) == [(1, 0), (1, 2)]


def test_feedback_that_is_no_number_is_in_no_pair():
    _, batch = group([0.0] * 3, [NAN, 1, 0])
    assert pairs_of(lists.above(batch)) == [(1, 2)]


@pytest.mark.parametrize(
    ("feedback", "valid", "want"),
    [
        ([0, 2, 1], [True, True, True], [1]),
        ([0, 2, 1], [True, False, True], [2]),
        ([2, 0, 2], [True, True, True], [0, 2]),
        ([1, 1, 0], [False, False, False], []),
    ],
)
def test_best_are_the_valid_responses_with_the_highest_feedback(feedback, valid, want):
    _, batch = group([0.0] * 3, feedback, valid=valid)
    assert np.flatnonzero(lists.best(batch)[0]).tolist() == want


def test_gaps_are_first_minus_second():
    got = lists.gaps(jnp.float32([[1.0, 3.0], [0.0, -2.0]]))
    np.testing.assert_array_equal(got, [[[0, -2], [2, 0]], [[0, 2], [-2, 0]]])


def test_mean_log_probs_do_not_depend_on_length():
    policy, batch = group([-1.5, -0.5], [1, 0], lengths=[1, 6])
    got = lists.mean_log_probs(policy, batch)
    np.testing.assert_allclose(got, [[-1.5, -0.5]], rtol=1e-6)


def test_a_response_without_scored_tokens_has_mean_zero():
    policy, batch = group([0.0, -1.0], [1, 0])
    batch = batch._replace(mask=batch.mask.at[0, 0].set(False))
    np.testing.assert_allclose(lists.mean_log_probs(policy, batch), [[0, -1]])


def test_first_is_that_of_the_earliest_true_place_or_zero():
    x = jnp.float32([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    where = jnp.array([[False, True, True], [True, False, True], [False] * 3])
    np.testing.assert_array_equal(lists.first(x, where), [6, 5, 0])


# -- log(1 + sum exp)

PAIRS = jnp.array([[[False, True, True], [False, False, True], [False] * 3]])
TERM = jnp.float32([[[9, -1, 0.5], [9, 9, 2], [9, 9, 9]]])  # 9 where it must not count


def test_log1p_sum_exp_sums_over_the_second_of_a_pair():
    got = lists.log1p_sum_exp(PAIRS, TERM)
    want = [math.log(1 + math.exp(-1) + math.exp(0.5)), math.log(1 + math.exp(2)), 0]
    np.testing.assert_allclose(got, [want], rtol=1e-6)


def test_log1p_sum_exp_of_several_terms_over_all_pairs():
    got = lists.log1p_sum_exp(PAIRS, TERM, -TERM, axis=(1, 2))
    want = 1 + sum(math.exp(x) for t in (-1, 0.5, 2) for x in (t, -t))
    np.testing.assert_allclose(got, [math.log(want)], rtol=1e-6)


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_log1p_sum_exp_is_finite_however_large_the_terms(size):
    def total(term):
        return lists.log1p_sum_exp(PAIRS, term, axis=(1, 2))[0]

    for scale, value in ((size, size + math.log(3)), (-size, 0.0)):
        term = jnp.full_like(TERM, scale)
        got, grad = jax.value_and_grad(total)(term)
        assert float(got) == pytest.approx(value, rel=1e-6)
        # the pairs share a slope of 1 where all is large, and of 0 where all is small
        np.testing.assert_allclose(grad, PAIRS * (value > 0) / 3, rtol=1e-6)


def test_gradient_of_log1p_sum_exp_is_a_softmax_with_a_zero():
    grad = jax.grad(lambda t: lists.log1p_sum_exp(PAIRS, t).sum())(TERM)
    z = 1 + math.exp(-1) + math.exp(0.5)
    want = np.zeros((1, 3, 3))
    want[0, 0, 1:] = math.exp(-1) / z, math.exp(0.5) / z
    want[0, 1, 2] = math.exp(2) / (1 + math.exp(2))
    np.testing.assert_allclose(grad, want, rtol=1e-5)


# -- what is reported


def reported(scores, feedback, **more):
    policy, batch = group(scores, feedback, **more)
    gap = lists.gaps(lists.mean_log_probs(policy, batch))
    value, metrics = lists.outcome(batch, jnp.float32([7.0]), lists.above(batch), gap)
    return float(value[0]), {k: float(v[0]) for k, v in metrics.items()}


def test_accuracy_and_margin_are_means_over_ordered_pairs():
    """Gaps of the pairs: 1 > 2 by 1, 1 > 3 by 0 (half right), 2 > 3 by -1."""
    value, metrics = reported([-1.0, -2.0, -1.0], [2, 1, 0])
    assert value == 7
    assert metrics == {"accuracy": pytest.approx(0.5), "margin": pytest.approx(0)}
    _, metrics = reported([-1.0, -2.0, -4.0], [2, 1, 0])
    assert metrics == {"accuracy": 1, "margin": pytest.approx((1 + 3 + 2) / 3)}


def test_without_an_order_accuracy_is_a_half():
    _, metrics = reported([-1.0, -2.0], [1, 1])
    assert metrics == {"accuracy": 0.5, "margin": 0}


def test_a_prompt_without_a_valid_response_costs_nothing():
    assert reported([-1.0, -2.0], [1, 0], valid=[False, False])[0] == 0


def test_further_metrics_are_passed_on():
    policy, batch = group([-1.0, -2.0], [1, 0])
    gap = lists.gaps(lists.mean_log_probs(policy, batch))
    one = jnp.float32([1.0])
    _, metrics = lists.outcome(batch, one, lists.above(batch), gap, nll=3 * one)
    assert float(metrics["nll"][0]) == 3


def test_a_single_response_is_refused_by_the_name_of_the_loss():
    _, batch = group([-1.0], [1])
    message = (
        r"mine ranks responses, .* one a prompt: use .*'groups'.*, or losses\.sft$"
    )
    with pytest.raises(ValueError, match=message):
        lists.check(batch, "mine ranks", "or losses.sft")
    lists.check(group([-1.0, 0.0], [1, 0])[1], "mine ranks")
