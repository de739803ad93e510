"""pass@k and maj@k against all subsets, and an evaluation whose rewards are made up."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from test_evals import KEY, TK, generator, made_up

from alignax.batch import Example
from alignax.data import Examples
from alignax.evals import pass_at_k
from alignax.models import sharding
from alignax.training import parallel


def enumerated(right, votes, k):
    """(pass@k, maj@k) over all subsets, in rational steps."""
    passed = won = 0.0
    subsets = list(itertools.combinations(range(len(right)), k))
    for some in subsets:
        passed += any(right[i] for i in some)
        counts = collections.Counter(votes[i] for i in some if votes[i] is not None)
        most = max(counts.values(), default=0)
        best = [v for v, n in counts.items() if n == most]
        for v in best:  # each of the commonest answers is chosen equally often
            mine = [r for r, other in zip(right, votes, strict=True) if other == v]
            won += np.mean(mine) / len(best)
    return passed / len(subsets), won / len(subsets)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("answers", ["a", "ab", "abcd", "abcdefghij"])
def test_all_subsets_count_once(k, answers):
    rng = np.random.default_rng(k)
    for silent in (0.0, 0.3):
        votes = [
            None if rng.random() < silent else str(rng.choice(list(answers)))
            for _ in range(8)
        ]
        right = np.array([v == "a" for v in votes])
        passed, won = enumerated(right, votes, k)
        got = pass_at_k.pass_at_k(np.array([right.sum()]), 8, k)
        np.testing.assert_allclose(got, [passed], atol=1e-12)
        assert pass_at_k.maj_at_k(right, votes, k) == pytest.approx(won, abs=1e-12)


def test_an_answer_that_is_right_now_and_then_counts_by_its_share():
    votes = ["a", "a", "b", "b", "b", None, "c"]
    right = np.array([True, False, True, False, False, False, True])
    for k in range(1, 8):
        won = enumerated(right, votes, k)[1]
        assert pass_at_k.maj_at_k(right, votes, k) == pytest.approx(won, abs=1e-12)


def test_the_estimates_are_unbiased_and_quieter_than_one_draw():
    """Samples of a known distribution over answers; k = 3 of 12."""
    rng = np.random.default_rng(0)
    p = {"a": 0.4, "b": 0.35, None: 0.25}
    exact_pass, exact_maj = 1 - 0.6**3, 0.0
    for draw in itertools.product(p, repeat=3):
        chance = np.prod([p[v] for v in draw])
        exact_maj += chance * enumerated([v == "a" for v in draw], draw, 3)[1]
    names = np.array([*p], object)
    votes = names[rng.choice(3, (3000, 12), p=[*p.values()])]
    right = votes == "a"
    many = pass_at_k.pass_at_k(right.sum(1), 12, 3)
    cast = votes.tolist()
    won = np.array(
        [pass_at_k.maj_at_k(r, v, 3) for r, v in zip(right, cast, strict=True)]
    )
    for got, want in ((many, exact_pass), (won, exact_maj)):
        assert abs(got.mean() - want) < 4 * got.std() / np.sqrt(3000)
    assert many.std() < 0.6 * right[:, :3].any(1).std()


def test_many_samples_take_no_time_and_stay_shares():
    rng = np.random.default_rng(1)
    votes = rng.integers(0, 40, 128).tolist()
    right = np.array(votes) == 3
    for k in (1, 16, 64, 128):
        assert 0 <= pass_at_k.maj_at_k(right, votes, k) <= 1
    assert pass_at_k.maj_at_k(right, votes, 1) == pytest.approx(right.mean())
    assert pass_at_k.pass_at_k(np.array([0, 1, 128]), 128, 64).tolist() == [0, 0.5, 1]


TEXTS = {
    "p0": ["#### 1", "#### 1", "#### 2", "?"],  # of the answer 1: two right, most votes
    "p1": [
        "#### 7",
        "#### 8",
        "#### 8",
        "2",
    ],  # of the answer 2: the last number counts
    "p2": ["x", "y", "z", "?"],  # nothing right
}


def data():
    rows = [Example(f"e{i}", f"p{i}", [], (), {"answer": str(i + 1)}) for i in range(3)]
    return Examples(rows, carried=())


def run(tiny_config, **settings):
    return pass_at_k.evaluate(
        made_up(tiny_config, "pi"), {}, data(), key=KEY, tokenizer=TK,
        generate=generator(lambda name, prompt: TEXTS[prompt]), score=None, batch_size=2,
        length=32, max_new=16,
        **{"reward": "final_answer", "samples": 4, "k": (1, 2, 4), **settings},
    )  # fmt: skip


def test_an_evaluation_of_prompts_alone_by_hand(tiny_config):
    got = run(tiny_config)
    assert got["mean_at_4"] == pytest.approx((2 / 4 + 1 / 4) / 3)
    assert got["pass_at_1"] == got["mean_at_4"] == got["reward"]
    # one of the subsets of two of p0 has nothing right: {2, ?}
    assert got["pass_at_2"] == pytest.approx((5 / 6 + 3 / 6) / 3)
    assert got["pass_at_4"] == pytest.approx(2 / 3)
    assert got["maj_at_4"] == pytest.approx(1 / 3)  # p1 is outvoted
    assert "maj_at_1" not in got
    for name in ("mean_at_4", "pass_at_4", "maj_at_4", "reward"):
        assert got[f"{name}/lo"] <= got[name] <= got[f"{name}/hi"]
    assert got["ended"] == 1
    rows = got["samples"]
    assert [r["right"] for r in rows] == [0.5, 0.25, 0]
    assert rows[1]["response"] == "2"
    assert run(tiny_config, show=1)["samples"] == rows[:1]
    assert run(tiny_config, size=2)["pass_at_4"] == 1


def letters(text):
    return len(text) / 10


def test_any_reward_with_a_threshold_is_right_or_wrong(tiny_config):
    got = run(tiny_config, reward=f"{__name__}.letters", threshold=0.6, vote="")
    assert got["mean_at_4"] == pytest.approx((3 + 3 + 0) / 12)
    assert not any(name.startswith("maj") for name in got)
    assert run(tiny_config, reward=f"{__name__}.letters", threshold=0.61, k=1)["mean_at_4"] == 0  # fmt: skip


def test_votes_are_cast_by_any_function(tiny_config):
    got = run(tiny_config, vote=f"{__name__}.letters")
    # p0 votes by length: three of "#### x" (two right), one of "?"
    assert got["maj_at_4"] == pytest.approx((2 / 3 + 0 + 0) / 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": (1, 5)}, r"k is \(1, 5\), expected numbers from 1 to samples=4"),
        ({"k": 0}, "k is 0, expected"),
        ({"k": ()}, r"k is \(\), expected"),
        ({"k": (1.5,)}, r"k is \(1.5,\), expected"),
        ({"size": -1}, "size is -1, of 3 prompts"),
        ({"reward": "final_anser"}, "did you mean 'final_answer'"),
        ({"vote": "alignax.rewards.final_answer.votes"}, "cannot import"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_the_run(settings, message):
    hyper = {"reward": "final_answer", "k": 4, "samples": 4, "vote": pass_at_k.VOTE, "size": 0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pass_at_k.check((), data(), **{**hyper, **settings})


def starts_low(text):
    return float(text[:1] < "\x40")


def test_on_a_model_it_is_the_chance_of_its_first_token(tiny_config, make_lm):
    """With a reward of the first character, pass@2 is known from one sample's chance."""
    lm = make_lm(dataclasses.replace(tiny_config, vocab_size=TK.vocab_size))
    mesh = sharding.make_mesh((1, 1, 1))
    got = pass_at_k.evaluate(
        lm, {}, data(), key=jax.random.key(1), tokenizer=TK,
        generate=parallel.generator(TK, mesh), score=None, batch_size=2, length=8,
        reward=f"{__name__}.starts_low", samples=200, k=(1, 2), max_new=1, vote="",
    )  # fmt: skip
    again = [row["right"] for row in got["samples"]]
    want = np.mean([1 - (1 - c) ** 2 for c in again])
    assert got["mean_at_200"] == pytest.approx(np.mean(again))
    assert 0.05 < got["mean_at_200"] < 0.95
    assert got["pass_at_2"] == pytest.approx(want, abs=0.01)
