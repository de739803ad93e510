"""Preference pairs: inputs, shared terms and metrics of losses on (chosen, rejected).

Slot 0 of a group is chosen, slot 1 rejected. Log-probabilities of a response are sums over
its scored tokens, in nats: log π(y|x).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

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
    return sides(masked.log_ratios(policy, batch), batch)


def lengths(batch: Batch) -> Sides:
    """Number of scored tokens of both sides, at least 1; the end-of-turn token counts."""
    return sides(jnp.maximum(batch.mask.sum(-1), 1).astype(jnp.float32), batch)


def per_token(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], batch: Batch
) -> Sides:
    """Both sides divided by their numbers of scored tokens."""
    tokens = lengths(batch)
    return chosen / tokens[0], rejected / tokens[1]


def chosen_nll(policy: Scores, batch: Batch) -> Float[Array, " B"]:
    """-log π(y⁺|x) / |y⁺|, nats per scored token; raises ValueError as `log_probs`."""
    return -sides(masked.token_mean(policy.logps, batch), batch)[0]


def logistic(margin: Float[Array, " B"], label_smoothing: Number) -> Float[Array, " B"]:
    """-(1-ε) log σ(margin) - ε log σ(-margin): cross-entropy with smoothed labels, nats.

    Args:
      margin: logit of the chosen response's being the better one.
      label_smoothing: ε, the probability that a label is flipped.
    """
    right, flipped = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * flipped


def calibration_error(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], beta: Number
) -> Float[Array, " B"]:
    """(chosen - 1/(2β))² + (rejected + 1/(2β))²: distances of log-ratios from ±1/(2β)."""
    target = 1 / (2 * beta)
    return (chosen - target) ** 2 + (rejected + target) ** 2


def quantile_gap(
    x: Float[Array, " B"], other: Float[Array, " B"], valid: Bool[Array, " B"]
) -> Float[Array, " B"]:
    """x minus the element of `other` that has the same rank within the batch.

    Args:
      x: is ranked among its valid elements.
      other: is sorted, by its valid elements.
      valid: elements that count; those of x that do not are returned unchanged.
    """
    # Invalid elements rank last in both, so that they are paired with each other alone.
    rank = jnp.argsort(jnp.argsort(jnp.where(valid, x, jnp.inf)))
    partner = jnp.sort(jnp.where(valid, other, jnp.inf))[rank]
    return x - jnp.where(valid, partner, 0.0)


def outcome(
    batch: Batch,
    value: Float[Array, " B"],
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    **more: Float[Array, " B"],
) -> tuple[Float[Array, " B"], Metrics]:
    """Values and metrics of a loss on pairs.

    Args:
      batch: valid [B, 2].
      value: the loss of each pair.
      chosen, rejected: the two numbers that the loss compares, in its own units.
      **more: further metrics.

    Returns:
      `value`, 0 where either response is invalid, and metrics 'accuracy' (share of pairs
      ranked right, ties count half), 'margin' (chosen - rejected) and `more`.
    """
    margin = chosen - rejected
    metrics = {"accuracy": masked.accuracy(margin), "margin": margin, **more}
    return jnp.where(batch.valid.all(-1), value, 0.0), metrics


def implicit_outcome(
    batch: Batch,
    value: Float[Array, " B"],
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    beta: Number,
    **more: Float[Array, " B"],
) -> tuple[Float[Array, " B"], Metrics]:
    """`outcome` of a loss on implicit rewards, β times log-ratios.

    Args:
      batch: valid [B, 2].
      value: the loss of each pair.
      chosen, rejected: log-ratios, nats.
      beta: reward per nat.
      **more: further metrics.

    Returns:
      As `outcome`, of implicit rewards; metrics 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    return outcome(
        batch, value, beta * chosen, beta * rejected,
        log_ratio_chosen=chosen, log_ratio_rejected=rejected, **more,
    )  # fmt: skip


def sides(x: Float[Array, "B G"], batch: Batch) -> Sides:
    """Columns 0 and 1 of x; raises ValueError unless the batch holds pairs."""
    group = batch.tokens.shape[1]
    if group != 2:
        raise ValueError(
            f"a loss on pairs got {group} responses per prompt, expected chosen and "
            "rejected; for pairs from a file set config.data.kind='pairs'"
        )
    return x[:, 0], x[:, 1]
