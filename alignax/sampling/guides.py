"""Guides: what tilts a law token by token, as a pair of pure functions.

  π*(v | s) ∝ p(v | s) exp(g(s, v))      with p after every warper, g in nats

A guide says g with a temperature of its own already inside. Three kinds, by what one
call of it knows:

  vector  g of every next token at every position: a difference of two LMs, a Q-head
  scalar  V of every prefix, and g(s, v) = V(s v): a value head, a reward of partial text
  block   a number for a whole block of tokens

Any of the functions may be `jax.tree_util.Partial(function, lms)`: its arguments are
then arguments of the compiled program, and not constants in it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

KINDS = ("vector", "scalar", "block")


def at_prefix(states: Any, accepted: Int[Array, " N"]) -> Any:
    """The state after `accepted` tokens, of states [N, K + 1, ...]."""
    row = jnp.arange(accepted.shape[0])
    return jax.tree.map(lambda x: x[row, accepted], states)


def by_position(states: Any, accepted: Int[Array, " N"]) -> Any:
    """For a state that is a cache: what lies beyond the prefix is never read."""
    del accepted
    return states


class Guide(NamedTuple):
    """optax's pair, and what verification has to know of it.

    Attributes:
      init: (tokens [N, P], lengths [N], length) -> state, before the last token of
        every prompt; a row will never have more than `length` tokens. Every leaf has N
        rows first.
      update: (state, tokens [N, K], start [N], logits [N, K, V]) -> (out, states), where
        tokens stand at positions start .. start + K - 1. Of a vector, out is the logits
        [N, K, V] of the next token after each, tilted: -inf stays -inf. Of a scalar,
        out is V [N, K] of the prefix that ends with each, and logits is None. Of a
        block, out is one number [N].
      kind: one of KINDS.
      lo: g is never below it.
      hi: g is never above it. Rejection is exact only if this is true.
      keep: (states, accepted [N]) -> the state after that many of the K tokens: at_prefix
        for states that `update` gives as [N, K + 1, ...]; by_position for a cache.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    kind: str = "vector"
    lo: float = -math.inf
    hi: float = math.inf
    keep: Callable[..., Any] = at_prefix


def traced(guide: Guide) -> tuple[Partial, Partial, Partial]:
    """init, update and keep as arguments for a compiled function.

    Raises:
      ValueError: an unknown kind, or bounds in the wrong order.
    """
    if guide.kind not in KINDS:
        raise ValueError(f"guide.kind is {guide.kind!r}, expected one of {KINDS}")
    if not guide.lo <= guide.hi:
        raise ValueError(f"guide.lo={guide.lo} is above guide.hi={guide.hi}")
    init, update, keep = (
        f if isinstance(f, Partial) else Partial(f)
        for f in (guide.init, guide.update, guide.keep)
    )
    return init, update, keep


def step(
    guide: tuple[Callable, Callable, Callable],
    state: Any,
    token: Int[Array, " N"],
    start: Int[Array, " N"],
    logits: Float[Array, "N V"] | None,
) -> tuple[Array, Any]:
    """One token further.

    Args:
      guide: init, update and keep.
      state: before the token.
      token: it.
      start: where it stands.
      logits: of the next token, for kind vector.

    Returns:
      (what `update` gives for that place: the tilted logits, or a value; the state after).
    """
    _, update, keep = guide
    given = None if logits is None else logits[:, None]
    out, states = update(state, token[:, None], start, given)
    return out[:, 0], keep(states, jnp.ones_like(token, jnp.int32))


def over_best(
    update: Callable[..., Any],
    state: Any,
    start: Int[Array, " N"],
    logits: Float[Array, "N V"],
    candidates: int,
) -> Float[Array, "N V"]:
    """The tilted law of a scalar guide over the best tokens; -inf off them.

    Args:
      update: the guide's.
      state: before the next token.
      start: where it stands.
      logits: the law to tilt; of equal ones the lower id is the better.
      candidates: how many of the best; a top-k of its own.
    """
    n = len(logits)
    best, ids = jax.lax.top_k(logits, candidates)
    value = at_each(update, state, start, ids)
    # -inf + NaN is NaN: only what may be drawn can be wrong
    best = jnp.where(jnp.isneginf(best), best, best + value)
    return jnp.full_like(logits, -jnp.inf).at[jnp.arange(n)[:, None], ids].set(best)


def at_each(
    update: Callable[..., Any],
    state: Any,
    start: Int[Array, " N"],
    ids: Int[Array, "N K"],
) -> Float[Array, "N K"]:
    """V of each row's prefix followed by each of K alternative tokens, in one call."""
    k = ids.shape[1]
    wide = jax.tree.map(lambda x: jnp.repeat(x, k, 0), state)
    value, _ = update(wide, ids.reshape(-1, 1), jnp.repeat(start, k), None)
    return value.reshape(ids.shape)


def chain(*guides: Guide) -> Guide:
    """The sum of guides of one kind: g = g_1 + g_2 + ...

    Raises:
      ValueError: no guide, or guides of different kinds.
    """
    kinds = {g.kind for g in guides}
    if len(kinds) != 1:
        raise ValueError(
            f"chain of guides of kinds {sorted(kinds)}: expected at least one, all of one "
            "kind"
        )
    parts = tuple(traced(g) for g in guides)
    return Guide(
        Partial(_chain_init, parts),
        Partial(_chain_vector if kinds == {"vector"} else _chain_sum, parts),
        kinds.pop(),
        sum(g.lo for g in guides),
        sum(g.hi for g in guides),
        Partial(_chain_keep, parts),
    )


def _chain_init(parts, tokens, lengths, length):
    return tuple(init(tokens, lengths, length) for init, _, _ in parts)


def _chain_vector(parts, states, tokens, start, logits):
    after = []
    for (_, update, _), state in zip(parts, states, strict=True):
        logits, new = update(state, tokens, start, logits)
        after.append(new)
    return logits, tuple(after)


def _chain_sum(parts, states, tokens, start, logits):
    values, after = zip(
        *(
            update(state, tokens, start, logits)
            for (_, update, _), state in zip(parts, states, strict=True)
        ),
        strict=True,
    )
    return sum(values[1:], values[0]), after


def _chain_keep(parts, states, accepted):
    return tuple(
        keep(state, accepted) for (_, _, keep), state in zip(parts, states, strict=True)
    )
