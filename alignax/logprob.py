"""THE kernel: hidden states to log-probabilities, without ever holding [N, T, V].

The only place where tokens are shifted by one, and the only place that normalises
logits. A walk over tiles of scored tokens and of vocabulary keeps an online
log-sum-exp; the backward pass recomputes each tile from the saved log-sum-exp:

  log p(y) = z_y - lse(z),   d log p(y) / d z_v = 1[v = y] - exp(z_v - lse(z))

Rows are responses as they stand in the batch or, where it has a layout, packed ones in
which what responses share is computed once; the values are the same.

The same walk reads what else a loss may need of the whole row: entropy, log Σ p², and
the exact KL to a frozen LM either way, whose logits it tiles side by side.

Its definition is temperature-free: training, reference, sampler and guidance agree.
Under a mesh the walk runs inside `shard_map`: tokens stay where they are, the head is
gathered over `fsdp`, the vocabulary stays split over `model`.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignax import pallas_head
from alignax.batch import LM, Batch, Layout, Scores, flatten
from alignax.models import attention, transformer

log = logging.getLogger(__name__)
TOKEN_TILE, VOCAB_TILE = 256, 4096  # one logit tile is 4 MiB
READ = ("entropy", "collision", "kl", "forward_kl")  # read in the same walk, if asked
VALUES = ("values", "state_values")  # the scalar head after a token, and before it
COMPARED = ("kl", "forward_kl")  # of these, what needs a frozen LM


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
    kl_to: LM | None = None,
    mesh: Mesh | None = None,
    tiles: tuple[int, int] = (TOKEN_TILE, VOCAB_TILE),
    precision: str = "highest",
) -> Scores:
    """Reads a batch through an LM: the one way from a model to a loss.

    Args:
      lm: the model; differentiable in its parameters.
      batch: [B, G, T]; only positions where `mask` is True are unembedded.
      needs: fields of Scores to return besides `logps`. Names that describe the batch
        (such as 'ref_logps') are somebody else's to fill and are ignored here.
      kl_to: the frozen LM that 'kl' and 'forward_kl' compare with; no gradient reaches
        it. It shares the vocabulary, not the architecture.
      mesh: devices that hold the batch; None when it lives on one.
      tiles: tokens and vocabulary entries per logit tile.
      precision: of the head matmul (on TPU, float32 runs in bf16 passes unless raised).

    Returns:
      Scores with `logps[b, g, t] = log p(tokens[t] | tokens[<t])` in nats, exactly 0
      where mask is False; with 'values', `values[b, g, t]` is the scalar head on the
      prefix that ends with token t, with 'state_values' on the one that ends before it,
      0 where mask is False. The fields in READ are [b, g, t] too, of the law of tokens[t]
      given tokens[<t], in nats.

    Raises:
      ValueError: values of a model without a value head, a KL to nothing or to another
        vocabulary, or B that the mesh does not divide.
    """
    inputs = _plain(batch) if batch.layout is None else _packed(batch, batch.layout)
    fields = tuple(n for n in READ if n in needs)
    other = None
    if compared := [n for n in fields if n in COMPARED]:
        other = _frozen(lm, kl_to, inputs, compared)
    h = _hidden(lm, inputs)
    tokens, scored = inputs.tokens, inputs.scored
    read = _read(
        lm, h, tokens, scored, mesh, tiles, precision, fields, other, inputs.previous
    )
    if asked := [n for n in VALUES if n in needs]:
        if not lm.config.value_head:
            raise ValueError(f"{asked} of a model without value_head=True")
        kernel = lm.params["value_head"]["kernel"].astype(jnp.float32)
        at = {
            "values": jnp.einsum(
                "ntd,d->nt", h.astype(jnp.float32), kernel, precision=precision
            )
        }
        at["state_values"] = _before(inputs, at["values"])
        read |= {name: at[name] for name in asked}
    if batch.layout is not None:
        read = _unpack(batch.layout, read, mesh)
    shape, mask = batch.tokens.shape, jnp.asarray(batch.mask)
    out = {k: jnp.where(mask, v.reshape(shape), 0.0) for k, v in read.items()}
    return Scores(**out)


class Inputs(NamedTuple):
    """What an LM reads of a batch, in the plain layout or a packed one."""

    tokens: Int[Array, "N T"]
    scored: Bool[Array, "N T"]
    positions: Int[Array, "N T"] | None = None
    attend: attention.Attend | None = None
    previous: Int[Array, "N T"] | None = None  # column; None is the one before


def _plain(batch: Batch) -> Inputs:
    tokens, mask, _ = map(jnp.asarray, flatten(batch))  # host batches are welcome
    return Inputs(tokens, mask)


def _packed(batch: Batch, layout: Layout) -> Inputs:
    b, g, t = batch.tokens.shape
    blocks, many, length = layout.tokens.shape
    if layout.places.shape != (b, g, t) or b % blocks:
        raise ValueError(
            f"a layout of {blocks} blocks for tokens {layout.places.shape} is not of this "
            f"batch, whose tokens are {(b, g, t)}"
        )
    fields = layout._replace(places=layout.tokens)
    rows = Layout(*(jnp.asarray(x).reshape(blocks * many, length) for x in fields))
    attend = attention.Attend(
        (rows.group, rows.branch), attention.siblings, reach=min(g * t, length)
    )
    return Inputs(rows.tokens, rows.scored, rows.positions, attend, rows.previous)


def _unpack(layout, read, mesh):
    """{field: [B, G, T]} from {field: [S * R, L]}: every response reads its own places."""

    def take(index, read):
        index = index.reshape(layout.tokens.shape[0] // shards, -1)
        flat = {k: v.reshape(len(index), -1) for k, v in read.items()}
        return {k: jnp.take_along_axis(v, index, 1) for k, v in flat.items()}

    index = jnp.asarray(layout.places)
    if mesh is None or mesh.size == 1:
        shards = 1
        return take(index, read)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if layout.tokens.shape[0] % shards:
        raise ValueError(
            f"a layout of {layout.tokens.shape[0]} blocks does not divide over "
            f"data*fsdp={shards} shards"
        )
    spec = P(("data", "fsdp"))
    return jax.shard_map(take, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(
        index, read
    )


def _hidden(lm, inputs):
    return transformer.hidden(lm, inputs.tokens, inputs.positions, inputs.attend)[0]


def _before(inputs, x):
    """x of the token before; 0 before the first."""
    if inputs.previous is not None:
        return jnp.take_along_axis(x, inputs.previous, 1)
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _frozen(lm, kl_to, inputs, compared):
    """(the LM to compare with, its hidden states)."""
    if kl_to is None:
        raise ValueError(
            f"{compared} compare with a frozen LM: pass kl_to (config.lms.ref)"
        )
    ours, theirs = lm.config.vocab_size, kl_to.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"{compared}: the LM has a vocabulary of {ours}, kl_to one of {theirs}"
        )
    kl_to = jax.lax.stop_gradient(kl_to)
    return kl_to, _hidden(kl_to, inputs)


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
    return _read(lm, h, tokens, mask, mesh, tiles, precision)["logps"]


def _read(
    lm, h, tokens, mask, mesh, tiles, precision, fields=(), other=None, previous=None
):
    """{field: [N, T]} from hidden states: the shift, then the walk.

    `other` is (frozen LM, its hidden states), for the fields that compare with it;
    `previous` the column that predicts a token, where that is not the one before.
    """
    targets, scored = jnp.asarray(tokens), jnp.asarray(mask).at[:, 0].set(False)
    if previous is None:
        targets, scored = (jnp.roll(x, -1, axis=1) for x in (targets, scored))
    weight, axis = transformer.head(lm)
    sides, heads = [(h, weight)], [Head(axis, lm.config.final_softcap)]
    if other is not None:
        weight, axis = transformer.head(other[0])
        sides.append((other[1], weight))
        heads.append(Head(axis, other[0].config.final_softcap))
    walk = Walk(tuple(heads), fields, tiles, precision, kernel=lm.config.head_kernel)
    if mesh is None or mesh.size == 1:
        out = _local(walk, tuple(sides), targets, scored, previous)
    else:
        out = _sharded(walk, mesh, tuple(sides), targets, scored, previous)
    if previous is None:
        out = {k: jnp.roll(v, 1, axis=1) for k, v in out.items()}
    return out


class Head(NamedTuple):
    """What is static about an output head."""

    vocab_axis: int
    cap: float | None


class Walk(NamedTuple):
    """What is static about a walk."""

    heads: tuple[Head, ...]  # the policy's and, if it is compared, the frozen LM's
    fields: tuple[str, ...]  # what is read besides 'logps'
    tiles: tuple[int, int]
    precision: str
    kernel: str = "xla"  # of HEAD_KERNELS
    mesh_axes: tuple[str, ...] = ()  # non-empty inside shard_map
    split: bool = False  # the vocabulary is split over the mesh axis 'model'

    @property
    def laws(self) -> tuple[str, ...]:
        """'p' is the policy, 'r' the frozen LM that it is compared with."""
        return ("p", "r")[: len(self.heads)]


def _local(walk, sides, targets, scored, columns):
    n, t = targets.shape
    sides = tuple((h.reshape(n * t, -1), w) for h, w in sides)
    source = None
    if columns is not None:
        source = (columns + t * jnp.arange(n)[:, None]).reshape(-1)
    run = _pallas if _takes_pallas(walk) else _walk
    out = run(walk, sides, targets.reshape(-1), scored.reshape(-1), source)
    return {k: v.reshape(n, t) for k, v in out.items()}


def _takes_pallas(walk) -> bool:
    """Whether the Pallas kernels do this walk; if they are asked for and do not, why."""
    if walk.kernel == "xla":
        return False
    reads = (*walk.fields, *(["a frozen LM"] if len(walk.heads) > 1 else []))
    where = _platform()
    if where == "tpu" or (where == "cpu" and not walk.mesh_axes):
        why = f"{', '.join(reads)} asked for" if reads else ""
    else:
        why = f"platform {where}"
    if why:
        _say_once(f"head_kernel='pallas': XLA's walk instead, {why}")
    return not why


def _pallas(walk, sides, targets, scored, source):
    (h, weight), head = sides[0], walk.heads[0]
    kernel = pallas_head.Kernel(
        head.vocab_axis, head.cap, axis="model" if walk.split else "",
        interpret=_platform() == "cpu",
    )  # fmt: skip
    targets = targets - _first_column(walk, weight)
    return {"logps": pallas_head.logps(kernel, h, weight, targets, scored, source)}


def _platform() -> str:
    """What is compiled for: the default device's, which may be one that is only described."""
    device = getattr(jax.config, "jax_default_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


@functools.cache
def _say_once(line: str) -> None:
    log.warning(line)


def _sharded(walk, mesh, sides, targets, scored, columns):
    """The walk on each shard of tokens. Transposes of the casts sum gradients."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if targets.shape[0] % shards:
        raise ValueError(
            f"{targets.shape[0]} rows do not divide over data*fsdp={shards} shards"
        )
    v = sides[0][1].shape[walk.heads[0].vocab_axis]
    split = v % mesh.shape["model"] == 0
    gather = [
        w.shape[1 - head.vocab_axis] % mesh.shape["fsdp"] == 0
        for (_, w), head in zip(sides, walk.heads, strict=True)
    ]
    tokens_spec = P(("data", "fsdp"))
    specs = []
    for head, gathered in zip(walk.heads, gather, strict=True):
        names = ("model" if split else None, "fsdp" if gathered else None)
        specs.append(
            (tokens_spec, P(*(names if head.vocab_axis == 0 else names[::-1])))
        )
    axes = ("data", "fsdp", "model") if split else ("data", "fsdp")
    walk = walk._replace(mesh_axes=axes, split=split)

    def shard(sides, targets, scored, columns):
        whole = []
        for (h, w), head, gathered in zip(sides, walk.heads, gather, strict=True):
            if gathered:
                w = jax.lax.all_gather(w, "fsdp", axis=1 - head.vocab_axis, tiled=True)
            if split:
                h = _vary(h, ("model",))
            whole.append((h, _vary(w, ("data",) if gathered else ("data", "fsdp"))))
        return _local(walk, tuple(whole), targets, scored, columns)

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(tuple(specs), *[tokens_spec] * 3),
        out_specs=tokens_spec,
    )(sides, targets, scored, columns)  # fmt: skip


def _vary(x, axes):
    """Marks a replicated value as each shard's own; the transpose sums over `axes`."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(walk, sides, targets, scored, source):
    """{'logps', *walk.fields: [M]} of `targets` where `scored`, else 0; h is [M, D].

    `source` [M] is the row of h that predicts a target, several may have the same; None
    is its own.
    """
    return _forward(walk, sides, targets, scored, source)[0]


def _plan(walk, sides, scored):
    """Scored positions first, in tiles: (positions, number of tiles, sizes)."""
    m, v = scored.shape[0], sides[0][1].shape[walk.heads[0].vocab_axis]
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


def _dot(walk, a, b, contract):
    return jax.lax.dot_general(
        a, b, ((contract[:1], contract[1:]), ((), ())),
        precision=walk.precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _logits(walk, head, x, weight, j, vb):
    """Vocabulary tile j: its logits, weights, first column, and which columns are new.

    The last tile is moved back to end at V; columns already seen are masked.
    """
    v = weight.shape[head.vocab_axis]
    start = jnp.minimum(j * vb, v - vb)
    w = jax.lax.dynamic_slice_in_dim(weight, start, vb, head.vocab_axis).astype(x.dtype)
    z = transformer.softcap(_dot(walk, x, w, (1, 1 - head.vocab_axis)), head.cap)
    return z, w, start, (start + jnp.arange(vb) >= j * vb)[None]


def _first_column(walk, weight):
    """Vocabulary id of this shard's first column."""
    if not walk.split:
        return 0
    return jax.lax.axis_index("model") * weight.shape[walk.heads[0].vocab_axis]


def _take(x, at):
    """Rows `at` of x; zeros for the positions that are nowhere."""
    return x.at[at].get(mode="fill", fill_value=0)


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


def _heads(source, at):
    """Which rows of h the targets `at` are predicted from; nowhere stays nowhere."""
    if source is None:
        return at
    return source.at[at].get(mode="fill", fill_value=len(source))


def _forward(walk, sides, targets, scored, source):
    order, num_tiles, c, vb, num_blocks = _plan(walk, sides, scored)
    offset = _first_column(walk, sides[0][1])

    def tile(i, carry):
        at = jax.lax.dynamic_slice_in_dim(order, i * c, c)
        xs = [_take(h, _heads(source, at)) for h, _ in sides]
        y = _take(targets, at) - offset

        def block(j, carry):
            tops, sums, target = carry
            tiles = [
                _logits(walk, head, x, w, j, vb)
                for head, x, (_, w) in zip(walk.heads, xs, sides, strict=True)
            ]
            z, _, start, new = tiles[0]
            here = _sums(walk, [z for z, *_ in tiles], new)
            top = jax.tree.map(jnp.maximum, tops, here[0])
            sums = jax.tree.map(
                jnp.add, _rescale(tops, sums, top), _rescale(here[0], here[1], top)
            )
            hit = (y[:, None] == (start + jnp.arange(vb))[None]) & new
            return top, sums, target + jnp.where(hit, z, 0.0).sum(-1)

        zero = _vary(jnp.zeros(c, jnp.float32), walk.mesh_axes)
        names = walk.laws + tuple(SUMS[field] for field in walk.fields)
        first = (
            {law: zero + jnp.finfo(jnp.float32).min for law in walk.laws},
            dict.fromkeys(names, zero),
            zero,
        )
        tops, sums, target = jax.lax.fori_loop(0, num_blocks, block, first)
        if walk.split:
            top = jax.tree.map(lambda x: jax.lax.pmax(x, "model"), tops)
            sums = jax.lax.psum(_rescale(tops, sums, top), "model")
            tops, target = top, jax.lax.psum(target, "model")
        found = _fields(walk, tops, sums, target)
        return {k: v.at[at].set(found[k], mode="drop") for k, v in carry.items()}

    zeros = _vary(
        jnp.zeros(scored.shape, jnp.float32),
        tuple(a for a in walk.mesh_axes if a != "model"),
    )
    lses = ("lse", "other_lse")[: len(walk.heads)]
    carry = dict.fromkeys((*lses, "logps", *walk.fields), zeros)
    read = jax.lax.fori_loop(0, num_tiles, tile, carry)
    out = {k: v for k, v in read.items() if k not in lses}
    return out, (sides, targets, scored, source, read)


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
    order, num_tiles, c, vb, num_blocks = _plan(walk, sides, scored)
    offset = _first_column(walk, weight)

    def tile(i, carry):
        dh, dweight = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * c, c)
        xs = [_take(h, _heads(source, at)) for h, _ in sides]
        y = _take(targets, at) - offset
        g_x, read_x = jax.tree.map(lambda v: _take(v, at)[:, None], (g, read))

        def block(j, carry):
            dx, dweight = carry
            tiles = [
                _logits(walk, head, x, w, j, vb)
                for head, x, (_, w) in zip(walk.heads, xs, sides, strict=True)
            ]
            z, w, start, new = tiles[0]
            hit = y[:, None] == (start + jnp.arange(vb))[None]
            dz = _slope(walk, g_x, read_x, [z for z, *_ in tiles], hit)
            if head.cap is not None:
                dz = dz * (1 - (z / head.cap) ** 2)
            # Repeated columns of the last tile add nothing.
            dz = jnp.where(new, dz, 0.0).astype(h.dtype)
            dx = dx + _dot(walk, dz, w, (1, head.vocab_axis))
            left, right = (dz, xs[0]) if head.vocab_axis == 0 else (xs[0], dz)
            old = jax.lax.dynamic_slice_in_dim(dweight, start, vb, head.vocab_axis)
            dweight = jax.lax.dynamic_update_slice_in_dim(
                dweight, old + _dot(walk, left, right, (0, 0)), start, head.vocab_axis
            )
            return dx, dweight

        dx = _vary(jnp.zeros(xs[0].shape, jnp.float32), walk.mesh_axes)
        dx, dweight = jax.lax.fori_loop(0, num_blocks, block, (dx, dweight))
        dh = dh.at[_heads(source, at)].add(dx.astype(h.dtype), mode="drop")
        return dh, dweight

    zeros = (jnp.zeros(h.shape, h.dtype), jnp.zeros(weight.shape, jnp.float32))
    zeros = tuple(_vary(z, walk.mesh_axes) for z in zeros)
    dh, dweight = jax.lax.fori_loop(0, num_tiles, tile, zeros)
    frozen = (None,) * (len(sides) - 1)
    return ((dh, dweight.astype(weight.dtype)), *frozen), None, None, None


_walk.defvjp(_forward, _backward)
