"""Bradley-Terry reward model.

  L = -log σ(r⁺ - r⁻ - m) + c (r⁺ + r⁻)²

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (pairwise loss); the margin
is Llama 2's, https://arxiv.org/abs/2307.09288; the centring term is Eisenstein et al.'s,
https://arxiv.org/abs/2312.09244
Differs from the paper: the reward is the scalar head on the last *scored* token of the
mask, so that neither padding nor template tokens after EOS are read.
"""

import jax
from jaxtyping import Array, Float

from alignax import masked, pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("values",)
FORMS = ("pairs",)
RANGES = {"margin": "[0, inf)", "centring": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, margin: Number = 0.0, centring: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of two scalar rewards.

    Args:
      policy: values [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2]; extra['margin'] [B], if the rows have one
        (data.numbers), is added to m.
      margin: m, subtracted from the difference of rewards, >= 0.
      centring: c, weight of the squared sum, >= 0; it fixes the free additive constant.

    Returns:
      As `pairs.outcome`, of rewards; 'reward_chosen' and 'reward_rejected'.
    """
    reward = masked.last(policy.values, batch.mask)
    chosen, rejected = pairs.sides(reward, batch)
    own = (batch.extra or {}).get("margin", 0.0)
    value = -jax.nn.log_sigmoid(chosen - rejected - margin - own)
    value += centring * (chosen + rejected) ** 2
    return pairs.outcome(
        batch, value, chosen, rejected, reward_chosen=chosen, reward_rejected=rejected
    )
