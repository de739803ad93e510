"""DPO-Positive: DPO with a penalty on making the chosen response less likely.

  ρ = Σ_t log π/π_ref
  L = -log σ(β [ρ⁺ - ρ⁻ - λ max(0, -ρ⁺)])

Source: Pal et al. 2024 (Smaug), https://arxiv.org/abs/2402.13228
Differs from the paper: nothing. At ρ⁺ = 0, where training starts, the gradient of the
penalty is 0.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.3, lam: Number = 50.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss of a margin less a penalty for a chosen log-ratio below 0.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      lam: λ, weight of the penalty, >= 0; 0 is DPO.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen', 'log_ratio_rejected'
      and 'penalty' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    penalty = jax.nn.relu(-chosen)  # gradient 0 at 0: the first step is DPO's
    margin = beta * (chosen - rejected - lam * penalty)
    return pairs.implicit_outcome(
        batch, -jax.nn.log_sigmoid(margin), chosen, rejected, beta, penalty=penalty
    )
