"""Speculative guided decoding: a draft proposes a block, one call of the target verifies.

  draft x_1 .. x_γ ~ q     target call: p(· | s_0) .. p(· | s_γ)     guide call: the tilts
  guided.MODES on π* ∝ p exp(g): τ drafts stay, one token follows

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

from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling import (
    decode,
    drafts,
    generation_settings,
    guides,
    prefill,
    response_state,
    verify_guided,
)
from alignax.sampling.decode import Generated
from alignax.sampling.drafts import Draft
from alignax.sampling.guides import Guide
from alignax.sampling.prefill import WHOLE, Reader
from alignax.sampling.response_state import Context
from alignax.sampling.verify import RULES

TRIES = 10_000  # of one token under thin, or of one block: then it is an error
OWN = 2**32 - 1  # never a step: the branch of keys that blocks are judged with


def speculate(
    lm: LM,
    draft: LM | Draft,
    prompts: Int[Array, "B P"] | Int[np.ndarray, "B P"],
    lengths: Int[Array, " B"] | Int[np.ndarray, " B"],
    key: Array,
    *,
    max_new: int,
    group: int = 1,
    guide: Guide | None = None,
    mode: str = "",
    guided_draft: bool = False,
    candidates: int = 16,
    draft_length: int | Sequence[int] = 4,
    block_length: int = 8,
    reader: Reader = WHOLE,
    rule: str = "block",
    **settings: Any,
) -> Generated:
    """Draws from the law of `decode.generate` with the same settings. *Exact*.

    Exact: the law, up to float32, whatever the draft; greedy, the tokens themselves
    wherever the best two are further apart than the rounding of a call on one token and
    of a call on several. Samples are others than `generate` draws from the same key. The
    draft is under the same warpers. A row depends on (key, row index or its seed) alone,
    unless draft lengths adapt.

    Args:
      lm: the target.
      draft: proposes, of the same vocabulary: an LM, or one of `drafts`.
      prompts: as in `generate`.
      lengths: likewise.
      key: likewise.
      max_new: likewise.
      group: likewise.
      guide: of any kind. Of kind vector, its `update` gets the tokens of a block. Of kind
        block, it gets [N, block_length] tokens, -1 where a response ended before, and the
        law is that of whole blocks, p(block) exp(g(block)), renormalised.
      mode: how a guide is verified, one of `guided.MODES`; '' is the first of its kind.
        topk is the law of `generate`. thin has all of the vocabulary for candidates, and
        needs guide.hi; lazy needs lo and hi; neither of them is ever greedy.
      guided_draft: tilts the proposals, too, where that is the guide of kind vector.
      candidates: how many of the best tokens a scalar guide may choose from; under thin,
        how many it scores at a time.
      draft_length: γ; part of the shape. Several, all compiled into one program: the next
        longer one when most rows kept all their drafts, else the next shorter one; the
        first is the first.
      block_length: tokens that a guide of kind block judges at a time.
      reader: of `generate`: how the target reads, not the draft.
      rule: 'block' or 'token', of `verify`; lazy and thin decide token by token.
      **settings: all others of `generate`: temperature, eos_ids, top_k, penalties,
        limits, stops, grammar, prefill, forced, seeds, ...

    Returns:
      Generated. stats has 'steps' (calls of the target), 'ended',
      'tokens_per_target_call' (mean over rows and their calls), 'accepted' [max γ]: how
      often the i-th draft stayed, of all calls, 'guide_scores_per_token' (prefixes or
      blocks that the guide scored) and 'redraws_per_token' (tokens, or blocks, that it
      refused). old_logps is None under lazy, thin and block: π* is then known up to its
      normaliser only.

    Raises:
      ValueError: an argument out of its range, another vocabulary, a mode of another
        kind of guide, no token left to draw, or a guide that gives NaN, leaves its
        bounds, or refuses everything.
    """
    gammas = (draft_length,) if isinstance(draft_length, int) else tuple(draft_length)
    if not gammas or min(gammas) < 1 or block_length < 1 or candidates < 1:
        raise ValueError(
            f"draft_length={draft_length}, block_length={block_length}, "
            f"candidates={candidates}; expected all at least 1"
        )
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {sorted(RULES)}")
    draft = drafts.as_draft(draft)
    size = lm.config.vocab_size
    if draft.vocab_size != size:
        raise ValueError(
            f"the draft has a vocabulary of {draft.vocab_size}, expected the target's "
            f"{size}"
        )
    mode = _mode(guide, mode)
    if guided_draft and mode != "vector":
        raise ValueError("guided_draft needs a guide of kind vector")
    request = generation_settings.parse(
        prompts, lengths, size, max_new=max_new, group=group, reader=reader, **settings
    )
    cold = (np.asarray(request.rules.warpers.temperature) == 0).any()
    if cold and mode in ("lazy", "thin"):
        raise ValueError(f"mode {mode!r} draws: temperature 0 needs topk or vector")
    order = sorted(set(gammas))
    out, fault = _speculate(
        lm, draft[:2], request, key, None if guide is None else guides.traced(guide),
        None if guide is None else (jnp.float32(guide.lo), jnp.float32(guide.hi)),
        prefill.traced(reader),
        max_new=max_new, group=group, mode=mode, guided_draft=guided_draft,
        candidates=min(candidates, size), gammas=tuple(order),
        first=order.index(gammas[0]), block_length=block_length, rule=rule,
    )  # fmt: skip
    if fault is not None and (fault := np.asarray(fault)).any():
        at = fault.nonzero()[0]
        why = verify_guided.FAULTS[fault[at[0]]]
        raise ValueError(f"rows {at.tolist()} (prompt * group + slot): {why}")
    return out


def _mode(guide: Guide | None, mode: str) -> str:
    """The mode, or the first of the guide's kind."""
    if guide is None:
        if mode:
            raise ValueError(f"mode {mode!r} needs a guide")
        return ""
    guides.traced(guide)  # its own complaints first
    known = verify_guided.MODES[guide.kind]
    mode = mode or known[0]
    if mode not in known:
        raise ValueError(
            f"mode {mode!r} is none of {known}, for a guide of kind {guide.kind!r}"
        )
    needs = {"lazy": (guide.lo, guide.hi), "thin": (guide.hi,), "block": (guide.hi,)}
    if not np.isfinite(needs.get(mode, (0,))).all():
        raise ValueError(
            f"mode {mode!r} needs finite bounds; guide.lo={guide.lo}, "
            f"guide.hi={guide.hi}"
        )
    return mode


class _State(NamedTuple):
    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    ended: Array  # [N] done by EOS or a stop
    fault: Array | None  # [N]
    cache: Any  # of the reader, before the last token
    draft: Any  # likewise
    guide: Any  # likewise; of kind block, before the block
    context: Context
    raw: Array  # [N, T]
    law: Array | None  # [N, T]
    block: Any  # where a row's block began [N], its context there, its tries [N]
    calls: Array  # [N] rounds in which the row took part
    accepted: Array  # [max γ]
    costs: tuple[Array, Array]  # what the guide scored, and what it refused
    at: Array  # which of the draft lengths


@functools.partial(
    jax.jit,
    static_argnames=(
        "max_new", "group", "mode", "guided_draft", "candidates", "gammas", "first",
        "block_length", "rule",
    ),
)  # fmt: skip
def _speculate(
    lm, draft, request, key, guide, bounds, reader, *, max_new, group, mode, guided_draft,
    candidates, gammas, first, block_length, rule,
):  # fmt: skip
    b, p = request.prompts.shape
    n, t = b * group, p + max_new
    slots = t + max(gammas) + 1  # a block may reach beyond the last token
    lm, draft, guide = transformer.unstack((lm, draft, guide))

    def fan_out(x):
        return jnp.repeat(x, group, axis=0)

    def begin(init):
        return jax.tree.map(fan_out, init(request.prompts, request.lengths, slots))

    read_prompts, read_on = reader
    filled = read_prompts(lm, request.prompts, request.lengths, slots)[1]
    init_draft, propose = draft
    rows = decode.lay(request, key, lm.config.vocab_size, max_new, group)
    lengths = rows.lengths
    w = rows.rules.warpers
    w = w._replace(temperature=jnp.broadcast_to(w.temperature, (n,)))
    rules = rows.rules._replace(warpers=w)
    row = jnp.arange(n)
    lo, hi = bounds if guide else (-jnp.inf, jnp.inf)
    decide = verify_guided.judge(
        mode, guide, rule=rule, candidates=candidates, lo=lo, hi=hi, tries=TRIES
    )
    known = mode not in ("lazy", "thin", "block")

    def along(said, names, logits=None):
        """The warped laws [N, K, V] of the token after each of K, and after said."""

        def step(said, x):
            name, z = x
            out = response_state.warped(rules, said, z)
            return response_state.advance(rules, said, name, row >= 0)[0], out

        # the last token's own law is the first: it moves nothing
        names = jnp.pad(names[:, 1:], ((0, 0), (0, 1)))
        xs = names.T, jnp.moveaxis(logits, 1, 0)
        return jnp.moveaxis(jax.lax.scan(step, said, xs)[1], 0, 1)

    def law(said, logits):
        """Probabilities: forced tokens are certain, of a cold row the best is."""
        k = logits.shape[1]
        at = said._replace(new=said.new[:, None] + jnp.arange(k))
        logits = jax.vmap(
            lambda new, z: response_state.force(rules, said._replace(new=new), z), 1, 1
        )(at.new, logits)
        return jnp.exp(response_state.law(logits, w))

    def emit(s, new, stays):
        """The tokens that rows really take of a round: up to EOS, a stop or a limit."""

        def step(carry, x):
            said, ends, done, ended = carry
            i, token = x
            live = ~done & (i <= stays)
            if mode == "block":
                live &= ends < s.block[0] + block_length
            said, stop, full = response_state.advance(rules, said, token, live)
            ends += live
            full |= ends - lengths >= max_new
            return (said, ends, done | (live & full), ended | (live & stop)), live

        start = s.context, s.ends, s.done, s.ended
        xs = jnp.arange(new.shape[1]), new.T
        (said, ends, done, ended), taken = jax.lax.scan(step, start, xs)
        return said, ends, done, ended, taken.T

    def settle(s):
        """Whole blocks are kept with probability exp(g - hi), or taken back."""
        begun, said, tries = s.block
        full = (s.done & (s.ends > begun)) | (s.ends >= begun + block_length)
        full &= s.fault == 0

        def judged(s):
            _, update, keep = guide
            at = begun[:, None] + jnp.arange(block_length)
            there = jnp.take_along_axis(s.tokens, jnp.minimum(at, t - 1), 1)
            names = jnp.where(at < s.ends[:, None], there, -1)
            value, states = update(s.guide, names, begun, None)
            coins = jax.vmap(
                lambda k: jax.random.uniform(jax.random.fold_in(k, s.step))
            )(jax.vmap(jax.random.fold_in, (0, None))(rows.keys, OWN))
            keeps = full & (coins < jnp.exp(value - hi))
            back = full & ~keeps
            fault = verify_guided.fault_of(value, -jnp.inf, hi)
            tried = jnp.where(keeps, 0, tries + back)
            fault = jnp.where(
                tried > TRIES, verify_guided.TRIES, jnp.where(full, fault, 0)
            )
            after = keep(states, jnp.full(n, block_length))

            def pick(new, old, where=keeps):
                wide = where.reshape(n, *[1] * (new.ndim - 1))
                return jnp.where(wide, new, old)

            back = back & (fault == 0)
            ends = jnp.where(back, begun, s.ends)
            now = jax.tree.map(lambda a, b: pick(a, b, back), said, s.context)
            begins = jnp.where(keeps, ends, begun)
            kept = jax.tree.map(pick, now, said)
            return s._replace(
                ends=ends, done=(s.done & ~back) | (fault > 0), ended=s.ended & ~back,
                fault=jnp.maximum(s.fault, fault), context=now,
                guide=jax.tree.map(pick, after, s.guide),
                block=(begins, kept, tried),
                costs=(s.costs[0] + full.sum(), s.costs[1] + back.sum()),
            )  # fmt: skip

        return jax.lax.cond(full.any(), judged, lambda s: s, s)

    def round_of(gamma):
        def body(s):
            # a key of its own for every round: none is used again after a rejection
            keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, s.step)
            ours, theirs = (
                jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in (0, 1)
            )
            proposed, q, drafted = propose(
                s.draft,
                drafts.Ask(
                    s.tokens, s.ends, theirs, rules, s.context, gamma,
                    functools.partial(guides.step, guide) if guided_draft else None,
                    s.guide,
                ),
            )  # fmt: skip
            block = jnp.concatenate([s.tokens[row, s.ends - 1][:, None], proposed], 1)
            positions = s.ends[:, None] - 1 + jnp.arange(gamma + 1)
            h, cache = read_on(lm, s.cache, block, positions)
            raws, logits = decode.read(lm, h, rules)
            logits = along(s.context, block, logits)
            v = decide(
                verify_guided.Round(
                    ours,
                    proposed,
                    q,
                    block,
                    s.ends - 1,
                    logits,
                    ~s.done,
                    s.guide,
                    functools.partial(law, s.context),
                )
            )
            at = jnp.arange(gamma + 1)
            new = jnp.pad(proposed, ((0, 0), (0, 1)))
            after = v.after[:, None].astype(new.dtype)
            new = jnp.where(at == v.stays[:, None], after, new)
            fault, live = s.fault, ~s.done
            said, ends, done, ended, taken = emit(s, new, v.stays)
            if fault is not None:
                # a place that is not taken may be whatever it likes
                fault = jnp.maximum(fault, jnp.where(taken, v.fault, 0).max(-1))
            # What is not taken is written out of bounds and dropped.
            to = jnp.where(taken, s.ends[:, None] + at, t)

            def write(array, values):
                return array.at[row[:, None], to].set(values, mode="drop")

            def of(rows):
                return jnp.take_along_axis(rows, new[:, :, None], -1)[:, :, 0]

            stayed = (at[:-1] < v.stays[:, None]) & live[:, None]
            most = (v.stays == gamma) & live
            up = 2 * most.sum() >= live.sum()
            longest = s.accepted.shape[0]
            s = _State(
                s.step + 1, write(s.tokens, new), ends,
                done if fault is None else done | (fault > 0), ended, fault, cache,
                drafted, s.guide if mode == "block" else v.state, said,
                write(s.raw, of(raws)),
                write(s.law, jnp.log(of(v.law))) if known else None,
                s.block, s.calls + live,
                s.accepted + jnp.pad(stayed.sum(0), (0, longest - gamma)),
                (s.costs[0] + (v.scored * live).sum(), s.costs[1]
                 + (v.redraws * live).sum()),
                jnp.clip(s.at + jnp.where(up, 1, -1), 0, len(gammas) - 1),
            )  # fmt: skip
            return settle(s) if mode == "block" else s

        return body

    bodies = [round_of(gamma) for gamma in gammas]
    no, none = jnp.zeros(n, bool), jnp.zeros(n, jnp.int32)
    zeros = jnp.zeros((n, t), jnp.float32)
    start = _State(
        jnp.int32(0), rows.tokens, lengths, no, no,
        none if guide or rules.masks else None, jax.tree.map(fan_out, filled),
        begin(init_draft), begin(guide[0]) if guide else None, rows.context, zeros,
        zeros if known else None,
        (lengths, rows.context, none) if mode == "block" else None, none,
        jnp.zeros(max(gammas), jnp.int32), (jnp.int32(0), jnp.int32(0)), jnp.int32(first),
    )  # fmt: skip
    s = jax.lax.while_loop(
        lambda s: ~s.done.all(), lambda s: jax.lax.switch(s.at, bodies, s), start
    )
    # a block that was taken back has left its tokens there
    real = jnp.arange(t) < s.ends[:, None]
    calls, said = s.calls.sum(), (s.ends - lengths).sum()
    stats = {
        "steps": s.step, "accepted": s.accepted / calls,
        "tokens_per_target_call": said / calls,
        "guide_scores_per_token": s.costs[0] / said,
        "redraws_per_token": s.costs[1] / said,
    }  # fmt: skip
    out = decode.result(
        jnp.where(real, s.tokens, 0), lengths, s.ends, s.ended,
        jnp.where(real, s.raw, 0), s.law, group, stats,
    )  # fmt: skip
    return out, s.fault
