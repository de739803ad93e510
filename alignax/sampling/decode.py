"""Where responses come from: prefill, then the whole decode in one jitted while-loop."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from alignax import logprob
from alignax.batch import LM, Batch
from alignax.models import transformer
from alignax.sampling import generation_settings, guides, response_state
from alignax.sampling.automaton import Automaton
from alignax.sampling.guides import Guide
from alignax.sampling.prefill import WHOLE, Reader
from alignax.sampling.prefill import traced as traced_reader
from alignax.sampling.response_state import Context, Rules


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
    reader: Reader = WHOLE,
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
      lm: the model. As `transformer.unstack` leaves it, a call spares a copy of it.
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
      reader: how the model reads; raw_logps are of what it makes of the prompts.
      guide: tilts the law; of kind vector, or of kind scalar over the `candidates` best
        tokens of each row (a top-k of its own, before the guide).
      candidates: see `guide`.

    Returns:
      Generated, with T = P + F + max_new. Under greedy decoding old_logps is 0 (the law
      is certain) and raw_logps is the policy's.

    Raises:
      ValueError: an argument out of its range; prompts that the reader cannot read; a
        mask that leaves a row no token; a guide that gives NaN.
    """
    request = generation_settings.parse(
        prompts, lengths, lm.config.vocab_size, max_new=max_new, group=group,
        temperature=temperature, eos_ids=eos_ids, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty, logit_bias=logit_bias, min_new=min_new,
        limits=limits, stops=stops, grammar=grammar, prefill=prefill,
        prefill_lengths=prefill_lengths, forced=forced, seeds=seeds, reader=reader,
    )  # fmt: skip
    if guide is not None and guide.kind == "block":
        raise ValueError("guide.kind is 'block': `generate` takes vector and scalar")
    if candidates < 1:
        raise ValueError(f"candidates={candidates}, expected at least 1")
    greedy = np.ndim(temperature) == 0 and temperature == 0
    out, dead = _generate(
        lm, request, key, None if guide is None else guides.traced(guide),
        traced_reader(reader),
        max_new=max_new, group=group, greedy=bool(greedy),
        kind=None if guide is None else guide.kind,
        candidates=min(candidates, lm.config.vocab_size),
    )  # fmt: skip
    if dead is not None and (dead := np.asarray(dead)).any():
        at = dead.nonzero()[0].tolist()
        raise ValueError(
            f"rows {at} (prompt * group + slot) have no token to draw: the grammar or the "
            "logit bias masks all of them, or the guide gave NaN"
        )
    return out


class Rows(NamedTuple):
    """The N = B x G rows of a request before their first token."""

    lengths: Array  # [N]
    tokens: Array  # [N, T]
    keys: Array  # [N]
    rules: Rules
    context: Context


def lay(
    request: generation_settings.Request,
    key: Array,
    size: int,
    max_new: int,
    group: int,
):
    """Rows of a request; a row's key is its own whatever its neighbours."""
    n = len(request.prompts) * group
    prompts, lengths = (
        jnp.repeat(x, group, axis=0) for x in (request.prompts, request.lengths)
    )
    row = jnp.arange(n)
    if request.seeds is None:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(row)
    else:
        own = jnp.repeat(request.seeds, group, axis=0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, own)
        keys = jax.vmap(jax.random.fold_in)(keys, row % group)
    real = jnp.arange(prompts.shape[1]) < lengths[:, None]
    tokens = jnp.pad(jnp.where(real, prompts, 0), ((0, 0), (0, max_new)))
    rules, start = response_state.begin(request.rules, prompts, lengths, size)
    return Rows(lengths, tokens, keys, rules, start)


def read(lm: LM, h: Array, rules: Rules) -> tuple[Array, Array]:
    """Log-probabilities [N, K, V] after h [N, K, D], and the logits to warp."""
    logps = logprob.rows(lm, h)
    if rules.warpers.repetition is None:
        return logps, logps
    return logps, transformer.unembed(lm, h)  # it reads the sign of the model's own


def result(tokens, lengths, ends, ended, raw, law, group: int, stats) -> Generated:
    """Rows [N, ...] as Generated."""
    at = jnp.arange(tokens.shape[1])
    mask = (at >= lengths[:, None]) & (at < ends[:, None])

    def split(x):
        return x.reshape(-1, group, *x.shape[1:])

    n = len(tokens)
    batch = Batch(
        split(tokens), split(mask), split(ends), split(jnp.zeros(n)),
        split(jnp.ones(n, bool)), old_logps=None if law is None else split(law),
    )  # fmt: skip
    stats = {"ended": ended.mean(), **stats}
    return Generated(batch, split(raw), split(~ended), stats)


class _State(NamedTuple):
    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    ended: Array  # [N] done by EOS or a stop
    h: Array  # [N, 1, D] after the last token
    cache: Any  # of the reader
    raw: Array  # [N, T]
    law: Array  # [N, T]
    context: Context
    guide: Any  # before the last token
    dead: Array | None  # [N] no law to draw from


@functools.partial(
    jax.jit, static_argnames=("max_new", "group", "greedy", "kind", "candidates")
)
def _generate(
    lm, request, key, guide, reader, *, max_new, group, greedy, kind, candidates
):
    prompts, lengths = request.prompts, request.lengths
    b, p = prompts.shape
    n, t = b * group, p + max_new
    lm, guide = transformer.unstack((lm, guide))
    read_prompts, read_on = reader
    h, filled = read_prompts(lm, prompts, lengths, t)

    def fan_out(x):
        return jnp.repeat(x, group, axis=0)

    guide_state = None
    if kind:
        guide_state = jax.tree.map(fan_out, guide[0](prompts, lengths, t))
    rows = lay(request, key, lm.config.vocab_size, max_new, group)
    lengths, rules, w = rows.lengths, rows.rules, rows.rules.warpers
    if greedy:
        w = w._replace(temperature=jnp.float32(1.0))
        rules = rules._replace(warpers=w)
    row = jnp.arange(n)

    def tilt(logits, s):
        """The guide's word on the next token, and its state after the last one."""
        last, given = s.tokens[row, s.ends - 1], logits if kind == "vector" else None
        out, state = guides.step(guide, s.guide, last, s.ends - 1, given)
        if kind == "vector":
            return out, state
        return guides.over_best(guide[1], state, s.ends, logits, candidates), state

    def draw(s):
        logps, logits = (x[:, 0] for x in read(lm, s.h, rules))
        logits, state, dead = (
            response_state.warped(rules, s.context, logits),
            None,
            None,
        )
        if kind:
            logits, state = tilt(logits, s)
        if s.dead is not None:
            best = logits.max(-1)  # NaN if any is
            dead = s.dead | (~s.done & ~jnp.isfinite(best))
        logits = response_state.force(rules, s.context, logits)
        if greedy:
            token = jnp.argmax(logits, -1)
            law = jnp.zeros_like(logps)
        else:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, s.step)
            token, law = response_state.draw(step_keys, logits, w)
        return (
            token.astype(prompts.dtype),
            logps[row, token],
            law[row, token],
            state,
            dead,
        )

    def body(s):
        token, raw, law, guide, dead = draw(s)
        # A finished row writes nowhere: index T is out of bounds and dropped.
        at = jnp.where(s.done, t, s.ends)
        tokens = s.tokens.at[row, at].set(token, mode="drop")
        raws = s.raw.at[row, at].set(raw, mode="drop")
        laws = s.law.at[row, at].set(law, mode="drop")
        position = jnp.minimum(s.ends, t - 1)[:, None]
        h, cache = read_on(lm, s.cache, token[:, None], position)
        after, ended, done = response_state.advance(rules, s.context, token, ~s.done)
        ended = s.ended | (ended & ~s.done)
        done |= s.done
        if dead is not None:
            done |= dead
        return _State(
            s.step + 1, tokens, s.ends + ~s.done, done, ended, h, cache, raws, laws,
            after, guide, dead,
        )  # fmt: skip

    no = jnp.zeros(n, bool)
    zeros = jnp.zeros((n, t), jnp.float32)
    start = _State(
        jnp.int32(0), rows.tokens, lengths, no, no, fan_out(h),
        jax.tree.map(fan_out, filled), zeros, zeros, rows.context, guide_state,
        no if kind or rules.masks else None,
    )  # fmt: skip
    s = jax.lax.while_loop(lambda s: (s.step < max_new) & ~s.done.all(), body, start)
    out = result(
        s.tokens, lengths, s.ends, s.ended, s.raw, s.law, group, {"steps": s.step}
    )
    return out, s.dead
