"""Length-normalised DPO.

  h = log-ratio(y⁺)/|y⁺| - log-ratio(y⁻)/|y⁻|, each Σ_t log π/π_ref
  L = -log σ(βh)

Source: Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124
Differs from the paper: nothing. TRL calls it 'sigmoid_norm'.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 5.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of mean log-ratios per token.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], mask [B, 2, T], valid [B, 2].
      beta: KL strength, > 0; larger than DPO's by about the length of a response.

    Returns:
      As `pairs.outcome`, of β times the mean log-ratios; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats, sums).
    """
    log_ratios = pairs.log_ratios(policy, batch)
    chosen, rejected = pairs.per_token(
        beta * log_ratios[0], beta * log_ratios[1], batch
    )
    return pairs.outcome(
        batch, -jax.nn.log_sigmoid(chosen - rejected), chosen, rejected,
        log_ratio_chosen=log_ratios[0], log_ratio_rejected=log_ratios[1],
    )  # fmt: skip
