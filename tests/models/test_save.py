"""models/save.py: a directory that loads back bit for bit, or nothing at all."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from alignax.batch import LM
from alignax.models import save as save_module
from alignax.models.load import load, tree_shapes
from alignax.models.save import save
from alignax.models.transformer import ModelConfig, unstack

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def tensors_of(path):
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        out |= load_file(file)
    return out


def random_lm(config):
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in tree_shapes(config).items():
        *parents, leaf = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return LM(config, params)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_saved_files_hold_the_tensors_that_transformers_wrote(name, tmp_path):
    # the fixtures were written by transformers: names, shapes and bits are its own
    lm = load(GOLDEN / name)
    save(lm, tmp_path / "model")
    want, got = tensors_of(GOLDEN / name), tensors_of(tmp_path / "model")
    assert set(got) == set(want)
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)
    again = load(tmp_path / "model")
    assert again.config == lm.config
    equal(again.params, lm.params)


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_agrees_with_the_one_that_transformers_wrote(name, tmp_path):
    save(load(GOLDEN / name), tmp_path / "model")
    want = json.loads((GOLDEN / name / "config.json").read_text())
    got = json.loads((tmp_path / "model" / "config.json").read_text())
    unused = {  # in every file of its family, read by no decoder of ours
        "attention_dropout", "initializer_range", "use_cache", "transformers_version",
        "pretraining_tp", "pad_token_id", "_sliding_window_pattern", "attention_bias",
        "mlp_bias", "use_bidirectional_attention", "sliding_window_pattern",
        "max_window_layers", "no_rope_layer_interval",
    }  # fmt: skip
    if (
        name == "classifier"
    ):  # without a head over the vocabulary there is nothing to tie
        unused.add("tie_word_embeddings")
    assert {k: got.get(k) for k in want if k not in unused} == {
        k: v for k, v in want.items() if k not in unused
    }


def test_old_transformers_find_rope_where_they_look(tmp_path):
    save(load(GOLDEN / "gemma3"), tmp_path / "a")
    save(load(GOLDEN / "llama3_rope"), tmp_path / "b")
    a = json.loads((tmp_path / "a" / "config.json").read_text())
    b = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (a["rope_theta"], a["rope_local_base_freq"]) == (2000.0, 100.0)
    assert a["rope_scaling"]["rope_type"] == "linear"
    assert b["rope_scaling"]["original_max_position_embeddings"] == 32
    assert b["rope_theta"] == 500.0


def test_a_small_vocabulary_gets_no_pad_id_beyond_it(tmp_path):
    # transformers' default for SmolLM3 is 128004, which its embedding does not accept
    save(load(GOLDEN / "smollm3"), tmp_path / "m")
    hf = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "pad_token_id" in hf and hf["pad_token_id"] is None


def test_bfloat16_is_saved_as_it_is(tmp_path):
    lm = load(GOLDEN / "gemma2", dtype="bfloat16")
    save(lm, tmp_path / "m")
    again = load(tmp_path / "m", dtype="bfloat16")
    assert (
        json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    )
    assert again.config == lm.config
    equal(again.params, lm.params)


def test_large_models_are_sharded_with_an_index(tmp_path):
    lm = load(GOLDEN / "qwen3")
    save(lm, tmp_path / "m", max_shard_bytes=30_000)
    files = sorted(tmp_path.glob("m/*.safetensors"))
    assert len(files) > 2
    assert not (tmp_path / "m" / "model.safetensors").exists()
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    sizes = [sum(x.nbytes for x in load_file(f).values()) for f in files]
    assert max(sizes) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes)
    equal(load(tmp_path / "m").params, lm.params)


def test_fresh_and_unstacked_parameters_are_saved(tmp_path):
    config = ModelConfig(
        vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6,
        mlp_width=12, tied=False, value_head=True, eos_ids=(3, 4), bos_id=1,
    )  # fmt: skip
    lm = random_lm(config)
    save(lm, tmp_path / "a")
    save(unstack(lm), tmp_path / "b")
    for path in (tmp_path / "a", tmp_path / "b"):
        again = load(path)
        assert again.config == config
        equal(again.params, lm.params)


@pytest.mark.parametrize(
    "family, change, field",
    [
        ("llama", {"final_softcap": 30.0}, "final_softcap"),
        ("llama", {"qkv_bias": True}, "qkv_bias"),
        ("llama", {"window": 6}, "window"),
        ("mistral", {"window": 6, "local_layers": (True, False)}, "local_layers"),
        ("qwen2", {"qkv_bias": True, "query_scale": 3.0}, "query_scale"),
        ("gemma2", {"query_scale": 2.5}, "query_scale"),
        ("gemma", {}, "norm_offset"),
    ],
)
def test_a_config_that_its_family_cannot_express_is_refused(
    family, change, field, tmp_path
):
    config = ModelConfig(
        vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6,
        mlp_width=12, family=family, **change,
    )  # fmt: skip
    lm = random_lm(config)
    with pytest.raises(
        ValueError, match=f"{family} config.json cannot express.*{field}="
    ):
        save(lm, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_of_another_config_is_refused(tmp_path):
    lm = load(GOLDEN / "llama_tied")
    extra = LM(lm.config, {**lm.params, "lora": {"a": jnp.zeros(3)}})
    with pytest.raises(ValueError, match=r"unknown \['lora/a'\]"):
        save(extra, tmp_path / "m")
    short = LM(lm.config, {k: v for k, v in lm.params.items() if k != "norm"})
    with pytest.raises(ValueError, match=r"missing \['norm/scale'\]"):
        save(short, tmp_path / "m")
    wide = LM(dataclasses.replace(lm.config, mlp_width=40), lm.params)
    with pytest.raises(ValueError, match=r"blocks/mlp/.*48.*40"):
        save(wide, tmp_path / "m")
    half = LM(lm.config, jax.tree.map(lambda x: x.astype(jnp.float16), lm.params))
    with pytest.raises(ValueError, match="float16"):
        save(half, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(tmp_path):
    a, b = load(GOLDEN / "llama_tied"), load(GOLDEN / "llama_ref")
    save(a, tmp_path / "m")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(b, tmp_path / "m")
    equal(load(tmp_path / "m").params, a.params)
    save(b, tmp_path / "m", overwrite=True)
    equal(load(tmp_path / "m").params, b.params)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
        save(a, tmp_path / "home", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "m"]


def test_a_failed_save_leaves_the_old_model_and_no_debris(tmp_path, monkeypatch):
    a, b = load(GOLDEN / "llama_tied"), load(GOLDEN / "llama_ref")
    save(a, tmp_path / "m")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(save_module, "_write_json", full)
    with pytest.raises(OSError, match="no space"):
        save(b, tmp_path / "m", overwrite=True)
    with pytest.raises(OSError, match="no space"):
        save(b, tmp_path / "new")
    equal(load(tmp_path / "m").params, a.params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_old_model_is_put_back_if_the_new_one_cannot_take_its_place(
    tmp_path, monkeypatch
):
    a, b = load(GOLDEN / "llama_tied"), load(GOLDEN / "llama_ref")
    save(a, tmp_path / "m")
    rename = pathlib.Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("device gone")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="device gone"):
        save(b, tmp_path / "m", overwrite=True)
    equal(load(tmp_path / "m").params, a.params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_tokenizer_files_are_copied(tmp_path):
    (tmp_path / "tok").mkdir()
    lm = load(GOLDEN / "llama_tied")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        save(lm, tmp_path / "m", tokenizer=tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "model.safetensors").write_text("not this")
    save(lm, tmp_path / "m", tokenizer=tmp_path / "tok")
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"
    equal(load(tmp_path / "m").params, lm.params)
