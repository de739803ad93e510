"""PoFT: numbers by hand, and the weight it gives to data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import group, random_groups
from oracles import losses as oracle

from alignax.losses import poft


def given(score, *aligned, lengths=(2,)):
    """One response, and its mean log-probability under the policy and aligned models."""
    policy, batch = group([score], [1], lengths=list(lengths))
    names = ["aligned_logps", *(f"aligned_{j}_logps" for j in range(2, 9))]
    columns = [jnp.where(batch.mask, jnp.float32(x), 0) for x in aligned]
    return policy, batch._replace(extra=dict(zip(names, columns, strict=False)))


def test_golden_number():
    """Means -1 and -2, whatever the length: log(1 + e^-1), and e^-1.5 with gamma = 0.5."""
    for lengths in ((2,), (5,)):
        value, metrics = poft.loss(*given(-1.0, -2.0, lengths=lengths))
        assert float(value[0]) == pytest.approx(0.31326169, abs=1e-6)
        assert float(metrics["margin"][0]) == pytest.approx(1, rel=1e-6)
    value, _ = poft.loss(*given(-1.0, -2.0), gamma=0.5)
    assert float(value[0]) == pytest.approx(0.20141328, abs=1e-6)


def test_a_policy_as_likely_as_the_aligned_models_costs_log_two():
    value, metrics = poft.loss(*given(-1.5, -1.5), beta=3.0)
    assert float(value[0]) == pytest.approx(np.log(2))
    assert float(metrics["gradient_weight"][0]) == pytest.approx(0.5)


def test_several_aligned_models_count_by_their_mean():
    several = poft.loss(*given(-1.0, -1.0, -2.0, -6.0))[0]
    np.testing.assert_allclose(several, poft.loss(*given(-1.0, -3.0))[0], rtol=1e-6)


@pytest.mark.parametrize("aligned", [-0.5, -1.0, -4.0])
def test_gradient_is_that_of_fine_tuning_times_a_weight(aligned):
    """On each of two tokens: -sigma(-(m - aligned)) / 2; less where the aligned doubt it."""
    policy, batch = given(-1.0, aligned)

    def total(logps):
        return poft.loss(policy._replace(logps=logps), batch)[0].sum()

    grad = np.asarray(jax.grad(total)(policy.logps))[np.asarray(batch.mask)]
    weight = 1 / (1 + np.exp(-1.0 - aligned))
    np.testing.assert_allclose(grad, -weight / 2, rtol=1e-5)


def test_aligned_models_may_have_any_name_that_begins_so():
    policy, batch = given(-1.0, -1.0, -5.0)
    one, other = batch.extra.values()
    batch = batch._replace(extra={"alignedA_logps": one, "aligned_b_logps": other})
    got = poft.loss(policy, batch)[0]
    np.testing.assert_allclose(got, poft.loss(*given(-1.0, -3.0))[0], rtol=1e-6)


def test_no_aligned_model_is_an_error():
    policy, batch = given(-1.0, -1.0)
    for extra in (None, {}, {"ref_logps": batch.ref_logps}):
        with pytest.raises(ValueError, match=r"the batch has no 'aligned\*_logps'"):
            poft.loss(policy, batch._replace(extra=extra))


def test_ragged_groups_are_those_of_the_oracle(make_batch):
    scores, batch = random_groups(make_batch)
    batch = batch._replace(extra={"aligned_logps": batch.ref_logps})
    got = poft.loss(scores, batch, beta=2.0, gamma=0.3)[0]
    rows = oracle.groups(scores, batch)
    want = [oracle.poft(group, beta=2.0, gamma=0.3) for group in rows]
    np.testing.assert_allclose(got, want, rtol=1e-5)
