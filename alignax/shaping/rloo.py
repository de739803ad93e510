"""REINFORCE with the other responses' mean reward as the baseline (leave one out).

  A_i = r_i - mean_{j≠i} r_j = G/(G-1) (r_i - r̄)

G is the number of valid responses to the prompt; for G = 1 the advantage is 0.

Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; Kool et al. 2019,
https://openreview.net/forum?id=r1lgTGL5DE
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch
from alignax.shaping import centred

STAGE = "advantage"
BASELINE = "group"


def shape(batch: Batch, baseline: Float[Array, "B R"] | None) -> Float[Array, "B G T"]:
    """The same advantage on every token of a response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: not read.

    Returns:
      [B, G, T] advantages; their sum over a prompt's responses is 0.
    """
    del baseline
    n = batch.valid.sum(-1, keepdims=True)
    return masked.spread(batch, centred(batch) * n / jnp.maximum(n - 1, 1))
