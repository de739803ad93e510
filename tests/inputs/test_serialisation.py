"""Batches as text: what comes back is what went in, whatever its columns are called."""

import json

import jax
import numpy as np
import pytest

from alignax.batch import from_groups
from alignax.inputs.serialisation import dumps, loads


@pytest.mark.parametrize(
    "name", ["gold", "a]['b", "score[0]", "x/y", "'", "file", "größe", ".npy"]
)
def test_a_batch_comes_back_bit_for_bit(name):
    batch = from_groups([[1, 2], [3]], [[[4], [5, 6]], [[7]]], length=4)
    logps = np.random.default_rng(0).normal(size=(2, 2, 4)).astype(np.float32)
    extra = {name: np.float32([0.1, -0.0]), "other": logps[..., 0]}
    batch = batch._replace(old_logps=logps, extra=extra)
    got = loads(json.loads(json.dumps(dumps(batch))))
    assert jax.tree.structure(got) == jax.tree.structure(batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(batch), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def test_what_is_not_there_stays_away():
    got = loads(dumps(from_groups([[1]], [[[2]]], length=2)))
    assert got.extra is None
    assert got.ref_logps is None
