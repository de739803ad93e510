"""SimPO: length-normalised rewards without a reference, with a target margin.

  r = β log π(y) / |y|
  L = -log σ(r⁺ - r⁻ - γ)

Source: Meng et al. 2024, https://arxiv.org/abs/2405.14734
Differs from the paper: nothing.
Differs from TRL: the defaults are the paper's (β = 2, γ/β = 0.5; TRL: 0.1 and 5), and
there is no likelihood term, which TRL's CPOTrainer adds unless cpo_alpha=0.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "gamma": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 2.0, gamma: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of mean log-probs per token, less a margin.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2].
      beta: reward per nat, > 0.
      gamma: γ, the target margin of rewards, >= 0 (the paper's γ, not its γ/β).

    Returns:
      As `pairs.outcome`, of rewards r.
    """
    chosen, rejected = pairs.log_probs(policy, batch)
    chosen, rejected = pairs.per_token(beta * chosen, beta * rejected, batch)
    value = -jax.nn.log_sigmoid(chosen - rejected - gamma)
    return pairs.outcome(batch, value, chosen, rejected)
