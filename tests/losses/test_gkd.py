"""GKD: numbers by hand, both directions, and a student that reaches its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.batch import LM, Scores, from_groups
from alignax.losses import gkd


def batch_of_two():
    batch = from_groups([[1], [1]], [[[2, 3]], [[4, 5, 6]]], length=5)
    return jax.tree.map(jnp.asarray, batch)


def test_golden_number():
    """Five tokens with forward KL 1 and KL 3: 0.75 * 1 + 0.25 * 3 nats a token."""
    batch = batch_of_two()
    ones = jnp.where(batch.mask, 1.0, 0.0)
    scores = Scores(ones * 0, kl=3 * ones, forward_kl=ones)
    values, metrics = gkd.loss(scores, batch, reverse=0.25)
    assert float(values.mean()) == pytest.approx(1.5, rel=1e-6)
    np.testing.assert_allclose(metrics["kl"], [3, 3], rtol=1e-6)
    np.testing.assert_allclose(metrics["forward_kl"], [1, 1], rtol=1e-6)


@pytest.mark.parametrize("reverse", [0.0, 0.5, 1.0])
def test_the_teacher_itself_costs_nothing_and_has_no_gradient(
    reverse, tiny_lm, make_batch
):
    batch = make_batch(2, 1, 10)

    def cost(params):
        lm = LM(tiny_lm.config, params)
        scores = logprob.score(lm, batch, needs=gkd.NEEDS, kl_to=tiny_lm)
        return gkd.loss(scores, batch, reverse=reverse)[0].mean()

    value, grads = jax.jit(jax.value_and_grad(cost))(tiny_lm.params)
    assert float(value) == 0
    # the gradient is a difference of two equal distributions: rounding only
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-4


@pytest.mark.parametrize("reverse", [0.0, 1.0])
def test_descent_brings_the_student_to_the_teacher(
    reverse, tiny_lm, make_lm, make_batch
):
    batch, student = make_batch(4, 1, 10), make_lm(tiny_lm.config, seed=1)

    @jax.jit
    def cost(params):
        lm = LM(tiny_lm.config, params)
        scores = logprob.score(lm, batch, needs=gkd.NEEDS, kl_to=tiny_lm)
        return gkd.loss(scores, batch, reverse=reverse)[0].mean()

    params, pull = student.params, jax.jit(jax.grad(cost))
    first = float(cost(params))
    for _ in range(20):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, pull(params))
    assert float(cost(params)) < 0.7 * first
