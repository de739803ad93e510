"""RSD against the distribution that it samples, and against the tilts that it does not."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import check
from alignax.decoders import rsd
from alignax.sampling import decode

V, NEW, EOS = 3, 2, (0,)
PROMPT = [2, 1, 1, 2]
DELTA = 0.5


def score(y):
    return 1.0 * (y[-1] == 1) + 0.3 * (2 in y)


@pytest.fixture(scope="module")
def models(tiny_config, make_lm):
    config = dataclasses.replace(tiny_config, vocab_size=V, num_layers=1)
    return make_lm(config), make_lm(config, 5)


@pytest.fixture(scope="module")
def twins(models):
    return [searching.twin(lm) for lm in models]


def run(models, rows, **settings):
    settings = dict(
        max_new=NEW, eos_ids=EOS, judge=searching.by_response(score), step=NEW,
        delta=DELTA,
    ) | settings  # fmt: skip
    prompts, lengths = np.tile(PROMPT, (rows, 1)), np.full(rows, len(PROMPT))
    lms = {"draft": models[1]}
    return rsd.search(models[0], lms, prompts, lengths, jax.random.key(2), **settings)


def distribution(twins, step):
    out = {}

    def grow(y, mass):
        if len(y) == NEW or (y and y[-1] in EOS):
            out[y] = out.get(y, 0.0) + mass
            return
        settings = dict(max_new=min(step, NEW - len(y)), eos_ids=EOS)
        p, q = (searching.distribution(f, [*PROMPT, *y], **settings) for f in twins)
        good = {z: score((*y, *z)) >= DELTA for z in q}
        rejected = sum(m for z, m in q.items() if not good[z])
        for z in p:
            grow((*y, *z), mass * (q[z] * good[z] + rejected * p[z]))

    grow((), 1.0)
    return out


@pytest.mark.parametrize("step", [1, 2])
def test_it_has_its_own_distribution(models, twins, step):
    out = run(models, 3000, step=step)
    check(out.batch)
    got = searching.responses(out)
    assert searching.surprise(got, distribution(twins, step)) < 4
    np.testing.assert_allclose(
        out.batch.feedback[:, 0], [score(y) for y in got], rtol=1e-6
    )
    # one row, one draft a step: what is not accepted is written again
    assert 0.2 < out.stats["accepted"] < 0.9
    assert out.stats["target_tokens"] > 0


def test_it_is_no_tilt_of_the_target(twins):
    """Of all p exp(r / beta) / Z the nearest is at least .3 away."""
    p = searching.distribution(twins[0], PROMPT, max_new=NEW, eos_ids=EOS)
    own, nearest = distribution(twins, NEW), 1.0
    for beta in np.geomspace(0.05, 50, 60):
        w = {y: m * math.exp(score(y) / beta) for y, m in p.items()}
        tilted = {y: x / sum(w.values()) for y, x in w.items()}
        nearest = min(nearest, searching.distance(own, tilted))
    assert nearest > 0.3


def test_the_threshold_goes_from_the_draft_to_the_target(models, twins):
    p, q = (searching.distribution(f, PROMPT, max_new=NEW, eos_ids=EOS) for f in twins)
    draft = run(models, 1500, delta=-math.inf)
    target = run(models, 1500, delta=math.inf)
    assert searching.surprise(searching.responses(draft), q) < 4
    assert searching.surprise(searching.responses(target), p) < 4
    assert searching.surprise(searching.responses(draft), p) > 20
    assert (draft.stats["accepted"], target.stats["accepted"]) == (1, 0)
    assert draft.stats["target_tokens"] == 0


def test_a_second_call_compiles_nothing(models):
    run(models, 1500)
    before = decode._generate._cache_size()
    run(models, 1500, delta=0.2, temperature=0.5)
    assert decode._generate._cache_size() == before


def test_bad_input_is_named(models):
    for settings, message in (
        ({"step": 0}, "step=0"),
        ({"draft": "small"}, r"no LM 'small'; there are \['draft'\]"),
        ({"judge": None}, "judge is None"),
    ):
        with pytest.raises(ValueError, match=message):
            run(models, 2, **settings)
