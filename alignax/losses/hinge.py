"""Hinge loss on implicit rewards (RSO's "hinge-norm").

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref
  L = max(0, 1 - βh)

Source: Liu et al. 2023, https://arxiv.org/abs/2309.06657
Differs from the paper: the loss only; the pairs are those of the data, not drawn by
statistical rejection sampling.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.05
) -> tuple[Float[Array, " B"], Metrics]:
    """1 minus the margin of implicit rewards, at least 0.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: reward per nat of log-ratio, > 0; 1/β is the target margin, in nats.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    value = jax.nn.relu(1 - beta * (chosen - rejected))
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
