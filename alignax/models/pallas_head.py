"""Log-probabilities of the output head as Pallas kernels for TPUs: opt-in.

Three kernels compute what `xla_head`, their oracle, computes in loops over tiles. A tile of
logits stays in the chip's on-chip memory (VMEM) and is never written to main memory:

  forward      lse(z) by an online log-sum-exp over tiles of vocabulary, and z_y
  states       dh = Σ_v dz_v w_v       outer grid axis tokens, inner vocabulary
  weights      dw = Σ_t h_t dz_t       outer grid axis vocabulary, inner tokens

with dz = g (1[v = y] - exp(z - lse)). Operands are multiplied in h's dtype, sums are
float32. Both gradients recompute the logits: five products of D x V per token, where
`xla_head` has four. No float32 array of [D, V] is needed beside the results, and one of
[K, D] only where targets share hidden states.

Scored positions come first; tiles without one are skipped, and their weights are not read.
In interpret mode the kernels run on any backend, slowly: that is how they are tested. A
tile of logits and its operands have to fit into VMEM: wider models, float32 states or older
chips need smaller tiles than TILES, and the compiler reports an error if they do not fit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

TILES = (256, 512)  # tokens and vocabulary of a logit tile
SHARE = 0.9  # of the chip's VMEM that a kernel may take
FLOOR = float(np.finfo(np.float32).min)


class Kernel(NamedTuple):
    """The static settings of the kernels."""

    vocab_axis: int = 1  # of the weight
    cap: float | None = None  # soft-cap of the logits
    tiles: tuple[int, int] = TILES
    axis: str = ""  # mesh axis that the vocabulary is split over, inside shard_map
    interpret: bool = False
    temperature: float = 1.0  # by which the capped logits are divided


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logps(
    kernel: Kernel, h: Float[Array, "K D"], weight: Float[Array, "_ _"],
    targets: Int[Array, " M"], scored: Bool[Array, " M"], source: Int[Array, " M"] | None,
) -> Float[Array, " M"]:  # fmt: skip
    """log p(targets) in nats where `scored`, else 0; differentiable in h and weight.

    Args:
      kernel: the static settings.
      h: hidden states, float32 or bfloat16.
      weight: [D, V], or [V, D] with vocab_axis=0; of any float dtype, cast to h's.
      targets: ids, counted from the first column of this shard of the vocabulary; an id
        of another shard is outside of 0..V-1.
      scored: True on the positions that are computed.
      source: for each target the row of h that predicts it; None: target i is predicted
        by row i, and K = M.
    """
    return _forward(kernel, h, weight, targets, scored, source)[0]


def _forward(kernel, h, weight, targets, scored, source):
    x, y, at, count = _gathered(kernel, h, targets, scored, source)
    (m, d), (bt, bv, nv) = x.shape, _sizes(kernel, x, weight)
    row, block, tokens = _specs(kernel, d, bt, bv)
    column = _like((m, 1), jnp.float32, x, weight, y)
    top, total, target = pl.pallas_call(
        functools.partial(_forward_kernel, kernel, weight.shape[kernel.vocab_axis]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(m // bt, nv), in_specs=[row, block, tokens],
            out_specs=[tokens] * 3,
        ),
        out_shape=[column] * 3, **_settings(kernel, ("parallel", "arbitrary")),
    )(count, x, weight, y)  # fmt: skip
    if kernel.axis:
        whole = jax.lax.pmax(top, kernel.axis)
        total = jax.lax.psum(total * jnp.exp(top - whole), kernel.axis)
        top, target = whole, jax.lax.psum(target, kernel.axis)
    log_total = jnp.log(total)
    found = ((target - top) - log_total)[:, 0]
    out = _zeros(targets.shape, jnp.float32, found, at).at[at].set(found, mode="drop")
    return out, (h, weight, targets, scored, source, top + log_total)


def _backward(kernel, residuals, g):
    h, weight, targets, scored, source, lse = residuals
    x, y, at, count = _gathered(kernel, h, targets, scored, source)
    (m, d), (bt, bv, nv) = x.shape, _sizes(kernel, x, weight)
    g = g.at[at].get(mode="fill", fill_value=0)[:, None]
    inputs = (count, x, weight, y, lse, g)
    row, block, tokens = _specs(kernel, d, bt, bv)
    v = weight.shape[kernel.vocab_axis]
    dx = pl.pallas_call(
        functools.partial(_states_kernel, kernel, v),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(m // bt, nv),
            in_specs=[row, block, tokens, tokens, tokens], out_specs=row,
            scratch_shapes=[pltpu.VMEM((bt, d), jnp.float32)],
        ),
        out_shape=_like(x.shape, h.dtype, *inputs),
        **_settings(kernel, ("parallel", "arbitrary")),
    )(*inputs)  # fmt: skip
    row, block, tokens = _specs(kernel, d, bt, bv, outer="vocabulary")
    dw = pl.pallas_call(
        functools.partial(_weights_kernel, kernel, v),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(nv, m // bt),
            in_specs=[row, block, tokens, tokens, tokens], out_specs=block,
            scratch_shapes=[pltpu.VMEM(block.block_shape, jnp.float32)],
        ),
        out_shape=_like(weight.shape, weight.dtype, *inputs),
        **_settings(kernel, ("parallel", "arbitrary")),
    )(*inputs)  # fmt: skip
    rows = at if source is None else source.at[at].get(mode="fill", fill_value=len(h))
    # several targets may be predicted by one state: their gradients add up
    dtype = h.dtype if source is None else jnp.float32
    dh = _zeros(h.shape, dtype, dx, rows).at[rows].add(dx.astype(dtype), mode="drop")
    return dh.astype(h.dtype), dw, None, None, None


logps.defvjp(_forward, _backward)


def _forward_kernel(kernel, v, count, x, w, y, top, total, target):
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        target[...] = jnp.zeros_like(target)

    @pl.when(i * x.shape[0] < count[0])
    def _():
        z, _, column = _logits(kernel, v, x, w, j)
        new = column < v
        best = jnp.maximum(top[...], jnp.where(new, z, FLOOR).max(-1, keepdims=True))
        e = jnp.where(new, jnp.exp(z - best), 0.0)
        total[...] = total[...] * jnp.exp(top[...] - best) + e.sum(-1, keepdims=True)
        top[...] = best
        hit = jnp.where((column == y[...]) & new, z, 0.0)
        target[...] += hit.sum(-1, keepdims=True)


def _states_kernel(kernel, v, count, x, w, y, lse, g, dx, acc):
    i, j, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(i * x.shape[0] < count[0])
    def _():
        dz, tile = _slope(kernel, v, x, w, y, lse, g, j)
        acc[...] += _dot(dz, tile, (1, kernel.vocab_axis))

    @pl.when(j == last)
    def _():
        dx[...] = acc[...].astype(dx.dtype)


def _weights_kernel(kernel, v, count, x, w, y, lse, g, dw, acc):
    j, i, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(i == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when(i * x.shape[0] < count[0])
    def _():
        dz, _ = _slope(kernel, v, x, w, y, lse, g, j)
        left, right = (dz, x[...]) if kernel.vocab_axis == 0 else (x[...], dz)
        acc[...] += _dot(left, right, (0, 0))

    @pl.when(i == last)
    def _():
        dw[...] = acc[...].astype(dw.dtype)


def _dot(a, b, contract):
    # float32 operands are multiplied as such; the default would round them on a TPU
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _logits(kernel, v, x, w, j):
    """Logits of a tile, its weights, and the columns' ids; those from v on are padding."""
    tile = w[...].astype(x.dtype)  # cast here: outside it would copy all weights
    bv = tile.shape[kernel.vocab_axis]
    if v % bv:  # memory behind the last column may hold anything, even nan
        ids = j * bv + jax.lax.broadcasted_iota(
            jnp.int32, tile.shape, kernel.vocab_axis
        )
        tile = jnp.where(ids < v, tile, jnp.zeros_like(tile))
    z = _dot(x[...], tile, (1, 1 - kernel.vocab_axis))
    if kernel.cap is not None:
        z = kernel.cap * jnp.tanh(z / kernel.cap)
    if kernel.temperature != 1:
        z = z / kernel.temperature
    return z, tile, j * bv + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)


def _slope(kernel, v, x, w, y, lse, g, j):
    """The gradient of a tile of logits, in the operands' dtype, and the tile's weights."""
    z, tile, column = _logits(kernel, v, x, w, j)
    dz = g[...] * ((column == y[...]).astype(jnp.float32) - jnp.exp(z - lse[...]))
    if kernel.temperature != 1:
        z, dz = z * kernel.temperature, dz / kernel.temperature
    if kernel.cap is not None:
        dz = dz * (1 - (z / kernel.cap) ** 2)
    return jnp.where(column < v, dz, 0.0).astype(x.dtype), tile


def _gathered(kernel, h, targets, scored, source):
    """(states [M', D], ids [M', 1], positions [M'], number scored), scored ones first.

    M' is a multiple of the token tile; padding has zero states and is not written back.
    """
    m = scored.shape[0]
    order = jnp.argsort(~scored, stable=True)
    order = jnp.where(jnp.arange(m) < scored.sum(), order, m)
    at = jnp.concatenate([order, jnp.full(-m % _tokens(kernel, m), m, order.dtype)])
    rows = at if source is None else source.at[at].get(mode="fill", fill_value=len(h))
    x = h.at[rows].get(mode="fill", fill_value=0)
    y = targets.at[at].get(mode="fill", fill_value=-1)[:, None]
    return x, y, at, scored.sum()[None].astype(jnp.int32)


def _tokens(kernel, m):
    """Tokens per tile: at most m, rounded up to 16, the rows of a bfloat16 register."""
    return min(kernel.tiles[0], -(-m // 16) * 16)


def _sizes(kernel, x, w):
    """(tokens per tile, vocabulary entries per tile, number of vocabulary tiles)."""
    v = w.shape[kernel.vocab_axis]
    bv = min(kernel.tiles[1], -(-v // 128) * 128)
    return _tokens(kernel, x.shape[0]), bv, -(-v // bv)


def _specs(kernel, d, bt, bv, *, outer="tokens"):
    """Block specs of the states, of the weights, and of one number per token.

    Tiles behind the last scored token map to a block that is already there: nothing more
    is fetched for them.
    """

    def places(a, b, count):
        i, j = (a, b) if outer == "tokens" else (b, a)
        last = jnp.maximum(count[0] - 1, 0) // bt
        if outer == "tokens":
            return i, jnp.where(i <= last, j, 0)
        return jnp.minimum(i, last), j

    def row(a, b, count):
        return places(a, b, count)[0], 0

    def block(a, b, count):
        j = places(a, b, count)[1]
        return (j, 0) if kernel.vocab_axis == 0 else (0, j)

    shape = (bv, d) if kernel.vocab_axis == 0 else (d, bv)
    return (
        pl.BlockSpec((bt, d), row), pl.BlockSpec(shape, block), pl.BlockSpec((bt, 1), row)
    )  # fmt: skip


def _settings(kernel, semantics) -> dict[str, Any]:
    if kernel.interpret:
        return {"interpret": True}
    params = pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=int(SHARE * pltpu.get_tpu_info().vmem_capacity_bytes),
    )
    return {"compiler_params": params}


def _manual(*arrays):
    """The mesh axes over which any of some arrays varies, inside shard_map."""
    return jax.typeof(
        sum(x.ravel()[0].astype(jnp.float32) for x in arrays)
    ).manual_axis_type


def _like(shape, dtype, *arrays):
    """Shape of a result that varies over the mesh axes of all its operands."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=_manual(*arrays))


def _zeros(shape, dtype, *arrays):
    zeros, axes = jnp.zeros(shape, dtype), tuple(_manual(*arrays).varying)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros
