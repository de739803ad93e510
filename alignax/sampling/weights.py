"""The weights of an LM in the form that decoding reads on a CPU.

The layers are apart: a step does not slice them out of stacked arrays. The float32 kernels
change too. XLA's CPU client copies the right operand of a product into another layout at every
call, which takes longer than a product with a few rows. So the weights become the left operand,
with their output axes first, and the activations the right one; q, k and v become one kernel,
and so do gate and up.

Measured on two cores (AVX2, jaxlib 0.10.2): 30 products of [576, 3072] with 8 rows take 21 ms
instead of 56, with 4 rows 21 instead of 46, with one row 13 to 14 either way, and with 64 rows
or more about the same either way. A step of a model of SmolLM2-135M's shape with 8 rows takes 61
to 67 ms instead of 126 to 128, with one row 45 to 47 either way.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from alignax.batch import LM, Params
from alignax.models import fallback, transformer

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
Copies = dict[Any, tuple[list[Any], Any]]  # key: (arrays it was made of, layers)

_copies: contextvars.ContextVar[Copies | None] = contextvars.ContextVar(
    "copies", default=None
)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it `for_decoding` copies each LM once, however often it is called with it.

    For searches, evaluations and rollouts, which sample one model many times. The copies go
    at the end of the outermost one.
    """
    if _copies.get() is not None:
        yield
        return
    token = _copies.set({})
    try:
        yield
    finally:
        _copies.reset(token)


def for_decoding(lms: Any) -> Any:
    """A tree with its LMs in the form of this module, where that is faster.

    That is on a CPU, for an LM on one device that computes in float32. Other LMs, and all LMs
    while tracing, are returned as they are; sampling takes their layers apart in its
    programs. Tables and heads are not copied. The result is for sampling alone: it cannot be
    saved or sharded.

    Args:
      lms: LMs with layers that are stacked, apart, or in this form already.
    """
    copies = _copies.get()
    copies = {} if copies is None else copies

    def one(lm):
        if not isinstance(lm, LM) or not _is_faster(lm):
            return lm
        blocks = lm.params["blocks"]
        leaves, tree = jax.tree.flatten(blocks)
        key = tree, *map(id, leaves)
        if key not in copies:
            copies[key] = leaves, _left_operands(lm)
        return LM(lm.config, {**lm.params, "blocks": copies[key][1]})

    return jax.tree.map(one, lms, is_leaf=lambda x: isinstance(x, LM))


def _is_faster(lm: LM) -> bool:
    """Whether some kernel would change, of arrays that nobody writes to."""
    blocks = lm.params["blocks"]
    if fallback.platform() != "cpu" or lm.config.dtype != "float32":
        return False
    layers = blocks if isinstance(blocks, tuple) else (blocks,)
    if not any(_changes(x) for layer in layers for x in _projections(layer)):
        return False
    return all(
        isinstance(x, jax.Array)
        and not isinstance(x, jax.core.Tracer)
        and not x.is_deleted()  # the program will say so
        and len(x.sharding.device_set) == 1
        for x in jax.tree.leaves(blocks)
    )


def _projections(layer: Params) -> list[Params]:
    return [node for part in ("attn", "mlp") for node in layer[part].values()]


def _changes(node: Params) -> bool:
    return "kernel" in node and node["kernel"].dtype == jnp.float32


@jax.jit
def _left_operands(lm: LM) -> tuple[Params, ...]:
    """The layers of an LM, with float32 kernels as the left operands of their products."""

    def turn(name, node):
        if not _changes(node):
            return node
        kernel = node["kernel"]
        inner = 2 if name == "o" else 1  # the first axes are those of the sum
        axes = *range(inner, kernel.ndim), *range(inner)
        rest = {k: v for k, v in node.items() if k != "kernel"}
        return {**rest, "left": kernel.transpose(axes)}

    def one(layer):
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

    blocks: Any = transformer.unstack(lm).params["blocks"]
    return tuple(map(one, blocks))
