"""A token is drawn from exactly its distribution, by two random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.sampling import response_state


def normalised(logits):
    return logits - np.logaddexp.reduce(logits)


def chi_square(observed, expected):
    some = expected > 5
    o = np.append(observed[some], observed[~some].sum())
    e = np.append(expected[some], expected[~some].sum())
    keep = e > 0
    return ((o - e)[keep] ** 2 / e[keep]).sum(), keep.sum() - 1


@pytest.mark.parametrize("size", [1, 2, 37, 255, 256, 257, 700, 1024])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_draws_follow_the_distribution(size, spread):
    rng = np.random.default_rng(size)
    logits = rng.normal(0, spread, size)
    logits[rng.random(size) < 0.3] = -np.inf
    logits[size // 2] = 0.0
    logps = jnp.asarray(normalised(logits), jnp.float32)
    many = 40_000
    keys = jax.random.split(jax.random.key(size), many)
    draw = jax.vmap(response_state.categorical, (0, None))
    got = np.bincount(np.asarray(draw(keys, logps)), minlength=size)
    expected = many * np.exp(np.asarray(logps, np.float64))
    assert len(got) == size and got[expected == 0].sum() == 0
    value, freedom = chi_square(got, expected)
    # beyond this by chance once in 10,000 (Wilson and Hilferty's approximation)
    f = max(freedom, 1)
    assert value < f * (1 - 2 / (9 * f) + 3.72 * (2 / (9 * f)) ** 0.5) ** 3


def test_the_two_numbers_are_independent():
    """Which token of a block is drawn does not depend on which block it was."""
    size = 512
    keys = jax.random.split(jax.random.key(3), 60_000)
    logps = jnp.full(size, -np.log(size), jnp.float32)
    draw = jax.vmap(response_state.categorical, (0, None))
    block, inner = np.divmod(np.asarray(draw(keys, logps)), response_state.BLOCK)
    table, *_ = np.histogram2d(block, inner // 64, bins=(2, 4))
    expected = len(keys) / table.size
    assert ((table - expected) ** 2 / expected).sum() < 29.9  # 8 cells, once in 10,000


@pytest.mark.parametrize("at", [0, 1, 255, 256, 299])
def test_a_certain_token_is_always_drawn(at):
    logps = jnp.where(jnp.arange(300) == at, 0.0, -jnp.inf)
    keys = jax.random.split(jax.random.key(0), 2000)
    got = jax.vmap(response_state.categorical, (0, None))(keys, logps)
    assert (np.asarray(got) == at).all()


def test_a_place_is_that_of_the_cumulative_mass_in_float64():
    rng = np.random.default_rng(0)
    inverse = jax.jit(response_state._inverse)
    for _ in range(300):
        mass = rng.random(191).astype(np.float32) ** 8
        mass[rng.random(191) < 0.4] = 0
        u = np.float32(rng.choice([0.0, 1 - 2**-24, rng.random()]))
        total = np.cumsum(mass.astype(np.float64))
        got = int(inverse(mass, u))
        assert mass[got] > 0
        low, high = total[got] - mass[got], total[got]
        slack = 1e-5 * total[-1]
        assert low - slack <= np.float64(u) * total[-1] <= high + slack


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(6, 300)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    draw = jax.jit(response_state.draw)
    together, _ = draw(keys, logits, jnp.float32(1.0))
    for i in range(6):
        alone, _ = draw(keys[i : i + 1], logits[i : i + 1], jnp.float32(1.0))
        assert int(alone[0]) == int(together[i])
