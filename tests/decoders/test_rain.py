"""RAIN through the engine: what the tree is told of texts, and what it then says."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import searching

from alignax import logprob
from alignax.batch import check
from alignax.decoders import rain
from alignax.sampling import decode
from alignax.search import hypotheses

V, NEW, EOS, HARM = 5, 6, (0,), 4
PROMPTS, LENGTHS = np.array([[2, 1, 3], [3, 1, 0]]), np.array([3, 2])
KEY = jax.random.key(1)
SMALL = dict(
    max_new=NEW, eos_ids=EOS, sizes=(1, 2), sets=4, top_k=3, rollout=3, simulations=10,
    extra=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(dataclasses.replace(tiny_config, vocab_size=V, num_layers=1))


def harmless(y):
    return -1.0 if HARM in y else 1.0


def run(lm, judge=harmless, key=KEY, **settings):
    judge = searching.by_response(judge) if judge else None
    return rain.search(
        lm, {}, PROMPTS, LENGTHS, key, judge=judge, **{**SMALL, **settings}
    )


def world(lm, embed=None, judge=harmless, stats=None, **changes):
    """What `search` asks of the first prompt."""
    empty = hypotheses.prompt(hypotheses.start(PROMPTS, LENGTHS, NEW), 0)
    s = dict(
        sizes=(1, 2), sets=4, top_k=3, heat=1.0, temperature=1.0, rollout=3, most=5
    )
    stats = {"tokens_sampled": 0, "judge_calls": 0} if stats is None else stats
    return rain._world(
        lm, empty, KEY, searching.by_response(judge), embed, frozenset(EOS),
        frozenset((3,)), *(s | changes).values(), stats,
    )  # fmt: skip


def test_harm_is_avoided_and_the_rest_of_the_distribution_kept(tiny_config):
    """Harmful at .3 a token: a response of six would be harmless at .12."""
    config = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1, tied=False)
    lm = searching.constant(config, [0.1, 0.3, 0.2, 0.1, 0.3])
    out = run(lm)
    check(out.batch)
    assert all(HARM not in y for y in searching.responses(out))
    np.testing.assert_array_equal(out.batch.feedback, 1.0)
    sunk = searching.constant(config, [0.01, 0.03, 0.02, 0.01, 0.93])
    assert all(HARM in y for y in searching.responses(run(sunk, sizes=(1,))))
    stats = out.stats
    assert 0 < stats["judge_calls"] <= stats["simulations"] + 2
    assert stats["simulations"] <= 10 * NEW * 2


def test_raw_logps_are_those_of_the_kernel_and_a_key_decides(lm):
    few = dict(
        simulations=6, judge=lambda y: np.sin(sum(t * i for i, t in enumerate(y, 2)))
    )
    out, again = run(lm, **few), run(lm, **few)
    np.testing.assert_array_equal(out.batch.tokens, again.batch.tokens)
    others = [run(lm, key=jax.random.key(i), **few).batch.tokens for i in (4, 5, 6)]
    assert any((out.batch.tokens != x).any() for x in others)
    want = logprob.score(lm, out.batch).logps
    np.testing.assert_allclose(out.raw_logps, want, atol=1e-5)
    assert out.batch.old_logps is None
    ends = [y[-1] == 0 for y in searching.responses(out)]
    np.testing.assert_array_equal(np.asarray(out.truncated)[:, 0], np.logical_not(ends))


def test_sets_have_the_masses_of_the_model_and_the_greedy_one_is_kept_in_bounds(lm):
    next_logits = searching.twin(lm)
    asked = world(lm, heat=50.0)  # any of the top tokens, but for the greedy set

    def mass(text, tokens):
        distribution = searching.distribution(
            next_logits, [*PROMPTS[0], *text], max_new=len(tokens), eos_ids=EOS
        )
        return distribution[tokens]

    ones = asked.propose((1,), 0)
    assert len(ones) == 4
    assert [p for _, p in ones] == sorted((p for _, p in ones), reverse=True)
    for tokens, p in ones:
        assert p == pytest.approx(mass((1,), tokens), rel=1e-4)
    # the last size is that of all deeper ones
    for depth, text in ((1, (1, 2)), (7, (1, 2)), (1, (4,)), (1, (2, 2)), (1, (3, 1))):
        (greedy, p), *others = asked.propose(text, depth)
        assert greedy[0] == np.argmax(next_logits([*PROMPTS[0], *text]))
        rest = [q for _, q in others]
        assert len({greedy, *(t for t, _ in others)}) == 1 + len(others) <= 4
        for tokens, q in others:
            assert len(tokens) == 2 or tokens[-1] == 0
            assert q == pytest.approx(mass(text, tokens), rel=1e-4)
        want = mass(text, greedy)
        if rest:
            want = max(min(want, sum(rest)), max(rest) + min(rest))
        assert p == pytest.approx(want, rel=1e-4)
    # one that is added is not there yet
    known = [tokens for tokens, _ in ones]
    assert asked.another((1,), 0, known)[0] not in known
    everything = [(i,) for i in range(V)]
    assert asked.another((1,), 0, everything) is None


def test_an_evaluation_reads_to_the_end_of_a_clause_and_once(lm):
    stats = {"tokens_sampled": 0, "judge_calls": 0}
    asked = world(lm, stats=stats)
    seen = set()
    for _ in range(12):
        value, whole = asked.evaluate((1,))
        seen.add(whole)
        assert value == harmless(whole)
        assert whole[0] == 1
        assert len(whole) == 4 or whole[-1] in (0, 3)
        assert not {0, 3} & set(whole[:-1])
    assert stats["judge_calls"] == len(seen) > 1
    before = stats["tokens_sampled"]
    for text in (
        (1, 3),
        (1, 0),
        (1, 2, 1, 2, 1, 2),
    ):  # a clause, EOS, as long as may be
        assert asked.evaluate(text)[1] == text
    assert stats["tokens_sampled"] == before


def test_texts_are_compared_from_their_set_on(lm):
    """By the mean of the model's final states, or by whoever is handed in."""
    text, begins = (1, 2, 2, 4), [0, 1, 3]
    states = np.asarray(rain._states(lm, np.array([[*PROMPTS[0], *text]])))[0, 3:]
    want = [states[i:].mean(0) for i in begins]
    np.testing.assert_allclose(world(lm).embed(text, begins), want, atol=1e-5)

    def embed(batch):
        return np.stack(
            [
                [np.bincount(row, minlength=V) for row in group]
                for group in searching.rows(batch)
            ]
        )

    got = world(lm, embed).embed(text, begins)
    np.testing.assert_array_equal(
        got, [[0, 1, 2, 0, 1], [0, 0, 2, 0, 1], [0, 0, 0, 0, 1]]
    )


def test_a_second_call_compiles_nothing(lm):
    def sizes():
        caches = decode._generate, hypotheses._best, rain._states, hypotheses.score
        return [f._cache_size() for f in caches]

    run(lm)
    before = sizes()
    run(lm, key=jax.random.key(8), simulations=12, temperature=0.7, heat=2.0)
    assert sizes() == before


def test_bad_input_is_named(lm):
    for settings, message in (
        ({"sets": 0}, "sets=0"),
        ({"heat": 0.0}, r"heat=0\.0"),
        ({"sizes": ()}, r"sizes=\(\)"),
        ({"judge": None}, "judge is None"),
        ({"judge": lambda y: 2.0}, r"judge gave 2\.0.*-1\.0\.\.1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(lm, **settings)
