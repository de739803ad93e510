"""Reward model: numbers by hand, and which token is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import losses as oracle

from alignax.batch import Scores, from_groups, from_pairs
from alignax.losses import reward_model


def pair(chosen, rejected):
    """One pair whose last scored tokens hold the rewards; junk everywhere else."""
    batch = from_pairs([[1]], [[2, 3]], [[4]], length=5)
    values = np.full((1, 2, 5), 1e3, np.float32)
    values[0, 0, 2], values[0, 1, 1] = chosen, rejected
    return values, jax.tree.map(jnp.asarray, batch)


def cost(chosen, rejected, **hyper):
    values, batch = pair(chosen, rejected)
    scores = Scores(jnp.zeros(values.shape), values=jnp.asarray(values))
    return float(reward_model.loss(scores, batch, **hyper)[0][0])


def test_golden_number():
    """r+ - r- = 2: log(1 + e^-2), at the last scored token of each."""
    assert cost(1.5, -0.5) == pytest.approx(0.126928011, abs=1e-6)


def test_equal_rewards_cost_log_two():
    assert cost(0.7, 0.7) == pytest.approx(np.log(2), abs=1e-7)


def test_margin_is_a_distance_to_keep():
    """r+ - r- = 3 with a margin of 1 is r+ - r- = 2 without."""
    assert cost(2.5, -0.5, margin=1.0) == pytest.approx(cost(1.5, -0.5), rel=1e-6)


def test_rewards_are_free_up_to_a_constant():
    assert cost(1.5, -0.5) == pytest.approx(cost(11.5, 9.5), rel=1e-6)


def test_centring_takes_the_freedom_away():
    centred, shifted = cost(1.0, -1.0, centring=0.1), cost(2.0, 0.0, centring=0.1)
    assert shifted - centred == pytest.approx(0.1 * 2.0**2, rel=1e-5)
    assert centred == pytest.approx(cost(1.0, -1.0), rel=1e-6)


def test_gradient_raises_chosen_and_lowers_rejected_and_touches_nothing_else():
    values, batch = pair(0.3, 0.1)

    def total(values):
        scores = Scores(jnp.zeros(values.shape), values=values)
        return reward_model.loss(scores, batch)[0].sum()

    grad = np.asarray(jax.grad(total)(jnp.asarray(values)))
    assert grad[0, 0, 2] < 0 < grad[0, 1, 1]
    assert np.count_nonzero(grad) == 2


def test_tokens_after_the_last_scored_one_are_not_read():
    """A template may add tokens after EOS: real, but not scored."""
    batch = from_groups(
        [[1]], [[[2, 3, 4, 5], [6, 7, 8]]], length=6,
        scored=[[[True, True, False, False], [True, True, False]]],
    )  # fmt: skip
    batch = jax.tree.map(jnp.asarray, batch)
    values = np.full((1, 2, 6), 1e3, np.float32)
    values[0, 0, 2], values[0, 1, 2] = 1.5, -0.5
    scores = Scores(jnp.zeros(values.shape), values=jnp.asarray(values))
    got, metrics = reward_model.loss(scores, batch)
    assert float(got[0]) == pytest.approx(0.126928011, abs=1e-6)
    assert float(metrics["reward_chosen"][0]) == 1.5
    assert float(metrics["reward_rejected"][0]) == -0.5


def test_padding_changes_nothing(make_batch):
    batch = make_batch(4, 2, 12)
    values = np.random.default_rng(0).normal(size=(4, 2, 12)).astype(np.float32)

    def run(batch, values):
        scores = Scores(jnp.zeros(values.shape), values=jnp.asarray(values))
        return np.asarray(reward_model.loss(scores, batch, centring=0.1)[0])

    pad = ((0, 0), (0, 0), (0, 5))
    longer = batch._replace(
        tokens=jnp.pad(batch.tokens, pad), mask=jnp.pad(batch.mask, pad)
    )
    want = run(batch, values)
    np.testing.assert_array_equal(
        run(longer, np.pad(values, pad, constant_values=7.0)), want
    )
    np.testing.assert_allclose(
        want, oracle.reward_model(values, np.asarray(batch.mask), centring=0.1),
        rtol=1e-5,
    )  # fmt: skip


def test_accuracy_counts_ties_half():
    for (chosen, rejected), want in {(1, 0): 1, (0, 1): 0, (1, 1): 0.5}.items():
        values, batch = pair(chosen, rejected)
        scores = Scores(jnp.zeros(values.shape), values=jnp.asarray(values))
        _, metrics = reward_model.loss(scores, batch)
        assert float(metrics["accuracy"][0]) == want
