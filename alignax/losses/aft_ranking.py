"""Alignment fine-tuning on rankings: each response has its own boundary.

  s   = 1/|y| Σ_t log π(y),   B_j = min_{i above j} s_i - c,   T_ij = 2 B_j - s_i (constant)
  L   = log [1 + Σ_{i above j} (exp(s_j - s_i) + exp(T_ij - s_j))] - λ s_best, if right

Options of `constraint`, as in `aft`: 'boundary' is the equation above; 'detached' drops the
second exponential and the gradient of s_j in the first; 'none' only drops the second
exponential. The best response is imitated where it is right, that is where its feedback is
above `right`. On labels the loss equals `aft`.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
Differs from the paper: B_j carries the binary boundary over to rankings, as the least
likely of all responses above j; we could not confirm that the paper takes the same
minimum. λ = 1, the default slack c = 0.1 and `right` are ours: the paper has a reference
answer that is right for every prompt. Ties are never compared; of several best responses
the first is imitated.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import lists
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("groups", "pairs")
RANGES = {"slack": "[0, inf)", "lam": "[0, inf)", "right": "[-inf, inf)"}
CONSTRAINTS = lists.CONSTRAINTS


def loss(
    policy: Scores,
    batch: Batch,
    *,
    constraint: str = "boundary",
    slack: Number = 0.1,
    lam: Number = 1.0,
    right: Number = 0.5,
) -> tuple[Float[Array, " B"], Metrics]:
    """Constrained alignment of every ordered pair of a prompt's responses.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      constraint: one of CONSTRAINTS.
      slack: distance of a boundary below the least likely of the better responses, nats
        per token, >= 0; read by 'boundary' alone.
      lam: λ, weight of the best response's mean nats per token, >= 0.
      right: feedback above which a response is right, in units of the feedback; -inf
        imitates the best of every prompt, for rankings that say nothing of right or wrong.

    Returns:
      As `lists.outcome`, of mean log-probs (nats per token); 'nll' of the best response,
      likewise, 0 for a prompt without a right one; 'imitated', 1 for a prompt with one.

    Raises:
      ValueError: an unknown constraint, or a single response per prompt.
    """
    lists.check_constraint(constraint, "aft_ranking")
    lists.check(batch, "aft_ranking ranks", "or losses.sft")
    score = lists.mean_log_probs(policy, batch)
    above = lists.above(batch)
    value = lists.constrained_alignment(score, above, constraint, slack)
    imitated = (batch.valid & (batch.feedback > right)).any(-1)
    nll = jnp.where(imitated, lists.best_nll(score, batch), 0.0)
    return lists.outcome(
        batch, value + lam * nll, above, lists.gaps(score), nll=nll,
        imitated=imitated.astype(nll.dtype),
    )  # fmt: skip
