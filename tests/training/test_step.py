"""The optimiser step: accumulation, hyper-parameters, running means, references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import losses as oracle

from alignax import logprob, masked, plugin
from alignax.batch import LM
from alignax.models import transformer
from alignax.models.sharding import make_mesh, put_batch, put_params
from alignax.plugin import Bound
from alignax.training.step import EMA_DECAY, init_state, make_train_step

score = jax.jit(logprob.score)


def centred(policy, batch, *, strength: float = 0.5):
    """Couples prompts: each is compared with the mean of the whole step."""
    keep = masked.prompts(batch)
    total = jnp.where(batch.valid, policy.logps.sum(-1), 0).sum(-1)
    baseline = masked.mean(total, keep)
    return strength * (total - baseline) ** 2, {"total": total}


def level(policy, batch, *, ema):
    """Asks for a running mean of log p(y|x), starting at 1."""
    total = policy.logps.sum((1, 2))
    return (total - ema["level"]) ** 2, {
        "ema/level": masked.mean(total, masked.prompts(batch)),
        "seen": jnp.broadcast_to(ema["level"], total.shape),
    }


CENTRED = Bound("centred", centred, {"strength": 0.1}, ("logps",), coupled=True)
LEVEL = Bound("level", level, {}, ("logps",), ema={"level": 1.0})
LOSSES = {
    **{
        f"sft-{mode}": plugin.load("losses", "sft", {"reduction": mode})
        for mode in masked.MODES
    },
    "dpo": plugin.load("losses", "dpo", {"beta": 0.5}),
    "coupled": CENTRED,
}


@pytest.fixture(scope="module")
def lms(tiny_config, make_lm):
    return {"ref": make_lm(tiny_config, 1)}


def start(lm, loss, tx=None, mesh=None, **kwargs):
    """(step, state); plain gradient descent by default, so a step shows its gradient."""
    tx, mesh = tx or optax.sgd(1e-2), mesh or make_mesh((1, 1, 1))
    step = make_train_step(lm.config, tx, loss, mesh, **kwargs)
    average = kwargs.get("average", 0) > 0
    return step, init_state(lm.params, tx, mesh, ema=loss.ema, average=average)


def ragged(make_batch, b=8):
    """Some responses and one whole prompt are not valid."""
    batch = make_batch(b, 2, 12)
    return batch._replace(valid=batch.valid.at[1, 1].set(False).at[2].set(False))


def one_step(lm, loss, lms, batch, **kwargs):
    step, state = start(lm, loss, **kwargs)
    state, metrics = step(state, lms, put_batch(batch, make_mesh((1, 1, 1))))
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.fixture(scope="module")
def whole(tiny_lm, lms, make_batch):
    """The step without accumulation, once for every loss."""

    @functools.cache
    def run(name):
        return one_step(tiny_lm, LOSSES[name], lms, ragged(make_batch))

    return run


@pytest.mark.parametrize(
    "name, accumulate",
    [("sft-token", 4), ("sft-sequence", 2), ("dpo", 8), ("coupled", 4)],
)
def test_micro_batches_equal_one_batch(
    name, accumulate, whole, tiny_lm, lms, make_batch
):
    want, want_metrics = whole(name)
    got, metrics = one_step(
        tiny_lm, LOSSES[name], lms, ragged(make_batch), accumulate=accumulate
    )
    for a, b, before in zip(
        *map(jax.tree.leaves, (got, want, tiny_lm.params)), strict=True
    ):
        moved = np.abs(b - np.asarray(before)).max()
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * moved, rtol=0)
    assert metrics.keys() == want_metrics.keys()
    for key, value in want_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_a_coupled_loss_that_does_not_say_so_would_be_wrong(
    whole, tiny_lm, lms, make_batch
):
    """The control: the test above sees the difference."""
    want, _ = whole("coupled")
    loss = CENTRED._replace(coupled=False)
    got, _ = one_step(tiny_lm, loss, lms, ragged(make_batch), accumulate=2)
    assert np.abs(got["embed"] - want["embed"]).max() > 1e-4


def test_micro_batches_on_a_mesh_equal_one_batch(whole, tiny_lm, lms, make_batch):
    mesh = make_mesh((2, 2, 2))
    want, _ = whole("coupled")
    step, state = start(tiny_lm, CENTRED, mesh=mesh, accumulate=2)
    frozen = {k: LM(v.config, put_params(v.params, mesh)) for k, v in lms.items()}
    state, _ = step(state, frozen, put_batch(ragged(make_batch), mesh))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("mode", masked.MODES)
def test_reported_loss_is_the_named_reduction(mode, whole, tiny_lm, make_batch):
    batch = ragged(make_batch)
    logps = np.asarray(score(tiny_lm, batch).logps)
    want = oracle.sft(logps, np.asarray(batch.mask), np.asarray(batch.valid), mode)
    assert whole(f"sft-{mode}")[1]["loss"] == pytest.approx(want, rel=1e-5)


def test_reported_gradient_norm_is_that_of_the_step(whole, tiny_lm):
    params, metrics = whole("dpo")
    moved = jax.tree.map(lambda a, b: (a - b) / 1e-2, params, tiny_lm.params)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(moved)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_prompts_without_a_valid_response_do_not_count(whole, tiny_lm, lms, make_batch):
    """Metrics and gradient are means over the seven prompts that count."""
    batch = ragged(make_batch)
    keep = np.array([0, 1, 3, 4, 5, 6, 7])
    fewer = jax.tree.map(lambda x: x[keep], batch)
    for name in ("dpo", "sft-token"):
        want, want_metrics = whole(name)
        got, metrics = one_step(tiny_lm, LOSSES[name], lms, fewer)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        for key, value in want_metrics.items():
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_step_without_a_valid_prompt_moves_nothing(tiny_lm, lms, make_batch):
    batch = make_batch(8, 2, 12)
    batch = batch._replace(valid=jnp.zeros_like(batch.valid))
    params, metrics = one_step(tiny_lm, LOSSES["dpo"], lms, batch)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    for a, b in zip(*map(jax.tree.leaves, (params, tiny_lm.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sweep_over_beta_is_one_program(tiny_lm, lms, make_batch):
    mesh, texts, moved = make_mesh((1, 1, 1)), [], []
    batch = put_batch(make_batch(4, 2, 12), mesh)
    for beta in (0.1, 0.5):
        step, state = start(tiny_lm, plugin.load("losses", "dpo", {"beta": beta}))
        texts.append(step.lower(state, lms, batch).as_text())
        moved.append(float(step(state, lms, batch)[1]["margin"]))
    assert texts[0] == texts[1]
    assert moved[1] == pytest.approx(5 * moved[0], rel=1e-5)  # and yet beta acts


def test_a_step_with_other_numbers_is_the_step_of_another_loss(
    tiny_lm, lms, make_batch
):
    batch = put_batch(make_batch(4, 2, 12), make_mesh((1, 1, 1)))
    step, state = start(tiny_lm, LOSSES["dpo"])
    other = step.with_hyper(beta=2.0)
    _, got = other(jax.tree.map(jnp.copy, state), lms, batch)
    _, before = step(state, lms, batch)
    bound = plugin.load("losses", "dpo", {"beta": 2.0})
    step, state = start(tiny_lm, bound)
    _, want = step(state, lms, batch)
    assert got["loss"] == want["loss"] != before["loss"]
    assert other.compilations(state) <= 1
    with pytest.raises(ValueError, match=r"no number \['betta'\]; it has"):
        other.with_hyper(betta=1.0)


def test_a_running_mean_is_handed_in_and_averaged(tiny_lm, make_batch):
    step, state = start(tiny_lm, LEVEL)
    assert float(state.ema["level"]) == 1
    expected = 1.0
    for seed in range(2):
        batch = make_batch(4, 1, 12, seed)
        raw = float(score(LM(tiny_lm.config, state.params), batch).logps.sum() / 4)
        state, metrics = step(state, {}, put_batch(batch, make_mesh((1, 1, 1))))
        assert float(metrics["seen"]) == pytest.approx(expected, rel=1e-5)
        expected = EMA_DECAY * expected + (1 - EMA_DECAY) * raw
        assert float(state.ema["level"]) == pytest.approx(expected, rel=1e-5)


def test_parameters_are_averaged(tiny_lm, lms, make_batch):
    step, state = start(tiny_lm, LOSSES["dpo"], average=0.75)
    batch = put_batch(make_batch(4, 2, 12), make_mesh((1, 1, 1)))
    state, _ = step(state, lms, batch)
    for mean, old, new in zip(
        *map(jax.tree.leaves, (state.average, tiny_lm.params, state.params)),
        strict=True,
    ):
        np.testing.assert_allclose(mean, 0.75 * old + 0.25 * new, atol=1e-6)


def test_an_average_is_updated_every_so_many_steps(tiny_lm, lms, make_batch):
    """As TR-DPO does: in between, the reference stands still."""
    step, state = start(tiny_lm, LOSSES["dpo"], average=0.25, average_every=2)
    means = [jax.device_get(state.average)]
    for seed in range(2):
        state, _ = step(state, lms, make_batch(4, 2, 12, seed))
        means.append(jax.device_get(state.average))
    first, between, after = map(jax.tree.leaves, means)
    for a, b, c, p in zip(
        first, between, after, jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(b, a)
        np.testing.assert_allclose(c, 0.25 * a + 0.75 * p, atol=1e-6)


def test_a_moving_reference_is_the_average_of_the_policy(tiny_lm, make_batch):
    step, state = start(tiny_lm, LOSSES["dpo"], average=0.75, moving=("ref",))
    batch = make_batch(4, 2, 12)
    sent = put_batch(batch, make_mesh((1, 1, 1)))
    state, metrics = step(state, {}, sent)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=1e-5)
    policy, mean = (
        score(LM(tiny_lm.config, p), batch).logps.sum(-1)
        for p in (state.params, state.average)
    )
    state, metrics = step(state, {}, sent)
    want = np.asarray(policy - mean)[:, 0].mean()
    assert abs(want) > 1e-3
    assert float(metrics["log_ratio_chosen"]) == pytest.approx(want, abs=1e-4)


def test_fresh_parameters_compile_one_program(tiny_config, make_batch):
    """Weak types in what `init` draws would be strong after the first step."""
    params = transformer.init(tiny_config, jax.random.key(0))
    assert not any(x.weak_type for x in jax.tree.leaves(params))
    weak = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), params)
    step, state = start(LM(tiny_config, weak), LOSSES["sft-token"])
    batch = put_batch(make_batch(4, 2, 12), make_mesh((1, 1, 1)))
    for _ in range(2):
        state, _ = step(state, {}, batch)
    assert step.compilations(state) <= 1


def test_the_state_is_donated_and_frozen_models_are_not(tiny_lm, lms, make_batch):
    step, state = start(tiny_lm, LOSSES["dpo"])
    step(state, lms, put_batch(make_batch(4, 2, 12), make_mesh((1, 1, 1))))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    frozen = (lms["ref"].params, tiny_lm.params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


def test_frozen_models_are_arguments_not_constants(tiny_lm, lms, make_lm, make_batch):
    """Another reference through the same program gives another loss."""
    step, state = start(tiny_lm, LOSSES["dpo"], tx=optax.sgd(0.0))
    batch = put_batch(make_batch(4, 2, 12), make_mesh((1, 1, 1)))
    state, a = step(state, lms, batch)
    state, b = step(state, {"ref": make_lm(tiny_lm.config, 2)}, batch)
    assert step.compilations(state) <= 1
    assert float(a["loss"]) != float(b["loss"])


def test_a_reference_that_is_missing_is_named(tiny_lm, make_batch):
    step, state = start(tiny_lm, LOSSES["dpo"])
    with pytest.raises(
        ValueError, match="'ref_logps' is needed but there is no LM 'ref'"
    ):
        step(state, {}, put_batch(make_batch(4, 2, 12), make_mesh((1, 1, 1))))


def test_any_function_is_a_loss(tiny_lm, make_batch):
    """No module, no declaration: a reader's own loss in a notebook."""

    def own(policy, batch):
        del batch
        return -policy.logps.sum((1, 2)), {}

    mesh, tx = make_mesh((1, 1, 1)), optax.sgd(1e-3)
    step = make_train_step(tiny_lm.config, tx, own, mesh)
    batch = make_batch(4, 1, 12)
    want = -float(score(tiny_lm, batch).logps.sum()) / 4
    _, metrics = step(init_state(tiny_lm.params, tx, mesh), {}, put_batch(batch, mesh))
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)


# -- reductions and hyper-parameters


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_constant_reduction_divides_by_the_length_of_the_config(
    tiny_lm, make_batch, accumulate
):
    """Not by the T of a bucket, or short rows would weigh more than in another batch."""
    loss = plugin.load("losses", "sft", {"reduction": "constant"})
    batch = make_batch(4, 1, 12)
    widen = lambda x: np.pad(x, [(0, 0), (0, 0), (0, 12)])  # noqa: E731
    wide = batch._replace(tokens=widen(batch.tokens), mask=widen(batch.mask))
    found = {}
    for length in (0, 48):
        for name, given in (("narrow", batch), ("wide", wide)):
            step, state = start(tiny_lm, loss, accumulate=accumulate, length=length)
            metrics = step(state, {}, put_batch(given, make_mesh((1, 1, 1))))[1]
            found[name, length] = float(metrics["loss"])
    assert found["narrow", 48] == pytest.approx(found["wide", 48], rel=1e-5)
    assert found["narrow", 48] == pytest.approx(found["narrow", 0] / 4, rel=1e-5)
    assert found["narrow", 0] == pytest.approx(2 * found["wide", 0], rel=1e-5)


def counting(policy, batch, *, many: int = 2, scale: float = 1.0):
    """A loss with an integer, which picks a shape of arithmetic and not a size."""
    value = -policy.logps.sum((1, 2)) * scale / (many * many)
    return value, {"whole": jnp.full(len(batch.valid), 1.0 * (jnp.asarray(many).dtype == jnp.int32))}  # fmt: skip


def test_other_integers_are_integers(tiny_lm, make_batch):
    batch = put_batch(make_batch(4, 1, 12), make_mesh((1, 1, 1)))
    step, state = start(tiny_lm, plugin.bind(counting))
    first = step(jax.tree.map(jnp.copy, state), {}, batch)[1]
    for three in (3, 3.0):
        other = step.with_hyper(many=three)
        assert other.hyper["many"].dtype == jnp.int32
        got = other(jax.tree.map(jnp.copy, state), {}, batch)[1]
        assert got["whole"] == first["whole"] == 1
        assert float(got["loss"]) == pytest.approx(float(first["loss"]) * 4 / 9)
    assert step.compilations(state) <= 1  # 0: evicted
    assert step.with_hyper(scale=2).hyper["scale"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"integer for many, not 2\.5"):
        step.with_hyper(many=2.5)
