"""The arena against exact win rates: of decoders, of models, under biased judges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import LM, Batch, Example, from_groups
from alignax.evals import arena
from alignax.sampling import decode
from alignax.text import tokenizer
from alignax.theory import tournament

TK = tokenizer.load("bytes")
PROMPTS = [Example(f"p{i}", f"ask {i}", []) for i in range(500)]
POWERS = {"one": {}, "two": {"best_of": 2}, "four": {"best_of": 4}, "eight": {"best_of": 8}}  # fmt: skip
CALLS: list[tuple] = []


def generate(lm, tokens, lengths, key, *, max_new, group=1, temperature=1.0, **more):
    """Responses that are numbers, uniform in [0, 1), plus what the model is worth."""
    CALLS.append((group, temperature, *more))
    seed = np.asarray(jax.random.key_data(key)).tolist()
    values = np.random.default_rng(seed).random((len(tokens), group)) + lm.config
    said = [[TK.encode(f"{x:.6f}") for x in row] for row in values]
    rows = [TK.encode(TK.decode(t[:n])) for t, n in zip(tokens, lengths, strict=True)]
    batch = Batch(*map(jnp.asarray, from_groups(rows, said, length=64)[:5]))
    zeros = jnp.zeros(batch.mask.shape)
    batch = batch._replace(old_logps=zeros)
    return decode.Generated(batch, zeros, jnp.zeros(batch.valid.shape, bool), {})


def value(batch: Batch, texts: list[list[str]]) -> np.ndarray:
    return np.array([[float(t) for t in group] for group in texts])


def least(batch: Batch, texts: list[list[str]]) -> np.ndarray:
    return -value(batch, texts)


def thirds(batch: Batch, texts: list[list[str]]) -> np.ndarray:
    return np.floor(3 * value(batch, texts))


SHOWN: list[int] = []  # groups that the judge of pairs has seen


def biased(batch: Batch, texts: list[list[str]]) -> np.ndarray:
    """A judge of two that prefers the first unless the second is better by .3."""
    SHOWN.append(np.shape(batch.tokens)[1])
    pairs = value(batch, texts)
    first = pairs[:, 0] + 0.3 > pairs[:, 1]
    return np.stack([first, ~first], 1) * 1.0


def run(count=500, lms=None, **hyper):
    given = {"contestants": POWERS, "reward": "test_arena.value", "size": 0, **hyper}
    return arena.evaluate(
        LM(0.0, {}), lms or {}, PROMPTS[:count], key=jax.random.key(0), tokenizer=TK,
        generate=generate, score=None, batch_size=120, length=32, **given,
    )  # fmt: skip


every = functools.cache(functools.partial(run, pairing="all"))


def test_all_pairs_rate_best_of_n_at_400_log10_of_n():
    """P(best of a beats best of b) = a / (a + b), whatever the reward."""
    got = every()
    want = 1000 + 400 * (np.log10([1, 2, 4, 8]) - np.log10([1, 2, 4, 8]).mean())
    for name, rating in zip(POWERS, want, strict=True):
        error = (got[f"rating/{name}/hi"] - got[f"rating/{name}/lo"]) / (2 * 1.96)
        assert got[f"rating/{name}"] == pytest.approx(rating, abs=4 * error)
        assert 0 < error < 15
    assert [got[f"rank/{name}"] for name in POWERS] == [4, 3, 2, 1]
    assert got["matches"] == 6
    assert got["ties"] == 0


def test_brackets_keep_the_order_and_squeeze_the_distances():
    got, pairs = run(), every()
    assert got["matches"] == 3
    assert [got[f"rank/{name}"] for name in POWERS] == [4, 3, 2, 1]
    spread, wide = (g["rating/eight"] - g["rating/one"] for g in (got, pairs))
    assert 0.6 < spread / wide < 1


def test_contestants_share_calls_and_no_response():
    CALLS.clear()
    got = run(4, contestants={**POWERS, "hot": {"temperature": 2.0}}, show=4)
    assert CALLS == [(15, 1.0), (1, 2.0)]
    for row in got["samples"]:
        assert len(set(row["responses"])) == 5
        assert row["contestant"] == [*POWERS, "hot"]
        assert sum(row["points"]) == 4
    assert len(got["samples"]) == 4


def test_each_contestant_answers_with_its_own_best():
    """The points of a bracket are those of the numbers that are shown."""
    got = run(40, pairing="all", show=40)
    for row in got["samples"]:
        said = np.array([float(t) for t in row["responses"]])
        assert row["points"] == (said[:, None] > said).sum(1).tolist()


def test_models_are_contestants():
    lms = {"weak": LM(-0.5, {}), "strong": LM(0.5, {})}
    who = {"ours": {}, **{name: {"model": name} for name in lms}}
    got = run(200, lms, contestants=who, pairing="all")
    assert [got[f"rank/{n}"] for n in ("strong", "ours", "weak")] == [1, 2, 3]
    # P(U + 1/2 > U') = 7/8; the prior and 'strong' against 'weak', always won, widen it
    assert got["rating/strong"] - got["rating/ours"] > 400 * np.log10(7) - 60


def test_another_selector_picks_what_the_judge_then_loses():
    got = run(200, selector="test_arena.least", pairing="all")
    assert [got[f"rank/{name}"] for name in POWERS] == [1, 2, 3, 4]


def test_a_judge_of_pairs_sees_two_in_a_random_order():
    SHOWN.clear()
    got = run(reward="test_arena.biased", selector="test_arena.value", pairwise=True)
    assert set(SHOWN) == {2}
    assert len(SHOWN) == 5 * 3  # batches of prompts, matches
    assert [got[f"rank/{name}"] for name in POWERS] == [4, 3, 2, 1]
    null = {"a": {}, "b": {}, "c": {}}
    got = run(
        reward="test_arena.biased", contestants=null, pairwise=True, pairing="all"
    )
    for name in null:
        assert got[f"rating/{name}/lo"] - 15 < 1000 < got[f"rating/{name}/hi"] + 15


def test_ties_are_counted_and_halved():
    got = run(reward="test_arena.thirds", contestants={"a": {}, "b": {}}, pairing="all")
    assert got["ties"] == pytest.approx(1 / 3, abs=4 * np.sqrt(2 / 9 / 500))
    assert abs(got["rating/a"] - 1000) < 40


def test_filler_rows_do_not_play():
    got = run(121, pairing="all", show=1000)  # the second batch holds one prompt
    assert len(got["samples"]) == 121
    said = [[float(t) for t in row["responses"]] for row in got["samples"]]
    points = np.array([[[x > y for y in s] for x in s] for s in said], float)
    want = tournament.ratings(tournament.bradley_terry(points.sum(0)))
    found = [got[f"rating/{name}"] for name in POWERS]
    np.testing.assert_allclose(found, want, atol=1e-8)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"contestants": {"a": {}}}, "needs two contestants"),
        ({"contestants": {"a": {}, "b": {"heat": 1}}}, r"'b' has \['heat'\]"),
        (
            {"contestants": {"a": {}, "b": {"model": "x"}}},
            "'b' is an LM 'x'; there are",
        ),
        ({"contestants": {"a": {}, "b": {"best_of": 0}}}, "'b' is the best of 0"),
        ({"pairing": "swiss"}, "pairing is 'swiss', expected one of bracket, all"),
        ({"size": 1}, "an interval over prompts needs two"),
        ({"selector": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_play_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(10, **wrong)
