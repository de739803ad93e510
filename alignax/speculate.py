"""Speculative guided decoding: a draft proposes a block, one call of the target verifies.

  draft x_1 .. x_γ ~ q     target call: p(· | s_0) .. p(· | s_γ)     guide call: the tilts
  verify.block or verify.token on π* ∝ p exp(g): τ drafts stay, one token follows

Rows accept as many as they do, each by itself. What the caches hold beyond a row's end
is never read, and is overwritten when the row gets there: nothing is rolled back.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from alignax import guides, logprob, requests
from alignax.batch import LM, Batch
from alignax.decode import Generated
from alignax.guides import Guide
from alignax.models import transformer
from alignax.verify import RULES, verify
from alignax.warpers import Warpers, warp


def speculate(
    lm: LM,
    draft: LM,
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
    guide: Guide | None = None,
    draft_length: int = 4,
    rule: str = "block",
) -> Generated:
    """Draws from the law of `decode.generate` with the same settings. *Exact*.

    Exact: the law, up to float32, whatever the draft; greedy, the tokens themselves
    wherever the best two are further apart than the rounding of a call on one token and
    of a call on several. Samples are others than `generate` draws from the same key. The
    draft has the same warpers, and no guide. A row depends on (key, row index) alone.

    Args:
      lm: the target.
      draft: proposes; of the same vocabulary.
      prompts: as in `generate`.
      lengths: likewise.
      key: likewise.
      max_new: likewise.
      group: likewise.
      temperature: likewise, per row; 0 is greedy.
      eos_ids: likewise, also inside a block.
      top_k: likewise.
      top_p: likewise.
      min_p: likewise.
      guide: of kind vector; its `update` gets the draft_length + 1 tokens of a block.
      draft_length: γ; part of the shape.
      rule: 'block' or 'token', of `verify`.

    Returns:
      Generated. stats has 'steps' (calls of the target), 'ended',
      'tokens_per_target_call' (mean over rows and their calls) and 'accepted' [γ]: how
      often the i-th draft stayed, of all calls.

    Raises:
      ValueError: an argument out of its range, another vocabulary, another kind of
        guide, or a guide that gives NaN.
    """
    if max_new < 1 or group < 1 or draft_length < 1:
        raise ValueError(
            f"max_new={max_new}, group={group}, draft_length={draft_length}; expected all "
            "at least 1"
        )
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {sorted(RULES)}")
    if draft.config.vocab_size != lm.config.vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {draft.config.vocab_size}, expected the "
            f"target's {lm.config.vocab_size}"
        )
    if guide is not None and guide.kind != "vector":
        raise ValueError(f"guide.kind is {guide.kind!r}: `speculate` takes vector")
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
    requests.check_prompts(prompts, lengths)

    def row(name, value, low, high=np.inf, dtype=np.float32):
        if value is None:
            return None
        return requests.per_row(name, value, len(prompts), group, low, high, dtype)

    temperatures = row("temperature", temperature, 0)
    assert temperatures is not None
    w = Warpers(
        temperatures,
        top_k=row("top_k", top_k, 0, dtype=np.int32),
        top_p=row("top_p", top_p, np.finfo(np.float32).tiny, 1),
        min_p=row("min_p", min_p, 0, 1),
    )
    out, dead = _speculate(
        lm, draft, prompts, lengths, key, w, jnp.asarray(sorted(eos_ids), jnp.int32),
        None if guide is None else guides.traced(guide),
        max_new=max_new, group=group, gamma=draft_length, rule=rule,
    )  # fmt: skip
    if guide is not None and np.asarray(dead).any():
        at = np.asarray(dead).nonzero()[0].tolist()
        raise ValueError(f"rows {at} (prompt * group + slot): the guide gave NaN")
    return out


class _State(NamedTuple):
    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    ended: Array  # [N] done by EOS
    dead: Array  # [N] the guide gave NaN
    caches: Any  # target's and draft's, before the last token
    guide: Any  # before the last token
    raw: Array  # [N, T]
    law: Array  # [N, T]
    calls: Array  # [N] rounds in which the row took part
    accepted: Array  # [γ]


def _laws(logits, w):
    """Probabilities [N, K, V]: of a greedy row, all of it on the best token."""
    cold = (w.temperature == 0)[:, None, None]
    best = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
    return jnp.where(cold, best, jax.nn.softmax(logits, -1))


@functools.partial(jax.jit, static_argnames=("max_new", "group", "gamma", "rule"))
def _speculate(
    lm, draft, prompts, lengths, key, w, eos, guide, *, max_new, group, gamma, rule
):
    b, p = prompts.shape
    n, t = b * group, p + max_new
    slots = t + gamma + 1  # a block may reach beyond the last token
    models = transformer.unstack(lm), transformer.unstack(draft)

    def fan_out(x):
        return jnp.repeat(x, group, axis=0)

    def prefill(model):
        cache = transformer.init_cache(model.config, b, slots)
        return jax.tree.map(fan_out, transformer.hidden(model, prompts, cache=cache)[1])

    state = None
    if guide is not None:
        init, update, keep = guide
        state = jax.tree.map(fan_out, init(prompts, lengths, slots))
    caches = prefill(models[0]), prefill(models[1])
    prompts, lengths = fan_out(prompts), fan_out(lengths)
    row = jnp.arange(n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(row)
    real = jnp.arange(p) < lengths[:, None]
    tokens = jnp.zeros((n, t), prompts.dtype).at[:, :p].set(jnp.where(real, prompts, 0))
    warped = jax.vmap(lambda z: warp(z, w), 1, 1)

    def read(model, block, start, cache):
        """Log-probabilities [N, K, V] after each of a few tokens."""
        positions = start[:, None] + jnp.arange(block.shape[1])
        h, cache = transformer.hidden(model, block, positions, cache=cache)
        return logprob.rows(model, h), cache

    def body(s):
        # a key of its own for every round and role: none is used again after a rejection
        round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, s.step)

        def role(i):
            return jax.vmap(jax.random.fold_in, (0, None))(round_keys, i)

        last = s.tokens[row, s.ends - 1]

        def propose(carry, i):
            token, cache = carry
            rows, cache = read(models[1], token[:, None], s.ends - 1 + i, cache)
            q = _laws(warped(rows), w)[:, 0]
            new = jax.vmap(jax.random.categorical)(role(i), jnp.log(q))
            return (new.astype(token.dtype), cache), (new.astype(token.dtype), q)

        # once more than it proposes: the cache must have the last proposal if it stays
        (_, drafted), (drafts, q) = jax.lax.scan(
            propose, (last, s.caches[1]), jnp.arange(gamma + 1)
        )
        drafts = drafts[:-1].T  # [N, γ]
        block = jnp.concatenate([last[:, None], drafts], 1)
        raws, cache = read(models[0], block, s.ends - 1, s.caches[0])
        logits = warped(raws)
        states = None
        if guide is not None:
            logits, states = update(s.guide, block, s.ends - 1, logits)
        dead = s.dead | (~s.done & jnp.isnan(logits).any((1, 2)))
        laws = _laws(logits, w)
        q = jnp.moveaxis(q[:-1], 0, 1)
        stays, after, _ = verify(role(gamma + 1), drafts, laws, q, rule=rule)
        at = jnp.arange(gamma + 1)
        new = jnp.pad(drafts, ((0, 0), (0, 1)))
        new = jnp.where(at == stays[:, None], after[:, None].astype(new.dtype), new)
        many = jnp.minimum(stays + 1, max_new - (s.ends - lengths))
        is_eos = (new[:, :, None] == eos).any(-1) & (at < many[:, None])
        ending = is_eos.any(-1)
        many = jnp.where(ending, jnp.argmax(is_eos, -1) + 1, many)
        many = jnp.where(s.done, 0, many)
        # What is not kept is written out of bounds and dropped.
        to = jnp.where(at < many[:, None], s.ends[:, None] + at, t)

        def write(array, values):
            return array.at[row[:, None], to].set(values, mode="drop")

        def of(rows):
            return jnp.take_along_axis(rows, new[:, :, None], -1)[:, :, 0]

        ends = s.ends + many
        done = s.done | ending | dead | (ends - lengths >= max_new)
        stayed = (at[:-1] < stays[:, None]) & ~s.done[:, None]
        return _State(
            s.step + 1, write(s.tokens, new), ends, done, s.ended | (ending & ~s.done),
            dead, (cache, drafted), None if guide is None else keep(states, stays + 1),
            write(s.raw, of(raws)), write(s.law, jnp.log(of(laws))),
            s.calls + ~s.done, s.accepted + stayed.sum(0),
        )  # fmt: skip

    no = jnp.zeros(n, bool)
    zeros = jnp.zeros((n, t), jnp.float32)
    start = _State(
        jnp.int32(0), tokens, lengths, no, no, no, caches, state, zeros, zeros,
        jnp.zeros(n, jnp.int32), jnp.zeros(gamma, jnp.int32),
    )  # fmt: skip
    s = jax.lax.while_loop(lambda s: ~s.done.all(), body, start)
    at = jnp.arange(t)
    mask = (at >= lengths[:, None]) & (at < s.ends[:, None])

    def split(x):
        return x.reshape(b, group, *x.shape[1:])

    batch = Batch(
        split(s.tokens), split(mask), split(s.ends), jnp.zeros((b, group)),
        jnp.ones((b, group), bool), old_logps=split(s.law),
    )  # fmt: skip
    calls = s.calls.sum()
    stats = {
        "steps": s.step, "ended": s.ended.mean(), "accepted": s.accepted / calls,
        "tokens_per_target_call": (s.ends - lengths).sum() / calls,
    }  # fmt: skip
    return Generated(batch, split(s.raw), split(~s.ended), stats), s.dead
