"""Guides: they tilt the distribution of each next token, as a pair of pure functions.

  π*(v | s) ∝ p(v | s) exp(g(s, v))      with p after all logits processors, g in nats

A temperature of the guide is already a part of g. There are three kinds, by what one call
returns:

  vector  g of every next token at every position: a difference of two LMs, a Q-head
  scalar  V of every prefix, and g(s, v) = V(s v): a value head, a reward of partial text
  block   one number for a whole block of tokens

Each function may be a `jax.tree_util.Partial(function, lms)`: `lms` are then arguments of
the compiled program, and not constants in it.
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
    """The state itself: a KV cache, of which nothing after the prefix is ever read."""
    del accepted
    return states


class Guide(NamedTuple):
    """A pair of functions as in optax, and what verification reads.

    Attributes:
      init: (tokens [N, P], lengths [N], length) -> state, before the last token of
        every prompt; no row gets more than `length` tokens. The first axis of every leaf
        is N.
      update: (state, tokens [N, K], start [N], logits [N, K, V]) -> (out, states), where
        tokens stand at positions start .. start + K - 1. Of a vector, out is the logits
        [N, K, V] of the next token after each, tilted: -inf stays -inf. Of a scalar,
        out is V [N, K] of the prefix that ends with each, and logits is None. Of a
        block, out is one number [N].
      kind: one of KINDS.
      lo: g is never below it.
      hi: g is never above it. Rejection sampling is exact only if this is true.
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


def reading(
    guide: Guide, prompts: Int[Array, "B P"], lengths: Int[Array, " B"]
) -> Guide:
    """The guide on other prompts than the target's, each followed by the same response.

    With the target itself as the model of a guide this is classifier-free guidance (Sanchez
    et al. 2023, https://arxiv.org/abs/2306.17806), context-aware decoding (Shi et al. 2023,
    https://arxiv.org/abs/2305.14739) or a contrast of system prompts.

    Args:
      guide: of any kind.
      prompts: ids, right-padded, one for each prompt of the call.
      lengths: real tokens of each, at least 1.
    """
    init, update, keep = traced(guide)
    return guide._replace(
        init=Partial(_init_elsewhere, init, prompts, lengths),
        update=Partial(_update_elsewhere, update), keep=Partial(_keep_elsewhere, keep),
    )  # fmt: skip


class Elsewhere(NamedTuple):
    """The state of a guide on another prompt."""

    state: Any  # of the guide itself
    shift: Int[Array, " N"]  # its positions less those of the target
    first: Int[Array, " N"]  # position of the target's last token of the prompt
    last: Int[Array, " N"]  # the guide's last token of the prompt, in its place


def _init_elsewhere(init, prompts, sizes, tokens, lengths, length):
    del tokens
    state = init(prompts, sizes, prompts.shape[1] + length)
    last = jnp.take_along_axis(prompts, sizes[:, None] - 1, 1)[:, 0]
    return Elsewhere(state, sizes - lengths, lengths - 1, last)


def _update_elsewhere(update, here, tokens, start, logits):
    at = start[:, None] + jnp.arange(tokens.shape[1])
    tokens = jnp.where(at == here.first[:, None], here.last[:, None], tokens)
    out, states = update(here.state, tokens, start + here.shift, logits)
    return out, here._replace(state=states)


def _keep_elsewhere(keep, states, accepted):
    return states._replace(state=keep(states.state, accepted))


def step(
    guide: tuple[Callable, Callable, Callable],
    state: Any,
    token: Int[Array, " N"],
    start: Int[Array, " N"],
    logits: Float[Array, "N V"] | None,
) -> tuple[Array, Any]:
    """The guide after one more token.

    Args:
      guide: init, update and keep.
      state: before the token.
      token: the token.
      start: its position.
      logits: of the next token, for kind vector.

    Returns:
      (what `update` returns for that position, tilted logits or a value; the next state).
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
    """Logits tilted by a scalar guide on the best tokens; -inf for all others.

    Args:
      update: the guide's.
      state: before the next token.
      start: its position.
      logits: to tilt; of equal ones the lower id ranks first.
      candidates: how many of the best tokens; a second top-k.
    """
    n = len(logits)
    best, ids = jax.lax.top_k(logits, candidates)
    value = at_each(update, state, start, ids)
    # -inf + NaN is NaN: a NaN matters only where a token may be drawn
    best = jnp.where(jnp.isneginf(best), best, best + value)
    return jnp.full_like(logits, -jnp.inf).at[jnp.arange(n)[:, None], ids].set(best)


def at_each(
    update: Callable[..., Any],
    state: Any,
    start: Int[Array, " N"],
    ids: Int[Array, "N K"],
) -> Float[Array, "N K"]:
    """V [N, K] of each row's prefix with each of K alternative next tokens, in one call."""
    k = ids.shape[1]
    wide = jax.tree.map(lambda x: jnp.repeat(x, k, 0), state)
    value, _ = update(wide, ids.reshape(-1, 1), jnp.repeat(start, k), None)
    return value.reshape(ids.shape)


def chain(*guides: Guide) -> Guide:
    """The composition of guides of one kind, from the first to the last.

    Kind vector: each guide tilts the logits that the ones before it give. If their tilts do
    not depend on these logits this is a sum, g = g_1 + g_2 + ...; otherwise the order
    matters: nudging replaces the logits, and a contrastive guide masks the less likely
    tokens. Kinds scalar and block: the sum of their values.

    Args:
      *guides: at least one; each state is kept beside the others.

    Returns:
      A Guide of their kind; lo and hi are the sums of theirs.

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
