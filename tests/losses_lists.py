"""One prompt made of its numbers, and random ones: what tests of list losses share."""

import jax
import jax.numpy as jnp
import numpy as np
from losses_compiled import graded
from oracles import losses as oracle

from alignax.batch import Batch, Scores, from_groups


def group(
    scores, feedback, *, lengths=None, ref=None, valid=None
) -> tuple[Scores, Batch]:
    """One prompt; numbers are spread evenly over the scored tokens of a response.

    Args:
      scores: mean log π of each response, nats per token; also its value, which stands
        on the last scored token (junk on all others).
      feedback: of each response.
      lengths: scored tokens of each response, 2 by default.
      ref: mean log π_ref of each response, 0 by default.
      valid: of each response, True by default.
    """
    lengths = lengths or [2] * len(scores)
    length = max(lengths) + 2
    batch = from_groups(
        [[1]], [[[2] * n for n in lengths]], length=length, feedback=[feedback]
    )
    last = np.arange(length) == batch.lengths[..., None] - 1

    xp = jnp if any(isinstance(x, jax.Array) for x in scores) else np

    def spread(means):
        means = xp.stack([xp.float32(x) for x in means])
        return xp.where(batch.mask, means[None, :, None], xp.float32(0))

    values = xp.where(last, spread(scores), xp.float32(1e3))
    ref_logps = spread(ref or [0.0] * len(scores))
    batch = batch._replace(ref_logps=ref_logps)
    if valid is not None:
        batch = batch._replace(valid=np.array([valid]))
    return jax.tree.map(jnp.asarray, (Scores(spread(scores), values=values), batch))


def cost(loss, scores, feedback, *, lengths=None, ref=None, valid=None, **hyper):
    """What the loss of that prompt is."""
    policy, batch = group(scores, feedback, lengths=lengths, ref=ref, valid=valid)
    return float(graded(loss, policy, batch, **hyper)[0][0])


def slopes(loss, scores, feedback, *, lengths=None, ref=None, valid=None, **hyper):
    """Its derivatives by the scores."""
    policy, batch = group(scores, feedback, lengths=lengths, ref=ref, valid=valid)
    grads = graded(loss, policy, batch, **hyper)[1]
    last = np.arange(batch.mask.shape[-1]) == np.asarray(batch.lengths)[..., None] - 1
    each = np.where(batch.mask, grads.logps, 0) + np.where(last, grads.values, 0)
    return each[0].sum(-1)


def random_groups(make_batch, *, labels=False, b=6, g=4) -> tuple[Scores, Batch]:
    """Prompts with two to four valid responses, near the reference.

    Args:
      make_batch: the fixture.
      labels: feedback is 0 or 1 instead of an order without ties.
      b: prompts.
      g: responses.
    """
    batch = make_batch(b, g, 12)
    rng = np.random.default_rng(0)

    def column(low, high):
        x = rng.uniform(low, high, batch.mask.shape).astype(np.float32)
        return jnp.where(batch.mask, x, 0)

    feedback = np.stack([rng.permutation(g) for _ in range(b)]) / 2
    if labels:
        feedback = rng.integers(0, 2, (b, g))
    valid = rng.random((b, g)) < 0.7
    valid[:, :2] = True
    ref_logps = column(-3, -0.5)
    scores = Scores(ref_logps + column(-0.5, 0.5), values=column(-1, 1))
    return scores, batch._replace(
        ref_logps=ref_logps, feedback=jnp.float32(feedback), valid=jnp.asarray(valid)
    )


def assert_oracle(loss, want, make_batch, *, labels=False, **hyper):
    """On random prompts the loss is what `want` says of the valid responses of each."""
    scores, batch = random_groups(make_batch, labels=labels)
    got = loss(scores, batch, **hyper)[0]
    want = [want(responses, **hyper) for responses in oracle.groups(scores, batch)]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
