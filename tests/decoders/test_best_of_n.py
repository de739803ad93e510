"""Best of N against its distribution, written down response by response in float64."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import check
from alignax.decoders import best_of_n
from alignax.sampling import decode

V, NEW, EOS = 3, 3, (0,)
MANY = 3000  # rows of the same prompt: as many samples
PROMPT = [2, 1, 1, 2]
KEY = jax.random.key(3)


def score(y):
    """With ties: how many 1s, and whether it ended."""
    return y.count(1) + 0.5 * (y[-1] == 0)


JUDGE = searching.by_response(score)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V, num_layers=1))


@pytest.fixture(scope="module")
def base(lm):
    return searching.distribution(searching.twin(lm), PROMPT, max_new=NEW, eos_ids=EOS)


def run(lm, rows=MANY, prompt=PROMPT, **settings):
    settings = dict(max_new=NEW, eos_ids=EOS, judge=JUDGE, n=4) | settings
    prompts, lengths = np.tile(prompt, (rows, 1)), np.full(rows, len(prompt))
    key = settings.pop("key", KEY)
    return best_of_n.search(lm, {}, prompts, lengths, key, **settings)


def test_the_best_and_the_worst_have_their_distributions_with_ties(lm, base):
    """Four standard deviations of a χ² whose mean is its degrees of freedom."""
    best = searching.best(base, score, 4)
    worst = searching.best(base, lambda y: -score(y), 4)
    out = run(lm)
    assert searching.surprise(searching.responses(out), best) < 4
    assert searching.surprise(searching.responses(run(lm, select="worst")), worst) < 4
    # the test could tell: neither is the other, nor the base
    assert searching.surprise(searching.responses(out), worst) > 50
    assert searching.surprise(searching.responses(out), base) > 50
    check(out.batch)
    got = np.asarray(out.batch.feedback)[:, 0]
    np.testing.assert_array_equal(got, [score(y) for y in searching.responses(out)])
    assert out.stats["judge_calls"] == 4 * MANY
    assert 4 * MANY < out.stats["tokens_sampled"] < 4 * MANY * NEW


def test_the_distribution_wins_and_diverges_as_the_closed_forms_say(base):
    """No ties: N / (N + 1) and log N - (N - 1) / N, whose bound holds with atoms too."""
    even = dict.fromkeys(range(4000), 1 / 4000)
    for n, wins, kl in ((2, 0.667, 0.193), (4, 0.8, 0.636), (8, 0.889, 1.204)):
        best = {i: ((i + 1) / 4000) ** n - (i / 4000) ** n for i in even}
        win = sum(p * (i + 0.5) / 4000 for i, p in best.items())
        assert win == pytest.approx(wins, abs=1e-3)
        nats = sum(p * math.log(p * 4000) for p in best.values() if p > 0)
        assert nats == pytest.approx(kl, abs=1e-3)
        tied = searching.best(base, score, n)
        nats = sum(p * math.log(p / base[y]) for y, p in tied.items())
        assert nats < math.log(n) - (n - 1) / n


def test_soft_has_the_distribution_of_its_draws_and_its_two_limits(lm, base):
    """Two draws: every pair of responses, and the softmax between them."""
    lam, distribution = 0.7, dict.fromkeys(base, 0.0)
    for y, p in base.items():
        for z, q in base.items():
            distribution[y] += 2 * p * q / (1 + math.exp((score(z) - score(y)) / lam))
    soft = dict(select="soft", n=2)
    assert (
        searching.surprise(searching.responses(run(lm, lam=lam, **soft)), distribution)
        < 4
    )
    assert searching.surprise(searching.responses(run(lm, lam=1e6, **soft)), base) < 4
    cold = searching.responses(run(lm, lam=1e-6, **soft))
    assert searching.surprise(cold, searching.best(base, score, 2)) < 4
    assert searching.surprise(cold, distribution) > 10


@pytest.mark.parametrize("n", [2, 3])
def test_soft_is_as_near_to_the_tilted_distribution_as_its_bound_says(base, n):
    """KL(π* ‖ π_n) <= log(1 + χ²(π* ‖ p) / n), tuple by tuple."""
    lam, distribution = 0.7, dict.fromkeys(base, 0.0)
    for draws in itertools.product(base, repeat=n):
        weights = [math.exp(score(y) / lam) for y in draws]
        mass = math.prod(base[y] for y in draws) / sum(weights)
        for y, w in zip(draws, weights, strict=True):
            distribution[y] += mass * w
    total = sum(p * math.exp(score(y) / lam) for y, p in base.items())
    star = {y: p * math.exp(score(y) / lam) / total for y, p in base.items()}
    nats = sum(p * math.log(p / distribution[y]) for y, p in star.items())
    chi2 = sum((p - base[y]) ** 2 / base[y] for y, p in star.items())
    assert 0 < nats <= math.log(1 + chi2 / n)


def test_one_draw_is_the_engine_and_its_settings_reach_it(lm):
    one = run(lm, 5, n=1, sampling={"top_k": 2})
    key = jax.random.fold_in(KEY, 0)
    plain = decode.generate(
        lm, np.tile(PROMPT, (5, 1)), np.full(5, 4), key, max_new=NEW, eos_ids=EOS,
        top_k=2,
    )  # fmt: skip
    for name in ("tokens", "mask", "lengths"):
        got, want = getattr(one.batch, name), getattr(plain.batch, name)
        np.testing.assert_array_equal(got, want)
    assert one.batch.old_logps is None  # a choice has no distribution of its tokens
    # float32: the rows are padded to other widths
    np.testing.assert_allclose(one.raw_logps, plain.raw_logps, atol=1e-5)
    np.testing.assert_array_equal(one.truncated, plain.truncated)


def test_a_second_call_compiles_nothing(lm):
    run(lm, 5, n=2)
    before = decode._generate._cache_size()
    run(lm, 5, n=2, prompt=[1, 1, 2, 2], key=jax.random.key(9), temperature=0.5)
    assert decode._generate._cache_size() == before


def test_bad_input_is_named(lm):
    for settings, message in (
        ({"n": 0}, "n=0"),
        ({"lam": 0.0}, r"lam=0\.0"),
        ({"select": "median"}, "'median'.*best, worst, soft"),
        ({"judge": None}, "judge is None"),
        ({"judge": lambda b: np.zeros(5)}, r"shape \(5,\), expected \[B, G\]=\(5, 2\)"),
        ({"judge": lambda b: np.full((5, 2), np.nan)}, "judge gave nan"),
        ({"max_new": 0}, "max_new=0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(lm, 5, **{"n": 2, **settings})
