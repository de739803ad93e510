"""Speculation on tables: the distribution of every response, in the oracle and in JAX."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import speculation as spec

from alignax.sampling import verify

V, T, GAMMA, BETA = 3, 4, 2, 0.5


class World:
    """Tables for every prefix: target p, draft q, reward g of a next token."""

    def __init__(self, seed, guided_draft=False, sharp=1.0):
        @functools.cache
        def table(prefix, role):
            rng = np.random.default_rng([seed, role, len(prefix), *prefix])
            return sharp * rng.normal(size=V)

        def softmax(z):
            return np.exp(z - z.max()) / np.exp(z - z.max()).sum()

        def logits(s):
            return table(s, 0)

        self.g = lambda s: table(s, 1)
        self.p = functools.cache(lambda s: softmax(logits(s)))
        self.star = functools.cache(lambda s: softmax(logits(s) + self.g(s) / BETA))
        tilt = 1 / BETA if guided_draft else 0.0
        self.q = functools.cache(
            lambda s: softmax(logits(s) + 0.7 * table(s, 2) + tilt * self.g(s))
        )


def oracle_distribution(rule, world, gamma=GAMMA):
    return spec.distribution(
        lambda s: spec.rounds(rule, s, world.star, world.q, gamma), T
    )


@pytest.mark.parametrize("guided_draft", [False, True])
@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("name", ["token", "block"])
def test_the_oracle_is_exact(name, gamma, guided_draft):
    world = World(0, guided_draft)
    rule = spec.token(world.star, world.q) if name == "token" else spec.block
    got = oracle_distribution(rule, world, gamma)
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)
    assert spec.distance(got, spec.plain(world.star, T)) < 1e-12


def wrong(name, w):
    """Rules that look right, each with one thing wrong."""
    right = dict(
        accept=lambda s, x: min(1.0, w.star(s)[x] / w.q(s)[x]),
        residual=lambda s: spec.normalised(np.maximum(w.star(s) - w.q(s), 0)),
        bonus=w.star,
    )
    change = {
        "accepts with the unguided target": dict(
            accept=lambda s, x: min(1.0, w.p(s)[x] / w.q(s)[x])
        ),
        "residual of the unguided target": dict(
            residual=lambda s: spec.normalised(np.maximum(w.p(s) - w.q(s), 0))
        ),
        "draws again from the target": dict(residual=w.star),
        "keeps what has a reward": dict(
            accept=lambda s, x: float(w.g(s)[x] >= 0.0), residual=w.p, bonus=w.p
        ),
    }[name]
    return spec.stepwise(**(right | change))


@pytest.mark.parametrize(
    "name",
    [
        "accepts with the unguided target", "residual of the unguided target",
        "draws again from the target", "keeps what has a reward",
    ],
)  # fmt: skip
def test_a_wrong_rule_is_seen(name):
    world = World(0)
    off = spec.distance(
        oracle_distribution(wrong(name, world), world), spec.plain(world.star, T)
    )
    assert off > 0.03


@functools.cache
def planned(name):
    """The rule of JAX, of many drafts at once."""
    return jax.jit(jax.vmap(verify.RULES[name]))


def plans(name, world, gamma, prefixes, x64=False):
    """JAX's plans for every draft after every prefix."""
    drafts = [*itertools.product(range(V), repeat=gamma)]
    cells = [(s, d) for s in prefixes for d in drafts]
    kind = np.float64 if x64 else np.float32
    p = np.array(
        [[world.star((*s, *d[:i])) for i in range(gamma + 1)] for s, d in cells]
    )
    q = np.array([[world.q((*s, *d[:i])) for i in range(gamma)] for s, d in cells])
    with jax.enable_x64(x64):
        stop, rows = planned(name)(
            jnp.array([d for _, d in cells], jnp.int32), jnp.asarray(p, kind),
            jnp.asarray(q, kind),
        )  # fmt: skip
        stop, rows = np.asarray(stop, np.float64), np.asarray(rows, np.float64)
    drawn = np.array([np.prod([world.q((*s, *d[:i]))[d[i]] for i in range(gamma)])
                      for s, d in cells])  # fmt: skip
    return cells, drawn, stop, rows


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("guided_draft", [False, True])
@pytest.mark.parametrize("name", ["token", "block"])
def test_the_plans_of_jax_are_exact(name, guided_draft, x64):
    """Every response of T tokens: < 1e-5 in float32, < 1e-12 in float64."""
    world = World(0, guided_draft)
    prefixes = [s for n in range(T) for s in itertools.product(range(V), repeat=n)]
    cells, drawn, stop, rows = plans(name, world, GAMMA, prefixes, x64)
    rounds = {s: [] for s in prefixes}
    for (s, d), mass, plan, distributions in zip(cells, drawn, stop, rows, strict=True):
        for tau in range(GAMMA + 1):
            rounds[s] += [
                (mass * plan[tau] * distributions[tau][v], (*d[:tau], v))
                for v in range(V)
            ]
    got = spec.distribution(rounds.__getitem__, T)
    bound = 1e-12 if x64 else 1e-5
    assert abs(sum(got.values()) - 1) < bound
    assert spec.distance(got, spec.plain(world.star, T)) < bound


def test_block_keeps_at_least_as_many_and_sometimes_more():
    gains = []
    for seed in range(30):
        means = {}
        for name in verify.RULES:
            _, drawn, stop, _ = plans(name, World(seed), 3, [()])
            means[name] = drawn @ stop @ np.arange(4)
        gains.append(means["block"] - means["token"])
    assert min(gains) > -1e-6
    assert max(gains) > 0.02


@pytest.mark.parametrize("name", ["token", "block"])
def test_the_first_draft_stays_as_often_as_the_distributions_overlap(name):
    """1 - TV(p, q), with one draft."""
    for seed in range(5):
        world = World(seed)
        _, drawn, stop, _ = plans(name, world, 1, [()])
        overlap = np.minimum(world.star(()), world.q(())).sum()
        assert drawn @ stop[:, 1] == pytest.approx(overlap, abs=1e-6)


def test_tokens_of_a_round_at_a_fixed_acceptance():
    """(1 - α^(γ+1)) / (1 - α) where the same p and q stand at every position."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    fixed = type("Fixed", (), dict(star=lambda self, s: p, q=lambda self, s: q))()
    for gamma in (1, 2, 4):
        _, drawn, stop, _ = plans("token", fixed, gamma, [()])
        got = drawn @ stop @ np.arange(1, gamma + 2)
        assert got == pytest.approx((1 - 0.7 ** (gamma + 1)) / 0.3, rel=1e-5)


@pytest.mark.parametrize("name", ["token", "block"])
def test_equal_distributions_keep_every_draft(name):
    p = jnp.array([[0.5, 0.5, 0.0]] * 3)
    stop, rows = verify.RULES[name](jnp.array([0, 1]), p, p[:2])
    np.testing.assert_allclose(stop, [0, 0, 1])
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("name", ["token", "block"])
def test_a_draft_that_the_target_forbids_never_stays(name):
    p = jnp.array([[0.0, 1.0, 0.0]] * 2)
    q = jnp.array([[0.9, 0.0, 0.1]])
    stop, rows = verify.RULES[name](jnp.array([0]), p, q)
    np.testing.assert_allclose(stop, [1, 0])
    np.testing.assert_allclose(rows[0], [0, 1, 0])


def test_draws_follow_the_plan():
    world = World(1)
    many = 20_000
    p = np.array([world.star((1, 2)[:i]) for i in range(3)], np.float32)
    q = np.array([world.q((1, 2)[:i]) for i in range(2)], np.float32)
    wide = [jnp.asarray(np.broadcast_to(x, (many, *x.shape))) for x in (p, q)]
    keys = jax.random.split(jax.random.key(0), many)
    drafts = jnp.asarray(np.broadcast_to([1, 2], (many, 2)), jnp.int32)
    stays, after, _ = verify.verify(keys, drafts, *wide)
    stop, rows = verify.block(drafts[0], wide[0][0], wide[1][0])
    joint = np.asarray(stop)[:, None] * np.asarray(rows)
    seen = np.zeros((3, V))
    np.add.at(seen, (np.asarray(stays), np.asarray(after)), 1 / many)
    np.testing.assert_allclose(seen, joint, atol=4 * 0.5 / np.sqrt(many))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="known: \\['block', 'token'\\]"):
        verify.verify(jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 1), int),
                      jnp.ones((1, 2, 3)) / 3, jnp.ones((1, 1, 3)) / 3, rule="tokens")  # fmt: skip


def in_step(worlds, length, resample):
    """{(y, z): probability} of two rows that advance by the least that either kept.

    Args:
      worlds: of the two rows.
      length: tokens.
      resample: wrongly, whoever kept more draws its last token again.
    """
    outcomes = [
        functools.cache(
            lambda s, w=w: [
                *spec.rounds(spec.token(w.star, w.q), s, w.star, w.q, GAMMA)
            ]
        )
        for w in worlds
    ]

    def cut(row, s, emitted, many):
        if many == len(emitted) or not resample:
            return [(1.0, emitted[:many])]
        w, here = worlds[row], (*s, *emitted[: many - 1])
        rest = spec.normalised(np.maximum(w.star(here) - w.q(here), 0))
        return [(share, (*emitted[: many - 1], v)) for v, share in enumerate(rest)]

    out, front = {}, {((), ()): 1.0}
    while front:
        grown = {}
        for (s, r), mass in front.items():
            for (a, x), (b, y) in itertools.product(outcomes[0](s), outcomes[1](r)):
                many = min(len(x), len(y))
                for (c, x2), (d, y2) in itertools.product(
                    cut(0, s, x, many), cut(1, r, y, many)
                ):
                    new = (*s, *x2)[:length], (*r, *y2)[:length]
                    place = out if len(new[0]) == length else grown
                    place[new] = place.get(new, 0.0) + mass * a * b * c * d
        front = grown
    return out


def test_rows_may_advance_together_if_they_keep_what_they_accepted():
    worlds, length = (World(2), World(3)), 2
    distributions = [spec.plain(w.star, length) for w in worlds]
    want = {
        (y, z): distributions[0][y] * distributions[1][z]
        for y in distributions[0]
        for z in distributions[1]
    }
    assert spec.distance(in_step(worlds, length, False), want) < 1e-12
    assert spec.distance(in_step(worlds, length, True), want) > 0.03
