"""PINE: attention that does not depend on the order in which documents are given.

  [prefix P | documents D_1 .. D_k | suffix S], n_0 and m_j tokens, e = n_0 + Σ m_j

  a query of D_i   sees P, its own document causally, and every other document whole
  a query of S     sees P, every document, and S causally
  importance       I_j = Σ over the query's own document of mean_{u in D_j} a_tu,
                   a = softmax(q·k / √d) without rotary, over the tokens of documents that
                   are not the query's own; of S a query has its own I_j
  position         the more important a document is, the nearer to the query it stands:
                   token u of D_j at e - shift_j - m_j + u, where shift_j is the length of
                   those in front; the query's own document is the nearest
  query            at e - m_i + t in D_i, at e + t in S

Each head orders the documents for itself and, in the suffix, so does each token. With one
document this is the ordinary model. Wang et al. 2024, https://arxiv.org/abs/2407.01100

Rotary attention depends on distances alone. So a key is rotated once, by its place within
its segment, and a query once per segment, by its distance from the segment's start.

Differs from the paper: a tie goes by the content of the documents, not by their order.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignax.batch import LM
from alignax.models import rope, transformer
from alignax.models.rope import rotary
from alignax.models.transformer import (
    MLP,
    ModelConfig,
    Norm,
    Project,
    after,
    before,
    heads,
)

QUERIES = 64  # read at a time: bounds the memory of a prompt


class Layout(NamedTuple):
    """The segment and the place of every token of one row."""

    segment: Int[Array, " T"]  # 0 prefix, 1 .. K documents, K + 1 suffix and padding
    place: Int[Array, " T"]  # of a token in its segment, from 0
    sizes: Int[Array, " K"]  # tokens of each document; 0 where a row has fewer than K
    ties: Int[Array, " K"]  # order of documents that are equally important


class Cache(NamedTuple):
    """Keys and values of a row; the keys are not rotated."""

    k: tuple[Float[Array, "T k e"], ...]  # one per layer
    v: tuple[Float[Array, "T k e"], ...]


def lay(
    prefix: Sequence[int], documents: Sequence[Sequence[int]], suffix: Sequence[int],
    length: int | None = None, count: int | None = None,
) -> tuple[Int[np.ndarray, " T"], Layout]:  # fmt: skip
    """Ids of a row, right-padded to `length`, and its layout.

    Args:
      prefix: ids in front of the documents, BOS included.
      documents: ids of each.
      suffix: ids after them, up to where the response starts.
      length: T; None is as long as the row is.
      count: K, so that rows with fewer documents have the same shapes; None is theirs.

    Raises:
      ValueError: no document, an empty one, no suffix, or a row longer than `length`.
    """
    if not documents or not all(map(len, documents)) or not len(suffix):
        sizes = [len(d) for d in documents]
        raise ValueError(
            f"documents have {sizes} tokens and the suffix {len(suffix)}; expected at "
            "least one document and one token in each"
        )
    none: list[list[int]] = [[]] * ((count or len(documents)) - len(documents))
    documents = [*documents, *none]
    parts = [*map(list, (prefix, *documents, suffix))]
    ids = [i for part in parts for i in part]
    length = length or len(ids)
    if len(ids) > length:
        raise ValueError(f"the row has {len(ids)} tokens, but length is {length}")
    parts[-1] += [0] * (length - len(ids))
    hashes = [zlib.crc32(np.asarray(d, np.int64).tobytes()) for d in documents]
    arrays = (
        np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)]),
        np.concatenate([np.arange(len(p)) for p in parts]),
        np.array([len(d) for d in documents]),
        np.argsort(np.argsort(hashes, kind="stable")),
    )
    layout = Layout(*(jnp.asarray(x, jnp.int32) for x in arrays))
    return np.array([i for part in parts for i in part], np.int32), layout


class _Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_nd, layout: Layout, kv, at):
        c = self.config
        d, e = c.width, c.head_dim
        q, *new = heads(c, "nd,dhe->nhe", x_nd, self.has_variable("params", "qkv"))
        q = q.astype(jnp.float32)
        k, v = kv = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), at, 0)
            for old, x in zip(kv, new, strict=True)
        )
        y = _attend(q, k, v, layout, at, c).astype(x_nd.dtype)
        shape, bias = (c.num_heads, e, d), (d,) if c.o_bias else None
        y = Project("nhe,hed->nd", shape, c.num_heads * e, bias, name="o")(y)
        return y, kv


class _Block(nn.Module):
    """`transformer.Block` with the other attention: the parameters are the same."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_nd, layout: Layout, kv, at):
        c = self.config
        y, kv = _Attention(c, name="attn")(before(c, "attn", x_nd), layout, kv, at)
        x_nd = x_nd + after(c, "attn", y)
        y = MLP(c, name="mlp")(before(c, "mlp", x_nd)[None])[0]
        return x_nd + after(c, "mlp", y), kv


def _attend(q_nhe, k_tke, v_tke, layout: Layout, at, c: ModelConfig):
    """[N, H, E]: attention of tokens at .. at + N - 1; each query orders the documents."""
    segment, place, sizes, _ = layout
    count, many = sizes.shape[0], c.num_heads // c.num_kv_heads
    scale = (c.query_scale or c.head_dim) ** -0.5
    k_tke, v_tke = (x.astype(jnp.float32) for x in (k_tke, v_tke))
    turned_tke = _rotate(k_tke, place[:, None], c)
    k_the, v_the, keys_the = (
        jnp.repeat(x, many, 1) for x in (k_tke, v_tke, turned_tke)
    )
    start = (segment == 0).sum()
    end = start + sizes.sum()
    shifts = _shifts(q_nhe, k_the, layout, at, scale)  # [N, H, K]

    def one(args):
        q_he, shift_hk, mine, inner = args
        own = sizes[jnp.clip(mine - 1, 0, count - 1)]
        inside = (mine > 0) & (mine <= count)
        position = jnp.where(mine == 0, inner, end + inner - jnp.where(inside, own, 0))
        # where each segment begins as this query sees it, [H, K + 2]
        begins = jnp.pad(end - shift_hk - sizes, ((0, 0), (1, 1)))
        begins = begins.at[:, -1].set(end)
        turned = _rotate(q_he[:, None], position - begins, c)  # [H, K + 2, E]
        s = jnp.einsum("hje,the->hjt", turned, keys_the, precision="highest")
        s = jnp.take_along_axis(s, segment[None, None], 1)[:, 0] * scale
        if c.attn_softcap:
            s = c.attn_softcap * jnp.tanh(s / c.attn_softcap)
        seen = begins[:, segment] + place <= position
        p = jax.nn.softmax(jnp.where(seen, s, -1e30), -1)
        return jnp.einsum("ht,the->he", p, v_the, precision="highest")

    mine, inner = (
        jax.lax.dynamic_slice_in_dim(x, at, len(q_nhe)) for x in (segment, place)
    )
    return jax.lax.map(one, (q_nhe, shifts, mine, inner), batch_size=QUERIES)


def _shifts(q_nhe, k_the, layout: Layout, at, scale):
    """Tokens of documents that each query places before each document, [N, H, K].

    Queries of one document share their importances: N must contain all of that document.
    """
    segment, _, sizes, ties = layout
    count = sizes.shape[0]
    mine = jax.lax.dynamic_slice_in_dim(segment, at, len(q_nhe))
    among = jnp.arange(1, count + 1)
    mine_nk, document_tk = (x[:, None] == among for x in (mine, segment))

    def opinion(args):
        q_he, own = args
        s = jnp.einsum("he,the->ht", q_he, k_the, precision="highest") * scale
        seen = document_tk.any(1) & (segment != own)
        a = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s, -1e30), -1), 0.0)
        each = jnp.einsum("ht,tk->hk", a, document_tk.astype(a.dtype), precision="highest")  # fmt: skip
        return each / jnp.maximum(sizes, 1)

    each = jax.lax.map(opinion, (q_nhe, mine), batch_size=QUERIES)
    # all queries of a document use the sum of their importances
    together = jnp.einsum("nk,nhj->khj", mine_nk.astype(each.dtype), each, precision="highest")  # fmt: skip
    own = together[jnp.clip(mine - 1, 0, count - 1)]
    importance = jnp.where(mine_nk.any(1)[:, None, None], own, each)
    # the own document is the nearest
    importance = jnp.where(mine_nk[:, None], jnp.inf, importance)
    ties = jnp.broadcast_to(ties, importance.shape)
    order = jnp.lexsort((ties, -importance), axis=-1)
    ranked = sizes[order]
    before = jnp.cumsum(ranked, -1) - ranked
    return jnp.put_along_axis(
        jnp.zeros_like(before), order, before, axis=-1, inplace=False
    )


def _rotate(x, positions, c: ModelConfig):
    """Rotary of x [..., E] at positions that broadcast to [...]."""
    cos, sin = rotary(positions, c.head_dim, c.rope_theta, c.rope_scaling)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def empty(config: ModelConfig, length: int) -> Cache:
    """An empty cache for a row of `length` tokens."""
    shape = length, config.num_kv_heads, config.head_dim
    one = (jnp.zeros(shape, config.dtype),) * config.num_layers
    return Cache(one, one)


def read(
    lm: LM, tokens: Int[Array, " N"], layout: Layout, cache: Cache, at: Any = 0
) -> tuple[Float[Array, "N D"], Cache]:
    """Runs the decoder over N tokens of one row, up to and including the final norm.

    Args:
      lm: a model without sliding windows, with RoPE in every layer.
      tokens: N consecutive ones; from the row's start into the suffix, or of the suffix.
      layout: of the T tokens of the whole row, from `lay`.
      cache: of T tokens, filled up to `at`.
      at: column of the first of the N tokens.

    Returns:
      Hidden states, and the cache with theirs.

    Raises:
      ValueError: a model with local layers, or with layers without RoPE.
    """
    c = lm.config
    if c.window is not None or c.rope_theta_local:
        raise ValueError("PINE needs a model whose layers all see everything")
    if not all(c.rope_layers):
        raise ValueError("PINE needs a model whose layers all have RoPE")
    rope.check_length(c.rope_scaling, len(layout.segment), c.max_length)
    x = transformer.embedded(lm, tokens)
    blocks: Any = transformer.unstack(lm).params["blocks"]
    filled = []
    for params, *kv in zip(blocks, *cache, strict=True):
        x, kv = cast(Any, _Block(c).apply({"params": params}, x, layout, kv, at))
        filled.append(kv)
    norm = Norm(c.norm_eps, c.norm_offset)
    h = cast(Array, norm.apply({"params": lm.params["norm"]}, x))
    return h, Cache(*zip(*filled, strict=True))


def lengthen(layout: Layout, length: int) -> Layout:
    """The same row with room for `length` tokens; the new ones belong to the suffix."""
    more = length - len(layout.segment)
    segment = jnp.pad(layout.segment, (0, more), mode="edge")
    place = jnp.r_[layout.place, layout.place[-1] + 1 + jnp.arange(more)]
    return layout._replace(segment=segment, place=place)


@jax.jit
def hidden(lm: LM, tokens: Int[Array, " T"], layout: Layout) -> Float[Array, "T D"]:
    """Hidden states of a whole row. *Exact*."""
    return read(lm, tokens, layout, empty(lm.config, len(tokens)))[0]
