"""Speculative rejection against best of N, and what it gives up for the tokens it saves."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import check
from alignax.decoders import best_of_n, speculative_rejection
from alignax.sampling import decode

pytestmark = pytest.mark.slow

V, NEW, EOS = 3, 4, (0,)
PROMPT = [2, 1, 1, 2]
KEY = jax.random.key(5)


def score(y):
    """Of a beginning what it is of the whole, so far: how many 1s, less its 2s."""
    return y.count(1) - 0.5 * y.count(2) + 0.1 * (y[-1] == 0)


def late(y):
    """A beginning tells the opposite of it."""
    whole = len(y) == NEW or y[-1] == 0
    return y.count(1) * (1.0 if whole else -1.0)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V, num_layers=1))


@pytest.fixture(scope="module")
def base(lm):
    return searching.distribution(searching.twin(lm), PROMPT, max_new=NEW, eos_ids=EOS)


def run(lm, rows, search=speculative_rejection.search, judge=score, **settings):
    settings = dict(max_new=NEW, eos_ids=EOS, n=4) | settings
    prompts, lengths = np.tile(PROMPT, (rows, 1)), np.full(rows, len(PROMPT))
    judge = searching.by_response(judge)
    return search(lm, {}, prompts, lengths, KEY, judge=judge, **settings)


def test_without_rejection_it_has_the_distribution_of_the_best_of_n(lm, base):
    """In blocks of two tokens; a beginning's score is forgotten when it goes on."""
    out = run(lm, 2000, reject=0.0, every=2, judge=late)
    assert (
        searching.surprise(searching.responses(out), searching.best(base, late, 4)) < 4
    )
    assert out.stats["rejected"] == out.stats["tokens_saved"] == 0


def test_judged_only_at_the_end_it_is_the_best_of_n_itself(lm):
    out = run(lm, 6, every=NEW, reject=0.9)
    best = run(lm, 6, best_of_n.search)
    np.testing.assert_array_equal(out.batch.tokens, best.batch.tokens)
    np.testing.assert_array_equal(out.batch.feedback, best.batch.feedback)
    assert out.stats["tokens_sampled"] == best.stats["tokens_sampled"]
    assert out.stats["rejected"] == 0


def test_it_saves_tokens_and_keeps_the_reward_if_beginnings_tell(lm):
    """Of the same key: the base below, the best of N above, at part of its tokens."""
    best = run(lm, 500, best_of_n.search, n=8)
    one = run(lm, 500, best_of_n.search, n=1)
    out = run(lm, 500, every=1, n=8)
    check(out.batch)
    got = np.asarray(out.batch.feedback)
    np.testing.assert_allclose(
        got[:, 0], [score(y) for y in searching.responses(out)], atol=1e-6
    )
    assert out.stats["tokens_sampled"] < 0.8 * best.stats["tokens_sampled"]
    assert out.stats["rejected"] > 500
    gain = got.mean() - one.batch.feedback.mean()
    assert gain > 0.7 * (best.batch.feedback.mean() - one.batch.feedback.mean())


def test_it_loses_where_beginnings_mislead(lm):
    best = run(lm, 500, best_of_n.search, judge=late, n=8)
    out = run(lm, 500, every=1, judge=late, n=8)
    error = np.asarray(best.batch.feedback).std() / np.sqrt(500)
    assert out.batch.feedback.mean() < best.batch.feedback.mean() - 4 * error


def test_the_upper_half_goes_on_and_a_finished_response_stays_a_candidate(lm):
    """By a judge with a memory: of each round, who was asked, and what it said."""
    rounds = []

    def judge(batch):
        valid = np.asarray(batch.valid)
        scores = np.random.default_rng(len(rounds)).normal(size=valid.shape)
        rows = searching.rows(batch)[0]
        rounds.append([(rows[k], scores[0, k]) for k in np.flatnonzero(valid[0])])
        return scores

    prompts, lengths = np.array([PROMPT]), np.array([4])
    out = speculative_rejection.search(
        lm, {}, prompts, lengths, KEY, max_new=NEW, eos_ids=EOS, judge=judge, n=8,
        every=1,
    )  # fmt: skip
    pool = []  # (score, finished)
    for t, asked in enumerate(rounds):
        finished = [(s, y) for s, y in pool if y[-1] == 0]
        pool = finished + [(s, y) for y, s in asked]
        cut = sorted(s for s, _ in pool)[-(-(len(pool) - 1) // 2)]
        pool = [(s, y) for s, y in pool if s >= cut or y[-1] == 0 or len(y) == NEW]
        going = [y for s, y in pool if y[-1] != 0 and len(y) < NEW]
        if t + 1 < len(rounds):
            assert sorted(going) == sorted(y[:-1] for y, _ in rounds[t + 1])
    value, winner = max(pool)
    assert searching.responses(out) == [winner]
    assert out.batch.feedback[0, 0] == pytest.approx(value, abs=1e-6)
    assert out.stats["judge_calls"] == sum(map(len, rounds))
    assert out.stats["tokens_sampled"] == sum(map(len, rounds))


def test_a_prompt_does_not_see_how_many_of_its_neighbour_survive(lm):
    """Its rows stand elsewhere, and in another shape, where the neighbour's all tie."""

    def taste(y):
        return np.sin(sum(t * i * i for i, t in enumerate(y, 2)))

    got = []
    for weight in (1.0, 0.0):

        def judge(batch, weight=weight):
            return searching.by_response(taste)(batch) * np.array(
                [[weight]] + [[1]] * 5
            )

        out = speculative_rejection.search(
            lm, {}, np.array([PROMPT] * 6), np.full(6, 4), KEY, max_new=NEW,
            eos_ids=(), judge=judge, n=8, every=1,
        )  # fmt: skip
        got.append(searching.responses(out)[1:])
    assert got[0] == got[1]
    assert len(set(got[0])) > 1


def test_a_second_call_compiles_nothing_though_other_rows_survive(lm):
    """Rows shrink by powers of two: 1, 2, 4 at most."""
    for key in range(5):
        before = decode._generate._cache_size()
        speculative_rejection.search(
            lm, {}, np.array([PROMPT] * 3), np.array([4, 3, 4]), jax.random.key(key),
            max_new=NEW, eos_ids=EOS, judge=searching.by_response(score), n=4, every=1,
        )  # fmt: skip
    assert decode._generate._cache_size() == before


def test_bad_input_is_named(lm):
    for settings, message in (
        ({"n": 0}, "n=0"),
        ({"every": 0}, "every=0"),
        ({"reject": 1.0}, r"reject=1\.0"),
        (
            {"sampling": {"presence_penalty": 1.0}, "every": 1},
            "presence_penalty'.*earlier tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(lm, 2, **settings)
