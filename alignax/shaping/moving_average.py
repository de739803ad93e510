"""Rewards less a moving average of the rewards of earlier rollouts.

  A = r - b_t,   b_t = Σ_{s<t} d^(t-1-s) r̄_s / Σ_{s<t} d^(t-1-s)

r̄_s is the mean reward of the valid responses of rollout s. No response is in its own
baseline, so the gradient has no bias, and one response per prompt is enough. The first
rollout has none before it: its b is a constant.

Source: Williams 1992, https://doi.org/10.1007/BF00992696 (reinforcement comparison);
beside RLOO in Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number

STAGE = "advantage"
BASELINE = "running"
RANGES = {"decay": "[0, 1)", "start": "(-inf, inf)"}


def RUNNING(hyper: dict[str, Number]) -> dict[str, Number]:
    """b_t in units of the reward, and the weight Σ d^(t-1-s) (1 - d) that it stands on."""
    return {"baseline": hyper["start"], "weight": 0.0}


def shape(
    batch: Batch, baseline: Float[Array, "1 2"], *, decay: Number = 0.9,
    start: Number = 0.0,
) -> Float[Array, "B G T"]:  # fmt: skip
    """The same advantage on every token of a response.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; valid [B, G].
      baseline: the numbers of RUNNING.
      decay: d per rollout.
      start: b of the first rollout, in units of the reward.

    Returns:
      [B, G, T] advantages.
    """
    del decay, start
    return masked.spread(batch, masked.token_rewards(batch).sum(-1) - baseline[0, 0])


def update(
    batch: Batch, baseline: Float[Array, "1 2"], *, decay: Number = 0.9,
    start: Number = 0.0,
) -> Float[Array, "1 2"]:  # fmt: skip
    """The numbers of RUNNING after a rollout; unchanged without a valid response."""
    del start
    valid = batch.valid  # what is not has reward 0
    mean = masked.token_rewards(batch).sum() / jnp.maximum(valid.sum(), 1)
    level, weight = baseline[0]
    kept = decay * weight
    new = kept + 1 - decay
    after = jnp.stack([(kept * level + (1 - decay) * mean) / new, new])[None]
    return jnp.where(valid.any(), after, baseline)
