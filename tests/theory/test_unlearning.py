"""NPO in closed form: its weight, its limits, and how slowly it runs away."""

import numpy as np
import pytest

from alignax.theory import unlearning

RATIOS = np.array([-30.0, -3.0, -0.5, 0.0, 0.7, 4.0])


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_weight_is_the_slope_of_the_loss(beta):
    step = 1e-5
    ends = (unlearning.npo(RATIOS + s, beta) for s in (step, -step))
    slope = np.subtract(*ends) / (2 * step)
    np.testing.assert_allclose(
        unlearning.npo_weight(RATIOS, beta), slope, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_weight_is_the_ratio_of_powers_in_the_paper(beta):
    ref = 0.3
    pi = ref * np.exp(RATIOS)
    want = 2 * pi**beta / (pi**beta + ref**beta)
    np.testing.assert_allclose(unlearning.npo_weight(RATIOS, beta), want, rtol=1e-12)


def test_at_the_reference_npo_has_the_gradient_of_ascent():
    assert unlearning.npo_weight(0.0, 3.0) == 1


def test_small_beta_is_gradient_ascent():
    beta = 1e-6
    np.testing.assert_allclose(unlearning.npo_weight(RATIOS, beta), 1, atol=1e-4)
    shifted = unlearning.npo(RATIOS, beta) - 2 / beta * np.log(2)
    np.testing.assert_allclose(shifted, RATIOS, rtol=1e-3, atol=1e-4)


def test_what_is_forgotten_is_left_alone():
    assert unlearning.npo_weight(-1e4, 0.1) < 1e-300
    assert unlearning.npo_weight(1e4, 0.1) == 2
    assert np.isfinite(unlearning.npo([-1e4, 1e4], 5.0)).all()


def test_golden_displacements():
    """Made once by an independent script: A8 of the specification."""
    ascent = unlearning.displacement(10_000)
    np.testing.assert_allclose(ascent[[100, 1000]], [96.6, 996.6], atol=0.06)
    assert ascent[10_000] == pytest.approx(9996.6, abs=0.06)
    slow = unlearning.displacement(10_000, beta=1.0)
    np.testing.assert_allclose(
        slow[[100, 1000, 10_000]], [6.52, 8.90, 11.22], atol=0.006
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_gains_ln_ten_over_beta_in_a_decade(beta):
    moved = unlearning.displacement(10_000, beta=beta)
    decade = moved[10_000] - moved[1000]
    assert decade == pytest.approx(np.log(10) / beta, rel=0.05)


def flow_time(moved, beta, start=1.0):
    """Time that the continuous flow takes, integrated by hand for ascent and β = 1."""
    end, s0 = start - moved, 1 / (1 + np.exp(-start))
    gone = np.exp(start) - np.exp(end)
    if beta is None:
        return moved + gone
    back = np.exp(-end) - np.exp(-start)
    return ((1 + 2 * s0) * moved + (1 + s0) * gone + s0 * back) / 2


@pytest.mark.parametrize("beta", [None, 1.0])
def test_short_steps_follow_the_flow(beta):
    lr = 1e-3
    moved = unlearning.displacement(20_000, beta=beta, lr=lr)
    at = np.array([100, 1000, 20_000])
    np.testing.assert_allclose(flow_time(moved[at], beta), lr * at, rtol=2e-3)


def test_beta_must_be_positive():
    with pytest.raises(ValueError, match=r"beta=0"):
        unlearning.npo(1.0, 0)
