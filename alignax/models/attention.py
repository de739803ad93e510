"""Causal attention by tiles of queries, with masks that are functions of tokens' ids.

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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from alignax.models.contract import einsum

ATTENDED = "attended"  # what the backward pass of a tile keeps of it, for checkpoints


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids",),
    meta_fields=("allowed", "reach"),
)
@dataclasses.dataclass(frozen=True)
class Attend:
    """Which tokens see each other, besides that none sees a later position.

    Attributes:
      ids: int arrays [N, T], what `allowed` reads of a token.
      allowed: (ids of queries, ids of keys) -> bool, elementwise over arrays that
        broadcast: any block of the mask is its value on the ids of that block. A
        function of a module, since programs are told apart by it.
      reach: nobody sees a token more than so many columns before its own, so that tiles
        of keys further back are skipped; None = no such promise.
    """

    ids: tuple[Int[Array, "N T"], ...]
    allowed: Callable[[tuple, tuple], Any]
    reach: int | None = None


def same_segment(queries: tuple, keys: tuple):
    """Several texts in a row: ids are (segment,)."""
    return queries[0] == keys[0]


def siblings(queries: tuple, keys: tuple):
    """Several prompts in a row, each with several responses: ids are (group, branch).

    Branch 0 is what the responses to a prompt share; nobody sees a sibling's own branch.
    """
    (group, branch), (other, theirs) = queries, keys
    return (group == other) & ((theirs == 0) | (branch == theirs))


class Rule(NamedTuple):
    """What is static about attention scores."""

    scale: float
    cap: float | None
    allowed: Callable[[tuple, tuple], Any] | None  # of an Attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q, k, v, queries, keys, window):
    """softmax(q kᵀ) v for [N, K, Q, E] queries of [N, K, S, E] keys.

    The backward pass forms the scores again, from their log-sum-exp: with p and dy it is
    ds = p (dy vᵀ - Σ dy y), where a derivative of softmax would sum over S once more (on a
    CPU attention's gradient was measured twice as fast).

    Args:
      rule: see there.
      q: several query heads of a kv head behind each other, T queries each.
      k, v: keys and values.
      queries: ([N, T] positions, ids of an Attend).
      keys: the same of the S keys.
      window: how far back a key may be.
    """
    return _attend_forward(rule, q, k, v, queries, keys, window)[0]


def _scores(rule, q, k, queries, keys, window):
    """(capped scores, where they count); the others are as good as -inf."""
    s = einsum("nkqe,nkse->nkqs", q, k) * rule.scale
    if rule.cap:
        s = rule.cap * jnp.tanh(s / rule.cap)
    (q_pos, q_ids), (k_pos, k_ids) = queries, keys
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    allowed = (distance >= 0) & (distance < window)
    if rule.allowed is not None:
        at = [x[:, :, None] for x in q_ids], [x[:, None, :] for x in k_ids]
        allowed &= rule.allowed(*map(tuple, at))
    heads = s.reshape(*s.shape[:2], -1, *allowed.shape[1:])
    return jnp.where(allowed[:, None, None], heads, -1e30).reshape(s.shape)


def _attend_forward(rule, q, k, v, queries, keys, window):
    s = _scores(rule, q, k, queries, keys, window)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    y = einsum("nkqs,nkse->nkqe", p.astype(v.dtype), v) / total
    y = checkpoint_name(y.astype(v.dtype), ATTENDED)
    lse = checkpoint_name(top + jnp.log(total), ATTENDED)
    return y, (q, k, v, queries, keys, window, y, lse)


def _attend_backward(rule, residuals, g):
    q, k, v, queries, keys, window, y, lse = residuals
    s = _scores(rule, q, k, queries, keys, window)
    p = jnp.exp(s - lse)
    g = g.astype(v.dtype)
    slope = (einsum("nkqe,nkse->nkqs", g, v) - _along(g, y)) * p * rule.scale
    if rule.cap:  # tanh' = 1 - tanh²; where nothing counts p is 0
        slope = jnp.where(p > 0, slope * (1 - (s / rule.cap) ** 2), 0.0)
    slope = slope.astype(q.dtype)
    return (
        einsum("nkqs,nkse->nkqe", slope, k).astype(q.dtype),
        _over_queries(q, slope).astype(k.dtype),
        _over_queries(g, p.astype(g.dtype)).astype(v.dtype),
        *[None] * 3,
    )


def _over_queries(narrow, wide):
    """[N, K, S, E], the sum over queries of [N, K, Q, E] times [N, K, Q, S].

    The narrow operand first and turned before, not by the product: on a CPU the wide one
    first was measured twice as slow, a product that turns ten times for a few tokens.
    """
    turned = jax.lax.optimization_barrier(narrow.swapaxes(2, 3))
    return einsum("nkeq,nkqs->nkes", turned, wide).swapaxes(2, 3)


def _along(a, b):
    """Σ a b over the last axis, in float32."""
    product = a.astype(jnp.float32) * b.astype(jnp.float32)
    return product.sum(-1, keepdims=True)


_attend.defvjp(_attend_forward, _attend_backward)


def attention(q, k, v, q_pos, k_pos, attend, local, config):
    """Causal attention by tiles of queries, so that [T, T] never exists for long T.

    The largest score array is [N, H, config.attn_tile, S], or [N, H, tile, tile + reach]
    where `attend` has a reach; the backward pass recomputes it tile by tile.
    """
    c = config
    n, t, _, e = q.shape
    q = q.reshape(n, t, c.num_kv_heads, -1, e)
    # Heads before tokens, so that both products are plain batched matrix products: on a
    # CPU this was measured twice as fast as leaving the order to einsum.
    k, v = jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)
    scale = (c.query_scale or e) ** -0.5
    window = jnp.where(local, c.window or 0, np.iinfo(np.int32).max)
    ids = () if attend is None else attend.ids

    rule = Rule(scale, c.attn_softcap, attend and attend.allowed)

    def tile(queries, keys):
        q_ntkge, q_pos, q_ids = queries
        k, v, k_pos, k_ids = keys
        q = q_ntkge.transpose(
            0, 2, 3, 1, 4
        )  # the queries of a kv head behind each other
        merged = q.reshape(*q.shape[:2], -1, e)
        y = _attend(rule, merged, k, v, (q_pos, q_ids), (k_pos, k_ids), window)
        return y.reshape(q.shape).transpose(0, 3, 1, 2, 4)

    step = -(-t // -(-t // c.attn_tile))  # tiles of one size, with little to fill up
    keys = (k, v, k_pos, ids)
    if t <= step:
        y = tile((q, q_pos, ids), keys)
    else:  # a scan, not a Python loop: XLA would keep every unrolled tile alive at once
        pad = -t % step
        reach = t if attend is None or attend.reach is None else attend.reach
        near = reach + step < t  # then a tile of queries takes only keys in its reach

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(n, -1, step, *x.shape[2:]), 1, 0)

        def widen(x, axis, fill=0):
            width = [(0, 0)] * x.ndim
            width[axis] = (reach, pad)
            return jnp.pad(x, width, constant_values=fill)

        if near:  # a position beyond all others: no query sees what fills up
            last = widen(jnp.broadcast_to(k_pos, (n, t)), 1, np.iinfo(np.int32).max)
            ids_wide = tuple(widen(x, 1) for x in ids)
            keys = widen(k, 2), widen(v, 2), last, ids_wide

        def one(x):
            start, queries = x
            if not near:
                return tile(queries, keys)
            cut = functools.partial(
                jax.lax.dynamic_slice_in_dim,
                start_index=start,
                slice_size=reach + step,
            )
            k, v, k_pos, k_ids = keys
            some = cut(k, axis=2), cut(v, axis=2), cut(k_pos, axis=1)
            return tile(queries, (*some, tuple(cut(x, axis=1) for x in k_ids)))

        q_pos = jnp.broadcast_to(q_pos, (n, t))
        starts = jnp.arange(0, t + pad, step)
        queries = jax.tree.map(split, (q, q_pos, ids))
        kept = jax.checkpoint_policies.save_only_these_names(ATTENDED)
        tiles = jax.lax.map(jax.checkpoint(one, policy=kept), (starts, queries))
        y = jnp.moveaxis(tiles, 0, 1).reshape(n, t + pad, *q.shape[2:])[:, :t]
    return y.reshape(n, t, c.num_heads, e)
