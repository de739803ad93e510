"""R-DPO: numbers by hand."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import dpo, r_dpo


def test_golden_number():
    """βh = 2, chosen is 3 tokens shorter, α = ½: log(1 + e^-½)."""
    got = cost(r_dpo.loss, 3.0, -1.0, lengths=(2, 5), beta=0.5, alpha=0.5)
    assert got == pytest.approx(np.log1p(np.exp(-0.5)), abs=1e-6)


def test_without_alpha_or_with_equal_lengths_it_is_dpo():
    want = cost(dpo.loss, 3.0, -1.0, beta=0.5)
    for lengths, alpha in [((2, 5), 0.0), ((3, 3), 0.5)]:
        got = cost(r_dpo.loss, 3.0, -1.0, lengths=lengths, beta=0.5, alpha=alpha)
        assert got == pytest.approx(want, rel=1e-6)


def test_a_longer_chosen_response_teaches_less():
    short, long = (
        slopes(r_dpo.loss, 0.0, 0.0, lengths=lengths, alpha=0.5)[0]
        for lengths in [(2, 6), (6, 2)]
    )
    assert short < long < 0


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(r_dpo.loss, oracle.r_dpo, make_batch, beta=0.3, alpha=0.2)
