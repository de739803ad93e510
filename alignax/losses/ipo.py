"""Identity preference optimisation: squared distance of the margin from a finite target.

  h = log-ratio(y⁺)/|y⁺| - log-ratio(y⁻)/|y⁻|, each Σ_t log π/π_ref
  L = (h - 1/(2β))²

Source: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17 (β is its τ)
Differs from the paper: the paper writes h without the lengths |y|; its authors confirmed
that their experiments divide by them. average=False is the equation as printed.
"""

from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, average: bool = True
) -> tuple[Float[Array, " B"], Metrics]:
    """Squared distance of the log-ratio margin from 1/(2β).

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], mask [B, 2, T], valid [B, 2].
      beta: KL strength (the paper's τ), > 0.
      average: log-ratios are means over the scored tokens, not sums.

    Returns:
      As `pairs.outcome`, of the log-ratios compared (nats, or nats per token);
      'log_ratio_chosen' and 'log_ratio_rejected' (nats, sums).
    """
    chosen, rejected = sums = pairs.log_ratios(policy, batch)
    if average:
        chosen, rejected = pairs.per_token(chosen, rejected, batch)
    value = (chosen - rejected - 1 / (2 * beta)) ** 2
    return pairs.outcome(
        batch, value, chosen, rejected,
        log_ratio_chosen=sums[0], log_ratio_rejected=sums[1],
    )  # fmt: skip
