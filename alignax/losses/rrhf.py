"""RRHF: ranks responses by their mean log-probability and imitates the best one.

  s_i = 1/|y_i| Σ_t log π(y_i)
  L   = Σ_{f_i > f_j} max(0, s_j - s_i) - λ s_best

Source: Yuan et al. 2023, https://arxiv.org/abs/2304.05302 (λ = 1)
Differs from the paper: the imitation term is a mean over the best response's tokens, so
that its weight does not depend on length or padding; of several best responses the first
is imitated, and ties are never compared. It is losses.ranking at margin 0.
"""

from jaxtyping import Array, Float

from alignax import lists
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("groups", "pairs")
RANGES = {"lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, lam: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Hinge on every pair in the wrong order, and the likelihood of the best response.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      lam: λ, weight of the best response's mean nats per token, >= 0.

    Returns:
      As `lists.outcome`, of mean log-probs (nats per token); 'nll' of the best response,
      likewise.

    Raises:
      ValueError: a single response per prompt.
    """
    lists.check(batch, "rrhf ranks", "or losses.sft")
    score = lists.mean_log_probs(policy, batch)
    return lists.hinge(batch, score, 0.0, lam)
