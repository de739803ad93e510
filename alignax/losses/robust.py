"""Robust DPO: an unbiased DPO loss when a known share of the labels is flipped.

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref
  L = [-(1-ε) log σ(βh) + ε log σ(-βh)] / (1 - 2ε)

If labels are flipped with probability ε, the expectation of L is the DPO loss of the
clean label. L alone is not bounded below: it falls as -εβh/(1-2ε) where h is large.

Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409
Differs from the paper: nothing. It is not conservative DPO (`dpo` with label_smoothing),
which has no such expectation.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "label_smoothing": "[0, 0.5)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, label_smoothing: Number = 0.1
) -> tuple[Float[Array, " B"], Metrics]:
    """Unbiased estimate of the logistic loss that clean labels would have.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      label_smoothing: ε, the probability that a label is flipped, in [0, 0.5).

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    margin = beta * (chosen - rejected)
    kept, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    value = (1 - label_smoothing) * kept - label_smoothing * flipped
    return pairs.implicit_outcome(
        batch, value / (1 - 2 * label_smoothing), chosen, rejected, beta
    )
