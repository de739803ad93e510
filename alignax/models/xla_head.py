"""The head's log-probabilities by XLA's own loops: the default, and every kernel's oracle.

A walk over tiles of the vocabulary and, within each, of the scored tokens keeps an online
log-sum-exp for every token; the backward pass recomputes each tile from the saved one:

  log p(y) = z_y - lse(z),   d log p(y) / d z_v = 1[v = y] - exp(z_v - lse(z))

With the vocabulary outside, a tile of the head is cast once and its gradient is summed
where it was made; what every token keeps meanwhile is a few numbers. The same walk reads
what else a loss may need of the whole row: entropy, log Σ p², and the exact KL to a
frozen LM either way, whose logits it tiles side by side.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignax.models import transformer

READ = ("entropy", "collision", "kl", "forward_kl")  # what can be read besides 'logps'


class Head(NamedTuple):
    """What is static about an output head."""

    vocab_axis: int
    cap: float | None


class Walk(NamedTuple):
    """What is static about a walk."""

    heads: tuple[Head, ...]  # the policy's and, if it is compared, the frozen LM's
    fields: tuple[str, ...]  # of READ, what is read besides 'logps'
    tiles: tuple[int, int]
    precision: str
    mesh_axes: tuple[str, ...] = ()  # non-empty inside shard_map
    split: bool = False  # the vocabulary is split over the mesh axis 'model'

    @property
    def laws(self) -> tuple[str, ...]:
        """'p' is the policy, 'r' the frozen LM that it is compared with."""
        return ("p", "r")[: len(self.heads)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(
    walk: Walk, sides: tuple[tuple[Float[Array, "_ _"], Float[Array, "_ _"]], ...],
    targets: Int[Array, " M"], scored: Bool[Array, " M"], source: Int[Array, " M"] | None,
) -> dict[str, Float[Array, " M"]]:  # fmt: skip
    """{'logps', *walk.fields} of `targets` in nats where `scored`, else 0.

    Args:
      walk: what is static.
      sides: (hidden states [K, D], weight of the head) of the policy and, if it is
        compared, of the frozen LM; differentiable in the policy's.
      targets: ids in this shard's columns; another shard's are outside of them.
      scored: which positions count.
      source: the row of the hidden states that predicts a target, several may have the
        same; None is its own, and K = M.
    """
    return _forward(walk, sides, targets, scored, source)[0]


def vary(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks a replicated value as each shard's own; the transpose sums over `axes`."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


class _Plan(NamedTuple):
    """Scored positions first, in tiles."""

    order: Array  # [M', a multiple of c] position; M is nowhere: read 0, write none
    source: Array  # likewise, the row of the hidden states
    many: Array  # tiles of tokens with anything in them
    c: int  # tokens a tile
    vb: int  # vocabulary a tile
    blocks: int  # tiles of vocabulary


def _plan(walk, sides, scored, source):
    m, v = scored.shape[0], sides[0][1].shape[walk.heads[0].vocab_axis]
    c, vb = min(walk.tiles[0], m), min(walk.tiles[1], v)
    count = scored.sum()
    order = jnp.argsort(~scored, stable=True)
    order = jnp.where(jnp.arange(m) < count, order, m)
    order = jnp.concatenate([order, jnp.full(-m % c, m, order.dtype)])
    rows = order
    if source is not None:
        rows = source.at[order].get(mode="fill", fill_value=len(sides[0][0]))
    return _Plan(order, rows, (count + c - 1) // c, c, vb, -(-v // vb))


def _take(x, at):
    """Rows `at` of x; zeros for the positions that are nowhere."""
    return x.at[at].get(mode="fill", fill_value=0)


def _slice(tree, start, size):
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=0)
    return jax.tree.map(lambda x: cut(x, start, size), tree)


def _dot(walk, a, b, contract):
    return jax.lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())),
        precision=walk.precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _block(walk, sides, j, plan):
    """Vocabulary tile j: of every side the weights, first column, which columns are new.

    The last tile is moved back to end at V; columns already seen are masked.
    """
    v = sides[0][1].shape[walk.heads[0].vocab_axis]
    start = jnp.minimum(j * plan.vb, v - plan.vb)
    weights = [
        jax.lax.dynamic_slice_in_dim(w, start, plan.vb, head.vocab_axis).astype(h.dtype)
        for head, (h, w) in zip(walk.heads, sides, strict=True)
    ]
    return weights, start, (start + jnp.arange(plan.vb) >= j * plan.vb)[None]


def _logits(walk, weights, xs):
    return [
        transformer.softcap(_dot(walk, x, w, (1, 1 - head.vocab_axis)), head.cap)
        for head, x, w in zip(walk.heads, xs, weights, strict=True)
    ]


# What a field is made of: sums over the vocabulary of the policy's logits z and the frozen
# LM's logits a. A name begins with the law of its weights, p ~ e^z or r ~ e^a.
#   p: Σ e^z   pz: Σ e^z z   pp: Σ e^2z   pd: Σ e^z (z - a)   r: Σ e^a   rd: Σ e^a (a - z)
SUMS = {"entropy": "pz", "collision": "pp", "kl": "pd", "forward_kl": "rd"}


def _sums(walk, logits, new):
    """(maxima {law: [C]}, sums {name: [C]}) of one tile, e^ taken under its maxima."""
    logits = [jnp.where(new, z, 0.0) for z in logits]
    tops, weights = {}, {}
    for law, z in zip(walk.laws, logits, strict=True):
        tops[law] = jnp.where(new, z, -jnp.inf).max(-1)
        weights[law] = jnp.where(new, jnp.exp(z - tops[law][:, None]), 0.0)
    sums = {law: e.sum(-1) for law, e in weights.items()}
    if "collision" in walk.fields:
        sums["pp"] = (weights["p"] ** 2).sum(-1)
    if "entropy" in walk.fields:
        sums["pz"] = (weights["p"] * logits[0]).sum(-1)
    if "kl" in walk.fields:
        sums["pd"] = (weights["p"] * (logits[0] - logits[1])).sum(-1)
    if "forward_kl" in walk.fields:
        sums["rd"] = (weights["r"] * (logits[1] - logits[0])).sum(-1)
    return tops, sums


def _rescale(tops, sums, top):
    """The sums under other maxima."""
    scale = {law: jnp.exp(tops[law] - top[law]) for law in tops}
    scale["pp"] = scale["p"] ** 2
    return {k: v * scale["pp" if k == "pp" else k[0]] for k, v in sums.items()}


def _fields(walk, tops, sums, target):
    """{field: [C]} from the sums over the whole vocabulary."""
    log_total = {law: jnp.log(sums[law]) for law in tops}
    lse = {law: tops[law] + log_total[law] for law in tops}
    # (target - top) first: near-equal large logits cancel before the small log.
    out = {"lse": lse["p"], "logps": (target - tops["p"]) - log_total["p"]}
    if "entropy" in walk.fields:
        out["entropy"] = log_total["p"] + (tops["p"] - sums["pz"] / sums["p"])
    if "collision" in walk.fields:
        out["collision"] = jnp.log(sums["pp"]) - 2 * log_total["p"]
    if len(walk.heads) > 1:
        out["other_lse"] = lse["r"]
        shift = lse["p"] - lse["r"]
    if "kl" in walk.fields:
        out["kl"] = sums["pd"] / sums["p"] - shift
    if "forward_kl" in walk.fields:
        out["forward_kl"] = sums["rd"] / sums["r"] + shift
    return out


def _forward(walk, sides, targets, scored, source):
    plan = _plan(walk, sides, scored, source)
    c, wanted = plan.c, _take(targets, plan.order)

    def block(j, carry):
        weights, start, new = _block(walk, sides, j, plan)

        def tile(i, carry):
            rows, y = _slice((plan.source, wanted), i * c, c)
            logits = _logits(walk, weights, [_take(h, rows) for h, _ in sides])
            tops, sums, target = _slice(carry, i * c, c)
            here = _sums(walk, logits, new)
            top = jax.tree.map(jnp.maximum, tops, here[0])
            sums = jax.tree.map(
                jnp.add, _rescale(tops, sums, top), _rescale(here[0], here[1], top)
            )
            hit = (y[:, None] == (start + jnp.arange(plan.vb))[None]) & new
            out = top, sums, target + jnp.where(hit, logits[0], 0.0).sum(-1)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
            return jax.tree.map(lambda x, new: put(x, new, i * c), carry, out)

        return jax.lax.fori_loop(0, plan.many, tile, carry)

    zero = vary(jnp.zeros(len(plan.order), jnp.float32), walk.mesh_axes)
    names = walk.laws + tuple(SUMS[field] for field in walk.fields)
    least = {law: zero + jnp.finfo(jnp.float32).min for law in walk.laws}
    first = (least, dict.fromkeys(names, zero), zero)
    tops, sums, target = jax.lax.fori_loop(0, plan.blocks, block, first)
    if walk.split:
        top = jax.tree.map(lambda x: jax.lax.pmax(x, "model"), tops)
        sums = jax.lax.psum(_rescale(tops, sums, top), "model")
        tops, target = top, jax.lax.psum(target, "model")
    found = _fields(walk, tops, sums, target)
    axes = tuple(a for a in walk.mesh_axes if a != "model")
    nothing = vary(jnp.zeros(scored.shape, jnp.float32), axes)
    full = {k: nothing.at[plan.order].set(v, mode="drop") for k, v in found.items()}
    out = {k: full[k] for k in ("logps", *walk.fields)}
    return out, (sides, targets, scored, source, full)


def _slope(walk, g, read, logits, hit):
    """[C, VB] gradient of the fields, weighted by their cotangents g, in the logits."""
    logp = logits[0] - read["lse"]
    p = jnp.exp(logp)
    dz = g["logps"] * (hit - p)
    if "entropy" in walk.fields:
        dz -= g["entropy"] * p * (logp + read["entropy"])
    if "collision" in walk.fields:
        dz += 2 * g["collision"] * (jnp.exp(2 * logp - read["collision"]) - p)
    if len(walk.heads) > 1:
        logr = logits[1] - read["other_lse"]
    if "kl" in walk.fields:
        dz += g["kl"] * p * (logp - logr - read["kl"])
    if "forward_kl" in walk.fields:
        dz += g["forward_kl"] * (p - jnp.exp(logr))
    return dz


def _backward(walk, residuals, g):
    sides, targets, scored, source, read = residuals
    (h, weight), head = sides[0], walk.heads[0]
    plan = _plan(walk, sides, scored, source)
    c = plan.c
    wanted, g, read = jax.tree.map(lambda x: _take(x, plan.order), (targets, g, read))

    def block(j, carry):
        dh, dweight = carry
        weights, start, new = _block(walk, sides, j, plan)

        def tile(i, carry):
            dh, dw = carry
            rows, y, g_x, read_x = _slice((plan.source, wanted, g, read), i * c, c)
            g_x, read_x = jax.tree.map(lambda v: v[:, None], (g_x, read_x))
            xs = [_take(h, rows) for h, _ in sides]
            logits = _logits(walk, weights, xs)
            hit = y[:, None] == (start + jnp.arange(plan.vb))[None]
            dz = _slope(walk, g_x, read_x, logits, hit)
            if head.cap is not None:
                dz = dz * (1 - (logits[0] / head.cap) ** 2)
            # Repeated columns of the last tile add nothing.
            dz = jnp.where(new, dz, 0.0).astype(h.dtype)
            dx = _dot(walk, dz, weights[0], (1, head.vocab_axis))
            left, right = (dz, xs[0]) if head.vocab_axis == 0 else (xs[0], dz)
            dw += _dot(walk, left, right, (0, 0))
            return dh.at[rows].add(dx, mode="drop"), dw

        dw = vary(jnp.zeros(weights[0].shape, jnp.float32), walk.mesh_axes)
        dh, dw = jax.lax.fori_loop(0, plan.many, tile, (dh, dw))
        old = jax.lax.dynamic_slice_in_dim(dweight, start, plan.vb, head.vocab_axis)
        put = jax.lax.dynamic_update_slice_in_dim
        dw = (old + dw).astype(weight.dtype)
        return dh, put(dweight, dw, start, head.vocab_axis)

    zeros = (
        vary(jnp.zeros(h.shape, jnp.float32), walk.mesh_axes),
        vary(jnp.zeros(weight.shape, weight.dtype), walk.mesh_axes),
    )
    dh, dweight = jax.lax.fori_loop(0, plan.blocks, block, zeros)
    frozen = (None,) * (len(sides) - 1)
    return ((dh.astype(h.dtype), dweight), *frozen), None, None, None


read.defvjp(_forward, _backward)
