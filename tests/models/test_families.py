"""models/families.py: config.json in its old and new spellings, and what is refused."""

import json
import pathlib

import pytest

from alignax.models.families import FAMILIES, from_hf, to_hf

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NAMES = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def read(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def in_the_old_style(hf):
    """As transformers 4 wrote it: flat RoPE keys, no layer_types, fewer defaults."""
    hf = dict(hf)
    rope = hf.pop("rope_parameters")
    if "full_attention" in rope:
        hf["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    hf["rope_theta"] = rope["rope_theta"]
    hf["rope_scaling"] = None
    if rope["rope_type"] != "default":
        hf["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if hf["model_type"] != "smollm3":  # younger than layer_types
        hf.pop("layer_types", None)
    hf.pop("_sliding_window_pattern", None)
    if hf["model_type"].startswith("gemma"):
        assert hf.pop("tie_word_embeddings")  # left out: it is these families' default
    return hf


@pytest.mark.parametrize("name", NAMES)
def test_old_and_new_spellings_mean_the_same(name):
    assert from_hf(in_the_old_style(read(name))) == from_hf(read(name))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_again(name):
    config = from_hf(read(name))
    hf = to_hf(config)
    assert from_hf(hf) == config
    assert from_hf(in_the_old_style(hf)) == config


@pytest.mark.parametrize("eos, ids", [(None, ()), (0, (0,)), ([0, 3], (0, 3))], ids=str)
def test_end_ids_survive_in_every_spelling(eos, ids):
    config = from_hf({**read("llama_tied"), "eos_token_id": eos, "bos_token_id": 0})
    assert (config.eos_ids, config.bos_id) == (ids, 0)
    assert to_hf(config)["eos_token_id"] == eos
    assert from_hf(to_hf(config)) == config


def test_rope_type_may_be_called_type():
    hf = in_the_old_style(read("llama_tied"))
    hf["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert from_hf(hf).rope_scaling == ("linear", 2.0)


# config.json of published checkpoints, shortened to what decides the computation
PUBLISHED = {
    "SmolLM2-135M": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
            "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "vocab_size": 49152, "eos_token_id": 2,
        },
        {"head_dim": 64, "tied": True, "rope_theta": 1e5, "window": None, "eos_ids": (2,)},
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "head_dim": 64,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "tie_word_embeddings": True, "vocab_size": 128256, "attention_bias": False, "mlp_bias": False,
            "eos_token_id": [128001, 128008, 128009], "bos_token_id": 128000,
        },
        {"rope_scaling": ("llama3", 32.0, 1.0, 4.0, 8192.0), "eos_ids": (128001, 128008, 128009)},
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        {"window": 4096, "local_layers": (True,) * 32, "tied": False},
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32768,
        },
        {"window": None, "local_layers": ()},
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1e6,
            "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        {"qkv_bias": True, "window": None, "head_dim": 64},
    ),
    "Qwen2-with-window": (
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 64,
            "max_position_embeddings": 64, "max_window_layers": 1, "num_attention_heads": 4,
            "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1e6,
            "sliding_window": 16, "use_sliding_window": True, "tie_word_embeddings": True, "vocab_size": 64,
        },
        {"window": 16, "local_layers": (False, True, True)},
    ),
    "gemma-2b": (
        {
            "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
            "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192,
            "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "vocab_size": 256000,
        },
        {"activation": "gelu_tanh", "tied": True, "norm_offset": True, "embed_scale": True},
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304,
            "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 9216,
            "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
        },
        {
            "local_layers": (True, False) * 13, "window": 4096, "attn_softcap": 50.0, "final_softcap": 30.0,
            "query_scale": 256.0, "post_norms": True, "qk_norm": False, "rope_theta_local": None,
        },
    ),
    "SmolLM3-3B": (
        {
            "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
            "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
            "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
            "transformers_version": "4.54.0", "use_cache": False, "use_sliding_window": False,
            "vocab_size": 128256,
        },
        {"rope_layers": (True, True, True, False) * 9, "tied": True, "rope_theta": 5e6, "window": None},
    ),
    "OLMo-2-0425-1B": (
        {
            "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2",
            "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16,
            "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
            "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.47.0",
            "use_cache": True, "vocab_size": 100352,
        },
        {"pre_norms": False, "post_norms": True, "qk_norm_whole": True, "norm_offset": False, "tied": False},
    ),
    "Qwen2.5-7B-with-YaRN": (
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
            "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1e6,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            "sliding_window": 131072, "use_sliding_window": False, "vocab_size": 152064, "use_mrope": False,
        },
        {"rope_scaling": ("yarn", 4.0, 32768.0, 1.138629436111989, 32.0, 1.0, True), "window": None},
    ),
    "gemma-3-4b": (
        {
            "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152}, "mm_tokens_per_image": 256,
            "boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144,
            "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.50.0",
        },
        {
            "family": "gemma3_text", "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "vocab_size": 262_208,
            "local_layers": ((True,) * 5 + (False,)) * 5 + (True,) * 4, "window": 1024, "qk_norm": True,
            "rope_theta": 1e6, "rope_theta_local": 1e4, "rope_scaling": ("linear", 8.0),
            "attn_softcap": None, "final_softcap": None, "query_scale": 256.0, "eos_ids": (1, 106), "tied": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    hf, expected = PUBLISHED[name]
    config = from_hf(hf)
    assert {k: getattr(config, k) for k in expected} == expected


def test_unknown_architecture_is_named_with_the_known_ones():
    with pytest.raises(ValueError) as e:
        from_hf({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    assert "'mamba'" in str(e.value) and "MambaForCausalLM" in str(e.value)
    assert all(name in str(e.value) for name in FAMILIES)
    with pytest.raises(ValueError, match="unknown architecture None"):
        from_hf({})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_act": "relu2"}, "'relu2'; known: silu"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "low_freq_factor",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"attention_bias": 2}, "attention_bias is 2, expected true or false"),
        ({"mlp_bias": "no"}, "mlp_bias is 'no', expected true or false"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 2},
            "more than one label",
        ),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf({**read("llama_tied"), **change})


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("llama_tied", "no_rope_layers", [1, 0]), ("llama_tied", "use_qk_norm", True),
        ("llama_tied", "clip_qkv", 8.0), ("llama_tied", "sliding_window", 16),
        ("llama_tied", "query_pre_attn_scalar", 16), ("llama_tied", "per_layer_config", {"0": {}}),
        ("llama_tied", "logits_scaling", 2.0), ("llama_tied", "pruned_heads", {"0": [1]}),
        ("qwen2", "attention_bias", True), ("mistral", "mlp_bias", True),
        ("gemma2", "rope_local_base_freq", 100.0), ("olmo2", "no_rope_layer_interval", 4),
    ],
)  # fmt: skip
def test_an_unknown_key_with_a_value_is_refused_by_name(name, key, value):
    hf = read(name)
    with pytest.raises(ValueError) as e:
        from_hf({**hf, key: value})
    assert f"config.json has {key}={value!r}" in str(e.value)
    assert hf["model_type"] in str(e.value) and "remove it" in str(e.value)
    for nothing in (None, False, 0, [], {}, ""):
        assert from_hf({**hf, key: nothing}) == from_hf(hf)


def test_layer_types_that_a_family_does_not_read_are_refused():
    hf = {**read("llama_tied"), "layer_types": ["full_attention"] * 2}
    assert from_hf(hf) == from_hf(read("llama_tied"))
    hf["layer_types"] = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layer_types .* a llama model does not read"):
        from_hf(hf)


def test_keys_that_change_nothing_are_accepted():
    more = {
        "transformers_version": "4.31.0", "_name_or_path": "x/y", "torch_dtype": "float16",
        "use_cache": True, "initializer_range": 0.02, "pretraining_tp": 2, "pad_token_id": 3,
        "attention_dropout": 0.1, "auto_map": {"AutoModel": "x.Y"}, "do_sample": True,
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 4096, "is_llama_config": True,
        "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}, "max_window_layers": 21,
        "unsloth_version": "2025.1", "cache_implementation": "hybrid", "return_dict": True,
        "_attn_implementation_autoset": True, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    assert from_hf({**read("llama_tied"), **more}) == from_hf(read("llama_tied"))


def test_layers_without_rope_are_every_nth_or_those_listed():
    hf = {**read("smollm3"), "layer_types": None, "no_rope_layers": None}
    assert from_hf(hf).rope_layers == (True, True, True, False)
    assert from_hf(hf).local_layers == (False, False, False, True)
    assert from_hf({**hf, "no_rope_layer_interval": 5}).rope_layers == ()
    assert from_hf({**hf, "no_rope_layers": [1, 1, 0, 1, 0]}).rope_layers[2:] == (
        False,
        True,
    )
    for flags, message in (
        ([1], "1 entries for 4 layers"),
        ([1, 2, 1, 1], "expected a list of 0 and 1"),
        ("1111", "expected a list of 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            from_hf({**hf, "no_rope_layers": flags})
    with pytest.raises(ValueError, match="no_rope_layer_interval is 0"):
        from_hf({**hf, "no_rope_layer_interval": 0})


def test_scaled_local_rope_is_refused():
    hf = read("gemma3")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    hf["rope_parameters"] = {**hf["rope_parameters"], "sliding_attention": rope}
    with pytest.raises(ValueError, match="'linear' on local layers"):
        from_hf(hf)


def test_keys_of_other_families_and_null_are_read_as_transformers_does():
    known = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    more = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    more["layer_types"] = None
    assert all(from_hf({**known, **more}).local_layers)
    assert from_hf({**known, "tie_word_embeddings": None}).tied is False
    exaone = {"model_type": "exaone4", "sliding_window_pattern": "LLLG"}
    with pytest.raises(ValueError, match="unknown architecture 'exaone4'"):
        from_hf(exaone)


def test_the_window_of_the_first_gemma_2_files_is_the_same_under_both_names():
    hf = {**read("gemma2"), "sliding_window": 8}
    assert from_hf({**hf, "sliding_window_size": 8}) == from_hf(hf)
    with pytest.raises(
        ValueError, match=r"sliding_window_size=16 and sliding_window=8"
    ):
        from_hf({**hf, "sliding_window_size": 16})
