"""What a response has said so far, and what that means for its next token.

One set of rules for all who emit tokens: one at a time (`decode`), or several at once of
which some are taken back (`speculate`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignax.sampling.automaton import Automaton
from alignax.sampling.processors import Warpers, warp


class Rules(NamedTuple):
    """What was asked of every row; None compiles to nothing."""

    warpers: Warpers
    eos: Int[Array, " E"]
    least: Int[Array, " N"] | None = None  # tokens before EOS or a stop may end it
    most: Int[Array, " N"] | None = None  # tokens
    stops: Automaton | None = None
    grammar: Automaton | None = None
    forced: Int[Array, "N F"] | None = None  # the first tokens; -1 is free
    said: Bool[Array, "N V"] | None = None  # by the prompt: repetition penalty only

    @property
    def masks(self) -> bool:
        """Whether they could leave a row no token to draw."""
        given = (self.warpers.bias, self.least, self.grammar)
        return any(x is not None for x in given)


class Context(NamedTuple):
    """A response of each row, as far as the rules read it."""

    new: Int[Array, " N"]  # tokens
    counts: Int[Array, "N V"] | None = None
    stops: Int[Array, " N"] | None = None  # states
    grammar: Int[Array, " N"] | None = None  # states


def begin(
    rules: Rules, prompts: Int[Array, "N P"], lengths: Int[Array, " N"], size: int
) -> tuple[Rules, Context]:
    """The empty response, and the rules with what they read of the prompt.

    Args:
      rules: of N rows.
      prompts: ids, right-padded.
      lengths: real tokens of each.
      size: V.
    """
    n = len(prompts)
    if rules.warpers.repetition is not None:
        real = jnp.arange(prompts.shape[1]) < lengths[:, None]
        at = jnp.where(real, prompts, size)  # padding is out of bounds and dropped
        said = jnp.zeros((n, size), bool)
        said = said.at[jnp.arange(n)[:, None], at].set(True, mode="drop")
        rules = rules._replace(said=said)
    origin = jnp.zeros(n, jnp.int32)
    return rules, Context(
        origin,
        jnp.zeros((n, size), jnp.int32) if rules.warpers.counts else None,
        origin if rules.stops else None,
        origin if rules.grammar else None,
    )


def warped(
    rules: Rules, context: Context, logits: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """Steps 1 to 4 of `warpers`, for the next token."""
    allowed = None
    if rules.grammar is not None:
        allowed = jnp.asarray(rules.grammar.flag)[context.grammar]
    if rules.least is not None:
        is_eos = jnp.zeros(logits.shape[1], bool).at[rules.eos].set(True)
        late = (context.new + 1 >= rules.least)[:, None] | ~is_eos
        allowed = late if allowed is None else allowed & late
    return warp(
        logits, rules.warpers, counts=context.counts, prompt=rules.said, allowed=allowed
    )


def force(
    rules: Rules, context: Context, logits: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """Where the next token is given, all of the law is on it; after the guide."""
    if rules.forced is None:
        return logits
    many = rules.forced.shape[1]
    row = jnp.arange(len(logits))
    given = rules.forced[row, jnp.minimum(context.new, many - 1)]
    is_given = (context.new < many) & (given >= 0)
    is_it = jnp.arange(logits.shape[1]) == given[:, None]
    return jnp.where(is_given[:, None], jnp.where(is_it, 0.0, -jnp.inf), logits)


def advance(
    rules: Rules, context: Context, token: Int[Array, " N"], live: Bool[Array, " N"]
) -> tuple[Context, Bool[Array, " N"], Bool[Array, " N"]]:
    """One more token of every live row.

    Returns:
      (context, ended: EOS or a stop ended the row, done: that or its most tokens did);
      a row that is not live keeps its context, and what it has of the others is to be
      ignored.
    """
    row = jnp.arange(len(token))
    new = context.new + live
    ended = (token[:, None] == rules.eos[None]).any(-1)
    counts, stops, grammar = context.counts, context.stops, context.grammar
    if counts is not None:
        counts = counts.at[row, token].add(live)
    if rules.stops is not None and stops is not None:
        hit = jnp.asarray(rules.stops.flag)[stops, token]
        ended |= hit if rules.least is None else hit & (new >= rules.least)
        stops = jnp.where(live, jnp.asarray(rules.stops.next)[stops, token], stops)
    if rules.grammar is not None and grammar is not None:
        after = jnp.asarray(rules.grammar.next)[grammar, token]
        grammar = jnp.where(live, after, grammar)
    done = ended if rules.most is None else ended | (new >= rules.most)
    return Context(new, counts, stops, grammar), ended, done


def law(logits: Float[Array, "N *K V"], w: Warpers) -> Float[Array, "N *K V"]:
    """Log-probabilities, normalised; at temperature 0 the best token is certain.

    So is some token where no token is left to draw: that is the caller's to refuse, and
    does no harm to the places before it.
    """
    best = jnp.argmax(logits, -1, keepdims=True) == jnp.arange(logits.shape[-1])
    certain = ~jnp.isfinite(logits.max(-1, keepdims=True))
    if w.temperature.ndim:
        certain |= (w.temperature == 0).reshape(-1, *[1] * (logits.ndim - 1))
    sure = jnp.where(best, 0.0, -jnp.inf)
    return jnp.where(certain, sure, jax.nn.log_softmax(logits))


def draw(
    keys: Array, logits: Float[Array, "N V"], w: Warpers
) -> tuple[Int[Array, " N"], Float[Array, "N V"]]:
    """A token of each row, and its law's log-probabilities."""
    logps = law(logits, w)
    return jax.vmap(jax.random.categorical)(keys, logps), logps
