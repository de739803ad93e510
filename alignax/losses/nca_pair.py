"""NCA on pairs: noise-contrastive alignment, which keeps the chosen likelihood high.

  r = β Σ_t log π/π_ref
  L = -log σ(r⁺) - ½ log σ(-r⁺) - ½ log σ(-r⁻)

Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369
Differs from the paper: its K responses with explicit rewards are two here, and the chosen
one has all of the reward.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.01
) -> tuple[Float[Array, " B"], Metrics]:
    """Classifies the chosen response as data and both as noise.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    rewards = beta * chosen, beta * rejected
    noise = jax.nn.log_sigmoid(-rewards[0]) + jax.nn.log_sigmoid(-rewards[1])
    value = -jax.nn.log_sigmoid(rewards[0]) - noise / 2
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
