"""PINE: attention that does not know in which order documents were given.

  [prefix P | documents D_1 .. D_k | suffix S], n_0 and m_j tokens, e = n_0 + Σ m_j

  a query of D_i   sees P, its own document causally, and every other document whole
  a query of S     sees P, every document, and S causally
  importance       I_j = Σ over the query's own document of mean_{u in D_j} a_tu,
                   a = softmax(q·k / √d) without rotary, over the tokens of documents that
                   are not the query's own; of S a query has its own I_j
  position         a document stands the nearer to the query the more important it is:
                   token u of D_j at e - shift_j - m_j + u, where shift_j is the length of
                   those in front; the query's own document is the nearest
  query            at e - m_i + t in D_i, at e + t in S

Each head and, in the suffix, each token orders the documents for itself. With one document
that is the ordinary model. Wang et al. 2024, https://arxiv.org/abs/2407.01100

Differs from the paper: a tie goes by the content of the documents, not by their order.
Nothing is cached: a token more reads everything again.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignax.batch import LM
from alignax.models import transformer
from alignax.models.transformer import MLP, ModelConfig, Norm, Project, rotary


class Layout(NamedTuple):
    """Where the tokens of one row belong."""

    segment: Int[Array, " T"]  # 0 prefix, 1 .. k documents, k + 1 suffix and padding
    place: Int[Array, " T"]  # of a token in its segment, from 0
    sizes: Int[Array, " K"]  # tokens of each document
    ties: Int[Array, " K"]  # order of documents that are equally important


def lay(
    prefix: Sequence[int], documents: Sequence[Sequence[int]], suffix: Sequence[int],
    length: int | None = None,
) -> tuple[Int[np.ndarray, " T"], Layout]:  # fmt: skip
    """Ids of a row, right-padded to `length`, and its layout.

    Raises:
      ValueError: no document, an empty one, no suffix, or a row longer than `length`.
    """
    if not documents or not all(map(len, documents)) or not len(suffix):
        sizes = [len(d) for d in documents]
        raise ValueError(
            f"documents have {sizes} tokens and the suffix {len(suffix)}; expected at "
            "least one document and one token in each"
        )
    parts = [list(prefix), *map(list, documents), list(suffix)]
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
    def __call__(self, x_td, layout: Layout):
        c = self.config
        d, e = c.width, c.head_dim

        def heads(name, count):
            bias = (count, e) if c.qkv_bias else None
            y = Project("td,dhe->the", (d, count, e), d, bias, name=name)(x_td)
            if c.qk_norm and name != "v":
                y = Norm(c.norm_eps, c.norm_offset, name=f"{name}_norm")(y)
            return y

        many = c.num_heads // c.num_kv_heads
        q = heads("q", c.num_heads)
        k, v = (jnp.repeat(heads(name, c.num_kv_heads), many, 1) for name in ("k", "v"))
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        y = _attend(q, k, v, layout, c).astype(x_td.dtype)
        return Project("the,hed->td", (c.num_heads, e, d), c.num_heads * e, name="o")(y)


class _Block(nn.Module):
    """`transformer.Block` with the other attention: the parameters are the same."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_td, layout: Layout):
        c = self.config

        def norm(name):
            return Norm(c.norm_eps, c.norm_offset, name=name)

        y = _Attention(c, name="attn")(norm("attn_norm")(x_td), layout)
        x_td = x_td + (norm("post_attn_norm")(y) if c.post_norms else y)
        y = MLP(c, name="mlp")(norm("mlp_norm")(x_td)[None])[0]
        return x_td + (norm("post_mlp_norm")(y) if c.post_norms else y)


def _attend(q_the, k_the, v_the, layout: Layout, c: ModelConfig):
    """[T, H, E]: every query, one by one, over keys that it places itself."""
    t = q_the.shape[0]
    segment, place, sizes, _ = layout
    count = sizes.shape[0]
    document = segment[:, None] == jnp.arange(1, count + 1)  # [T, K]
    scale = (c.query_scale or c.head_dim) ** -0.5
    start = (segment == 0).sum()
    end = start + sizes.sum()
    own = jnp.clip(segment - 1, 0, count - 1)
    inside = document.any(1)
    size = sizes[own]
    positions = jnp.where(
        segment == 0, place, jnp.where(inside, end - size + place, end + place)
    )
    shifts = _shifts(q_the, k_the, layout, document, scale)  # [T, H, K]

    def one(args):
        q_he, shift_hk, position = args
        # of the keys of a document, where the query has put it
        moved = end - shift_hk[:, own] - size + place
        at = jnp.where(inside, moved, jnp.where(segment == 0, place, end + place))
        keys = _rotate(jnp.moveaxis(k_the, 0, 1), at, c)
        query = _rotate(q_he[:, None], jnp.full((len(q_he), 1), position), c)
        s = jnp.einsum("hqe,hte->ht", query, keys, precision="highest") * scale
        if c.attn_softcap:
            s = c.attn_softcap * jnp.tanh(s / c.attn_softcap)
        p = jax.nn.softmax(jnp.where(at <= position, s, -1e30), -1)
        return jnp.einsum("ht,the->he", p, v_the, precision="highest")

    assert positions.shape == (t,)
    return jax.lax.map(one, (q_the, shifts, positions))


def _shifts(q_the, k_the, layout: Layout, document, scale):
    """How many tokens of documents each query puts in front of each document [T, H, K]."""
    segment, _, sizes, ties = layout
    count = sizes.shape[0]
    s = jnp.einsum("the,uhe->thu", q_the, k_the, precision="highest") * scale
    own = segment[:, None] == segment  # [T, U]
    seen = document.any(1) & ~own
    a = jax.nn.softmax(jnp.where(seen[:, None], s, -1e30), -1)
    a = jnp.where(seen[:, None], a, 0.0)
    each = jnp.einsum("thu,uk->thk", a, document.astype(a.dtype), precision="highest")
    each = each / sizes
    # a document has one opinion, the sum of its tokens'
    together = jnp.einsum("tk,thj->khj", document.astype(a.dtype), each, precision="highest")  # fmt: skip
    inside = document.any(1)
    mine = jnp.clip(segment - 1, 0, count - 1)
    importance = jnp.where(inside[:, None, None], together[mine], each)
    first = document[:, None]  # the own document is the nearest
    importance = jnp.where(first, jnp.inf, importance)
    ties = jnp.broadcast_to(ties, importance.shape)
    order = jnp.lexsort((ties, -importance), axis=-1)
    ranked = sizes[order]
    before = jnp.cumsum(ranked, -1) - ranked
    return jnp.put_along_axis(
        jnp.zeros_like(before), order, before, axis=-1, inplace=False
    )


def _rotate(x_hte, positions_ht, c: ModelConfig):
    """Rotary at positions that differ by head."""
    cos, sin = rotary(positions_ht, c.head_dim, c.rope_theta, c.rope_scaling)
    a, b = jnp.split(x_hte, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@jax.jit
def hidden(lm: LM, tokens: Int[Array, " T"], layout: Layout) -> Float[Array, "T D"]:
    """Runs the decoder up to and including the final norm, on one row. *Exact*.

    Args:
      lm: a model without windows (every layer sees everything).
      tokens: from `lay`.
      layout: likewise.

    Raises:
      ValueError: a model with local layers.
    """
    c = lm.config
    if c.window is not None or c.rope_theta_local:
        raise ValueError("PINE needs a model whose layers all see everything")
    x = lm.params["embed"][tokens].astype(c.dtype)
    if c.embed_scale:
        x = x * jnp.asarray(c.width**0.5, x.dtype)
    blocks: Any = transformer.unstack(lm).params["blocks"]
    for params in blocks:
        x = cast(Array, _Block(c).apply({"params": params}, x, layout))
    norm = Norm(c.norm_eps, c.norm_offset)
    return cast(Array, norm.apply({"params": lm.params["norm"]}, x))


@functools.partial(jax.jit, static_argnames="last")
def _next(lm, tokens, layout, at, *, last: bool):
    h = hidden(lm, tokens, layout)
    return transformer.unembed(lm, h[at][None] if last else h)


def greedy(
    lm: LM, prefix: Sequence[int], documents: Sequence[Sequence[int]],
    suffix: Sequence[int], *, max_new: int, eos_ids: Sequence[int] = (),
) -> list[int]:  # fmt: skip
    """The greedy response to a prompt with documents, whatever their order. *Exact*.

    Up to float32: documents that come in another order are added up in another order.

    Args:
      lm: as in `hidden`.
      prefix: ids in front of the documents, BOS included.
      documents: ids of each.
      suffix: ids after them, up to where the response starts.
      max_new: most tokens of it.
      eos_ids: any of them ends it.
    """
    if max_new < 1:
        raise ValueError(f"max_new={max_new}, expected at least 1")
    said: list[int] = []
    many = sum(map(len, (prefix, suffix, *documents)))
    tokens, layout = lay(prefix, documents, suffix, length=many + max_new)
    while len(said) < max_new and not (said and said[-1] in eos_ids):
        at = many + len(said)
        logits = _next(lm, jnp.asarray(tokens), layout, at - 1, last=True)
        said.append(int(logits[0].argmax()))
        tokens[at] = said[-1]
    return said
