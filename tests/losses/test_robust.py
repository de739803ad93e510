"""Robust DPO: numbers by hand and what it expects over flipped labels."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import dpo, robust


def test_golden_number():
    """βh = 2, ε = 0.25: (0.75 · 0.126928 - 0.25 · 2.126928) / 0.5."""
    got = cost(robust.loss, 3.0, -1.0, beta=0.5, label_smoothing=0.25)
    assert got == pytest.approx(-0.873072, abs=1e-5)


def test_without_flips_it_is_dpo():
    got = cost(robust.loss, 3.0, -1.0, beta=0.5, label_smoothing=0.0)
    assert got == pytest.approx(cost(dpo.loss, 3.0, -1.0, beta=0.5), rel=1e-6)


@pytest.mark.parametrize("eps", [0.1, 0.4])
def test_its_mean_over_flipped_labels_is_the_clean_loss(eps):
    kept, flipped = (
        cost(robust.loss, *sides, beta=0.5, label_smoothing=eps)
        for sides in [(3.0, -1.0), (-1.0, 3.0)]
    )
    want = cost(dpo.loss, 3.0, -1.0, beta=0.5)
    assert (1 - eps) * kept + eps * flipped == pytest.approx(want, abs=1e-5)


def test_gradient_raises_chosen_and_lowers_rejected():
    up, down = slopes(robust.loss, 0.5, 0.2)
    assert up < 0 < down
    np.testing.assert_allclose(up, -down, rtol=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(robust.loss, oracle.robust, make_batch, beta=0.3, label_smoothing=0.2)
