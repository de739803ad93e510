"""KL control in the reward: every token pays for leaving the reference.

  r_t ← r_t - β (log π_old(y_t) - log π_ref(y_t))

The k1 estimator, unbiased; as a part of the reward (and not of the loss, where its
expected gradient is zero) it regularises. π_old is the law that was sampled.

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
    """Rewards a token, less the penalty.

    Args:
      batch: feedback, or rewards a token that an earlier shaping left; old_logps,
        ref_logps [B, G, T].
      baseline: not read.
      beta: β, reward per nat, >= 0.

    Returns:
      [B, G, T] rewards of tokens, 0 where nothing is scored.

    Raises:
      ValueError: no old_logps or no ref_logps.
    """
    del baseline
    if batch.old_logps is None:
        raise ValueError("Batch.old_logps is None: only rollouts bring it")
    ratio = jnp.where(
        masked.scored(batch), batch.old_logps - masked.reference(batch), 0.0
    )
    return masked.token_rewards(batch) - beta * ratio
