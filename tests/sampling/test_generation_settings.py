"""Every setting of `generate` against lists in float64, all in one compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracles import next_token
from oracles import transformer as oracle

from alignax.batch import check
from alignax.sampling import decode, guides
from alignax.sampling.automaton import Automaton, stop_sequences
from alignax.sampling.generation_settings import ragged

V, P, NEW, GROUP, B = 11, 5, 6, 2, 4
PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 6, 0, 0, 0], [5, 3, 5, 0, 0], [8, 9, 7, 9, 0]])
LENGTHS = np.array([5, 2, 3, 4])
EOS = (7,)
KEY = jax.random.key(0)
TABLE = np.random.default_rng(3).normal(size=(3, V))
FREE = Automaton(np.zeros((2, V), np.int32), np.ones((2, V), bool))
NEVER = Automaton(np.zeros((3, V), np.int32), np.zeros((3, V), bool))


def sums_init(table, tokens, lengths, length):
    """The state is the sum of all tokens so far, modulo 3."""
    before = jnp.arange(tokens.shape[1]) < lengths[:, None] - 1
    return (tokens * before).sum(-1) % 3


def sums_update(table, state, tokens, start, logits):
    states = jnp.cumsum(jnp.concatenate([state[:, None], tokens], 1), 1) % 3
    return logits + table[states[:, 1:]], states


def sums(table):
    table = jnp.asarray(table, jnp.float32)
    return guides.Guide(Partial(sums_init, table), Partial(sums_update, table))


def everything(lm, prompts=PROMPTS, lengths=LENGTHS, key=KEY, **changes):
    """One program for every test here: what a test does not name is off."""
    b = len(prompts)
    settings = dict(
        temperature=np.ones(b), top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        frequency_penalty=0.0, presence_penalty=0.0, logit_bias=np.zeros((b, V)),
        min_new=0, limits=NEW, stops=NEVER, grammar=FREE, eos_ids=EOS,
        forced=np.full((b, 3), -1), seeds=np.arange(b), guide=sums(np.zeros((3, V))),
    )  # fmt: skip
    out = decode.generate(
        lm, jnp.asarray(prompts), jnp.asarray(lengths), key, max_new=NEW, group=GROUP,
        **(settings | changes),
    )  # fmt: skip
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V, num_layers=1))


@pytest.fixture(scope="module")
def next_logits(lm):
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        run = jax.jit(lambda ids: oracle.logits(lm.config, params, ids))

    def call(ids):
        padded = np.zeros(P + NEW, int)
        padded[: len(ids)] = ids
        with jax.enable_x64(True):
            return np.asarray(run(padded))[len(ids) - 1]

    return call


def responses(out):
    return [
        [tuple(t[m].tolist()) for t, m in zip(*rows, strict=True)]
        for rows in zip(out.batch.tokens, out.batch.mask, strict=True)
    ]


# Row 0 has everything off; every other row mixes settings of its own.
MIXED = dict(
    temperature=np.array([1.0, 0.6, 1.7, 0.0]),
    top_k=np.array([0, 7, 0, 5]),
    top_p=np.array([1.0, 0.8, 0.9, 1.0]),
    min_p=np.array([0.0, 0.05, 0.02, 0.0]),
    repetition_penalty=np.array([1.0, 1.3, 0.8, 2.0]),
    frequency_penalty=np.array([0.0, 0.5, -0.3, 0.4]),
    presence_penalty=np.array([0.0, 0.2, 0.4, -0.1]),
    logit_bias=np.vstack([np.zeros(V), np.random.default_rng(5).normal(size=(3, V))]),
    min_new=np.array([0, 3, 0, 4]),
    limits=np.array([NEW, NEW, 4, NEW]),
    # no 4 after an odd token, from the second token on
    grammar=Automaton(
        np.tile(np.arange(V) % 2, (2, 1)).astype(np.int32),
        np.array([[True] * V, [v != 4 for v in range(V)]]),
    ),
    guide=sums(TABLE),
)


@pytest.mark.parametrize("key", [0, 1])
def test_all_settings_together_follow_the_distribution_in_float64(lm, next_logits, key):
    """Penalties, temperature, masks, truncations, guide, on every sampled prefix."""
    out = everything(lm, key=jax.random.key(key), **MIXED)
    check(out.batch)
    checked = 0
    for b in range(B):
        for g in range(GROUP):
            n = LENGTHS[b]
            for t in range(n, out.batch.lengths[b, g]):
                ids = out.batch.tokens[b, g, :t].tolist()
                late = t + 1 - n >= MIXED["min_new"][b]
                state = ids[-1] % 2 if t > n else 0
                allowed = MIXED["grammar"].flag[state] & (late | (np.arange(V) != 7))
                distribution = next_token.distribution(
                    next_logits(ids), prompt=ids[:n], response=ids[n:],
                    temperature=MIXED["temperature"][b], top_k=MIXED["top_k"][b],
                    top_p=MIXED["top_p"][b], min_p=MIXED["min_p"][b],
                    repetition=MIXED["repetition_penalty"][b],
                    frequency=MIXED["frequency_penalty"][b],
                    presence=MIXED["presence_penalty"][b],
                    bias=MIXED["logit_bias"][b], allowed=allowed,
                    tilt=TABLE[sum(ids) % 3],
                )  # fmt: skip
                token = out.batch.tokens[b, g, t]
                assert distribution[token] > 0
                got = out.batch.old_logps[b, g, t]
                assert got == pytest.approx(np.log(distribution[token]), abs=1e-4)
                z = next_logits(ids)
                raw = z[token] - np.log(np.exp(z).sum())
                assert out.raw_logps[b, g, t] == pytest.approx(raw, abs=1e-4)
                checked += 1
    assert checked > B * GROUP * 2


def test_settings_that_are_off_change_nothing(lm):
    off = everything(lm)
    own = decode.generate(
        lm, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, max_new=NEW, group=GROUP,
        eos_ids=EOS, seeds=np.arange(B),
    )  # fmt: skip
    np.testing.assert_array_equal(off.batch.tokens, own.batch.tokens)
    np.testing.assert_allclose(off.batch.old_logps, own.batch.old_logps, atol=1e-5)
    np.testing.assert_array_equal(off.truncated, own.truncated)
    mixed = everything(lm, **{k: v for k, v in MIXED.items() if k not in ("guide", "grammar")})  # fmt: skip
    assert responses(mixed)[0] == responses(off)[0]
    assert responses(mixed)[1:] != responses(off)[1:]


def test_other_values_of_the_settings_compile_nothing(lm, make_lm):
    everything(lm)
    before = decode._generate._cache_size()
    everything(
        make_lm(lm.config, 1), PROMPTS[::-1], LENGTHS[::-1], jax.random.key(4),
        stops=stop_sequences([[1, 2]], V), forced=np.full((B, 3), 2), seeds=[9, 8, 7, 6],
        **MIXED,
    )  # fmt: skip
    assert decode._generate._cache_size() == before


def test_a_row_with_a_seed_is_the_same_wherever_it_stands(lm):
    order = np.array([2, 0, 3, 1])
    settings = {k: v for k, v in MIXED.items() if k not in ("guide", "grammar")}
    a = everything(lm, **settings)
    b = everything(
        lm, PROMPTS[order], LENGTHS[order], seeds=order,
        **{k: v[order] for k, v in settings.items()},
    )  # fmt: skip
    assert responses(b) == [responses(a)[i] for i in order]
    np.testing.assert_allclose(b.batch.old_logps, a.batch.old_logps[order], atol=1e-5)
    other = everything(lm, seeds=np.arange(B) + 100)
    assert responses(other) != responses(everything(lm))


def test_forced_tokens_are_said_and_certain(lm):
    forced = np.array([[1, 2, 3], [4, -1, 5], [-1, -1, -1], [7, 1, 1]])
    out = everything(lm, forced=forced, limits=5)
    for b in range(B):
        for g, response in enumerate(responses(out)[b]):
            for j, token in enumerate(forced[b][: len(response)]):
                at = LENGTHS[b] + j
                if token >= 0:
                    assert response[j] == token
                    assert out.batch.old_logps[b, g, at] == 0
                    assert out.raw_logps[b, g, at] < 0
                else:
                    assert out.batch.old_logps[b, g, at] < 0
    assert responses(out)[3] == [(7,), (7,)]  # a forced EOS ends


def test_a_stop_ends_with_its_last_token_unless_it_is_too_early(lm):
    stops = stop_sequences([[1, 2]], V)
    forced = np.array([[1, 2, 3], [1, 3, 2], [2, 1, 2], [1, 1, 2]])
    out = everything(lm, forced=forced, stops=stops, min_new=[3, 0, 0, 0], limits=3)
    assert [r[0] for r in responses(out)] == [
        (1, 2, 3),
        (1, 3, 2),
        (2, 1, 2),
        (1, 1, 2),
    ]
    np.testing.assert_array_equal(out.truncated[:, 0], [True, True, False, False])
    early = everything(lm, forced=forced, stops=stops)
    assert responses(early)[0][0] == (1, 2)


def test_rows_end_at_their_own_limits(lm):
    out = everything(lm, limits=[1, 2, 3, 4], min_new=[1, 2, 3, 4],
                     forced=np.array([[1, 1, 1]] * B))  # fmt: skip
    np.testing.assert_array_equal(
        out.batch.mask.sum(-1), [[1] * 2, [2] * 2, [3] * 2, [4] * 2]
    )
    assert out.truncated[:3].all()
    assert out.stats["steps"] == 4


def test_a_prefill_is_a_longer_prompt(lm):
    """It is neither scored nor counted; ragged, with junk under its padding."""
    prefill = np.array([[1, 2], [3, 10], [10, 10], [5, 6]])
    sizes = np.array([2, 1, 0, 2])
    out = decode.generate(
        lm, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, max_new=NEW, group=GROUP,
        prefill=prefill, prefill_lengths=sizes,
    )  # fmt: skip
    long = np.zeros((B, P + 2), int)
    for b in range(B):
        ids = [*PROMPTS[b, : LENGTHS[b]], *prefill[b, : sizes[b]]]
        long[b, : len(ids)] = ids
    same = decode.generate(
        lm, jnp.asarray(long), jnp.asarray(LENGTHS + sizes), KEY, max_new=NEW, group=GROUP
    )  # fmt: skip
    np.testing.assert_array_equal(out.batch.tokens, same.batch.tokens)
    np.testing.assert_array_equal(out.batch.mask, same.batch.mask)


def test_a_row_without_a_token_to_draw_is_an_error_that_names_it(lm):
    bias = np.zeros((B, V))
    bias[2] = -np.inf
    with pytest.raises(ValueError, match=r"rows \[4, 5\].*no token to draw"):
        everything(lm, logit_bias=bias)
    nothing = Automaton(FREE.next, np.zeros((2, V), bool))
    with pytest.raises(ValueError, match="the grammar"):
        everything(lm, grammar=nothing)


def test_a_guide_that_gives_nan_is_an_error(lm):
    with pytest.raises(ValueError, match="the guide gave NaN"):
        everything(lm, guide=sums(np.where(np.arange(V) == 3, np.nan, TABLE)))


def value_init(table, tokens, lengths, length):
    return sums_init(table, tokens, lengths, length)


def value_update(table, state, tokens, start, logits):
    states = sums_update(jnp.zeros((3, V)), state, tokens, start, 0.0)[1]
    return table[states[:, 1:], tokens], states


def scalar(table):
    table = jnp.asarray(table, jnp.float32)
    return guides.Guide(
        Partial(value_init, table), Partial(value_update, table), "scalar"
    )


def test_a_scalar_guide_tilts_the_best_tokens_by_their_values(lm, next_logits):
    """V(s v) = table[sum of s v modulo 3, v], on a top-k of 4."""
    guide = guides.chain(scalar(TABLE), scalar(0.5 * TABLE))
    out = decode.generate(
        lm, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, max_new=NEW, group=GROUP,
        guide=guide, candidates=4,
    )  # fmt: skip
    tokens = np.asarray(out.batch.tokens)
    for b in range(B):
        for t in range(LENGTHS[b], LENGTHS[b] + NEW):
            ids = tokens[b, 0, :t].tolist()
            tilt = [1.5 * TABLE[(sum(ids) + v) % 3, v] for v in range(V)]
            distribution = next_token.distribution(next_logits(ids), top_k=4, tilt=tilt)
            got = float(out.batch.old_logps[b, 0, t])
            assert got == pytest.approx(np.log(distribution[tokens[b, 0, t]]), abs=1e-4)


BAD = {
    "top_k": dict(top_k=-1), "top_p": dict(top_p=0.0), "min_p": dict(min_p=1.5),
    "temperature": dict(temperature=np.array([1, 1, 1, -1.0])),
    "repetition_penalty": dict(repetition_penalty=0.0),
    "limits": dict(limits=NEW + 1), "min_new": dict(min_new=[1, 2]),
    "logit_bias": dict(logit_bias={V: 1.0}), "seeds": dict(seeds=[0.5] * B),
    "forced": dict(forced=np.full((B, 1), V)),
    "prefill_lengths": dict(prefill=np.ones((B, 1), int), prefill_lengths=[2] * B),
    "grammar": dict(grammar=stop_sequences([[1]], V + 1)),
    "guide.kind": dict(guide=sums(TABLE)._replace(kind="block")),
    "guide.lo": dict(guide=sums(TABLE)._replace(lo=1.0, hi=0.0)),
    "candidates": dict(candidates=0),
    "lengths": dict(lengths=np.array([0, 1, 1, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_named(lm, name):
    settings = dict(lengths=LENGTHS) | BAD[name]
    lengths = jnp.asarray(settings.pop("lengths"))
    with pytest.raises(ValueError, match=name):
        decode.generate(lm, jnp.asarray(PROMPTS), lengths, KEY, max_new=NEW, **settings)


def test_guides_of_two_kinds_do_not_chain():
    with pytest.raises(ValueError, match=r"kinds \['scalar', 'vector'\]"):
        guides.chain(sums(TABLE), scalar(TABLE))


def test_a_chain_adds_bounds_and_tilts():
    table = jnp.asarray(TABLE, jnp.float32)
    two = guides.chain(*(sums(TABLE)._replace(lo=-1.0, hi=2.0),) * 2)
    assert (two.lo, two.hi) == (-2, 4)
    tokens = jnp.array([[1, 2, 2]])
    state = two.init(tokens, jnp.array([3]), 8)
    out, states = two.update(state, tokens[:, 2:], jnp.array([2]), jnp.zeros((1, 1, V)))
    np.testing.assert_allclose(out[0, 0], 2 * table[5 % 3], rtol=1e-6)
    assert [int(s[0]) for s in two.keep(states, jnp.array([1]))] == [2, 2]
    assert [int(s[0]) for s in two.keep(states, jnp.array([0]))] == [0, 0]


def test_ragged_prompts_share_few_shapes():
    tokens, lengths = ragged([[1, 2], [3] * 17, [4]])
    assert tokens.shape == (3, 32)
    np.testing.assert_array_equal(lengths, [2, 17, 1])
    assert ragged([[1] * 16])[0].shape == (1, 16)
    with pytest.raises(ValueError, match="expected at least 1"):
        ragged([[1], []])
    with pytest.raises(ValueError, match="prompt 1 has 3 tokens, expected at most 2"):
        ragged([[1], [1, 2, 3]], longest=2)


def replaced_update(table, state, tokens, start, logits):
    """The table instead of logits that are unsure: a tilt that depends on the logits."""
    sure = jax.nn.softmax(logits).max(-1, keepdims=True) >= 0.4
    states = jnp.cumsum(jnp.concatenate([state[:, None], tokens], 1), 1) % 3
    return jnp.where(sure, logits, table[states[:, 1:]]), states


def test_a_chain_composes_its_guides_in_their_order():
    """An oracle in float64; the sum of both tilts is only one of the two orders."""
    rng = np.random.default_rng(5)
    one, other = 2 * rng.normal(size=(2, 3, V))
    add, replace = sums(one), sums(other)._replace(
        update=Partial(replaced_update, jnp.asarray(other, jnp.float32))
    )  # fmt: skip
    tokens = np.array([[4, 1, 5, 2], [3, 3, 1, 1]])
    logits = 1.5 * rng.normal(size=(2, 2, V))

    def composed(order):
        out, now = logits.copy(), np.cumsum(tokens, 1)[:, 2:] % 3
        for guide in order:
            if guide is add:
                out += one[now]
            else:
                p = np.exp(out) / np.exp(out).sum(-1, keepdims=True)
                out = np.where(p.max(-1, keepdims=True) >= 0.4, out, other[now])
        return out

    found = []
    for order in ((add, replace), (replace, add)):
        guide = guides.chain(*order)
        state = guide.init(jnp.asarray(tokens[:, :3]), jnp.array([3, 3]), 8)
        given = jnp.asarray(logits, jnp.float32)
        out, _ = guide.update(
            state, jnp.asarray(tokens[:, 2:]), jnp.array([2, 2]), given
        )
        np.testing.assert_allclose(out, composed(order), atol=1e-5)
        found.append(np.asarray(out))
    alone = [composed((guide,)) - logits for guide in (add, replace)]
    assert np.abs(found[0] - (logits + sum(alone))).max() > 0.1
    assert np.abs(found[0] - found[1]).max() > 0.1
