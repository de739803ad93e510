"""Constrained fine-tuning: numbers by hand, and where it lets go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_lists import cost, group, random_groups, slopes
from oracles import losses as oracle

from alignax.batch import Scores, from_groups
from alignax.losses import sft, token_constrained

loss = token_constrained.loss


def test_golden_number():
    """At the start a token costs 2 log 2 / beta: betas 0.5, 2, 2, 2, 2 and 0.1."""
    got = cost(loss, [-1.0], [1], lengths=[6], ref=[-1.0])
    assert got == pytest.approx(np.log(2) * (4 + 4 * 1 + 20) / 6, rel=1e-6)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_at_the_start_the_gradient_is_that_of_fine_tuning(n):
    got = slopes(loss, [-1.0], [1], lengths=[n], ref=[-1.0])
    np.testing.assert_allclose(
        got, slopes(sft.loss, [-1.0], [1], lengths=[n]), rtol=1e-6
    )


def test_the_weight_of_a_token_vanishes_once_the_policy_is_ahead():
    """pi = 10 pi_ref at beta = 2: 2 / (1 + 10^2) = 0.0198."""
    scores, batch = group([np.log(10.0)], [1], lengths=[1])
    _, metrics = loss(scores, batch, beta_first=2.0)
    assert float(metrics["gradient_weight"][0]) == pytest.approx(0.01980198, rel=1e-5)
    got = slopes(loss, [np.log(10.0)], [1], lengths=[1], beta_first=2.0)
    assert got == pytest.approx(-0.01980198, rel=1e-5)


def test_small_beta_is_fine_tuning_and_large_beta_forbids_to_move():
    def slope(beta, score):
        betas = dict(beta_first=beta, beta_early=beta, beta_late=beta)
        return slopes(loss, [score], [1], lengths=[7], ref=[-1.0], **betas)[0]

    assert slope(1e-4, -0.5) == pytest.approx(-1, abs=1e-3)
    assert slope(1e3, -0.9) == pytest.approx(0, abs=1e-6)
    assert slope(1e3, -1.1) == pytest.approx(-2, abs=1e-6)


def test_places_are_counted_in_scored_tokens_not_in_the_row():
    """Prompts of 1 and 5 tokens; a turn that is not scored in between."""
    scored = [[[True, False, True]]]
    values = []
    for prompt in ([1], [1] * 5):
        batch = from_groups([prompt], [[[2, 3, 4]]], length=9, scored=scored)
        batch = jax.tree.map(jnp.asarray, batch)
        zeros = jnp.zeros(batch.mask.shape)
        batch = batch._replace(ref_logps=zeros)
        values.append(float(loss(Scores(zeros), batch)[0][0]))
    assert values == pytest.approx([np.log(2) * (4 + 1) / 2] * 2, rel=1e-6)


def test_random_responses_are_those_of_the_oracle(make_batch):
    scores, batch = random_groups(make_batch, g=1)
    batch = batch._replace(valid=jnp.ones_like(batch.valid))
    got = loss(
        scores, batch, beta_first=0.4, beta_early=1.5, beta_late=0.2, early=3,
        reduction="sequence",
    )[0]  # fmt: skip
    want = []
    for b in range(len(got)):
        mask = np.asarray(batch.mask)[b, 0]
        rows = (np.asarray(x)[b, 0][mask] for x in (scores.logps, batch.ref_logps))
        want.append(
            oracle.token_constrained(
                *(row.tolist() for row in rows),
                first=0.4,
                middle=1.5,
                late=0.2,
                early=3,
            )
        )
    np.testing.assert_allclose(got, want, rtol=1e-5)
