"""Causal attention by tiles, with masks computed from per-token ids (such as segments).

Shape suffixes as in transformer.py: n rows, t tokens, s keys, h query heads, k kv heads,
g = h/k queries per kv head, e head size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from alignax.models import fallback
from alignax.models.contract import einsum, keep

LEAST = -1e30  # as good as -inf, without its arithmetic
FAR = np.iinfo(np.int32).max
TILES = {"cpu": 128}  # queries and keys of a tile of scores; 512 elsewhere
PACKED = {"cpu": 64}  # of rows with an `Attend.first`, where `with_tiles` skips many


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "first", "tiles"),
    meta_fields=("allowed",),
)
@dataclasses.dataclass(frozen=True)
class Attend:
    """A mask besides the causal one (no token sees a later position).

    Attributes:
      ids: int arrays [N, T], the ids of each token that `allowed` reads.
      allowed: (ids of queries, ids of keys) -> bool, elementwise over arrays that
        broadcast: a block of the mask is its value on the ids of that block. It must be
        a function of a module, since it is a part of the key of a compiled program.
      first: for each token the first column that it may see, in rows in which no token
        sees a later column; tiles of keys before it are skipped. None = column 0.
      tiles: from `with_tiles`, which all layers share: what a tile of queries sees.
    """

    ids: tuple[Int[Array, "N T"], ...]
    allowed: Callable[[tuple, tuple], Any]
    first: Int[Array, "N T"] | None = None
    tiles: tuple[Int[Array, " I"], Int[Array, "I J"]] | None = None


def same_segment(queries: tuple, keys: tuple):
    """Mask of several texts in one row: ids are (segment,)."""
    return queries[0] == keys[0]


def siblings(queries: tuple, keys: tuple):
    """Mask of several prompts in one row, each with its responses: ids (group, branch).

    Branch 0 holds the tokens that the responses to a prompt share. A response sees branch
    0 and its own branch, not that of another response.
    """
    (group, branch), (other, theirs) = queries, keys
    return (group == other) & ((theirs == 0) | (branch == theirs))


class Rule(NamedTuple):
    """The static settings of attention scores."""

    scale: float
    cap: float | None
    allowed: Callable[[tuple, tuple], Any] | None  # of an Attend


# Below, the query heads of one kv head are concatenated on the axis Q, T queries each:
#   q [N, K, Q, E], keys and values [N, K, S, E]
#   queries, keys: ([N, T or S] positions, ids of an Attend)
#   window: how far back a key may be


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _whole(rule: Rule, q, k, v, queries, keys, window):
    """softmax(q kᵀ) v, all keys at once.

    The backward pass recomputes the scores from their log-sum-exp: with p and dy it is
    ds = p (dy vᵀ - Σ dy y). The derivative of softmax itself would sum over S once more (on
    a CPU this form of the gradient was measured twice as fast).
    """
    return _whole_forward(rule, q, k, v, queries, keys, window)[0]


def _scores(rule, q, k, queries, keys, window):
    """Soft-capped scores; LEAST where the mask is False."""
    s = einsum("nkqe,nkse->nkqs", q, k) * rule.scale
    if rule.cap:
        s = rule.cap * jnp.tanh(s / rule.cap)
    seen = visible(rule.allowed, queries, keys, window)
    heads = s.reshape(*s.shape[:2], -1, *seen.shape[1:])
    return (heads + jnp.where(seen, 0.0, LEAST)[:, None, None]).reshape(s.shape)


def visible(allowed, queries, keys, window):
    """[N, T, S] bool, which keys a query sees; `allowed` of an Attend, None allows all."""
    (q_pos, q_ids), (k_pos, k_ids) = queries, keys
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (distance >= 0) & (distance < window)
    if allowed is not None:
        at = [x[:, :, None] for x in q_ids], [x[:, None, :] for x in k_ids]
        seen &= allowed(*map(tuple, at))
    return seen


def _whole_forward(rule, q, k, v, queries, keys, window):
    s = _scores(rule, q, k, queries, keys, window)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    y = einsum("nkqs,nkse->nkqe", p.astype(v.dtype), v) / total
    y, lse = keep((y.astype(v.dtype), top + jnp.log(total)))
    return y, (q, k, v, queries, keys, window, y, lse)


def _whole_backward(rule, residuals, g):
    q, k, v, queries, keys, window, y, lse = residuals
    g = g.astype(v.dtype)
    grads = _slopes(rule, q, k, v, queries, keys, window, lse, g, _along(g, y))
    dtypes = (q.dtype, k.dtype, v.dtype)
    return (*map(jax.lax.convert_element_type, grads, dtypes), *[None] * 3)


def _slopes(rule, q, k, v, queries, keys, window, lse, g, along):
    """Gradients of q, k and v, in float32, for a block of queries and a block of keys."""
    s = _scores(rule, q, k, queries, keys, window)
    p = jnp.exp(s - lse)
    slope = (einsum("nkqe,nkse->nkqs", g, v) - along) * p * rule.scale
    if rule.cap:  # tanh' = 1 - tanh²; p is 0 on masked keys
        slope = jnp.where(p > 0, slope * (1 - (s / rule.cap) ** 2), 0.0)
    slope = slope.astype(q.dtype)
    return (
        einsum("nkqs,nkse->nkqe", slope, k),
        _over_queries(q, slope),
        _over_queries(g, p.astype(g.dtype)),
    )


def _over_queries(narrow, wide):
    """[N, K, S, E], the sum over queries of [N, K, Q, E] times [N, K, Q, S].

    The narrow operand comes first and is transposed before the product. On a CPU the wide
    operand first was measured twice as slow, and a transpose inside the product ten times
    as slow for a few tokens.
    """
    turned = jax.lax.optimization_barrier(narrow.swapaxes(2, 3))
    return einsum("nkeq,nkqs->nkes", turned, wide).swapaxes(2, 3)


def _along(a, b):
    """Σ a b over the last axis, in float32."""
    product = a.astype(jnp.float32) * b.astype(jnp.float32)
    return product.sum(-1, keepdims=True)


_whole.defvjp(_whole_forward, _whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(rule: Rule, q, k, v, queries, keys, window, spans):
    """softmax(q kᵀ) v by tiles of queries, each over the tiles of keys that it may see.

    Args, beyond those above:
      q: stacked tiles, [I, N, K, Q, E]; k, v: [J, N, K, S, E]; queries and keys likewise.
      spans: which tiles of keys a tile of queries reads: int32 [I], [I] and [I, J], where
        in the row of the third it begins and ends.
    """
    return _tiled_forward(rule, q, k, v, queries, keys, window, spans)[0]


def _tiled_forward(rule, q, k, v, queries, keys, window, spans):
    def tile(x):
        q, queries, (first, end, order) = x

        def step(at, carry):
            j, (y, top, total) = order[at], carry
            k_j, v_j, keys_j = jax.tree.map(lambda x: x[j], (k, v, keys))
            s = _scores(rule, q, k_j, queries, keys_j, window)
            above = jnp.maximum(top, s.max(-1, keepdims=True))
            p, scale = jnp.exp(s - above), jnp.exp(top - above)
            y = y * scale + einsum("nkqs,nkse->nkqe", p.astype(v.dtype), v_j)
            return y, above, total * scale + p.sum(-1, keepdims=True)

        zeros = jnp.zeros(q.shape, jnp.float32)
        none = zeros[..., :1]
        y, top, total = jax.lax.fori_loop(first, end, step, (zeros, none + LEAST, none))
        return (y / total).astype(v.dtype), top + jnp.log(total)

    y, lse = keep(jax.lax.map(tile, (q, queries, spans)))
    return y, (q, k, v, queries, keys, window, spans, y, lse)


def _tiled_backward(rule, residuals, g):
    q, k, v, queries, keys, window, spans, y, lse = residuals
    g = g.astype(v.dtype)

    def tile(carry, x):
        q, queries, (first, end, order), y, lse, g = x
        along = _along(g, y)

        def step(at, carry):
            j, (dq, dk, dv) = order[at], carry
            k_j, v_j, keys_j = jax.tree.map(lambda x: x[j], (k, v, keys))
            more = _slopes(rule, q, k_j, v_j, queries, keys_j, window, lse, g, along)
            return dq + more[0], dk.at[j].add(more[1]), dv.at[j].add(more[2])

        first_dq = jnp.zeros(q.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(first, end, step, (first_dq, *carry))
        return (dk, dv), dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(tile, zeros, (q, queries, spans, y, lse, g))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), *[None] * 4


_tiled.defvjp(_tiled_forward, _tiled_backward)


def attention(q, k, v, q_pos, k_pos, attend, local, config, in_order=False):
    """Causal attention; by tiles for long T, so that [T, T] never exists.

    The largest score array is [N, H, tile, tile], or [N, H, T, S] where T is no longer
    than a tile; the backward pass recomputes it.

    Args:
      q: queries [N, T, H, E].
      k, v: keys and values [N, K, S, E].
      q_pos, k_pos: positions, [N or 1, T] and [N or 1, S].
      attend: an `Attend`, or None.
      local: whether config.window applies; it may be traced.
      config: a ModelConfig.
      in_order: positions are columns, so that no token sees a later column.

    Tiles of keys that are masked for a whole tile of queries are skipped where the order
    of the columns is known, with `in_order` or an `Attend.first`, and where `with_tiles`
    has found them.
    """
    c = config
    begins = None if attend is None else attend.first
    n, t, _, e = q.shape
    rule = Rule((c.query_scale or e) ** -0.5, c.attn_softcap, attend and attend.allowed)
    window = jnp.where(local, c.window or 0, FAR)
    ids = () if attend is None else attend.ids
    # Heads before tokens, so that both products are plain batched matrix products: on a
    # CPU this was measured twice as fast as leaving the order to einsum.
    q = q.reshape(n, t, c.num_kv_heads, -1, e).transpose(0, 2, 3, 1, 4)

    def merge(q):  # concatenates the query heads of a kv head
        return q.reshape(*q.shape[:-3], -1, e)

    size = _tile_size(t, c, packed=begins is not None)
    if t <= size:
        y = _whole(rule, merge(q), k, v, (q_pos, ids), (k_pos, ids), window)
        y = y.reshape(q.shape)
    else:
        split = functools.partial(_split, size)
        q_pos, k_pos = (jnp.broadcast_to(x, (n, x.shape[1])) for x in (q_pos, k_pos))
        tiles = tuple(split(x, 1) for x in ids)
        queries = split(q_pos, 1), tiles
        keys = split(k_pos, 1, FAR), tiles  # padding is later than all queries
        q_tiles = split(q, 3)
        many = len(q_tiles)
        first, last = jnp.zeros(many, jnp.int32), jnp.full(many, len(keys[0]) - 1)
        if in_order or begins is not None:
            last = jnp.arange(many)
        if begins is not None:
            first = split(begins, 1, FAR).min((1, 2)) // size
        elif in_order and attend is None:
            first = jnp.maximum(last * size - (window - 1), 0) // size
        order = jnp.broadcast_to(jnp.arange(len(keys[0])), (many, len(keys[0])))
        spans = first.astype(jnp.int32), last.astype(jnp.int32) + 1, order
        if attend is not None and attend.tiles is not None:
            spans = jnp.zeros(many, jnp.int32), *attend.tiles
        y = _tiled(
            rule, merge(q_tiles), split(k, 2), split(v, 2), queries, keys, window, spans
        )
        y = y.reshape(q_tiles.shape)
        y = jnp.moveaxis(y, 0, 3).reshape(*q.shape[:3], -1, e)[:, :, :, :t]
    return y.transpose(0, 3, 1, 2, 4).reshape(n, t, c.num_heads, e)


def _tile_size(t: int, config, *, packed: bool) -> int:
    """Queries and keys of a tile; t where there is one tile."""
    usual = PACKED if packed else TILES
    most = config.attn_tile or usual.get(fallback.platform(), 512)
    return -(-t // -(-t // most))  # tiles of one size, with little padding


def _split(size: int, x, axis: int, fill: int = 0):
    """Tiles of an axis, stacked on a new first one; the last is filled up."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, width, constant_values=fill)
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def with_tiles(attend: Attend, positions: Int[Array, "N T"], config) -> Attend:
    """An `Attend` that knows which tiles of keys each tile of queries sees.

    Of long rows with an `Attend.first` alone: what a response of a group sees, the shared
    tokens and its own, may be far apart. Evaluated once for all layers.

    Args:
      attend: the mask.
      positions: of the tokens.
      config: a ModelConfig.
    """
    t = positions.shape[1]
    size = _tile_size(t, config, packed=True)
    if t <= size or attend.first is None or config.attn_kernel != "xla":
        return attend
    ids = tuple(_split(size, x, 1) for x in attend.ids)
    places = _split(size, positions, 1), _split(size, positions, 1, FAR)

    def row(x):
        i, queries = x

        def seen(y):
            j, keys = y
            some = visible(attend.allowed, queries, keys, FAR).any()
            return some & (j <= i) | (j == i)

        return jax.lax.map(seen, (jnp.arange(len(ids[0])), (places[1], ids)))

    table = jax.lax.map(row, (jnp.arange(len(ids[0])), (places[0], ids)))
    order = jnp.argsort(~table, axis=1, stable=True).astype(jnp.int32)
    tiles = table.sum(1).astype(jnp.int32), order
    return dataclasses.replace(attend, tiles=tiles)
