"""LoRA: adapters at zero are the base, merged ones are the sum, and only they train."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from alignax import logprob, plugin
from alignax.batch import LM
from alignax.models import load, lora, transformer
from alignax.models.lora import Lora
from alignax.models.sharding import make_mesh, put_batch, put_params, spec
from alignax.reports.metrics import flops_per_token, read
from alignax.runs import adapter_base, checkpoint
from alignax.training import build, explain, loading, loop, optim
from alignax.training.step import init_state, make_train_step

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PEFT = ["peft_llama", "peft_rslora", "peft_qwen2"]
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


def peft_case(name):
    """PEFT's own fixture: the base, adapters and settings as read, ids and logits."""
    base = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    lm = load.load(GOLDEN / base["base_model_name_or_path"])
    golden = np.load(GOLDEN / name / "golden.npz")
    return lm, *lora.load(GOLDEN / name, lm), golden["ids"], golden["logits"]


@jax.jit
def log_probs(lm, ids):
    return jax.nn.log_softmax(
        transformer.unembed(lm, transformer.hidden(lm, ids)[0]), -1
    )


def furthest(lm, ids, logits):
    """Largest difference of any log-probability, nats, from logits in float64."""
    want = logits.astype(np.float64)
    want -= np.log(np.exp(want).sum(-1, keepdims=True))
    with jax.default_matmul_precision("highest"):
        return np.abs(np.asarray(log_probs(lm, jnp.asarray(ids))) - want).max()


@pytest.mark.parametrize("name", PEFT)
def test_log_probs_are_those_of_peft(name):
    base, adapters, settings, ids, logits = peft_case(name)
    assert settings.targets == tuple(sorted(lora.TARGETS)) or name == "peft_qwen2"
    # float32 in another order of sums, at logits of order 10
    assert furthest(lora.attach(base, adapters, settings), ids, logits) < 5e-5
    assert furthest(loading.load_lm(str(GOLDEN / name)), ids, logits) < 5e-5
    # what a golden number can notice: another scale, and no adapters at all
    wrong = dataclasses.replace(settings, rank_stabilised=not settings.rank_stabilised)
    assert furthest(lora.attach(base, adapters, wrong), ids, logits) > 0.1
    assert furthest(base, ids, logits) > 0.5


@pytest.mark.parametrize("name", PEFT)
def test_what_is_written_is_what_peft_wrote(name, tmp_path):
    """The same names, shapes, bits and settings, so PEFT reads it as its own.

    (`make_peft.py --check` has PEFT read such a directory.)
    """
    from safetensors.numpy import load_file

    base, adapters, settings, _, _ = peft_case(name)
    real = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    on = real["base_model_name_or_path"]
    lora.save(adapters, settings, base.config, tmp_path / "ours", base=on)
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(GOLDEN / name / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, strict=True)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written.pop("lora_dropout") == 0  # of training; not known to the reader
    differ = {k: v for k, v in written.items() if real[k] != v}
    assert not differ


def copy(name, to, **changes):
    """A fixture with other settings in its adapter_config.json."""
    shutil.copytree(GOLDEN / name, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


REFUSED = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "use_dora": True,
    "lora_bias": True,
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "target_parameters": ["mlp.experts.up"],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
    "loftq_config": {"loftq_bits": 4},
    "of_a_later_version": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_is_not_plain_lora_is_refused_by_name(key, tmp_path):
    folder = copy("peft_qwen2", tmp_path / "a", **{key: REFUSED[key]})
    with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
        lora.load(folder, load.load(GOLDEN / "qwen2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"unknown modules \['lm_head'\]"),
        ({"target_modules": ["q_proj"]}, r"missing \[\], unused .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing .*o_proj"),
        ({"r": 4}, r"lora_A.weight has shape \(2, 32\), expected \(4, 32\)"),
        ({"r": None}, "adapter_config.json lacks 'r'"),
    ],
    ids=["unknown", "unused", "missing", "rank", "no rank"],
)  # fmt: skip
def test_tensors_that_are_not_what_the_settings_say(tmp_path, changes, message):
    folder = copy("peft_qwen2", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        lora.load(folder, load.load(GOLDEN / "qwen2"))


def test_a_tensor_turned_over_is_no_tensor_of_the_base(tmp_path):
    """Square matrices of r = in would fit both ways; these have the same size only."""
    from safetensors.numpy import load_file, save_file

    folder = copy("peft_qwen2", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(k for k in tensors if k.endswith("lora_B.weight"))
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_B.weight has shape \(2, "):
        lora.load(folder, load.load(GOLDEN / "qwen2"))


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", "all-linear"])
def test_modules_given_by_a_pattern_are_those_in_the_file(pattern, tmp_path):
    folder = copy("peft_qwen2", tmp_path / "a", target_modules=pattern)
    _, settings = lora.load(folder, load.load(GOLDEN / "qwen2"))
    assert settings.targets == ("q", "v")


def test_adapters_stored_in_bfloat16_are_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = copy("peft_qwen2", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    half = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors")
    base = load.load(GOLDEN / "qwen2")
    got, want = lora.load(folder, base)[0], lora.load(GOLDEN / "peft_qwen2", base)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(jnp.float32))


def test_peft_adapters_whose_base_is_nowhere_name_it(tmp_path):
    folder = copy("peft_qwen2", tmp_path / "a", base_model_name_or_path="hub/name")
    with pytest.raises(FileNotFoundError, match="names the base 'hub/name', which is"):
        loading.load_lm(str(folder))


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
    """A base, and a run of adapters on it whose config names it by a relative path."""
    folder = tmp_path_factory.mktemp("lora")
    base = str(folder / "base")
    loop.train(tiny.config(num_steps=2), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        changes = {
            "model.path": "base",
            "model.sizes": {},
            "lora.rank": 2,
            "checkpoint.every": 3,
        }
        config = tiny.config("pairs", **changes)
        workdir = str(folder / "run")
        return config, base, workdir, loop.train(config, workdir)


def test_a_run_trains_adapters_and_its_base_is_its_reference(run):
    _, _, workdir, state = run
    assert lora.is_adapters(state.params)
    start = next(r for r in read(workdir) if "start/log_ratio" in r)
    assert start["start/log_ratio"] == 0
    assert start["start/loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_run_folder_loads_as_the_merged_model(run, tmp_path):
    """From any working directory, and from the folder of its checkpoints, elsewhere."""
    config, base, workdir, state = run
    want = lora.merge(
        checkpoint.load_lm(base), state.params, loading.lora_settings(config)
    )
    shutil.copytree(workdir, tmp_path / "inner" / "run")
    for folder in (workdir, str(tmp_path / "inner" / "run" / "checkpoints")):
        merged = loading.load_lm(folder)
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    before = checkpoint.load_lm(base).params["blocks"]["mlp"]["up"]["kernel"]
    assert np.abs(merged.params["blocks"]["mlp"]["up"]["kernel"] - before).max() > 1e-3


def test_it_goes_on_from_its_checkpoint_bit_for_bit(run, tmp_path, monkeypatch):
    config, base, workdir, state = run
    monkeypatch.chdir(pathlib.Path(base).parent)
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    resumed = loop.train(config, str(tmp_path / "again"))
    for a, b in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


# -- whose adapters they are


@pytest.fixture
def moved(run, tmp_path):
    """The run and its base, side by side in another folder; the first base is gone."""
    _, base, workdir, _ = run
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(workdir, tmp_path / "run")
    note = tmp_path / "run" / adapter_base.NAME
    known = json.loads(note.read_text())
    assert known["path"] == base
    note.write_text(json.dumps({**known, "path": "/nowhere/base"}))
    return tmp_path


def other_base(folder):
    """Other weights of the same sizes where the base was."""
    shutil.rmtree(folder)
    loop.train(tiny.config(num_steps=1), str(folder))


def test_a_base_that_moved_along_is_found(run, moved):
    got, want = loading.load_lm(str(moved / "run")), loading.load_lm(run[2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    path = loading.tokenizer_path(tiny.config(tokenizer="", **{"model.path": run[2]}))
    assert path == "bytes"


def test_a_base_that_is_gone_is_missed_by_name(moved):
    shutil.rmtree(moved / "base")
    with pytest.raises(
        FileNotFoundError, match=r"in none of \['/nowhere/base', .*/base'"
    ):
        loading.load_lm(str(moved / "run"))


def test_adapters_are_not_merged_into_another_base(moved):
    other_base(moved / "base")
    with pytest.raises(ValueError, match=r"base is not the base that the adapters in"):
        loading.load_lm(str(moved / "run"))


def test_a_run_does_not_go_on_with_another_base(run, moved, monkeypatch):
    other_base(moved / "base")
    monkeypatch.chdir(moved)
    with pytest.raises(ValueError, match="is not the base that the adapters in"):
        build.build(run[0], str(moved / "run"))


def test_adapters_without_a_note_of_their_base_are_refused(moved):
    (moved / "run" / adapter_base.NAME).unlink()
    with pytest.raises(
        ValueError, match=r"holds adapters, and no config\.json and base"
    ):
        loading.load_lm(str(moved / "run"))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Adapters in bfloat16 on weights that are drawn from the seed."""
    workdir = str(tmp_path_factory.mktemp("half") / "run")
    changes = {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16"}
    config = tiny.config("pairs", **changes, num_steps=2, seed=3, **{"lora.rank": 4})
    return config, workdir, loop.train(config, workdir)


def test_a_run_in_bfloat16_starts_at_its_base_and_trains(half):
    _, workdir, state = half
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(state.params))
    start = next(r for r in read(workdir) if "start/log_ratio" in r)
    assert start["start/log_ratio"] == 0


def test_a_base_drawn_from_a_seed_is_drawn_again(half):
    """Cast to bfloat16 first, as the run saw it."""
    config, workdir, state = half
    merged = loading.load_lm(workdir)
    plain = dataclasses.replace(merged.config, dtype="float32")
    drawn = transformer.init(plain, jax.random.key(3))
    drawn = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn)
    want = lora.merge(
        LM(merged.config, drawn), state.params, loading.lora_settings(config)
    )
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)


def test_another_seed_draws_another_base(half, tmp_path):
    shutil.copytree(half[1], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 4}))
    with pytest.raises(ValueError, match="trained on weights drawn from a seed"):
        loading.load_lm(str(tmp_path / "run"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [
        {}, {"qkv_bias": True}, {"qk_norm": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "rope_layers": (True, False)},
        {"qk_norm": True, "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_at_zero_change_no_bit_in_bfloat16(family, dtype, make_batch):
    """The kernel's product is rounded before the adapters' is added, as without them."""
    config = transformer.ModelConfig(
        vocab_size=37, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_width=64, dtype="bfloat16", **family,
    )  # fmt: skip
    params = transformer.init(config, jax.random.key(0))
    base = LM(config, jax.tree.map(lambda x: x.astype(dtype), params))
    adapters = lora.init(base, LORA, jax.random.key(1))
    rows = make_batch(2, 2, 24).tokens.reshape(4, 24)
    got = logps(lora.attach(base, adapters, LORA), rows)
    np.testing.assert_array_equal(got, logps(base, rows))


# -- what it costs


def test_explain_counts_what_is_trained_and_kept():
    c = tiny.config("pairs", **{"lora.rank": 2, "model.param_dtype": "bfloat16"})
    text = explain.explain(c)
    # q, k, v, o, gate, up, down: rank 2 of in + out
    count = 2 * (16 + 16 + 16 + 8 + 16 + 8 + 16 + 16 + 3 * (16 + 16))
    assert f"{count:,} of adapters are trained" in text
    assert "1 copies (base, frozen LMs)" in text
    total = int(next(x for x in text.splitlines() if "parameters," in x).split()[0].replace(",", ""))  # fmt: skip
    mib = 2**-20
    assert f"{2 * total * mib:.3g} MiB a copy" in text
    assert f"{4 * count * mib:.3g} MiB of adapters, {4 * count * mib:.3g} MiB of gradient" in text  # fmt: skip
    # two moments, and two counters of steps
    assert f"{(8 * count + 8) * mib:.3g} MiB of adamw state" in text
    assert "blocks/mlp/up/b " in text


def test_a_frozen_parameter_costs_two_thirds():
    assert flops_per_token(10, "train", frozen=100) == 460
    assert flops_per_token(10, "forward", frozen=100) == 220


def test_gradients_of_frozen_kernels_are_not_computed(make_batch):
    """XLA's own count: forward and the way back, without the kernels' products."""
    config = transformer.ModelConfig(
        vocab_size=37, width=128, num_layers=2, num_heads=4, num_kv_heads=4,
        head_dim=32, mlp_width=256,
    )  # fmt: skip
    base = LM(config, transformer.init(config, jax.random.key(0)))
    settings = Lora(2)
    adapters = lora.init(base, settings, jax.random.key(1))
    batch = make_batch(2, 2, 24)

    def flops(loss, *args):
        cost = jax.jit(jax.grad(loss)).lower(*args).compile().cost_analysis()
        return cost["flops"]  # of one layer, whatever their number

    def all_weights(params):
        return logprob.score(LM(config, params), batch).logps.sum()

    def adapters_alone(adapters, base):
        lm = lora.attach(base, adapters, settings)
        return logprob.score(lm, batch).logps.sum()

    count, total = map(transformer.num_params, (adapters, base.params))
    share = flops_per_token(count, "train", frozen=total) / flops_per_token(total, "train")  # fmt: skip
    got = flops(adapters_alone, adapters, base) / flops(all_weights, base.params)
    # measured 0.711, and 0.692 are expected: attention has no weights to save on
    assert got == pytest.approx(share, abs=0.05)
