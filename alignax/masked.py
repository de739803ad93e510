"""Means that know what is padding: weights, moments and picks under a mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignax.batch import Batch

MODES = ("token", "sequence", "constant")


def prompts(batch: Batch) -> Bool[Array, " B"]:
    """True on prompts that have a valid response: what the outer mean runs over."""
    return batch.valid.any(-1)


def token_weights(
    batch: Batch, mode: str, *, length: int | None = None
) -> Float[Array, "B G T"]:
    """Weights w such that mean over prompts of sum_gt w * x is the named reduction.

    'token':    every scored token counts the same in the whole optimiser step.
    'sequence': every response counts the same, its tokens share its weight.
    'constant': every token counts 1 / length, whatever its response's length.

    Under gradient accumulation `train.py` computes the weights once for the whole step
    and hands them down in `extra['token_weights']`; they are used as they stand.

    Args:
      batch: mask [B, G, T] and valid [B, G] are read.
      mode: one of MODES.
      length: the constant's length in tokens, default T.

    Returns:
      Weights, 0 on padding, prompts and invalid responses.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown reduction {mode!r}; known: {', '.join(MODES)}")
    if batch.extra and "token_weights" in batch.extra:
        return batch.extra["token_weights"]
    scored = (batch.mask & batch.valid[..., None]).astype(jnp.float32)
    num_prompts = prompts(batch).sum().astype(jnp.float32)
    num_responses = jnp.maximum(batch.valid.sum(), 1).astype(jnp.float32)
    if mode == "token":
        return scored * (num_prompts / jnp.maximum(scored.sum(), 1.0))
    share = num_prompts / num_responses
    if mode == "sequence":
        return scored * share / jnp.maximum(scored.sum(-1, keepdims=True), 1.0)
    return scored * share / (length or batch.mask.shape[-1])


def reference(batch: Batch) -> Float[Array, "B G T"]:
    """`ref_logps`, nats; raises ValueError when nothing has filled them."""
    if batch.ref_logps is None:
        raise ValueError(
            "Batch.ref_logps is None: name a frozen reference (config.lms.ref='init') "
            "or fill the field with inputs.annotate.annotate(batch, {'ref': lm})"
        )
    return batch.ref_logps


def token_rewards(batch: Batch) -> Float[Array, "B G T"]:
    """What each token earned: what an earlier shaping left, else the raw feedback.

    Feedback is earned by a response's last scored token. Invalid responses earn 0.
    """
    if batch.advantages is None:
        return earned(batch, batch.feedback)
    return jnp.where(batch.mask & batch.valid[..., None], batch.advantages, 0.0)


def earned(batch: Batch, x: Float[Array, "B G"]) -> Float[Array, "B G T"]:
    """One number a response on its last scored token; 0 elsewhere."""
    keep = batch.mask & batch.valid[..., None]
    left = jnp.cumsum(keep[..., ::-1], -1)[..., ::-1]  # scored tokens from here on
    return jnp.where(keep & (left == 1), x[..., None], 0.0)


def spread(batch: Batch, x: Float[Array, "B G"]) -> Float[Array, "B G T"]:
    """One number a response on each of its scored tokens; 0 elsewhere."""
    return jnp.where(batch.mask & batch.valid[..., None], x[..., None], 0.0)


def per_prompt(
    x: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, " B"]:
    """Mean of x over the True positions of each prompt's responses; 0 where none is."""
    total = jnp.where(mask, x, 0.0).sum((1, 2))
    return total / jnp.maximum(mask.sum((1, 2)), 1)


def mean(x: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Mean of x where mask; 0 where nothing is."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def var(
    x: Float[Array, "*S"], mask: Bool[Array, "*S"], *, ddof: int = 0
) -> Float[Array, ""]:
    """Variance of x where mask, with `ddof` degrees of freedom taken off."""
    square = jnp.where(mask, (x - mean(x, mask)) ** 2, 0.0).sum()
    return square / jnp.maximum(mask.sum() - ddof, 1)


def whiten(
    x: Float[Array, "*S"],
    mask: Bool[Array, "*S"],
    *,
    shift: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "*S"]:
    """Scales x to unit (Bessel-corrected) variance where mask; shift=False keeps the mean."""
    centre = mean(x, mask)
    white = (x - centre) * jax.lax.rsqrt(var(x, mask, ddof=1) + eps)
    return jnp.where(mask, white if shift else white + centre, 0.0)


def last(x: Float[Array, "*S T"], mask: Bool[Array, "*S T"]) -> Float[Array, "*S"]:
    """x at the last True of mask along T: the end of a response, whatever pads it."""
    index = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], -1)
    return jnp.take_along_axis(x, index[..., None], -1)[..., 0]
