"""KL control in the reward with a coefficient that follows a target.

  r_t ← r_t - β (log π_old(y_t) - log π_ref(y_t))
  β ← β (1 + n/h · clip(KL / KL_target - 1, -0.2, 0.2))    after each rollout of n responses

KL is the rollout's mean over its responses of Σ_t log π_old(y_t)/π_ref(y_t), in nats.

Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2. They give the
gain per step of 1,024 responses, .1; `horizon` is that of the field's implementations.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Number
from alignax.shaping import kl

STAGE = "penalty"
BASELINE = "running"
NEEDS = ("old_logps", "ref_logps")
RANGES = {"beta": "(0, inf)", "target": "(0, inf)", "horizon": "(0, inf)"}
MOST = 0.2  # largest relative error that a rollout counts as
LEAST = 0.1  # least factor of a rollout: from 0, β would never come back


def RUNNING(hyper: dict[str, Number]) -> dict[str, Number]:
    """β, which begins at the hyper-parameter."""
    return {"beta": hyper["beta"]}


def shape(
    batch: Batch, baseline: Float[Array, "1 1"], *, beta: Number = 0.05,
    target: Number = 6.0, horizon: Number = 10_000.0,
) -> Float[Array, "B G T"]:  # fmt: skip
    """Rewards of tokens, less the penalty.

    Args:
      batch: feedback, or rewards of tokens from an earlier shaping; old_logps, ref_logps
        [B, G, T].
      baseline: β now, reward per nat.
      beta: β of the first rollout.
      target: KL_target, nats per response.
      horizon: h, responses.

    Returns:
      [B, G, T] rewards of tokens, 0 on tokens that are not scored.

    Raises:
      ValueError: no old_logps or no ref_logps.
    """
    del beta, target, horizon
    return kl.shape(batch, None, beta=baseline[0, 0])


def update(
    batch: Batch, baseline: Float[Array, "1 1"], *, beta: Number = 0.05,
    target: Number = 6.0, horizon: Number = 10_000.0,
) -> Float[Array, "1 1"]:  # fmt: skip
    """β of the next rollout, from what `shape` was given; unchanged without a response."""
    del beta
    many = batch.valid.sum()
    found = kl.log_ratio(batch).sum() / jnp.maximum(many, 1)
    error = jnp.clip(found / target - 1, -MOST, MOST)
    gain = jnp.maximum(1 + many / horizon * error, LEAST)
    return jnp.where(many > 0, baseline * gain, baseline)
