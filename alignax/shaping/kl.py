"""KL control in the reward: a penalty on every token's log-ratio to the reference.

  r_t ← r_t - β (log π_old(y_t) - log π_ref(y_t))

This is the k1 estimator, which is unbiased. It regularises as a part of the reward; in the
loss its expected gradient would be zero. π_old is the behaviour policy.

Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; estimators: Schulman 2020,
http://joschu.net/blog/kl-approx.html
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number

STAGE = "penalty"
NEEDS = ("old_logps", "ref_logps")
RANGES = {"beta": "[0, inf)"}


def shape(
    batch: Batch, baseline: Float[Array, "B R"] | None, *, beta: Number = 0.05
) -> Float[Array, "B G T"]:
    """Rewards of tokens, less the penalty.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; old_logps, ref_logps
        [B, G, T].
      baseline: not read.
      beta: β, reward per nat, >= 0.

    Returns:
      [B, G, T] rewards of tokens, 0 on tokens that are not scored.

    Raises:
      ValueError: no old_logps or no ref_logps.
    """
    del baseline
    return masked.token_rewards(batch) - beta * log_ratio(batch)


def log_ratio(batch: Batch) -> Float[Array, "B G T"]:
    """log π_old - log π_ref in nats; 0 on tokens that are not scored.

    Raises:
      ValueError: no old_logps or no ref_logps.
    """
    if batch.old_logps is None:
        raise ValueError("Batch.old_logps is None: only rollouts bring it")
    ratio = batch.old_logps - masked.reference(batch)
    return jnp.where(masked.scored(batch), ratio, 0.0)
