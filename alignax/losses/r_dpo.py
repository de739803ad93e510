"""R-DPO: length-regularised DPO.

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref
  L = -log σ(βh + α (|y⁺| - |y⁻|))

The optimal policy is that of the reward less α per token. Where the labels favour longer
responses, the length term accounts for it instead of h.

Source: Park et al. 2024, https://arxiv.org/abs/2403.19159
Differs from the paper: nothing.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "alpha": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, alpha: Number = 0.01
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on implicit rewards plus α times the difference of lengths.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], mask [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      alpha: reward per token that is attributed to length, >= 0; 0 is DPO.

    Returns:
      As `pairs.outcome`, of implicit rewards (without the length term);
      'log_ratio_chosen' and 'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    longer, shorter = pairs.lengths(batch)
    margin = beta * (chosen - rejected) + alpha * (longer - shorter)
    return pairs.implicit_outcome(
        batch, -jax.nn.log_sigmoid(margin), chosen, rejected, beta
    )
