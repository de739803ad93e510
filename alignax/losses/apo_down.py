"""APO-down: lowers both likelihoods, that of the rejected response further.

  r = β Σ_t log π/π_ref
  L = σ(r⁺) + 1 - σ(r⁺ - r⁻)

For data whose chosen responses are worse than the model's own.

Source: D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 8
Differs from the paper: nothing.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1
) -> tuple[Float[Array, " B"], Metrics]:
    """Two sigmoids, in (0, 2); 1 where the policy is the reference.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    value = jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * (rejected - chosen))
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
