"""AOT on pairs: which order statistics meet, and who has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_pairs import cost, random_pairs
from oracles import losses as oracle

from alignax.batch import Batch, Scores
from alignax.losses import aot, aot_unpaired, dpo
from alignax.models import sharding

HYPER = dict(beta=0.3, label_smoothing=0.1)


def two_pairs(margins, ref_margins):
    """All of a log-prob on one token of the chosen side."""
    mask = jnp.zeros((2, 2, 2), bool).at[..., 1].set(True)
    ones = jnp.ones((2, 2))
    batch = Batch(
        jnp.zeros((2, 2, 2), jnp.int32), mask, jnp.full((2, 2), 2), ones, ones > 0
    )
    place = jnp.zeros((2, 2, 2)).at[:, 0, 1]
    batch = batch._replace(ref_logps=place.set(jnp.asarray(ref_margins)))
    return Scores(place.set(jnp.asarray(margins))), batch


def without_some(batch):
    """Pairs 1 (no rejected) and 4 (nothing) are invalid."""
    return batch._replace(valid=batch.valid.at[1, 1].set(False).at[4].set(False))


def test_golden_number():
    """Margins 5, 1 against 2, 4: 1 meets 2 and 5 meets 4."""
    scores, batch = two_pairs(margins=(5.0, 1.0), ref_margins=(2.0, 4.0))
    got, metrics = aot.loss(scores, batch, beta=0.5, label_smoothing=0.0)
    np.testing.assert_allclose(got, np.log1p(np.exp([-0.5, 0.5])), rtol=1e-6)
    np.testing.assert_allclose(metrics["quantile_gap"], [0.5, -0.5], rtol=1e-6)


def test_one_pair_is_dpo():
    got = cost(aot.loss, 3.0, -1.0, **HYPER)
    assert got == pytest.approx(cost(dpo.loss, 3.0, -1.0, **HYPER), rel=1e-6)


def test_of_the_reference_only_the_distribution_counts():
    first = aot.loss(*two_pairs((5.0, 1.0), (2.0, 4.0)), **HYPER)[0]
    second = aot.loss(*two_pairs((5.0, 1.0), (4.0, 2.0)), **HYPER)[0]
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    scores, batch = random_pairs(make_batch, away=4)
    pairs = oracle.sides(scores.logps, batch.ref_logps, batch.mask)
    kept = [pairs[i] for i in (0, 2, 3, 5)]
    for given, among in ((batch, pairs), (without_some(batch), kept)):
        got = aot.loss(scores, given, **HYPER)[0].sum()
        want = oracle.aot(among, paired=True, **HYPER)
        assert float(got) == pytest.approx(want, rel=1e-5)


def test_invalid_pairs_enter_no_order_statistic(make_batch):
    """Whatever their log-probs are, no other pair's value or gradient changes."""
    scores, batch = random_pairs(make_batch, away=4)
    batch = without_some(batch)
    rows = np.array([1, 4])

    def total(logps, ref_logps):
        changed = batch._replace(ref_logps=ref_logps)
        return aot.loss(Scores(logps), changed, **HYPER)[0].sum()

    want, grad = jax.value_and_grad(total)(scores.logps, batch.ref_logps)
    assert not np.asarray(grad)[rows].any()
    for shift in (-1e4, 1e4):
        shift = jnp.where(batch.mask, shift, 0)
        logps = scores.logps.at[rows].add(shift[rows])
        ref_logps = batch.ref_logps.at[rows].add(-shift[rows])
        got = jax.value_and_grad(total)(logps, ref_logps)
        np.testing.assert_allclose(got[0], want, rtol=1e-6)
        np.testing.assert_allclose(got[1], grad, rtol=1e-6)


def test_gradient_raises_every_chosen_and_lowers_every_rejected(make_batch):
    scores, batch = random_pairs(make_batch, away=4)
    grad = jax.grad(lambda x: aot.loss(Scores(x), batch)[0].sum())(scores.logps)
    grad, mask = np.asarray(grad), np.asarray(batch.mask)
    assert (grad[:, 0][mask[:, 0]] < 0).all()
    assert (grad[:, 1][mask[:, 1]] > 0).all()


@pytest.mark.parametrize("loss", [aot.loss, aot_unpaired.loss])
def test_eight_devices_sort_as_one(loss, make_batch):
    scores, batch = random_pairs(make_batch, 8, away=4)

    def total(logps, batch):
        return loss(Scores(logps), batch, **HYPER)[0].sum()

    value_and_grad = jax.value_and_grad(total)
    want = value_and_grad(scores.logps, batch)
    mesh = sharding.make_mesh((8, 1, 1))
    spread = jax.device_put(
        (scores.logps, batch), jax.NamedSharding(mesh, sharding.BATCH)
    )
    got = jax.jit(value_and_grad)(*spread)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
