"""Damaged and hostile folders of models: refused in one line that names the file."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from alignax.models import load, peft, sizes, transformer
from alignax.respond import respond
from alignax.training import checks, loading

GGUF = pathlib.Path(tiny.ROOT) / "tests/golden/llama_gguf/model.gguf"


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def refused(path, message, read=loading.load_lm):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read(str(path))
    text = str(caught.value)
    assert "\n" not in text
    assert pathlib.Path(path).name in text
    return text


def edit(folder, **changes):
    path = folder / "config.json"
    there = json.loads(path.read_text())
    path.write_text(json.dumps({**there, **changes}))


CONFIG = [
    ("hidden_size", -1), ("hidden_size", 0), ("hidden_size", 10**9), ("hidden_size", "16"),
    ("hidden_size", 1.5), ("hidden_size", True), ("hidden_size", [16]),
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("num_hidden_layers", None),
    ("num_attention_heads", 0), ("num_key_value_heads", 3), ("head_dim", 7),
    ("intermediate_size", 10**400), ("vocab_size", -5), ("max_position_embeddings", 0),
    ("rms_norm_eps", 0), ("rms_norm_eps", "x"), ("rms_norm_eps", -1e-6),
    ("rope_parameters", []), ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
    ("rope_parameters", {"rope_type": 5}), ("rope_parameters", {"rope_type": "linear"}),
    ("rope_parameters", {"rope_type": "linear", "factor": "2"}),
    ("rope_parameters", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
     "high_freq_factor": 1, "original_max_position_embeddings": 8192}),
    ("layer_types", ["full_attention"] * 7), ("layer_types", [1]), ("layer_types", "full"),
    ("architectures", 3), ("architectures", [3]), ("model_type", []), ("model_type", None),
    ("tie_word_embeddings", "yes"), ("hidden_act", 3), ("hidden_act", "cosh"),
    ("eos_token_id", -1), ("eos_token_id", ["x"]), ("eos_token_id", 1.5),
    ("bos_token_id", "x"), ("quantization_config", {"a": 1}), ("num_experts", [1]),
]  # fmt: skip


@pytest.mark.parametrize("key, value", CONFIG)
def test_a_setting_that_cannot_be_is_refused_by_its_name(folder, key, value):
    edit(folder, **{key: value})
    text = refused(folder, r"config\.json|model")
    assert len(text) < 500
    if key not in ("rope_parameters", "architectures", "hidden_act", "model_type"):
        assert key.removeprefix("num_key_value_") in text or "num_kv_heads" in text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '"x"', "{", "[" * 100_000, '{"a": ' * 100_000, "{\"a\": " + "9" * 5000 + "}", "\ud800"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])  # fmt: skip
def test_what_is_no_object_is_refused(folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert name in refused(folder, name)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/hosts", "a/b.safetensors", "", "..", 3, None, "nowhere.safetensors"],
)  # fmt: skip
def test_an_index_names_files_beside_it_alone(folder, file):
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "index.json|nowhere")


def header(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(path, table, body):
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40, 2**40]}, {"shape": [-1, 4]}, {"dtype": "I64"}, {"dtype": "X9"},
        {"data_offsets": [0, 2**60]}, {"data_offsets": [8, 4]}, {"shape": "x"},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(folder, change):
    path = folder / "model.safetensors"
    table, body = header(path)
    name = next(k for k in table if k != "__metadata__")
    table[name] |= change
    with_header(path, table, body)
    refused(folder, "safetensors")


@pytest.mark.parametrize("size", [0, 7, 2**40, 2**63])
def test_a_header_of_another_size_is_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(
        struct.pack("<Q", size)[: 7 if size == 7 else 8] + path.read_bytes()[8:]
    )
    refused(folder, "safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused(folder, value, dtype):
    import ml_dtypes

    path = folder / "model.safetensors"
    tensors = {k: v.astype(getattr(ml_dtypes, dtype, dtype)) for k, v in load_file(path).items()}  # fmt: skip
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last].copy()
    tensors[last].flat[-1] = value
    save_file(tensors, path)
    refused(folder, "NaN or infinite")


def test_weights_that_are_no_numbers_answer_nothing(folder, tmp_path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if "mlp" in k)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, path)
    config = tiny.to_respond(tmp_path, **{"model.path": str(folder)})
    with pytest.raises(ValueError, match="NaN"):
        respond.respond(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Drawn:
    """What a decoder returns, with log-probabilities that are NaN."""

    raw_logps = np.array([[[0.0, np.nan]]])

    class batch:
        mask = np.array([[[False, True]]])


def test_log_probabilities_that_are_none_answer_nothing():
    with pytest.raises(ValueError, match="response to row 3 are NaN"):
        respond.check_numbers(Drawn, ["row 3"])
    Drawn.batch.mask[:] = False  # padding
    respond.check_numbers(Drawn, ["row 3"])


@pytest.mark.parametrize("settings", ["[]", "{", '{"r": 0}', '{"r": "8", "lora_alpha": 1, "target_modules": ["q_proj"]}',
    '{"r": 8, "lora_alpha": -1, "target_modules": ["q_proj"]}', '{"r": 8, "lora_alpha": 1, "target_modules": [1]}'])  # fmt: skip
def test_settings_of_adapters_that_cannot_be_are_refused(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(settings)
    refused(tmp_path, "adapter_config", peft.settings)


# -- sizes of a config


@pytest.mark.parametrize(
    "changes",
    [{"width": -1}, {"width": "16"}, {"num_layers": 10**6}, {"head_dim": 3}, {"norm_eps": 0},
     {"tied": 1}, {"max_length": 1.5}, {"rope_theta": 0}, {"num_kv_heads": 3}],
)  # fmt: skip
def test_sizes_of_a_config_that_cannot_be_are_refused(changes):
    config = tiny.config()
    config.model.sizes = {**config.model.sizes.to_dict(), **changes}
    with pytest.raises(ValueError, match=r"^model\.sizes: ") as caught:
        loading.model_config(config, 64)
    assert next(iter(changes)) in str(caught.value)
    checks.check(tiny.config())


def test_every_number_of_a_model_has_a_range():
    import dataclasses

    fields = {f.name for f in dataclasses.fields(transformer.ModelConfig) if f.type in (int, float, int | None, float | None)}  # fmt: skip
    assert fields == set(sizes.RANGES)


# -- GGUF


def test_a_gguf_file_that_is_cut_anywhere_is_refused(tmp_path):
    pytest.importorskip("gguf")
    data, path = GGUF.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 4, 8, 24, 30, 100, 1000, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:size])
        refused(path, "damaged or not GGUF", load.load)


@pytest.mark.parametrize("place", [4, 8, 16, 24])
@pytest.mark.parametrize("value", [2**32, 2**60, 2**64 - 1])
def test_a_gguf_header_that_lies_is_refused(tmp_path, place, value):
    pytest.importorskip("gguf")
    data, path = bytearray(GGUF.read_bytes()), tmp_path / "lies.gguf"
    data[place : place + 8] = struct.pack("<Q", value)
    path.write_bytes(data)
    refused(path, "damaged or not GGUF", load.load)
