"""Steering vectors: directions estimated from hidden states, and added to them.

  v_l   first principal component of the differences h_l(x⁺) - h_l(x⁻), unit norm, with
        the sign that most pairs have;  h_l of the last token, after layer l
  h_l ← h_l + r v_l     at every position, through the `edit` of `transformer.hidden`

Zou et al. 2023, https://arxiv.org/abs/2310.01405; on its side
effects, Wolf et al. 2024, https://arxiv.org/abs/2401.16332. The component is not centred:
both signs of every difference are used, so that their mean is 0.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignax import logprob
from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling import generation_settings

TILE = 16  # positions whose logits are in memory at once


@jax.jit
def states(
    lm: LM, tokens: Int[Array, "N T"], lengths: Int[Array, " N"]
) -> Float[Array, "N L D"]:
    """The residual stream after each layer, at the last token of each row."""
    recorded = []
    row = jnp.arange(tokens.shape[0])

    def record(x, layer):
        del layer
        recorded.append(x[row, lengths - 1].astype(jnp.float32))
        return x

    transformer.hidden(transformer.unstack(lm), tokens, edit=record)
    return jnp.stack(recorded, 1)


def reading_vectors(
    positive: Float[np.ndarray, "N L D"], negative: Float[np.ndarray, "M L D"]
) -> Float[np.ndarray, "L D"]:
    """A unit vector per layer along which pairs differ most, towards the positive.

    Args:
      positive: states of texts that have the attribute.
      negative: states of their counterparts, as many.

    Raises:
      ValueError: other shapes, or pairs that do not differ.
    """
    positive, negative = (np.asarray(x, np.float64) for x in (positive, negative))
    if positive.shape != negative.shape or positive.ndim != 3 or not len(positive):
        raise ValueError(
            f"states have shapes {positive.shape} and {negative.shape}, expected [N, L, D]"
        )
    apart = np.moveaxis(positive - negative, 1, 0)  # [L, N, D]
    if not apart.any((1, 2)).all():
        raise ValueError("the pairs do not differ: there is no direction")
    vectors = np.linalg.svd(apart, full_matrices=False)[2][:, 0]  # [L, D]
    agree = np.einsum("lnd,ld->ln", apart, vectors) > 0
    sign = np.where(agree.mean(1) >= 0.5, 1.0, -1.0)
    return (sign[:, None] * vectors).astype(np.float32)


def fit(
    lm: LM, positive: Sequence[Sequence[int]], negative: Sequence[Sequence[int]],
    batch_size: int = 32,
) -> Float[np.ndarray, "L D"]:  # fmt: skip
    """`reading_vectors` of texts: `numpy.save` them for `decoders.steering`.

    Args:
      lm: the model of the states.
      positive: ids of texts that have the attribute, each up to its last token.
      negative: ids of their counterparts.
      batch_size: texts per call.
    """

    def read(rows):
        parts = []
        for i in range(0, len(rows), batch_size):
            tokens, lengths = generation_settings.ragged(rows[i : i + batch_size])
            parts.append(states(lm, jnp.asarray(tokens), jnp.asarray(lengths)))
        return np.concatenate(parts)

    return reading_vectors(read(positive), read(negative))


def random_vectors(layers: int, width: int, seed: int = 0) -> Float[np.ndarray, "L D"]:
    """Random unit vectors: the control of any effect."""
    vectors = np.random.default_rng(seed).normal(size=(layers, width))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(
        np.float32
    )


def load(
    vectors: Any, lm: LM, *, layers: Sequence[int] = (), seed: int = 0
) -> Float[Array, "L D"]:
    """Steering vectors of an LM, 0 at layers that are not steered.

    Args:
      vectors: a path of an array as `numpy.save` writes it, the array, or 'random'.
      lm: the model that is steered.
      layers: which are steered, negative ones from the end; () is all.
      seed: of random vectors.

    Raises:
      ValueError: another shape, or a layer out of range.
      OSError: no such file.
    """
    count, width = lm.config.num_layers, lm.config.width
    if isinstance(vectors, str) and vectors == "random":
        vectors = random_vectors(count, width, seed)
    elif isinstance(vectors, str | pathlib.Path):
        vectors = np.load(vectors)
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape != (count, width):
        raise ValueError(
            f"steering vectors have shape {vectors.shape}, expected [L={count}, D={width}]"
        )
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layers has {layer}, expected -{count}..{count - 1}")
    on = np.zeros((count, 1), np.float32)
    on[list(layers) if layers else slice(None)] = 1
    return jnp.asarray(vectors * on)


def edit(vectors: Float[Array, "L D"], strength: Any) -> Callable[..., Array]:
    """For `transformer.hidden`: adds strength x vectors[layer] after each layer."""

    def add(x, layer):
        return x + (strength * jnp.asarray(vectors)[layer]).astype(x.dtype)

    return add


@jax.jit
def logps(
    lm: LM,
    vectors: Float[Array, "L D"],
    strength: Float[Array, ""] | float,
    tokens: Int[Array, "N T"],
    at: Int[Array, "N R"],
    mask: Array,
) -> Float[Array, " N"]:
    """log p of responses under the steered LM, nats.

    Args:
      lm: the model.
      vectors: from `load`.
      strength: r.
      tokens: prompts and responses, right-padded.
      at: positions of the tokens of each response, padded; R a multiple of TILE.
      mask: bool [N, R], False is padding.
    """
    n, r = at.shape
    row = jnp.arange(n)[:, None]
    h = transformer.hidden(lm, tokens, edit=edit(vectors, strength))[0]

    def tile(xs):
        h, token = xs
        return jnp.take_along_axis(logprob.rows(lm, h), token[..., None], -1)[..., 0]

    def tiles(x):
        return jnp.moveaxis(x.reshape(n, r // TILE, TILE, *x.shape[2:]), 1, 0)

    parts = (tiles(h[row, at - 1]), tiles(tokens[row, at]))
    token_logps = jnp.moveaxis(jax.lax.map(tile, parts), 0, 1).reshape(n, r)
    return jnp.where(mask, token_logps, 0.0).sum(-1)
