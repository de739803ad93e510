"""Preference ranking optimisation: a list loss with inverse temperatures from reward gaps.

  s_i = 1/|y_i| Σ_t log π(y_i),   1/T_k^i = f_k - f_i,   1/T_k^k = max_{i below k} 1/T_k^i
  L   = Σ_k log [1 + Σ_{i below k} exp(s_i/T_k^i - s_k/T_k^k)] - λ s_best

Source: Song et al. 2023, https://arxiv.org/abs/2306.17492
Differs from the paper: the imitation term is a mean over the best response's tokens with
weight λ = 1; the authors' code sums over tokens, with 0.05 (G - 1)². Ties are never
compared; of several best responses the first is imitated.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import lists
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("groups", "pairs")
RANGES = {"lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, lam: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Each response against all below it, and the likelihood of the best response.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (rewards; higher is better), valid [B, G].
      lam: λ, weight of the best response's mean nats per token, >= 0.

    Returns:
      As `lists.outcome`, of mean log-probs (nats per token); 'nll' of the best response,
      likewise.

    Raises:
      ValueError: a single response per prompt.
    """
    lists.check(batch, "pro ranks", "or losses.sft")
    score = lists.mean_log_probs(policy, batch)
    above = lists.above(batch)  # [b, k, i]: i below k
    inverse = jnp.where(above, lists.gaps(batch.feedback), 0.0)  # 1/T_k^i
    own = score * inverse.max(-1)  # s_k/T_k^k
    rank = lists.log1p_sum_exp(above, score[:, None, :] * inverse - own[:, :, None])
    nll = lists.best_nll(score, batch)
    value = rank.sum(-1) + lam * nll
    return lists.outcome(batch, value, above, lists.gaps(score), nll=nll)
