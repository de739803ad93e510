"""Rewards less a constant: the advantage of plain REINFORCE.

  A = r - b

Source: Williams 1992, https://doi.org/10.1007/BF00992696
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number

RANGES = {"value": "(-inf, inf)"}
STAGE = "advantage"


def shape(
    batch: Batch, baseline: Float[Array, "B R"] | None, *, value: Number = 0.0
) -> Float[Array, "B G T"]:
    """The same advantage on every token of a response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: not read.
      value: b, in units of the reward.

    Returns:
      [B, G, T] advantages; 0 is plain REINFORCE without a baseline.
    """
    del baseline
    return masked.spread(batch, masked.token_rewards(batch).sum(-1) - value)
