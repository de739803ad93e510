"""REINFORCE with the greedy response's reward as the baseline.

  A = r(y) - r(y_greedy)

Source: Li et al. 2023, https://arxiv.org/abs/2310.10505
Differs from the paper: a KL penalty that an earlier shaping subtracted is not subtracted
from the greedy response's reward; the gradient is unbiased all the same.
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch

STAGE = "advantage"
BASELINE = "greedy"


def shape(batch: Batch, baseline: Float[Array, "B 1"]) -> Float[Array, "B G T"]:
    """The same advantage on every token of a response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: reward of the greedy response.

    Returns:
      [B, G, T] advantages.
    """
    reward = masked.token_rewards(batch).sum(-1)
    return masked.spread(batch, reward - baseline)
