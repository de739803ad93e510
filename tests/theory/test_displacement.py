"""CHES by hand, and the drift of single tokens against steps that are really taken."""

import numpy as np
import pytest

from alignax.theory import displacement


def next_token(w, h):
    z = np.exp(w @ h - (w @ h).max())
    return z / z.sum()


def test_ches_by_hand():
    """S₊ = (2, 1), S₋ = (1, 3): 5 - 5; means (1, ½), (1, 3): 2.5 - 1.25."""
    plus, minus = [[1.0, 0.0], [1.0, 1.0]], [[1.0, 3.0]]
    assert displacement.ches(plus, minus) == 0
    assert displacement.ches(plus, minus, normalised=True) == 1.25
    assert displacement.last_inner(plus, minus) == 4


def test_ches_of_equal_responses_is_zero():
    states = np.random.default_rng(0).normal(size=(5, 3))
    assert displacement.ches(states, states) == pytest.approx(0, abs=1e-12)


def test_states_must_be_two_matrices_of_one_width():
    with pytest.raises(ValueError, match="width 2 and 3"):
        displacement.ches(np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="shape"):
        displacement.last_inner(np.ones(2), np.ones((1, 2)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_drift_is_what_a_small_step_does(frozen, seed):
    rng = np.random.default_rng(seed)
    w, h = rng.normal(size=(6, 4)), rng.normal(size=4)
    chosen, rejected, rate = 1, 4, 1e-6
    pi = next_token(w, h)
    # d(log π₊ - log π₋): in h, and in the two rows of W that the margin sees
    new_h = h + rate * (w[chosen] - w[rejected])
    new_w = w.copy()
    if not frozen:
        new_w[chosen] += rate * h
        new_w[rejected] -= rate * h
    got = (np.log(next_token(new_w, new_h)) - np.log(pi)) / rate
    want = displacement.drift(w, h, chosen, rejected, frozen=frozen)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "cos, no, yes", [(0.98, 0.096, 0.891), (0.92, 0.76, 0.137)]
)  # A12 of the specification; the direction of Yes is ours, see tests/reproductions
def test_golden_displacement_of_no_to_yes(cos, no, yes):
    moved = displacement.after_margin(rows(cos), [0.496, 0.496, 0.004, 0.004], 0, 1, 2)
    assert moved[0] == pytest.approx(no, abs=0.03)
    assert moved[2] == pytest.approx(yes, abs=0.03)


def rows(cos):
    """No, Never, Yes, and a token without direction: Yes leans towards No - Never."""
    half = np.sqrt((1 - cos) / 2)
    whole = np.sqrt((1 + cos) / 2)
    return np.array([[whole, half], [whole, -half], [0.0, 0.8], [0.0, 0.0]])


def test_rows_that_differ_move_the_chosen_token_up():
    for cos in (0.7, 0.3, -0.5):
        before = np.array([0.496, 0.496, 0.004, 0.004])
        after = displacement.after_margin(rows(cos), before, 0, 1, 2.0)
        assert after[0] > before[0]


def test_the_margin_is_gained_exactly():
    before = np.array([0.4, 0.3, 0.2, 0.1])
    after = displacement.after_margin(rows(0.9), before, 0, 1, 2.0)
    gain = np.log(after[0] / after[1]) - np.log(before[0] / before[1])
    assert gain == pytest.approx(2, abs=1e-12)
    assert after.sum() == pytest.approx(1, abs=1e-12)


def test_spearman_sees_order_alone():
    x = np.array([3.0, -1.0, 10.0, 2.0])
    assert displacement.spearman(x, np.exp(x)) == pytest.approx(1)
    assert displacement.spearman(x, -(x**3)) == pytest.approx(-1)
    # ranks (2, 0, 3, 1) and (0, 1, 2, 3): 1 - 6·(4+1+1+4)/(4·15) = 0
    assert displacement.spearman(x, [1, 2, 3, 4]) == pytest.approx(0, abs=1e-12)
