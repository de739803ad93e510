"""Self-play preference optimisation with hard labels.

  ρ = Σ_t log π/π_ref
  L = (ρ⁺ - 1/(2β))² + (ρ⁻ + 1/(2β))²

Source: Wu et al. 2024, https://arxiv.org/abs/2405.00675, equation 4.7 with P = 1 for the
chosen and 0 for the rejected response (1/β is its η)
Differs from the paper: the loss of one iteration, on the pairs of the data; no
self-play rounds and no estimated probabilities.
"""

from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.001
) -> tuple[Float[Array, " B"], Metrics]:
    """Squared distances of both log-ratios from ±1/(2β).

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    value = pairs.calibration_error(chosen, rejected, beta)
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
