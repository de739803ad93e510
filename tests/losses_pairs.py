"""One preference pair made of its numbers, and random ones: what tests of pair losses share."""

import jax
import jax.numpy as jnp
import numpy as np
from losses_compiled import graded
from oracles import losses as oracle

from alignax.batch import Batch, Scores, from_pairs


def pair(chosen=0.0, rejected=0.0, *, lengths=(2, 2), ref=(-3.0, -4.0)):
    """One pair, its log-probs spread evenly over the scored tokens.

    Args:
      chosen, rejected: log π/π_ref of each side, nats; with ref=(0, 0) these are log π.
      lengths: scored tokens of each side.
      ref: log π_ref of each side, nats.
    """
    batch = from_pairs(
        [[1]], [[2] * lengths[0]], [[3] * lengths[1]], length=max(lengths) + 2
    )
    traced = any(isinstance(x, jax.Array) for x in (chosen, rejected, *ref))
    xp = jnp if traced else np

    def spread(totals):
        each = [xp.float32(x) / n for x, n in zip(totals, lengths, strict=True)]
        return xp.where(batch.mask, xp.stack(each)[None, :, None], xp.float32(0))

    ref_logps = spread(ref)
    scores = Scores(ref_logps + spread((chosen, rejected)))
    return jax.tree.map(jnp.asarray, (scores, batch._replace(ref_logps=ref_logps)))


def cost(loss, chosen=0.0, rejected=0.0, *, lengths=(2, 2), ref=(-3.0, -4.0), **hyper):
    """What the loss of that pair is."""
    scores, batch = pair(chosen, rejected, lengths=lengths, ref=ref)
    return float(graded(loss, scores, batch, **hyper)[0][0])


def slopes(loss, chosen, rejected, *, lengths=(2, 2), ref=(-3.0, -4.0), **hyper):
    """Its derivatives by the two log-ratios."""
    scores, batch = pair(chosen, rejected, lengths=lengths, ref=ref)
    grads = graded(loss, scores, batch, **hyper)[1].logps
    each = np.where(batch.mask, grads, 0)[0].sum(-1) / lengths
    return tuple(each.tolist())


def random_pairs(make_batch, b=6, *, away=0.5) -> tuple[Scores, Batch]:
    """Pairs of different lengths, at most `away` nats a token from the reference."""
    batch = make_batch(b, 2, 12)
    rng = np.random.default_rng(0)

    def column(low, high):
        x = rng.uniform(low, high, batch.mask.shape).astype(np.float32)
        return np.where(batch.mask, x, np.float32(0))

    ref_logps = column(-4, -0.5)
    scores = Scores(ref_logps + column(-away, away))
    return jax.tree.map(jnp.asarray, (scores, batch._replace(ref_logps=ref_logps)))


def assert_oracle(loss, want, make_batch, **hyper):
    """On random pairs the loss is what `want` says of the two sides of each."""
    scores, batch = random_pairs(make_batch)
    got = loss(scores, batch, **hyper)[0]
    sides = oracle.sides(scores.logps, batch.ref_logps, batch.mask)
    want = [want(chosen, rejected, **hyper) for chosen, rejected in sides]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
