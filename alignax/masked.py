"""Sums, means and moments under a mask: over tokens, responses and prompts.

Also the quantities of one response that most losses read: its mean log-probability per
token and its log-ratio to the reference.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignax.batch import Batch, Metrics, Scores

MODES = ("token", "sequence", "constant")


def prompts(batch: Batch) -> Bool[Array, " B"]:
    """True on prompts that have a valid response: the mean over prompts counts these."""
    return batch.valid.any(-1)


def scored(batch: Batch) -> Bool[Array, "B G T"]:
    """True on the scored tokens of valid responses."""
    return batch.mask & batch.valid[..., None]


def token_weights(
    batch: Batch, mode: str, *, length: int | None = None
) -> Float[Array, "B G T"]:
    """Weights w such that the mean over prompts of sum_gt w * x is the named reduction.

    'token':    every scored token of the optimiser step has the same weight.
    'sequence': every response has the same weight, shared equally by its tokens.
    'constant': every token has weight 1 / length, whatever the length of its response.

    `alignax/training/gradient.py` computes the weights once for the whole step, which a
    micro-batch does not know, with the length of the config, which a bucket does not know,
    and passes them in `extra['token_weights']`; these are returned unchanged.

    Args:
      batch: mask [B, G, T] and valid [B, G] are read.
      mode: one of MODES.
      length: tokens that mode 'constant' divides by; None and 0 are T.

    Returns:
      Weights, 0 on padding, prompts and invalid responses.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown reduction {mode!r}; known: {', '.join(MODES)}")
    if batch.extra and "token_weights" in batch.extra:
        return batch.extra["token_weights"]
    keep = scored(batch).astype(jnp.float32)
    num_prompts = prompts(batch).sum().astype(jnp.float32)
    num_responses = jnp.maximum(batch.valid.sum(), 1).astype(jnp.float32)
    if mode == "token":
        return keep * (num_prompts / jnp.maximum(keep.sum(), 1.0))
    share = num_prompts / num_responses
    if mode == "sequence":
        return keep * share / jnp.maximum(keep.sum(-1, keepdims=True), 1.0)
    return keep * share / (length or batch.mask.shape[-1])


def reduce_tokens(
    x: Float[Array, "B G T"], batch: Batch, mode: str
) -> Float[Array, " B"]:
    """Sum of `token_weights` times x over each prompt's tokens.

    The mean over prompts of the result is the reduction named by `mode`. Raises ValueError
    as `token_weights`.
    """
    return (token_weights(batch, mode) * x).sum((1, 2))


def reference(batch: Batch) -> Float[Array, "B G T"]:
    """`ref_logps`, nats; raises ValueError when nothing has filled them."""
    if batch.ref_logps is None:
        raise ValueError(
            "Batch.ref_logps is None: name a frozen reference (config.lms.ref='init') "
            "or fill the field with inputs.annotate.annotate(batch, {'ref': lm})"
        )
    return batch.ref_logps


def log_ratios(policy: Scores, batch: Batch) -> Float[Array, "B G"]:
    """log π(y|x) / π_ref(y|x) of each response, nats; raises ValueError as `reference`."""
    return (policy.logps - reference(batch)).sum(-1)


def token_mean(x: Float[Array, "B G T"], batch: Batch) -> Float[Array, "B G"]:
    """Sum of x over T divided by the number of scored tokens; 0 without scored tokens.

    Args:
      x: 0 on tokens that are not scored, as all fields of Scores are.
      batch: mask [B, G, T]; the end-of-turn token is scored, so it counts.
    """
    return x.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)


def token_rewards(batch: Batch) -> Float[Array, "B G T"]:
    """Reward of each token: the output of an earlier shaping, else the raw feedback.

    The last scored token of a response has the feedback as its reward. The tokens of
    invalid responses have reward 0.
    """
    if batch.advantages is None:
        return earned(batch, batch.feedback)
    return jnp.where(scored(batch), batch.advantages, 0.0)


def earned(batch: Batch, x: Float[Array, "B G"]) -> Float[Array, "B G T"]:
    """x of each response on its last scored token; 0 elsewhere."""
    keep = scored(batch)
    left = jnp.cumsum(keep[..., ::-1], -1)[..., ::-1]  # scored tokens from here on
    return jnp.where(keep & (left == 1), x[..., None], 0.0)


def spread(batch: Batch, x: Float[Array, "B G"]) -> Float[Array, "B G T"]:
    """x of each response on each of its scored tokens; 0 elsewhere."""
    return jnp.where(scored(batch), x[..., None], 0.0)


def per_prompt(
    x: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, " B"]:
    """Mean of x over the True tokens of each prompt's responses; 0 where there are none."""
    total = jnp.where(mask, x, 0.0).sum((1, 2))
    return total / jnp.maximum(mask.sum((1, 2)), 1)


def response_mean(
    x: Float[Array, "B G"], where: Bool[Array, "B G"]
) -> Float[Array, " B"]:
    """Mean of x over the True responses of each prompt; 0 where there are none."""
    return per_prompt(x[..., None], where[..., None])


def accuracy(margin: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """1 where the margin is above 0, 0 where it is below, 1/2 at 0."""
    return (jnp.sign(margin) + 1) / 2


def forget_retain(
    batch: Batch,
    forget_value: Float[Array, "B G"],
    retain_value: Float[Array, "B G"],
    *,
    forget: Mapping[str, Float[Array, "B G"]],
    retain: Mapping[str, Float[Array, "B G"]],
) -> tuple[Float[Array, " B"], Metrics]:
    """Values and metrics of an unlearning loss, which treats two kinds of responses.

    Args:
      batch: feedback [B, G], <= 0.5 on responses to forget and > 0.5 on responses to
        retain; valid [B, G].
      forget_value, retain_value: the loss of a response of each kind.
      forget, retain: further metrics of each kind.

    Returns:
      [B] means of the loss over a prompt's valid responses, and the metrics: means over a
      prompt's responses of that kind, 0 without any.
    """
    forgotten = batch.valid & (batch.feedback <= 0.5)
    retained = batch.valid & ~forgotten
    value = jnp.where(forgotten, forget_value, retain_value)
    return response_mean(value, batch.valid), {
        **{name: response_mean(x, forgotten) for name, x in forget.items()},
        **{name: response_mean(x, retained) for name, x in retain.items()},
    }


def mean(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Mean of x where mask; 0 where mask is False everywhere."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def var(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], *, ddof: int = 0
) -> Float[Array, ""]:
    """Variance of x where mask, with `ddof` degrees of freedom subtracted."""
    square = jnp.where(mask, (x - mean(x, mask)) ** 2, 0.0).sum()
    return square / jnp.maximum(mask.sum() - ddof, 1)


def whiten(
    x: Float[Array, "*S"],
    mask: Bool[Array, "*S"],
    *,
    shift: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "*S"]:
    """x with mean 0 and Bessel-corrected variance 1 where mask, and 0 elsewhere.

    With shift=False only the variance changes: the mean stays.
    """
    centre = mean(x, mask)
    white = (x - centre) * jax.lax.rsqrt(var(x, mask, ddof=1) + eps)
    return jnp.where(mask, white if shift else white + centre, 0.0)


def last(x: Float[Array, "*S T"], mask: Bool[Array, "*S T"]) -> Float[Array, "*S"]:
    """x at the last True of mask along T: at the last scored token of a response."""
    index = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], -1)
    return jnp.take_along_axis(x, index[..., None], -1)[..., 0]


def reverse_scan(
    step: Callable, carry: Any, columns: tuple[Array, ...]
) -> Float[Array, "B G T"]:
    """`jax.lax.scan` over T, from the last token to the first.

    Args:
      step: (carry, one [B, G] slice of each column) -> (carry, [B, G] output).
      carry: the state behind the last token.
      columns: arrays of [B, G, T].
    """
    first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), columns)
    _, out = jax.lax.scan(step, carry, first, reverse=True)
    return jnp.moveaxis(out, 0, -1)
