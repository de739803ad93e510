"""Where responses come from: prefill, then the whole decode in one jitted while-loop."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from alignax import guides, logprob, requests
from alignax.automaton import Automaton
from alignax.batch import LM, Batch
from alignax.guides import Guide
from alignax.models import transformer
from alignax.warpers import Warpers, warp


class Generated(NamedTuple):
    """What a sampler made: a Batch of prompts and responses, and how likely they were."""

    batch: Batch  # [B, G, P + max_new]; old_logps is under the law really sampled
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
    guide: Guide | None = None,
    candidates: int = 16,
) -> Generated:
    """Samples `group` responses to every prompt; they share one prefill. *Exact*.

    Exact: token by token, the law that the settings name (`warpers` has their order), up
    to float32. A second call with the same shapes and the same settings in use (whatever
    their values) compiles nothing. A row's randomness comes from (key, row index) alone,
    or from (key, its seed), so a response does not depend on its neighbours.

    A setting "per row" is one number, [B], or [B, G].

    Args:
      lm: the model.
      prompts: ids, right-padded.
      lengths: real tokens of each prompt, at least 1.
      key: `jax.random.key`.
      max_new: most tokens of a response, EOS included: the shape.
      group: G.
      temperature: per row, of the sampled law, softmax(logits / temperature); 0 is greedy.
      eos_ids: any of them ends a response; it is part of the response and scored.
      top_k: per row; 0 is off.
      top_p: per row, in (0, 1].
      min_p: per row, in [0, 1]: least share of the best token's probability.
      repetition_penalty: per row, above 0, of what prompt or response have; 1 is off.
      frequency_penalty: per row, nats for each time the response has a token.
      presence_penalty: per row, nats if it has it at all.
      logit_bias: {id: nats} for all rows, [V], or [B, V]; -inf forbids a token.
      min_new: per row, fewest tokens of a response, EOS included: until then EOS is
        masked, and a stop does not stop.
      limits: per row, most tokens of a response, at most max_new: mixed lengths in one
        compiled program.
      stops: from `automaton.stop_strings` or `stop_sequences`; the response ends with the
        token that completes one.
      grammar: tokens that are allowed in each state of the response.
      prefill: ids [B, F], the beginning of the response: given, not scored, part of
        the prompt as far as the Batch, penalties and max_new go. T grows by F.
      prefill_lengths: real tokens of each prefill, [B]; default F.
      forced: ids [B, F], F <= max_new: the response's first tokens, -1 where it is free.
        They are scored; under the law really sampled they are certain.
      seeds: integers [B]: row (b, g) draws from (key, seeds[b], g) wherever it stands.
      guide: tilts the law; of kind vector, or of kind scalar over the `candidates` best
        tokens of each row (a top-k of its own, before the guide).
      candidates: see `guide`.

    Returns:
      Generated, with T = P + F + max_new. Under greedy decoding old_logps is 0 (the law
      is certain) and raw_logps is the policy's.

    Raises:
      ValueError: an argument out of its range; a mask that leaves a row no token; a
        guide that gives NaN.
    """
    scalar = np.ndim(temperature) == 0
    if max_new < 1 or group < 1 or (scalar and temperature < 0):
        raise ValueError(
            f"temperature={temperature}, max_new={max_new}, group={group}; expected "
            "temperature >= 0, max_new >= 1, group >= 1"
        )
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
    requests.check_prompts(prompts, lengths)
    b, v = len(prompts), lm.config.vocab_size
    if prefill is not None:
        prompts, lengths = requests.prefilled(
            prompts, lengths, prefill, prefill_lengths
        )

    def row(name, value, low, high=np.inf, dtype=np.float32):
        return (
            None
            if value is None
            else requests.per_row(name, value, b, group, low, high, dtype)
        )

    w = Warpers(
        jnp.float32(temperature or 1.0)
        if scalar
        else row("temperature", temperature, 0),
        row("repetition_penalty", repetition_penalty, np.finfo(np.float32).tiny),
        row("frequency_penalty", frequency_penalty, -np.inf),
        row("presence_penalty", presence_penalty, -np.inf),
        requests.bias(logit_bias, b, group, v),
        row("top_k", top_k, 0, dtype=np.int32),
        row("top_p", top_p, np.finfo(np.float32).tiny, 1),
        row("min_p", min_p, 0, 1),
    )
    if guide is not None and guide.kind == "block":
        raise ValueError("guide.kind is 'block': `generate` takes vector and scalar")
    if candidates < 1:
        raise ValueError(f"candidates={candidates}, expected at least 1")
    for name, table in (("stops", stops), ("grammar", grammar)):
        if table is not None and table.next.shape[1] != v:
            raise ValueError(
                f"{name} is over {table.next.shape[1]} tokens, expected vocab_size={v}"
            )
    out, dead = _generate(
        lm, prompts, lengths, key,
        w, jnp.asarray(sorted(eos_ids), jnp.int32),
        _Control(
            row("min_new", min_new, 0, max_new, np.int32),
            row("limits", limits, 1, max_new, np.int32),
            stops, grammar, requests.forced(forced, b, group, max_new, v),
            None if seeds is None else jnp.asarray(requests.ids("seeds", seeds, (b,))),
            None if guide is None else guides.traced(guide),
        ),
        max_new=max_new, group=group, greedy=bool(scalar and temperature == 0),
        kind=None if guide is None else guide.kind, candidates=min(candidates, v),
    )  # fmt: skip
    if dead is not None and (dead := np.asarray(dead)).any():
        at = dead.nonzero()[0].tolist()
        raise ValueError(
            f"rows {at} (prompt * group + slot) have no token to draw: the grammar or the "
            "logit bias masks all of them, or the guide gave NaN"
        )
    return out


class _Control(NamedTuple):
    """What is neither the model nor a warper: None compiles to nothing."""

    min_new: Array | None  # [N]
    limits: Array | None  # [N]
    stops: Automaton | None
    grammar: Automaton | None
    forced: Array | None  # [N, F]
    seeds: Array | None  # [B]
    guide: Any


class _State(NamedTuple):
    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    ended: Array  # [N] done by EOS or a stop
    h: Array  # [N, 1, D] after the last token
    cache: transformer.Cache
    raw: Array  # [N, T]
    law: Array  # [N, T]
    counts: Any = None  # [N, V] of the response
    stops: Any = None  # [N] states
    grammar: Any = None  # [N] states
    guide: Any = None  # before the last token
    dead: Any = None  # [N] no law to draw from


@functools.partial(
    jax.jit, static_argnames=("max_new", "group", "greedy", "kind", "candidates")
)
def _generate(
    lm,
    prompts,
    lengths,
    key,
    w,
    eos,
    control,
    *,
    max_new,
    group,
    greedy,
    kind,
    candidates,
):
    b, p = prompts.shape
    n, t = b * group, p + max_new
    v = lm.config.vocab_size
    lm = transformer.unstack(lm)
    cache = transformer.init_cache(lm.config, b, t)
    h, filled = transformer.hidden(lm, prompts, cache=cache)
    h = jnp.take_along_axis(h, (lengths - 1)[:, None, None], 1)

    def fan_out(x):
        return jnp.repeat(x, group, axis=0)

    guide_state = None
    if kind:
        init, update, keep = control.guide
        guide_state = jax.tree.map(fan_out, init(prompts, lengths, t))
    prompts, lengths = fan_out(prompts), fan_out(lengths)
    row = jnp.arange(n)
    if control.seeds is None:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(row)
    else:
        own = jax.vmap(jax.random.fold_in, (None, 0))(key, fan_out(control.seeds))
        keys = jax.vmap(jax.random.fold_in)(own, row % group)
    real = jnp.arange(p) < lengths[:, None]
    tokens = jnp.zeros((n, t), prompts.dtype).at[:, :p].set(jnp.where(real, prompts, 0))
    zeros = jnp.zeros((n, t), jnp.float32)
    said = None
    if w.repetition is not None:  # padding writes out of bounds and is dropped
        at = jnp.where(real, prompts, v)
        said = jnp.zeros((n, v), bool).at[row[:, None], at].set(True, mode="drop")
    is_eos = jnp.zeros(v, bool).at[eos].set(True)

    def tilt(logits, s):
        """The guide's word on the next token, and its state after the last one."""
        one = jnp.ones(n, jnp.int32)
        last = s.tokens[row, s.ends - 1][:, None]
        given = logits[:, None] if kind == "vector" else None
        out, states = update(s.guide, last, s.ends - 1, given)
        state = keep(states, one)
        if kind == "vector":
            return out[:, 0], state
        best, ids = jax.lax.top_k(logits, candidates)
        wide = jax.tree.map(lambda x: jnp.repeat(x, candidates, 0), state)
        value, _ = update(
            wide, ids.reshape(-1, 1).astype(prompts.dtype),
            jnp.repeat(s.ends, candidates), None,
        )  # fmt: skip
        value = value.reshape(n, candidates)
        # -inf + NaN is NaN: only what may be drawn can be wrong
        best = jnp.where(jnp.isneginf(best), best, best + value)
        law = jnp.full_like(logits, -jnp.inf).at[row[:, None], ids].set(best)
        return law, state

    def draw(s):
        logps = logprob.rows(lm, s.h)[:, 0]
        new = s.ends - lengths
        logits, allowed, state, dead = logps, None, None, None
        if w.repetition is not None:  # it reads the sign of the model's own logits
            logits = transformer.unembed(lm, s.h)[:, 0]
        if control.grammar is not None:
            allowed = control.grammar.flag[s.grammar]
        if control.min_new is not None:
            late = (new + 1 >= control.min_new)[:, None] | ~is_eos
            allowed = late if allowed is None else allowed & late
        logits = warp(logits, w, counts=s.counts, prompt=said, allowed=allowed)
        if kind:
            logits, state = tilt(logits, s)
        if s.dead is not None:
            best = logits.max(-1)  # NaN if any is
            dead = s.dead | (~s.done & ~jnp.isfinite(best))
        if greedy:
            token = jnp.argmax(logits, -1)
            law = jnp.zeros_like(logps)
        else:
            law = jax.nn.log_softmax(logits)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, s.step)
            token = jax.vmap(jax.random.categorical)(step_keys, law)
            if w.temperature.ndim:
                cold = w.temperature == 0
                token = jnp.where(cold, jnp.argmax(logits, -1), token)
                law = jnp.where(cold[:, None], 0.0, law)
        law = law[row, token]
        if control.forced is not None:
            many = control.forced.shape[1]
            given = control.forced[row, jnp.minimum(new, many - 1)]
            is_given = (new < many) & (given >= 0)
            token = jnp.where(is_given, given, token)
            law = jnp.where(is_given, 0.0, law)
        return token.astype(prompts.dtype), logps[row, token], law, state, dead

    def body(s):
        token, raw, law, guide, dead = draw(s)
        # A finished row writes nowhere: index T is out of bounds and dropped.
        at = jnp.where(s.done, t, s.ends)
        tokens = s.tokens.at[row, at].set(token, mode="drop")
        raws = s.raw.at[row, at].set(raw, mode="drop")
        laws = s.law.at[row, at].set(law, mode="drop")
        position = jnp.minimum(s.ends, t - 1)[:, None]
        h, cache = transformer.hidden(lm, token[:, None], position, cache=s.cache)
        assert cache is not None
        ends = s.ends + ~s.done
        ending = (token[:, None] == eos[None]).any(-1)
        counts, stops, grammar = s.counts, s.stops, s.grammar
        if counts is not None:
            counts = counts.at[row, token].add(~s.done)
        if stops is not None:
            hit = control.stops.flag[stops, token]
            if control.min_new is not None:
                hit &= ends - lengths >= control.min_new
            ending |= hit
            stops = control.stops.next[stops, token]
        if grammar is not None:
            grammar = control.grammar.next[grammar, token]
        ended = s.ended | (ending & ~s.done)
        done = s.done | ending
        if control.limits is not None:
            done |= ends - lengths >= control.limits
        if dead is not None:
            done |= dead
        return _State(
            s.step + 1, tokens, ends, done, ended, h, cache, raws, laws,
            counts, stops, grammar, guide, dead,
        )  # fmt: skip

    no = jnp.zeros(n, bool)
    origin = jnp.zeros(n, jnp.int32)
    masks = kind or w.bias is not None or control.grammar or control.min_new is not None
    start = _State(
        jnp.int32(0), tokens, lengths, no, no, fan_out(h),
        jax.tree.map(fan_out, filled), zeros, zeros,
        counts=jnp.zeros((n, v), jnp.int32) if w.counts else None,
        stops=origin if control.stops else None,
        grammar=origin if control.grammar else None,
        guide=guide_state,
        dead=no if masks else None,
    )  # fmt: skip
    s = jax.lax.while_loop(lambda s: (s.step < max_new) & ~s.done.all(), body, start)
    at = jnp.arange(t)
    mask = (at >= lengths[:, None]) & (at < s.ends[:, None])

    def split(x):
        return x.reshape(b, group, *x.shape[1:])

    batch = Batch(
        split(s.tokens), split(mask), split(s.ends), jnp.zeros((b, group)),
        jnp.ones((b, group), bool), old_logps=split(s.law),
    )  # fmt: skip
    stats = {"steps": s.step, "ended": s.ended.mean()}
    return Generated(batch, split(s.raw), split(~s.ended), stats), s.dead
