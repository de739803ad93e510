"""THE kernel: log-probabilities from hidden states, without an array of [N, T, V].

Only this module shifts tokens by one and normalises logits. It loops over tiles of the
vocabulary in XLA (`xla_head`), which also computes the other fields of `Scores`, or calls
Pallas kernels (`pallas_head`) where a config asks for them.

A row is a response as it stands in the batch. If the batch has a layout, a row holds packed
responses, and tokens that responses share are computed once; the values are the same.

The temperature is 1 unless a caller names another: training, reference, sampler and guidance
agree on what a log-probability is. Where responses were sampled at another one, `score` at
that temperature gives the log-probabilities of the distribution that was sampled. Under a mesh the loop runs inside `shard_map`: tokens stay where they
are, the head is gathered over `fsdp`, the vocabulary stays split over `model`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignax.batch import COMPARED, LM, Batch, Layout, Scores, flatten
from alignax.models import attention, fallback, pallas_head, transformer, xla_head
from alignax.models.xla_head import FIXED, READ, Allowed, Head, Tiling

TOKEN_TILE, VOCAB_TILE = 256, 4096  # one logit tile is 4 MiB
VALUES = ("values", "state_values")  # the value head after a token, and before it


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


def rows(
    lm: LM, h: Float[Array, "N K D"], *, whole: bool = True
) -> Float[Array, "N K V"]:
    """Log-probabilities of every next token in nats, for a few positions.

    For decoding: a sampler needs the whole distribution.

    Args:
      lm: the model.
      h: hidden states.
      whole: under `transformer.limit_ids`, normalise over the whole table, as the kernel
        does; the ids that are left do not sum to 1 then. False: over these ids.
    """
    logps = jax.nn.log_softmax(transformer.unembed(lm, h, whole=whole), -1)
    return logps[..., : lm.config.vocab_size]


def score(
    lm: LM,
    batch: Batch,
    *,
    needs: tuple[str, ...] = (),
    kl_to: LM | None = None,
    mesh: Mesh | None = None,
    tiles: tuple[int, int] = (TOKEN_TILE, VOCAB_TILE),
    precision: str = "highest",
    temperature: float = 1.0,
    grammar: Bool[Array, "S V"] | Bool[np.ndarray, "S V"] | None = None,
) -> Scores:
    """Scores a batch under an LM: every loss gets its Scores from here.

    Args:
      lm: the model; differentiable in its parameters.
      batch: [B, G, T]; only positions where `mask` is True are unembedded.
      needs: fields of Scores to return besides `logps`. Names of fields of the batch
        (such as 'ref_logps') are ignored here.
      kl_to: the frozen LM that 'kl' and 'forward_kl' compare with; no gradient reaches
        it. Its ids mean the same tokens; the architecture may differ, and the number
        of ids (one tokenizer, tables padded differently): then both distributions are
        restricted to the common ids and renormalised in these two fields.
      mesh: devices that hold the batch; None for a single device.
      tiles: tokens and vocabulary entries per logit tile.
      precision: of the head matmul (on TPU, float32 runs in bf16 passes unless raised).
      temperature: τ > 0, static; every distribution, also that of `kl_to`, is
        softmax(logits / τ). Values have none.
      grammar: which ids may follow in each state; then every distribution, also that of
        `kl_to`, is renormalised over these ids. `batch.extra['grammar_states']` [B, G, T]
        holds the state in front of each token. None: all ids may follow.

    Returns:
      Scores with `logps[b, g, t] = log p(tokens[t] | tokens[<t])` in nats. With 'values',
      `values[b, g, t]` is the value head on the prefix that ends with token t; with
      'state_values', `state_values[b, g, t]` is the value head on the prefix that ends
      before it. The fields in READ and FIXED describe the distribution of tokens[t] given
      tokens[<t], in nats; no gradient passes through those in FIXED. Every field is [B, G, T] and exactly 0 where mask is False.

    Raises:
      ValueError: values of a model without a value head; a KL without `kl_to`; an LM of
        another tokenizer; B that the mesh does not divide; τ ≤ 0; a grammar without states.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    check_tokenizer(lm)
    inputs = _plain(batch) if batch.layout is None else _packed(batch, batch.layout)
    fields = tuple(n for n in READ + FIXED if n in needs)
    other = None
    if compared := [n for n in fields if n in COMPARED]:
        other = _frozen(kl_to, inputs, compared)
    h = _hidden(lm, inputs)
    tokens, scored = inputs.tokens, inputs.scored
    allowed = None if grammar is None else Allowed(jnp.asarray(grammar), _states(batch))
    read = _read(
        lm, h, tokens, scored, mesh, tiles, precision, fields, other, inputs.previous,
        temperature, allowed,
    )  # fmt: skip
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
    """The inputs of an LM from a batch, with one row per response or packed."""

    tokens: Int[Array, "N T"]
    scored: Bool[Array, "N T"]
    positions: Int[Array, "N T"] | None = None
    attend: attention.Attend | None = None
    previous: Int[Array, "N T"] | None = (
        None  # column that predicts; None: one to the left
    )


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
    fresh = jnp.diff(rows.group, axis=1, prepend=rows.group[:, :1]) != 0
    begins = jnp.where(fresh, jnp.arange(length), 0)
    attend = attention.Attend(
        (rows.group, rows.branch), attention.siblings, jax.lax.cummax(begins, axis=1)
    )
    return Inputs(rows.tokens, rows.scored, rows.positions, attend, rows.previous)


def _states(batch: Batch) -> Int[Array, "N T"]:
    """States of a grammar in front of each token, as the rows that are computed have them."""
    states = (batch.extra or {}).get("grammar_states")
    if states is None:
        raise ValueError(
            "a grammar needs the states of the responses, batch.extra['grammar_states']: "
            "rollouts bring them"
        )
    if batch.layout is None:
        return jnp.asarray(states).reshape(-1, states.shape[-1])
    tokens = batch.layout.tokens
    blocks = len(tokens)
    # what is not scored may be shared with other responses: it has no state
    places = jnp.where(batch.mask, batch.layout.places, tokens[0].size)
    index, states = (jnp.asarray(x).reshape(blocks, -1) for x in (places, states))
    empty = jnp.zeros((blocks, tokens[0].size), jnp.int32)
    packed = jax.vmap(lambda x, i, s: x.at[i].set(s, mode="drop"))(empty, index, states)
    return packed.reshape(-1, tokens.shape[-1])


def _unpack(layout, read, mesh):
    """{field: [B, G, T]} from {field: [S * R, L]}: each response gathers its tokens."""

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
    """x at the token before; 0 for the first token."""
    if inputs.previous is not None:
        return jnp.take_along_axis(x, inputs.previous, 1)
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def check_ids(lm: LM, batch: Batch) -> None:
    """Raises ValueError for an id of a batch, on the host, that an LM does not have."""
    tokens, size = np.asarray(batch.tokens), lm.config.vocab_size
    real = np.arange(tokens.shape[-1]) < np.asarray(batch.lengths)[..., None]
    top = int(np.where(real, tokens, 0).max(initial=0))
    if top >= size:
        raise ValueError(
            f"a row has the id {top}, which is beyond the ids 0..{size - 1} of an LM that "
            "has to read it: take one whose table has a row for it"
        )


def check_tokenizer(lm: LM, name: str = "") -> None:
    """Raises ValueError for an LM whose ids are not those of the run's tokenizer."""
    if lm.config.tokenizer:
        raise ValueError(
            f"the LM {name!r} has another tokenizer than the run, that of "
            f"{lm.config.tokenizer}: the run's ids mean other tokens to it. A reference, a "
            "teacher, a draft and a guide model need the run's tokenizer; rewards.model "
            "reads text"
        )


def _frozen(kl_to, inputs, compared):
    """(the LM to compare with, its hidden states)."""
    if kl_to is None:
        raise ValueError(
            f"{compared} compare with a frozen LM: pass kl_to (config.lms.ref)"
        )
    check_tokenizer(kl_to)
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
    """Log-probability of each token in nats; 0 at t=0 and where `mask` is False.

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
    lm, h, tokens, mask, mesh, tiles, precision, fields=(), other=None, previous=None,
    temperature=1.0, allowed=None,
):  # fmt: skip
    """{field: [N, T]} from hidden states: shifts the targets, then loops over tiles.

    `other` is (frozen LM, its hidden states), for the fields that compare with it.
    `previous` is the column that predicts each token; None is the column to its left.
    `allowed` has the state in front of each token.
    """
    targets, scored = jnp.asarray(tokens), jnp.asarray(mask).at[:, 0].set(False)
    if previous is None:
        targets, scored = (jnp.roll(x, -1, axis=1) for x in (targets, scored))
    weight, axis = transformer.head(lm)
    if allowed is not None:
        flags = _columns(jnp.asarray(allowed.flags), 1, weight.shape[axis])
        states = allowed.states
        if previous is None:
            states = jnp.roll(states, -1, axis=1)
        allowed = Allowed(flags, states)
    sides, common = [(h, weight)], None
    heads = [Head(axis, lm.config.final_softcap, temperature)]
    if other is not None:
        size = weight.shape[axis]
        weight, axis = transformer.head(other[0])
        if weight.shape[axis] < size:  # the columns that are added are never counted
            common = weight.shape[axis]
            weight = _columns(weight, axis, size)
        sides.append((other[1], weight))
        heads.append(Head(axis, other[0].config.final_softcap, temperature))
    tiling = Tiling(tuple(heads), fields, tiles, precision, common=common)
    run = functools.partial(_local, lm.config.head_kernel)
    if mesh is not None and mesh.size > 1:
        run = functools.partial(_sharded, lm.config.head_kernel, mesh)
    out = run(tiling, tuple(sides), targets, scored, previous, allowed)
    if previous is None:
        out = {k: jnp.roll(v, 1, axis=1) for k, v in out.items()}
    return out


def _columns(weight, axis, size):
    """The first `size` columns of a head's weight or of flags, or zeros behind the last."""
    if weight.shape[axis] >= size:
        return jax.lax.slice_in_dim(weight, 0, size, axis=axis)
    grow = [(0, 0), (0, 0)]
    grow[axis] = (0, size - weight.shape[axis])
    return jnp.pad(weight, grow)


def _local(kernel, tiling, sides, targets, scored, columns, allowed):
    n, t = targets.shape
    if tiling.split:  # this shard's columns begin at 0
        width = sides[0][1].shape[tiling.heads[0].vocab_axis]
        targets = targets - jax.lax.axis_index("model") * width
    sides = tuple((h.reshape(n * t, -1), w) for h, w in sides)
    source = None
    if columns is not None:
        source = (columns + t * jnp.arange(n)[:, None]).reshape(-1)
    more = (
        ()
        if allowed is None
        else (allowed._replace(states=allowed.states.reshape(-1)),)
    )
    pallas = _takes_pallas(kernel, tiling, grammar=allowed is not None)
    run = _pallas if pallas else xla_head.read
    out = run(tiling, sides, targets.reshape(-1), scored.reshape(-1), source, *more)
    return {k: v.reshape(n, t) for k, v in out.items()}


def _takes_pallas(kernel, tiling, *, grammar: bool = False) -> bool:
    """Whether the Pallas kernels are used; logs why if they are asked for and cannot be."""
    if kernel == "xla":
        return False
    reads = (
        *tiling.fields, *["a frozen LM"] * (len(tiling.heads) > 1), *["a grammar"] * grammar
    )  # fmt: skip
    where = fallback.platform()
    if where == "tpu" or (where == "cpu" and not tiling.mesh_axes):
        why = f"{', '.join(reads)} asked for" if reads else ""
    else:
        why = f"platform {where}"
    if why:
        fallback.say_once(f"head_kernel='pallas': XLA's loop over tiles instead, {why}")
    return not why


def _pallas(tiling, sides, targets, scored, source):
    (h, weight), head = sides[0], tiling.heads[0]
    kernel = pallas_head.Kernel(
        head.vocab_axis, head.cap, axis="model" if tiling.split else "",
        interpret=fallback.platform() == "cpu", temperature=head.temperature,
    )  # fmt: skip
    return {"logps": pallas_head.logps(kernel, h, weight, targets, scored, source)}


def _sharded(kernel, mesh, tiling, sides, targets, scored, columns, allowed):
    """`_local` on each shard of tokens. Transposes of the casts sum gradients."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if targets.shape[0] % shards:
        raise ValueError(
            f"{targets.shape[0]} rows do not divide over data*fsdp={shards} shards"
        )
    v = sides[0][1].shape[tiling.heads[0].vocab_axis]
    split = v % mesh.shape["model"] == 0
    if split:  # a shard has the same ids of both heads
        sides = tuple(
            (h, w if w.shape[head.vocab_axis] == v else _columns(w, head.vocab_axis, v))
            for (h, w), head in zip(sides, tiling.heads, strict=True)
        )
    gather = [
        w.shape[1 - head.vocab_axis] % mesh.shape["fsdp"] == 0
        for (_, w), head in zip(sides, tiling.heads, strict=True)
    ]
    tokens_spec = P(("data", "fsdp"))
    specs = []
    for head, gathered in zip(tiling.heads, gather, strict=True):
        names = ("model" if split else None, "fsdp" if gathered else None)
        specs.append(
            (tokens_spec, P(*(names if head.vocab_axis == 0 else names[::-1])))
        )
    axes = ("data", "fsdp", "model") if split else ("data", "fsdp")
    tiling = tiling._replace(mesh_axes=axes, split=split)

    def shard(sides, targets, scored, columns, allowed):
        whole = []
        for (h, w), head, gathered in zip(sides, tiling.heads, gather, strict=True):
            if gathered:
                w = jax.lax.all_gather(w, "fsdp", axis=1 - head.vocab_axis, tiled=True)
            if split:
                h = xla_head.vary(h, ("model",))
            w = xla_head.vary(w, ("data",) if gathered else ("data", "fsdp"))
            whole.append((h, w))
        given = allowed and Allowed(*allowed)
        return _local(kernel, tiling, tuple(whole), targets, scored, columns, given)

    by_state = allowed and (P(None, "model" if split else None), tokens_spec)
    return jax.shard_map(
        shard, mesh=mesh, in_specs=(tuple(specs), *[tokens_spec] * 3, by_state),
        out_specs=tokens_spec,
    )(sides, targets, scored, columns, allowed and tuple(allowed))  # fmt: skip
