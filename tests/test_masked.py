"""Reductions and moments under a mask, against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import losses as oracle

from alignax import masked
from alignax.batch import Batch


def ragged(valid=((True, True), (True, False), (False, False))):
    """Scored tokens: 1 and 3; 2 (and an invalid 4); nothing valid."""
    lengths = np.array([[1, 3], [2, 4], [2, 2]])
    mask = np.arange(5) - 1 < lengths[..., None]
    mask[..., 0] = False
    return Batch(
        jnp.zeros((3, 2, 5), jnp.int32), jnp.asarray(mask), jnp.asarray(lengths + 1),
        jnp.zeros((3, 2)), jnp.asarray(valid),
    )  # fmt: skip


def reduce(batch, mode, x, **kwargs):
    """What train.py does: weighted sum per prompt, mean over prompts with a response."""
    per_prompt = (masked.token_weights(batch, mode, **kwargs) * x).sum((1, 2))
    keep = masked.prompts(batch)
    return float(jnp.where(keep, per_prompt, 0).sum() / keep.sum())


def test_prompts_are_those_with_a_valid_response():
    np.testing.assert_array_equal(masked.prompts(ragged()), [True, True, False])


def test_token_mode_is_the_mean_over_all_scored_tokens():
    x = jnp.zeros((3, 2, 5)).at[0, 1].set(jnp.arange(5.0)).at[1].set(10.0)
    # tokens: [0], [1, 2, 3], [10, 10]
    assert reduce(ragged(), "token", x) == pytest.approx(26 / 6, rel=1e-6)


def test_sequence_mode_is_the_mean_over_responses():
    x = jnp.zeros((3, 2, 5)).at[0, 1].set(jnp.arange(5.0)).at[1].set(10.0)
    # responses: 0, (1+2+3)/3, 10
    assert reduce(ragged(), "sequence", x) == pytest.approx(12 / 3, rel=1e-6)


@pytest.mark.parametrize("length, divisor", [(None, 5), (8, 8)])
def test_constant_mode_divides_every_response_by_one_length(length, divisor):
    x = jnp.zeros((3, 2, 5)).at[0, 1].set(jnp.arange(5.0)).at[1].set(10.0)
    want = (0 + 6 + 20) / 3 / divisor
    assert reduce(ragged(), "constant", x, length=length) == pytest.approx(
        want, rel=1e-6
    )


@pytest.mark.parametrize("mode", masked.MODES)
def test_reductions_are_those_of_the_oracle(mode, make_batch):
    batch = make_batch(5, 3, 12, seed=3)
    valid = np.ones((5, 3), bool)
    valid[0, 1] = valid[2] = valid[4, 2] = False
    batch = batch._replace(valid=jnp.asarray(valid))
    x = np.random.default_rng(0).normal(size=batch.mask.shape).astype(np.float32)
    want = oracle.sft(-x, np.asarray(batch.mask), valid, mode)
    assert reduce(batch, mode, jnp.asarray(x)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("mode", masked.MODES)
def test_weights_are_zero_off_the_mask_and_on_invalid_rows(mode):
    batch = ragged()
    weights = np.asarray(masked.token_weights(batch, mode))
    off = ~np.asarray(batch.mask & batch.valid[..., None])
    assert (weights[off] == 0).all()
    assert (weights[~off] > 0).all()


@pytest.mark.parametrize("mode", masked.MODES)
def test_nothing_valid_weighs_nothing(mode):
    weights = masked.token_weights(ragged(np.zeros((3, 2), bool)), mode)
    np.testing.assert_array_equal(weights, np.zeros((3, 2, 5)))


def test_weights_of_the_whole_step_are_used_as_they_stand():
    given = jnp.full((3, 2, 5), 0.25)
    batch = ragged()._replace(extra={"token_weights": given})
    np.testing.assert_array_equal(masked.token_weights(batch, "token"), given)


def test_unknown_reduction_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'tokens'; known: token, sequence, constant"):
        masked.token_weights(ragged(), "tokens")


X = np.array([[3.0, 1.0, 99.0], [5.0, 7.0, -99.0]], np.float32)
MASK = np.array([[1, 1, 0], [1, 1, 0]], bool)


def test_mean_and_var_are_those_of_what_is_masked_in():
    assert float(masked.mean(jnp.asarray(X), jnp.asarray(MASK))) == 4
    assert float(masked.var(jnp.asarray(X), jnp.asarray(MASK))) == 5
    assert float(
        masked.var(jnp.asarray(X), jnp.asarray(MASK), ddof=1)
    ) == pytest.approx(20 / 3)


def test_mean_and_var_of_nothing_are_zero():
    nothing = jnp.zeros_like(jnp.asarray(MASK))
    assert float(masked.mean(jnp.asarray(X), nothing)) == 0
    assert float(masked.var(jnp.asarray(X), nothing, ddof=1)) == 0


def test_whiten_uses_bessels_correction_and_zeroes_padding():
    white = np.asarray(masked.whiten(jnp.asarray(X), jnp.asarray(MASK)))
    s = np.sqrt(20 / 3)
    want = [[-1 / s, -3 / s, 0], [1 / s, 3 / s, 0]]
    np.testing.assert_allclose(white, want, rtol=1e-5)


def test_whiten_without_shift_keeps_the_mean():
    white = np.asarray(masked.whiten(jnp.asarray(X), jnp.asarray(MASK), shift=False))
    assert white[MASK].mean() == pytest.approx(4, rel=1e-5)
    assert white[MASK].std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert (white[~MASK] == 0).all()


def test_last_is_the_last_masked_token_not_the_last_token():
    x = jnp.arange(12.0).reshape(2, 6)
    mask = jnp.asarray([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(masked.last(x, mask), [4, 7])
