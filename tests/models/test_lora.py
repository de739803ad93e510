"""LoRA: adapters at zero are the base, merged ones are the sum, and only they train."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import build, checkpoint, logprob, optim, plugin, train
from alignax.batch import LM
from alignax.metrics import read
from alignax.models import lora, transformer
from alignax.models.lora import Lora
from alignax.sharding import make_mesh, put_batch, put_params, spec
from alignax.step import init_state, make_train_step

LORA = Lora(rank=3, alpha=6.0)


def random_adapters(lm, settings=LORA, seed=0):
    rng = np.random.default_rng(seed)
    zero = lora.init(lm, settings, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), "float32"), zero
    )


logps = jax.jit(logprob.sequence_logps)


def test_adapters_at_zero_change_no_bit(tiny_lm, make_batch):
    rows = make_batch(2, 2, 12).tokens.reshape(4, 12)
    adapters = lora.init(tiny_lm, LORA, jax.random.key(1))
    adapted = lora.attach(tiny_lm, adapters, LORA)
    np.testing.assert_array_equal(logps(adapted, rows), logps(tiny_lm, rows))
    merged = lora.merge(tiny_lm, adapters, LORA)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tiny_lm), strict=True):
        np.testing.assert_array_equal(a, b)


def test_merged_kernels_are_the_sum_in_float64(tiny_lm):
    adapters = random_adapters(tiny_lm)
    merged = lora.merge(tiny_lm, adapters, LORA).params["blocks"]
    for part, target in (("attn", "q"), ("attn", "o"), ("mlp", "down")):
        ab = adapters["blocks"][part][target]
        a, b = (np.asarray(ab[k], np.float64) for k in "ab")
        kernel = np.asarray(
            tiny_lm.params["blocks"][part][target]["kernel"], np.float64
        )
        for layer in range(len(kernel)):
            product = np.tensordot(a[layer], b[layer], 1)  # over r
            want = kernel[layer] + 6.0 / 3 * product
            np.testing.assert_allclose(
                merged[part][target]["kernel"][layer], want, atol=1e-6
            )


@pytest.mark.parametrize("targets", [("q", "v"), tuple(lora.TARGETS)], ids=len)
def test_the_adapted_model_computes_what_the_merged_one_does(
    tiny_lm, make_batch, targets
):
    settings = Lora(2, 4.0, targets)
    adapters = random_adapters(tiny_lm, settings)
    rows = make_batch(2, 2, 12).tokens.reshape(4, 12)
    adapted = logps(lora.attach(tiny_lm, adapters, settings), rows)
    merged = logps(lora.merge(tiny_lm, adapters, settings), rows)
    np.testing.assert_allclose(adapted, merged, atol=1e-4)  # the order of two products
    assert np.abs(adapted - logps(tiny_lm, rows)).max() > 0.1


def test_scale_is_alpha_over_rank_or_its_root():
    assert Lora(16, 32.0).scale == 2
    assert Lora(16, 32.0, rank_stabilised=True).scale == 8


def test_a_first_dpo_step_starts_at_the_base_and_trains_adapters_alone(
    tiny_lm, make_batch
):
    adapters = lora.init(tiny_lm, LORA, jax.random.key(1))
    tx, mesh = optim.make_tx(1e-2), make_mesh((2, 2, 2))
    lms = {"base": LM(tiny_lm.config, put_params(tiny_lm.params, mesh))}
    lms["ref"] = lms["base"]
    step = make_train_step(
        tiny_lm.config, tx, plugin.load("losses", "dpo"), mesh,
        assemble=lambda params, lms: lora.attach(lms["base"], params, LORA),
    )  # fmt: skip
    state = init_state(adapters, tx, mesh)
    held = [x.size for x in jax.tree.leaves(state.opt_state) if x.size > 1]
    assert sum(held) == 2 * transformer.num_params(adapters)
    batch = put_batch(make_batch(4, 2, 12), mesh)
    before = jax.device_get(lms["base"].params)
    losses = []
    for _ in range(3):
        state, metrics = step(state, lms, batch)
        losses.append(float(metrics["loss"]))
        if len(losses) == 1:
            assert float(metrics["log_ratio_chosen"]) == 0
            assert float(metrics["log_ratio_rejected"]) == 0
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[2] < losses[0] - 0.01
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(lms["base"].params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_gradients_of_adapters_are_those_of_the_merged_kernel(tiny_lm, make_batch):
    """dL/dB = s A' dL/dW: the chain rule through W + s A B."""
    rows = make_batch(2, 1, 10).tokens.reshape(2, 10)
    adapters = random_adapters(tiny_lm)

    def through_adapters(adapters):
        return logprob.sequence_logps(lora.attach(tiny_lm, adapters, LORA), rows).sum()

    def through_kernel(params):
        return logprob.sequence_logps(LM(tiny_lm.config, params), rows).sum()

    got = jax.jit(jax.grad(through_adapters))(adapters)["blocks"]["mlp"]["up"]
    merged = lora.merge(tiny_lm, adapters, LORA).params
    dw = jax.jit(jax.grad(through_kernel))(merged)["blocks"]["mlp"]["up"]["kernel"]
    a, b = (adapters["blocks"]["mlp"]["up"][k] for k in "ab")
    want_b = LORA.scale * jnp.einsum("ldr,ldf->lrf", a, dw)
    want_a = LORA.scale * jnp.einsum("ldf,lrf->ldr", dw, b)
    scale = float(jnp.abs(want_b).max())
    np.testing.assert_allclose(got["b"], want_b, atol=1e-3 * scale)
    np.testing.assert_allclose(
        got["a"], want_a, atol=1e-3 * float(jnp.abs(want_a).max())
    )


def test_adapters_have_a_sharding_rule():
    mesh = make_mesh((1, 4, 2))
    assert spec("blocks/attn/q/a", (2, 16, 3), mesh) == jax.sharding.PartitionSpec()
    assert (
        spec("0/mu/blocks/mlp/up/b", (2, 3, 24), mesh) == jax.sharding.PartitionSpec()
    )


# -- PEFT's directory


def test_peft_directories_come_back(tiny_lm, tmp_path):
    adapters = random_adapters(tiny_lm)
    lora.save(adapters, LORA, tiny_lm.config, tmp_path / "adapters", base="tiny")
    back, settings = lora.load(tmp_path / "adapters", tiny_lm)
    assert settings.rank == 3
    assert settings.alpha == 6.0
    assert set(settings.targets) == set(LORA.targets)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(a, b)


def test_peft_tensors_have_their_names_and_shapes(tiny_lm, tmp_path):
    """y = x A' B' for A [r, in] and B [out, r], as torch's linear layers store them."""
    from safetensors.numpy import load_file

    adapters = random_adapters(tiny_lm)
    lora.save(adapters, LORA, tiny_lm.config, tmp_path / "adapters")
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn"
    assert tensors[f"{stem}.o_proj.lora_A.weight"].shape == (3, 4 * 6)
    assert tensors[f"{stem}.o_proj.lora_B.weight"].shape == (16, 3)
    assert tensors[f"{stem}.k_proj.lora_B.weight"].shape == (2 * 6, 3)
    a = np.asarray(adapters["blocks"]["attn"]["o"]["a"][1])
    np.testing.assert_array_equal(
        tensors[f"{stem}.o_proj.lora_A.weight"], a.reshape(24, 3).T
    )
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["target_modules"][:2] == ["down_proj", "gate_proj"]


def spoil(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"unknown modules \['lm_head'\]"),
        ({"target_modules": ["q_proj"]}, "unused .*down_proj"),
        ({"r": 4}, "which is not that of the base"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(tiny_lm, tmp_path, changes, message):
    lora.save(random_adapters(tiny_lm), LORA, tiny_lm.config, tmp_path / "a")
    spoil(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        lora.load(tmp_path / "a", tiny_lm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"rank": 2, "targets": ("qq",)}, "it takes some of"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


# -- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    base = str(folder / "base")
    train.train(tiny.config(num_steps=2), base)
    changes = {
        "model.path": base,
        "model.sizes": {},
        "lora.rank": 2,
        "checkpoint.every": 3,
    }
    config = tiny.config("pairs", **changes)
    workdir = str(folder / "run")
    return config, base, workdir, train.train(config, workdir)


def test_a_run_trains_adapters_and_its_base_is_its_reference(run):
    _, _, workdir, state = run
    assert lora.is_adapters(state.params)
    start = next(r for r in read(workdir) if "start/log_ratio" in r)
    assert start["start/log_ratio"] == 0
    assert start["start/loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_run_folder_loads_as_the_merged_model(run):
    config, base, workdir, state = run
    merged = build.load_lm(workdir)
    want = lora.merge(
        checkpoint.load_lm(base), state.params, build.lora_settings(config)
    )
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    before = checkpoint.load_lm(base).params["blocks"]["mlp"]["up"]["kernel"]
    assert np.abs(merged.params["blocks"]["mlp"]["up"]["kernel"] - before).max() > 1e-3


def test_it_goes_on_from_its_checkpoint_bit_for_bit(run, tmp_path):
    config, _, workdir, state = run
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    resumed = train.train(config, str(tmp_path / "again"))
    for a, b in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
