"""Frozen weights in int8, with a float32 scale for every output channel.

  s = max |w| / 127,    q = round(w / s) in -127..127,    y = (x q) s

The maximum is over the axes that a product contracts, so that the scale can be applied after
it: y is exactly x times the matrix q s. The error of a weight is at most s / 2. The embedding
has a scale for every row, which as a head is an output channel.

A quantised tree is that of `transformer.init` with int8 matrices and further leaves:
`scale` beside a `kernel` [L, *in, *out], of shape [L, *out]; `embed_scale` and `head_scale` [V]
beside `embed` [V, D] and `head` [D, V]. Norms, biases and a value head stay as they are. Nothing
is differentiated with respect to such a tree.

Decoding applies the scale of the head after the product, in float32. The kernel of sequence
log-probabilities reads the head as q s, rounded to the dtype of the computation: in bfloat16
the two differ by that rounding.

Measured on SmolLM2-135M-Instruct and 16 pairs of HH-RLHF, cut to 256 tokens (1187 tokens of
32 responses, computed in float32): 135.4 MB instead of 269.0 in bfloat16, .503 of it. The
log-probability of a token changes by .070 nats on average (median .044; with parameters in
bfloat16 .009 and .006), its mean over a response by .028, and the log-probability of the chosen
response minus that of the rejected one by .67 nats. No layer and no projection stands out (8 of
the pairs: the embedding alone .033, `down` .035, `v` .030, each other projection .013 to .022;
layer 0 alone .008). On these 8 pairs a scale for every 32 weights instead of every channel gave
.043 instead of .073, at more memory: with 8 bits for a weight this model stays far from the .009
of bfloat16. Where such a difference matters, take `frozen_dtype = "bfloat16"`.

Source: symmetric quantisation by output channel, Jacob et al. 2018,
https://arxiv.org/abs/1712.05877 and Dettmers et al. 2022 (LLM.int8(), whose activations are
quantised too; here they are not), https://arxiv.org/abs/2208.07339
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from alignax.batch import Params

LARGEST = 127  # symmetric: -128 is not used
# What a product contracts, from the end of a kernel [L, *in, *out] or [*in, *out]
CONTRACTED = {
    "q": (-3,), "k": (-3,), "v": (-3,), "o": (-3, -2),
    "gate": (-2,), "up": (-2,), "down": (-2,),
}  # fmt: skip
TABLES = {"embed": (-1,), "head": (-2,)}  # likewise, outside of the layers: V D and D V


def quantize(params: Params) -> Params:
    """A tree of parameters with its matrices in int8; what is int8 already stays.

    Args:
      params: of `transformer.init`, float32 or bfloat16, layers stacked or a tuple; without
        adapters.

    Returns:
      A new tree. A channel of zeros has the scale 0. One with a number that is not finite
      has such a scale, so that results are not finite either.
    """

    def projection(name, node):
        if node["kernel"].dtype == jnp.int8:
            return node
        kernel, scale = quantized(node["kernel"], CONTRACTED[name])
        return {**node, "kernel": kernel, "scale": scale}

    out = _with_projections(params, projection)
    for name, axes in TABLES.items():
        if name in out and out[name].dtype != jnp.int8:
            out[name], out[f"{name}_scale"] = quantized(out[name], axes)
    return out


def dequantize(params: Params, dtype: Any = None) -> Params:
    """The tree q s that a quantised one stands for; another tree as it is.

    Args:
      params: from `quantize`.
      dtype: of the matrices; None is that of the final norm.
    """
    if not is_quantized(params):
        return params
    dtype = params["norm"]["scale"].dtype if dtype is None else dtype

    def projection(name, node):
        rest = {k: v for k, v in node.items() if k != "scale"}
        return {**rest, "kernel": kernel(name, node).astype(dtype)}

    out = _with_projections(params, projection)
    for name in TABLES:
        if out.pop(f"{name}_scale", None) is not None:
            out[name] = table(params, name).astype(dtype)
    return out


def is_quantized(params: Params) -> bool:
    """Whether a tree is from `quantize`."""
    return "embed_scale" in params or "head_scale" in params


def quantized(
    w: Float[Array, "*shape"], axes: Sequence[int]
) -> tuple[Int8[Array, "*shape"], Float[Array, "*channels"]]:
    """(q, s) of a matrix, of which a product contracts some axes; s lacks these."""
    wide = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axes, keepdims=True) / LARGEST
    q = jnp.round(wide / jnp.where(scale == 0, 1.0, scale))
    q = jnp.clip(q, -LARGEST, LARGEST).astype(jnp.int8)
    return q, jnp.squeeze(scale, axes)


def kernel(name: str, node: Params) -> Array:
    """The kernel of a projection ('q', ..., 'down') as it is, or q s in float32."""
    if "scale" not in node:
        return node["kernel"]
    scale = jnp.expand_dims(node["scale"], CONTRACTED[name])
    return node["kernel"].astype(jnp.float32) * scale


def table(params: Params, name: str) -> Array:
    """The embedding [V, D] or the head [D, V] as it is, or q s in float32."""
    if f"{name}_scale" not in params:
        return params[name]
    scale = jnp.expand_dims(params[f"{name}_scale"], TABLES[name])
    return params[name].astype(jnp.float32) * scale


def _with_projections(
    params: Params, change: Callable[[str, Params], Params]
) -> Params:
    """A copy of a tree with other nodes of its projections."""

    def layer(tree):
        return {
            part: {
                name: change(name, node) if "kernel" in node else node
                for name, node in own.items()
            }
            if part in ("attn", "mlp")
            else own
            for part, own in tree.items()
        }

    blocks: Any = params["blocks"]
    many = isinstance(blocks, tuple)
    return {**params, "blocks": tuple(map(layer, blocks)) if many else layer(blocks)}
