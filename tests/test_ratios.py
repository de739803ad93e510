"""KL estimators against the exact KL, by summing over a vocabulary of five."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import ratios
from alignax.batch import Batch, Scores, from_groups
from alignax.shaping import kl as kl_in_the_reward

V = 5
rng = np.random.default_rng(1)
THETA, REF = rng.normal(size=V), rng.dirichlet(np.ones(V))
PI = np.exp(THETA) / np.exp(THETA).sum()
LOG_RATIO = np.log(PI) - np.log(REF)
REVERSE, FORWARD = PI @ LOG_RATIO, -REF @ LOG_RATIO  # KL(π ‖ ref), KL(ref ‖ π)
# By the logits θ of π = softmax(θ), in float64.
REVERSE_SLOPE = PI * (LOG_RATIO - REVERSE)
FORWARD_SLOPE = PI - REF


def every_token():
    """A batch whose responses are the tokens of the vocabulary, one each."""
    batch = from_groups([[0]], [[[v] for v in range(V)]], length=3)
    batch = jax.tree.map(jnp.asarray, batch)

    def fill(x):
        return jnp.where(batch.mask, jnp.asarray(x, jnp.float32)[None, :, None], 0)

    return batch._replace(ref_logps=fill(np.log(REF)), old_logps=fill(np.log(PI))), fill


def expectation(x):
    """Over samples of π, which are not differentiated."""
    return (jnp.float32(PI) * x.sum((0, 2))).sum()


def estimated(estimator):
    """Its expected value and its expected gradient by θ."""
    batch, fill = every_token()

    def value(theta):
        policy = Scores(fill(jax.nn.log_softmax(theta)))
        return expectation(ratios.kl(policy, batch, estimator))

    return jax.value_and_grad(value)(jnp.float32(THETA))


def test_the_two_kls_and_their_gradients_differ():
    assert abs(REVERSE - FORWARD) > 0.05
    assert np.abs(REVERSE_SLOPE - FORWARD_SLOPE).max() > 0.05


@pytest.mark.parametrize("estimator", ["k3", "k3+"])
def test_the_value_is_unbiased(estimator):
    assert float(estimated(estimator)[0]) == pytest.approx(REVERSE, rel=1e-5)


def test_the_value_of_k2_is_biased():
    got = float(estimated("k2")[0])
    assert got == pytest.approx(PI @ LOG_RATIO**2 / 2, rel=1e-5)
    assert abs(got - REVERSE) > 0.05


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_the_gradient_is_that_of_the_kl_to_the_reference(estimator):
    np.testing.assert_allclose(estimated(estimator)[1], REVERSE_SLOPE, atol=1e-6)


def test_the_gradient_of_k3_is_that_of_the_other_kl():
    np.testing.assert_allclose(estimated("k3")[1], FORWARD_SLOPE, atol=1e-6)


def test_k1_in_the_reward_is_unbiased_and_in_the_loss_it_is_refused():
    batch, fill = every_token()
    paid = kl_in_the_reward.shape(batch, None, beta=0.3)
    assert float(expectation(paid)) == pytest.approx(-0.3 * REVERSE, rel=1e-5)
    with pytest.raises(ValueError, match="its expected gradient is zero"):
        ratios.kl(Scores(fill(np.log(PI))), batch, "k1")


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_in_a_loss_the_gradient_is_not_that_of_the_responses_kl(estimator):
    """Two tokens of two; the second's distribution is near the reference after a, far after b.

    The responses' KL(π ‖ π_ref) is the mean over the first token of its own log-ratio plus
    the KL after it: its gradient by the first token's logits has both, the loss's only the
    former; a penalty in the reward (times the score, as a policy gradient has it) has both.
    """
    first, after = np.array([0.4, 0.6]), np.array([[0.5, 0.5], [0.9, 0.1]])
    ref = np.array([0.5, 0.5])
    batch = from_groups([[0]], [[[i, j] for i in range(2) for j in range(2)]], length=4)
    batch = jax.tree.map(jnp.asarray, batch)
    probs = jnp.float32((first[:, None] * after).ravel())

    def place(logps):
        rows = [[logps[i], np.log(after[i, j])] for i in range(2) for j in range(2)]
        out = jnp.zeros(batch.mask.shape, jnp.float32)
        return out.at[0, :, 1:3].set(jnp.stack([jnp.stack(r) for r in rows]))

    start = jnp.float32(np.log(first))
    batch = batch._replace(
        ref_logps=jnp.where(batch.mask, np.float32(np.log(0.5)), 0),
        old_logps=place(start),
    )

    def in_the_loss(x):
        policy = Scores(place(jax.nn.log_softmax(x)))
        return (probs * ratios.kl(policy, batch, estimator).sum((0, 2))).sum()

    def in_the_reward(x):
        paid = kl_in_the_reward.shape(batch, None, beta=1.0).sum(-1)[0]
        scores = place(jax.nn.log_softmax(x)).sum(-1)[0]
        return -(probs * paid * scores).sum()

    step = np.log(first / ref)
    behind = (after * np.log(after / ref)).sum(1)
    whole = first * (step + behind - first @ (step + behind))
    alone = first * (step - first @ step)
    assert np.abs(whole - alone).max() > 0.05
    assert batch.mask[0].sum() == 8
    np.testing.assert_allclose(jax.grad(in_the_loss)(start), alone, atol=1e-6)
    np.testing.assert_allclose(jax.grad(in_the_reward)(start), whole, atol=1e-6)


def test_an_unknown_estimator_names_the_known_ones():
    batch, fill = every_token()
    with pytest.raises(ValueError, match="'k4' is not one of k2, k3"):
        ratios.kl(Scores(fill(np.log(PI))), batch, "k4")


def test_no_estimate_without_a_reference():
    batch, fill = every_token()
    with pytest.raises(ValueError, match="ref_logps is None"):
        ratios.kl(Scores(fill(np.log(PI))), batch._replace(ref_logps=None), "k2")


@pytest.mark.parametrize("estimator", ratios.ESTIMATORS)
def test_invalid_and_unscored_tokens_have_no_kl(estimator):
    batch, fill = every_token()
    batch = batch._replace(valid=batch.valid.at[0, 2].set(False))
    policy = Scores(jnp.where(batch.mask, fill(np.log(PI)), 7.0))
    got = np.asarray(ratios.kl(policy, batch, estimator))
    keep = np.asarray(batch.mask & batch.valid[..., None])
    assert (got[~keep] == 0).all()
    assert (got[keep] > 0).all()


@pytest.mark.parametrize("x", [-1e4, -20.5, -3.0, 0.0, 1e-4, 3.0, 20.5, 1e4])
def test_bounded_keeps_the_slope(x):
    value, slope = jax.value_and_grad(lambda x: ratios.bounded(x))(jnp.float32(x))
    assert float(value) == np.float32(np.clip(x, -20, 20))
    assert float(slope) == 1


@pytest.mark.parametrize("estimator", ratios.ESTIMATORS)
def test_estimates_of_small_ratios_keep_their_digits(estimator):
    """l = 1e-3: l²/2 to six digits of float32, not to one."""
    batch, _ = every_token()
    policy = Scores(jnp.where(batch.mask, batch.ref_logps * 0 + 1e-3, 0))
    flat = batch._replace(ref_logps=batch.ref_logps * 0)
    got = np.asarray(ratios.kl(policy, flat, estimator))[np.asarray(batch.mask)]
    want = 5e-7 if estimator == "k2" else np.expm1(-1e-3) + 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_log_ratios_are_zero_where_nothing_counts():
    batch, _ = every_token()
    batch = batch._replace(
        advantages=batch.ref_logps, valid=batch.valid.at[0, 1].set(False)
    )
    policy = Scores(jnp.where(batch.mask, batch.old_logps + 0.5, 3.0))
    got = np.asarray(ratios.log_ratio(policy, batch))
    keep = np.asarray(batch.mask & batch.valid[..., None])
    np.testing.assert_allclose(got[keep], 0.5, rtol=1e-5)
    assert (got[~keep] == 0).all()


# -- the clipped surrogate, against a loop over tokens in float64


@pytest.mark.parametrize("cap", [float("inf"), 1.5])
def test_the_clipped_surrogate_and_its_metrics(cap):
    rng = np.random.default_rng(0)
    shape, low, high = (3, 2, 6), 0.2, 0.3
    mask = np.zeros(shape, bool)
    mask[..., 1:4] = True
    valid = np.array([[True, True], [True, False], [False, False]])
    old, log_rho, advantages = (
        np.where(mask, x, 0) for x in rng.normal(scale=[[[[1.0]]], [[[0.5]]], [[[1.0]]]], size=(3, *shape))
    )  # fmt: skip
    with jax.enable_x64(True):
        batch = Batch(
            jnp.zeros(shape, jnp.int32), jnp.asarray(mask), jnp.full(shape[:2], 4),
            jnp.zeros(shape[:2]), jnp.asarray(valid), old_logps=jnp.asarray(old),
            advantages=jnp.asarray(advantages),
        )  # fmt: skip
        policy = Scores(jnp.asarray(old + log_rho))
        gain, metrics = ratios.clipped_surrogate(policy, batch, low, high, cap)
    want = {name: np.zeros(3) for name in ("ratio", "clipped", "approx_kl")}
    assert metrics.keys() == {*want, "range_used", "range_used_max"}
    for b in range(3):
        kept = [
            (g, t) for g, t in np.ndindex(2, 6) if mask[b, g, t] and valid[b, g]
        ]  # fmt: skip
        for g, t in kept:
            x, a = log_rho[b, g, t], advantages[b, g, t]
            rho = np.exp(x)
            clipped = min(max(rho, 1 - low), 1 + high)
            expected = min(rho * a, clipped * a)
            if a < 0:
                expected = max(expected, cap * a)
            assert float(gain[b, g, t]) == pytest.approx(expected, rel=1e-12)
            want["ratio"][b] += rho / len(kept)
            want["clipped"][b] += (rho != clipped) / len(kept)
            want["approx_kl"][b] += (rho - 1 - x) / len(kept)
    for name, numbers in want.items():
        np.testing.assert_allclose(metrics[name], numbers, rtol=1e-10, err_msg=name)
    assert 0 < want["clipped"][0] < 1


def test_no_surrogate_without_a_rollout():
    batch, fill = every_token()
    with pytest.raises(ValueError, match="rollouts bring them"):
        ratios.clipped_surrogate(Scores(fill(np.log(PI))), batch, 0.2, 0.2)
