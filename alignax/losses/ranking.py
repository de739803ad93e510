"""ACT's ranking loss: a hinge whose margin grows with the gap in constraint satisfaction.

  s_i = 1/|y_i| Σ_t log π(y_i)
  L   = Σ_{f_i > f_j} max(0, s_j - s_i + m (f_i - f_j)) - λ s_best

Source: Wang et al. 2024, https://arxiv.org/abs/2403.06326
Differs from the paper: it states no numbers for m and λ, so the defaults are ours. The
margin grows with the gap of the feedback (a satisfaction rate, or a rank, depending on the
data); of several best responses the first is imitated, and ties are never compared.
"""

from jaxtyping import Array, Float

from alignax import lists
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("groups", "pairs")
RANGES = {"margin": "[0, inf)", "lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, margin: Number = 0.1, lam: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Hinge with a margin on every ordered pair, and the likelihood of the best response.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      margin: m, nats per token per unit of feedback, >= 0; 0 is RRHF.
      lam: λ, weight of the best response's mean nats per token, >= 0.

    Returns:
      As `lists.outcome`, of mean log-probs (nats per token); 'nll' of the best response,
      likewise.

    Raises:
      ValueError: a single response per prompt.
    """
    lists.check(batch, "ranking compares", "or losses.sft")
    score = lists.mean_log_probs(policy, batch)
    return lists.hinge(batch, score, margin * lists.gaps(batch.feedback), lam)
