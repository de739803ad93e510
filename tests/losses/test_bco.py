"""BCO: numbers by hand, the shift, and the weights of undesirable responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import group, random_groups
from oracles import losses as oracle

from alignax.losses import bco, dpo


def means(desirable=0.0, undesirable=0.0):
    return {
        "desirable": jnp.float32(desirable),
        "undesirable": jnp.float32(undesirable),
    }


def cost(scores, feedback, *, ema=(0.0, 0.0), extra=None, **hyper):
    policy, batch = group(scores, feedback)
    batch = batch._replace(extra=extra)
    return float(bco.loss(policy, batch, ema=means(*ema), **hyper)[0][0])


@pytest.mark.parametrize("label, want", [(1, 0.126928011), (0, 2.126928011)])
def test_golden_number(label, want):
    """r = 0.5 * 6 = 3, delta = (2.5 - 0.5) / 2 = 1: softplus(-2) and softplus(2)."""
    assert cost([3.0], [label], ema=(2.5, -0.5), beta=0.5) == pytest.approx(want)


def test_policy_equal_to_reference_costs_log_two():
    assert cost([0.0, 0.0], [1, 0]) == pytest.approx(np.log(2))


def pair_cost(shift, scores):
    """Of a desirable and an undesirable response, each on its own."""
    policy, batch = group(scores, [1, 0])
    return 2 * bco.loss(policy, batch, ema=means(shift, shift), beta=1.0)[0][0]


def test_half_the_sum_is_the_best_shift_of_a_pair():
    """r = (1.2, -0.4): delta = 0.4."""
    slope = jax.grad(pair_cost)(jnp.float32(0.4), [0.6, -0.2])
    assert float(slope) == pytest.approx(0, abs=1e-6)
    assert float(pair_cost(0.0, [0.6, -0.2])) > float(pair_cost(0.4, [0.6, -0.2]))


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.4, 3.0])
def test_two_binary_costs_bound_dpo_from_above(shift):
    rng = np.random.default_rng(0)
    for scores in rng.normal(size=(10, 2)):
        dpo_cost = dpo.loss(*group(scores, [1, 0]), beta=1.0)[0][0]
        assert float(pair_cost(shift, scores)) > float(dpo_cost)


def test_running_means_take_in_the_means_of_the_classes():
    policy, batch = group([1.0, 2.0, -1.0], [1, 1, 0])
    _, metrics = bco.loss(policy, batch, ema=means(), beta=0.5)
    assert float(metrics["ema/desirable"]) == pytest.approx(1.5)
    assert float(metrics["ema/undesirable"]) == pytest.approx(-1.0)


def test_a_class_that_is_absent_keeps_its_running_mean():
    policy, batch = group([1.0, 2.0, -1.0], [1, 1, 0], valid=[True, True, False])
    _, metrics = bco.loss(policy, batch, ema=means(0.3, -0.7), beta=0.5)
    assert float(metrics["ema/desirable"]) == pytest.approx(1.5)
    assert float(metrics["ema/undesirable"]) == pytest.approx(-0.7)


@pytest.mark.parametrize("ratio, weight", [(2.0, 2.0), (0.1, 0.5), (50.0, 10.0)])
def test_the_density_ratio_weighs_undesirable_responses_alone(ratio, weight):
    extra = {"density_ratio": jnp.float32([ratio])}
    assert cost([0.3], [0], extra=extra) == pytest.approx(weight * cost([0.3], [0]))
    assert cost([0.3], [1], extra=extra) == pytest.approx(cost([0.3], [1]))


def test_gradient_follows_the_label(make_batch):
    scores, batch = random_groups(make_batch, labels=True)

    def total(logps):
        return bco.loss(scores._replace(logps=logps), batch, ema=means())[0].sum()

    slope = np.asarray(jax.grad(total)(scores.logps))[np.asarray(batch.mask)]
    good = np.broadcast_to((batch.feedback > 0.5)[..., None], batch.mask.shape)
    valid = np.broadcast_to(batch.valid[..., None], batch.mask.shape)
    good, valid = good[np.asarray(batch.mask)], valid[np.asarray(batch.mask)]
    assert (slope[good & valid] < 0).all()
    assert (slope[~good & valid] > 0).all()
    assert (slope[~valid] == 0).all()


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    scores, batch = random_groups(make_batch, labels=True)
    got = bco.loss(scores, batch, ema=means(0.8, -0.2), beta=0.7)[0]
    want = [
        oracle.bco(rows, beta=0.7, desirable=0.8, undesirable=-0.2)
        for rows in oracle.groups(scores, batch)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)
