"""WPO: pairs are weighted by their probability under the policy.

  w(y) = exp(mean_t [log π(y_t | x, y_<t) - log Σ_v π(v | x, y_<t)²]),   L ← w(y⁺) w(y⁻) L

Source: Zhou et al. 2024, https://arxiv.org/abs/2406.11827 (weights by sampled alignment);
no gradient flows through w.
Differs from the paper: nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Scores

NEEDS = ("logps", "collision")
FORMS = ("pairs", "groups", "unscored")


def reweight(policy: Scores, batch: Batch) -> tuple[Scores, Batch, Float[Array, " B"]]:
    """Weights of pairs from the policy's own distribution; a weight may exceed 1.

    Args:
      policy: logps and collision [B, G, T], nats.
      batch: mask [B, G, T], valid [B, G].

    Returns:
      The scores and the batch as they are, and the product of the responses' weights.
    """
    log_weight = masked.token_mean(policy.logps - policy.collision, batch)
    log_weight = jnp.where(batch.valid, log_weight, 0.0).sum(-1)
    return policy, batch, jax.lax.stop_gradient(jnp.exp(log_weight))
