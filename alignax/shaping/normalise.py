"""Rewards on a scale of their own: standardised, then clipped.

  r ← clip((r - μ) / σ, -c, c)

μ and σ are constants, or the mean and the standard deviation of the rewards of samples of the
reference, over all prompts of the run. So a reward model whose numbers mean nothing by
themselves has mean 0 and variance 1 where training begins, and one response that it likes too
much does not decide a step.

Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (mean 0 and variance 1 under the
reference); clipping as in Mnih et al. 2015, https://doi.org/10.1038/nature14236
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number

STAGE = "reward"
SOURCES = ("constants", "reference")
RANGES = {"std": "(0, inf)", "clip": "(0, inf]"}


def BASELINE(hyper: Mapping[str, Any]) -> str:
    """The rewards of the reference's samples, if these decide μ and σ."""
    return "pool" if hyper["source"] == "reference" else ""


def shape(
    batch: Batch, baseline: Float[Array, "one R"] | None, *, source: str = "constants",
    mean: Number = 0.0, std: Number = 1.0, clip: Number = float("inf"),
) -> Float[Array, "B G T"]:  # fmt: skip
    """The normalised reward, on the last scored token of each response.

    Args:
      batch: feedback, valid [B, G].
      baseline: rewards of the reference's samples, [1, R]; read under 'reference'.
      source: one of SOURCES.
      mean, std: μ and σ of 'constants', in units of the reward.
      clip: c, in units of σ.

    Returns:
      [B, G, T] rewards of tokens.
    """
    if source == "reference":
        assert baseline is not None
        # equal rewards of all samples: the difference is left on its own scale
        deviation = baseline.std()
        mean, std = baseline.mean(), jnp.where(deviation > 0, deviation, 1.0)
    reward = masked.token_rewards(batch).sum(-1)
    return masked.earned(batch, jnp.clip((reward - mean) / std, -clip, clip))
