"""What list losses share: orders, one log-sum, and what they report; numbers by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import group

from alignax import lists
from alignax.batch import Batch

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
        r"mine ranks responses, .* one per prompt: use .*'groups'.*, or losses\.sft$"
    )
    with pytest.raises(ValueError, match=message):
        lists.check(batch, "mine ranks", "or losses.sft")
    lists.check(group([-1.0, 0.0], [1, 0])[1], "mine ranks")


# -- terms that several losses share, against loops in float64

EXACT = dict(rtol=1e-12, atol=1e-12)  # sums of at most some ten terms
B, G = 8, 4


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def ranked(seed=0):
    """(batch, scores [B, G]): feedback with ties, some responses and one prompt invalid."""
    rng = np.random.default_rng(seed)
    valid = rng.random((B, G)) < 0.8
    valid[0] = False
    batch = Batch(
        jnp.zeros((B, G, 3), jnp.int32), jnp.ones((B, G, 3), bool), jnp.full((B, G), 3),
        jnp.asarray(rng.integers(0, 3, (B, G)) / 2), jnp.asarray(valid),
    )  # fmt: skip
    return batch, rng.normal(size=(B, G))


def ordered(batch, b):
    """Pairs (i, j) of prompt b with i above j."""
    f, ok = np.asarray(batch.feedback)[b], np.asarray(batch.valid)[b]
    return [
        (i, j) for i in range(G) for j in range(G) if ok[i] and ok[j] and f[i] > f[j]
    ]


def best_score(batch, score, b):
    """That of the first of the valid responses with the highest feedback."""
    f, ok = np.asarray(batch.feedback)[b], np.asarray(batch.valid)[b]
    own = [i for i in range(G) if ok[i]]
    return score[b, max(own, key=lambda i: (f[i], -i))] if own else 0.0


def test_the_nll_of_the_best_response(float64):
    batch, score = ranked()
    want = [-best_score(batch, score, b) for b in range(B)]
    np.testing.assert_array_equal(lists.best_nll(jnp.asarray(score), batch), want)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_hinge_asks_for_a_gap_of_every_ordered_pair(margin, float64):
    batch, score = ranked()
    asked = margin * lists.gaps(batch.feedback) if margin else 0.0
    got, metrics = lists.hinge(batch, jnp.asarray(score), asked, 0.3)
    f = np.asarray(batch.feedback)
    for b in range(B):
        pairs, s = ordered(batch, b), score[b]
        short = [max(0, margin * (f[b, i] - f[b, j]) - s[i] + s[j]) for i, j in pairs]
        nll = -best_score(batch, score, b)
        assert float(got[b]) == pytest.approx(sum(short) + 0.3 * nll, abs=1e-12)
        assert float(metrics["nll"][b]) == nll
        right = [(np.sign(s[i] - s[j]) + 1) / 2 for i, j in pairs] or [0.5]
        assert float(metrics["accuracy"][b]) == pytest.approx(np.mean(right))
        gaps = [s[i] - s[j] for i, j in pairs] or [0.0]
        assert float(metrics["margin"][b]) == pytest.approx(np.mean(gaps), abs=1e-12)


def test_plackett_luce_is_the_probability_of_an_order(float64):
    """Without ties: the values of all orders are probabilities that sum to 1."""
    score = np.random.default_rng(0).normal(size=G)
    total = 0.0
    for order in itertools.permutations(range(G)):
        batch = ranked()[0]
        batch = batch._replace(
            feedback=jnp.asarray([order], float), valid=jnp.ones((1, G), bool)
        )
        value, _ = lists.plackett_luce(batch, jnp.asarray(score[None]))
        left, want = list(np.argsort(order)[::-1]), 1.0
        while left:  # the best of those that are left is drawn first
            weights = np.exp(score[left])
            want *= weights[0] / weights.sum()
            left = left[1:]
        assert math.exp(-float(value[0])) == pytest.approx(want, rel=1e-12)
        total += want
    assert total == pytest.approx(1, rel=1e-12)


def test_plackett_luce_never_compares_ties_or_invalid_responses(float64):
    batch, score = ranked()
    got, _ = lists.plackett_luce(batch, jnp.asarray(score))
    for b in range(B):
        below = [[j for i, j in ordered(batch, b) if i == k] for k in range(G)]
        want = sum(
            math.log(1 + sum(math.exp(score[b, i] - score[b, k]) for i in below[k]))
            for k in range(G)
        )
        assert float(got[b]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("constraint", lists.CONSTRAINTS)
def test_constrained_alignment_and_its_gradient(constraint, float64):
    batch, score = ranked()
    slack = 0.2

    def total(s):
        value = lists.constrained_alignment(s, lists.above(batch), constraint, slack)
        return value.sum(), value

    (_, value), grads = jax.value_and_grad(total, has_aux=True)(jnp.asarray(score))
    for b in range(B):
        pairs, s = ordered(batch, b), score[b]
        boundary = {j: min(s[i] for i, k in pairs if k == j) - slack for _, j in pairs}
        whole, slope = 1.0, np.zeros(G)
        for i, j in pairs:
            push = math.exp(s[j] - s[i])
            whole += push
            slope[i] -= push
            slope[j] += 0 if constraint == "detached" else push
            if constraint == "boundary":
                pull = math.exp(2 * boundary[j] - s[i] - s[j])
                whole += pull
                slope[j] -= pull  # the target 2 B_j - s_i is a constant
        assert float(value[b]) == pytest.approx(math.log(whole), abs=1e-12)
        np.testing.assert_allclose(grads[b], slope / whole, **EXACT)


def test_an_unknown_constraint_is_refused_by_the_name_of_the_loss():
    with pytest.raises(
        ValueError, match=r"mine: .*'bound'; known: none, detached, bou"
    ):
        lists.check_constraint("bound", "mine")
    lists.check_constraint("detached", "mine")
