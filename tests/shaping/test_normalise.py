"""Normalised rewards: less a mean, over a deviation, and clipped."""

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


def test_a_deviation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"std=0\.0 is outside \(0, inf\)"):
        plugin.load("shaping", "normalise", {"std": 0.0})
