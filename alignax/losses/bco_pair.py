"""BCO on pairs: a binary classifier whose logit is the implicit reward.

  r = β Σ_t log π/π_ref
  L = -log σ(r⁺ - δ) - log σ(-(r⁻ - δ))

It is an upper bound of the DPO loss for every δ.

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656
Differs from the paper: δ is a constant, 0 by default. `bco` has its running mean of
rewards, and responses without a partner.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "delta": "(-inf, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.01, delta: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Cross-entropies of labelling the chosen response good and the rejected one bad.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      delta: δ, the reward at which a response is as likely good as bad.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    good = jax.nn.log_sigmoid(beta * chosen - delta)
    value = -good - jax.nn.log_sigmoid(delta - beta * rejected)
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
