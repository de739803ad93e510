"""Rewards normalised within a group, as GRPO does.

  A_i = (r_i - r̄) / (std(r) + ε)^s,   std with G - 1 degrees of freedom

s = 1 is GRPO; s = 0 does not divide (Dr. GRPO), so that prompts with a small standard
deviation, easy and hard ones, have no larger weight. A group of equal rewards has
advantages of exactly 0.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300; without the division: Liu et
al. 2025, https://arxiv.org/abs/2503.20783
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number
from alignax.shaping import centred

STAGE = "advantage"
BASELINE = "group"
RANGES = {"scale": "[0, 1]", "eps": "(0, inf)"}


def shape(
    batch: Batch,
    baseline: Float[Array, "B R"] | None,
    *,
    scale: Number = 1.0,
    eps: Number = 1e-4,
) -> Float[Array, "B G T"]:
    """The same advantage on every token of a response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: not read.
      scale: s, exponent of the standard deviation, from 0 to 1.
      eps: ε added to the standard deviation, in units of the reward.

    Returns:
      [B, G, T] advantages.
    """
    del baseline
    gap = centred(batch)
    n = batch.valid.sum(-1, keepdims=True)
    variance = (gap**2).sum(-1, keepdims=True) / jnp.maximum(n - 1, 1)
    return masked.spread(batch, gap / (jnp.sqrt(variance) + eps) ** scale)
