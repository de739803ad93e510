"""Every way to verify a guided target, through real models: the distribution, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracles import chi_square, decoding, next_token
from oracles import transformer as oracle

from alignax.batch import check
from alignax.sampling import decode, guides, speculate

pytestmark = pytest.mark.slow

V, P, NEW, MANY = 5, 3, 3, 8192
PROMPTS, LENGTHS = np.array([[3, 1, 4], [2, 0, 0]]), np.array([3, 1])
EOS = (0,)
VALUES = np.random.default_rng(3).uniform(-1, 1, size=(3, V))  # of (sum before, token)
LO, HI = -1.0, 1.0


def init(table, tokens, lengths, length):
    """The sum of all tokens before the last, modulo 3."""
    before = jnp.arange(tokens.shape[1]) < lengths[:, None] - 1
    return (tokens * before).sum(-1) % 3


def scalar(table, state, tokens, start, logits):
    """V of a prefix: of its last token and the sum before it."""
    states = jnp.cumsum(jnp.concatenate([state[:, None], tokens], 1), 1) % 3
    return table[states[:, :-1], tokens], states


def vector(table, state, tokens, start, logits):
    states = jnp.cumsum(jnp.concatenate([state[:, None], tokens], 1), 1) % 3
    return logits + table[states[:, 1:]], states


def block(table, state, tokens, start, logits):
    """The mean value of a block's tokens, of which -1 is none."""
    real = tokens >= 0
    names = jnp.where(real, tokens, 0)
    states = jnp.cumsum(jnp.concatenate([state[:, None], names], 1), 1) % 3
    each = jnp.where(real, table[states[:, :-1], names], 0)
    return each.sum(-1) / real.sum(-1), states


def block_init(table, tokens, lengths, length):
    """A block begins with the next token: all tokens of the prompt are before it."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return (tokens * real).sum(-1) % 3


def guide(kind, table=VALUES, lo=LO, hi=HI):
    table = jnp.asarray(table, jnp.float32)
    update = {"scalar": scalar, "vector": vector, "block": block}[kind]
    first = block_init if kind == "block" else init
    return guides.Guide(Partial(first, table), Partial(update, table), kind, lo, hi)


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    """A target, and a draft of another size that is no good at all."""
    config = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1)
    small = dataclasses.replace(config, width=8, num_heads=2, num_kv_heads=1)
    return make_lm(config), make_lm(small, 1)


def run(lms, **settings):
    settings = dict(max_new=NEW, eos_ids=EOS, draft_length=2) | settings
    out = speculate.speculate(*lms, PROMPTS, LENGTHS, jax.random.key(0), **settings)
    check(out.batch)
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def target(lms):
    """ids -> the target's probabilities of the next token."""
    lm, known = lms[0], {}
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        logits = jax.jit(lambda ids: oracle.logits(lm.config, params, ids))

    def call(ids):
        ids = tuple(ids)
        if ids not in known:
            padded = np.zeros(P + NEW + 1, int)
            padded[: len(ids)] = ids
            with jax.enable_x64(True):
                known[ids] = np.asarray(logits(padded))[len(ids) - 1]
        return known[ids]

    return call


def tilt(ids, table=VALUES):
    return table[sum(ids) % 3]


def fits(out, b, distribution):
    """The share of seeds that would be further from the distribution than this one."""
    counts = dict.fromkeys((y for y, mass in distribution.items() if mass), 0)
    for t, m in zip(out.batch.tokens[b], out.batch.mask[b], strict=True):
        counts[tuple(t[m].tolist())] += 1
    expected = np.array([distribution[y] for y in counts]) * MANY
    return chi_square.p_value([*counts.values()], expected)


def tilted(target, b, top_k=0, new=NEW):
    def logits(ids):
        distribution = next_token.distribution(target(ids), top_k=top_k, tilt=tilt(ids))
        with np.errstate(divide="ignore"):
            return np.log(distribution)

    prompt = PROMPTS[b, : LENGTHS[b]].tolist()
    return decoding.distribution(logits, prompt, max_new=new, eos_ids=EOS)


@pytest.mark.parametrize("mode", ["topk", "lazy"])
def test_the_best_candidates_are_drawn_by_their_tilted_distribution(lms, target, mode):
    out = run(lms, guide=guide("scalar"), mode=mode, candidates=3, group=MANY)
    for b in range(2):
        assert fits(out, b, tilted(target, b, top_k=3)) > 1e-4
    scores = out.stats["guide_scores_per_token"]
    calls = 1 / out.stats["tokens_per_target_call"]
    every = 3 * (1 + 3) * calls  # γ + 1 places, each the block's own and 3 candidates
    assert scores == pytest.approx(every) if mode == "topk" else scores < 0.75 * every


def test_thinning_draws_the_tilted_distribution_of_the_whole_vocabulary(lms, target):
    loose = guide("scalar", lo=-np.inf, hi=HI + 0.3)
    out = run(lms, guide=loose, mode="thin", candidates=2, group=MANY)
    for b in range(2):
        assert fits(out, b, tilted(target, b)) > 1e-4
    assert out.batch.old_logps is None
    assert out.stats["redraws_per_token"] > 0.3


def blocks(target, b, length, table=VALUES):
    """{response: probability}: p(block) exp(g(block)), renormalised block by block."""

    def whole(prompt, many):
        """{block: p}, of `many` tokens or up to EOS."""
        return decoding.distribution(target, list(prompt), max_new=many, eos_ids=EOS)

    def reward(prompt, y):
        states = np.cumsum([sum(prompt), *y])[:-1] % 3
        return table[states, list(y)].mean()

    prompt = tuple(PROMPTS[b, : LENGTHS[b]].tolist())
    out, front = {}, {(): 1.0}
    while front:
        grown = {}
        for s, mass in front.items():
            some = whole((*prompt, *s), min(length, NEW - len(s)))
            share = {y: p * np.exp(reward((*prompt, *s), y)) for y, p in some.items()}
            total = sum(share.values())
            for y, weight in share.items():
                new = (*s, *y)
                over = len(new) == NEW or y[-1] in EOS
                place = out if over else grown
                place[new] = place.get(new, 0.0) + mass * weight / total
        front = grown
    return out


def test_whole_blocks_are_drawn_by_their_tilted_distribution(lms, target):
    """Blocks of two tokens, the last of one."""
    out = run(lms, guide=guide("block"), block_length=2, group=MANY // 2)
    for b in range(2):
        distribution = blocks(target, b, 2)
        assert sum(distribution.values()) == pytest.approx(1)
        assert fits(out, b, distribution) > 1e-4
    assert out.stats["redraws_per_token"] > 0.3
    off = ~out.batch.mask
    assert not out.raw_logps[off].any()


def test_the_draft_may_be_guided_too_and_then_more_of_it_stays(lms, target):
    """A draft that is the target: guided, it is always right."""
    tables = guide("vector", table=2 * VALUES)
    twice = lms[0], lms[0]
    plain = run(twice, guide=tables, group=64, eos_ids=())
    guided = run(twice, guide=tables, guided_draft=True, group=64, eos_ids=())
    np.testing.assert_allclose(guided.stats["accepted"], 1)
    assert plain.stats["accepted"][0] < 0.9
    out = run(lms, guide=guide("vector"), guided_draft=True, group=MANY)
    for b in range(2):
        assert fits(out, b, tilted(target, b)) > 1e-4


def test_greedy_over_candidates_says_what_generate_says(lms):
    settings = dict(guide=guide("scalar"), candidates=3, group=2, temperature=0.0)
    fast = run(lms, **settings)
    plain = decode.generate(
        lms[0],
        PROMPTS,
        LENGTHS,
        jax.random.key(0),
        max_new=NEW,
        eos_ids=EOS,
        **settings,
    )
    np.testing.assert_array_equal(fast.batch.tokens, plain.batch.tokens)
    np.testing.assert_array_equal(fast.batch.lengths, plain.batch.lengths)


def test_the_first_draft_stays_as_often_as_the_distributions_overlap(lms, target):
    """1 - TV(π*, q), within 4 standard errors."""
    out = run(lms, guide=guide("vector"), max_new=1, draft_length=1, rule="token",
              group=MANY)  # fmt: skip
    overlap = []
    for b in range(2):
        prompt = PROMPTS[b, : LENGTHS[b]].tolist()
        with jax.enable_x64(True):
            params = oracle.float64(lms[1].params)
            z = np.asarray(oracle.logits(lms[1].config, params, np.array(prompt)))[-1]
        p = next_token.distribution(target(prompt), tilt=tilt(prompt))
        overlap.append(np.minimum(p, next_token.distribution(z)).sum())
    rate = np.mean(overlap)
    error = np.sqrt(rate * (1 - rate) / (2 * MANY))
    assert out.stats["accepted"][0] == pytest.approx(rate, abs=4 * error)


def same(a, b):
    np.testing.assert_array_equal(a.batch.tokens, b.batch.tokens)
    np.testing.assert_array_equal(a.batch.lengths, b.batch.lengths)


def test_a_constant_in_the_guide_changes_nothing_however_large(lms):
    """exp(hi) is no float32."""
    settings = dict(mode="lazy", candidates=3, group=64)
    low = run(lms, guide=guide("scalar"), **settings)
    high = guide("scalar", VALUES + 200, LO + 200, HI + 200)
    same(run(lms, guide=high, **settings), low)


def test_a_forced_token_is_said_whatever_the_guide_gives_it(lms):
    table = VALUES.copy()
    table[:, 4] = -60.0
    out = run(lms, guide=guide("scalar", table, lo=-60.0), mode="thin", candidates=3,
              group=8, forced=np.array([[4], [4]]))  # fmt: skip
    first = np.take_along_axis(out.batch.tokens, LENGTHS[:, None, None], -1)
    assert (first == 4).all()


@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_what_is_wrong_where_no_response_goes_is_no_error(lms, kind):
    """NaN after a token that is never said."""
    table = VALUES.copy()
    never = {0: -np.inf, 3: -np.inf}
    table[:, :] = (
        np.where(np.arange(V) == 3, np.nan, table) if kind == "scalar" else table
    )
    good = guide(kind, np.nan_to_num(table))
    settings = dict(logit_bias=never, group=8, eos_ids=(), candidates=3)
    if kind == "scalar":
        same(run(lms, guide=guide(kind, table), **settings),
             run(lms, guide=good, **settings))  # fmt: skip
    else:
        run(lms, guide=good, **settings)


def test_a_guide_that_leaves_nothing_is_an_error(lms):
    for kind in ("vector", "scalar"):
        nothing = guide(kind, np.full_like(VALUES, -np.inf))
        with pytest.raises(ValueError, match="no token is left to draw"):
            run(lms, guide=nothing, group=8, candidates=3)


BAD = {
    "is none of": dict(guide=guide("scalar"), mode="vector"),
    "needs a guide": dict(mode="thin"),
    "finite bounds": dict(guide=guide("scalar", hi=np.inf), mode="thin"),
    "finite bounds.*lo=-inf": dict(guide=guide("scalar", lo=-np.inf), mode="lazy"),
    "temperature 0": dict(guide=guide("scalar"), mode="lazy", temperature=0.0),
    "guided_draft": dict(guide=guide("scalar"), guided_draft=True),
    "block_length": dict(guide=guide("block"), block_length=0),
    r"rows \[.*left its bounds": dict(guide=guide("scalar", hi=0.0), mode="thin",
                                      candidates=2, group=MANY),
    r"rows \[.*gave NaN": dict(guide=guide("scalar", table=VALUES * np.nan),
                               mode="thin", candidates=2, group=MANY),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_named(lms, name):
    with pytest.raises(ValueError, match=name):
        run(lms, **BAD[name])


def test_a_guide_that_refuses_everything_is_an_error(lms, monkeypatch):
    monkeypatch.setattr(speculate, "TRIES", 8)
    for kind, more in (("scalar", dict(mode="thin", candidates=3)), ("block", {})):
        never = guide(kind, lo=-np.inf, hi=60.0)
        with pytest.raises(ValueError, match="kept nothing in all tries"):
            run(lms, guide=never, group=3, **more)
