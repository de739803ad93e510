"""Log-probabilities of the output head in plain XLA: the default, and the kernels' oracle.

A loop over tiles of the vocabulary and, inside it, a loop over tiles of the scored tokens
keep an online log-sum-exp for every token. The backward pass recomputes each tile of logits
from the saved log-sum-exp:

  log p(y) = z_y - lse(z),   d log p(y) / d z_v = 1[v = y] - exp(z_v - lse(z))

The loop over the vocabulary is the outer one: a tile of the head's weight is cast once, and
its gradient is complete when the inner loop ends. Between tiles every token keeps a few
numbers. The same loops compute what else a loss may need of a whole row: the entropy,
log Σ p², and the exact KL to and from a frozen LM, whose logits have the same tiles. Where
the two vocabularies differ in size (one tokenizer, tables padded differently), the KL is of
both distributions restricted to the ids that they have in common, and renormalised.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignax.models import transformer
from alignax.models.attention import LEAST

READ = ("entropy", "collision", "kl", "forward_kl")  # fields besides 'logps'
FIXED = ("best",)  # further fields, without a gradient


class Head(NamedTuple):
    """The static settings of an output head."""

    vocab_axis: int  # of its weight
    cap: float | None  # soft-cap of the logits
    temperature: float = 1.0  # by which the capped logits are divided


class Allowed(NamedTuple):
    """Which ids each distribution has; it is renormalised over them."""

    flags: Bool[Array, "S V"]  # by state; columns as those of the head's weight
    states: Int[Array, "*M"]  # of each target


class Tiling(NamedTuple):
    """The static settings of the loops over tiles."""

    heads: tuple[Head, ...]  # the policy's and, if it is compared, the frozen LM's
    fields: tuple[str, ...]  # of READ and FIXED, what is computed besides 'logps'
    tiles: tuple[int, int]  # tokens and vocabulary entries of a tile of logits
    precision: str  # of the matrix products
    mesh_axes: tuple[str, ...] = ()  # non-empty inside shard_map
    split: bool = False  # the vocabulary is split over the mesh axis 'model'
    common: int | None = None  # ids of the frozen LM where the policy has more of them

    @property
    def compared(self) -> str:
        """Name of the distribution that is compared with the frozen LM's."""
        return "p" if self.common is None else "c"

    @property
    def distributions(self) -> tuple[str, ...]:
        """Names of the distributions that are normalised.

        'p' is the policy, 'c' the policy on the common ids where these are fewer, 'r' the
        frozen LM on them.
        """
        if len(self.heads) == 1:
            return ("p",)
        return ("p", "r") if self.common is None else ("p", "c", "r")

    @property
    def sums(self) -> dict[str, str]:
        """{field: name of its sum}, of the fields that are computed by one."""
        return {
            f: SUMS[f].replace("c", self.compared) for f in self.fields if f in SUMS
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(
    tiling: Tiling, sides: tuple[tuple[Float[Array, "_ _"], Float[Array, "_ _"]], ...],
    targets: Int[Array, " M"], scored: Bool[Array, " M"], source: Int[Array, " M"] | None,
    allowed: Allowed | None = None,
) -> dict[str, Float[Array, " M"]]:  # fmt: skip
    """{'logps', *tiling.fields} of `targets` in nats where `scored`, else 0.

    Args:
      tiling: the static settings.
      sides: (hidden states [K, D], weight of the head) of the policy and, if it is
        compared, of the frozen LM; differentiable in the policy's. Of a frozen LM with
        more ids than the policy, those are not read; one with fewer is padded to as many
        columns, and `tiling.common` says how many of them it has.
      targets: ids, counted from the first column of this shard of the vocabulary; an id
        of another shard is out of range here.
      scored: True on the positions that are computed.
      source: for each target the row of the hidden states that predicts it; several
        targets may share a row. None: target i is predicted by row i, and K = M.
      allowed: ids that the distributions of all sides have; None: every id.
    """
    return _forward(tiling, sides, targets, scored, source, allowed)[0]


def vary(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks a replicated value as varying over `axes`; the transpose sums over them."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


class _Plan(NamedTuple):
    """The order of the positions, scored ones first, and the sizes of the tiles."""

    order: (
        Array  # [M'], M' a multiple of c: positions; M is padding (read 0, not written)
    )
    source: Array  # [M'], the rows of the hidden states, padded likewise
    many: Array  # tiles that have a scored token
    c: int  # tokens per tile
    vb: int  # vocabulary entries per tile
    blocks: int  # tiles of vocabulary


def _plan(tiling, sides, scored, source):
    m, v = scored.shape[0], sides[0][1].shape[tiling.heads[0].vocab_axis]
    c, vb = min(tiling.tiles[0], m), min(tiling.tiles[1], v)
    count = scored.sum()
    order = jnp.argsort(~scored, stable=True)
    order = jnp.where(jnp.arange(m) < count, order, m)
    order = jnp.concatenate([order, jnp.full(-m % c, m, order.dtype)])
    rows = order
    if source is not None:
        rows = source.at[order].get(mode="fill", fill_value=len(sides[0][0]))
    return _Plan(order, rows, (count + c - 1) // c, c, vb, -(-v // vb))


def _take(x, at):
    """Rows `at` of x; zeros for padding."""
    return x.at[at].get(mode="fill", fill_value=0)


def _slice(tree, start, size):
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=0)
    return jax.tree.map(lambda x: cut(x, start, size), tree)


def _dot(tiling, a, b, contract):
    return jax.lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())),
        precision=tiling.precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _block(tiling, sides, j, plan, allowed):
    """Vocabulary tile j: (weights of every side, first column, mask of new columns, flags).

    The last tile is moved back to end at V; columns of the tile before it are masked.
    """
    v = sides[0][1].shape[tiling.heads[0].vocab_axis]
    start = jnp.minimum(j * plan.vb, v - plan.vb)
    weights = [
        jax.lax.dynamic_slice_in_dim(w, start, plan.vb, head.vocab_axis).astype(h.dtype)
        for head, (h, w) in zip(tiling.heads, sides, strict=True)
    ]
    flags = None
    if allowed is not None:
        flags = jax.lax.dynamic_slice_in_dim(allowed.flags, start, plan.vb, 1)
    return weights, start, (start + jnp.arange(plan.vb) >= j * plan.vb)[None], flags


def _logits(tiling, weights, xs, here):
    """Logits of every side [C, VB]; LEAST where `here` is False."""
    found = [
        transformer.softcap(_dot(tiling, x, w, (1, 1 - head.vocab_axis)), head.cap)
        for head, x, w in zip(tiling.heads, xs, weights, strict=True)
    ]
    found = [
        z if head.temperature == 1 else z / head.temperature
        for head, z in zip(tiling.heads, found, strict=True)
    ]
    return found if here is None else [jnp.where(here, z, LEAST) for z in found]


def _here(flags, states):
    """[C, VB] which ids of a tile the distributions of a tile of targets have."""
    return None if flags is None else jnp.take(flags, states, axis=0)


# The sums over the vocabulary from which each field is computed, of the policy's logits z
# and the frozen LM's logits a. The first letter of a sum is the distribution whose weights
# it has, p ~ e^z or r ~ e^a; c is p on the common ids.
#   p: Σ e^z   pz: Σ e^z z   pp: Σ e^2z   cd: Σ e^z (z - a)   r: Σ e^a   rd: Σ e^a (a - z)
SUMS = {"entropy": "pz", "collision": "pp", "kl": "cd", "forward_kl": "rd"}


def _columns(tiling, sides, start, new):
    """{distribution: [1, VB] which columns of a tile it has}, of the new ones."""
    if tiling.common is None:
        return dict.fromkeys(tiling.distributions, new)
    first = start
    if tiling.split:  # a column's id is counted over all shards
        width = sides[0][1].shape[tiling.heads[0].vocab_axis]
        first += width * jax.lax.axis_index("model")
    shared = new & (first + jnp.arange(new.shape[1]) < tiling.common)[None]
    return {"p": new, "c": shared, "r": shared}


def _sums(tiling, logits, columns):
    """(maxima {name: [C]}, sums {name: [C]}) of one tile, relative to its maxima."""
    logits = [jnp.where(columns["p"], z, 0.0) for z in logits]
    tops, weights = {}, {}
    for name, here in columns.items():
        z = logits[1 if name == "r" else 0]
        tops[name] = jnp.where(here, z, -jnp.inf).max(-1)
        weights[name] = jnp.where(here, jnp.exp(z - tops[name][:, None]), 0.0)
    sums = {name: e.sum(-1) for name, e in weights.items()}
    if "collision" in tiling.fields:
        sums["pp"] = (weights["p"] ** 2).sum(-1)
    if "entropy" in tiling.fields:
        sums["pz"] = (weights["p"] * logits[0]).sum(-1)
    if "kl" in tiling.fields:
        own = tiling.compared
        sums[own + "d"] = (weights[own] * (logits[0] - logits[1])).sum(-1)
    if "forward_kl" in tiling.fields:
        sums["rd"] = (weights["r"] * (logits[1] - logits[0])).sum(-1)
    return tops, sums


def _rescale(tops, sums, top):
    """The sums relative to the maxima `top` instead of `tops`."""
    scale = {name: jnp.exp(tops[name] - top[name]) for name in tops}
    scale["pp"] = scale["p"] ** 2
    return {k: v * scale["pp" if k == "pp" else k[0]] for k, v in sums.items()}


def _fields(tiling, tops, sums, target):
    """{field: [C]} from the sums over the whole vocabulary."""
    log_total = {name: jnp.log(sums[name]) for name in tops}
    lse = {name: tops[name] + log_total[name] for name in tops}
    # (target - top) first: near-equal large logits cancel before the small log.
    out = {"lse": lse["p"], "logps": (target - tops["p"]) - log_total["p"]}
    if "best" in tiling.fields:
        out["best"] = -log_total["p"]
    if "entropy" in tiling.fields:
        out["entropy"] = log_total["p"] + (tops["p"] - sums["pz"] / sums["p"])
    if "collision" in tiling.fields:
        out["collision"] = jnp.log(sums["pp"]) - 2 * log_total["p"]
    if len(tiling.heads) > 1:
        own = tiling.compared
        out["other_lse"] = lse["r"]
        if own != "p":
            out["common_lse"] = lse[own]
        shift = lse[own] - lse["r"]
    if "kl" in tiling.fields:
        out["kl"] = sums[own + "d"] / sums[own] - shift
    if "forward_kl" in tiling.fields:
        out["forward_kl"] = sums["rd"] / sums["r"] + shift
    return out


def _forward(tiling, sides, targets, scored, source, allowed):
    plan = _plan(tiling, sides, scored, source)
    c, wanted = plan.c, _take(targets, plan.order)
    states = None if allowed is None else _take(allowed.states, plan.order)

    def block(j, carry):
        weights, start, new, flags = _block(tiling, sides, j, plan, allowed)
        columns = _columns(tiling, sides, start, new)

        def tile(i, carry):
            rows, y, state = _slice((plan.source, wanted, states), i * c, c)
            xs = [_take(h, rows) for h, _ in sides]
            logits = _logits(tiling, weights, xs, _here(flags, state))
            tops, sums, target = _slice(carry, i * c, c)
            here = _sums(tiling, logits, columns)
            top = jax.tree.map(jnp.maximum, tops, here[0])
            sums = jax.tree.map(
                jnp.add, _rescale(tops, sums, top), _rescale(here[0], here[1], top)
            )
            hit = (y[:, None] == (start + jnp.arange(plan.vb))[None]) & new
            out = top, sums, target + jnp.where(hit, logits[0], 0.0).sum(-1)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            return jax.tree.map(lambda x, new: put(x, new, i * c), carry, out)

        return jax.lax.fori_loop(0, plan.many, tile, carry)

    zero = vary(jnp.zeros(len(plan.order), jnp.float32), tiling.mesh_axes)
    names = tiling.distributions + tuple(tiling.sums.values())
    least = {name: zero + jnp.finfo(jnp.float32).min for name in tiling.distributions}
    first = (least, dict.fromkeys(names, zero), zero)
    tops, sums, target = jax.lax.fori_loop(0, plan.blocks, block, first)
    if tiling.split:
        top = jax.tree.map(lambda x: jax.lax.pmax(x, "model"), tops)
        sums = jax.lax.psum(_rescale(tops, sums, top), "model")
        tops, target = top, jax.lax.psum(target, "model")
    found = _fields(tiling, tops, sums, target)
    axes = tuple(a for a in tiling.mesh_axes if a != "model")
    nothing = vary(jnp.zeros(scored.shape, jnp.float32), axes)
    full = {k: nothing.at[plan.order].set(v, mode="drop") for k, v in found.items()}
    out = {k: full[k] for k in ("logps", *tiling.fields)}
    return out, (sides, targets, scored, source, allowed, full)


def _slope(tiling, g, read, logits, hit, columns):
    """[C, VB] gradient with respect to the logits, from the fields' cotangents g."""
    logp = logits[0] - read["lse"]
    p = jnp.exp(logp)
    dz = g["logps"] * (hit - p)
    if "entropy" in tiling.fields:
        dz -= g["entropy"] * p * (logp + read["entropy"])
    if "collision" in tiling.fields:
        dz += 2 * g["collision"] * (jnp.exp(2 * logp - read["collision"]) - p)
    if len(tiling.heads) > 1:
        logr = logits[1] - read["other_lse"]
        r = jnp.exp(logr)
    if tiling.common is not None:
        logp = logits[0] - read["common_lse"]
        p = jnp.where(columns["c"], jnp.exp(logp), 0.0)
        r = jnp.where(columns["r"], r, 0.0)
    if "kl" in tiling.fields:
        dz += g["kl"] * p * (logp - logr - read["kl"])
    if "forward_kl" in tiling.fields:
        dz += g["forward_kl"] * (p - r)
    return dz


def _backward(tiling, residuals, g):
    sides, targets, scored, source, allowed, read = residuals
    (h, weight), head = sides[0], tiling.heads[0]
    plan = _plan(tiling, sides, scored, source)
    c = plan.c
    wanted, g, read = jax.tree.map(lambda x: _take(x, plan.order), (targets, g, read))
    states = None if allowed is None else _take(allowed.states, plan.order)

    def block(j, carry):
        dh, dweight = carry
        weights, start, new, flags = _block(tiling, sides, j, plan, allowed)
        columns = _columns(tiling, sides, start, new)

        def tile(i, carry):
            dh, dw = carry
            at = (plan.source, wanted, states, g, read)
            rows, y, state, g_x, read_x = _slice(at, i * c, c)
            g_x, read_x = jax.tree.map(lambda v: v[:, None], (g_x, read_x))
            xs = [_take(h, rows) for h, _ in sides]
            here = _here(flags, state)
            logits = _logits(tiling, weights, xs, here)
            hit = y[:, None] == (start + jnp.arange(plan.vb))[None]
            dz = _slope(tiling, g_x, read_x, logits, hit, columns)
            raw = logits[0]
            if head.temperature != 1:
                raw, dz = raw * head.temperature, dz / head.temperature
            if head.cap is not None:
                dz = dz * (1 - (raw / head.cap) ** 2)
            # Repeated columns of the last tile add nothing, nor do ids that are not allowed.
            kept = new if here is None else new & here
            dz = jnp.where(kept, dz, 0.0).astype(h.dtype)
            dx = _dot(tiling, dz, weights[0], (1, head.vocab_axis))
            left, right = (dz, xs[0]) if head.vocab_axis == 0 else (xs[0], dz)
            dw += _dot(tiling, left, right, (0, 0))
            return dh.at[rows].add(dx, mode="drop"), dw

        dw = vary(jnp.zeros(weights[0].shape, jnp.float32), tiling.mesh_axes)
        dh, dw = jax.lax.fori_loop(0, plan.many, tile, (dh, dw))
        old = jax.lax.dynamic_slice_in_dim(dweight, start, plan.vb, head.vocab_axis)
        put = jax.lax.dynamic_update_slice_in_dim
        dw = (old + dw).astype(weight.dtype)
        return dh, put(dweight, dw, start, head.vocab_axis)

    zeros = (
        vary(jnp.zeros(h.shape, jnp.float32), tiling.mesh_axes),
        vary(jnp.zeros(weight.shape, weight.dtype), tiling.mesh_axes),
    )
    dh, dweight = jax.lax.fori_loop(0, plan.blocks, block, zeros)
    frozen = (None,) * (len(sides) - 1)
    return ((dh.astype(h.dtype), dweight), *frozen), *[None] * 4


read.defvjp(_forward, _backward)
