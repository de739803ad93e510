"""Speculative guided decoding: a draft proposes tokens, one call of the target verifies.

  draft x_1 .. x_γ ~ q     target call: p(· | s_0) .. p(· | s_γ)     guide call: the tilts
  verify_guided.MODES on π* ∝ p exp(g): τ drafts stay, one token follows

Each row accepts its own number of drafts. Entries of the KV caches after a row's end are
never read, and are overwritten later: nothing is rolled back. A round is in
`speculation_round`.
"""

import functools
from collections.abc import Sequence
from typing import Any

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
    speculation_round,
    verify_guided,
    weights,
)
from alignax.sampling.decode import Generated
from alignax.sampling.drafts import Draft
from alignax.sampling.guides import Guide
from alignax.sampling.prefill import WHOLE, Reader
from alignax.sampling.speculation_round import Block, Settings, Setup, State
from alignax.sampling.verify import RULES

TRIES = 10_000  # of one token under thin, or of one block: then it is an error
UNNORMALISED = ("lazy", "thin", "block")  # the normaliser of π* is not known


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
    guide_prompts: Any = None,
    guide_lengths: Any = None,
    mode: str = "",
    guided_draft: bool = False,
    candidates: int = 16,
    draft_length: int | Sequence[int] = 4,
    block_length: int = 8,
    reader: Reader = WHOLE,
    rule: str = "block",
    **settings: Any,
) -> Generated:
    """Samples from the distribution of `decode.generate` with the same settings. *Exact*.

    Exact: the distribution, up to float32, for any draft. Greedy responses are those of
    `generate`, unless the best two logits differ by less than the rounding error between
    a call on one token and a call on several. Sampled responses differ from those that
    `generate` draws from the same key. The draft uses the same logits processors. A row
    depends on (key, row index or its seed) alone, unless draft lengths adapt.

    Args:
      lm: the target.
      draft: an LM or one of `drafts`, of the target's tokenizer.
      prompts: as in `generate`.
      lengths: likewise.
      key: likewise.
      max_new: likewise.
      group: likewise.
      guide: of any kind. Of kind vector, its `update` gets the tokens of a round. Of kind
        block, it gets [N, block_length] tokens, -1 after the end of a response, and the
        distribution is of whole blocks: p(block) exp(g(block)), renormalised.
      guide_prompts: as in `generate`.
      guide_lengths: likewise.
      mode: how a guide is verified, one of `verify_guided.MODES`; '' is the first of its
        kind. topk is the distribution of `generate`. thin has the whole vocabulary for
        candidates, and needs guide.hi; lazy needs lo and hi; both refuse temperature 0.
      guided_draft: whether the guide, of kind vector, also tilts the draft.
      candidates: how many of the best tokens a scalar guide may choose from; under thin,
        how many it scores at a time.
      draft_length: γ; part of the shape. If there are several, all are compiled into one
        program. The first one given is used first; then the next longer one when most
        rows accepted all their drafts, else the next shorter one.
      block_length: tokens that a guide of kind block judges at a time.
      reader: of `generate`, for the target; the draft's prefill is not changed.
      rule: 'block' or 'token', of `verify`; lazy and thin verify token by token.
      **settings: all others of `generate`: temperature, eos_ids, top_k, penalties,
        limits, stops, grammar, prefill, forced, seeds, ...

    Returns:
      Generated. stats has 'steps' (calls of the target), 'ended',
      'tokens_per_target_call' (mean over rows and their calls), 'accepted' [max γ]: share
      of calls in which the i-th draft was accepted, 'guide_scores_per_token' (prefixes or
      blocks that the guide scored) and 'redraws_per_token' (tokens, or blocks, that were
      rejected). old_logps is None under lazy, thin and block, where the normaliser of π*
      is not known.

    Raises:
      ValueError: an argument out of its range, a draft made for another vocabulary, a
        mode of another kind of guide, no token left to draw, or a guide that gives NaN, leaves its
        bounds, or rejects everything.
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
    if draft.vocab_size not in (None, size):
        raise ValueError(
            f"the draft has a vocabulary of {draft.vocab_size}, expected the target's "
            f"{size}"
        )
    reader.check_lm(lm)
    mode = _mode(guide, mode)
    if guided_draft and mode != "vector":
        raise ValueError("guided_draft needs a guide of kind vector")
    request = generation_settings.parse(
        prompts, lengths, size, max_new=max_new, group=group, reader=reader, **settings
    )
    cold = (np.asarray(request.rules.processors.temperature) == 0).any()
    if cold and mode in ("lazy", "thin"):
        raise ValueError(f"mode {mode!r} draws: temperature 0 needs topk or vector")
    guide = generation_settings.on_prompts(
        guide, guide_prompts, guide_lengths, len(lengths), size
    )
    order = sorted(set(gammas))
    lm, propose, made = weights.for_decoding(
        (lm, draft[:2], None if guide is None else guides.traced(guide))
    )
    out, fault = _speculate(
        lm, propose, request, key, made,
        None if guide is None else (jnp.float32(guide.lo), jnp.float32(guide.hi)),
        prefill.traced(reader),
        settings=Settings(
            max_new, group, mode, guided_draft, min(candidates, size), tuple(order),
            order.index(gammas[0]), block_length, rule, TRIES,
        ),
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
    guides.traced(guide)  # its own checks first
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


@functools.partial(jax.jit, static_argnames="settings")
def _speculate(lm, draft, request, key, guide, bounds, reader, *, settings: Settings):
    """Rounds until every row is done: (Generated, faults [N] or None)."""
    setup, start = _begin(lm, draft, request, key, guide, bounds, reader, settings)
    rounds = [
        functools.partial(speculation_round.run, setup, gamma)
        for gamma in settings.gammas
    ]
    s = jax.lax.while_loop(
        lambda s: ~s.done.all(), lambda s: jax.lax.switch(s.at, rounds, s), start
    )
    return _finish(setup, s), s.fault


def _begin(
    lm, draft, request, key, guide, bounds, reader, settings: Settings
) -> tuple[Setup, State]:
    """What is fixed, and the state before the first round."""
    prompts, group = request.prompts, settings.group
    n, t = len(prompts) * group, prompts.shape[1] + settings.max_new
    slots = t + max(settings.gammas) + 1  # a block may reach beyond the last token
    lm, draft, guide = transformer.unstack((lm, draft, guide))
    (read_prompts, read_on), (init_draft, propose) = reader, draft
    filled = read_prompts(lm, prompts, request.lengths, slots)[1]
    rows = decode.start_rows(
        request, key, lm.config.vocab_size, settings.max_new, group
    )
    w = rows.rules.processors
    w = w._replace(temperature=jnp.broadcast_to(w.temperature, (n,)))
    rules = rows.rules._replace(processors=w)
    row = jnp.arange(n)
    lo, hi = bounds if guide else (-jnp.inf, jnp.inf)
    verify = verify_guided.judge(
        settings.mode, guide, rule=settings.rule, candidates=settings.candidates,
        lo=lo, hi=hi, tries=settings.tries,
    )  # fmt: skip
    setup = Setup(
        settings, lm, read_on, propose, guide, hi, verify, rules, rows.keys, row,
        rows.lengths,
    )  # fmt: skip
    no, none = jnp.zeros(n, bool), jnp.zeros(n, jnp.int32)
    zeros = jnp.zeros((n, t), jnp.float32)

    def init(f):
        return decode.repeat(f(prompts, request.lengths, slots), group)

    block = None
    if settings.mode == "block":
        block = Block(rows.lengths, rows.response, none)
    start = State(
        jnp.int32(0), rows.tokens, rows.lengths, no, no,
        none if guide or rules.masks else None, decode.repeat(filled, group),
        init(init_draft), init(guide[0]) if guide else None, rows.response, zeros,
        None if settings.mode in UNNORMALISED else zeros, block, none,
        jnp.zeros(max(settings.gammas), jnp.int32), (jnp.int32(0), jnp.int32(0)),
        jnp.int32(settings.first),
    )  # fmt: skip
    return setup, start


def _finish(setup: Setup, s: State) -> Generated:
    """The responses of the last state, and the rates of its counts."""
    # a block that was removed has left its tokens there
    real = jnp.arange(s.tokens.shape[1]) < s.ends[:, None]
    calls, new = s.calls.sum(), (s.ends - setup.lengths).sum()
    stats = {
        "steps": s.step, "accepted": s.accepted / calls,
        "tokens_per_target_call": new / calls,
        "guide_scores_per_token": s.costs[0] / new,
        "redraws_per_token": s.costs[1] / new,
    }  # fmt: skip
    return decode.result(
        jnp.where(real, s.tokens, 0), setup.lengths, s.ends, s.ended,
        jnp.where(real, s.raw, 0), s.sampled_logps, setup.settings.group, stats,
    )  # fmt: skip
