"""Importance weights of another sampler's responses: by hand, and unbiased by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import plugin
from alignax.batch import Scores, from_groups
from alignax.reweight import importance

V = 4


def rollout():
    """Two responses to one prompt; ratios (2, 4, 1/8) and (1/2, 3), products 1 and 1.5."""
    batch = from_groups([[1]], [[[2, 3, 4], [5, 6]]], length=5)
    logs = np.log([[[1, 2, 4, 1 / 8, 1], [1, 1 / 2, 3, 1, 1]]]).astype(np.float32)
    old = np.where(batch.mask, -1.0, 0.0).astype(np.float32)
    batch = batch._replace(
        old_logps=old, advantages=np.where(batch.mask, 10.0, 0.0),
        extra={"sampler_logps": np.where(batch.mask, old - logs, 0.0)},
    )  # fmt: skip
    return Scores(jnp.asarray(old)), jax.tree.map(jnp.asarray, batch)


third = 1 / 3
BY_HAND = {  # level, mode, high, low -> weights of the five tokens
    "token, truncated": (("token", "truncate", 2.0, 0.5), (2, 2, 1 / 8, 1 / 2, 2)),
    "token, masked": (("token", "mask", 2.0, 0.25), (2, 0, 0, 1 / 2, 0)),
    "sequence, truncated": (("sequence", "truncate", 1.2, 0.0), (1, 1, 1, 1.2, 1.2)),
    "sequence, masked": (("sequence", "mask", 1.2, 0.0), (1, 1, 1, 0, 0)),
    "mean, truncated": (("mean", "truncate", 5.0, 0.0), (1, 1, 1, 1.5**0.5, 1.5**0.5)),
    "nothing cut": (("token", "mask", float("inf"), 0.0), (2, 4, 1 / 8, 1 / 2, 3)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_by_hand(name):
    (level, mode, high, low), want = BY_HAND[name]
    policy, batch = rollout()
    how = {"level": level, "mode": mode, "high": high, "low": low}
    _, got, ones, metrics = importance.reweight(policy, batch, **how)
    weight = np.asarray(got.advantages[batch.mask]) / 10
    np.testing.assert_allclose(weight, want, rtol=1e-6)
    assert ones.tolist() == [1.0]
    np.testing.assert_allclose(metrics["importance"], [np.mean(want)], rtol=1e-6)
    ratio = np.array([2, 4, 1 / 8, 1 / 2, 3])
    if level == "token":
        cut = np.mean(~np.isclose(ratio, want))
        np.testing.assert_allclose(metrics["importance_cut"], [cut], rtol=1e-6)


def test_fresh_responses_are_compared_with_the_policy_itself():
    policy, batch = rollout()
    want = importance.reweight(policy, batch)[1].advantages
    fresh = batch._replace(old_logps=None)

    def weighted(logps):
        return importance.reweight(Scores(logps), fresh)[1].advantages

    np.testing.assert_allclose(weighted(policy.logps), want)
    slope = jax.grad(lambda x: weighted(x).sum())(policy.logps)
    assert not np.asarray(slope).any()


def test_an_invalid_response_leaves_everything_finite():
    policy, batch = rollout()
    batch = batch._replace(
        valid=batch.valid.at[0, 1].set(False),
        extra={"sampler_logps": batch.extra["sampler_logps"].at[0, 1].set(-jnp.inf)},
    )
    loss = plugin.compose(
        plugin.load("losses", "policy_gradient"),
        [plugin.load("reweight", "importance")],
    )
    value, slope = jax.value_and_grad(lambda p: loss(p, batch)[0].sum())(policy)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(slope.logps)).all()
    assert not np.asarray(slope.logps[0, 1]).any()


def table(params, responses):
    """[N, 2] log-probabilities of responses of two tokens."""
    first = jax.nn.log_softmax(params["first"])[responses[:, 0]]
    second = jax.nn.log_softmax(params["second"], -1)[responses[:, 0], responses[:, 1]]
    return jnp.stack([first, second], -1)


@pytest.mark.parametrize("level, exact", [("sequence", True), ("token", False)])
def test_the_gradient_from_another_samplers_responses_is_the_policys(level, exact):
    """In expectation over all responses of μ, that of E_π[A]: for whole responses."""
    rng = np.random.default_rng(0)
    ours, theirs = (
        {"first": jnp.array(rng.normal(size=V)), "second": jnp.array(rng.normal(size=(V, V)))}
        for _ in range(2)
    )  # fmt: skip
    ys = np.array(list(itertools.product(range(V), repeat=2)))
    gains = jnp.array(rng.normal(size=len(ys)))
    mu = table(theirs, ys)
    batch = from_groups([[0]], [ys.tolist()], length=3)
    batch = jax.tree.map(jnp.asarray, batch)
    drawn = jnp.exp(mu.sum(-1))[:, None] * len(ys)  # their share of the samples
    advantages = jnp.pad(
        jnp.broadcast_to(gains[:, None] * drawn, mu.shape), ((0, 0), (1, 0))
    )
    batch = batch._replace(
        advantages=advantages[None],
        extra={"sampler_logps": jnp.pad(mu, ((0, 0), (1, 0)))[None]},
    )
    loss = plugin.compose(
        plugin.load("losses", "policy_gradient", {"reduction": "constant"}),
        [plugin.load("reweight", "importance", {"level": level, "high": float("inf")})],
    )

    def value(params):
        logps = jnp.pad(table(params, ys), ((0, 0), (1, 0)))[None]
        return loss(Scores(logps), batch)[0].sum() * 3  # constant: a token weighs 1 / T

    def objective(params):
        return -(jnp.exp(table(params, ys).sum(-1)) * gains).sum()

    got, want = jax.grad(value)(ours), jax.grad(objective)(ours)
    gap = max(
        float(jnp.abs(g - w).max())
        for g, w in zip(got.values(), want.values(), strict=True)
    )
    assert gap < 1e-5 if exact else gap > 1e-2


def test_what_is_no_rollout_is_refused():
    policy, batch = rollout()
    with pytest.raises(ValueError, match="which rollouts bring"):
        importance.reweight(policy, batch._replace(extra=None))
    with pytest.raises(
        ValueError, match=r"level='tokens' is not one of token, sequence"
    ):
        plugin.load("reweight", "importance", {"level": "tokens"})
