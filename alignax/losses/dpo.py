"""Direct preference optimisation.

  h = Σ_t [log π(y⁺)/π_ref(y⁺)] - Σ_t [log π(y⁻)/π_ref(y⁻)]
  L = -(1-ε) log σ(βh) - ε log σ(-βh)

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; ε > 0 is the
conservative variant of Mitchell 2023, https://ericmitchell.ai/cdpo.pdf
Differs from the paper: nothing.
"""

from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "label_smoothing": "[0, 0.5)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, label_smoothing: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of implicit rewards.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      label_smoothing: probability that a label is flipped, in [0, 0.5).

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    margin = beta * (chosen - rejected)
    value = pairs.logistic(margin, label_smoothing)
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
