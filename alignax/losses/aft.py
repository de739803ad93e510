"""Alignment fine-tuning: right answers score above wrong ones, down to a boundary.

  s   = 1/|y| Σ_t log π(y),   B = min_p s_p - c,   T_p = 2B - s_p (a constant)
  L   = log [1 + Σ_p Σ_n (exp(s_n - s_p) + exp(T_p - s_n))] - λ s_ref

p runs over positives, n over negatives. The gradient of s_n vanishes at s_n = B: it lowers
a negative above the boundary and raises one below. Options of `constraint`: 'boundary' is
the equation above; 'detached' drops the second exponential and the gradient of s_n in the
first; 'none' only drops the second exponential.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Differs from the paper: the reference answer y_ref is the first positive of a prompt; the
weight λ = 1 and the default slack c = 0.1 are ours; the paper tunes c.
"""

from jaxtyping import Array, Float

from alignax import lists, masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("groups", "pairs")
RANGES = {"slack": "[0, inf)", "lam": "[0, inf)"}
CONSTRAINTS = lists.CONSTRAINTS


def loss(
    policy: Scores,
    batch: Batch,
    *,
    constraint: str = "boundary",
    slack: Number = 0.1,
    lam: Number = 1.0,
) -> tuple[Float[Array, " B"], Metrics]:
    """Constrained alignment of every (positive, negative) pair of a prompt.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (> 0.5 is a positive), valid [B, G].
      constraint: one of CONSTRAINTS.
      slack: distance of the boundary below the least likely positive, nats per token,
        >= 0; read by 'boundary' alone.
      lam: λ, weight of the reference answer's mean nats per token, >= 0.

    Returns:
      As `lists.outcome`, of mean log-probs (nats per token), 0 for a prompt without a
      positive; 'score_negative' (mean over negatives, 0 without) and 'nll' (of y_ref),
      likewise.

    Raises:
      ValueError: an unknown constraint, or a single response per prompt.
    """
    lists.check_constraint(constraint, "aft")
    lists.check(batch, "aft compares", "or losses.sft")
    score = lists.mean_log_probs(policy, batch)
    positive = batch.valid & (batch.feedback > 0.5)
    negative = batch.valid & ~positive
    pair = positive[:, :, None] & negative[:, None, :]  # [b, p, n]
    value = lists.constrained_alignment(score, pair, constraint, slack)
    nll = -lists.first(score, positive)
    below = masked.response_mean(score, negative)
    return lists.outcome(
        batch, value + lam * nll, pair, lists.gaps(score), score_negative=below, nll=nll
    )
