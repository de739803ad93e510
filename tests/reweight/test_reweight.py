"""Reweightings: what they do to a pair by hand, and under a loss as one loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import plugin
from alignax.batch import Scores, from_pairs
from alignax.losses import dpo
from alignax.reweight import length_desensitised, wpo


def pair():
    """Chosen has three tokens of -1, -2, -4; rejected two of -3, -5."""
    batch = from_pairs([[1]], [[2, 3, 4]], [[5, 6]], length=5)
    batch = jax.tree.map(jnp.asarray, batch)
    logps = jnp.array([[[0.0, -1, -2, -4, 0], [0, -3, -5, 0, 0]]])
    collision = jnp.array([[[0.0, -0.5, -1, -1.5, 0], [0, -1, -2, 0, 0]]])
    return Scores(logps, collision=collision), batch._replace(ref_logps=logps / 2)


def bound(folder, name, **hyper):
    return plugin.load(folder, name, hyper)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_tail_beyond_the_shorter_response_counts_alpha(alpha):
    policy, batch = pair()
    got, scaled, weight = length_desensitised.reweight(policy, batch, alpha=alpha)
    np.testing.assert_allclose(got.logps.sum(-1), [[-3 - 4 * alpha, -8]])
    np.testing.assert_allclose(scaled.ref_logps.sum(-1), [[-1.5 - 2 * alpha, -4]])
    assert weight.tolist() == [1.0]


def test_the_tail_is_that_of_the_response_not_of_the_row():
    """A longer prompt moves the response to the right; nothing else changes."""
    policy, batch = pair()

    def shift(x):
        return jnp.pad(x, ((0, 0), (0, 0), (2, 0)))

    moved = batch._replace(mask=shift(batch.mask), ref_logps=shift(batch.ref_logps))
    got = length_desensitised.reweight(Scores(shift(policy.logps)), moved, alpha=0.5)[0]
    want = length_desensitised.reweight(policy, batch, alpha=0.5)[0]
    np.testing.assert_array_equal(got.logps[..., 2:], want.logps)


def test_an_invalid_response_does_not_change_the_tail():
    policy, batch = pair()
    batch = batch._replace(
        mask=batch.mask.at[0, 1].set(False), valid=batch.valid.at[0, 1].set(False)
    )
    got, _, _ = length_desensitised.reweight(policy, batch, alpha=0.0)
    np.testing.assert_array_equal(got.logps[0, 0], policy.logps[0, 0])


def test_other_frozen_models_are_scaled_like_the_reference():
    policy, batch = pair()
    extra = {"helpful_logps": batch.ref_logps, "weight": jnp.ones(1)}
    _, scaled, _ = length_desensitised.reweight(
        policy, batch._replace(extra=extra), alpha=0.5
    )
    np.testing.assert_array_equal(scaled.extra["helpful_logps"], scaled.ref_logps)
    np.testing.assert_array_equal(scaled.extra["weight"], extra["weight"])


def test_wpo_weight_by_hand():
    """mean(-.5, -1, -2.5) = -4/3 and mean(-2, -3) = -2.5."""
    policy, batch = pair()
    weight = wpo.reweight(policy, batch)[2]
    np.testing.assert_allclose(weight, [np.exp(-4 / 3 - 2.5)], rtol=1e-6)


def test_a_policy_sure_of_its_response_weighs_one():
    """log π(y_t) = log Σ π² where π is uniform, and where it is certain."""
    policy, batch = pair()
    policy = policy._replace(collision=policy.logps)
    np.testing.assert_allclose(wpo.reweight(policy, batch)[2], [1.0])


def test_no_gradient_flows_through_the_weight():
    policy, batch = pair()
    loss = plugin.compose(bound("losses", "dpo"), [bound("reweight", "wpo")])
    grad = jax.grad(lambda p: loss(p, batch)[0].sum())(policy)
    plain = jax.grad(lambda p: dpo.loss(p, batch)[0].sum())(policy)
    weight = wpo.reweight(policy, batch)[2]
    np.testing.assert_allclose(grad.logps, weight * plain.logps, rtol=1e-5)
    assert not np.asarray(grad.collision).any()


def test_reweightings_under_a_loss_are_one_loss():
    policy, batch = pair()
    weights = [
        bound("reweight", "length_desensitised", alpha=0.3),
        bound("reweight", "wpo"),
    ]
    loss = plugin.compose(bound("losses", "dpo", beta=0.7), weights)
    assert set(loss.needs) == {"logps", "ref_logps", "collision"}
    assert loss.hyper["reweight.length_desensitised.alpha"] == 0.3
    scaled, scaled_batch, _ = length_desensitised.reweight(policy, batch, alpha=0.3)
    weight = wpo.reweight(scaled, scaled_batch)[2]
    want = dpo.loss(scaled, scaled_batch, beta=0.7)[0] * weight
    got, metrics = jax.jit(lambda hyper: loss.function(policy, batch, **hyper))(
        loss.hyper
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-6)


def test_no_reweighting_is_the_loss_itself():
    loss = bound("losses", "dpo")
    assert plugin.compose(loss, []) is loss


def test_an_unknown_reweighting_or_a_number_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="did you mean 'wpo'"):
        bound("reweight", "wpoo")
    with pytest.raises(ValueError, match=r"alpha=1.5 is outside \[0, 1\]"):
        bound("reweight", "length_desensitised", alpha=1.5)


@pytest.mark.parametrize(
    "name", [n for n in plugin.available("reweight") if n != "importance"]
)
def test_an_invalid_response_leaves_everything_finite(name):
    policy, batch = pair()
    low = jnp.where(batch.mask, -1e4, 0.0)
    batch = batch._replace(
        valid=batch.valid.at[0, 1].set(False), extra={"weight": jnp.ones(1)}
    )
    policy = policy._replace(logps=policy.logps.at[:, 1].set(low[:, 1]))
    loss = plugin.compose(bound("losses", "dpo"), [bound("reweight", name)])
    value, grad = jax.value_and_grad(lambda p: loss(p, batch)[0].sum())(policy)
    assert float(value) == 0
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(grad))
