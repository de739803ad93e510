"""What holds for every batch: padding, order and invalid rows do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax import logprob, masked, plugin
from alignax.batch import Batch, check, from_groups

B, G, T, V = 4, 2, 10, 37
few = settings(max_examples=12, deadline=None, derandomize=True)

ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=T // 2)
groups = st.tuples(ids, st.lists(ids, min_size=G, max_size=G))
valids = st.lists(st.booleans(), min_size=B * G, max_size=B * G)


@st.composite
def batches(draw) -> Batch:
    rows = draw(st.lists(groups, min_size=B, max_size=B))
    batch = from_groups([p for p, _ in rows], [r for _, r in rows], length=T)
    valid = np.array(draw(valids)).reshape(B, G)
    return jax.tree.map(jnp.asarray, batch._replace(valid=valid))


@pytest.fixture(scope="module", params=["sft", "dpo"])
def objective(request, tiny_config, make_lm):
    """jitted batch -> (logps, values [B], their mean over prompts that count)."""
    lm, ref = make_lm(tiny_config), make_lm(tiny_config, 1)
    loss = plugin.load("losses", request.param)

    @jax.jit
    def run(batch):
        policy = logprob.score(lm, batch)
        batch = batch._replace(ref_logps=logprob.score(ref, batch).logps)
        values, _ = loss(policy, batch)
        keep = masked.prompts(batch)
        mean = jnp.where(keep, values, 0).sum() / jnp.maximum(keep.sum(), 1)
        return policy.logps, values, mean

    return lambda batch: [np.asarray(x) for x in run(batch)]


@few
@given(batch=batches())
def test_batches_are_sound_and_scores_are_log_probabilities(objective, batch):
    check(batch)
    logps, _, _ = objective(batch)
    mask = np.asarray(batch.mask)
    assert (logps[mask] < 0).all()
    assert (logps[~mask] == 0).all()


@few
@given(batch=batches(), fill=st.integers(0, V - 1))
def test_more_padding_changes_nothing(objective, batch, fill):
    pad = ((0, 0), (0, 0), (0, 4))
    longer = batch._replace(
        tokens=jnp.pad(batch.tokens, pad, constant_values=fill),
        mask=jnp.pad(batch.mask, pad),
    )
    want, got = objective(batch), objective(longer)
    np.testing.assert_allclose(got[0][..., :T], want[0], atol=1e-5)
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@few
@given(batch=batches(), order=st.permutations(range(B)))
def test_the_order_of_prompts_changes_nothing(objective, batch, order):
    order = np.array(order)
    want = objective(batch)
    got = objective(jax.tree.map(lambda x: x[order], batch))
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(a, b[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-5)


@few
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_what_stands_in_an_invalid_row_changes_nothing(objective, batch, seed):
    rng = np.random.default_rng(seed)
    junk = jnp.asarray(rng.integers(0, V, (B, G, T)), batch.tokens.dtype)
    keep = batch.valid[..., None]
    changed = batch._replace(
        tokens=jnp.where(keep, batch.tokens, junk),
        mask=jnp.where(keep, batch.mask, jnp.asarray(rng.random((B, G, T)) < 0.5)),
        feedback=jnp.where(batch.valid, batch.feedback, 1e6),
    )
    want, got = objective(batch), objective(changed)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-5)


@few
@given(batch=batches())
def test_ids_beyond_the_length_change_nothing(objective, batch):
    beyond = np.arange(T) >= np.asarray(batch.lengths)[..., None]
    junk = batch._replace(tokens=jnp.where(beyond, 36, batch.tokens))
    for a, b in zip(objective(junk), objective(batch), strict=True):
        np.testing.assert_array_equal(a, b)
