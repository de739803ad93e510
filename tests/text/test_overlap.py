"""ROUGE-L against all subsequences, and by hand."""

import itertools

import numpy as np
import pytest

from alignax.text.overlap import longest_common_subsequence, rouge_l, words


def subsequences(x):
    return {tuple(s) for n in range(len(x) + 1) for s in itertools.combinations(x, n)}


def test_the_longest_common_subsequence_is_that_of_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (["abc"[i] for i in rng.integers(0, 3, rng.integers(0, 8))] for _ in "ab")  # fmt: skip
        want = max(map(len, subsequences(a) & subsequences(b)))
        assert longest_common_subsequence(a, b) == want


def test_by_hand():
    got = rouge_l("The cat sat on the mat.", "the cat is ON a big mat")
    # the cat on mat: 4 of 6 and of 7
    assert got == pytest.approx((4 / 6, 4 / 7, 2 * 4 / 13))
    assert rouge_l("a b c", "c b a") == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_text_repeats_itself_and_nothing_else():
    assert rouge_l("Über 3 Bäume", "über 3 bäume!") == (1, 1, 1)
    assert (
        rouge_l("yes", "no") == rouge_l("", "no") == rouge_l("yes", "?!") == (0, 0, 0)
    )
    assert words("It's so_so, 1.5") == ["it", "s", "so", "so", "1", "5"]


def test_swapping_the_texts_swaps_precision_and_recall():
    one, other = rouge_l("a b c d", "b d e"), rouge_l("b d e", "a b c d")
    assert (one.precision, one.recall, one.f) == (
        other.recall,
        other.precision,
        other.f,
    )
    assert one.precision == 0.5


def test_an_accent_is_the_same_in_both_forms_of_unicode():
    assert rouge_l("un cafe\u0301 noir", "un café noir").f == 1
