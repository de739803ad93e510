"""The bandit's distributions, exactly."""

import itertools

import numpy as np
import pytest

from alignax.theory import mode_seeking


def test_the_data_distribution_has_its_mode_left_and_both_its_ends_heavy():
    """tanh squeezes a Cauchy tail into each outermost bin."""
    p = mode_seeking.squashed_cauchy()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert 1 + int(p[1:-1].argmax()) == 16
    assert min(p[0], p[-1]) > p[16]
    # P(X > atanh .98) = atan(.4 / 2.9976) / π
    assert p[-1] == pytest.approx(0.04223, abs=1e-4)


def test_the_data_distribution_is_what_sampling_gives():
    rng = np.random.default_rng(0)
    n = 200_000
    x = np.tanh(-0.7 + 0.4 * rng.standard_cauchy(n))
    share = np.bincount(np.clip(((x + 1) * 50).astype(int), 0, 99), minlength=100) / n
    p = mode_seeking.squashed_cauchy()
    assert (abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()


@pytest.mark.parametrize("reward", [[0.1, 0.5, 0.3], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
def test_best_of_n_is_the_distribution_of_an_enumeration(reward):
    p, n = np.array([0.5, 0.3, 0.2]), 3
    want = np.zeros(3)
    for draw in itertools.product(range(3), repeat=n):
        best = max(reward[a] for a in draw)
        winners = [a for a in draw if reward[a] == best]
        for a in winners:
            want[a] += p[list(draw)].prod() / len(winners)
    np.testing.assert_allclose(
        mode_seeking.best_of_n(p, reward, n), want, rtol=1e-12, atol=1e-15
    )


def test_one_round_of_best_of_ten_covers_and_many_seek():
    p, r = mode_seeking.squashed_cauchy(), mode_seeking.bump(peak=70)
    once = mode_seeking.best_of_n(p, r, 10)
    assert p @ r < 0.05 < 0.1 < once @ r < 0.5
    for _ in range(10):
        p = mode_seeking.best_of_n(p, r, 10)
    assert p @ r > 0.99
    with pytest.raises(ValueError, match="n=0"):
        mode_seeking.best_of_n(p, r, 0)


def softmax(z):
    z = np.exp(z - z.max())
    return z / z.sum()


@pytest.mark.parametrize("side", ["forward", "reverse"])
def test_directions_are_gradients_of_the_two_divergences(side):
    rng = np.random.default_rng(1)
    logits, target, step = rng.normal(size=5), softmax(rng.normal(size=5)), 1e-6

    def value(z):
        pair = (target, softmax(z)) if side == "forward" else (softmax(z), target)
        return mode_seeking.kl(*pair)

    want = [
        -(value(logits + step * e) - value(logits - step * e)) / (2 * step)
        for e in np.eye(5)
    ]
    got = getattr(mode_seeking, f"{side}_direction")(softmax(logits), target)
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_tilting_is_the_optimum_of_the_regularised_reward():
    rng = np.random.default_rng(2)
    ref, r, beta = softmax(rng.normal(size=4)), rng.normal(size=4), 0.3
    best = mode_seeking.tilted(ref, r, beta)

    def value(p):
        return p @ r - beta * mode_seeking.kl(p, ref)

    for _ in range(50):
        other = softmax(np.log(best) + 0.3 * rng.normal(size=4))
        assert value(other) <= value(best)
    assert value(best) == pytest.approx(
        beta * np.log(ref @ np.exp(r / beta)), rel=1e-12
    )
