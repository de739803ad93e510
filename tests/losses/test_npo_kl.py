"""NPO with a KL to keep the rest: its two terms by hand, and what each pulls at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import Scores, from_groups
from alignax.losses import npo, npo_kl


def rows(log_ratio=1.0, kl=0.6):
    """One forget row and one retain row, of two and three tokens."""
    batch = from_groups(
        [[1], [1]], [[[2, 3]], [[4, 5, 6]]], length=5, feedback=[[0.0], [1.0]]
    )
    batch = jax.tree.map(jnp.asarray, batch)
    tokens = batch.mask.sum(-1, keepdims=True)
    spread = jnp.where(batch.mask, 1 / tokens, 0.0)
    scores = Scores(log_ratio * spread, forward_kl=kl * spread)
    return scores, batch._replace(ref_logps=jnp.zeros_like(scores.logps))


def test_golden_number():
    """2/β log(1 + e^β) at β = 0.5, and 2 * 0.6 / 3."""
    scores, batch = rows()
    values, metrics = npo_kl.loss(scores, batch, beta=0.5, retain_weight=2.0)
    np.testing.assert_allclose(values, [4 * np.log1p(np.exp(0.5)), 0.4], rtol=1e-6)
    np.testing.assert_allclose(metrics["retain_kl"], [0, 0.2], rtol=1e-6)


def test_the_forget_term_is_that_of_npo():
    scores, batch = rows()
    got, want = (m.loss(scores, batch, beta=0.3)[0][0] for m in (npo_kl, npo))
    assert float(got) == pytest.approx(float(want))


def test_likelihood_is_lowered_on_forget_rows_and_the_kl_on_retain_rows():
    scores, batch = rows()
    grad = jax.grad(lambda s: npo_kl.loss(s, batch)[0].sum())(scores)
    on = np.asarray(batch.mask)
    assert (np.asarray(grad.logps)[0][on[0]] > 0).all()
    assert not np.asarray(grad.logps)[1].any()
    assert not np.asarray(grad.forward_kl)[0].any()
    assert (np.asarray(grad.forward_kl)[1][on[1]] > 0).all()
