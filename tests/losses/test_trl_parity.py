"""The losses that TRL has too, on the same log-probabilities: values and gradients.

TRL's numbers were made by its own trainers (tests/golden/make_trl_losses.py). Where
alignax differs on purpose, the difference itself is tested.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.batch import Batch, Scores
from alignax.losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    cpo,
    discopop,
    dpo,
    dpo_norm,
    exo_pair,
    f_dpo,
    hinge,
    ipo,
    nca_pair,
    orpo,
    robust,
    rpo,
    simpo,
    sppo_hard,
)
from alignax.reweight import length_desensitised, wpo

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl_losses.npz")


def desensitised(policy, batch, *, alpha, **hyper):
    policy, batch, _ = length_desensitised.reweight(policy, batch, alpha=alpha)
    return dpo.loss(policy, batch, **hyper)


def weighted(policy, batch, **hyper):
    policy, batch, weight = wpo.reweight(policy, batch)
    values, metrics = dpo.loss(policy, batch, **hyper)
    return weight * values, metrics


CASES = {
    "sigmoid": (dpo.loss, dict(beta=0.1)),
    "robust": (robust.loss, dict(beta=0.1, label_smoothing=0.1)),
    "hinge": (hinge.loss, dict(beta=0.05)),
    "ipo": (ipo.loss, dict(beta=0.1)),
    "exo_pair": (exo_pair.loss, dict(beta=0.1, label_smoothing=1e-3)),
    "nca_pair": (nca_pair.loss, dict(beta=0.05)),
    "bco_pair": (bco_pair.loss, dict(beta=0.05)),
    "sppo_hard": (sppo_hard.loss, dict(beta=0.05)),
    "aot": (aot.loss, dict(beta=0.05, label_smoothing=0.1)),
    "aot_unpaired": (aot_unpaired.loss, dict(beta=0.05, label_smoothing=0.1)),
    "apo_zero": (apo_zero.loss, dict(beta=0.1)),
    "apo_down": (apo_down.loss, dict(beta=0.1)),
    "discopop": (discopop.loss, dict(beta=0.05, tau=0.05)),
    "sigmoid_norm": (dpo_norm.loss, dict(beta=2.0)),
    "forward_kl": (f_dpo.loss, dict(beta=0.1, divergence="forward_kl")),
    "js": (f_dpo.loss, dict(beta=0.1, divergence="js")),
    "alpha": (f_dpo.loss, dict(beta=0.1, divergence="alpha", alpha=0.3)),
    "ld": (desensitised, dict(beta=0.1, alpha=0.4)),
    "wpo": (weighted, dict(beta=0.1)),
    "rpo": (rpo.loss, dict(beta=0.1, alpha=0.5)),
    "simpo": (simpo.loss, dict(beta=2.0, gamma=1.0)),
    "cpo": (cpo.loss, dict(beta=0.1, lam=0.5)),
    "orpo": (orpo.loss, dict(lam=0.3)),
}
LIKELIHOOD = {"rpo": 0.5, "cpo": 0.5, "orpo": 1.0}  # weight of its NLL term
SORTED = ("aot", "aot_unpaired")


def given(name="", rows=slice(None)) -> tuple[Scores, Batch]:
    """The four pairs, or some, as the setting of that name had them."""

    def column(key):
        return jnp.asarray(GOLDEN[key][rows])

    ref_logps = column("sorted_ref_logps" if name in SORTED else "ref_logps")
    ones = jnp.ones(column("lengths").shape)
    batch = Batch(
        *map(column, ("tokens", "mask", "lengths")), ones, ones > 0, ref_logps
    )
    return Scores(column("logps"), collision=column("collision")), batch


def values_and_gradient(name):
    function, hyper = CASES[name]
    scores, batch = given(name)

    def total(logps):
        values = function(scores._replace(logps=logps), batch, **hyper)[0]
        return values.sum(), values

    (_, values), grad = jax.value_and_grad(total, has_aux=True)(scores.logps)
    return np.asarray(values), np.asarray(grad)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_every_setting_of_the_fixture_is_compared():
    made = {k.removesuffix(".loss") for k in GOLDEN if k.endswith(".loss")}
    assert made == {*CASES, "sigmoid_smoothed", "orpo_prompt"}


@pytest.mark.parametrize("name", [n for n in CASES if n not in SORTED])
def test_the_loss_of_each_pair_is_that_of_trl(name):
    close(values_and_gradient(name)[0], GOLDEN[f"{name}.losses"])


@pytest.mark.parametrize("name", [n for n in CASES if n not in LIKELIHOOD])
def test_the_loss_of_the_batch_is_that_of_trl(name):
    close(values_and_gradient(name)[0].mean(), GOLDEN[f"{name}.loss"])


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_by_log_probs_is_that_of_trl(name):
    mask = GOLDEN["mask"]
    close(values_and_gradient(name)[1][mask], GOLDEN[f"{name}.grads"][mask])


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_every_chosen_response_counts_the_same_where_trl_counts_tokens(name):
    """So the batch's loss differs, by the two means of the likelihood."""
    chosen = [
        -x[m] for x, m in zip(GOLDEN["logps"][:, 0], GOLDEN["mask"][:, 0], strict=True)
    ]
    by_token = np.concatenate(chosen).mean()
    by_response = np.mean([x.mean() for x in chosen])
    assert abs(by_token - by_response) > 1e-3
    want = GOLDEN[f"{name}.loss"] + LIKELIHOOD[name] * (by_response - by_token)
    close(values_and_gradient(name)[0].mean(), want)


def test_orpo_scores_the_response_where_trl_scores_the_prompt_too():
    chosen = np.where(GOLDEN["mask"][:, 0], GOLDEN["logps"][:, 0], 0).sum(-1)
    tokens = GOLDEN["mask"][:, 0].sum(-1)
    scored = GOLDEN["lengths"][:, 0] - 1  # the first token has no prefix
    whole = chosen + (scored - tokens) * GOLDEN["prompt_logp"]
    want = GOLDEN["orpo_prompt.losses"] + whole / scored - chosen / tokens
    close(values_and_gradient("orpo")[0], want)
    assert (
        np.abs(whole / scored - chosen / tokens) > 1e-2
    ).sum() == 3  # one prompt is one token


def test_label_smoothing_makes_dpo_conservative_where_trl_ignores_it():
    close(GOLDEN["sigmoid_smoothed.losses"], GOLDEN["sigmoid.losses"])
    values, metrics = dpo.loss(*given(), beta=0.1, label_smoothing=0.2)
    # -log σ(-z) = -log σ(z) + z
    close(values, GOLDEN["sigmoid.losses"] + 0.2 * metrics["margin"])


@pytest.mark.parametrize("name", SORTED)
def test_the_step_is_sorted_where_trl_sorts_micro_batches(name):
    function, hyper = CASES[name]
    for half, want in zip(([0, 1], [2, 3]), GOLDEN[f"{name}.halves"], strict=True):
        close(function(*given(name, half), **hyper)[0].mean(), want)
    halves = GOLDEN[f"{name}.halves"].mean()
    assert abs(values_and_gradient(name)[0].mean() - halves) > 1e-3
