"""What a scalar head means: its range, and what it should have said along a response."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Number


def squash(x: Float[Array, "..."], centre: Number, radius: Number):
    """centre + radius tanh(x / radius): a value that cannot leave centre ± radius.

    The slope is 1 at 0, so an infinite radius is centre + x. Training and decoding squash
    alike: a bound put on a head that was trained without one is another guide.

    Args:
      x: what the head says.
      centre: the value where it says 0, in the unit of the reward.
      radius: above 0, inf leaves the head alone.
    """
    finite = jnp.isfinite(radius)
    r = jnp.where(finite, radius, 1.0)
    return centre + jnp.where(finite, r * jnp.tanh(x / r), x)


def following(x: Float[Array, "B G T"], batch: Batch) -> Float[Array, "B G T"]:
    """x at a response's next scored token; at its last one, the feedback."""
    keep = batch.mask & batch.valid[..., None]

    def back(after, at):
        value, k = at
        return jnp.where(k, value, after), jnp.where(k, after, 0.0)

    steps = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), (x, keep))
    last = batch.feedback.astype(x.dtype)
    _, out = jax.lax.scan(back, last, steps, reverse=True)
    return jnp.moveaxis(out, 0, -1)
