"""AFT: negatives rest at the boundary, and without it nowhere."""

import numpy as np
import pytest

from alignax.theory import aft

POSITIVE, NEGATIVE = np.array([-0.2, -0.5, -0.9]), np.array([-3.0, -0.4, 0.1, -1.5])


def loss(positive, negative, bound=None):
    total = 1.0
    for p in positive:
        for n in negative:
            total += np.exp(n - p)
            if bound is not None:
                total += np.exp(2 * bound - p - n)
    return np.log(total)


@pytest.mark.parametrize("margin", [None, 0.15])
def test_slope_is_that_of_the_loss(margin):
    bound = None if margin is None else aft.boundary(POSITIVE, margin)
    want = [
        (loss(POSITIVE, NEGATIVE + e, bound) - loss(POSITIVE, NEGATIVE - e, bound))
        / 2e-6
        for e in 1e-6 * np.eye(4)
    ]
    np.testing.assert_allclose(aft.slope(POSITIVE, NEGATIVE, margin), want, atol=1e-8)


@pytest.mark.parametrize("margin", [0.0, 0.15, 2.0])
def test_a_negative_at_the_boundary_rests(margin):
    bound = aft.boundary(POSITIVE, margin)
    assert bound == -0.9 - margin
    slope = aft.slope(POSITIVE, [bound, -0.1, -9.0], margin)
    assert slope[0] == pytest.approx(0, abs=1e-12)
    assert slope[1] > 0 > slope[2]


def test_descent_ends_at_the_boundary():
    negative = NEGATIVE.copy()
    for _ in range(2000):
        negative -= aft.slope(POSITIVE, negative, 0.15)
    np.testing.assert_allclose(negative, -1.05, atol=1e-6)


def test_without_the_constraint_negatives_sink_for_ever():
    negative, seen = NEGATIVE.copy(), []
    for step in range(10_000):
        negative -= aft.slope(POSITIVE, negative)
        if step + 1 in (1000, 10_000):
            seen.append(negative.copy())
    # e^{s_n} falls as 1/t once it is small, so a decade costs ln 10
    np.testing.assert_allclose(seen[0] - seen[1], np.log(10), rtol=0.02)
