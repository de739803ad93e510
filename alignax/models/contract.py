"""Matrix products: float32 accumulation, results and cotangents in the operands' dtype."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"  # the name of what `remat='elementwise'` does not compute again


def keep(x):
    """Marks the arrays of a tree: from them the rest of a layer follows without a product."""
    return checkpoint_name(x, KEPT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(equation: str, a, b, dtype):
    """einsum(a, b), accumulated in float32 and returned in `dtype`; so is its gradient.

    Cotangents are rounded to the operands' dtype before they are multiplied, as the
    activations are. JAX's own gradient in bfloat16 would multiply float32 by bfloat16: on a
    CPU with bfloat16 units that was measured 4 times slower.
    """
    return einsum(equation, a, b.astype(a.dtype)).astype(dtype)


def einsum(equation, a, b):
    """jnp.einsum that contracts axes in the order in which the operands have them.

    jnp.einsum contracts "nthe,hed->ntd" over (e, h), for which XLA copies the weight into
    another layout at every call: on a CPU that took half of a decoding step.
    """
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    inner = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    axes = [
        (tuple(map(x.index, inner)), tuple(map(x.index, batch))) for x in (left, right)
    ]
    y = jax.lax.dot_general(
        a, b, tuple(zip(*axes, strict=True)), preferred_element_type=jnp.float32
    )
    rest = [c for c in left + right if c not in inner + batch]
    have = "".join(batch + rest)
    return y if have == out else y.transpose([have.index(c) for c in out])


def _contract_forward(equation, a, b, dtype):
    return contract(equation, a, b, dtype), (a, b)


def _contract_backward(equation, dtype, operands, g):
    a, b = operands
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    # one rounding for both products; a float32 parameter gets its gradient in float32
    g = g.astype(a.dtype)
    da = contract(f"{out},{right}->{left}", g, b, a.dtype)
    if not jnp.issubdtype(b.dtype, jnp.floating):  # int8 weights have no gradient
        return da, None
    return da, contract(f"{left},{out}->{right}", a, g, b.dtype)


contract.defvjp(_contract_forward, _contract_backward)
