"""Generalised advantage estimation, from rewards of tokens and a critic.

  δ_t = r_t + γ V_{t+1} - V_t,   A_t = Σ_{k≥0} (γλ)^k δ_{t+k}

V_t is the critic on the prefix before token t; after the last token it is 0. λ = 1 is the
return minus V, λ = 0 the one-step error. Steps run over scored tokens only.

Source: Schulman et al. 2015, https://arxiv.org/abs/1506.02438
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number

STAGE = "advantage"
NEEDS = ("old_values",)
RETURNS = True  # A + V is the target of the critic
RANGES = {"gamma": "[0, 1]", "lam": "[0, 1]"}


def shape(
    batch: Batch,
    baseline: Float[Array, "B R"] | None,
    *,
    gamma: Number = 1.0,
    lam: Number = 0.95,
) -> Float[Array, "B G T"]:
    """Advantages of tokens.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; extra 'old_values'
        [B, G, T], the critic's values when the response was sampled.
      baseline: not read.
      gamma: γ, discount per token, 0 to 1.
      lam: λ, 0 to 1.

    Returns:
      [B, G, T] advantages, 0 on tokens that are not scored.

    Raises:
      ValueError: no 'old_values'.
    """
    del baseline
    if not batch.extra or "old_values" not in batch.extra:
        raise ValueError(
            "Batch.extra['old_values'] is missing: rollouts bring it where the policy has "
            "a critic (config.model.value_head=True)"
        )
    values = batch.extra["old_values"]
    rewards, keep = masked.token_rewards(batch), masked.scored(batch)
    return _scan(rewards, values, keep, gamma, lam)


@jax.jit
def _scan(rewards, values, keep, gamma, lam):
    def back(carry, at):
        advantage, value = carry  # of the next scored token
        r, v, k = at
        mine = r + gamma * value - v + gamma * lam * advantage
        carry = jnp.where(k, mine, advantage), jnp.where(k, v, value)
        return carry, jnp.where(k, mine, 0.0)

    zero = jnp.zeros(rewards.shape[:-1], rewards.dtype)
    return masked.reverse_scan(back, (zero, zero), (rewards, values, keep))
