"""KTO: numbers by hand, and what the mismatched responses do."""

import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import cost, group, random_groups, slopes
from oracles import losses as oracle

from alignax.batch import Scores
from alignax.losses import kto


@pytest.mark.parametrize("label, want", [(1, 0.26894142), (0, 0.73105858)])
def test_golden_number(label, want):
    """rho = 3, z = 1, beta = 0.5: sigma(-1) and sigma(1)."""
    assert cost(kto.loss, [1.5, 0.5], [label, 0], beta=0.5) == pytest.approx(want)


def test_policy_equal_to_reference_costs_half_the_weight():
    hyper = dict(beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    for label, want in ((1, 0.6), (0, 0.4)):
        got = cost(kto.loss, [-1.0, -2.0], [label, 0], ref=[-1.0, -2.0], **hyper)
        assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("mismatched", [-0.1, -5.0])
def test_the_baseline_is_never_negative(mismatched):
    got = cost(kto.loss, [1.0, mismatched], [1, 0], beta=0.5)
    assert got == pytest.approx(0.26894142)


def test_gradient_follows_the_label_and_spares_the_mismatched():
    good, bad = (slopes(kto.loss, [0.3, 0.5], [label, 0]) for label in (1, 0))
    assert good[0] < 0 < bad[0]
    assert good[1] == bad[1] == 0


def test_the_baseline_is_the_mean_of_the_whole_batch(make_batch):
    scores, batch = random_groups(make_batch, labels=True, g=2)
    scores = scores._replace(logps=scores.logps + 0.3 * batch.mask)  # so that z > 0
    hyper = dict(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    value, metrics = kto.loss(scores, batch, **hyper)
    want = oracle.kto([(y, m) for y, m in oracle.groups(scores, batch)], **hyper)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    ratio = np.asarray((scores.logps - batch.ref_logps).sum(-1))
    assert ratio[:, 1].mean() > 0
    np.testing.assert_allclose(metrics["kl"], ratio[:, 1].mean(), rtol=1e-5)
    assert kto.COUPLED


def test_an_invalid_mismatched_response_is_left_out_of_the_baseline(make_batch):
    scores, batch = random_groups(make_batch, labels=True, g=2)
    scores = scores._replace(logps=scores.logps + 0.3 * batch.mask)
    batch = batch._replace(valid=batch.valid.at[2, 1].set(False).at[3].set(False))
    value, metrics = kto.loss(scores, batch)
    ratio = np.asarray((scores.logps - batch.ref_logps).sum(-1))[:, 1]
    np.testing.assert_allclose(metrics["kl"][0], ratio[[0, 1, 4, 5]].mean(), rtol=1e-5)
    assert value[2] > 0
    assert value[3] == 0


def test_other_groups_are_errors_with_a_hint():
    with pytest.raises(ValueError, match=r"kto got 1 responses .*name='unpaired'"):
        kto.loss(*group([-1.0], [1]))
    with pytest.raises(ValueError, match="ref_logps is None"):
        _, batch = group([-1.0, -1.0], [1, 0])
        kto.loss(Scores(jnp.zeros(batch.mask.shape)), batch._replace(ref_logps=None))
