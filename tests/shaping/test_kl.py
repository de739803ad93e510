"""KL in the reward: by hand, in expectation, and in sign."""

import numpy as np
import pytest
from shaping_groups import group, tokens

from alignax.shaping import kl


def test_golden_number():
    """Log-ratios -1 + 2 = 1 and -2 + 1.5 = -0.5; the last token earns 3."""
    batch = group([[3.0]], lengths=[[2]])
    batch = batch._replace(
        old_logps=tokens(batch, [[[-1, -2]]]), ref_logps=tokens(batch, [[[-2, -1.5]]])
    )
    got = kl.shape(batch, None, beta=0.1)
    np.testing.assert_allclose(got[0, 0], [0, 0, -0.1, 3.05, 0], rtol=1e-6)


def test_without_a_strength_or_a_difference_nothing_is_paid():
    batch = group([[3.0, -1.0]], lengths=[[2, 1]])
    logps = tokens(batch, [[[-1, -2], [-3]]])
    batch = batch._replace(old_logps=logps, ref_logps=logps)
    raw = [[0, 0, 0, 3, 0], [0, 0, -1, 0, 0]]
    np.testing.assert_array_equal(kl.shape(batch, None, beta=0.5)[0], raw)
    other = batch._replace(ref_logps=logps - 1)
    np.testing.assert_array_equal(kl.shape(other, None, beta=0.0)[0], raw)


def test_its_mean_under_the_policy_is_the_divergence():
    """Five tokens, each drawn as often as the policy draws it."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), 2)
    batch = group(np.zeros((1, 5)))
    batch = batch._replace(
        old_logps=tokens(batch, np.log(p)[None, :, None]),
        ref_logps=tokens(batch, np.log(q)[None, :, None]),
    )
    paid = -np.asarray(kl.shape(batch, None, beta=0.3)).sum((0, 2))
    assert p @ paid == pytest.approx(0.3 * np.sum(p * np.log(p / q)), rel=1e-5)


def test_a_token_that_is_unlikely_under_the_reference_costs():
    batch = group([[0.0, 0.0]])
    batch = batch._replace(
        old_logps=tokens(batch, [[[-1], [-1]]]),
        ref_logps=tokens(batch, [[[-5], [-0.5]]]),
    )
    got = np.asarray(kl.shape(batch, None))[0, :, 2]
    assert got[0] < 0 < got[1]


def test_it_is_taken_off_what_an_earlier_shaping_left():
    batch = group([[100.0]], lengths=[[2]])
    batch = batch._replace(
        advantages=tokens(batch, [[[1, 2]]]), old_logps=tokens(batch, [[[-1, -1]]]),
        ref_logps=tokens(batch, [[[-2, -3]]]),
    )  # fmt: skip
    got = kl.shape(batch, None, beta=0.5)
    np.testing.assert_allclose(got[0, 0, 2:4], [0.5, 1.0], rtol=1e-6)
