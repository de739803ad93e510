"""LMs beside the target: found, cached, and read as the kernel reads them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import logprob
from alignax.batch import LM
from alignax.models import transformer
from alignax.sampling import guide_models


@pytest.fixture(scope="module")
def lm(tiny_config, make_lm):
    return make_lm(
        dataclasses.replace(tiny_config, vocab_size=7, num_layers=1, value_head=True)
    )


def test_blocks_read_what_the_whole_row_says(lm, make_batch):
    """The cache of a ragged prompt, two blocks of two tokens; values as the kernel's."""
    batch = make_batch(2, 1, 8, vocab=7)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 8)))
    starts = jnp.array([3, 1])
    whole = jnp.ones((2, 1, 8), bool).at[:, :, 0].set(False)
    batch = batch._replace(tokens=tokens[:, None], mask=whole)
    h, _ = transformer.hidden(lm, tokens)
    want_rows = logprob.rows(lm, h)
    want = logprob.score(lm, batch, needs=("values",)).values[:, 0]

    @jax.jit
    def read(caches, block, start):
        _, (rows,), _ = guide_models.rows(
            (lm,), caches, block, start, jnp.zeros((2, 2, 7))
        )
        (h,), caches = guide_models.read((lm,), caches, block, start)
        return rows, guide_models.value(lm, h), caches

    caches = guide_models.init((lm,), tokens[:, :4], starts, 8)
    row = jnp.arange(2)[:, None]
    for first in (0, 2):
        at = starts[:, None] + first + jnp.arange(2)
        rows, values, caches = read(caches, tokens[row, at], at[:, 0])
        np.testing.assert_allclose(rows, want_rows[row, at], atol=1e-5)
        np.testing.assert_allclose(values, want[row, at], atol=1e-5)


def test_the_sign_of_a_scale_orders_the_bounds(lm):
    guide = guide_models.of_values(lm, -2.0, centre=1.0, radius=3.0)
    assert (guide.lo, guide.hi) == (-8.0, 4.0)
    leaves = jax.tree.leaves(guide.update)
    assert any(np.shape(x) == () and float(x) == -2.0 for x in leaves)


def test_what_cannot_be_read_is_named(lm, tiny_lm):
    lms = {"a": lm, "b": tiny_lm}
    assert guide_models.find(lms, "b", "b") == (tiny_lm, tiny_lm)
    with pytest.raises(ValueError, match=r"no LM 'c'; there are \['a', 'b'\]"):
        guide_models.find(lms, "c")
    other = dataclasses.replace(lm.config, tokenizer="there")
    with pytest.raises(ValueError, match=r"LM 'b' has another tokenizer .* of there"):
        guide_models.find({"b": LM(other, lm.params)}, "b")
    with pytest.raises(ValueError, match="LM 'b' has no scalar head"):
        guide_models.find(lms, "b", value_head=True)
