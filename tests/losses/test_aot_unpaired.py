"""AOT without pairs: which order statistics meet, and who has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_pairs import cost, random_pairs
from oracles import losses as oracle

from alignax.batch import Scores
from alignax.losses import aot_unpaired, dpo

HYPER = dict(beta=0.3, label_smoothing=0.1)


def without_some(batch):
    """Pairs 1 (no rejected) and 4 (nothing) are invalid."""
    return batch._replace(valid=batch.valid.at[1, 1].set(False).at[4].set(False))


def test_one_pair_is_dpo():
    got = cost(aot_unpaired.loss, 3.0, -1.0, **HYPER)
    assert got == pytest.approx(cost(dpo.loss, 3.0, -1.0, **HYPER), rel=1e-6)


def test_rejected_responses_may_be_those_of_other_prompts(make_batch):
    scores, batch = random_pairs(make_batch, away=4)
    order = np.array([3, 0, 5, 4, 1, 2])

    def shuffle(x):
        return x.at[:, 1].set(x[order, 1])

    mixed = batch._replace(ref_logps=shuffle(batch.ref_logps), mask=shuffle(batch.mask))
    got = aot_unpaired.loss(Scores(shuffle(scores.logps)), mixed, **HYPER)[0]
    want = aot_unpaired.loss(scores, batch, **HYPER)[0]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert not np.allclose(dpo.loss(scores, batch, **HYPER)[0], want, rtol=1e-3)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    scores, batch = random_pairs(make_batch, away=4)
    pairs = oracle.sides(scores.logps, batch.ref_logps, batch.mask)
    kept = [pairs[i] for i in (0, 2, 3, 5)]
    for given, among in ((batch, pairs), (without_some(batch), kept)):
        got = aot_unpaired.loss(scores, given, **HYPER)[0].sum()
        want = oracle.aot(among, paired=False, **HYPER)
        assert float(got) == pytest.approx(want, rel=1e-5)


def test_invalid_pairs_enter_no_order_statistic(make_batch):
    """Whatever their log-probs are, no other pair's value or gradient changes."""
    scores, batch = random_pairs(make_batch, away=4)
    batch = without_some(batch)
    rows = np.array([1, 4])

    def total(logps):
        return aot_unpaired.loss(Scores(logps), batch, **HYPER)[0].sum()

    want, grad = jax.value_and_grad(total)(scores.logps)
    assert not np.asarray(grad)[rows].any()
    for shift in (-1e4, 1e4):
        shift = jnp.where(batch.mask, shift, 0)
        got = jax.value_and_grad(total)(scores.logps.at[rows].add(shift[rows]))
        np.testing.assert_allclose(got[0], want, rtol=1e-6)
        np.testing.assert_allclose(got[1], grad, rtol=1e-6)


def test_gradient_raises_every_chosen_and_lowers_every_rejected(make_batch):
    scores, batch = random_pairs(make_batch, away=4)
    grad = jax.grad(lambda x: aot_unpaired.loss(Scores(x), batch)[0].sum())(
        scores.logps
    )
    grad, mask = np.asarray(grad), np.asarray(batch.mask)
    assert (grad[:, 0][mask[:, 0]] < 0).all()
    assert (grad[:, 1][mask[:, 1]] > 0).all()
