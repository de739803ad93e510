"""LD: tokens beyond the length of the shorter response have a smaller weight.

  log π(y) = Σ_{t ≤ l} log π(y_t) + α Σ_{t > l} log π(y_t),   l = min(|y⁺|, |y⁻|)

Source: Liu et al. 2024 (LD-DPO), https://arxiv.org/abs/2409.06411
Differs from the paper: it applies to any loss, and to the log-probabilities of every frozen
LM; exact KLs are not changed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Number, Scores

NEEDS = ("logps",)
FORMS = ("pairs", "groups", "unscored")
RANGES = {"alpha": "[0, 1]"}


def reweight(
    policy: Scores, batch: Batch, *, alpha: Number = 0.5
) -> tuple[Scores, Batch, Float[Array, " B"]]:
    """Scales the log-probabilities of the longer response's tail.

    Args:
      policy: logps [B, G, T].
      batch: mask; ref_logps, where there are any.
      alpha: weight of the tail, in [0, 1]; 1 changes nothing.

    Returns:
      The scores and the batch with scaled log-probabilities, and weights of 1.
    """
    position = jnp.cumsum(batch.mask, -1)  # of a scored token in its response, from 1
    lengths = jnp.where(batch.valid, batch.mask.sum(-1), batch.mask.shape[-1])
    scale = jnp.where(position > lengths.min(-1)[:, None, None], alpha, 1.0)
    if batch.ref_logps is not None:
        batch = batch._replace(ref_logps=batch.ref_logps * scale)
    extra = batch.extra or {}
    scaled = {k: v * scale for k, v in extra.items() if k.endswith("_logps")}
    if scaled:
        batch = batch._replace(extra={**extra, **scaled})
    policy = policy._replace(logps=policy.logps * scale)
    return policy, batch, jnp.ones(batch.mask.shape[0])
