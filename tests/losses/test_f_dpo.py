"""f-DPO: numbers by hand, the family's ends, and exponents that would overflow."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import dpo, f_dpo


@pytest.mark.parametrize(
    "divergence, gap",
    [
        ("reverse_kl", np.log(4)),
        ("forward_kl", -1 / 2 + 2),
        ("js", np.log(2 / 3) - np.log(1 / 3)),
        ("alpha", -2 * 2**-0.5 + 2 * 2**0.5),
    ],
)
def test_golden_numbers(divergence, gap):
    """u = 2 for chosen and ½ for rejected, β = ½."""
    chosen, rejected = float(np.log(2)), float(np.log(0.5))
    got = cost(f_dpo.loss, chosen, rejected, beta=0.5, divergence=divergence)
    assert got == pytest.approx(np.log1p(np.exp(-gap / 2)), abs=1e-6)


def test_the_reverse_kl_is_dpo():
    got = cost(f_dpo.loss, 3.0, -1.0, beta=0.5, divergence="reverse_kl")
    assert got == cost(dpo.loss, 3.0, -1.0, beta=0.5)


@pytest.mark.parametrize(
    "alpha, other", [(0.0, "forward_kl"), (1.0, "reverse_kl"), (1 - 1e-6, "reverse_kl")]
)
def test_the_ends_of_the_alpha_family_are_the_two_kls(alpha, other):
    got = cost(f_dpo.loss, 1.0, -0.5, divergence="alpha", alpha=alpha)
    want = cost(f_dpo.loss, 1.0, -0.5, divergence=other)
    assert got == pytest.approx(want, rel=1e-5)


def test_a_jensen_shannon_score_is_bounded_above():
    """However likely chosen becomes, it is log 2 above a response of the reference."""
    got = cost(f_dpo.loss, 1e4, 0.0, beta=1.0, divergence="js")
    assert got == pytest.approx(np.log1p(1 / 2), abs=1e-6)


@pytest.mark.parametrize("divergence", f_dpo.DIVERGENCES)
def test_gradient_raises_chosen_and_lowers_rejected(divergence):
    up, down = slopes(f_dpo.loss, 0.5, 0.2, divergence=divergence)
    assert up < 0 < down


@pytest.mark.parametrize("divergence", f_dpo.DIVERGENCES)
def test_hopeless_log_ratios_stay_finite(divergence):
    for sides in [(-1e4, 1e4), (1e4, -1e4), (-1e4, -1e4), (-41.0, -39.0)]:
        assert np.isfinite(cost(f_dpo.loss, *sides, divergence=divergence))
        grads = np.float32(slopes(f_dpo.loss, *sides, divergence=divergence))
        assert np.isfinite(grads**2).all()


def test_an_unknown_divergence_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="reverse_kl, forward_kl, js, alpha"):
        cost(f_dpo.loss, divergence="kl")


@pytest.mark.parametrize("divergence", f_dpo.DIVERGENCES)
def test_random_pairs_are_those_of_the_oracle(make_batch, divergence):
    hyper = dict(beta=0.1, divergence=divergence, alpha=0.3)
    assert_oracle(f_dpo.loss, oracle.f_dpo, make_batch, **hyper)
