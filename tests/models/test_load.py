"""models/load.py and models/gguf.py: what is read, and what is refused by name."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax.models import families, gguf
from alignax.models import load as load_module
from alignax.models.load import load, tree_shapes

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAME = "model.safetensors"


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture, with edits to its tensors and its config.json."""

    def copy(name="llama_tied", *, tensors=lambda x: x, **config):
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        if (folder / NAME).exists():
            save_file(tensors(load_file(folder / NAME)), folder / NAME)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return copy


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_tree_is_the_one_that_init_makes():
    lm = load(GOLDEN / "gemma3")
    flat = jax.tree_util.tree_flatten_with_path(lm.params)[0]
    got = {"/".join(k.key for k in keys): leaf.shape for keys, leaf in flat}
    assert got == tree_shapes(lm.config)
    assert got["blocks/attn/o/kernel"] == (4, 4, 12, 32)  # L H K D


def test_dtype_is_that_of_parameters_and_computation():
    lm = load(GOLDEN / "qwen2", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype("bfloat16")}
    assert lm.config.dtype == "bfloat16"
    want = load(GOLDEN / "qwen2").params["embed"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(lm.params["embed"], want)
    with pytest.raises(ValueError, match=r"'float16'.*float32, bfloat16"):
        load(GOLDEN / "qwen2", dtype="float16")


def test_bfloat16_files_are_read(copy):
    def cast(tensors):
        return {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}

    lm = load(copy(tensors=cast))
    want = load(GOLDEN / "llama_tied", dtype="bfloat16")
    equal(lm.params, jax.tree.map(lambda x: x.astype(jnp.float32), want.params))


def test_shards_are_joined_by_their_index(tmp_path):
    whole = {}
    for file in sorted((GOLDEN / "llama_untied").glob("*.safetensors")):
        whole |= load_file(file)
    save_file(whole, tmp_path / NAME)
    shutil.copy(GOLDEN / "llama_untied" / "config.json", tmp_path)
    equal(load(GOLDEN / "llama_untied").params, load(tmp_path).params)


def test_missing_and_unused_tensors_are_named(copy):
    def edit(tensors):
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
        return {k: v for k, v in tensors.items() if k != "model.norm.weight"}

    with pytest.raises(ValueError) as e:
        load(copy(tensors=edit))
    assert "lacks model.norm.weight" in str(e.value)
    assert "also has model.layers.7.mlp.up_proj.weight" in str(e.value)


def test_layers_beyond_the_config_are_not_dropped(copy):
    with pytest.raises(ValueError, match=r"also has model\.layers\.1\."):
        load(copy(num_hidden_layers=1))


def test_shape_mismatch_names_tensor_got_and_want(copy):
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj.*\(32, 48\).*\(32, 40\)"
    ):
        load(copy(intermediate_size=40))


def test_transposed_tensor_is_refused_and_not_reshaped(copy):
    def edit(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        return {**tensors, name: np.ascontiguousarray(tensors[name].T)}

    with pytest.raises(ValueError, match=r"up_proj.*\(32, 48\).*\(48, 32\)"):
        load(copy(tensors=edit))


def test_integer_tensor_is_refused(copy):
    def edit(tensors):
        return {**tensors, "model.norm.weight": np.zeros(32, np.int8)}

    with pytest.raises(ValueError, match=r"model\.norm\.weight.*I8 .*F32.*Dequantise"):
        load(copy(tensors=edit))


def write_safetensors(path, tensors):
    """{name: (dtype, shape, bytes)} in the format's own words, for dtypes numpy has not."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "dtype, size",
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("U8", 1), ("I64", 8), ("BOOL", 1)],
)
def test_a_dtype_that_is_not_read_is_refused_before_any_tensor_is_read(
    copy, dtype, size, monkeypatch
):
    path = copy()
    tensors = {k: ("F32", v.shape, v.tobytes()) for k, v in load_file(path / NAME).items()}  # fmt: skip
    tensors["model.norm.weight"] = (dtype, [32], bytes(32 * size))
    write_safetensors(path / NAME, tensors)

    def never(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(load_module, "_assemble", never)
    with pytest.raises(ValueError, match=rf"model\.norm\.weight in .* has dtype {dtype} "):  # fmt: skip
        load(path)


def test_float64_and_float16_are_read(copy):
    for dtype in (np.float64, np.float16):
        path = copy(tensors=lambda x, d=dtype: {k: v.astype(d) for k, v in x.items()})
        want = np.asarray(load(GOLDEN / "llama_tied").params["embed"]).astype(dtype)
        got = load(path).params["embed"]
        np.testing.assert_array_equal(got, want.astype(np.float32))
        shutil.rmtree(path)


def test_what_is_never_read_may_have_any_dtype(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = copy(tensors=lambda x: {**x, name: np.ones(6, np.int64)})
    equal(load(path).params, load(GOLDEN / "llama_tied").params)


def test_tied_head_stored_twice_is_accepted_only_if_equal(copy):
    def same(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}

    def other(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    path = copy(tensors=same)
    equal(load(path).params, load(GOLDEN / "llama_tied").params)
    shutil.rmtree(path)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from its model\.embed"
    ):
        load(copy(tensors=other))


def test_rotary_buffers_of_old_llamas_are_no_parameters(copy):
    def edit(tensors):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        return {**tensors, name: np.ones(6, np.float32)}

    equal(load(copy(tensors=edit)).params, load(GOLDEN / "llama_tied").params)


def test_reward_model_needs_no_language_model_head(copy):
    lm = load(copy("llama_reward", tie_word_embeddings=False))
    assert lm.config.tied and lm.config.value_head
    assert lm.params["value_head"]["kernel"].shape == (32,)


def test_multimodal_gemma3_gives_its_language_model(copy, caplog):
    text = json.loads((GOLDEN / "gemma3" / "config.json").read_text())

    def edit(tensors):
        tensors = {f"language_model.{k}": v for k, v in tensors.items()}
        return {**tensors, "vision_tower.x.weight": np.zeros(3, np.float32)}

    path = copy("gemma3", tensors=edit)
    config = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    (path / "config.json").write_text(json.dumps(config))
    lm = load(path)
    equal(lm.params, load(GOLDEN / "gemma3").params)
    assert lm.config.eos_ids == (1, 106)
    assert "1 tensors of its vision tower are not loaded" in caplog.text


def test_end_of_turn_ids_of_generation_config_are_kept(copy):
    path = copy()
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert load(path).config.eos_ids == (2, 9)


def test_truncated_file_is_named(copy):
    path = copy()
    data = (path / NAME).read_bytes()
    for end in (0, 5, 200, len(data) - 1):
        (path / NAME).write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load(path)


def test_broken_directories_are_described(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        load(tmp_path / "nowhere")
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a directory nor a \.gguf"):
        load(tmp_path / "file.bin")
    path = copy()
    (path / NAME).rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"found: .*pytorch_model\.bin"):
        load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(path)


def test_index_that_promises_too_much_is_an_error(copy):
    path = copy("llama_untied")
    shard = "model-00002-of-00003.safetensors"
    tensors = load_file(path / shard)
    lost = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != lost}, path / shard)
    with pytest.raises(ValueError, match=f"promises {lost}, but no shard has it"):
        load(path)
    (path / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        load(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load(path)


def test_a_refused_config_is_named_with_its_path(copy):
    path = copy(model_type="mamba")
    with pytest.raises(ValueError, match=f"{path}: unknown architecture 'mamba'"):
        load(path)


# ---- .gguf


def write_gguf(path, name, *, arch, permuted=False, extra=None, skip=(), metadata=None):
    """A Hugging Face fixture as llama.cpp's converter would write it, in float32."""
    library = pytest.importorskip("gguf")
    hf = json.loads((GOLDEN / name / "config.json").read_text())
    lm = load(GOLDEN / name)
    w = library.GGUFWriter(path, arch)
    w.add_context_length(hf["max_position_embeddings"])
    w.add_embedding_length(hf["hidden_size"])
    w.add_block_count(hf["num_hidden_layers"])
    w.add_feed_forward_length(hf["intermediate_size"])
    w.add_head_count(hf["num_attention_heads"])
    w.add_head_count_kv(hf["num_key_value_heads"])
    w.add_key_length(hf["head_dim"])
    if "attention.value_length" not in (metadata or {}):
        w.add_value_length(hf["head_dim"])
    w.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    w.add_rope_freq_base(lm.config.rope_theta)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        kinds = {int: w.add_uint32, float: w.add_float32, str: w.add_string}
        kinds[type(value)](f"{arch}.{key}", value)
    names = families.hf_names(lm.config)
    back = {
        names[p].format(i): (p, gguf.NAMES[p].format(i))
        for p in tree_shapes(lm.config)
        for i in range(lm.config.num_layers)
    }
    tensors = {}
    for file in sorted((GOLDEN / name).glob("*.safetensors")):
        tensors |= load_file(file)
    for hf_name, value in tensors.items():
        p, gguf_name = back[hf_name]
        if permuted and p.startswith(("blocks/attn/q/", "blocks/attn/k/")):
            heads = hf["num_attention_heads" if "/q/" in p else "num_key_value_heads"]
            half = value.shape[0] // heads // 2
            value = (
                value.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(value.shape)
            )
        if arch.startswith("gemma") and p.endswith("norm/scale"):
            value = value + 1
        if gguf_name not in skip:
            w.add_tensor(gguf_name, np.ascontiguousarray(value))
    for key, value in (extra or {}).items():
        w.add_tensor(key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize(
    "name, arch, metadata",
    [
        ("llama_untied", "llama", {}),
        ("mistral", "llama", {"attention.sliding_window": 6}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("olmo2", "olmo2", {}),
        (
            "yarn",
            "llama",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 4.0,
                "rope.scaling.yarn_beta_slow": 0.5,
                "rope.scaling.yarn_ext_factor": 1.0,
            },
        ),
        ("llama_biases", "llama", {"use_parallel_residual": 0}),
        ("gemma", "gemma", {}),
        (
            "gemma2",
            "gemma2",
            {
                "attention.sliding_window": 6,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 4.0,
            },
        ),
        (
            "gemma3",
            "gemma3",
            {
                "attention.sliding_window": 6,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 4.0,
            },
        ),
    ],
)
def test_gguf_holds_the_same_model(tmp_path, name, arch, metadata):
    path = tmp_path / "model.gguf"
    write_gguf(path, name, arch=arch, permuted=arch == "llama", metadata=metadata)
    got, want = load(path), load(GOLDEN / name)
    # offsets of Gemma's norms lose the last bits by way of 1 + w
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, got.params, want.params)
    g, w = vars(got.config).copy(), vars(want.config).copy()
    assert g.pop("norm_eps") == pytest.approx(w.pop("norm_eps"))
    if arch in ("gemma2", "gemma3"):  # llama.cpp takes these from the family's sizes
        assert g.pop("query_scale") == 12 and w.pop("query_scale") == 20
    if arch == "gemma3":
        for field in ("local_layers", "rope_theta_local"):
            g.pop(field), w.pop(field)
        assert got.config.local_layers == (True,) * 4  # every sixth is global
        assert got.config.rope_theta_local == 10_000.0
    if name == "yarn":  # llama.cpp has no other factor of cos and sin, and truncates
        factor = 1 + 0.1 * np.log(8.0)
        assert g.pop("rope_scaling") == ("yarn", 8.0, 32.0, factor, 4.0, 0.5, True)
        w.pop("rope_scaling")
    if name == "llama_biases":  # llama.cpp has no dynamic scaling
        assert g.pop("rope_scaling") is None and w.pop("rope_scaling")
    if name == "llama_untied":
        assert g.pop("eos_ids") == (2,) and w.pop("eos_ids") == (2, 3)
    assert g == w


def test_gguf_of_smollm3_leaves_out_rope_in_every_fourth_layer(tmp_path, copy):
    plain = {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False}
    folder = copy("smollm3", **plain, layer_types=None, sliding_window=None)
    path = write_gguf(tmp_path / "m.gguf", folder, arch="smollm3", permuted=True)
    got, want = load(path), load(folder)
    equal(got.params, want.params)
    assert got.config.rope_layers == (True, True, True, False)
    eps = {"norm_eps": want.config.norm_eps}  # float32 in the file
    assert dataclasses.replace(got.config, **eps) == want.config


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention.scale", 0.5), ("attention.value_length", 8), ("logit_scale", 2.0),
        ("rope.scaling.yarn_attn_factor", 1.5), ("rope.scale_linear", 2.0),
        ("attn_logit_softcapping", 50.0), ("future.key", "x"),
    ],
)  # fmt: skip
def test_unknown_metadata_of_gguf_is_refused_by_name(tmp_path, key, value):
    path = write_gguf(
        tmp_path / "m.gguf", "llama_tied", arch="llama", metadata={key: value}
    )
    with pytest.raises(ValueError, match=rf"metadata llama\.{key}=.*not known"):
        load(path)


def test_metadata_of_gguf_that_changes_nothing_is_accepted(tmp_path):
    metadata = {
        "vocab_size": 96, "tensor_data_layout": "Meta AI original pth", "expert_used_count": 0,
        "rope.scaling.finetuned": 1, "rope.scaling.attn_factor": 1.0, "attention.clamp_kqv": 0.0,
        "attention.layer_norm_epsilon": 1e-5, "pooling_type": 3,
    }  # fmt: skip
    path = write_gguf(
        tmp_path / "m.gguf", "llama_tied", arch="llama", metadata=metadata
    )
    assert load(path).config.rope_scaling is None


def test_gguf_llama3_frequencies_give_back_their_rule(tmp_path):
    # the divisors that llama.cpp's converter stores for Llama 3.2, head size 12, base 5e5
    wavelength = 2 * np.pi * 500_000.0 ** (np.arange(0, 12, 2) / 12)
    factors = []
    for x in wavelength:
        if x < 8192 / 4.0:
            factors.append(1.0)
        elif x > 8192 / 1.0:
            factors.append(32.0)
        else:
            smooth = (8192 / x - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 32.0 + smooth))
    assert 1.0 < sorted(set(factors))[1] < 32.0
    factors = np.array(factors, np.float32)
    meta = {"rope.freq_base": 500_000.0}
    write = lambda path, f: write_gguf(  # noqa: E731
        path, "llama_untied", arch="llama", permuted=True, metadata=meta,
        extra={"rope_freqs.weight": f},
    )  # fmt: skip
    lm = load(write(tmp_path / "a.gguf", factors))
    assert lm.config.rope_scaling == ("llama3", 32.0, 1.0, 4.0, 8192.0)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        load(write(tmp_path / "b.gguf", factors * 1.1))


def test_gguf_refusals_name_what_is_wrong(tmp_path):
    a = write_gguf(
        tmp_path / "a.gguf", "qwen2", arch="qwen2", skip=("blk.1.attn_k.bias",),
        extra={"blk.0.mystery.weight": np.ones(3, np.float32)},
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"lacks blk\.1\.attn_k\.bias.*blk\.0\.mystery"
    ):
        load(a)
    b = write_gguf(tmp_path / "b.gguf", "qwen2", arch="phi3")
    with pytest.raises(ValueError, match=r"'phi3'.*known: llama"):
        load(b)
    moe = write_gguf(
        tmp_path / "c.gguf", "llama_tied", arch="llama", metadata={"expert_count": 8}
    )
    with pytest.raises(ValueError, match="mixture of experts"):
        load(moe)
    rope = write_gguf(
        tmp_path / "d.gguf", "llama_tied", arch="llama",
        metadata={"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
    )  # fmt: skip
    with pytest.raises(ValueError, match="'longrope'"):
        load(rope)
    data = (tmp_path / "a.gguf").read_bytes()
    for end in (0, 100, len(data) // 2, len(data) - 100):
        (tmp_path / "a.gguf").write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"a\.gguf is damaged or not GGUF"):
            load(tmp_path / "a.gguf")


def test_gguf_without_its_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        load(GOLDEN / "llama_gguf" / "model.gguf")
