"""GSPO: one importance ratio per response, as there is one reward per response.

  L = -Σ_i w_i min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i)
  s_i = exp( 1/|y_i| Σ_t log [π(y_t) / π_old(y_t)] ),   A_i = mean_t A_t

Source: Zheng et al. 2025, https://arxiv.org/abs/2507.18071
Differs from the paper: nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "advantages")
FORMS = ("prompts",)
RANGES = {"clip_low": "(0, 1]", "clip_high": "(0, inf]"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    clip_low: Number = 3e-4,
    clip_high: Number = 4e-4,
    reduction: str = "sequence",
) -> tuple[Float[Array, " B"], Metrics]:
    """Surrogate of the expected advantage of responses.

    Args:
      policy: logps [B, G, T].
      batch: old_logps, advantages, mask [B, G, T]; valid [B, G].
      clip_low, clip_high: ε, clipping range of a response's ratio below and above 1.
      reduction: 'sequence' gives each response the same weight; 'token' and 'constant', as
        in `masked.token_weights`, weigh a response by its length.

    Returns:
      [B] values, and metrics 'ratio', 'clipped' (share of tokens whose response is
      outside the range) and 'approx_kl' (k3 of the ratio, nats per token).
    """
    log_rho = ratios.log_ratio(policy, batch)
    weights = masked.token_weights(batch, reduction)
    log_s = masked.token_mean(log_rho, batch)
    advantages = jnp.where(batch.mask, batch.advantages, 0.0)
    advantage = masked.token_mean(advantages, batch)
    gain = ratios.surrogate(log_s, advantage, clip_low, clip_high, float("inf"))
    as_tokens = masked.spread(batch, log_s)
    metrics = ratios.report(as_tokens, batch, clip_low, clip_high)
    return -(weights.sum(-1) * gain).sum(-1), metrics
