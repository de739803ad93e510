"""Parameters in bfloat16 learn as those in float32 do, on every mesh and after a resume."""

import dataclasses
import fractions
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from alignax import plugin
from alignax.batch import LM
from alignax.models import transformer
from alignax.models.sharding import make_mesh, put_batch, put_params
from alignax.runs import checkpoint
from alignax.training import checks, loop, optim, step
from alignax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow

ONE = make_mesh((1, 1, 1))


def narrow(params):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)


def neighbours(x: float) -> tuple[float, float]:
    """The bfloat16 values below and above x, by float64 arithmetic: 8 bits of precision."""
    ulp = 2.0 ** (np.floor(np.log2(abs(x))) - 7)
    low = np.floor(x / ulp) * ulp
    return low, low + ulp


@pytest.mark.parametrize("x", [1.0007, -3.1415927, 2.5e-7, 1.0078125 - 1e-6, 6.1e20])
def test_the_mean_of_what_is_rounded_is_the_value(x):
    many = 40_000
    got = optim.stochastic(jnp.full(many, x, jnp.float32), jax.random.key(3))
    low, high = neighbours(float(np.float32(x)))
    assert {*np.asarray(got, np.float64)} <= {low, high}
    up = np.mean(np.asarray(got, np.float64) == high)
    share = (float(np.float32(x)) - low) / (high - low)
    assert abs(up - share) < 4.5 * np.sqrt(share * (1 - share) / many) + 2**-16


def test_what_bfloat16_has_stays_as_it_is():
    values = np.float32([0.0, -0.0, 1.0, -1.5, 2.0**-126, np.inf, -np.inf, 3.0e38])
    values = np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)
    for seed in range(20):
        got = optim.stochastic(jnp.asarray(values), jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(got, np.float32), values)
    bits = np.uint32(
        [0x7FC00000, 0xFFFFFFFF, 0x7F800001]
    )  # the second has no carry left
    got = optim.stochastic(jnp.asarray(bits.view(np.float32)), jax.random.key(0))
    assert np.isnan(np.asarray(got, np.float32)).all()


def test_elements_and_steps_are_rounded_independently():
    x = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    change = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-8), x)  # half the distance
    up = [
        np.asarray(leaf, np.float64) > 1
        for at in (0, 1)
        for leaf in jax.tree.leaves(optim.moved(x, change, jnp.int32(at)))
    ]
    for i, one in enumerate(up):
        assert abs(one.mean() - 0.5) < 0.04
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.07
        for other in up[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.07


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_the_state_of_an_optimiser(tiny_config, name):
    """First moments as the parameters, all else float32: 2 bytes more than all bfloat16.

    Lion's only moment has b2 = .99: too slow for 8 bits of precision.
    """
    params = jax.eval_shape(
        lambda: narrow(transformer.init(tiny_config, jax.random.key(0)))
    )
    state = jax.eval_shape(optim.make_tx(1e-3, name=name).init, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        where = jax.tree_util.keystr(path)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            first = ".mu" in where and name != "lion"
            want = jnp.bfloat16 if first else jnp.float32
            assert leaf.dtype == want, where
    if name == "adamw":
        sizes = [
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t) if x.ndim)
            for t in (params, state)
        ]
        assert sizes[1] == 3 * sizes[0]


def test_a_second_moment_falls_with_the_gradient():
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    tx = optim.make_tx(1e-3, clip=0.0)
    state, exact = tx.init(params), fractions.Fraction(0)
    update = jax.jit(tx.update)
    for i in range(300):
        g = 1.0 if i < 100 else 0.0
        _, state = update({"w": jnp.full(8, g, jnp.bfloat16)}, state, params)
        exact = exact * fractions.Fraction(999, 1000) + fractions.Fraction(int(g), 1000)
    nu = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if ".nu" in jax.tree_util.keystr(path)
    ]  # fmt: skip
    np.testing.assert_allclose(nu[0], float(exact), rtol=1e-4)


@pytest.mark.parametrize("name, rate", [("adamw", 1e-6), ("lion", 1e-5)])
def test_dpo_learns_as_in_float32(tiny_config, make_batch, monkeypatch, name, rate):
    """The same loss after 100 steps, where the nearest values hardly move."""
    config = dataclasses.replace(tiny_config, width=48, num_layers=3, mlp_width=96)
    start = narrow(transformer.init(config, jax.random.key(1)))
    start = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    lms = {"ref": LM(config, put_params(start, ONE))}
    batch = put_batch(make_batch(4, 2, 16), ONE)
    loss = plugin.load("losses", "dpo", {"beta": 0.1})

    def learned(cast):
        tx = optim.make_tx(rate, name=name)
        train = make_train_step(config, tx, loss, ONE)
        state = init_state(cast(start), tx, ONE)
        for _ in range(100):
            state, metrics = train(state, lms, batch)
        return np.log(2) - float(metrics["loss"])

    want = learned(lambda x: x)
    assert learned(narrow) == pytest.approx(want, rel=0.07)
    monkeypatch.setattr(step, "moved", lambda p, u, _: optax.apply_updates(p, u))
    assert learned(narrow) < (0.1 if rate < 1e-5 else 0.5) * want


def test_a_step_is_the_same_on_every_mesh(tiny_config, make_lm, make_batch):
    """Which way a value goes depends on its place and the step, not on the device."""
    params = narrow(make_lm(tiny_config).params)
    tx, found = optim.make_tx(3e-3), []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(shape)
        train = make_train_step(
            tiny_config, tx, plugin.load("losses", "sft"), mesh, accumulate=2
        )
        state = init_state(params, tx, mesh)
        state, _ = train(state, {}, put_batch(make_batch(8, 1, 12), mesh))
        found.append(jax.device_get(state.params))
    one, other = (
        np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(f)])
        for f in found
    )
    before = np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(params)])
    assert (one != before).mean() > 0.3
    assert (one != other).mean() < 0.01  # where sums in another order cross a value


def test_micro_batches_are_added_up_in_float32(tiny_config, make_lm, make_batch):
    """256 equal gradients: a sum in bfloat16 stops at half of them."""
    params = narrow(make_lm(tiny_config).params)
    one = make_batch(1, 1, 12)
    many = jax.tree.map(lambda x: np.repeat(np.asarray(x), 512, 0), one)
    norms = []
    for batch, accumulate in ((one, 1), (many, 512)):
        tx = optax.sgd(0.0)
        train = make_train_step(
            tiny_config, tx, plugin.load("losses", "sft"), ONE, accumulate=accumulate
        )
        _, metrics = train(init_state(params, tx, ONE), {}, put_batch(batch, ONE))
        norms.append(float(metrics["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_the_gradient_of_an_embedding_is_added_up_in_float32():
    table = jnp.ones((3, 4), jnp.bfloat16)
    ids = jnp.zeros((1, 1000), jnp.int32).at[0, 0].set(2)
    got = jax.grad(lambda t: transformer.look_up(t, ids).astype(jnp.float32).sum())(table)  # fmt: skip
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got[:, 0]), [999, 0, 1], rtol=2**-8)


def test_an_average_moves_in_float32(tiny_config, make_lm, make_batch):
    params = narrow(make_lm(tiny_config).params)
    tx = optim.make_tx(1e-3)
    train = make_train_step(
        tiny_config, tx, plugin.load("losses", "sft"), ONE, average=0.999
    )
    state = init_state(params, tx, ONE, average=True)
    exact = [np.float64(x) for x in jax.tree.leaves(params)]
    for i in range(20):
        state, _ = train(state, {}, put_batch(make_batch(4, 1, 12, i), ONE))
        exact = [
            0.999 * a + 0.001 * np.float64(x)
            for a, x in zip(exact, jax.tree.leaves(state.params), strict=True)
        ]
    for got, want in zip(jax.tree.leaves(state.average), exact, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=5e-6, atol=1e-6)


CHANGES = {"model.param_dtype": "bfloat16", "num_steps": 4, "checkpoint.every": 2, "average": 0.9, "optim.schedule_steps": 4}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(workdir, state) of the first two steps of a run of four."""
    config = tiny.config("pairs", **CHANGES | {"num_steps": 2})
    workdir = tmp_path_factory.mktemp("begun") / "run"
    return workdir, loop.train(config, str(workdir))


def test_a_run_goes_on_to_the_bit(begun, tmp_path):
    whole = loop.train(tiny.config("pairs", **CHANGES), str(tmp_path / "whole"))
    shutil.copytree(begun[0], tmp_path / "run")
    state = loop.train(tiny.config("pairs", **CHANGES), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_a_run_of_an_earlier_version_goes_on(begun, tmp_path):
    """Its second moments and its average were bfloat16: they become float32."""
    workdir, state = begun
    shutil.copytree(workdir, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    with checkpoint.manager(folder, keep=1) as manager:
        _, meta = checkpoint.restore(manager, state)
    old = state._replace(
        step=state.step + 1, opt_state=jax.tree.map(shorter, state.opt_state),
        average=narrow(state.average),
    )  # fmt: skip
    lm = checkpoint.load_lm(tmp_path / "run")
    with checkpoint.manager(folder, keep=1) as manager:
        own = {k: v for k, v in meta.items() if k not in ("shapes", "checksum")}
        checkpoint.save(manager, old, model=lm.config, meta=own)
        manager.wait_until_finished()
        got, _ = checkpoint.restore(manager, state)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(np.float32(x), np.float32(y))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
    average = checkpoint.load_lm(tmp_path / "run", average=True).params
    jax.tree.map(np.testing.assert_array_equal, average, jax.device_get(old.average))


def shorter(x):
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 and x.ndim else x


@pytest.mark.parametrize("key", ["dtype", "param_dtype"])
@pytest.mark.parametrize("value", ["float16", "bf16", "float8_e4m3fn", ""])
def test_another_dtype_is_refused(key, value):
    config = tiny.config("pairs", **{f"model.{key}": value})
    with pytest.raises(
        ValueError, match=rf"model\.{key} is '{value}', expected one of"
    ):
        checks.check(config)
