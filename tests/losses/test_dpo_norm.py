"""Length-normalised DPO: numbers by hand."""

import numpy as np
import pytest
from losses_pairs import assert_oracle, cost, slopes
from oracles import losses as oracle

from alignax.losses import dpo, dpo_norm


def test_golden_number():
    """3 nats over 2 tokens, -1 over 4, β = 2: βh = 3.5."""
    got = cost(dpo_norm.loss, 3.0, -1.0, lengths=(2, 4), beta=2.0)
    assert got == pytest.approx(np.log1p(np.exp(-3.5)), abs=1e-6)


def test_where_lengths_agree_it_is_dpo_at_beta_per_token():
    got = cost(dpo_norm.loss, 3.0, -1.0, lengths=(5, 5), beta=2.0)
    assert got == pytest.approx(cost(dpo.loss, 3.0, -1.0, beta=0.4), rel=1e-5)


def test_the_longer_response_is_pushed_less():
    up, down = slopes(dpo_norm.loss, 0.0, 0.0, lengths=(2, 8), beta=2.0)
    assert (up, down) == pytest.approx((-0.5, 0.125), rel=1e-5)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    assert_oracle(dpo_norm.loss, oracle.dpo_norm, make_batch, beta=3.0)
