"""State of a response: what processors, grammars and stops need of its tokens so far.

One set of rules for `decode`, which emits one token at a time, and for `speculate`, which
emits several and rejects some of them.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignax.sampling.automaton import Automaton
from alignax.sampling.processors import Processors, process


class Rules(NamedTuple):
    """Generation settings of every row; None compiles to nothing."""

    processors: Processors
    eos: Int[Array, " E"]
    min_new: Int[Array, " N"] | None = None  # fewest tokens, with EOS
    limits: Int[Array, " N"] | None = None  # tokens
    stops: Automaton | None = None
    grammar: Automaton | None = None
    forced: Int[Array, "N F"] | None = None  # the first tokens; -1 is free
    in_prompt: Bool[Array, "N V"] | None = None  # repetition penalty only

    @property
    def masks(self) -> bool:
        """Whether they could leave a row no token to draw."""
        given = (self.processors.bias, self.min_new, self.grammar)
        return any(x is not None for x in given)


def apart(rules: Rules) -> tuple[Rules, Rules]:
    """(settings that all rows share, settings of each row); None in place of the others."""
    w, no = cast(Any, rules.processors), cast(Any, None)
    each = w.temperature.ndim > 0
    biased = w.bias is not None and w.bias.ndim > 1
    shared = Processors(no if each else w.temperature, bias=None if biased else w.bias)
    own = w._replace(
        temperature=w.temperature if each else None, bias=w.bias if biased else None
    )
    row = rules._replace(processors=own, eos=no, stops=None, grammar=None)
    common = Rules(shared, rules.eos, stops=rules.stops, grammar=rules.grammar)
    return common, row


def joined(shared: Rules, own: Rules) -> Rules:
    """The rules that `apart` took apart, with the same or with other rows."""

    def pick(shared: Any, own: Any) -> Any:
        return shared if own is None else own

    w = Processors(*map(pick, shared.processors, own.processors))
    return Rules(w, *map(pick, shared[1:], own[1:]))


class ResponseState(NamedTuple):
    """The response of each row so far, as far as the rules depend on it."""

    new: Int[Array, " N"]  # number of tokens
    counts: Int[Array, "N V"] | None = None
    stops: Int[Array, " N"] | None = None  # states
    grammar: Int[Array, " N"] | None = None  # states


def begin(
    rules: Rules, prompts: Int[Array, "N P"], lengths: Int[Array, " N"], size: int
) -> tuple[Rules, ResponseState]:
    """The rules with what they need of the prompt, and the state of empty responses.

    Args:
      rules: of N rows.
      prompts: ids, right-padded.
      lengths: real tokens of each.
      size: V.
    """
    n = len(prompts)
    if rules.processors.repetition is not None:
        real = jnp.arange(prompts.shape[1]) < lengths[:, None]
        at = jnp.where(real, prompts, size)  # padding is out of bounds and dropped
        in_prompt = jnp.zeros((n, size), bool)
        in_prompt = in_prompt.at[jnp.arange(n)[:, None], at].set(True, mode="drop")
        rules = rules._replace(in_prompt=in_prompt)
    origin = jnp.zeros(n, jnp.int32)
    return rules, ResponseState(
        origin,
        jnp.zeros((n, size), jnp.int32) if rules.processors.counts else None,
        origin if rules.stops else None,
        origin if rules.grammar else None,
    )


def processed_logits(
    rules: Rules, state: ResponseState, logits: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """Steps 1 to 4 of `processors`, for the next token."""
    allowed = None
    if rules.grammar is not None:
        allowed = jnp.asarray(rules.grammar.flag)[state.grammar]
    if rules.min_new is not None:
        is_eos = jnp.zeros(logits.shape[1], bool).at[rules.eos].set(True)
        late = (state.new + 1 >= rules.min_new)[:, None] | ~is_eos
        allowed = late if allowed is None else allowed & late
    return process(
        logits,
        rules.processors,
        counts=state.counts,
        prompt=rules.in_prompt,
        allowed=allowed,
    )


def force(
    rules: Rules, state: ResponseState, logits: Float[Array, "N V"]
) -> Float[Array, "N V"]:
    """A forced next token gets all of the probability; applied after the guide."""
    if rules.forced is None:
        return logits
    many = rules.forced.shape[1]
    row = jnp.arange(len(logits))
    given = rules.forced[row, jnp.minimum(state.new, many - 1)]
    is_given = (state.new < many) & (given >= 0)
    is_it = jnp.arange(logits.shape[1]) == given[:, None]
    return jnp.where(is_given[:, None], jnp.where(is_it, 0.0, -jnp.inf), logits)


def advance(
    rules: Rules, state: ResponseState, token: Int[Array, " N"], live: Bool[Array, " N"]
) -> tuple[ResponseState, Bool[Array, " N"], Bool[Array, " N"]]:
    """One more token of every live row.

    Returns:
      (state, ended: by EOS or a stop, done: by these or by the limit). A row that is not
      live keeps its state; its `ended` and `done` have no meaning.
    """
    row = jnp.arange(len(token))
    new = state.new + live
    ended = (token[:, None] == rules.eos[None]).any(-1)
    counts, stops, grammar = state.counts, state.stops, state.grammar
    if counts is not None:
        counts = counts.at[row, token].add(live)
    if rules.stops is not None and stops is not None:
        hit = jnp.asarray(rules.stops.flag)[stops, token]
        ended |= hit if rules.min_new is None else hit & (new >= rules.min_new)
        stops = jnp.where(live, jnp.asarray(rules.stops.next)[stops, token], stops)
    if rules.grammar is not None and grammar is not None:
        after = jnp.asarray(rules.grammar.next)[grammar, token]
        grammar = jnp.where(live, after, grammar)
    done = ended if rules.limits is None else ended | (new >= rules.limits)
    return ResponseState(new, counts, stops, grammar), ended, done


def sampled_logps(
    logits: Float[Array, "N *K V"], temperature: Float[Array, "*rows"]
) -> Float[Array, "N *K V"]:
    """Log-probabilities of the sampling distribution, normalised.

    At temperature 0 the best token has probability 1. So has some token where none is left
    to draw: the caller has to refuse that; positions before it are not affected.

    Args:
      logits: processed, which includes the division by the temperature.
      temperature: one for all, or [N]; only whether it is 0 is read.
    """
    best = jnp.argmax(logits, -1, keepdims=True) == jnp.arange(logits.shape[-1])
    certain = ~jnp.isfinite(logits.max(-1, keepdims=True))
    if temperature.ndim:
        certain |= (temperature == 0).reshape(-1, *[1] * (logits.ndim - 1))
    sure = jnp.where(best, 0.0, -jnp.inf)
    return jnp.where(certain, sure, jax.nn.log_softmax(logits))


def draw(
    keys: Array, logits: Float[Array, "N V"], temperature: Float[Array, "*rows"]
) -> tuple[Int[Array, " N"], Float[Array, "N V"]]:
    """A token of each row, and the log-probabilities that it was drawn from."""
    logps = sampled_logps(logits, temperature)
    return jax.vmap(categorical)(keys, logps), logps


BLOCK = 256  # tokens
DRAWS = 2  # raised when the same key draws other tokens


def categorical(key: Array, logps: Float[Array, " V"]) -> Int[Array, ""]:
    """A draw from normalised log-probabilities: of a block of tokens, then of one in it.

    It needs two random numbers, where `jax.random.categorical` needs one for each of V
    tokens: on a CPU that was most of the time of a draw.
    """
    size = len(logps)
    blocks = jnp.pad(logps, (0, -size % BLOCK), constant_values=-jnp.inf)
    mass = jnp.exp(blocks.reshape(-1, BLOCK))
    first, second = jax.random.uniform(key, (2,))
    block = _inverse(mass.sum(1), first)
    return block * BLOCK + _inverse(mass[block], second)


def _inverse(mass: Float[Array, " M"], u: Float[Array, ""]) -> Int[Array, ""]:
    """The place at which the cumulative mass exceeds a share u < 1; one that has some."""
    total = jnp.cumsum(mass)
    beyond = (total > u * total[-1]) & (mass > 0)
    return jnp.where(beyond.any(), jnp.argmax(beyond), jnp.argmax(mass))
