"""Importance weights of responses that another sampler drew: truncated or masked.

  log w_t = log π_old(y_t) - log μ(y_t),   A_t ← c(w_t) A_t

π_old is the policy when the responses were drawn (its own, where the batch has none), as
the training kernel computes it; μ is what the sampler says that it drew from: a decoding
loop in a lower precision, another program, or an older policy. c truncates, min(w, high),
or masks: w where low ≤ w ≤ high, else 0. `level` is 'token', or 'sequence': every token of
a response then has the product of all its ratios, which is unbiased until c changes it.
'mean' has their geometric mean, which is biased, and does not grow with the length.

Source: truncation, Espeholt et al. 2018 (V-trace), https://arxiv.org/abs/1802.01561; masks
of tokens, Ling Team 2025 (IcePop), https://arxiv.org/abs/2510.18855
Differs from the papers: V-trace also corrects a critic's targets; here advantages alone are
weighted, so that a KL in the loss is not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "sampler_logps", "advantages")
FORMS = ("prompts",)
LEVELS = ("token", "sequence", "mean")
MODES = ("truncate", "mask")
RANGES = {"high": "[1, inf]", "low": "[0, 1]"}


def reweight(
    policy: Scores, batch: Batch, *, level: str = "token", mode: str = "truncate",
    high: Number = 2.0, low: Number = 0.0,
) -> tuple[Scores, Batch, Float[Array, " B"], Metrics]:  # fmt: skip
    """Advantages times the importance weights of their tokens; no gradient reaches them.

    Args:
      policy: logps [B, G, T], read where the batch has no old_logps.
      batch: advantages, mask, old_logps (or None) [B, G, T]; valid [B, G];
        extra['sampler_logps'] [B, G, T].
      level: 'token', 'sequence' or 'mean'.
      mode: 'truncate' or 'mask'.
      high: largest weight, at least 1.
      low: smallest weight that a mask lets through, in [0, 1]; truncation does not read it.

    Returns:
      The scores; the batch with other advantages; weights of 1 for all prompts; metrics
      'importance' (mean weight of a token) and 'importance_cut' (share of tokens whose
      ratio c changed).

    Raises:
      ValueError: the batch is not of a rollout, or has no sampler_logps.
    """
    extra = batch.extra or {}
    if batch.advantages is None or "sampler_logps" not in extra:
        raise ValueError(
            "reweight.importance needs advantages and sampler_logps, which rollouts bring: "
            "set config.rollout.reward and config.shaping"
        )
    keep = masked.scored(batch)
    old = ratios.behaviour(policy, batch)
    log_w = jnp.where(keep, old - extra["sampler_logps"], 0.0)
    if level != "token":
        total = log_w.sum(-1, keepdims=True)
        many = jnp.maximum(keep.sum(-1, keepdims=True), 1) if level == "mean" else 1
        log_w = jnp.broadcast_to(total / many, log_w.shape)
    ratio = jnp.exp(ratios.bounded(log_w))
    over = ratio > high
    if mode == "truncate":
        cut, weight = over, jnp.minimum(ratio, high)
    else:
        cut = over | (ratio < low)
        weight = jnp.where(cut, 0.0, ratio)
    weight = jax.lax.stop_gradient(jnp.where(keep, weight, 0.0))
    metrics = {
        "importance": masked.per_prompt(weight, keep),
        "importance_cut": masked.per_prompt(cut.astype(weight.dtype), keep),
    }
    weighted = batch._replace(advantages=batch.advantages * weight)
    return policy, weighted, jnp.ones(batch.mask.shape[0]), metrics
