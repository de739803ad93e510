"""Value heads: the range of a scalar head's value, and its targets along a response."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number


def squash(x: Float[Array, "..."], centre: Number, radius: Number):
    """centre + radius tanh(x / radius): a value within centre ± radius.

    The slope at 0 is 1, and an infinite radius gives centre + x. Training and decoding must
    use the same centre and radius: a bound that is added at decoding alone changes the
    values that the head was trained to predict.

    Args:
      x: output of the scalar head.
      centre: the value at x = 0, in the unit of the reward.
      radius: above 0; inf applies no bound.
    """
    finite = jnp.isfinite(radius)
    r = jnp.where(finite, radius, 1.0)
    return centre + jnp.where(finite, r * jnp.tanh(x / r), x)


def following(x: Float[Array, "B G T"], batch: Batch) -> Float[Array, "B G T"]:
    """x at the next scored token of the response; the feedback at its last scored token.

    0 on tokens that are not scored.
    """

    def back(after, at):
        value, keep = at
        return jnp.where(keep, value, after), jnp.where(keep, after, 0.0)

    feedback = batch.feedback.astype(x.dtype)
    return masked.reverse_scan(back, feedback, (x, masked.scored(batch)))
