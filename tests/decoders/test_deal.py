"""DeAL against its pseudo-code in float64, on a task of keywords."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import LM, check
from alignax.decoders import deal
from alignax.sampling import decode
from alignax.search import hypotheses

V, NEW, EOS = 8, 7, (0,)
PROMPTS = np.array(
    [[2, 1, 1, 2], [3, 7, 0, 0], [4, 4, 6, 0], [5, 1, 0, 0], [7, 0, 0, 0]]
)
LENGTHS = np.array([4, 2, 3, 2, 1])
WORDS = {3, 5, 6}


def coverage(y):
    return len(WORDS & set(y)) / len(WORDS)


JUDGE = searching.by_response(coverage)


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1, tied=False)
    lm = make_lm(config, 3)
    return LM(config, lm.params | {"head": 1.5 * lm.params["head"]})


@pytest.fixture(scope="module")
def next_logits(lm):
    return searching.twin(lm)


def run(lm, **settings):
    settings = (
        dict(max_new=NEW, eos_ids=EOS, judge=JUDGE, top_k=5, lookahead=3) | settings
    )
    return deal.search(lm, {}, PROMPTS, LENGTHS, jax.random.key(0), **settings)


def plain(next_logits, prompt, *, k, ahead, lam, beams, h=coverage):
    """(response, rollouts), as the paper has it: lists and a sort."""

    def rows(y):
        z = next_logits([*prompt, *y])
        return z - np.log(np.exp(z - z.max()).sum()) - z.max()

    def over(y):
        return len(y) == NEW or (len(y) > 0 and y[-1] in EOS)

    alive, finished, rollouts = [((), 0.0)], [], 0
    while alive and len(finished) < beams:
        children = []
        for y, logp in alive:
            row = rows(y)
            for v in np.argsort(-row, kind="stable")[:k]:
                z = (*y, int(v))
                for _ in range(ahead):
                    z = z if over(z) else (*z, int(rows(z).argmax()))
                rollouts += 1
                total = logp + row[v]
                children.append((total + lam * h(z), (*y, int(v)), total))
        children = sorted(children, key=lambda c: -c[0])[:beams]
        finished += [(y, logp) for _, y, logp in children if over(y)]
        alive = [(y, logp) for _, y, logp in children if not over(y)]
    return max(finished, key=lambda f: f[1] + lam * h(f[0])), rollouts


@pytest.mark.parametrize("beams, lam, ahead", [(1, 2.0, 3), (3, 2.0, 3), (1, 4.0, 0)])
def test_it_is_the_search_of_the_paper(lm, next_logits, beams, lam, ahead):
    out = run(lm, beams=beams, lam=lam, lookahead=ahead)
    check(out.batch)
    rollouts = 0
    for prompt, n, got, logps, score in zip(
        PROMPTS, LENGTHS, searching.responses(out), np.asarray(out.raw_logps),
        np.asarray(out.batch.feedback)[:, 0], strict=True,
    ):  # fmt: skip
        (want, logp), cost = plain(
            next_logits, prompt[:n], k=5, ahead=ahead, lam=lam, beams=beams
        )
        assert got == want
        assert logps.sum() == pytest.approx(logp, abs=1e-4)  # float32
        assert score == pytest.approx(logp + lam * coverage(want), abs=1e-4)
        rollouts += cost
    assert out.stats["rollouts"] == rollouts


@pytest.mark.parametrize("beams, share", [(1, 0.5), (3, 0.65)])
def test_pruning_changes_nothing_and_saves_rollouts(lm, beams, share):
    """Half of them with one beam. Three beams need the best three to be known."""
    full, pruned = (run(lm, beams=beams, lam=2.0, prune=p) for p in (False, True))
    np.testing.assert_array_equal(pruned.batch.tokens, full.batch.tokens)
    np.testing.assert_array_equal(pruned.batch.feedback, full.batch.feedback)
    assert pruned.stats["rollouts"] <= share * full.stats["rollouts"]
    assert pruned.stats["tokens_sampled"] <= share * full.stats["tokens_sampled"]


@pytest.mark.parametrize("prune", [False, True])
def test_a_self_draft_changes_nothing_and_waits_less_often(lm, prune):
    full = run(lm, lam=2.0)
    fast = run(lm, lam=2.0, self_draft=3, prune=prune)
    np.testing.assert_array_equal(fast.batch.tokens, full.batch.tokens)
    np.testing.assert_allclose(fast.raw_logps, full.raw_logps, atol=1e-5)
    np.testing.assert_allclose(fast.batch.feedback, full.batch.feedback, atol=1e-5)
    if not prune:  # which trades rounds for look-aheads
        assert fast.stats["rounds"] <= 0.6 * full.stats["rounds"]
        assert fast.stats["steps"] <= 0.6 * full.stats["steps"]


def test_a_look_ahead_that_ends_early_counts_the_steps_it_took(lm):
    out = run(lm, lam=2.0, max_new=2, lookahead=16)
    # after the first token one is left to look at, after the second none
    assert out.stats["steps"] == out.stats["rounds"] + 1


@pytest.mark.parametrize("judge", [JUDGE, None], ids=["judge", "none"])
@pytest.mark.parametrize("ways", [{}, {"prune": True}, {"self_draft": 2}], ids=str)
def test_without_weight_and_with_one_beam_it_is_greedy(lm, ways, judge):
    out = run(lm, lam=0.0, judge=judge, **ways)
    greedy = decode.generate(
        lm, PROMPTS, LENGTHS, jax.random.key(0), max_new=NEW, temperature=0.0,
        eos_ids=EOS,
    )  # fmt: skip
    np.testing.assert_array_equal(out.batch.tokens, greedy.batch.tokens)
    np.testing.assert_array_equal(out.batch.mask, greedy.batch.mask)
    np.testing.assert_array_equal(out.truncated, greedy.truncated)
    np.testing.assert_allclose(out.raw_logps, greedy.raw_logps, atol=1e-5)
    assert (out.stats["rollouts"] == 0) == ("prune" in ways)
    assert out.stats["judge_calls"] == 0
    sums = np.asarray(out.raw_logps).sum(-1)
    np.testing.assert_allclose(out.batch.feedback, sums, atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 2])
def test_without_weight_and_judge_it_is_beam_search(lm, next_logits, ahead):
    out = run(lm, lam=0.0, judge=None, beams=3, lookahead=ahead)
    settings = dict(k=5, ahead=0, lam=0.0, beams=3)
    for prompt, n, got in zip(PROMPTS, LENGTHS, searching.responses(out), strict=True):
        assert got == plain(next_logits, prompt[:n], **settings)[0][0]


def test_the_judge_is_called_as_often_as_is_counted(lm):
    seen = []

    def judge(batch):
        seen.append(int(np.asarray(batch.valid).sum()))
        return JUDGE(batch)

    out = run(lm, lam=2.0, judge=judge)
    assert sum(seen) == out.stats["judge_calls"] > out.stats["rollouts"] > 0
    with pytest.raises(ValueError, match="judge is None"):
        run(lm, lam=1e-6, judge=None)


def test_more_weight_covers_more_keywords_with_less_likely_text(lm):
    hard, logps = [], []
    for lam in (0.0, 2.0, 20.0):
        out = run(lm, lam=lam)
        hard.append(np.mean([coverage(y) == 1 for y in searching.responses(out)]))
        logps.append(np.asarray(out.raw_logps).sum() / len(PROMPTS))
    assert hard[0] < hard[1] < hard[2]
    assert logps[0] > logps[1] > logps[2]


def test_the_final_choice_is_by_the_true_score(lm, next_logits):
    """An h whose word on beginnings tells nothing of the whole: beams end otherwise."""

    def h(y):
        whole = len(y) == NEW or 0 in y[-1:]
        return 3.0 * (sum(y) % 2) if whole else coverage(y)

    out = run(lm, judge=searching.by_response(h), lam=2.0, beams=3, lookahead=0)
    settings = dict(k=5, ahead=0, lam=2.0, beams=3, h=h)
    for prompt, n, got in zip(PROMPTS, LENGTHS, searching.responses(out), strict=True):
        assert got == plain(next_logits, prompt[:n], **settings)[0][0]


def test_a_second_call_compiles_nothing(lm):
    settings = dict(lam=2.0, prune=True)
    run(lm, **settings)
    before = decode._generate._cache_size(), hypotheses._best._cache_size()
    run(lm, lam=1.0, prune=True, judge=searching.by_response(lambda y: float(2 in y)))
    assert (decode._generate._cache_size(), hypotheses._best._cache_size()) == before


def test_bad_input_is_named(lm):
    for settings, message in (
        ({"top_k": 0}, "top_k=0"),
        ({"lookahead": -1}, "lookahead=-1"),
        ({"beams": 2, "self_draft": 1}, "self_draft=1, beams=2"),
        ({"self_draft": 4}, "no longer than the look-ahead"),
        ({"prune": True, "hi": np.inf}, "hi=inf"),
        ({"prune": True, "hi": 0.1, "lam": 9.0}, r"judge gave 0\.33.*0\.0\.\.0\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(lm, **settings)
