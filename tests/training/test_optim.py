"""Schedules by hand, which parameters decay, and one step of each optimiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.models import transformer
from alignax.models.sharding import path_string
from alignax.training import optim


def rates(num_steps, **kwargs):
    rate = optim.schedule(1.0, num_steps, **kwargs)
    return [float(rate(k)) for k in range(num_steps)]


def test_constant():
    assert rates(3, kind="constant") == [1.0, 1.0, 1.0]


def test_linear_falls_to_its_final_share():
    got = rates(5, kind="linear", final=0.5)
    np.testing.assert_allclose(got, [1, 0.9, 0.8, 0.7, 0.6], rtol=1e-6)


def test_cosine_by_its_formula():
    want = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    np.testing.assert_allclose(rates(8, kind="cosine", final=0.1), want, rtol=1e-6)


def test_warmup_moves_in_its_first_step_and_peaks_once():
    got = rates(8, kind="linear", warmup=4, final=0.0)
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(
        rates(3, kind="constant", warmup=1), [1, 1, 1], rtol=1e-6
    )


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; known: constant, linear, cosine"):  # fmt: skip
        optim.schedule(1.0, 5, kind="cosin")


def test_unknown_optimiser_lists_the_known():
    with pytest.raises(ValueError, match="unknown optimiser 'adam'; known: adamw, lion, adafactor"):  # fmt: skip
        optim.make_tx(1e-3, name="adam")


@pytest.mark.parametrize("extra", [{}, {"qkv_bias": True, "qk_norm": True, "value_head": True, "tied": False}])  # fmt: skip
def test_norms_and_biases_are_not_decayed_and_all_else_is(tiny_config, extra):
    import dataclasses

    config = dataclasses.replace(tiny_config, **extra)
    shapes = jax.eval_shape(
        lambda key: transformer.init(config, key), jax.random.key(0)
    )
    mask = jax.tree_util.tree_leaves_with_path(optim.decayed(shapes))
    names = {path_string(path): value for path, value in mask}
    spared = {name for name, value in names.items() if not value}
    assert spared == {n for n in names if "norm" in n or n.endswith("bias")}
    assert {n.rpartition("/")[2] for n in names if names[n]} <= {
        "embed",
        "kernel",
        "head",
    }
    assert len(spared) >= 3


PARAMS = {"w": {"kernel": jnp.array([2.0, -4.0])}, "norm": {"scale": jnp.array([2.0])}}


def step(grads, **kwargs):
    tx = optim.make_tx(0.1, **kwargs)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return updates["w"]["kernel"].tolist(), updates["norm"]["scale"].tolist()


ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_decay_is_decoupled_and_spares_norms(name):
    kernel, scale = step(ZERO, name=name, weight_decay=0.5)
    np.testing.assert_allclose(kernel, [-0.1, 0.2], rtol=1e-6)  # -lr * decay * w
    assert scale == [0.0]


def test_adafactors_decay_is_scaled_by_the_rate_as_the_others():
    kernel, scale = step(ZERO, name="adafactor", weight_decay=0.5)
    np.testing.assert_allclose(kernel, [-0.1, 0.2], rtol=1e-5)
    assert scale == [0.0]


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_first_step_is_the_rate_times_the_sign(name):
    grads = jax.tree.map(lambda x: jnp.sign(x) * 3.0, PARAMS)
    kernel, scale = step(grads, name=name, clip=0.0)
    np.testing.assert_allclose([*kernel, *scale], [-0.1, 0.1, -0.1], rtol=1e-5)


def test_every_optimiser_goes_downhill():
    for name in ("adamw", "lion", "adafactor"):
        tx = optim.make_tx(0.05, name=name)
        params = PARAMS
        state = tx.init(params)
        for _ in range(100):
            grads = params  # of the sum of squares over two
            updates, state = tx.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(params)) < 0.5, name


def test_clipping_is_by_the_global_norm():
    """Seen through Adam's first moment: (1 - b1) times the clipped gradient."""
    grads = {
        "w": {"kernel": jnp.array([3.0, 0.0])},
        "norm": {"scale": jnp.array([4.0])},
    }

    def moment(clip):
        tx = optim.make_tx(0.1, clip=clip, b1=0.9)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        mu = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")).mu  # fmt: skip
        return [float(mu["w"]["kernel"][0]), float(mu["norm"]["scale"][0])]

    np.testing.assert_allclose(moment(1.0), [0.06, 0.08], rtol=1e-5)  # norm 5 -> 1
    np.testing.assert_allclose(moment(10.0), [0.3, 0.4], rtol=1e-5)
    np.testing.assert_allclose(moment(0.0), [0.3, 0.4], rtol=1e-5)
