"""Processors against lists in float64, and the order that makes them one distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import next_token

from alignax.sampling.processors import Processors, process, truncate

N, V = 24, 9
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, V)) * 2
RESPONSES = [RNG.integers(0, V, RNG.integers(0, 5)).tolist() for _ in range(N)]
PROMPTS = [RNG.integers(0, V, 3).tolist() for _ in range(N)]
SETTINGS = dict(
    temperature=RNG.uniform(0.3, 2, N), repetition=RNG.uniform(0.7, 1.5, N),
    frequency=RNG.uniform(-0.5, 1, N), presence=RNG.uniform(-0.5, 1, N),
    top_k=RNG.integers(0, V + 2, N), top_p=RNG.uniform(0.3, 1, N),
    min_p=RNG.uniform(0, 0.4, N), bias=RNG.normal(size=(N, V)),
)  # fmt: skip
ALLOWED = RNG.random((N, V)) < 0.8
jitted = jax.jit(process)


def array(x):
    return jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32)


def run(settings, allowed=None):
    w = Processors(**{k: array(v) for k, v in settings.items()})
    counts = np.array([np.bincount(r, minlength=V) for r in RESPONSES], np.int32)
    prompt = np.array([np.isin(range(V), p) for p in PROMPTS])
    z = jitted(
        array(LOGITS), w, counts=jnp.asarray(counts), prompt=jnp.asarray(prompt),
        allowed=None if allowed is None else jnp.asarray(allowed),
    )  # fmt: skip
    return np.asarray(jax.nn.softmax(z, -1))


def want(settings, allowed=None):
    return np.array(
        [
            next_token.distribution(
                LOGITS[i], prompt=PROMPTS[i], response=RESPONSES[i],
                allowed=None if allowed is None else allowed[i],
                **{k: v[i] for k, v in settings.items()},
            )
            for i in range(N)
        ]
    )  # fmt: skip


def test_all_of_them_together_are_the_distribution_in_float64():
    got, expected = run(SETTINGS, ALLOWED), want(SETTINGS, ALLOWED)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_each_alone_is_the_distribution_in_float64_and_does_something(name):
    ones = {"temperature": np.ones(N)}
    one = ones | {name: SETTINGS[name]}
    got = run(one)
    np.testing.assert_allclose(got, want(one), atol=2e-6)
    assert np.abs(got - run(ones)).max() > 0.01


def test_off_is_off():
    off = dict(
        temperature=np.ones(N), repetition=np.ones(N), frequency=np.zeros(N),
        presence=np.zeros(N), top_k=np.zeros(N, int), top_p=np.ones(N),
        min_p=np.zeros(N), bias=np.zeros((N, V)),
    )  # fmt: skip
    np.testing.assert_array_equal(run(off), run({"temperature": np.ones(N)}))


def test_top_p_is_of_what_top_k_left():
    """[.5 .3 .2]: two of them have .8, and of those two one has .625."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    two, p = jnp.array([2]), jnp.array([0.6])
    alone = truncate(logits, None, p, None)
    assert np.isfinite(alone).sum() == 2
    both = truncate(logits, two, p, None)
    assert np.isfinite(both).sum() == 1


def test_of_equal_logits_the_lower_id_ranks_first():
    got = truncate(jnp.zeros((1, 5)), jnp.array([2]), None, None)
    np.testing.assert_array_equal(np.isfinite(got), [[1, 1, 0, 0, 0]])


def test_top_p_of_one_keeps_the_whole_tail():
    """Float32 sums of 4096 shares need not end at 1."""
    logits = array(np.random.default_rng(1).normal(size=(2, 4096)) * 4)
    got = truncate(logits, None, jnp.ones(2), None)
    np.testing.assert_array_equal(got, logits)


def test_greedy_rows_keep_their_logits():
    settings = {"temperature": np.where(np.arange(N) % 2, 1.0, 0.0)}
    w = Processors(array(settings["temperature"]))
    np.testing.assert_array_equal(process(array(LOGITS), w), array(LOGITS))
