"""GSI against the distribution that it samples, and against the tilted distribution that it does not."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import check
from alignax.decoders import gsi
from alignax.sampling import decode

pytestmark = pytest.mark.slow

V, NEW, EOS, N = 3, 2, (0,), 2
PROMPT = [2, 1, 1, 2]
KEY = jax.random.key(11)
BETA, U, HEAT = 0.6, 0.4, 0.5


def score(y):
    return 1.0 * (y[-1] == 1) + 0.3 * (2 in y)


@pytest.fixture(scope="module")
def models(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1)
    return make_lm(config), make_lm(config, 3)


@pytest.fixture(scope="module")
def twins(models):
    return [searching.twin(lm) for lm in models]


def run(models, rows, **settings):
    settings = dict(
        max_new=NEW, eos_ids=EOS, judge=searching.by_response(score), n=N, beta=BETA,
        u=U, temperature=HEAT, step=NEW,
    ) | settings  # fmt: skip
    prompts, lengths = np.tile(PROMPT, (rows, 1)), np.full(rows, len(PROMPT))
    target, draft = models
    return gsi.search(target, {"draft": draft}, prompts, lengths, KEY, **settings)


def softly(distribution, value, n):
    """{y: mass} of one of n draws picked by exp(value / BETA), tuple by tuple."""
    out = dict.fromkeys(distribution, 0.0)
    for draws in itertools.product(distribution, repeat=n):
        weights = [math.exp(value(y) / BETA) for y in draws]
        mass = math.prod(distribution[y] for y in draws)
        for y, w in zip(draws, weights, strict=True):
            out[y] += mass * w / sum(weights)
    return out


def distribution(twins, step, u=U):
    out = {}

    def grow(y, mass):
        if len(y) == NEW or (y and y[-1] in EOS):
            out[y] = out.get(y, 0.0) + mass
            return
        settings = dict(max_new=min(step, NEW - len(y)), eos_ids=EOS, temperature=HEAT)
        p, q = (searching.distribution(f, [*PROMPT, *y], **settings) for f in twins)

        def r(z):
            return score((*y, *z))

        def tilted(z):
            return r(z) + BETA * math.log(p[z] / q[z])

        first, second = softly(q, tilted, N), softly(p, r, N)
        rejected = sum(m for z, m in first.items() if tilted(z) < u)
        for z in p:
            kept = first[z] if tilted(z) >= u else 0.0
            grow((*y, *z), mass * (kept + rejected * second[z]))

    grow((), 1.0)
    return out


def tilt(twins, heat=HEAT):
    settings = dict(max_new=NEW, eos_ids=EOS, temperature=heat)
    p = searching.distribution(twins[0], PROMPT, **settings)
    weights = {y: m * math.exp(score(y) / BETA) for y, m in p.items()}
    return {y: w / sum(weights.values()) for y, w in weights.items()}


@pytest.mark.parametrize("step", [1, 2])
def test_it_has_its_own_distribution_and_not_the_tilted_one(models, twins, step):
    """Four standard deviations of a χ²; the tilted distribution is at least .15 away."""
    want = distribution(twins, step)
    out = run(models, 3000, step=step)
    check(out.batch)
    got = searching.responses(out)
    assert searching.surprise(got, want) < 4
    assert searching.distance(want, tilt(twins)) > 0.15
    assert searching.surprise(got, tilt(twins)) > 20
    np.testing.assert_allclose(out.batch.feedback[:, 0], [score(y) for y in got])
    stats = out.stats
    assert 0.05 < stats["accepted"] < 0.95
    both = stats["draft_tokens"] + stats["target_tokens"]
    assert stats["tokens_sampled"] == both and stats["target_tokens"] > 0


def test_many_drafts_do_not_undo_the_threshold(models, twins):
    """The limit π*(y) (1[r̃ >= u] + π*(r̃ < u)), which is not π*."""
    star = tilt(twins, heat=0.8)
    settings = dict(max_new=NEW, eos_ids=EOS, temperature=0.8)
    p, q = (searching.distribution(f, PROMPT, **settings) for f in twins)
    u = 0.9
    above = {y: score(y) + BETA * math.log(p[y] / q[y]) >= u for y in star}
    below = sum(m for y, m in star.items() if not above[y])
    limit = {y: m * (above[y] + below) for y, m in star.items()}
    got = searching.responses(run(models, 1500, n=32, u=u, temperature=0.8))
    share = {y: got.count(y) / len(got) for y in set(got)}
    # three standard errors of a distance over seven responses, and 1 / n
    assert searching.distance(share, limit) < 0.06
    assert searching.distance(share, star) > 0.18


def test_a_threshold_that_nothing_meets_leaves_the_target(models, twins):
    settings = dict(max_new=NEW, eos_ids=EOS, temperature=HEAT)
    p = searching.distribution(twins[0], PROMPT, **settings)
    out = run(models, 1500, u=1e9)
    assert out.stats["accepted"] == 0
    assert searching.surprise(searching.responses(out), softly(p, score, N)) < 4


def test_a_step_ends_with_its_ids_and_goes_on_after_it(models):
    """With max_new as the step, only step_ids make rounds; EOS still ends all."""
    whole = run(models, 50, max_new=4, step=4)
    split = run(models, 50, max_new=4, step=4, step_ids=(1,))
    assert whole.stats["rounds"] == 1
    assert 1 < split.stats["rounds"] <= 4
    lengths = [len(y) for y in searching.responses(split) if 1 in y]
    assert max(lengths) == 4
    assert all(len(y) == 4 or y[-1] == 0 for y in searching.responses(split))


def test_a_second_call_compiles_nothing(models):
    run(models, 50, max_new=4, step=4)
    before = decode._generate._cache_size(), gsi._step_logps._cache_size()
    run(models, 50, max_new=4, step=4, beta=2.0, temperature=2.0, u=0.0)
    assert (decode._generate._cache_size(), gsi._step_logps._cache_size()) == before


def test_bad_input_is_named(models):
    for settings, message in (
        ({"n": 0}, "n=0"),
        ({"step": 0}, "step=0"),
        ({"beta": 0.0}, r"beta=0\.0"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"draft": "small"}, r"no LM 'small'; there are \['draft'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(models, 2, **settings)
