"""One device equals every mesh: values, gradients, and three steps of training."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import logprob, plugin
from alignax.batch import LM
from alignax.models import sharding
from alignax.models.sharding import make_mesh
from alignax.training import optim
from alignax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)]
CASES = {
    "tied": dict(vocab_size=40, value_head=True),
    "untied-ragged": dict(vocab_size=37, num_heads=3, num_kv_heads=1, tied=False),
    "tied-ragged": dict(vocab_size=37, num_heads=3, num_kv_heads=3),
    "untied": dict(vocab_size=40, tied=False, final_softcap=3.0),
    "odd-width": dict(vocab_size=40, width=15, tied=False),
    "biases": dict(vocab_size=40, qkv_bias=True, o_bias=True, mlp_bias=True),
    "olmo2": dict(
        vocab_size=40,
        pre_norms=False,
        post_norms=True,
        qk_norm=True,
        qk_norm_whole=True,
    ),
    "no-rope": dict(vocab_size=40, rope_layers=(True, False)),
    "frozen-wider": dict(vocab_size=40),
    "frozen-narrower": dict(vocab_size=40, tied=False),
}  # ragged: neither vocabulary nor heads divide over 'model'
FROZEN = {"frozen-wider": 44, "frozen-narrower": 37}  # its vocabulary, if it is another
PAIRS = [(name, shape) for name in CASES for shape in MESHES
         if name == "untied-ragged" or shape == (2, 2, 2)]  # fmt: skip
PAIRS.append(("tied", (1, 8, 1)))


def close(got, want, tolerance):
    """Float32 sums in another order, relative to each leaf's largest entry."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            a, b, atol=tolerance * np.abs(b).max() + 1e-7, err_msg=str(path)
        )


def frozen(name, config):
    """The config of the LM that this one is compared with."""
    size = FROZEN.get(name, config.vocab_size)
    return dataclasses.replace(config, vocab_size=size)


def scored(config, other, mesh, **how):
    """jitted (params, frozen, batch, cotangent) -> (scores, gradient of their sum with it)."""
    needs = logprob.READ + (("values",) if config.value_head else ())

    @jax.jit
    def run(params, frozen, batch, cotangent):
        def total(params):
            scores = logprob.score(
                LM(config, params), batch, needs=needs, kl_to=LM(other, frozen),
                mesh=mesh, tiles=(16, 8), **how,
            )  # fmt: skip
            # Powers, so that no two fields have gradients that cancel.
            fields = [x for x in scores if x is not None]
            total = sum(x * cotangent ** (i + 1) for i, x in enumerate(fields))
            return total.sum(), scores

        (_, scores), grads = jax.value_and_grad(total, has_aux=True)(params)
        return scores, grads

    return run


@pytest.fixture(scope="module")
def on_one_device(tiny_config, make_lm, make_batch):
    """name -> (lms, (batch, cotangent), scores, gradients), each worked out once."""

    @functools.cache
    def run(name):
        config = dataclasses.replace(tiny_config, **CASES[name])
        lms = [make_lm(config), make_lm(frozen(name, config), 1)]
        ids = min(lm.config.vocab_size for lm in lms)
        batch = make_batch(8, 2, 12, vocab=ids)
        batch = batch._replace(
            mask=batch.mask.at[0].set(False)
        )  # shards differ in work
        cotangent = np.random.default_rng(0).normal(size=batch.mask.shape)
        rows = batch, jnp.asarray(cotangent, jnp.float32)
        run = scored(*[lm.config for lm in lms], None)
        return lms, rows, *run(*[lm.params for lm in lms], *rows)

    return run


@pytest.mark.parametrize(
    "name, shape",
    PAIRS,
    ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)),
)
def test_kernel_on_a_mesh_is_the_kernel_on_one_device(name, shape, on_one_device):
    lms, rows, want_scores, want_grads = on_one_device(name)
    mesh, batch = make_mesh(shape), rows[0]
    params = [sharding.put_params(lm.params, mesh) for lm in lms]
    run = scored(*[lm.config for lm in lms], mesh)
    scores, grads = run(*params, *sharding.put_batch(rows, mesh))
    close(scores, want_scores, 1e-5)
    close(grads, want_grads, 1e-5)
    assert (np.asarray(scores.logps)[~np.asarray(batch.mask)] == 0).all()


def test_a_temperature_on_a_mesh_is_that_on_one_device(
    tiny_config, make_lm, make_batch
):
    config = dataclasses.replace(tiny_config, final_softcap=3.0)
    lms, batch = [make_lm(config, seed) for seed in (0, 1)], make_batch(8, 2, 12)
    cotangent = np.random.default_rng(0).normal(size=batch.mask.shape)
    rows = batch, jnp.asarray(cotangent, jnp.float32)
    want = scored(config, config, None, temperature=0.7)(
        *[lm.params for lm in lms], *rows
    )
    mesh = make_mesh((2, 2, 2))
    params = [sharding.put_params(lm.params, mesh) for lm in lms]
    run = scored(config, config, mesh, temperature=0.7)
    for got, expected in zip(
        run(*params, *sharding.put_batch(rows, mesh)), want, strict=True
    ):
        close(got, expected, 1e-5)


def three_steps(config, make_lm, make_batch, mesh):
    tx = optim.make_tx(1e-2, clip=1.0, weight_decay=0.1)
    step = make_train_step(config, tx, plugin.load("losses", "dpo"), mesh)
    state = init_state(make_lm(config).params, tx, mesh)
    lms = {"ref": LM(config, sharding.put_params(make_lm(config, 1).params, mesh))}
    log = []
    for seed in range(3):
        batch = make_batch(8, 2, 12, seed, vocab=config.vocab_size)
        state, metrics = step(state, lms, sharding.put_batch(batch, mesh))
        log.append(jax.device_get(metrics))
    assert step.compilations(state) <= 1, "the same shapes compiled again"
    return state, log


@pytest.fixture(scope="module")
def trained(tiny_config, make_lm, make_batch):
    config = dataclasses.replace(tiny_config, **CASES["untied-ragged"])
    state, log = three_steps(config, make_lm, make_batch, make_mesh((1, 1, 1)))
    return config, jax.device_get(state.params), log


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_three_dpo_steps_agree_with_one_device(trained, shape, make_lm, make_batch):
    config, want, want_log = trained
    state, log = three_steps(config, make_lm, make_batch, make_mesh(shape))
    for got, expected in zip(log, want_log, strict=True):
        assert got.keys() == expected.keys()
        for name in got:
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    # Adam divides by the gradient's own size: noise of 1e-6 moves a step of 1e-2
    close(jax.device_get(state.params), want, 1e-4)
    moved = make_lm(config).params
    assert all(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(moved), strict=True)
    )


def two_steps(loss, config, make_lm, make_batch, shape, accumulate):
    """(metrics of two steps, parameters, running means) of a loss on labelled pairs."""
    mesh, tx = make_mesh(shape), optim.make_tx(1e-2)
    step = make_train_step(config, tx, loss, mesh, accumulate=accumulate)
    state = init_state(make_lm(config).params, tx, mesh, ema=loss.ema)
    lms = {"ref": LM(config, sharding.put_params(make_lm(config, 1).params, mesh))}
    log = []
    for seed in range(2):
        batch = make_batch(8, 2, 12, seed, vocab=config.vocab_size)
        # labels that neither a shard nor a micro-batch has an equal share of
        labels = jnp.zeros((8, 2)).at[:3].set(1.0).at[6, 0].set(1.0)
        valid = batch.valid.at[5, 1].set(False)
        batch = batch._replace(feedback=labels, valid=valid)
        state, metrics = step(state, lms, sharding.put_batch(batch, mesh))
        log.append(jax.device_get(metrics))
    return log, *jax.device_get((state.params, state.ema))


COUPLED = [n for n in plugin.available("losses") if plugin.load("losses", n).coupled]


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_prompts_see_the_whole_step(
    name, tiny_config, make_lm, make_batch
):
    """Where it is split over a mesh and, on each device, into micro-batches."""
    loss = plugin.load("losses", name)
    args = (loss, tiny_config, make_lm, make_batch)
    want_log, want, want_ema = two_steps(*args, (1, 1, 1), 1)
    log, params, ema = two_steps(*args, (2, 1, 1), 2)
    for got, expected in zip(log, want_log, strict=True):
        for key in got:
            assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    close(params, want, 2e-4)
    close(ema, want_ema, 1e-4)


def test_the_losses_that_need_a_global_view_say_so():
    assert {"kto", "bco", "aot", "aot_unpaired"} <= set(COUPLED)


def test_parameters_and_optimiser_state_are_split_by_the_same_rules(tiny_lm):
    mesh = make_mesh((2, 2, 2))
    state = init_state(tiny_lm.params, optim.make_tx(1e-3), mesh, average=True)
    kernel = P(None, "fsdp", "model", None)
    assert state.params["blocks"]["attn"]["q"]["kernel"].sharding.spec == kernel
    assert state.average["blocks"]["attn"]["q"]["kernel"].sharding.spec == kernel
    found = {
        sharding.path_string(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    moments = [s for p, s in found.items() if p.endswith("blocks/attn/q/kernel")]
    assert moments == [kernel, kernel]  # Adam's two


def test_a_path_without_a_rule_is_an_error_that_names_it():
    tree = {"blocks": {"attn": {"gate_proj": np.zeros((4, 4))}}}
    with pytest.raises(ValueError, match=r"'blocks/attn/gate_proj'.*PARAM_RULES"):
        sharding.shardings(tree, make_mesh((1, 1, 1)))


def test_the_first_rule_wins():
    rules = ((r"q/", P("fsdp")), (r"kernel", P("model")))
    mesh = make_mesh((1, 2, 2))
    assert sharding.spec("q/kernel", (4,), mesh, rules) == P("fsdp")
    assert sharding.spec("k/kernel", (4,), mesh, rules) == P("model")


def test_an_axis_that_does_not_divide_is_replicated_and_logged(caplog):
    mesh = make_mesh((1, 2, 2))
    with caplog.at_level(logging.INFO, "alignax.models.sharding"):
        got = sharding.spec("blocks/attn/q/kernel", (2, 16, 9, 6), mesh)
    assert got == P(None, "fsdp", None, None)
    assert "blocks/attn/q/kernel: 9 does not divide over model=2" in caplog.text


def test_batches_are_split_over_prompts_never_within_a_group(make_batch, mesh):
    batch = sharding.put_batch(make_batch(8, 2, 12), mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for x in jax.tree.leaves(batch):
        assert x.sharding.spec == P(("data", "fsdp"))
        assert x.addressable_shards[0].data.shape == (8 // shards, *x.shape[1:])


def test_a_batch_that_the_mesh_does_not_divide_is_an_error(make_batch, tiny_lm):
    mesh = make_mesh((2, 2, 2))
    with pytest.raises(ValueError, match=r"12 rows do not divide .*=8 shards"):
        jax.eval_shape(
            lambda b: logprob.score(tiny_lm, b, mesh=make_mesh((4, 2, 1))),
            make_batch(6, 2, 12),
        )
    with pytest.raises(ValueError):
        sharding.put_batch(make_batch(6, 2, 12), mesh)
    with pytest.raises(ValueError, match=r"batch_size=12.*multiple of 8"):
        sharding.check_batch_size(12, 2, mesh)
    sharding.check_batch_size(16, 2, mesh)


def test_put_params_is_a_copy(tiny_lm):
    mesh = make_mesh((1, 1, 1))
    once = sharding.put_params(tiny_lm.params, mesh)
    twice = sharding.put_params(once, mesh)
    jax.tree.map(lambda x: x.delete(), twice)
    assert not any(x.is_deleted() for x in jax.tree.leaves(once))


def test_a_mesh_takes_what_is_left():
    assert make_mesh((1, -1, 2)).shape == {"data": 1, "fsdp": 4, "model": 2}
    assert make_mesh((2, 1, 1)).size == 2


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 2), "three sizes"),
        ((-1, -1, 1), "one may be -1"),
        ((0, 1, 1), "three sizes"),
        ((3, -1, 1), "3 does not divide 8"),
        ((4, 4, 1), "needs 16 devices, there are 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_another_shape_compiles_once_more(tiny_lm, make_batch):
    mesh = make_mesh((1, 1, 1))
    tx = optim.make_tx(1e-3)
    step = make_train_step(tiny_lm.config, tx, plugin.load("losses", "sft"), mesh)
    state = init_state(tiny_lm.params, tx, mesh)
    for t in (12, 12, 16, 12):
        state, _ = step(state, {}, sharding.put_batch(make_batch(4, 1, t), mesh))
    assert step.compilations(state) <= 2


def test_the_state_keeps_its_shardings(tiny_lm, make_batch):
    mesh = make_mesh((2, 2, 2))
    tx = optim.make_tx(1e-3)
    step = make_train_step(tiny_lm.config, tx, plugin.load("losses", "sft"), mesh)
    state = init_state(tiny_lm.params, tx, mesh)
    want = jax.tree.map(lambda x: x.sharding, state)
    state, _ = step(state, {}, sharding.put_batch(make_batch(4, 1, 12), mesh))
    got = jax.tree.map(lambda x: x.sharding, state)
    same = jax.tree.map(
        lambda a, b, x: isinstance(a, NamedSharding) and a.is_equivalent_to(b, x.ndim),
        got, want, state,
    )  # fmt: skip
    assert all(jax.tree.leaves(same))
