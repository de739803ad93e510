"""Hypotheses: partial responses that a search extends, judges, and keeps or drops.

On the host, in arrays of constant width; only the sampling of tokens is a compiled
program. To continue a response, prompt and response become the prompt of the next call.
Few shapes compile: those of B x G rows, a bucket of lengths and one block of tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from alignax import logprob
from alignax.batch import LM, Batch
from alignax.models import transformer
from alignax.sampling import generation_settings, guide_models
from alignax.sampling.automaton import Automaton
from alignax.sampling.decode import Generated, generate
from alignax.sampling.prefill import WHOLE, Reader

Judge = Callable[[Batch], Any]  # [B, G, T] of (partial) responses -> scores [B, G]
STATELESS = ("top_k", "top_p", "min_p", "logit_bias", "repetition_penalty")
BUCKET = 64  # least width of a compiled row, unless T is less


class Hypotheses(NamedTuple):
    """B prompts x G partial responses of T = P + max_new positions, numpy arrays."""

    tokens: np.ndarray  # [B, G, T] prompt, response so far, zeros
    starts: np.ndarray  # [B, G] where the response begins
    ends: np.ndarray  # [B, G] where its next token goes
    ended: np.ndarray  # [B, G] by EOS or a stop
    max_new: int
    raw: np.ndarray  # [B, G, T] nats, under the policy; 0 outside the response
    sampled_logps: np.ndarray  # [B, G, T] nats, of the sampling distribution
    row: np.ndarray  # [B, G] place of the prompt among those that the search was given
    stop_state: np.ndarray  # [B, G] of `stops`, behind the response so far
    stops: Automaton | None = None  # a response ends with the token that completes one
    loop_stops: Automaton | None = None  # the same on the device, for the sampling loop

    @property
    def sizes(self) -> np.ndarray:
        """[B, G] tokens of each response."""
        return self.ends - self.starts

    @property
    def done(self) -> np.ndarray:
        """[B, G] ended, or of max_new tokens."""
        return self.ended | (self.sizes >= self.max_new)


def start(prompts, lengths, max_new: int, stops: Automaton | None = None) -> Hypotheses:
    """One empty response [B, 1] to every prompt.

    Args:
      prompts: ids [B, P], right-padded.
      lengths: real tokens of each prompt, [B].
      max_new: most tokens of a response.
      stops: over the vocabulary; they also end a response.

    Raises:
      ValueError: max_new below 1, or a length out of range.
    """
    if max_new < 1:
        raise ValueError(f"max_new={max_new}, expected at least 1")
    prompts, lengths = np.asarray(prompts), np.asarray(lengths, np.int32)
    generation_settings.check_prompts(jnp.asarray(prompts), jnp.asarray(lengths))
    b, p = prompts.shape
    tokens = np.zeros((b, 1, p + max_new), np.int32)
    tokens[:, 0, :p] = np.where(np.arange(p) < lengths[:, None], prompts, 0)
    at = lengths[:, None]
    zeros = np.zeros(tokens.shape, np.float32)
    no = np.zeros((b, 1), bool)
    row = np.arange(b, dtype=np.int32)[:, None]
    return Hypotheses(
        tokens, at, at.copy(), no, max_new, zeros, zeros.copy(), row,
        np.zeros((b, 1), np.int32), jax.tree.map(np.asarray, stops),
        jax.tree.map(jnp.asarray, stops),
    )  # fmt: skip


def rows_of(h: Hypotheses, change: Callable[[np.ndarray], np.ndarray]) -> Hypotheses:
    """`change` applied to every array; it may change the axes B and G."""
    fields: list[Any] = [change(x) if isinstance(x, np.ndarray) else x for x in h]
    return Hypotheses(*fields)


def take(h: Hypotheses, index) -> Hypotheses:
    """Hypotheses [B, K]: those of each prompt at `index` [B, K]."""
    index = np.asarray(index)
    return rows_of(h, lambda x: x[np.arange(len(x))[:, None], index])


def prompt(h: Hypotheses, b: int) -> Hypotheses:
    """The hypotheses [1, G] of one prompt."""
    return rows_of(h, lambda x: x[b : b + 1])


def concatenate(parts: Sequence[Hypotheses], axis: int = 1) -> Hypotheses:
    """More hypotheses of the same prompts (axis = 1), or of more prompts (axis = 0)."""
    fields: list[Any] = [
        np.concatenate(x, axis) if isinstance(x[0], np.ndarray) else x[0]
        for x in zip(*parts, strict=True)
    ]
    return Hypotheses(*fields)


def put(h: Hypotheses, index, new: Hypotheses, where) -> Hypotheses:
    """`h` with new[b, k] in place of h[b, index[b, k]], where `where` [B, K]."""
    b, k = np.nonzero(where)
    at = b, np.asarray(index)[b, k]

    def write(old, value):
        if not isinstance(old, np.ndarray):
            return old
        old = old.copy()
        old[at] = value[b, k]
        return old

    return Hypotheses(*map(write, h, new))


def append(h: Hypotheses, tokens, logps, eos_ids: Sequence[int], where) -> Hypotheses:
    """One more token, given by the caller, where `where` [B, G].

    Args:
      h: none of those rows is done.
      tokens: [B, G].
      logps: [B, G], nats under the policy; the token's `sampled_logps` is 0.
      eos_ids: end a response.
      where: bool [B, G].
    """
    b, g = np.nonzero(where)
    words, raw, ends, ended = (x.copy() for x in (h.tokens, h.raw, h.ends, h.ended))
    at = b, g, h.ends[b, g]
    words[at] = tokens[b, g]
    raw[at] = logps[b, g]
    ends[b, g] += 1
    ended[b, g] = np.isin(tokens[b, g], eos_ids)
    state = h.stop_state
    if h.stops is not None:
        state, old = state.copy(), state[b, g]
        ended[b, g] |= h.stops.flag[old, tokens[b, g]]
        state[b, g] = h.stops.next[old, tokens[b, g]]
    return h._replace(tokens=words, raw=raw, ends=ends, ended=ended, stop_state=state)


def until_stop(
    h: Hypotheses, words: np.ndarray, ends: np.ndarray, min_new: int = 0
) -> Hypotheses:
    """`h` with its new tokens, which end with the one that completes a stop.

    Args:
      h: [B, G] before these tokens.
      words: [B, G, T] with them.
      ends: [B, G] behind them.
      min_new: a stop that ends before this number of tokens does not count.

    Returns:
      `h` of which tokens, ends, ended and stop_state are new.
    """
    if h.stops is None:
        return h._replace(tokens=words, ends=ends)
    table, flag = h.stops
    state, stopped, ends = h.stop_state.copy(), np.zeros(ends.shape, bool), ends.copy()
    for t in range(int(h.ends.min(initial=0)), int(ends.max(initial=0))):
        here = (t >= h.ends) & (t < ends) & ~stopped
        token = np.where(here, words[..., t], 0)
        hit = here & flag[state, token] & (t + 1 - h.starts >= min_new)
        state = np.where(here, table[state, token], state)
        ends, stopped = np.where(hit, t + 1, ends), stopped | hit
    words = np.where(np.arange(words.shape[2]) < ends[..., None], words, 0)
    return h._replace(
        tokens=words, ends=ends, ended=h.ended | stopped, stop_state=state
    )


def bucket(longest: int, t: int) -> int:
    """A row width with few values, for few compilations: a power of two, or T."""
    return min(t, max(BUCKET, 1 << (longest - 1).bit_length()))


def extend(
    lm: LM,
    h: Hypotheses,
    key: Array,
    *,
    tokens: int,
    limit: int | None = None,
    group: int = 1,
    temperature: Any = 1.0,
    eos_ids: Sequence[int] = (),
    until: Sequence[int] = (),
    active: np.ndarray | None = None,
    seeds: np.ndarray | None = None,
    sampling: Mapping[str, Any] | None = None,
    reader: Reader = WHOLE,
) -> tuple[Hypotheses, int]:
    """Draws up to `tokens` more of every response, `group` times.

    The sampling loop ends where new tokens complete a stop of `h`. A stop that began in
    earlier tokens is found behind the loop, and what was drawn after it is dropped.

    Args:
      lm: the model.
      h: [B, G]; those that are done do not change.
      key: a different one for every call.
      tokens: most new ones; part of the shape.
      limit: a smaller maximum, which is not part of the shape.
      group: continuations of each response, which share one prefill.
      temperature: of `generate`, one number, or [B * G, group].
      eos_ids: end a response.
      until: end this block, not the response.
      active: [B, G], False: does not change either.
      seeds: [B, G], of `generate`: for rows whose index is not always the same.
      sampling: further settings of `generate`, one value for all rows. Those that
        depend on earlier tokens of the response need every response to be empty.
      reader: of `generate`.

    Returns:
      Hypotheses [B, G * group], and how many tokens were drawn.

    Raises:
      ValueError: a setting that depends on earlier tokens, for a response that has begun.
    """
    settings = dict(sampling or {})
    stateful = sorted(set(settings) - set(STATELESS))
    if stateful and (h.sizes > 0).any():
        raise ValueError(
            f"sampling has {stateful}, which depends on earlier tokens of the response; "
            f"when it is continued, expected only {', '.join(STATELESS)}"
        )
    b, g, t = h.tokens.shape
    if (found := h.loop_stops) is not None:
        if found.next.shape[1] > (size := lm.config.vocab_size):  # of a draft
            found = Automaton(*(x[:, :size] for x in found))
        settings.setdefault("stops", found)
    tokens = min(tokens, h.max_new)
    going = ~h.done if active is None else ~h.done & active
    wide = rows_of(h, lambda x: np.repeat(x, group, 1))
    if not going.any():
        return wide, 0
    longest = int(h.ends[going].max())
    width = bucket(longest, t)
    room = np.minimum(min(tokens, limit or tokens), h.max_new - h.sizes)
    room = np.where(going, room, 1)
    out = generate(
        lm, h.tokens.reshape(b * g, t)[:, :width],
        # a row that is not extended may be longer than the bucket: it draws one token
        np.minimum(h.ends, width).reshape(-1), key,
        max_new=tokens, group=group, temperature=temperature,
        eos_ids=(*eos_ids, *until), limits=room.reshape(-1),
        seeds=None if seeds is None else seeds.reshape(-1), reader=reader,
        **settings,
    )  # fmt: skip
    batch = jax.tree.map(np.asarray, out.batch)
    going = np.repeat(going, group, 1)
    ends = np.where(going, batch.lengths.reshape(going.shape), wide.ends)
    at = np.arange(t)
    fresh = (at >= wide.ends[..., None]) & (at < ends[..., None])

    def merge(old, new):
        new = np.asarray(new).reshape(b, g * group, -1)[:, :, :t]
        new = np.pad(new, ((0, 0), (0, 0), (0, t - new.shape[2])))
        return np.where(fresh, new, old).astype(old.dtype)

    words = merge(wide.tokens, batch.tokens)
    last = np.take_along_axis(words, ends[..., None] - 1, 2)[..., 0]
    paused = np.isin(last, until) & ~np.isin(last, eos_ids)
    stopped = ~np.asarray(out.truncated).reshape(going.shape) & ~paused
    drawn = int(fresh.sum())
    new = until_stop(wide, words, ends, int(settings.get("min_new") or 0))
    fresh &= at < new.ends[..., None]
    return new._replace(
        ended=np.where(going, stopped | new.ended, wide.ended),
        raw=merge(wide.raw, out.raw_logps),
        sampled_logps=merge(wide.sampled_logps, batch.old_logps),
    ), drawn  # fmt: skip


@functools.partial(jax.jit, static_argnames="k")
def _best(lm, tokens, ends, *, k):
    h, _ = transformer.hidden(lm, tokens)
    row = jnp.arange(tokens.shape[0])
    return jax.lax.top_k(logprob.rows(lm, h[row, ends - 1][:, None])[:, 0], k)


def next_best(lm: LM, h: Hypotheses, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most likely next tokens: log-probabilities in nats and ids, both [B, G, k].

    Of the unmodified policy, most likely first; ties are in the order of ids.
    """
    b, g, t = h.tokens.shape
    width = bucket(int(h.ends.max()), t)
    rows = h.tokens.reshape(b * g, t)[:, :width], h.ends.reshape(-1)
    logps, ids = _best(lm, *rows, k=min(k, lm.config.vocab_size))
    return np.asarray(logps).reshape(b, g, -1), np.asarray(ids).reshape(b, g, -1)


def as_batch(h: Hypotheses, valid: np.ndarray | None = None) -> Batch:
    """The Batch for a judge; valid are responses that are not empty, and `valid`.

    Its extra['row'], [B], are the places of the prompts in the batch of the search.
    """
    at = np.arange(h.tokens.shape[2])
    mask = (at >= h.starts[..., None]) & (at < h.ends[..., None])
    valid = (h.sizes > 0) & (True if valid is None else valid)
    fields: tuple[Any, ...] = (
        h.tokens, mask, h.ends.astype(np.int32), np.zeros(h.ends.shape, np.float32), valid
    )  # fmt: skip
    extra: Any = {"row": h.row[:, 0]}
    return Batch(*fields)._replace(extra=extra)


def judged(
    judge: Judge | None, h: Hypotheses, valid: np.ndarray | None = None, **bounds: float
) -> np.ndarray:
    """`scored` of hypotheses; 0 where not `valid`, whatever the judge returns there."""
    return scored(judge, as_batch(h, valid), **bounds)


def scored(
    judge: Judge | None, batch: Batch, *, low: float = -np.inf, high: float = np.inf
) -> np.ndarray:
    """The judge's scores [B, G] in float64; 0 where the batch is not valid.

    Raises:
      ValueError: no judge; scores of another shape, NaN, or outside low..high.
    """
    if judge is None:
        raise ValueError("judge is None; this search needs one: judge(batch) -> [B, G]")
    valid = np.asarray(batch.valid)
    scores = np.asarray(judge(batch), np.float64)
    if scores.shape != valid.shape:
        raise ValueError(
            f"judge gave shape {scores.shape}, expected [B, G]={valid.shape}"
        )
    scores = np.where(valid, scores, 0.0)
    inside = (scores >= low) & (scores <= high) | ~valid
    if not inside.all():
        raise ValueError(
            f"judge gave {scores[~inside][0]}, expected a number in {low}..{high}"
        )
    return scores


def with_draft(lm: LM, lms: dict[str, LM], name: str) -> tuple[LM, ...]:
    """(lms[name], which drafts for `lm`; `lm`), limited to the ids that both have.

    Raises:
      ValueError: there is none, or it has another tokenizer.
    """
    (draft,) = guide_models.find(lms, name)
    return guide_models.find({"draft": draft, "target": lm}, "draft", "target")


def with_logps(lm: LM, h: Hypotheses) -> Hypotheses:
    """With raw log-probabilities under `lm`, whichever model drew the tokens."""
    batch = as_batch(h)._replace(extra=None)
    return h._replace(raw=np.asarray(score(lm, batch).logps))


score = jax.jit(logprob.score)


def generated(
    h: Hypotheses, scores, stats: Mapping[str, Any], *, certain: bool = False
) -> Generated:
    """Hypotheses as the `Generated` that a search returns.

    Args:
      h: [B, G] responses to return.
      scores: [B, G], which become Batch.feedback.
      stats: counts of what the search did.
      certain: nothing was sampled, and old_logps are 0. Otherwise they are None: a choice
        among whole responses defines no distribution of each token.
    """
    batch = jax.tree.map(jnp.asarray, as_batch(h)._replace(extra=None))._replace(
        feedback=jnp.asarray(scores, jnp.float32),
        old_logps=jnp.zeros(h.tokens.shape) if certain else None,
    )
    return Generated(batch, jnp.asarray(h.raw), jnp.asarray(~h.ended), dict(stats))
