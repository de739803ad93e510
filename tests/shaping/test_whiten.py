"""Whitening: moments over the scored tokens of a whole rollout."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import group, tokens

from alignax.shaping import whiten


def test_golden_number():
    """Tokens 1, 2, 6: mean 3, deviation √7."""
    batch = group([[0.0, 0.0]], lengths=[[2, 1]])
    batch = batch._replace(advantages=tokens(batch, [[[1, 2], [6]]]))
    got = np.asarray(whiten.shape(batch, None))[0]
    np.testing.assert_allclose(got[0, 2:4], np.array([-2, -1]) / 7**0.5, rtol=1e-6)
    np.testing.assert_allclose(got[1, 2], 3 / 7**0.5, rtol=1e-6)
    kept = np.asarray(whiten.shape(batch, None, shift=False))[0]
    np.testing.assert_allclose(kept[1, 2], 3 / 7**0.5 + 3, rtol=1e-6)


@pytest.mark.parametrize("shift", [True, False])
def test_moments_are_those_of_scored_tokens_of_all_prompts(make_batch, shift):
    batch = make_batch(6, 3, 24, 1)
    x = np.random.default_rng(0).normal(4, 3, batch.mask.shape).astype(np.float32)
    batch = batch._replace(advantages=jnp.asarray(x))
    keep = np.asarray(batch.mask)
    got = np.asarray(whiten.shape(batch, None, shift=shift), float)[keep]
    assert got.std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert got.mean() == pytest.approx(0 if shift else x[keep].mean(), abs=1e-4)


def test_a_rollout_without_a_difference_is_zero():
    batch = group([[3.0, 3.0]])
    np.testing.assert_allclose(whiten.shape(batch, None), 0, atol=1e-6)


def test_neither_shift_nor_unit_matters_and_the_order_stays():
    rewards = np.random.default_rng(0).normal(size=(3, 4))
    low, high = (
        np.asarray(whiten.shape(group(r), None)) for r in (rewards, 50 * rewards - 3)
    )
    np.testing.assert_allclose(low, high, rtol=1e-4, atol=1e-5)
    last = low[:, :, 2]
    np.testing.assert_array_equal(np.argsort(last), np.argsort(rewards))
