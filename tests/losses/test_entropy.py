"""The entropy bonus: minus the mean entropy of scored tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import Scores
from alignax.losses import entropy


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_by_enumeration(make_batch, reduction):
    batch = make_batch(3, 2, 16)
    batch = batch._replace(valid=batch.valid.at[1, 0].set(False))
    h = np.random.default_rng(0).uniform(0, 3, batch.mask.shape).astype(np.float32)
    values, metrics = entropy.loss(
        Scores(jnp.zeros_like(h), entropy=jnp.asarray(h)), batch, reduction=reduction
    )
    keep = np.asarray(batch.mask & batch.valid[..., None])
    responses = [h[b, g][keep[b, g]] for b, g in np.ndindex(3, 2) if keep[b, g].any()]
    want = {
        "token": np.concatenate(responses).mean(),
        "sequence": np.mean([r.mean() for r in responses]),
        "constant": sum(r.sum() for r in responses) / len(responses) / h.shape[-1],
    }[reduction]
    assert -float(values.mean()) == pytest.approx(want, rel=1e-5)
    for b in range(3):
        assert float(metrics["entropy"][b]) == pytest.approx(
            h[b][keep[b]].mean(), rel=1e-5
        )
