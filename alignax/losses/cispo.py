"""CISPO: the clipped ratio is a constant weight, so that clipped tokens keep a gradient.

  L = -Σ_t w_t sg[clip(ρ_t, 1 - ε_low, 1 + ε_high)] A_t log π(y_t)

Source: MiniMax 2025, https://arxiv.org/abs/2506.13585
Differs from the paper: nothing; ε_low = 1 does not clip small ratios, as there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "advantages")
FORMS = ("prompts",)
RANGES = {"clip_low": "[0, 1]", "clip_high": "[0, inf]"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    clip_low: Number = 1.0,
    clip_high: Number = 2.0,
    reduction: str = "token",
) -> tuple[Float[Array, " B"], Metrics]:
    """REINFORCE with truncated importance weights.

    Args:
      policy: logps [B, G, T].
      batch: old_logps, advantages, mask [B, G, T]; valid [B, G].
      clip_low, clip_high: ε, bounds of a weight below and above 1.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'ratio', 'clipped' (share of tokens), 'approx_kl' (nats per
      token, to the behaviour policy).
    """
    log_rho = ratios.log_ratio(policy, batch)
    rho = jnp.clip(jnp.exp(ratios.bounded(log_rho)), 1 - clip_low, 1 + clip_high)
    gain = jax.lax.stop_gradient(rho) * batch.advantages * policy.logps
    metrics = ratios.report(log_rho, batch, clip_low, clip_high)
    return -masked.reduce_tokens(gain, batch, reduction), metrics
