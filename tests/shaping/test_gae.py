"""GAE: by hand, against a float64 loop, and at both ends of lambda."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import group, tokens

from alignax.shaping import gae


def fields(batch, rewards, values):
    """The batch with these rewards and values [B, G, ...] on its first tokens."""
    return batch._replace(
        advantages=tokens(batch, rewards), extra={"old_values": tokens(batch, values)}
    )


def loop(rewards, values, keep, gamma, lam):
    """float64, token by token, over the scored ones of one response."""
    at = np.flatnonzero(keep)
    out, advantage, following = np.zeros(len(keep)), 0.0, 0.0
    for t in at[::-1]:
        delta = rewards[t] + gamma * following - values[t]
        advantage, following = delta + gamma * lam * advantage, values[t]
        out[t] = advantage
    return out


def random(make_batch, seed=0):
    batch = make_batch(4, 3, 20, seed)
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *batch.mask.shape))
    valid = batch.valid.at[1, 0].set(False)
    return batch._replace(
        valid=valid, advantages=jnp.float32(rewards), extra={"old_values": jnp.float32(values)}
    )  # fmt: skip


def test_golden_number():
    """γ = 1/2, λ = 1/2: δ = 1 + 4/2 - 2 = 1, 3 + 0 - 4 = -1; A_1 = 1 - 1/4."""
    batch = fields(group([[0.0]], lengths=[[2]]), [[[1, 3]]], [[[2, 4]]])
    got = gae.shape(batch, None, gamma=0.5, lam=0.5)
    np.testing.assert_allclose(got[0, 0], [0, 0, 0.75, -1, 0], rtol=1e-6)


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0)]
)
def test_it_is_the_loop(make_batch, gamma, lam):
    batch = random(make_batch)
    got = np.asarray(gae.shape(batch, None, gamma=gamma, lam=lam))
    keep = np.asarray(batch.mask & batch.valid[..., None])
    rewards, values = (
        np.asarray(x, float) for x in (batch.advantages, batch.extra["old_values"])
    )
    for i in np.ndindex(keep.shape[:2]):
        want = loop(rewards[i], values[i], keep[i], gamma, lam)
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


def test_lambda_one_is_the_return_less_the_value(make_batch):
    batch = random(make_batch)
    got = np.asarray(gae.shape(batch, None, gamma=1.0, lam=1.0))
    keep = np.asarray(batch.mask & batch.valid[..., None])
    rewards = np.where(keep, batch.advantages, 0)
    to_go = rewards[..., ::-1].cumsum(-1)[..., ::-1]
    want = np.where(keep, to_go - np.asarray(batch.extra["old_values"]), 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lambda_zero_is_the_error_of_one_step():
    batch = fields(group([[0.0]], lengths=[[3]]), [[[1, 0, 2]]], [[[5, 7, 11]]])
    got = gae.shape(batch, None, gamma=1.0, lam=0.0)
    np.testing.assert_allclose(got[0, 0, 2:5], [1 + 7 - 5, 0 + 11 - 7, 2 - 11])


def test_nothing_is_worth_anything_after_the_last_token():
    """A critic's value of padding, or of a response that is over, is not read."""
    batch = group([[2.0]], lengths=[[2]])
    values = jnp.full(batch.mask.shape, 50.0).at[0, 0, 2:4].set(jnp.float32([1.0, 1.5]))
    got = gae.shape(batch._replace(extra={"old_values": values}), None, lam=0.0)
    np.testing.assert_allclose(got[0, 0], [0, 0, 0.5, 0.5, 0], rtol=1e-6)


def test_tokens_in_between_that_are_not_scored_are_skipped():
    """Tokens of a tool between two turns are not steps: the same without them."""
    dense = fields(group([[0.0]], lengths=[[3]]), [[[1, -2, 4]]], [[[3, 1, 2]]])
    holes = group([[0.0]], lengths=[[5]])
    holes = holes._replace(mask=holes.mask.at[0, 0, 3:5].set(False))
    holes = fields(holes, [[[1, 9, 9, -2, 4]]], [[[3, 70, 70, 1, 2]]])
    want = np.asarray(gae.shape(dense, None, gamma=0.9, lam=0.8))[0, 0, 2:5]
    got = np.asarray(gae.shape(holes, None, gamma=0.9, lam=0.8))[0, 0]
    np.testing.assert_allclose(got[[2, 5, 6]], want, rtol=1e-6)
    np.testing.assert_array_equal(got[[0, 1, 3, 4, 7]], 0)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_critic_that_is_right_leaves_nothing(lam):
    batch = fields(group([[0.0]], lengths=[[3]]), [[[1, -2, 4]]], [[[3, 2, 4]]])
    np.testing.assert_allclose(gae.shape(batch, None, lam=lam), 0, atol=1e-6)


def test_better_than_expected_is_positive():
    batch = group([[2.0, -2.0]])._replace(extra={"old_values": jnp.zeros((1, 2, 4))})
    got = np.asarray(gae.shape(batch, None))[0, :, 2]
    np.testing.assert_array_equal(got, [2, -2])


def test_without_a_critic_the_error_names_what_is_missing():
    with pytest.raises(ValueError, match=r"old_values.*value_head"):
        gae.shape(group([[1.0]]), None)
