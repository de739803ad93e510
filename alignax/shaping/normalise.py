"""Rewards on a scale of their own: less a mean, over a deviation, and clipped.

  r ← clip((r - μ) / σ, -c, c)

The numbers of a reward model mean nothing by themselves: with the mean and the deviation of
the rewards of the first policy (an evaluation reports them), training begins at mean 0 and
variance 1, and a response that the model likes too much does not decide a step.

Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (normalised under the first
policy); clipping as in Mnih et al. 2015, https://doi.org/10.1038/nature14236
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number

STAGE = "reward"
RANGES = {"std": "(0, inf)", "clip": "(0, inf]", "mean": "(-inf, inf)"}


def shape(
    batch: Batch, baseline: Float[Array, "B R"] | None, *, mean: Number = 0.0,
    std: Number = 1.0, clip: Number = float("inf"),
) -> Float[Array, "B G T"]:  # fmt: skip
    """The normalised reward, on the last scored token of each response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: not read.
      mean, std: μ and σ, in units of the reward.
      clip: c, in units of σ.

    Returns:
      [B, G, T] rewards of tokens.
    """
    del baseline
    reward = masked.token_rewards(batch).sum(-1)
    return masked.earned(batch, jnp.clip((reward - mean) / std, -clip, clip))
