"""TDPO: a number by hand, its two variants, and where the KL pulls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import Scores, from_pairs
from alignax.losses import dpo, tdpo


def pair(ratios=(3.0, -1.0), kls=(0.5, 2.0)):
    """Log-ratios and sequence KLs of one pair, spread over two tokens each."""
    batch = jax.tree.map(jnp.asarray, from_pairs([[1]], [[2, 3]], [[4, 5]], length=4))

    def spread(sums):
        return jnp.where(batch.mask, jnp.asarray(sums)[None, :, None] / 2, 0.0)

    scores = Scores(spread(ratios), forward_kl=spread(kls))
    return scores, batch._replace(ref_logps=jnp.zeros_like(scores.logps))


def test_golden_number():
    """0.5 [4 - 0.5 (2 - 0.5)] = 1.625: log(1 + e^-1.625)."""
    scores, batch = pair()
    value, metrics = tdpo.loss(scores, batch, beta=0.5, alpha=0.5)
    assert float(value[0]) == pytest.approx(np.log1p(np.exp(-1.625)), abs=1e-6)
    assert float(metrics["kl_rejected"][0]) == pytest.approx(2.0)


def test_without_alpha_it_is_dpo():
    scores, batch = pair()
    got = tdpo.loss(scores, batch, beta=0.3, alpha=0.0)[0]
    np.testing.assert_allclose(got, dpo.loss(scores, batch, beta=0.3)[0], rtol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_the_rejected_kl_is_lowered_and_the_chosen_one_only_in_the_first_variant(
    detach,
):
    """h must exceed α (D⁻ - D⁺): D⁻ goes down, and D⁺ up unless it is detached."""
    scores, batch = pair()
    grad = jax.grad(lambda s: tdpo.loss(s, batch, detach_chosen=detach)[0].sum())(
        scores
    )
    on = np.asarray(batch.mask)[0]
    assert (np.asarray(grad.forward_kl)[0, 1][on[1]] > 0).all()
    chosen = np.asarray(grad.forward_kl)[0, 0][on[0]]
    assert (chosen == 0).all() if detach else (chosen < 0).all()
