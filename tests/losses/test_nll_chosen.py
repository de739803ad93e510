"""The likelihood of the chosen response: by hand, and the difference of RPO and DPO."""

import numpy as np
import pytest
from losses_pairs import cost, slopes

from alignax.losses import dpo, nll_chosen, rpo


def test_golden_number():
    """log π = -3 + 1 over four tokens; what is rejected does not count."""
    for rejected in (0.0, 5.0):
        got = cost(nll_chosen.loss, 1.0, rejected, lengths=(4, 2), ref=(-3.0, -4.0))
        assert got == pytest.approx(2 / 4)
    up, down = slopes(nll_chosen.loss, 1.0, 2.0, lengths=(4, 2))
    assert (up, down) == pytest.approx((-0.25, 0))


def test_it_is_what_rpo_adds_to_dpo():
    rng = np.random.default_rng(0)
    for _ in range(5):
        chosen, rejected = rng.normal(size=2).tolist()
        more = cost(rpo.loss, chosen, rejected, beta=0.3, alpha=0.7)
        less = cost(dpo.loss, chosen, rejected, beta=0.3)
        got = cost(nll_chosen.loss, chosen, rejected)
        assert 0.7 * got == pytest.approx(more - less, abs=1e-5)
