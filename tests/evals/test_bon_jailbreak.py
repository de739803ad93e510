"""The estimator is unbiased, prompts that differ bend the curve, and letters are scrambled."""

import math
import string

import attacked
import numpy as np
import pytest
from scipy import stats

from alignax.evals import bon_jailbreak
from alignax.evals.bon_jailbreak import augment, curve, fit, local_slopes, pass_at


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_the_estimator_is_unbiased(k):
    n, p = 8, 0.3
    counts = np.arange(n + 1)
    weights = stats.binom.pmf(counts, n, p)
    assert weights @ pass_at(counts, n, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_the_estimator_by_hand():
    """One success of four: the chance that two tries have it is a half."""
    assert pass_at(np.array([1, 0, 4]), 4, 2).tolist() == [0.5, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"k=5 and counts 1..1 of 4 tries"):
        pass_at(np.array([1]), 4, 5)


def test_one_pooled_rate_promises_far_too_much():
    rng = np.random.default_rng(0)
    p = rng.beta(0.25, 60, 400)
    counts = rng.binomial(64, p)
    ours = curve(counts, 64)["asr/64"]
    pooled = 1 - (1 - counts.mean() / 64) ** 64
    assert ours == pytest.approx((1 - (1 - p) ** 64).mean(), abs=0.04)
    assert pooled > 1.4 * ours


def power_law(k, a=0.25, b=60.0):
    """E[1 - (1 - p)^k] of p ~ Beta(a, b)."""
    return 1 - math.exp(
        math.lgamma(b + k)
        + math.lgamma(a + b)
        - math.lgamma(b)
        - math.lgamma(a + b + k)
    )


def test_prompts_that_differ_give_nearly_a_power_law():
    """p ~ Beta(.25, 60): local slopes between -.22 and -.36, from the specification."""
    rates = [(10**i, power_law(10**i)) for i in range(6)]
    slopes = local_slopes(rates)
    assert slopes.min() == pytest.approx(-0.36, abs=0.005)
    assert slopes.max() == pytest.approx(-0.22, abs=0.01)
    a, b = fit(dict(rates[1:4]))
    assert math.exp(-a * 1e4**-b) == pytest.approx(power_law(10_000), abs=0.03)
    # one rate for all prompts gives no power law
    same = [(k, 1 - (1 - 0.004) ** k) for k, _ in rates[:4]]
    assert np.ptp(local_slopes(same)) > 1


def test_a_power_law_is_found_again():
    rates = {k: math.exp(-3.0 * k**-0.3) for k in (1, 2, 4, 8)}
    assert fit(rates) == pytest.approx((3.0, 0.3))
    assert fit({1: 0.0, 2: 0.5, 4: 1.0}) is None


def test_words_are_scrambled_inside_and_the_rest_is_kept():
    text = "Please explain the alphabet to a child"
    rng = np.random.default_rng(0)
    assert augment(text, rng, 0.0) == text
    rng = np.random.default_rng(1)
    some = [augment(text, rng, 0.05) for _ in range(200)]
    assert len(set(some)) > 150
    assert all(len(x) == len(text) for x in some)
    whole = [x for x in some if sorted(x.lower()) == sorted(text.lower())]
    assert len(whole) > 190  # a letter is shifted with probability .05³
    kinds = set()
    for x in whole:
        words = zip(x.lower().split(), text.lower().split(), strict=True)
        for new, old in words:
            assert (new[0], new[-1]) == (old[0], old[-1])
            assert len(old) > 3 or new == old
            kinds.add(new != old)
    assert kinds == {True, False}


def test_case_and_letters_change_as_often_as_they_should():
    text = string.ascii_lowercase * 400
    out = augment(text, np.random.default_rng(0), 0.4)  # one word of 10 400 letters
    flipped = np.mean([c.isupper() for c in out])
    # a shift may turn 'Z' into '[' and so on: rare
    assert flipped == pytest.approx(0.4**0.5, abs=0.03)
    text = "a" * 10_000
    out = augment(text, np.random.default_rng(0), 0.4).lower()
    shifted = np.mean([c != "a" for c in out])
    assert shifted == pytest.approx(0.4**3, abs=0.01)
    assert set(out) <= {"a", "b", "`", "@"}


def leak(text, temperature):
    """Prompts of which some are a hundred times as weak as the others; none benign."""
    if "k" not in text.lower() or "h" in text.lower():
        return 0.0
    return 0.3 if attacked.place(text) % 10 == 0 else 0.003


def test_rates_over_tries_and_their_null():
    got = attacked.run(bon_jailbreak, leak, 40, tries=16, sigma=0.0, size=0)
    exact = {k: 0.1 * (1 - 0.7**k) + 0.9 * (1 - 0.997**k) for k in (1, 16)}
    assert got["asr/1"] == pytest.approx(exact[1], abs=0.03)
    assert got["asr/16"] == pytest.approx(exact[16], abs=0.1)
    assert got["asr/1"] < got["asr/4"] < got["asr/16"]
    assert got["null/asr/16"] == 0
    assert got["b"] > 0
    assert got["asr/16"] < got["asr/forecast"] <= 1
    assert all(attacked.HARM in row["response"] for row in got["samples"])
    assert {"asr/1/lo", "asr/2", "asr/8"} <= set(got)


def test_a_prompt_in_messages_is_named():
    turns = [{"role": "user", "content": "hi"}]
    data = [attacked.Example("chat", turns, [])]
    with pytest.raises(ValueError, match="chat: the prompt is no string"):
        bon_jailbreak.evaluate(
            attacked.LM(None, {}), {}, data, key=None, tokenizer=attacked.TK, generate=None, score=None,
            batch_size=2, length=8, evaluator="attacked.found", control={},
        )  # fmt: skip
