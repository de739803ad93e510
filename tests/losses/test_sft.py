"""SFT: numbers by hand, and what each reduction means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import losses as oracle

from alignax import masked
from alignax.batch import Scores, from_groups
from alignax.losses import sft


def two_prompts():
    """Responses of 1 and 3 tokens with nll 1 a token, and 2 a token."""
    batch = from_groups([[1], [1]], [[[2]], [[3, 4, 5]]], length=4)
    batch = jax.tree.map(jnp.asarray, batch)
    nll = jnp.asarray([[[0.0, 1, 0, 0]], [[0, 2, 2, 2]]])
    return Scores(-nll), batch


@pytest.mark.parametrize(
    "reduction, mean", [("token", 7 / 4), ("sequence", 3 / 2), ("constant", 7 / 2 / 4)]
)
def test_the_mean_over_prompts_is_the_named_reduction(reduction, mean):
    values, _ = sft.loss(*two_prompts(), reduction=reduction)
    assert float(values.mean()) == pytest.approx(mean, rel=1e-6)


def test_uniform_policy_costs_log_vocabulary_a_token(make_batch):
    batch = make_batch(4, 1, 12)
    logps = jnp.where(batch.mask, -jnp.log(37.0), 0)
    values, metrics = sft.loss(Scores(logps), batch)
    assert float(values.mean()) == pytest.approx(np.log(37), rel=1e-6)
    np.testing.assert_allclose(metrics["nll"], np.log(37), rtol=1e-6)


def test_gradient_raises_every_scored_token(make_batch):
    batch = make_batch(4, 2, 12)
    grad = jax.grad(lambda x: sft.loss(Scores(x), batch)[0].sum())
    grad = np.asarray(grad(jnp.zeros(batch.mask.shape)))
    assert (grad[np.asarray(batch.mask)] < 0).all()
    assert (grad[~np.asarray(batch.mask)] == 0).all()


@pytest.mark.parametrize("reduction", masked.MODES)
def test_ragged_groups_are_those_of_the_oracle(make_batch, reduction):
    batch = make_batch(4, 3, 12, seed=2)
    valid = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    batch = batch._replace(valid=jnp.asarray(valid))
    logps = -np.random.default_rng(0).random(batch.mask.shape).astype(np.float32)
    logps = np.where(batch.mask, logps, 0)
    values, _ = sft.loss(Scores(jnp.asarray(logps)), batch, reduction=reduction)
    want = oracle.sft(logps, np.asarray(batch.mask), valid, reduction)
    assert float(values.sum()) / 3 == pytest.approx(want, rel=1e-5)


def test_metrics_are_per_prompt():
    _, metrics = sft.loss(*two_prompts())
    np.testing.assert_allclose(metrics["nll"], [1, 2], rtol=1e-6)
    np.testing.assert_allclose(metrics["log_prob"], [-1, -6], rtol=1e-6)
