"""Sampling frequencies against the exact distribution, enumerated on a tiny vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import chi_square, decoding
from oracles import transformer as oracle
from scipy import stats

from alignax.sampling import decode

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]
PROMPTS, LENGTHS = np.array([[2, 3, 4], [1, 0, 0]]), np.array([3, 1])
EOS, NEW, GROUP = (0,), 3, 8192


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    """Five tokens: 1 + 4 + 4 * 4 * 5 = 85 responses of up to three."""
    return make_lm(dataclasses.replace(tiny_config, vocab_size=5))


@pytest.fixture(scope="module")
def next_logits(lm):
    with jax.enable_x64(True):
        params = oracle.float64(lm.params)
        run = jax.jit(lambda ids: oracle.logits(lm.config, params, ids))

    def call(ids):
        padded = np.zeros(6, int)
        padded[: len(ids)] = ids
        with jax.enable_x64(True):
            return np.asarray(run(padded))[len(ids) - 1]

    return call


def sample(lm, temperature, seed=0):
    out = decode.generate(
        lm, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), jax.random.key(seed),
        max_new=NEW, group=GROUP, temperature=temperature, eos_ids=EOS,
    )  # fmt: skip
    tokens, mask = np.asarray(out.batch.tokens), np.asarray(out.batch.mask)
    return [
        [tuple(t[m].tolist()) for t, m in zip(*rows, strict=True)]
        for rows in zip(tokens, mask, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_responses_follow_the_exact_distribution(lm, next_logits, temperature):
    for prompt, length, seen in zip(
        PROMPTS, LENGTHS, sample(lm, temperature), strict=True
    ):
        distribution = decoding.distribution(
            next_logits, prompt[:length].tolist(), max_new=NEW, eos_ids=EOS,
            temperature=temperature,
        )  # fmt: skip
        assert len(distribution) == 85
        assert sum(distribution.values()) == pytest.approx(1)
        assert set(seen) <= set(distribution)
        counts = [seen.count(response) for response in distribution]
        # a fixed seed: this fails one time in 10,000 drawings of the seed
        assert (
            chi_square.p_value(counts, np.array([*distribution.values()]) * GROUP)
            > 1e-4
        )


def test_the_measure_sees_a_wrong_temperature(lm, next_logits):
    """The control: 15 % off is noticed with this many samples."""
    distribution = decoding.distribution(
        next_logits, [2, 3, 4], max_new=NEW, eos_ids=EOS, temperature=1.15
    )
    seen = sample(lm, 1.0)[0]
    counts = [seen.count(response) for response in distribution]
    assert chi_square.p_value(counts, np.array([*distribution.values()]) * GROUP) < 1e-4


def test_samples_of_a_group_are_independent(lm):
    """The joint distribution of neighbours' first tokens is the product of their own distributions."""
    first = np.array([r[0] for r in sample(lm, 1.0, seed=1)[0]])
    table = np.zeros((5, 5))
    np.add.at(table, (first[0::2], first[1::2]), 1)
    keep = table.sum(0) > 50
    assert stats.chi2_contingency(table[keep][:, keep]).pvalue > 1e-4


def test_prompts_of_a_batch_are_independent(lm):
    a, b = (np.array([r[0] for r in rows]) for rows in sample(lm, 1.0, seed=2))
    table = np.zeros((5, 5))
    np.add.at(table, (a, b), 1)
    rows, columns = table.sum(1) > 50, table.sum(0) > 50
    assert stats.chi2_contingency(table[rows][:, columns]).pvalue > 1e-4


def test_steps_of_a_response_draw_fresh_randomness(lm, next_logits):
    """A key reused at every step would tie the second token to the first."""
    seen = [r for r in sample(lm, 1.0, seed=3)[0] if len(r) > 1]
    for first in range(1, 5):
        second = [r[1] for r in seen if r[0] == first]
        z = next_logits([2, 3, 4, first])
        p = np.exp(z - z.max())
        counts = np.bincount(second, minlength=5)
        assert chi_square.p_value(counts, p / p.sum() * len(second)) > 1e-4
