"""Reward regression: the scalar head predicts the feedback.

  L = 1/G Σ_i (r_i - f_i)²

Source: Wang et al. 2024 (HelpSteer2), https://arxiv.org/abs/2406.08673
Differs from the paper: one attribute, not five; the reward is the scalar head on the last
*scored* token. Every prompt has the same weight, whatever its number of responses.
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("values",)
FORMS = ("labelled", "groups", "pairs")


def loss(policy: Scores, batch: Batch) -> tuple[Float[Array, " B"], Metrics]:
    """Squared error between reward and feedback, mean over a prompt's responses.

    Args:
      policy: values [B, G, T].
      batch: mask [B, G, T], feedback [B, G] in the unit of the reward, valid [B, G].

    Returns:
      [B] values, and metrics 'reward' and 'bias' (reward - feedback), means over the
      prompt's valid responses.
    """
    reward = masked.last(policy.values, batch.mask)
    error = reward - batch.feedback
    return masked.response_mean(error**2, batch.valid), {
        "reward": masked.response_mean(reward, batch.valid),
        "bias": masked.response_mean(error, batch.valid),
    }
