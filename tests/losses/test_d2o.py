"""D²O: numbers by hand, and what it has in common with DPO."""

import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import cost, group, random_groups, slopes
from oracles import losses as oracle

from alignax.losses import d2o, dpo


def loss(policy, batch, **hyper):
    """With one reference for both."""
    extra = {"helpful_logps": batch.ref_logps, "harmful_logps": batch.ref_logps}
    return d2o.loss(policy, batch._replace(extra=extra), **hyper)


def test_golden_number():
    """Log-ratios 4, 2 and -2; beta = 0.5, alpha = 0.25: h = 1.5 + 0.5."""
    got = cost(loss, [2.0, 1.0, -1.0], [1, 1, 0], beta=0.5, alpha=0.25)
    assert got == pytest.approx(0.126928011, abs=1e-6)


def test_samples_are_held_to_the_harmful_reference_and_the_negative_to_the_helpful():
    policy, batch = group([2.0, -1.0], [1, 0])
    extra = {
        "harmful_logps": jnp.where(batch.mask, jnp.float32([[[1.0], [9.0]]]), 0),
        "helpful_logps": jnp.where(batch.mask, jnp.float32([[[9.0], [-2.0]]]), 0),
    }
    _, metrics = d2o.loss(policy, batch._replace(extra=extra))
    assert float(metrics["log_ratio_samples"][0]) == pytest.approx(2)
    assert float(metrics["log_ratio_negative"][0]) == pytest.approx(2)


def test_one_sample_and_one_reference_are_dpo():
    scores = [-0.3, -1.1]
    got = cost(loss, scores, [1, 0], beta=0.7, alpha=0.7)
    assert got == pytest.approx(cost(dpo.loss, scores, [1, 0], beta=0.7), rel=1e-6)


def test_each_sample_has_one_share_of_the_gradient():
    slope = slopes(loss, [-0.3, -2.0, -1.0, -0.5], [1, 1, 1, 0], beta=0.4, alpha=0.8)
    np.testing.assert_allclose(slope[:3], slope[0], rtol=1e-6)
    assert slope[0] < 0
    assert slope[3] == pytest.approx(-slope[:3].sum() * 2, rel=1e-5)


def test_it_is_at_most_the_mean_of_dpo_over_the_samples():
    for scores in np.random.default_rng(0).normal(size=(10, 4)):
        each = [
            cost(dpo.loss, [score, scores[-1]], [1, 0], beta=0.5)
            for score in scores[:-1]
        ]
        got = cost(loss, list(scores), [1, 1, 1, 0], beta=0.5, alpha=0.5)
        assert got <= np.mean(each) + 1e-6


@pytest.mark.parametrize(
    "scores, valid",
    [
        ([-0.3, -9.0, -1.1], [True, False, True]),  # a sample was filtered
        ([-0.3, -1.1, -9.0], [True, True, False]),  # a group that was filled up
    ],
)
def test_ragged_groups_end_in_their_last_valid_response(scores, valid):
    got = cost(loss, scores, [1, 1, 0], valid=valid)
    assert got == pytest.approx(cost(loss, [-0.3, -1.1], [1, 0]), rel=1e-6)


def test_a_negative_without_samples_costs_nothing():
    hyper = dict(valid=[False, True])
    assert cost(loss, [-1.0, -2.0], [1, 0], **hyper) == 0
    np.testing.assert_array_equal(slopes(loss, [-1.0, -2.0], [1, 0], **hyper), 0)


def test_random_groups_are_those_of_the_oracle(make_batch):
    scores, batch = random_groups(make_batch)
    got = loss(scores, batch, beta=0.8, alpha=0.3)[0]
    want = []
    for rows in oracle.groups(scores, batch):
        *samples, negative = [y.ratio for y in rows]
        want.append(oracle.d2o(samples, negative, beta=0.8, alpha=0.3))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_single_response_is_an_error():
    with pytest.raises(ValueError, match="samples first and the negative last"):
        loss(*group([-1.0], [0]))
