"""Steering as a guide: on the model itself it is the steered model, drafts or not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_lms import LENGTHS, V, models, run, steps

from alignax import logprob
from alignax.decoders import steering as decoder
from alignax.models import transformer
from alignax.sampling import decode, steering_vectors
from alignax.sampling.speculate import speculate


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    """Of two layers: what is added after the first one is in the cache of the second."""
    target = make_lm(dataclasses.replace(tiny_config, vocab_size=V))
    return models(tiny_config, make_lm, "target", "other") | {"target": target}


def steered(lm, ids, vectors, strength):
    """p(. | ids) of the edited model, read at once and without a cache."""
    h, _ = transformer.hidden(
        lm, jnp.asarray([ids]), edit=steering_vectors.edit(vectors, strength)
    )
    return np.asarray(logprob.rows(lm, h[:, -1:]))[0, 0]


def test_on_the_target_the_distribution_is_that_of_the_steered_model(lms):
    vectors = steering_vectors.load("random", lms["target"], seed=2)
    guide = decoder.guide(lms, strength=1.5, seed=2)
    out = run(decode.generate, lms["target"], guide=guide)
    for ids, token, logp in steps(out):
        want = steered(lms["target"], ids, vectors, 1.5)[token]
        assert logp == pytest.approx(want, abs=1e-4)


def test_no_strength_and_no_weight_leave_the_target_alone(lms):
    plain = run(decode.generate, lms["target"])
    for changes in ({"strength": 0.0}, {"weight": 0.0}):
        out = run(decode.generate, lms["target"], guide=decoder.guide(lms, **changes))
        np.testing.assert_array_equal(out.batch.tokens, plain.batch.tokens)
    moved = run(decode.generate, lms["target"], guide=decoder.guide(lms, strength=4.0))
    assert (moved.batch.tokens != plain.batch.tokens).any()


def test_greedy_with_a_draft_is_greedy_of_the_steered_model(lms):
    guide = decoder.guide(lms, strength=2.0)
    vectors = steering_vectors.load("random", lms["target"])
    fast = run(speculate, lms["target"], lms["other"], guide=guide, temperature=0.0,
               draft_length=2)  # fmt: skip
    for b in range(2):
        ids = fast.batch.tokens[b, 0, : LENGTHS[b]].tolist()
        for t in range(LENGTHS[b], LENGTHS[b] + 3):
            best = int(steered(lms["target"], ids, vectors, 2.0).argmax())
            assert fast.batch.tokens[b, 0, t] == best
            ids.append(best)


def test_bad_arguments_are_named(lms):
    with pytest.raises(ValueError, match="no LM 'big'"):
        decoder.guide(lms, model="big")
    with pytest.raises(ValueError, match="layers has 7"):
        decoder.guide(lms, layers=(7,))
