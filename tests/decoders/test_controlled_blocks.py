"""Blockwise controlled decoding against its own distribution, block by block, in float64."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import check
from alignax.decoders import best_of_n, controlled_blocks
from alignax.sampling import decode

V, NEW, EOS, N = 3, 4, (0,), 3
PROMPT = [2, 1, 1, 2]
KEY = jax.random.key(7)


def score(y):
    """Not additive over blocks, and with ties."""
    return y.count(1) - 1.5 * (y[:2] == (1, 1)) + 0.5 * (y[-1] == 0)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V, num_layers=1))


@pytest.fixture(scope="module")
def next_logits(lm):
    return searching.twin(lm)


def run(lm, rows, search=controlled_blocks.search, **settings):
    judge = searching.by_response(score)
    settings = dict(max_new=NEW, eos_ids=EOS, n=N, judge=judge) | settings
    prompts, lengths = np.tile(PROMPT, (rows, 1)), np.full(rows, len(PROMPT))
    return search(lm, {}, prompts, lengths, KEY, **settings)


def distribution(next_logits, block, n):
    """The best of n blocks after every prefix; and the divergence of the first block."""
    out, first = {}, 0.0

    def grow(y, mass):
        nonlocal first
        if len(y) == NEW or (y and y[-1] in EOS):
            out[y] = mass
            return
        many = min(block, NEW - len(y))
        base = searching.distribution(
            next_logits, [*PROMPT, *y], max_new=many, eos_ids=EOS
        )
        best = searching.best(base, lambda b: score((*y, *b)), n)
        if not y:
            first = sum(p * math.log(p / base[b]) for b, p in best.items())
        for b, p in best.items():
            grow((*y, *b), mass * p)

    grow((), 1.0)
    return out, first


@pytest.mark.parametrize("block", [2, 3])
def test_it_has_the_distribution_of_its_blocks(lm, next_logits, block):
    """Of 3, the last one is short. Four standard deviations of a χ²."""
    want, nats = distribution(next_logits, block, N)
    assert 0 < nats <= math.log(N) - (N - 1) / N
    out = run(lm, 2000, block=block)
    check(out.batch)
    got = searching.responses(out)
    assert searching.surprise(got, want) < 4
    whole, _ = distribution(
        next_logits, NEW, N
    )  # the test could tell it from the best of n
    assert searching.surprise(got, whole) > 20
    np.testing.assert_array_equal(out.batch.feedback[:, 0], [score(y) for y in got])
    assert out.stats["rounds"] == 2


def test_one_block_is_the_best_of_n(lm):
    one, best = (
        run(lm, 6, block=99),
        run(lm, 6, best_of_n.search),
    )
    np.testing.assert_array_equal(one.batch.tokens, best.batch.tokens)
    np.testing.assert_array_equal(one.batch.feedback, best.batch.feedback)
    assert one.stats == best.stats | {"rounds": 1}


def test_raw_logps_follow_the_response_through_its_blocks(lm, next_logits):
    out = run(lm, 3, block=1, temperature=0.5)
    assert out.batch.old_logps is None
    for y, raw in zip(
        searching.responses(out), np.asarray(out.raw_logps)[:, 0], strict=True
    ):
        for i, token in enumerate(y):
            z = next_logits([*PROMPT, *y[:i]])
            want = z[token] - np.log(np.exp(z).sum())
            assert raw[len(PROMPT) + i] == pytest.approx(want, abs=1e-4)  # float32


def test_a_second_call_compiles_nothing(lm):
    run(lm, 6, block=2)
    before = decode._generate._cache_size()
    run(lm, 6, block=2, temperature=2.0)
    assert decode._generate._cache_size() == before


def test_bad_input_is_named(lm):
    for settings, message in (({"n": 0}, "n=0"), ({"block": 0}, "block=0")):
        with pytest.raises(ValueError, match=message):
            run(lm, 2, **settings)
