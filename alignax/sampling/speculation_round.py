"""One round of speculative decoding, as pure functions of what is fixed and a state.

propose      the draft: x_1 .. x_γ ~ q
call_target  one call of the target: p(· | s_0) .. p(· | s_γ), after the processors
verify       how many drafts stay, and the token after them
emit         up to EOS, a stop or a limit
write        the tokens, their log-probabilities, and the counts of the round
judge_blocks of a guide of kind block: complete blocks are kept or removed
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignax.batch import LM
from alignax.sampling import decode, drafts, guides, response_state, verify_guided
from alignax.sampling.response_state import ResponseState, Rules
from alignax.sampling.verify_guided import Round, Verdict

BLOCK_KEYS = 2**32 - 1  # never a round: the branch of keys that blocks are judged with


class Settings(NamedTuple):
    """Static arguments of the compiled program; see `speculate`."""

    max_new: int
    group: int
    mode: str
    guided_draft: bool
    candidates: int
    gammas: tuple[int, ...]  # draft lengths, ascending
    first: int  # index of the first round's draft length
    block_length: int
    rule: str
    tries: int  # of one token under thin, or of one block: then it is an error


class Setup(NamedTuple):
    """What no round changes."""

    settings: Settings
    lm: LM  # the target, unstacked
    read_on: Callable[..., Any]  # `Reader.step` of the target
    propose: Callable[..., Any]  # of the draft
    guide: tuple[Callable, Callable, Callable] | None  # init, update, keep
    hi: Array | float  # upper bound of the guide
    verify: Callable[[Round], Verdict]
    rules: Rules
    keys: Array  # [N]
    row: Array  # [N] 0 .. N - 1
    lengths: Array  # [N] tokens of each prompt


class Block(NamedTuple):
    """The current block of each row, under a guide of kind block."""

    begins: Array  # [N] where it begins
    response: ResponseState  # there
    tries: Array  # [N] how often it was refused


class State(NamedTuple):
    """What a round reads and writes."""

    step: Array
    tokens: Array  # [N, T]
    ends: Array  # [N] where the next token goes
    done: Array  # [N]
    ended: Array  # [N] done by EOS or a stop
    fault: Array | None  # [N] an index of `verify_guided.FAULTS`
    cache: Any  # of the target's reader, before the last token
    draft: Any  # likewise
    guide: Any  # likewise; of kind block, before the block
    response: ResponseState
    raw: Array  # [N, T] nats, under the unmodified policy
    sampled_logps: Array | None  # [N, T] nats, or None where π* is not normalised
    block: Block | None
    calls: Array  # [N] rounds in which the row took part
    accepted: Array  # [max γ]
    costs: tuple[Array, Array]  # what the guide scored, and what it refused
    at: Array  # index of the draft length


class Proposal(NamedTuple):
    """What the draft proposes."""

    tokens: Array  # [N, γ]
    q: Array  # [N, γ, V] the distributions that they were drawn from
    state: Any  # of the draft, after them


class Target(NamedTuple):
    """What the call of the target returns."""

    block: Array  # [N, γ + 1] the last token, and the drafts
    logps: Array  # [N, γ + 1, V] after each of them, under the unmodified policy
    logits: Array  # [N, γ + 1, V] processed
    cache: Any


class Emitted(NamedTuple):
    """The tokens of a round, and the rows after them."""

    tokens: Array  # [N, γ + 1]
    taken: Array  # [N, γ + 1] False: not part of the response
    response: ResponseState
    ends: Array  # [N]
    done: Array  # [N]
    ended: Array  # [N]
    fault: Array | None  # [N]


def run(setup: Setup, gamma: int, s: State) -> State:
    """A round with `gamma` drafted tokens per row."""
    # a key of its own for every round: none is used again after a rejection
    keys = _fold(setup.keys, s.step)
    verify_keys, draft_keys = (_fold(keys, i) for i in (0, 1))
    proposal = propose(setup, s, draft_keys, gamma)
    target = call_target(setup, s, proposal)
    verdict = verify(setup, s, verify_keys, proposal, target)
    emitted = emit(setup, s, proposal, verdict)
    s = write(setup, s, proposal, target, verdict, emitted)
    return judge_blocks(setup, s) if setup.settings.mode == "block" else s


def propose(setup: Setup, s: State, keys: Array, gamma: int) -> Proposal:
    """The draft's tokens, under the target's rules."""
    tilt = None
    if setup.settings.guided_draft:
        assert setup.guide is not None
        tilt = functools.partial(guides.step, setup.guide)
    ask = drafts.Ask(
        s.tokens, s.ends, keys, setup.rules, s.response, gamma,
        tilt, s.guide, setup.lm.config.vocab_size,
    )  # fmt: skip
    return Proposal(*setup.propose(s.draft, ask))


def call_target(setup: Setup, s: State, proposal: Proposal) -> Target:
    """One call of the target on the last token and the drafts of each row."""
    last = s.tokens[setup.row, s.ends - 1][:, None]
    block = jnp.concatenate([last, proposal.tokens], 1)
    positions = s.ends[:, None] - 1 + jnp.arange(block.shape[1])
    h, cache = setup.read_on(setup.lm, s.cache, block, positions)
    logps, logits = decode.read(setup.lm, h, setup.rules)
    return Target(block, logps, _processed(setup, s.response, block, logits), cache)


def _processed(
    setup: Setup, response: ResponseState, tokens: Array, logits: Array
) -> Array:
    """Processed logits [N, K, V] of the token after each of K, and after `response`."""

    def step(response, x):
        token, z = x
        out = response_state.processed_logits(setup.rules, response, z)
        after = response_state.advance(setup.rules, response, token, setup.row >= 0)[0]
        return after, out

    # the first distribution is after the last token itself: that moves nothing
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    xs = following.T, jnp.moveaxis(logits, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, response, xs)[1], 0, 1)


def verify(
    setup: Setup, s: State, keys: Array, proposal: Proposal, target: Target
) -> Verdict:
    """How many drafts stay, and the token after them."""
    return setup.verify(
        Round(
            keys, proposal.tokens, proposal.q, target.block, s.ends - 1, target.logits,
            ~s.done, s.guide, functools.partial(_probabilities, setup, s.response),
        )
    )  # fmt: skip


def _probabilities(setup: Setup, response: ResponseState, logits: Array) -> Array:
    """[N, K, V]; a forced token is certain, and at temperature 0 the best one is."""
    rules, k = setup.rules, logits.shape[1]
    new = response.new[:, None] + jnp.arange(k)
    logits = jax.vmap(
        lambda new, z: response_state.force(rules, response._replace(new=new), z), 1, 1
    )(new, logits)
    return jnp.exp(response_state.sampled_logps(logits, rules.processors.temperature))


def emit(setup: Setup, s: State, proposal: Proposal, verdict: Verdict) -> Emitted:
    """The tokens that rows take of a round: up to EOS, a stop, a limit or a block's end."""
    settings, rules = setup.settings, setup.rules
    at = jnp.arange(proposal.tokens.shape[1] + 1)
    tokens = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    after = verdict.after[:, None].astype(tokens.dtype)
    tokens = jnp.where(at == verdict.stays[:, None], after, tokens)

    def step(carry, x):
        response, ends, done, ended = carry
        i, token = x
        live = ~done & (i <= verdict.stays)
        if s.block is not None:
            live &= ends < s.block.begins + settings.block_length
        response, stop, full = response_state.advance(rules, response, token, live)
        ends += live
        full |= ends - setup.lengths >= settings.max_new
        return (response, ends, done | (live & full), ended | (live & stop)), live

    start = s.response, s.ends, s.done, s.ended
    xs = jnp.arange(tokens.shape[1]), tokens.T
    (response, ends, done, ended), taken = jax.lax.scan(step, start, xs)
    taken, fault = taken.T, s.fault
    if fault is not None:
        # what a place that is not taken has does not matter
        fault = jnp.maximum(fault, jnp.where(taken, verdict.fault, 0).max(-1))
        done |= fault > 0
    return Emitted(tokens, taken, response, ends, done, ended, fault)


def write(
    setup: Setup, s: State, proposal: Proposal, target: Target, verdict: Verdict,
    emitted: Emitted,
) -> State:  # fmt: skip
    """The state after the round."""
    at, live = jnp.arange(emitted.tokens.shape[1]), ~s.done
    # What is not taken is written out of bounds and dropped.
    end = s.tokens.shape[1]
    to = jnp.where(emitted.taken, s.ends[:, None] + at, end)

    def put(array, values):
        return array.at[setup.row[:, None], to].set(values, mode="drop")

    def of(rows):
        return jnp.take_along_axis(rows, emitted.tokens[:, :, None], -1)[:, :, 0]

    stayed = (at[:-1] < verdict.stays[:, None]) & live[:, None]
    at_length = _next_length(setup, s, verdict.stays, len(at) - 1)
    sampled_logps = None
    if s.sampled_logps is not None:
        sampled_logps = put(s.sampled_logps, jnp.log(of(verdict.probabilities)))
    return State(
        s.step + 1, put(s.tokens, emitted.tokens), emitted.ends, emitted.done,
        emitted.ended, emitted.fault, target.cache, proposal.state,
        s.guide if setup.settings.mode == "block" else verdict.state,
        emitted.response, put(s.raw, of(target.logps)), sampled_logps, s.block,
        s.calls + live,
        s.accepted + jnp.pad(stayed.sum(0), (0, len(s.accepted) - len(at) + 1)),
        (s.costs[0] + (verdict.scored * live).sum(),
         s.costs[1] + (verdict.redraws * live).sum()),
        at_length,
    )  # fmt: skip


def _next_length(setup: Setup, s: State, stays: Array, gamma: int) -> Array:
    """Longer drafts if at least half of the live rows kept all, else shorter ones."""
    live = ~s.done
    whole = (stays == gamma) & live
    up = 2 * whole.sum() >= live.sum()
    last = len(setup.settings.gammas) - 1
    return jnp.clip(s.at + jnp.where(up, 1, -1), 0, last)


def judge_blocks(setup: Setup, s: State) -> State:
    """Complete blocks are kept with probability exp(g - hi), or removed."""
    assert s.block is not None
    begins = s.block.begins
    full = (s.done & (s.ends > begins)) | (
        s.ends >= begins + setup.settings.block_length
    )
    full &= s.fault == 0
    judge = functools.partial(_judge_full, setup, full)
    return jax.lax.cond(full.any(), judge, lambda s: s, s)


def _judge_full(setup: Setup, full: Array, s: State) -> State:
    """`judge_blocks` where some block is complete, `full` [N]."""
    assert setup.guide is not None
    assert s.block is not None
    assert s.fault is not None
    _, update, keep = setup.guide
    (begins, response, tries), settings = s.block, setup.settings
    n, t = s.tokens.shape
    at = begins[:, None] + jnp.arange(settings.block_length)
    there = jnp.take_along_axis(s.tokens, jnp.minimum(at, t - 1), 1)
    tokens = jnp.where(at < s.ends[:, None], there, -1)
    value, states = update(s.guide, tokens, begins, None)
    coins = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, s.step)))(
        _fold(setup.keys, BLOCK_KEYS)
    )
    keeps = full & (coins < jnp.exp(value - setup.hi))
    back = full & ~keeps
    fault = verify_guided.fault_of(value, -jnp.inf, setup.hi)
    tried = jnp.where(keeps, 0, tries + back)
    fault = jnp.where(
        tried > settings.tries, verify_guided.TRIES, jnp.where(full, fault, 0)
    )
    after = keep(states, jnp.full(n, settings.block_length))
    back = back & (fault == 0)
    ends = jnp.where(back, begins, s.ends)
    now = _pick(back, response, s.response)
    return s._replace(
        ends=ends, done=(s.done & ~back) | (fault > 0), ended=s.ended & ~back,
        fault=jnp.maximum(s.fault, fault), response=now,
        guide=_pick(keeps, after, s.guide),
        block=Block(
            jnp.where(keeps, ends, begins), _pick(keeps, now, response), tried
        ),
        costs=(s.costs[0] + full.sum(), s.costs[1] + back.sum()),
    )  # fmt: skip


def _pick(where: Array, new: Any, old: Any) -> Any:
    """Leaves [N, ...] of `new` where `where` [N], else of `old`."""

    def pick(new, old):
        return jnp.where(where.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, new, old)


def _fold(keys: Array, data: Any) -> Array:
    """Keys [N] with the same number folded into each."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)
