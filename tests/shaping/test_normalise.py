"""Normalised rewards: by constants, by samples of the reference, and clipped."""

import jax.numpy as jnp
import numpy as np
import pytest
from shaping_groups import group

from alignax import plugin
from alignax.shaping import normalise


def rewards(out, batch):
    """[B, G]: what the last scored token of each response has; others have 0."""
    out = np.asarray(out)
    assert (np.count_nonzero(out, -1) <= 1).all()
    assert not out[~np.asarray(batch.mask & batch.valid[..., None])].any()
    return out.sum(-1)


def test_constants_by_hand_and_clipping():
    batch = group([[1.0, 5.0, -9.0]], lengths=[[1, 2, 3]])
    got = rewards(normalise.shape(batch, None, mean=1.0, std=2.0), batch)
    np.testing.assert_allclose(got, [[0, 2, -5]])
    got = rewards(normalise.shape(batch, None, mean=1.0, std=2.0, clip=1.5), batch)
    np.testing.assert_allclose(got, [[0, 1.5, -1.5]])
    got = rewards(normalise.shape(batch, None), batch)
    np.testing.assert_allclose(got, batch.feedback)


def test_samples_of_the_reference_have_mean_zero_and_variance_one():
    samples = np.random.default_rng(0).normal(7, 3, 50).astype(np.float32)
    batch = group(samples[None])
    pool = jnp.asarray(np.sort(samples)[None])
    got = rewards(normalise.shape(batch, pool, source="reference"), batch)
    np.testing.assert_allclose(got, (samples - samples.mean())[None] / samples.std(), rtol=1e-4, atol=1e-5)  # fmt: skip
    assert abs(got.mean()) < 1e-5
    assert got.std() == pytest.approx(1, abs=1e-4)
    got = rewards(normalise.shape(batch, pool, source="reference", clip=1.0), batch)
    assert np.abs(got).max() == 1


def test_equal_samples_leave_the_scale():
    batch = group([[3.0, 5.0]])
    pool = jnp.full((1, 9), 3.0)
    got = rewards(normalise.shape(batch, pool, source="reference"), batch)
    np.testing.assert_allclose(got, [[0, 2]])


def test_what_it_compares_with_is_decided_by_its_source():
    assert plugin.load("shaping", "normalise").baseline == ""
    bound = plugin.load("shaping", "normalise", {"source": "reference"})
    assert bound.baseline == "pool"
    with pytest.raises(
        ValueError, match="source='pool' is not one of constants, reference"
    ):
        plugin.load("shaping", "normalise", {"source": "pool"})
