"""The weights of an LM in the form that decoding reads, made once for many calls.

The layers are apart: a step does not slice them out of stacked arrays. On CPUs the float32
kernels change too. XLA copies the right operand of a product into another layout at every
call, which takes longer than a product with a few rows. So the weights become the left
operand, with their output axes first, and the activations the right one; q, k and v become
one kernel, and so do gate and up. Measured on two cores (AVX2, jaxlib 0.10.2): 30 products of
[576, 3072] with 8 rows take 21 ms instead of 56, with 4 rows 21 instead of 46, with one row 13
to 14 either way; a step of a model of SmolLM2-135M's shape with 8 rows takes 61 to 67 ms
instead of 126 to 128, with one row 45 to 47 either way.
"""

import dataclasses
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from alignax.batch import LM, Params
from alignax.models import fallback, transformer

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def for_decoding(lms: Any) -> Any:
    """A tree with its LMs in the form that decoding reads; traced or not.

    Args:
      lms: LMs with layers that are stacked, apart, or in this form already.
    """

    def one(lm):
        if not isinstance(lm, LM):
            return lm
        lm = transformer.unstack(lm)
        if fallback.platform() != "cpu":
            return lm
        layers = tuple(map(_left_operands, lm.params["blocks"]))
        return LM(lm.config, {**lm.params, "blocks": layers})

    return jax.tree.map(one, lms, is_leaf=lambda x: isinstance(x, LM))


def _left_operands(layer: Params) -> Params:
    """A layer whose float32 kernels are the left operands of their products."""

    def turn(name, node):
        if not _changes(node):
            return node
        kernel = node["kernel"]
        inner = 2 if name == "o" else 1  # the first axes are those of the sum
        axes = *range(inner, kernel.ndim), *range(inner)
        rest = {k: v for k, v in node.items() if k != "kernel"}
        return {**rest, "left": kernel.transpose(axes)}

    out = dict(layer)
    for part in ("attn", "mlp"):
        nodes = {name: turn(name, node) for name, node in layer[part].items()}
        for whole, names in FUSED.items():
            parts = [nodes.get(name, {}) for name in names]
            if all({"left"} <= {*node} <= {"left", "bias"} for node in parts):
                nodes = {k: v for k, v in nodes.items() if k not in names}
                nodes[whole] = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        out[part] = nodes
    return out


@dataclasses.dataclass
class _Known:
    """An LM that was made ready before."""

    leaves: list[weakref.ref]
    params: Params | None = None  # from its second use on


_known: dict[tuple[int, ...], _Known] = {}


def ready(lms: Any) -> Any:
    """`for_decoding` outside of a program: an LM that is used again is made ready once.

    The copy of the weights is kept from the second use of an LM on, for as long as all its
    arrays live: searches and evaluations call with one model many times, and a rollout once
    with each policy. Elsewhere than on CPUs, and while tracing, nothing is copied here.

    Args:
      lms: a tree with LMs.
    """

    def one(lm):
        if not isinstance(lm, LM) or fallback.platform() != "cpu":
            return lm
        leaves = jax.tree.leaves(lm.params)
        if any(isinstance(x, jax.core.Tracer) for x in leaves) or _is_ready(lm):
            return lm
        return LM(lm.config, _ready(lm, leaves))

    return jax.tree.map(one, lms, is_leaf=lambda x: isinstance(x, LM))


def _is_ready(lm: LM) -> bool:
    """Whether the layers are apart and no kernel would change."""
    blocks: Any = lm.params["blocks"]
    return isinstance(blocks, tuple) and not any(
        _changes(node)
        for layer in blocks
        for part in ("attn", "mlp")
        for node in layer[part].values()
    )


def _changes(node: Params) -> bool:
    return "kernel" in node and node["kernel"].dtype == jnp.float32


def _ready(lm: LM, leaves: list[Any]) -> Params:
    key = lm.config.num_layers, *map(id, leaves)
    deleted = any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves)
    known = _known.get(key)
    if deleted or known is None:
        refs = [weakref.ref(x, lambda _: _known.pop(key, None)) for x in leaves]
        _known[key] = _Known(refs)
        return _make_ready(lm).params
    if known.params is None:
        known.params = _make_ready(lm).params
    return known.params


@jax.jit
def _make_ready(lm: LM) -> LM:
    return for_decoding(lm)
