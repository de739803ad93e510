"""Lists of responses: what a loss on groups of two or more reads, and what it reports.

Feedback orders the responses of a prompt, higher is better. Arrays [b, i, j] are over
pairs of them; a tie is no order, and an invalid response is in none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignax.batch import Batch, Metrics, Scores


def check(batch: Batch, what: str, hint: str = "") -> None:
    """Raises ValueError if the batch holds a single response to each prompt.

    Args:
      batch: [B, G, T].
      what: how the message begins: 'rrhf ranks' (responses).
      hint: how it ends.
    """
    if batch.tokens.shape[1] < 2:
        more = f", {hint}" if hint else ""
        raise ValueError(
            f"{what} responses, but the batch holds one a prompt: use data with two or "
            f"more (from a file config.data.kind='groups', or 'pairs'){more}"
        )


def above(batch: Batch) -> Bool[Array, "B G G"]:
    """True at [b, i, j] where response i has the higher feedback and both are valid."""
    higher = batch.feedback[:, :, None] > batch.feedback[:, None, :]
    return higher & batch.valid[:, :, None] & batch.valid[:, None, :]


def best(batch: Batch) -> Bool[Array, "B G"]:
    """True on the valid responses that no other is above: several where they tie."""
    return batch.valid & ~above(batch).any(1)


def gaps(x: Float[Array, "B G"]) -> Float[Array, "B G G"]:
    """x_i - x_j at [b, i, j]."""
    return x[:, :, None] - x[:, None, :]


def mean_log_probs(policy: Scores, batch: Batch) -> Float[Array, "B G"]:
    """1/|y| Σ_t log π(y_t), nats per scored token: the end-of-turn token counts."""
    return policy.logps.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)


def first(x: Float[Array, "B G"], where: Bool[Array, "B G"]) -> Float[Array, " B"]:
    """x of the first response where `where`; 0 for a prompt without one."""
    index = jnp.argmax(where, -1)[:, None]
    return jnp.take_along_axis(jnp.where(where, x, 0.0), index, -1)[:, 0]


def log1p_sum_exp(
    where: Bool[Array, "B G G"],
    *terms: Float[Array, "B G G"],
    axis: int | tuple[int, ...] = -1,
) -> Float[Array, "B ..."]:
    """log(1 + Σ exp(term)) over the pairs where `where`, of one term or several.

    Args:
      where: the pairs that count.
      *terms: finite there, however large.
      axis: what is summed over: the second of the pair, or (1, 2) for all pairs.
    """
    term = jnp.concatenate([jnp.where(where, t, -jnp.inf) for t in terms], -1)
    # around the largest exponent, so that nothing overflows
    top = jax.lax.stop_gradient(jnp.maximum(term.max(axis, keepdims=True), 0.0))
    spread = jnp.exp(term - top).sum(axis)
    top = top.squeeze(axis)
    return top + jnp.log(jnp.exp(-top) + spread)


def outcome(
    batch: Batch,
    value: Float[Array, " B"],
    pairs: Bool[Array, "B G G"],
    gap: Float[Array, "B G G"],
    **more: Float[Array, " B"],
) -> tuple[Float[Array, " B"], Metrics]:
    """What every list loss returns.

    Args:
      batch: valid [B, G].
      value: the loss of each prompt.
      pairs: those that the loss compares, the better response first.
      gap: by how much the better one is ahead, in units of what is compared.
      **more: further metrics.

    Returns:
      `value`, 0 without a valid response, and metrics 'accuracy' (share of the pairs that
      are ranked right, ties count half; 0.5 where there are none), 'margin' (mean gap of
      a pair) and `more`.
    """
    ahead = jnp.where(pairs, gap, 0.0)
    compared = jnp.maximum(pairs.sum((1, 2)), 1)
    return jnp.where(batch.valid.any(-1), value, 0.0), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
        **more,
    }
