"""DPO: numbers by hand. TRL's numbers are compared in models/test_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_pairs import pair
from oracles import losses as oracle

from alignax.batch import Scores
from alignax.losses import dpo


def test_golden_number():
    """h = 3 - (-1) = 4, beta = 0.5: log(1 + e^-2)."""
    values, metrics = dpo.loss(*pair(3.0, -1.0), beta=0.5)
    assert float(values[0]) == pytest.approx(0.126928011, abs=1e-6)
    assert float(metrics["margin"][0]) == pytest.approx(2, abs=1e-6)
    assert float(metrics["log_ratio_chosen"][0]) == pytest.approx(3, abs=1e-6)
    assert float(metrics["log_ratio_rejected"][0]) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_policy_equal_to_reference_costs_log_two(beta, eps):
    values, metrics = dpo.loss(*pair(), beta=beta, label_smoothing=eps)
    assert float(values[0]) == pytest.approx(np.log(2), abs=1e-7)
    assert float(metrics["accuracy"][0]) == 0.5


def test_gradient_raises_chosen_and_lowers_rejected():
    scores, batch = pair(0.5, 0.2)
    grad = jax.grad(lambda x: dpo.loss(Scores(x), batch)[0].sum())(scores.logps)
    grad = np.asarray(grad)
    assert (grad[0, 0, 1:3] < 0).all()
    assert (grad[0, 1, 1:3] > 0).all()
    np.testing.assert_allclose(grad[0, 0], -grad[0, 1], atol=1e-7)


@pytest.mark.parametrize("eps", [0.1, 0.25, 0.4])
def test_conservative_dpo_is_least_at_its_logit(eps):
    """The best margin is finite: beta h = logit(1 - eps)."""
    best = np.log((1 - eps) / eps)

    def value(margin):
        scores, batch = pair(margin, 0.0)
        return dpo.loss(scores, batch, beta=1.0, label_smoothing=eps)[0][0]

    assert float(jax.grad(value)(jnp.float32(best))) == pytest.approx(0, abs=1e-6)
    at = [float(value(jnp.float32(best + d))) for d in (-0.5, 0, 0.5)]
    assert at[1] < min(at[0], at[2])
    assert at[1] == pytest.approx(
        -(1 - eps) * np.log(1 - eps) - eps * np.log(eps), rel=1e-5
    )


def test_small_beta_is_a_linear_loss():
    """L -> log 2 - beta h / 2."""
    value = float(dpo.loss(*pair(3.0, -1.0), beta=1e-3)[0][0])
    assert (np.log(2) - value) / 1e-3 == pytest.approx(4 / 2, rel=2e-3)


def test_large_margins_neither_overflow_nor_vanish():
    good, bad = (
        float(dpo.loss(*pair(h, 0.0), beta=1.0)[0][0]) for h in (500.0, -500.0)
    )
    assert good == 0
    assert bad == pytest.approx(500, rel=1e-6)


def test_random_pairs_are_those_of_the_oracle(make_batch):
    batch = make_batch(6, 2, 12)
    rng = np.random.default_rng(0)
    logps, ref = (
        np.where(batch.mask, -rng.random((6, 2, 12)) * 5, 0).astype(np.float32)
        for _ in range(2)
    )
    got, metrics = dpo.loss(
        Scores(jnp.asarray(logps)), batch._replace(ref_logps=jnp.asarray(ref)),
        beta=0.3, label_smoothing=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(
        got, oracle.dpo(logps, ref, np.asarray(batch.mask), 0.3, 0.1), rtol=1e-5
    )
    ranked_right = (logps - ref).sum(-1)[:, 0] > (logps - ref).sum(-1)[:, 1]
    np.testing.assert_array_equal(metrics["accuracy"], ranked_right)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_pair_without_one_of_its_sides_costs_nothing(slot):
    scores, batch = pair(3.0, -1.0)
    batch = batch._replace(valid=batch.valid.at[0, slot].set(False))
    values, grad = jax.value_and_grad(lambda x: dpo.loss(Scores(x), batch)[0].sum())(
        scores.logps
    )
    assert float(values) == 0
    assert not np.asarray(grad).any()


def test_one_response_a_prompt_is_no_pair(make_batch):
    batch = make_batch(2, 1, 8)
    scores = Scores(jnp.zeros(batch.mask.shape))
    with pytest.raises(ValueError, match="pairs got 1 responses per prompt"):
        dpo.loss(scores, batch._replace(ref_logps=scores.logps))


def test_a_missing_reference_is_named(make_batch):
    batch = make_batch(2, 2, 8)
    with pytest.raises(ValueError, match="ref_logps is None: name a frozen reference"):
        dpo.loss(Scores(jnp.zeros(batch.mask.shape)), batch)
