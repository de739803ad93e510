"""Alignment via optimal transport, paired: stochastic dominance of the policy's margins.

  Δ = log π(y⁺) - log π(y⁻), Δ_ref likewise;  Δ₍ᵢ₎ the i-th smallest of the batch
  d = Δ₍ᵢ₎ - Δ_ref₍ᵢ₎,  i the rank of this pair's Δ
  L = -(1-ε) log σ(βd) - ε log σ(-βd)

Source: Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
Differs from the paper: only the logistic one of its convex penalties; hard sorting.
Differs from TRL: the order statistics are those of the whole optimiser step, so that
neither accumulation nor the number of devices changes the loss; TRL sorts each
micro-batch of each device.
"""

from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "label_smoothing": "[0, 0.5)"}
COUPLED = True


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.01, label_smoothing: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the quantiles of the policy's margins over the reference's.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2]; a pair without two valid sides has no rank.
      beta: KL strength, > 0.
      label_smoothing: ε, probability that a label is flipped, in [0, 0.5).

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats), 'quantile_gap' (β times d).
    """
    chosen, rejected = pairs.log_probs(policy, batch)
    ref_chosen, ref_rejected = pairs.ref_log_probs(batch)
    margin, ref_margin = chosen - rejected, ref_chosen - ref_rejected
    gap = beta * pairs.quantile_gap(margin, ref_margin, batch.valid.all(-1))
    value = pairs.logistic(gap, label_smoothing)
    return pairs.implicit_outcome(
        batch, value, chosen - ref_chosen, rejected - ref_rejected, beta,
        quantile_gap=gap,
    )  # fmt: skip
