"""What losses on pairs share, against loops over prompts and tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.losses import log_sigmoid, sequence

from alignax import pairs
from alignax.batch import Batch, Scores

B, T = 5, 7
EXACT = dict(rtol=1e-13, atol=1e-13)  # float64, sums of at most ten terms


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def given(seed=0, g=2) -> tuple[Scores, Batch]:
    """Random pairs of different lengths; the first pair lacks a valid response."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T - 1, (B, g))
    at = np.arange(T)
    mask = (at >= 1) & (at <= lengths[..., None])
    logps, ref = (np.where(mask, rng.uniform(-3, 0, mask.shape), 0) for _ in range(2))
    valid = np.ones((B, g), bool)
    valid[0, -1] = False
    return Scores(jnp.asarray(logps)), Batch(
        jnp.zeros(mask.shape, jnp.int32), jnp.asarray(mask), jnp.asarray(lengths + 1),
        jnp.zeros((B, g)), jnp.asarray(valid), ref_logps=jnp.asarray(ref),
    )  # fmt: skip


def sums(x, batch):
    """(chosen, rejected) sums over scored tokens."""
    x, mask = np.asarray(x), np.asarray(batch.mask)
    return tuple(np.array([sequence(x, mask, b, g) for b in range(B)]) for g in (0, 1))


def counts(batch):
    mask = np.asarray(batch.mask)
    return tuple(np.array([sum(row) for row in mask[:, g]]) for g in (0, 1))


def test_log_probs_are_sums_over_scored_tokens():
    policy, batch = given()
    np.testing.assert_allclose(
        pairs.log_probs(policy, batch), sums(policy.logps, batch), **EXACT
    )
    np.testing.assert_allclose(
        pairs.ref_log_probs(batch), sums(batch.ref_logps, batch), **EXACT
    )


def test_log_ratios_are_differences_of_log_probs():
    policy, batch = given()
    own, ref = sums(policy.logps, batch), sums(batch.ref_logps, batch)
    want = [p - r for p, r in zip(own, ref, strict=True)]
    np.testing.assert_allclose(pairs.log_ratios(policy, batch), want, **EXACT)


def test_lengths_count_scored_tokens_and_are_at_least_one():
    _, batch = given()
    np.testing.assert_array_equal(pairs.lengths(batch), counts(batch))
    bare = batch._replace(mask=jnp.zeros_like(batch.mask))
    np.testing.assert_array_equal(pairs.lengths(bare), np.ones((2, B)))


def test_per_token_divides_each_side_by_its_own_length():
    policy, batch = given()
    got = pairs.per_token(*pairs.log_probs(policy, batch), batch)
    both = zip(sums(policy.logps, batch), counts(batch), strict=True)
    np.testing.assert_allclose(got, [total / n for total, n in both], **EXACT)


def test_the_nll_of_the_chosen_response_is_a_mean_over_its_tokens():
    policy, batch = given()
    want = -sums(policy.logps, batch)[0] / counts(batch)[0]
    np.testing.assert_allclose(pairs.chosen_nll(policy, batch), want, **EXACT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_logistic_loss_is_the_cross_entropy_of_a_smoothed_label(smoothing):
    margin = np.array([-800.0, -2.0, 0.0, 0.3, 800.0])
    p = [log_sigmoid(x) for x in margin]
    q = [log_sigmoid(-x) for x in margin]
    want = [-(1 - smoothing) * a - smoothing * b for a, b in zip(p, q, strict=True)]
    got = pairs.logistic(jnp.asarray(margin), smoothing)
    np.testing.assert_allclose(got, want, **EXACT)
    # its slope is the probability of the label less that of the model
    slope = jax.grad(lambda x: pairs.logistic(x, smoothing).sum())(jnp.asarray(margin))
    np.testing.assert_allclose(slope, np.exp(p) - (1 - smoothing), **EXACT)


def test_the_calibration_error_is_zero_at_half_over_beta():
    got = pairs.calibration_error(jnp.array([2.0, 5.0]), jnp.array([-2.0, 1.0]), 0.25)
    np.testing.assert_array_equal(got, [0, 9 + 9])


def test_a_quantile_gap_is_to_the_element_of_the_same_rank():
    """By sorting lists; the elements that do not count come out as they are."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, other = rng.normal(size=(2, B))
        valid = rng.random(B) < 0.7
        ranked = sorted(x[valid])
        ordered = sorted(other[valid])
        want = [
            v - (ordered[ranked.index(v)] if ok else 0)
            for v, ok in zip(x, valid, strict=True)
        ]
        got = pairs.quantile_gap(jnp.asarray(x), jnp.asarray(other), jnp.asarray(valid))
        np.testing.assert_allclose(got, want, **EXACT)


def test_the_gradient_of_a_quantile_gap_keeps_the_ranks():
    x, other = jnp.array([3.0, 1.0, 2.0]), jnp.array([7.0, 9.0, 8.0])
    weights, valid = jnp.array([1.0, 10.0, 100.0]), jnp.array([True, True, True])

    def total(x, other):
        return weights @ pairs.quantile_gap(x, other, valid)

    by_x, by_other = jax.grad(total, (0, 1))(x, other)
    np.testing.assert_array_equal(by_x, [1, 10, 100])
    # ranks of x are 2, 0, 1: the elements of `other` with these ranks are 9, 7, 8
    np.testing.assert_array_equal(by_other, [-10, -1, -100])


def test_the_outcome_of_a_pair_without_a_valid_side_is_zero():
    _, batch = given()
    value = jnp.arange(1.0, B + 1)
    chosen = jnp.array([1.0, -2.0, 0.5, 3.0, 0.0])
    rejected = jnp.array([0.0, 1.0, 0.5, -1.0, 4.0])
    got, metrics = pairs.outcome(batch, value, chosen, rejected, nll=2 * value)
    np.testing.assert_array_equal(got, [0, 2, 3, 4, 5])
    assert list(metrics) == ["accuracy", "margin", "nll"]
    np.testing.assert_array_equal(metrics["accuracy"], [1, 0, 0.5, 1, 0])
    np.testing.assert_array_equal(metrics["margin"], [1, -3, 0, 4, -4])
    np.testing.assert_array_equal(metrics["nll"], 2 * value)


def test_the_outcome_of_implicit_rewards_reports_log_ratios_too():
    _, batch = given()
    value = jnp.arange(1.0, B + 1)
    chosen, rejected = jnp.arange(0.0, B), jnp.full(B, 2.0)
    got, metrics = pairs.implicit_outcome(
        batch, value, chosen, rejected, 0.5, penalty=value
    )
    np.testing.assert_array_equal(got, [0, 2, 3, 4, 5])
    want = {
        "accuracy": [0, 0, 0.5, 1, 1],
        "margin": [0.5 * (i - 2) for i in range(B)],
        "log_ratio_chosen": range(B),
        "log_ratio_rejected": [2] * B,
        "penalty": range(1, B + 1),
    }
    assert metrics.keys() == want.keys()
    for name, numbers in want.items():
        np.testing.assert_array_equal(metrics[name], list(numbers), err_msg=name)


@pytest.mark.parametrize("g", [1, 3])
def test_other_groups_than_pairs_are_refused(g):
    policy, batch = given(g=g)
    for call in (pairs.log_probs, pairs.log_ratios, pairs.chosen_nll):
        with pytest.raises(ValueError, match=f"pairs got {g} responses per prompt"):
            call(policy, batch)


def test_log_ratios_need_a_reference():
    policy, batch = given()
    with pytest.raises(ValueError, match="ref_logps is None"):
        pairs.log_ratios(policy, batch._replace(ref_logps=None))
