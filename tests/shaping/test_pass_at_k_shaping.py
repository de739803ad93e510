"""Advantages for the best of k: subsets by enumeration, and the exact gradient of E[max]."""

import itertools
import math

import numpy as np
import pytest
from shaping_groups import firsts, group, tokens

from alignax import plugin
from alignax.shaping import pass_at_k, rloo


def enumerated(rewards, k):
    """n / C(n, k) times the sum over subsets with i of what i adds to their best."""
    n, out = len(rewards), []
    for i in range(n):
        others = [r for j, r in enumerate(rewards) if j != i]
        gains = [
            max(0.0, rewards[i] - max(some))
            for some in itertools.combinations(others, k - 1)
        ]
        out.append(n * sum(gains) / math.comb(n, k))
    return out


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_every_subset_counts(n, k):
    rng = np.random.default_rng(n + k)
    rewards = np.concatenate(
        [rng.normal(size=(4, n)), rng.integers(0, 2, (8, n)) * 1.0]
    )
    got = firsts(pass_at_k.shape(group(rewards), None, k=k))
    if n < k:
        np.testing.assert_array_equal(got, 0)
        return
    want = [enumerated(np.float32(row).tolist(), k) for row in rewards]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_mean_of_the_estimate_is_the_gradient_of_the_best_of_k(k):
    """Over all groups of four samples of three actions, under a softmax policy."""
    logits, worth = np.array([0.3, -0.4, 0.1]), np.array([0.0, 1.0, 0.4])
    p = np.exp(logits) / np.exp(logits).sum()
    score = np.eye(3) - p  # of action a: d log p(a) / d logits

    def best(probabilities):
        return sum(
            np.prod(probabilities[list(some)]) * worth[list(some)].max()
            for some in itertools.product(range(3), repeat=k)
        )

    want = np.zeros(3)
    for a in range(3):  # central differences in float64
        step = np.eye(3)[a] * 1e-5
        q = [np.exp(logits + s * step) for s in (1, -1)]
        want[a] = (best(q[0] / q[0].sum()) - best(q[1] / q[1].sum())) / 2e-5
    draws = np.array([*itertools.product(range(3), repeat=4)])
    advantages = firsts(pass_at_k.shape(group(worth[draws]), None, k=k))
    chance = p[draws].prod(1)
    got = np.einsum("s,sn,sna->a", chance, advantages, score[draws]) / 4
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_with_k_of_one_it_is_rloo():
    batch = group(np.random.default_rng(0).normal(size=(3, 5)))
    got = pass_at_k.shape(batch, None, k=1)
    np.testing.assert_array_equal(got, rloo.shape(batch, None))


def test_what_is_right_where_most_are_right_gets_little():
    few = firsts(pass_at_k.shape(group([[1.0, 0, 0, 0, 0, 0]]), None, k=3))[0]
    many = firsts(pass_at_k.shape(group([[1.0, 1, 1, 1, 0, 0]]), None, k=3))[0]
    assert few[0] == pytest.approx(6 * math.comb(5, 2) / math.comb(6, 3))
    assert 0 < many[0] < few[0] / 5
    assert few[1] == many[4] == 0


def test_only_valid_responses_are_compared():
    valid = np.array([[True, False, True, True], [True, False, False, False]])
    batch = group([[1.0, 99.0, 4.0, 2.0], [7.0, 99.0, 99.0, 99.0]], valid=valid)
    got = firsts(pass_at_k.shape(batch, None, k=2))
    want = enumerated([1.0, 4.0, 2.0], 2)
    np.testing.assert_allclose(got[0], [want[0], 0, want[1], want[2]], rtol=1e-6)
    np.testing.assert_array_equal(got[1], 0)


def test_rewards_of_tokens_are_summed_and_every_token_has_the_same():
    batch = group([[0.0, 0.0]], lengths=[[3, 1]])
    batch = batch._replace(advantages=tokens(batch, [[[-1, -1, 4], [5]]]))
    got = np.asarray(pass_at_k.shape(batch, None, k=2))
    np.testing.assert_allclose(got[0], [[0] * 6, [0, 0, 6, 0, 0, 0]], rtol=1e-6)


def test_numbers_of_subsets_are_whole():
    with pytest.raises(ValueError, match=r"k is 2\.5, expected a whole number"):
        pass_at_k.check(k=2.5)
    with pytest.raises(ValueError, match=r"k=0 is outside \[1, inf\)"):
        plugin.load("shaping", "pass_at_k", {"k": 0})
    assert np.isfinite(pass_at_k.weights_of(256, 64)).all()
