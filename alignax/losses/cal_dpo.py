"""Cal-DPO: DPO whose implicit rewards are calibrated to ±1/2.

  ρ = Σ_t log π/π_ref
  L = -log σ(ρ⁺ - ρ⁻) + ½ [(ρ⁺ - 1/(2β))² + (ρ⁻ + 1/(2β))²]

The contrastive term has no β. The calibration term alone is least at βρ⁺ = ½, βρ⁻ = -½.

Source: Xiao et al. 2024, https://arxiv.org/abs/2412.14516
Differs from the paper: nothing; the weight ½ is that of the authors' code.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.001
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss plus squared distances of both log-ratios from ±1/(2β).

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    calibration = pairs.calibration_error(chosen, rejected, beta)
    value = -jax.nn.log_sigmoid(chosen - rejected) + calibration / 2
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
