"""Schedules by hand, which parameters decay, and one step of each optimiser."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from alignax import plugin
from alignax.batch import LM
from alignax.models import lora, transformer
from alignax.models.sharding import make_mesh, path_string, put_batch
from alignax.runs import workdirs
from alignax.training import checks, optim
from alignax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow


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
    with pytest.raises(ValueError, match="unknown optimiser 'adam'; known: adamw, lion, adafactor, muon"):  # fmt: skip
        optim.make_tx(1e-3, name="adam")


@pytest.mark.parametrize("extra", [{}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": True, "value_head": True, "tied": False}])  # fmt: skip
def test_norms_and_biases_are_not_decayed_and_all_else_is(tiny_config, extra):
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
    for name in ("adamw", "lion", "adafactor", "muon"):
        rate = optim.schedule(0.05, 400, kind="linear", final=0.0)
        tx = optim.make_tx(rate, name=name)
        params = PARAMS
        state = tx.init(params)
        for _ in range(400):
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


def test_the_second_decay_is_the_optimisers_own_unless_it_is_given():
    """Lion keeps a hundredth of the gradient, as its authors and optax have it."""
    grads = jax.tree.map(lambda x: x * 0 + 1.0, PARAMS)

    def kept(**more):
        tx = optim.make_tx(0.1, name="lion", clip=0.0, **more)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        with_mu = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
        mu = next(s.mu for s in with_mu if hasattr(s, "mu"))
        return float(mu["w"]["kernel"][0])

    assert kept() == pytest.approx(0.01)
    assert kept(b2=0.98) == pytest.approx(0.02)
    found = []
    for b2 in (0.0, 0.999):
        tx = optim.make_tx(0.1, b2=b2)
        found.append(tx.update(grads, tx.init(PARAMS), PARAMS))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_run_that_named_the_optimisers_own_decay_goes_on(tmp_path):
    saved = tiny.config()
    saved.optim.b2 = 0.999  # the default until 2026-12
    workdirs.prepare(str(tmp_path), saved)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)  # so the folder is this run's
    workdirs.check_owner(str(tmp_path), tiny.config())
    lion = tiny.config(**{"optim.name": "lion"})
    saved.optim.name = "lion"  # whose own is another
    workdirs.prepare(str(tmp_path), saved)
    with pytest.raises(ValueError, match=r"optim\.b2 \(0\.999 there, 0\.99 here\)"):
        workdirs.check_owner(str(tmp_path), lion)


def test_adafactor_bounds_an_update_as_its_authors_do():
    """After small gradients a large one would move a matrix by many times the rate."""
    params = {"w": {"kernel": jnp.ones((4, 4))}}
    tx = optim.make_tx(0.1, name="adafactor", clip=0.0)
    state = tx.init(params)
    for scale in (*[1e-3] * 20, 1.0):
        grads = jax.tree.map(lambda x, s=scale: x * s, params)
        updates, state = tx.update(grads, state, params)
    rms = float(jnp.sqrt((updates["w"]["kernel"] ** 2).mean()))
    assert rms == pytest.approx(0.1, rel=1e-3)
    plain = optax.chain(
        optax.identity(),
        optax.chain(
            optax.scale_by_factored_rms(), optax.add_decayed_weights(0.0, optim.decayed),
            optax.scale_by_learning_rate(0.1),
        ),
    )  # fmt: skip
    # a checkpoint from before has the same leaves in the same places
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(tx.init(params))


def singular(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize("rank", [0, 2])
def test_muon_orthogonalises_the_matrices_of_the_blocks_and_nothing_else(
    tiny_config, rank
):
    config = dataclasses.replace(
        tiny_config, value_head=True, tied=False, qkv_bias=True
    )
    params = transformer.init(config, jax.random.key(0))
    if rank:
        params = lora.init(LM(config, params), lora.Lora(rank), jax.random.key(0))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    tx = optim.make_tx(0.1, name="muon", clip=0.0)
    adam = optax.adamw(0.1, nesterov=True, weight_decay=0.0)
    got = tx.update(grads, tx.init(params), params)[0]
    want = adam.update(grads, adam.init(params), params)[0]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = path_string(path)
        if not name.startswith("blocks") or name.endswith(("scale", "bias")):
            np.testing.assert_allclose(x, y, rtol=1e-5, err_msg=name)
            continue
        inside = 2 if name.endswith("b") else -1
        if name.endswith("kernel"):
            inside = -1 if "/o/" in name else 2
        rows = int(np.prod(x.shape[1:inside]))
        for layer in np.asarray(x).reshape(x.shape[0], rows, -1):
            values = singular(layer)
            assert values.max() < 1.7 * values.min(), name
            # of AdamW's size, up to the iteration's accuracy
            assert 0.5 < np.sqrt((layer**2).mean()) / (0.1 * 0.2) < 1.5, name


def test_muon_takes_a_step_on_a_mesh(tiny_config, make_lm, make_batch):
    tx, found = optim.make_tx(1e-2, name="muon"), []
    for shape in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(shape)
        train = make_train_step(tiny_config, tx, plugin.load("losses", "sft"), mesh)
        state = init_state(make_lm(tiny_config).params, tx, mesh)
        for _ in range(2):
            state, _ = train(state, {}, put_batch(make_batch(4, 1, 12), mesh))
        found.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *found)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_the_critics_rate_is_that_of_the_value_head_alone(tiny_config, name):
    config = dataclasses.replace(tiny_config, value_head=True)
    params = transformer.init(config, jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)
    settings = tiny.config(**{"optim.name": name, "optim.lr": 1e-3, "num_steps": 4})
    settings.model.value_head = True

    def first(critic):
        settings.optim.critic_lr = critic
        checks.check_optim(settings)
        tx = optim.from_config(settings)[1]
        return tx.update(grads, tx.init(params), params)[0]

    plain, own = first(0.0), first(5e-2)
    np.testing.assert_allclose(
        own.pop("value_head")["kernel"],
        50 * plain.pop("value_head")["kernel"],
        rtol=1e-5,
    )
    jax.tree.map(np.testing.assert_array_equal, own, plain)
    settings.model.value_head = False
    with pytest.raises(ValueError, match=r"critic_lr is the rate of the value head"):
        first(5e-2)
    with pytest.raises(ValueError, match=r"optim\.critic_lr is -1"):
        settings.optim.critic_lr = -1.0
        checks.check(settings)
