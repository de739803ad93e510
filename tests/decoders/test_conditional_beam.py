"""Conditional beam search against the conditional mode, by writing down every response."""

import dataclasses

import jax
import numpy as np
import pytest
from oracles import searching

from alignax.batch import check
from alignax.decoders import conditional_beam

V, NEW, EOS = 4, 5, (0,)
PROMPTS, LENGTHS = np.array([[2, 1, 3], [3, 1, 0]]), np.array([3, 2])


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, vocab_size=V, num_layers=1, tied=False)


def run(lm, judge, **settings):
    settings = dict(max_new=NEW, eos_ids=EOS, judge=judge, top_k=V) | settings
    return conditional_beam.search(
        lm, {}, PROMPTS, LENGTHS, jax.random.key(0), **settings
    )


def foretelling(distributions, attribute):
    """P(A | x, y) itself, of every prompt: a judge that reads the prompt's row."""
    wholes, begins = [], []
    for distribution in distributions:
        whole, begin = {}, {}
        for y, p in distribution.items():
            for n in range(1, len(y) + 1):
                begin[y[:n]] = begin.get(y[:n], 0.0) + p
                whole[y[:n]] = whole.get(y[:n], 0.0) + p * attribute(y)
        wholes.append(whole)
        begins.append(begin)

    def judge(batch):
        rows = searching.rows(batch)
        return np.array(
            [
                [min(w[y] / b[y], 1.0) if y else 0.5 for y in group]
                for group, w, b in zip(rows, wholes, begins, strict=True)
            ]
        )

    return judge


def modes(distributions, attribute):
    return [
        max((p, y) for y, p in distribution.items() if attribute(y))[1]
        for distribution in distributions
    ]


@pytest.fixture(scope="module")
def toy(config):
    """Ending at once is the likeliest response, though few responses are that one."""
    lm = searching.constant(config, [0.34, 0.31, 0.2, 0.15])
    distributions = [
        searching.distribution(searching.twin(lm), x[:n], max_new=NEW, eos_ids=EOS)
        for x, n in zip(PROMPTS, LENGTHS, strict=True)
    ]
    return lm, distributions


@pytest.mark.parametrize("beams", [1, 2, 6])
def test_of_a_length_it_finds_the_mode_at_every_width(toy, beams):
    lm, distributions = toy

    def long(y):
        return len(y) == 4 and y[-1] == 0

    out = run(lm, foretelling(distributions, long), beams=beams)
    check(out.batch)
    assert searching.responses(out) == modes(distributions, long) == [(1, 1, 1, 0)] * 2
    want = np.log([distribution[1, 1, 1, 0] for distribution in distributions])
    np.testing.assert_allclose(out.batch.feedback[:, 0], want, atol=1e-4)  # float32


@pytest.mark.parametrize("beams", [1, 2, 6])
def test_without_a_condition_the_mode_is_empty(toy, beams):
    lm, _ = toy
    out = run(lm, lambda batch: np.ones(batch.valid.shape), beams=beams)
    assert searching.responses(out) == [(0,)] * 2


def test_a_wide_beam_finds_the_mode_of_a_model_that_remembers(config, make_lm):
    """And every width has the attribute, with at most the mode's probability."""
    lm = make_lm(config, 5)
    distributions = [
        searching.distribution(searching.twin(lm), x[:n], max_new=NEW, eos_ids=EOS)
        for x, n in zip(PROMPTS, LENGTHS, strict=True)
    ]

    def both(y):
        return 1 in y and 3 in y and y[-1] == 0

    judge = foretelling(distributions, both)
    best = modes(distributions, both)
    assert searching.responses(run(lm, judge, beams=16)) == best
    for y, distribution, mode in zip(
        searching.responses(run(lm, judge, beams=1)), distributions, best, strict=True
    ):
        assert both(y)
        assert distribution[y] <= distribution[mode]
    plain = run(lm, lambda batch: np.ones(batch.valid.shape), beams=16)
    assert not all(map(both, searching.responses(plain)))


def test_a_judge_that_gives_no_probability_is_refused(toy):
    with pytest.raises(ValueError, match=r"judge gave 1\.5.*0\.0\.\.1\.0"):
        run(toy[0], lambda batch: np.full(batch.valid.shape, 1.5))
    with pytest.raises(ValueError, match="judge is None"):
        run(toy[0], None)
    with pytest.raises(ValueError, match="beams=0"):
        run(toy[0], lambda batch: np.ones(batch.valid.shape), beams=0)
