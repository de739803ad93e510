"""Preference ranking optimisation: a ranking whose temperatures are gaps of reward.

  s_i = 1/|y_i| Σ_t log π(y_i),   1/T_k^i = f_k - f_i,   1/T_k^k = max_{i below k} 1/T_k^i
  L   = Σ_k log [1 + Σ_{i below k} exp(s_i/T_k^i - s_k/T_k^k)] - λ s_best

Source: Song et al. 2023, https://arxiv.org/abs/2306.17492
Differs from the paper: the imitation term is a mean over the best response's tokens with
weight λ = 1; the authors' code sums over tokens, with 0.05 (G - 1)². Ties are never
compared; of several best responses the first is imitated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
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
      [B] values, and metrics 'accuracy' (share of ordered pairs ranked right, ties count
      half; 0.5 where there are none), 'margin' (mean gap of an ordered pair, nats per
      token) and 'nll' (of the best response, nats per token).

    Raises:
      ValueError: a single response to each prompt.
    """
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "pro ranks responses, but the batch holds one a prompt: use data with two or "
            "more (for pairs from a file set config.data.kind='pairs'), or losses.sft"
        )
    score = policy.logps.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)
    rise = batch.feedback[:, :, None] - batch.feedback[:, None, :]  # [b, k, i]
    below = (rise > 0) & batch.valid[:, :, None] & batch.valid[:, None, :]
    rise = jnp.where(below, rise, 0.0)
    gap = score[:, None, :] * rise - (score * rise.max(-1))[..., None]
    # log(1 + Σ exp) around its largest term, so that nothing overflows
    term = jnp.where(below, gap, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(term.max(-1), 0.0))
    value = top + jnp.log(jnp.exp(-top) + jnp.exp(term - top[..., None]).sum(-1))
    best = jnp.argmax(jnp.where(batch.valid, batch.feedback, -jnp.inf), -1)
    nll = -jnp.take_along_axis(score, best[:, None], -1)[:, 0]
    total = value.sum(-1) + lam * nll
    ahead = jnp.where(below, score[:, :, None] - score[:, None, :], 0.0)
    compared = jnp.maximum(below.sum((1, 2)), 1)
    return jnp.where(batch.valid.any(-1), total, 0.0), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
        "nll": nll,
    }
