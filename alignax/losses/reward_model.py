"""Bradley-Terry reward model.

  L = -log σ(r⁺ - r⁻ - m) + c (r⁺ + r⁻)²

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (pairwise loss); the margin
is Llama 2's, https://arxiv.org/abs/2307.09288; the centring term is Eisenstein et al.'s,
https://arxiv.org/abs/2312.09244
Differs from the paper: the reward is the scalar head on the last *scored* token, found
from the mask, so that neither padding nor template tokens after EOS can be read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("values",)


def loss(
    policy: Scores, batch: Batch, *, margin: Number = 0.0, centring: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of two scalar rewards.

    Args:
      policy: values [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2].
      margin: how far apart rewards must be, >= 0.
      centring: weight of the squared sum, >= 0; pins the free additive constant.

    Returns:
      [B] values (0 where either response is invalid) and metrics 'accuracy' (ties count
      half), 'margin' (reward difference), 'reward_chosen', 'reward_rejected'.
    """
    reward = masked.last(policy.values, batch.mask)
    chosen, rejected = reward[:, 0], reward[:, 1]
    gap = chosen - rejected
    value = -jax.nn.log_sigmoid(gap - margin) + centring * (chosen + rejected) ** 2
    metrics = {
        "accuracy": (jnp.sign(gap) + 1) / 2,
        "margin": gap,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    valid = batch.valid[:, :2].all(-1)
    return jnp.where(valid, value, 0.0), metrics
