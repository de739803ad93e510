"""The output of earlier shapings, scaled to unit variance over the rollout.

  A ← (A - mean A) / std A      over all scored tokens, std Bessel-corrected

Source: Huang et al. 2024, https://arxiv.org/abs/2403.17031 (PPO's details)
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch

STAGE = "scale"
COUPLED = True  # all prompts of a rollout share the moments


def shape(
    batch: Batch, baseline: Float[Array, "B R"] | None, *, shift: bool = True
) -> Float[Array, "B G T"]:
    """Advantages of zero mean and unit variance.

    Args:
      batch: feedback, or the output of an earlier shaping, [B, G, T].
      baseline: not read.
      shift: False keeps the mean.

    Returns:
      [B, G, T] advantages, 0 on tokens that are not scored.
    """
    del baseline
    return masked.whiten(masked.token_rewards(batch), masked.scored(batch), shift=shift)
