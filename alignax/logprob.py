"""THE kernel: hidden states to log-probabilities, without ever holding [N, T, V].

The only place where tokens are shifted by one, and the only place that normalises
logits. A walk over tiles of scored tokens and of vocabulary keeps an online
log-sum-exp; the backward pass recomputes each tile from the saved log-sum-exp:

  log p(y) = z_y - lse(z),   d log p(y) / d z_v = 1[v = y] - exp(z_v - lse(z))

Its definition is temperature-free: training, reference, sampler and guidance agree.
Under a mesh the walk runs inside `shard_map`: tokens stay where they are, the head is
gathered over `fsdp`, the vocabulary stays split over `model`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignax.batch import LM, Batch, Scores, flatten
from alignax.models import transformer

TOKEN_TILE, VOCAB_TILE = 256, 4096  # one logit tile is 4 MiB
FILLED = ("logps", "values")  # the fields of Scores that one pass fills


def token_logps(
    logits: Float[Array, "*N V"], tokens: Int[Array, "*N"]
) -> Float[Array, "*N"]:
    """log softmax(logits)[tokens] in nats, for logits that already exist.

    Gather minus log-sum-exp in float32: a float32 `log_softmax` over a large
    vocabulary is measurably biased on some backends.
    """
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return target - jax.nn.logsumexp(logits, -1)


def rows(lm: LM, h: Float[Array, "N K D"]) -> Float[Array, "N K V"]:
    """Normalised log-probabilities of every next token, for a few positions.

    The other normaliser, for decoding: a sampler needs the whole row.
    """
    return jax.nn.log_softmax(transformer.unembed(lm, h), -1)


def score(
    lm: LM,
    batch: Batch,
    *,
    needs: tuple[str, ...] = (),
    mesh: Mesh | None = None,
    tiles: tuple[int, int] = (TOKEN_TILE, VOCAB_TILE),
    precision: str = "highest",
) -> Scores:
    """Reads a batch through an LM: the one way from a model to a loss.

    Args:
      lm: the model; differentiable in its parameters.
      batch: [B, G, T]; only positions where `mask` is True are unembedded.
      needs: what to return besides `logps`, out of FILLED. Names that describe the
        batch (such as 'ref_logps') are somebody else's to fill and are ignored here.
      mesh: devices that hold the batch; None when it lives on one.
      tiles: tokens and vocabulary entries per logit tile.
      precision: of the head matmul (on TPU, float32 runs in bf16 passes unless raised).

    Returns:
      Scores with `logps[b, g, t] = log p(tokens[t] | tokens[<t])` in nats, exactly 0
      where mask is False; with 'values', `values[b, g, t]` is the scalar head on the
      prefix that ends with token t, 0 where mask is False.

    Raises:
      ValueError: a field of Scores that this kernel does not fill, 'values' of a model
        without a value head, or B that the mesh does not divide.
    """
    unknown = [n for n in needs if n in Scores._fields and n not in FILLED]
    if unknown:
        raise ValueError(f"score does not fill {unknown}; it fills {FILLED}")
    b, g, t = batch.tokens.shape
    tokens, mask, _ = flatten(batch)
    h, _ = transformer.hidden(lm, tokens)
    logps = _logps(lm, h, tokens, mask, mesh, tiles, precision).reshape(b, g, t)
    values = None
    if "values" in needs:
        if not lm.config.value_head:
            raise ValueError("'values' needs a model with value_head=True")
        kernel = lm.params["value_head"]["kernel"].astype(jnp.float32)
        values = jnp.einsum(
            "ntd,d->nt", h.astype(jnp.float32), kernel, precision=precision
        )
        values = jnp.where(mask, values, 0.0).reshape(b, g, t)
    return Scores(logps, values=values)


def sequence_logps(
    lm: LM,
    tokens: Int[Array, "N T"],
    mask: Bool[Array, "N T"] | None = None,
    *,
    mesh: Mesh | None = None,
    tiles: tuple[int, int] = (TOKEN_TILE, VOCAB_TILE),
    precision: str = "highest",
) -> Float[Array, "N T"]:
    """Per-token log-probabilities in nats; 0 at t=0 and where `mask` is False.

    Args:
      lm: the model.
      tokens: right-padded rows of ids.
      mask: True on tokens to score; None scores every token but the first.
      mesh, tiles, precision: as in `score`.
    """
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    h, _ = transformer.hidden(lm, tokens)
    return _logps(lm, h, tokens, mask, mesh, tiles, precision)


def _logps(lm, h, tokens, mask, mesh, tiles, precision):
    """[N, T] log-probabilities from hidden states: the shift, then the walk."""
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)  # host batches are welcome
    targets = jnp.roll(tokens, -1, axis=1)
    scored = jnp.roll(mask.at[:, 0].set(False), -1, axis=1)
    weight, axis = transformer.head(lm)
    walk = Walk(axis, lm.config.final_softcap, tiles, precision)
    if mesh is None or mesh.size == 1:
        out = _local(walk, h, weight, targets, scored)
    else:
        out = _sharded(walk, mesh, h, weight, targets, scored)
    return jnp.roll(out, 1, axis=1)


class Walk(NamedTuple):
    """What is static about a walk."""

    vocab_axis: int
    cap: float | None
    tiles: tuple[int, int]
    precision: str
    mesh_axes: tuple[str, ...] = ()  # non-empty inside shard_map
    split: bool = False  # the vocabulary is split over the mesh axis 'model'


def _local(walk, h, weight, targets, scored):
    n, t, d = h.shape
    flat = (h.reshape(n * t, d), weight, targets.reshape(-1), scored.reshape(-1))
    return _target_logps(walk, *flat).reshape(n, t)


def _sharded(walk, mesh, h, weight, targets, scored):
    """The walk on each shard of tokens. Transposes of the two casts sum gradients."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if h.shape[0] % shards:
        raise ValueError(
            f"{h.shape[0]} rows do not divide over data*fsdp={shards} shards"
        )
    v, d = weight.shape[walk.vocab_axis], weight.shape[1 - walk.vocab_axis]
    split = v % mesh.shape["model"] == 0
    gather = d % mesh.shape["fsdp"] == 0
    names = ("model" if split else None, "fsdp" if gather else None)
    head_spec = P(*(names if walk.vocab_axis == 0 else names[::-1]))
    tokens_spec = P(("data", "fsdp"))
    axes = ("data", "fsdp", "model") if split else ("data", "fsdp")
    walk = walk._replace(mesh_axes=axes, split=split)

    def shard(h, weight, targets, scored):
        if gather:
            weight = jax.lax.all_gather(
                weight, "fsdp", axis=1 - walk.vocab_axis, tiled=True
            )
        if split:
            h = _vary(h, ("model",))
        weight = _vary(weight, ("data",) if gather else ("data", "fsdp"))
        return _local(walk, h, weight, targets, scored)

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(tokens_spec, head_spec, tokens_spec, tokens_spec),
        out_specs=tokens_spec,
    )(h, weight, targets, scored)  # fmt: skip


def _vary(x, axes):
    """Marks a replicated value as each shard's own; the transpose sums over `axes`."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _target_logps(walk, h, weight, targets, scored):
    """[M] log-probabilities of `targets` where `scored`, else 0. h is [M, D]."""
    return _forward(walk, h, weight, targets, scored)[0]


def _plan(walk, h, weight, scored):
    """Scored positions first, in tiles: (positions, number of tiles, sizes)."""
    m, v = h.shape[0], weight.shape[walk.vocab_axis]
    c, vb = min(walk.tiles[0], m), min(walk.tiles[1], v)
    count = scored.sum()
    order = jnp.argsort(~scored, stable=True)
    order = jnp.where(
        jnp.arange(m) < count, order, m
    )  # m = nowhere: read 0, write none
    order = jnp.concatenate([order, jnp.full(-m % c, m, order.dtype)])
    num_tiles = (count + c - 1) // c
    if (
        walk.mesh_axes
    ):  # every shard walks as long as the longest: collectives must meet
        num_tiles = jax.lax.pmax(num_tiles, ("data", "fsdp"))
    return order, num_tiles, c, vb, -(-v // vb)


def _tile(walk, weight, dtype, j, vb):
    """Vocabulary tile j: its weights, first column, and which columns are new.

    The last tile is moved back to end at V; columns already seen are masked.
    """
    v = weight.shape[walk.vocab_axis]
    start = jnp.minimum(j * vb, v - vb)
    w = jax.lax.dynamic_slice_in_dim(weight, start, vb, walk.vocab_axis).astype(dtype)
    return w, start, start + jnp.arange(vb) >= j * vb


def _dot(walk, a, b, contract):
    return jax.lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())),
        precision=walk.precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _first_column(walk, weight):
    """Vocabulary id of this shard's first column."""
    if not walk.split:
        return 0
    return jax.lax.axis_index("model") * weight.shape[walk.vocab_axis]


def _forward(walk, h, weight, targets, scored):
    order, num_tiles, c, vb, num_blocks = _plan(walk, h, weight, scored)
    m = h.shape[0]
    offset = _first_column(walk, weight)

    def tile(i, carry):
        logps, lses = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * c, c)
        x = h.at[at].get(mode="fill", fill_value=0)
        y = targets.at[at].get(mode="fill", fill_value=0) - offset

        def block(j, carry):
            top, total, target = carry
            w, start, new = _tile(walk, weight, h.dtype, j, vb)
            z = transformer.softcap(
                _dot(walk, x, w, (1, 1 - walk.vocab_axis)), walk.cap
            )
            z = jnp.where(new[None], z, -jnp.inf)
            top_new = jnp.maximum(top, z.max(-1))
            total = total * jnp.exp(top - top_new) + jnp.exp(z - top_new[:, None]).sum(
                -1
            )
            hit = (y[:, None] == (start + jnp.arange(vb))[None]) & new[None]
            target = target + jnp.where(hit, z, 0.0).sum(-1)
            return top_new, total, target

        zero = _vary(jnp.zeros(c, jnp.float32), walk.mesh_axes)
        first = (zero + jnp.finfo(jnp.float32).min, zero, zero)
        top, total, target = jax.lax.fori_loop(0, num_blocks, block, first)
        if walk.split:
            local, top = top, jax.lax.pmax(top, "model")
            total = jax.lax.psum(total * jnp.exp(local - top), "model")
            target = jax.lax.psum(target, "model")
        log_total = jnp.log(total)
        # (target - top) first: near-equal large logits cancel before the small log.
        logps = logps.at[at].set((target - top) - log_total, mode="drop")
        return logps, lses.at[at].set(top + log_total, mode="drop")

    zeros = _vary(
        jnp.zeros(m, jnp.float32), tuple(a for a in walk.mesh_axes if a != "model")
    )
    logps, lses = jax.lax.fori_loop(0, num_tiles, tile, (zeros, zeros))
    return logps, (h, weight, targets, scored, lses)


def _backward(walk, residuals, g):
    h, weight, targets, scored, lses = residuals
    order, num_tiles, c, vb, num_blocks = _plan(walk, h, weight, scored)
    offset = _first_column(walk, weight)

    def tile(i, carry):
        dh, dweight = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * c, c)
        x = h.at[at].get(mode="fill", fill_value=0)
        y = targets.at[at].get(mode="fill", fill_value=0) - offset
        lse = lses.at[at].get(mode="fill", fill_value=0)
        g_x = g.at[at].get(mode="fill", fill_value=0)

        def block(j, carry):
            dx, dweight = carry
            w, start, new = _tile(walk, weight, h.dtype, j, vb)
            z = transformer.softcap(
                _dot(walk, x, w, (1, 1 - walk.vocab_axis)), walk.cap
            )
            hit = y[:, None] == (start + jnp.arange(vb))[None]
            dz = g_x[:, None] * (hit - jnp.exp(z - lse[:, None]))
            if walk.cap is not None:
                dz = dz * (1 - (z / walk.cap) ** 2)
            # Repeated columns of the last tile, and rows without a cotangent, add nothing.
            dz = jnp.where(new[None] & (g_x != 0)[:, None], dz, 0.0).astype(h.dtype)
            dx = dx + _dot(walk, dz, w, (1, walk.vocab_axis))
            left, right = (dz, x) if walk.vocab_axis == 0 else (x, dz)
            old = jax.lax.dynamic_slice_in_dim(dweight, start, vb, walk.vocab_axis)
            dweight = jax.lax.dynamic_update_slice_in_dim(
                dweight, old + _dot(walk, left, right, (0, 0)), start, walk.vocab_axis
            )
            return dx, dweight

        dx = _vary(jnp.zeros(x.shape, jnp.float32), walk.mesh_axes)
        dx, dweight = jax.lax.fori_loop(0, num_blocks, block, (dx, dweight))
        return dh.at[at].set(dx.astype(h.dtype), mode="drop"), dweight

    zeros = (jnp.zeros(h.shape, h.dtype), jnp.zeros(weight.shape, jnp.float32))
    zeros = tuple(_vary(z, walk.mesh_axes) for z in zeros)
    dh, dweight = jax.lax.fori_loop(0, num_tiles, tile, zeros)
    none = np.zeros(targets.shape, jax.dtypes.float0)
    return dh, dweight.astype(weight.dtype), none, none


_target_logps.defvjp(_forward, _backward)
