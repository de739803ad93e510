"""PPO with a critic that shares the policy's trunk.

  L = -Σ_t w_t min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c Σ_t w_t ½ max[(V_t - R_t)², (V'_t - R_t)²]
  V'_t = V_old,t + clip(V_t - V_old,t, ±ε_v),   R_t = A_t + V_old,t before whitening

V_t is the scalar head on the prefix before token t.

Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; with language models:
Ziegler et al. 2019, https://arxiv.org/abs/1909.08593
Differs from the papers: the critic is a head on the policy, not a model of its own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "state_values", "old_logps", "advantages", "old_values", "returns")
FORMS = ("prompts",)
RANGES = {"clip": "(0, 1]", "value_clip": "(0, inf]", "value_weight": "[0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    clip: Number = 0.2,
    value_clip: Number = 0.2,
    value_weight: Number = 0.1,
    reduction: str = "token",
) -> tuple[Float[Array, " B"], Metrics]:
    """The clipped surrogate and the critic's clipped error.

    Args:
      policy: logps, state_values [B, G, T].
      batch: old_logps, advantages, mask [B, G, T]; extra 'old_values' and 'returns'
        [B, G, T]; valid [B, G].
      clip: ε, clipping range of a ratio around 1.
      value_clip: ε_v, clipping range of a value around the old one, in units of the reward.
      value_weight: c, >= 0.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'ratio', 'clipped' (share of tokens), 'approx_kl' (nats per
      token), 'value_error' (mean square) and 'value' (mean).

    Raises:
      ValueError: the batch has no returns.
    """
    if not batch.extra or "returns" not in batch.extra or policy.state_values is None:
        raise ValueError("PPO needs a critic and its returns: config.shaping.gae = {}")
    gain, metrics = ratios.clipped_surrogate(policy, batch, clip, clip)
    value, old = policy.state_values, batch.extra["old_values"]
    returns = batch.extra["returns"]
    near = old + jnp.clip(value - old, -value_clip, value_clip)
    error = jnp.maximum((value - returns) ** 2, (near - returns) ** 2)
    total = 0.5 * value_weight * error - gain
    keep = masked.scored(batch)
    return masked.reduce_tokens(total, batch, reduction), metrics | {
        "value_error": masked.per_prompt((value - returns) ** 2, keep),
        "value": masked.per_prompt(value, keep),
    }
