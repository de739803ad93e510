"""PEFT's adapter directories: read for a base, written, and refused by name."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.models import load, lora, peft, transformer
from alignax.models.lora import Lora
from alignax.training import loading

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PEFT = sorted(x.name for x in GOLDEN.glob("peft_*"))
PLAIN = ["peft_llama", "peft_rslora", "peft_qwen2"]
LORA = Lora(rank=3, alpha=6.0)


def random_adapters(lm, settings=LORA, seed=0):
    rng = np.random.default_rng(seed)
    zero = lora.init(lm, settings, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), "float32"), zero
    )


# -- PEFT's directory


def test_peft_directories_come_back(tiny_lm, tmp_path):
    adapters = random_adapters(tiny_lm)
    peft.save(adapters, LORA, tiny_lm.config, tmp_path / "adapters", base="tiny")
    back, settings = peft.load(tmp_path / "adapters", tiny_lm)
    assert settings.rank == 3
    assert settings.alpha == 6.0
    assert set(settings.targets) == set(LORA.targets)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(a, b)


def test_peft_tensors_have_their_names_and_shapes(tiny_lm, tmp_path):
    """y = x A' B' for A [r, in] and B [out, r], as torch's linear layers store them."""
    from safetensors.numpy import load_file

    adapters = random_adapters(tiny_lm)
    peft.save(adapters, LORA, tiny_lm.config, tmp_path / "adapters")
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
    return lm, *peft.load(GOLDEN / name, lm), golden["ids"], golden["logits"]


@jax.jit
def outputs(lm, ids):
    """Logits; of a model with a value head, its values [N, T, 1]."""
    h = transformer.hidden(lm, ids)[0]
    if lm.config.value_head:
        return h @ lm.params["value_head"]["kernel"][:, None]
    return transformer.unembed(lm, h)


def furthest(lm, ids, logits):
    """Largest difference of any logit."""
    with jax.default_matmul_precision("highest"):
        return np.abs(np.asarray(outputs(lm, jnp.asarray(ids))) - logits).max()


@pytest.mark.parametrize("name", PEFT)
def test_logits_are_those_of_peft(name):
    base, adapters, made, ids, logits = peft_case(name)
    # float32 in another order of sums, at logits of order 10
    assert furthest(lora.attach(base, adapters, made), ids, logits) < 1e-4
    assert furthest(lora.merge(base, adapters, made), ids, logits) < 5e-5


def test_a_folder_loads_as_the_merged_model():
    base, adapters, made, _, _ = peft_case("peft_dora")
    want = lora.merge(base, adapters, made)
    lm = loading.load_lm(str(GOLDEN / "peft_dora"))
    assert lm.config == want.config
    jax.tree.map(np.testing.assert_array_equal, lm.params, want.params)


def test_what_a_golden_number_notices():
    """Another scale, and no adapters at all."""
    base, adapters, made, ids, logits = peft_case("peft_rslora")
    assert made.targets == tuple(sorted(lora.TARGETS, key=PARTS.index))
    wrong = dataclasses.replace(made, rank_stabilised=False)
    assert furthest(lora.attach(base, adapters, wrong), ids, logits) > 0.1
    assert furthest(base, ids, logits) > 0.5


PARTS = ["k", "o", "q", "v", "down", "gate", "up"]  # by module, then by name
SETTINGS = {  # what is read of each fixture, but for what is the default
    "peft_biases": {"rank": 2, "alpha": 8.0, "targets": ("q",), "layers": (0,), "bias": "lora_only"},
    "peft_dora": {
        "rank": 3, "alpha": 6.0, "targets": ("o", "q", "down", "embed", "head"),
        "rank_stabilised": True, "dora": True, "ranks": {"q": 2}, "alphas": {"head": 9.0},
    },
    "peft_layers": {
        "rank": 3, "alpha": 6.0, "targets": ("q", "up"), "layers": (1,),
        "ranks": {"q": 2, "up": 5}, "alphas": {"up": 3.0}, "saved": ("embed",),
    },
    "peft_regex": {
        "rank": 2, "alpha": 8.0, "targets": ("o", "q", "up"), "dora": True, "bias": "all",
        "ranks": {"q/0": 4, "o/0": 0, "up/0": 0},
    },
    "peft_saved": {"rank": 2, "alpha": 8.0, "targets": ("q",), "saved": ("embed", "head")},
    "peft_tied": {"rank": 2, "alpha": 8.0, "targets": ("q", "embed")},
    "peft_untied": {"rank": 2, "alpha": 8.0, "targets": ("q", "embed"), "saved": ("head",)},
    "peft_tokens": {"rank": 2, "alpha": 8.0, "targets": ("q",), "saved": ("embed",)},
    "peft_reward": {"rank": 2, "alpha": 8.0, "targets": ("q",)},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_and_tables_stay_tied_where_peft_ties_them(name):
    base, adapters, made, _, _ = peft_case(name)
    assert made == Lora(**SETTINGS[name])
    config = lora.merge(base, adapters, made).config
    assert config.tied == (base.config.tied and name != "peft_untied")
    assert config.value_head == (name == "peft_reward")


@pytest.mark.parametrize("name", PEFT)
def test_what_is_written_is_what_peft_wrote(name, tmp_path):
    """The same names, shapes, bits and settings, so PEFT reads it as its own.

    (`make_peft.py --check` has PEFT read such a directory.)
    """
    from safetensors.numpy import load_file

    base, adapters, made, _, _ = peft_case(name)
    real = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    on = real["base_model_name_or_path"]
    peft.save(adapters, made, base.config, tmp_path / "ours", base=on)
    again, known = peft.load(tmp_path / "ours", base)
    assert known == made
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    if name not in ("peft_untied", "peft_tokens"):  # whole tables in another form
        ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
        theirs = load_file(GOLDEN / name / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            np.testing.assert_array_equal(ours[key], tensor, strict=True)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written.pop("lora_dropout") == 0  # of training; not known to the reader
    differ = {k: v for k, v in written.items() if real[k] != v}
    assert name not in PLAIN or not differ
    assert not differ.keys() & {"task_type", "r", "lora_alpha", "use_dora", "bias"}


def test_a_vocabulary_that_grew_is_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = copy("peft_saved", tmp_path / "a", base_model_name_or_path=str(GOLDEN / "llama_untied"))  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in ("lm_head", "model.embed_tokens"):
        table = tensors[f"base_model.model.{name}.weight"]
        more = np.concatenate([table, np.ones((2, table.shape[1]), np.float32)])
        tensors[f"base_model.model.{name}.weight"] = more
    save_file(tensors, folder / "adapter_model.safetensors")
    lm, known = (
        loading.load_lm(str(folder)),
        loading.load_lm(str(GOLDEN / "peft_saved")),
    )
    assert lm.config.vocab_size == known.config.vocab_size + 2
    for name, axis in (("embed", 0), ("head", 1)):
        old, new = known.params[name], lm.params[name]
        np.testing.assert_array_equal(jnp.delete(new, jnp.array([96, 97]), axis), old)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"98 rows and that of the base 96, but there is"
    ):
        loading.load_lm(str(folder))


def test_a_classifier_has_no_head_that_would_be_untied(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = copy("peft_reward", tmp_path / "a", base_model_name_or_path=str(GOLDEN / "llama_tied"))  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    table = np.ones((96, 32), np.float32)
    tensors["base_model.model.model.embed_tokens.weight"] = table
    save_file(tensors, folder / "adapter_model.safetensors")
    lm = loading.load_lm(str(folder))
    assert lm.config.tied and lm.config.value_head and "head" not in lm.params
    np.testing.assert_array_equal(lm.params["embed"], table)


TARGETED = [  # (settings, module, whether PEFT gives it adapters)
    ({"target_modules": ["q_proj"]}, "model.layers.3.self_attn.q_proj", True),
    ({"target_modules": ["proj"]}, "model.layers.3.self_attn.q_proj", False),
    ({"target_modules": "q_proj"}, "model.layers.3.self_attn.q_proj", False),
    ({"target_modules": ".*3.*q_proj"}, "model.layers.3.self_attn.q_proj", True),
    ({"target_modules": "all-linear"}, "model.layers.3.mlp.up_proj", True),
    ({"target_modules": "all-linear"}, "lm_head", False),
    ({"target_modules": ["up_proj"], "layers_to_transform": 1}, "model.layers.1.mlp.up_proj", True),
    ({"target_modules": ["up_proj"], "layers_to_transform": 1}, "model.layers.11.mlp.up_proj", False),
    ({"target_modules": ["up_proj"], "layers_to_transform": [0]}, "model.layers.0.mlp.up_proj", True),
    ({"target_modules": ["up_proj", "lm_head"], "layers_to_transform": [0]}, "lm_head", True),
    ({"target_modules": ["embed_tokens"], "layers_to_transform": [0]}, "model.embed_tokens", False),
    ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
     "model.layers.0.mlp.up_proj", False),
    ({"target_modules": ["up_proj"], "exclude_modules": ["mlp.up_proj"]},
     "model.layers.0.mlp.up_proj", False),
    ({"target_modules": ["up_proj"], "exclude_modules": "mlp"}, "model.layers.0.mlp.up_proj", True),
    ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "lm_head", False),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "module", "wanted"), TARGETED)
def test_which_modules_have_adapters(settings, module, wanted):
    assert peft.is_target(settings, module) == wanted


def copy(name, to, **changes):
    """A fixture with other settings in its adapter_config.json."""
    shutil.copytree(GOLDEN / name, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


REFUSED = {
    "peft_type": "IA3",
    "task_type": "TOKEN_CLS",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "target_parameters": ["mlp.experts.up"],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "arrow_config": {"top_k": 2},
    "init_lora_weights": "pissa_niter_4",
    "loftq_config": {"loftq_bits": 4},
    "of_a_later_version": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_is_not_plain_lora_is_refused_by_name(key, tmp_path):
    folder = copy("peft_qwen2", tmp_path / "a", **{key: REFUSED[key]})
    with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
        peft.load(folder, load.load(GOLDEN / "qwen2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "missing .*lm_head.lora_A"),
        ({"target_modules": ["c_attn"]}, "matches no module"),
        ({"modules_to_save": ["embed_tokens"]}, r"missing \['model.embed_tokens.weight'\]"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
        ({"rank_pattern": {"v_proj": 1}}, r"v_proj.lora_A.weight has shape \(2, 32\)"),
        ({"layers_to_transform": [1]}, "missing .*unused .*layers.0"),
        ({"task_type": "SEQ_CLS"}, "there is no score.weight"),
        ({"trainable_token_indices": [1]}, "missing .*trainable_tokens_delta"),
        ({"alpha_pattern": {"(.*)*": 1}}, r"pattern '\(\.\*\)\*'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is .* expected ranks"),
        ({"target_modules": "("}, "pattern '\\('"),
        ({"target_modules": ["q_proj"]}, r"missing \[\], unused .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing .*o_proj"),
        ({"r": 4}, r"lora_A.weight has shape \(2, 32\), expected \(4, 32\)"),
        ({"r": None}, "adapter_config.json lacks 'r'"),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_not_what_the_settings_say(tmp_path, changes, message):
    folder = copy("peft_qwen2", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        peft.load(folder, load.load(GOLDEN / "qwen2"))


def test_a_tensor_turned_over_is_no_tensor_of_the_base(tmp_path):
    """Square matrices of r = in would fit both ways; these have the same size only."""
    from safetensors.numpy import load_file, save_file

    folder = copy("peft_qwen2", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(k for k in tensors if k.endswith("lora_B.weight"))
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_B.weight has shape \(2, "):
        peft.load(folder, load.load(GOLDEN / "qwen2"))


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", "all-linear"])
def test_modules_given_by_a_pattern_are_those_in_the_file(pattern, tmp_path):
    folder = copy("peft_qwen2", tmp_path / "a", target_modules=pattern)
    _, settings = peft.load(folder, load.load(GOLDEN / "qwen2"))
    assert settings.targets == ("q", "v")


def test_adapters_stored_in_bfloat16_are_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = copy("peft_qwen2", tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    half = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors")
    base = load.load(GOLDEN / "qwen2")
    got, want = peft.load(folder, base)[0], peft.load(GOLDEN / "peft_qwen2", base)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(jnp.float32))


def test_peft_adapters_whose_base_is_nowhere_name_it(tmp_path):
    folder = copy("peft_qwen2", tmp_path / "a", base_model_name_or_path="hub/name")
    with pytest.raises(FileNotFoundError, match="names the base 'hub/name', which is"):
        loading.load_lm(str(folder))
