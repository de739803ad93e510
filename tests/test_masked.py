"""Reductions and moments under a mask, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from oracles import losses as oracle

from alignax import masked
from alignax.batch import Batch, Scores


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
    """What a training step does: weighted sum per prompt, mean over prompts with a response."""
    per_prompt = (masked.token_weights(batch, mode, **kwargs) * x).sum((1, 2))
    keep = masked.prompts(batch)
    return float(jnp.where(keep, per_prompt, 0).sum() / keep.sum())


def test_an_array_of_another_shape_than_annotated_is_refused_under_pytest():
    with pytest.raises(jaxtyping.TypeCheckError, match="B G T"):
        masked.reduce_tokens(jnp.zeros((3, 2)), ragged(), "token")


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


# -- what most losses read, against loops over prompts, responses and tokens in float64

EXACT = dict(rtol=1e-13, atol=1e-13)  # sums of at most ten terms


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def scores(batch, seed=0):
    """Random float64 [B, G, T] numbers, 0 where the mask is False."""
    x = np.random.default_rng(seed).normal(size=batch.mask.shape)
    return jnp.asarray(np.where(batch.mask, x, 0.0))


def test_scored_tokens_are_those_of_valid_responses():
    got = np.asarray(masked.scored(ragged()))
    assert [tuple(map(int, at)) for at in np.argwhere(got)] == [
        (0, 0, 1), (0, 1, 1), (0, 1, 2), (0, 1, 3), (1, 0, 1), (1, 0, 2),
    ]  # fmt: skip


def test_token_mean_divides_by_the_scored_tokens(float64):
    batch = ragged()
    batch = batch._replace(mask=batch.mask.at[2, 1].set(False))
    x = scores(batch)
    want = np.zeros((3, 2))
    for b, g in np.ndindex(3, 2):
        row = [float(v) for v, m in zip(x[b, g], batch.mask[b, g], strict=True) if m]
        want[b, g] = sum(row) / len(row) if row else 0
    np.testing.assert_allclose(masked.token_mean(x, batch), want, **EXACT)


def test_log_ratios_are_differences_of_sequence_log_probabilities(float64):
    batch = ragged()
    x, ref = scores(batch), scores(batch, 1)
    mask = np.asarray(batch.mask)
    want = [
        [oracle.sequence(x, mask, b, g) - oracle.sequence(ref, mask, b, g) for g in (0, 1)]
        for b in range(3)
    ]  # fmt: skip
    got = masked.log_ratios(Scores(x), batch._replace(ref_logps=ref))
    np.testing.assert_allclose(got, want, **EXACT)
    with pytest.raises(ValueError, match="ref_logps is None"):
        masked.log_ratios(Scores(x), batch)


def test_response_mean_is_over_the_true_responses_or_zero(float64):
    x = jnp.array([[1.5, 2.0, 7.0], [jnp.nan, 2.0, -3.0], [5.0, 6.0, jnp.inf]])
    where = jnp.array([[True] * 3, [False, True, True], [False] * 3])
    got = masked.response_mean(x, where)
    np.testing.assert_allclose(got, [3.5, -0.5, 0], **EXACT)


def test_accuracy_counts_ties_as_half():
    got = masked.accuracy(jnp.array([[-2.0, -1e-30], [0.0, 3.0]]))
    np.testing.assert_array_equal(got, [[0, 0], [0.5, 1]])


@pytest.mark.parametrize("mode", masked.MODES)
def test_reduced_tokens_have_the_named_mean_over_prompts(mode, float64):
    batch = ragged()
    x = scores(batch)
    got = np.asarray(masked.reduce_tokens(x, batch, mode))
    keep = np.asarray(masked.prompts(batch))
    mask, valid = np.asarray(batch.mask), np.asarray(batch.valid)
    want = -oracle.sft(x, mask, valid, mode)
    # weights are float32
    assert got[keep].mean() == pytest.approx(want, rel=1e-6)
    assert (got[~keep] == 0).all()


def test_reduced_tokens_use_the_weights_of_the_whole_step(float64):
    batch, weights = ragged(), jnp.full((3, 2, 5), 0.25)
    x = scores(batch)
    got = masked.reduce_tokens(
        x, batch._replace(extra={"token_weights": weights}), "token"
    )
    want = [0.25 * sum(float(v) for v in np.ravel(row)) for row in x]
    np.testing.assert_allclose(got, want, **EXACT)


def test_forget_and_retain_rows_have_their_own_losses_and_metrics(float64):
    feedback = np.array([[0, 1, 0.5, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0.6]])
    valid = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
    batch = Batch(
        jnp.zeros((4, 4, 3), jnp.int32), jnp.ones((4, 4, 3), bool),
        jnp.full((4, 4), 3), jnp.asarray(feedback), jnp.asarray(valid),
    )  # fmt: skip
    a, b, c, d = np.random.default_rng(0).normal(size=(4, 4, 4))
    value, metrics = masked.forget_retain(
        batch, jnp.asarray(a), jnp.asarray(b),
        forget={"of_forget": jnp.asarray(c)},
        retain={"of_retain": jnp.asarray(d), "again": jnp.asarray(c)},
    )  # fmt: skip
    assert list(metrics) == ["of_forget", "of_retain", "again"]
    for p in range(4):
        own = [g for g in range(4) if valid[p, g]]
        forget = [g for g in own if feedback[p, g] <= 0.5]
        retain = [g for g in own if feedback[p, g] > 0.5]

        def mean(numbers):
            return sum(numbers) / len(numbers) if numbers else 0

        want = mean([a[p, g] for g in forget] + [b[p, g] for g in retain])
        assert float(value[p]) == pytest.approx(want, abs=1e-13)
        for name, x, rows in (
            ("of_forget", c, forget), ("of_retain", d, retain), ("again", c, retain),
        ):  # fmt: skip
            want = mean([x[p, g] for g in rows])
            assert float(metrics[name][p]) == pytest.approx(want, abs=1e-13)


def test_a_reverse_scan_starts_at_the_last_token(float64):
    """Discounted sums from each token on: y_t = x_t + 0.5 y_{t+1} where kept."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    keep = np.random.default_rng(1).random(x.shape) < 0.7

    def back(after, at):
        value, k = at
        total = jnp.where(k, value + 0.5 * after, after)
        return total, total

    start = jnp.full((2, 3), 10.0)
    got = masked.reverse_scan(back, start, (jnp.asarray(x), jnp.asarray(keep)))
    want = np.zeros_like(x)
    for b, g in np.ndindex(2, 3):
        after = 10.0
        for t in reversed(range(4)):
            after = x[b, g, t] + 0.5 * after if keep[b, g, t] else after
            want[b, g, t] = after
    np.testing.assert_allclose(got, want, **EXACT)
