"""DPO on rankings: the Plackett-Luce likelihood of an order under implicit rewards.

  r_k = β Σ_t log π(y_k)/π_ref(y_k)
  L   = Σ_k log [1 + Σ_{i below k} exp(r_i - r_k)]

Source: Rafailov et al. 2023, appendix A.3, https://arxiv.org/abs/2305.18290
Differs from the paper: a response is only compared with those of strictly lower feedback.
Without ties this is the paper's likelihood; tied responses are never compared.
"""

from jaxtyping import Array, Float

from alignax import lists, masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("groups", "pairs")
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1
) -> tuple[Float[Array, " B"], Metrics]:
    """Negative log-likelihood of the order that the feedback gives.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: ref_logps [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      beta: KL strength, > 0.

    Returns:
      As `lists.outcome`, of implicit rewards; values in nats, 0 where nothing is ordered.

    Raises:
      ValueError: a single response per prompt.
    """
    lists.check(batch, "plackett_luce orders")
    return lists.plackett_luce(batch, beta * masked.log_ratios(policy, batch))
