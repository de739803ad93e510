"""Sampling token by token: prefill, then all decoding steps in one jitted while-loop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch
from alignax.models import transformer
from alignax.sampling import generation_settings, guides, response_state, weights
from alignax.sampling.automaton import Automaton
from alignax.sampling.guides import Guide
from alignax.sampling.prefill import WHOLE, Reader
from alignax.sampling.prefill import traced as traced_reader
from alignax.sampling.response_state import ResponseState, Rules


class Generated(NamedTuple):
    """Sampled responses as a Batch, and their log-probabilities."""

    batch: Batch  # [B, G, P + max_new]; old_logps is under the sampling distribution
    raw_logps: Float[Array, "B G T"]  # nats, under the unmodified policy
    truncated: Bool[Array, "B G"]  # True where max_new ended a response, not EOS
    stats: dict[str, Any]  # 'steps' taken, 'ended': share of responses that end in EOS


def generate(
    lm: LM,
    prompts: Int[Array, "B P"] | Int[np.ndarray, "B P"],
    lengths: Int[Array, " B"] | Int[np.ndarray, " B"],
    key: Array,
    *,
    max_new: int,
    group: int = 1,
    temperature: Any = 1.0,
    eos_ids: Sequence[int] = (),
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    frequency_penalty: Any = None,
    presence_penalty: Any = None,
    logit_bias: Any = None,
    min_new: Any = None,
    limits: Any = None,
    stops: Automaton | None = None,
    grammar: Automaton | None = None,
    prefill: Any = None,
    prefill_lengths: Any = None,
    forced: Any = None,
    seeds: Any = None,
    reader: Reader = WHOLE,
    guide: Guide | None = None,
    guide_prompts: Any = None,
    guide_lengths: Any = None,
    candidates: int = 16,
) -> Generated:
    """Samples `group` responses per prompt, which share one prefill. *Exact*.

    Exact: each token has the distribution that the settings define (`processors` has
    their order), up to float32. A second call with the same shapes and the same settings
    in use (whatever their values) compiles nothing. The randomness of a row depends on
    (key, row index) alone, or on (key, its seed), not on the other rows.

    A setting "per row" is one number, [B], or [B, G].

    Args:
      lm: the model. Each call copies its layers. Where there are many calls, use
        `weights.kept` on a CPU, and apply `transformer.unstack` on an accelerator.
      prompts: ids, right-padded.
      lengths: real tokens of each prompt, at least 1.
      key: `jax.random.key`.
      max_new: most tokens of a response, EOS included: the shape.
      group: G.
      temperature: per row, of softmax(logits / temperature); 0 is greedy.
      eos_ids: any of them ends a response; it is part of the response and scored.
      top_k: per row; 0 is off.
      top_p: per row, in (0, 1].
      min_p: per row, in [0, 1]: least share of the best token's probability.
      repetition_penalty: per row, above 0, for tokens of the prompt or the response; 1 is
        off.
      frequency_penalty: per row, nats for each occurrence in the response.
      presence_penalty: per row, nats if the response has the token.
      logit_bias: {id: nats} for all rows, [V], or [B, V]; -inf forbids a token.
      min_new: per row, fewest tokens of a response, EOS included: until then EOS is
        masked, and a stop does not stop.
      limits: per row, most tokens of a response, at most max_new: mixed lengths in one
        compiled program.
      stops: from `automaton.stop_strings` or `stop_sequences`; the response ends with the
        token that completes one.
      grammar: tokens that are allowed in each state of the response.
      prefill: ids [B, F], a given beginning of the response. It is not scored: for the
        Batch, penalties and max_new it is a part of the prompt. T grows by F.
      prefill_lengths: real tokens of each prefill, [B]; default F.
      forced: ids [B, F], F <= max_new: the response's first tokens, -1 where it is free.
        They are scored; in old_logps their probability is 1.
      seeds: integers [B]: row (b, g) draws from (key, seeds[b], g) wherever it stands.
      reader: how the model does the prefill; raw_logps are conditioned on it.
      guide: tilts the distribution; of kind vector, or of kind scalar over the
        `candidates` best tokens of each row (a second top-k, before the guide).
      guide_prompts: ids [B, P'] that the guide reads in place of the prompts, each followed
        by the same response: see `guides.reading`.
      guide_lengths: real tokens of each of them, [B]; default P'.
      candidates: see `guide`.

    Returns:
      Generated, with T = P + F + max_new. Under greedy decoding old_logps is 0, and
      raw_logps is the policy's.

    Raises:
      ValueError: an argument out of its range; prompts or a model that the reader
        refuses; a mask that leaves a row no token; a guide that gives NaN.
    """
    reader.check_lm(lm)
    request = generation_settings.parse(
        prompts, lengths, lm.config.vocab_size, max_new=max_new, group=group,
        temperature=temperature, eos_ids=eos_ids, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty, logit_bias=logit_bias, min_new=min_new,
        limits=limits, stops=stops, grammar=grammar, prefill=prefill,
        prefill_lengths=prefill_lengths, forced=forced, seeds=seeds, reader=reader,
    )  # fmt: skip
    check_guide(guide, candidates)
    guide = generation_settings.on_prompts(
        guide, guide_prompts, guide_lengths, len(lengths), lm.config.vocab_size
    )
    greedy = np.ndim(temperature) == 0 and temperature == 0
    lm, made = weights.for_decoding(
        (lm, None if guide is None else guides.traced(guide))
    )
    out, failed = _generate(
        lm, request, key, made,
        traced_reader(reader),
        max_new=max_new, group=group, greedy=bool(greedy),
        kind=None if guide is None else guide.kind,
        candidates=min(candidates, lm.config.vocab_size),
    )  # fmt: skip
    if failed is not None and (failed := np.asarray(failed)).any():
        at = failed.nonzero()[0].tolist()
        raise ValueError(
            f"rows {at} (prompt * group + slot) have no token to draw: the grammar or the "
            "logit bias masks all of them, or the guide gave NaN"
        )
    return out


def check_guide(guide: Guide | None, candidates: int) -> None:
    """Raises ValueError for a guide that does not tilt tokens, or no candidates."""
    if guide is not None and guide.kind == "block":
        raise ValueError("guide.kind is 'block': `generate` takes vector and scalar")
    if candidates < 1:
        raise ValueError(f"candidates={candidates}, expected at least 1")


class Rows(NamedTuple):
    """The N = B x G rows of a call before their first token."""

    lengths: Array  # [N]
    tokens: Array  # [N, T]
    keys: Array  # [N]
    rules: Rules
    response: ResponseState


def start_rows(
    request: generation_settings.Request,
    key: Array,
    size: int,
    max_new: int,
    group: int,
):
    """Rows before their first token; the key of a row does not depend on other rows."""
    n = len(request.prompts) * group
    prompts, lengths = repeat((request.prompts, request.lengths), group)
    row = jnp.arange(n)
    if request.seeds is None:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(row)
    else:
        own = jnp.repeat(request.seeds, group, axis=0)
        keys = keys_of(key, own, row % group)
    real = jnp.arange(prompts.shape[1]) < lengths[:, None]
    tokens = jnp.pad(jnp.where(real, prompts, 0), ((0, 0), (0, max_new)))
    rules, start = response_state.begin(request.rules, prompts, lengths, size)
    return Rows(lengths, tokens, keys, rules, start)


def keys_of(key: Array, seeds: Array, places: Int[Array, " N"]) -> Array:
    """The keys of rows [N], by their seeds [N] and their places in a group."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)
    return jax.vmap(jax.random.fold_in)(keys, places)


def read(lm: LM, h: Array, rules: Rules) -> tuple[Array, Array]:
    """Log-probabilities [N, K, V] after h [N, K, D], and the logits to process."""
    logps = logprob.rows(lm, h)
    if rules.processors.repetition is None:
        return logps, logps
    return logps, transformer.unembed(
        lm, h
    )  # the penalty depends on the sign of the logits


def result(
    tokens, lengths, ends, ended, raw, sampled_logps, group: int, stats
) -> Generated:
    """Rows [N, ...] as Generated."""
    at = jnp.arange(tokens.shape[1])
    mask = (at >= lengths[:, None]) & (at < ends[:, None])

    def split(x):
        return x.reshape(-1, group, *x.shape[1:])

    n = len(tokens)
    batch = Batch(
        split(tokens), split(mask), split(ends), split(jnp.zeros(n)),
        split(jnp.ones(n, bool)),
        old_logps=None if sampled_logps is None else split(sampled_logps),
    )  # fmt: skip
    stats = {"ended": ended.mean(), **stats}
    return Generated(batch, split(raw), split(~ended), stats)


def repeat(tree: Any, group: int) -> Any:
    """Leaves [B, ...] as [N, ...]: each prompt once for every response to it."""
    return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), tree)


class Setup(NamedTuple):
    """What no step changes."""

    lm: LM  # unstacked
    read_on: Callable[..., Any]  # `Reader.step`
    guide: tuple[Callable, Callable, Callable] | None  # init, update, keep
    kind: str | None  # of the guide
    candidates: int
    greedy: bool
    rules: Rules
    keys: Array  # [N]
    row: Array  # [N] 0 .. N - 1


class State(NamedTuple):
    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    ended: Array  # [N] done by EOS or a stop
    h: Array  # [N, 1, D] after the last token
    cache: Any  # of the reader
    raw: Array  # [N, T] nats, under the unmodified policy
    sampled_logps: Array  # [N, T] nats
    response: ResponseState
    guide: Any  # before the last token
    failed: Array | None  # [N] no token to draw


class _Drawn(NamedTuple):
    """The next token of every row."""

    token: Array  # [N]
    raw: Array  # [N] nats, under the unmodified policy
    sampled_logp: Array  # [N] nats
    guide: Any  # before the token
    failed: Array | None  # [N]


@functools.partial(
    jax.jit, static_argnames=("max_new", "group", "greedy", "kind", "candidates")
)
def _generate(
    lm, request, key, guide, reader, *, max_new, group, greedy, kind, candidates
):
    """One token of every row per step, until all are done: (Generated, failed [N])."""
    lm, guide = transformer.unstack((lm, guide))
    read_prompts, read_on = reader
    width = request.prompts.shape[1] + max_new
    rows, start = begin(lm, request, key, guide, read_prompts, width, group, kind)
    setup = Setup(
        lm, read_on, guide, kind, candidates, greedy, for_draws(rows.rules, greedy),
        rows.keys, jnp.arange(len(rows.keys)),
    )  # fmt: skip
    s = jax.lax.while_loop(
        lambda s: (s.step < max_new) & ~s.done.all(),
        functools.partial(step, setup), start,
    )  # fmt: skip
    out = result(
        s.tokens, rows.lengths, s.ends, s.ended, s.raw, s.sampled_logps, group,
        {"steps": s.step},
    )  # fmt: skip
    return out, s.failed


def begin(
    lm: LM, request: generation_settings.Request, key: Array, guide: Any,
    read_prompts: Callable[..., Any], width: int, group: int, kind: str | None,
) -> tuple[Rows, State]:  # fmt: skip
    """The prefill: rows of `width` tokens, and their state before the first token."""
    prompts, lengths = request.prompts, request.lengths
    n = len(prompts) * group
    h, filled = read_prompts(lm, prompts, lengths, width)
    guide_state = repeat(guide[0](prompts, lengths, width), group) if kind else None
    more = width - prompts.shape[1]
    rows = start_rows(request, key, lm.config.vocab_size, more, group)
    no = jnp.zeros(n, bool)
    zeros = jnp.zeros((n, width), jnp.float32)
    return rows, State(
        jnp.int32(0), rows.tokens, rows.lengths, no, no, repeat(h, group),
        repeat(filled, group), zeros, zeros, rows.response, guide_state,
        no if kind or rows.rules.masks else None,
    )  # fmt: skip


def for_draws(rules: Rules, greedy: bool) -> Rules:
    """The rules of a loop; if all rows are greedy, logits are not divided."""
    if not greedy:
        return rules
    w = rules.processors._replace(temperature=jnp.float32(1.0))
    return rules._replace(processors=w)


def step(setup: Setup, s: State) -> State:
    """Draws a token of every row, writes it, and reads it."""
    x = _draw(setup, s)
    # A finished row writes nowhere: index T is out of bounds and dropped.
    t = s.tokens.shape[1]
    at = jnp.where(s.done, t, s.ends)

    def put(array, values):
        return array.at[setup.row, at].set(values, mode="drop")

    tokens, raw = put(s.tokens, x.token), put(s.raw, x.raw)
    sampled_logps = put(s.sampled_logps, x.sampled_logp)
    position = jnp.minimum(s.ends, t - 1)[:, None]
    h, cache = setup.read_on(setup.lm, s.cache, x.token[:, None], position)
    response, ended, done = response_state.advance(
        setup.rules, s.response, x.token, ~s.done
    )
    ended = s.ended | (ended & ~s.done)
    done |= s.done
    if x.failed is not None:
        done |= x.failed
    return State(
        s.step + 1, tokens, s.ends + ~s.done, done, ended, h, cache, raw,
        sampled_logps, response, x.guide, x.failed,
    )  # fmt: skip


def _draw(setup: Setup, s: State) -> _Drawn:
    """The next token: the model, processors, guide, forced tokens, and the draw."""
    rules, row = setup.rules, setup.row
    logps, logits = (x[:, 0] for x in read(setup.lm, s.h, rules))
    logits = response_state.processed_logits(rules, s.response, logits)
    guide, failed = None, None
    if setup.kind:
        logits, guide = _tilt(setup, s, logits)
    if s.failed is not None:
        best = logits.max(-1)  # NaN if any is
        failed = s.failed | (~s.done & ~jnp.isfinite(best))
    logits = response_state.force(rules, s.response, logits)
    if setup.greedy:
        token = jnp.argmax(logits, -1)
        sampled_logps = jnp.zeros_like(logps)
    else:
        keys = jax.vmap(jax.random.fold_in)(setup.keys, s.response.new)
        token, sampled_logps = response_state.draw(
            keys, logits, rules.processors.temperature
        )
    return _Drawn(
        token.astype(s.tokens.dtype), logps[row, token], sampled_logps[row, token],
        guide, failed,
    )  # fmt: skip


def _tilt(setup: Setup, s: State, logits: Array) -> tuple[Array, Any]:
    """Logits [N, V] tilted by the guide, and its state after the last token."""
    assert setup.guide is not None
    last = s.tokens[setup.row, s.ends - 1]
    if setup.kind == "vector":
        return guides.step(setup.guide, s.guide, last, s.ends - 1, logits)
    state = guides.step(setup.guide, s.guide, last, s.ends - 1, None)[1]
    update = setup.guide[1]
    return guides.over_best(update, state, s.ends, logits, setup.candidates), state
