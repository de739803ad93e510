"""Preference pairs: what a loss on (chosen, rejected) reads, and what it reports.

Slot 0 of a group is chosen, slot 1 rejected. Sequence numbers are sums over the scored
tokens, in nats: log π(y|x).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Scores

Sides = tuple[Float[Array, " B"], Float[Array, " B"]]  # (chosen, rejected)


def log_probs(policy: Scores, batch: Batch) -> Sides:
    """log π(y|x) of both sides.

    Raises:
      ValueError: the batch does not hold two responses to each prompt.
    """
    return sides(policy.logps.sum(-1), batch)


def ref_log_probs(batch: Batch) -> Sides:
    """log π_ref(y|x) of both sides; raises ValueError without `ref_logps` or a pair."""
    return sides(masked.reference(batch).sum(-1), batch)


def log_ratios(policy: Scores, batch: Batch) -> Sides:
    """log π(y|x) / π_ref(y|x) of both sides; raises ValueError as `ref_log_probs`."""
    return sides((policy.logps - masked.reference(batch)).sum(-1), batch)


def lengths(batch: Batch) -> Sides:
    """Scored tokens of both sides, at least 1: the end-of-turn token counts."""
    return sides(jnp.maximum(batch.mask.sum(-1), 1).astype(jnp.float32), batch)


def outcome(
    batch: Batch,
    value: Float[Array, " B"],
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    **more: Float[Array, " B"],
) -> tuple[Float[Array, " B"], Metrics]:
    """What every pair loss returns.

    Args:
      batch: valid [B, 2].
      value: the loss of each pair.
      chosen, rejected: what the loss compares, in its own units.
      **more: further metrics.

    Returns:
      `value`, 0 where either response is invalid, and metrics 'accuracy' (share of pairs
      ranked right, ties count half), 'margin' (chosen - rejected) and `more`.
    """
    margin = chosen - rejected
    metrics = {"accuracy": (jnp.sign(margin) + 1) / 2, "margin": margin, **more}
    return jnp.where(batch.valid.all(-1), value, 0.0), metrics


def sides(x: Float[Array, "B G"], batch: Batch) -> Sides:
    """Columns 0 and 1 of x; raises ValueError unless the batch holds pairs."""
    group = batch.tokens.shape[1]
    if group != 2:
        raise ValueError(
            f"a loss on pairs got {group} responses a prompt, expected chosen and "
            "rejected; for pairs from a file set config.data.kind='pairs'"
        )
    return x[:, 0], x[:, 1]
