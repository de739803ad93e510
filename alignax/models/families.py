"""Hugging Face model families: config.json <-> ModelConfig, and the names of weights.

Each family has one small entry. `from_hf` reads both forms of transformers' config.json
(up to v4: `rope_theta`, `rope_scaling`, `sliding_window_pattern`; since v5:
`rope_parameters`, `layer_types`); `to_hf` writes both. A feature that our decoder does not
compute is an error that names it, and is never ignored; so is a key that is not known.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from alignax.models import rope, sizes
from alignax.models.transformer import HOW, ModelConfig


class Family(NamedTuple):
    """How one Hugging Face `model_type` differs from Llama."""

    architecture: str  # prefix of transformers' class names
    gguf: str  # llama.cpp's general.architecture
    fixed: dict[str, Any]  # ModelConfig fields that the family decides
    defaults: dict[str, Any]  # config.json keys that transformers leaves out
    reads: tuple[str, ...] = ()  # config.json keys that not all families have


_GEMMA = {"norm_offset": True, "embed_scale": True}
_GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "tie_word_embeddings": True, "bos_token_id": 2,
    "eos_token_id": 1,
}  # fmt: skip
_LLAMA_DEFAULTS = {"hidden_act": "silu", "tie_word_embeddings": False}
_BIAS = ("attention_bias",)
_WINDOWS = ("sliding_window", "use_sliding_window")
_GEMMA2_KEYS = (
    *_BIAS, "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "sliding_window", "sliding_window_size",
    "sliding_window_pattern", "_sliding_window_pattern",
)  # fmt: skip
_GEMMA3 = Family(
    "Gemma3",
    "gemma3",
    {**_GEMMA, "post_norms": True, "qk_norm": True},
    # transformers leaves most of the text sizes out of a multimodal config.json
    dict(
        _GEMMA_DEFAULTS, vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4,
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        max_position_embeddings=131_072, query_pre_attn_scalar=256, sliding_window=4096,
        rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6,
    ),
    (*_GEMMA2_KEYS, "rope_local_base_freq"),
)  # fmt: skip

FAMILIES = {
    "llama": Family("Llama", "llama", {}, _LLAMA_DEFAULTS, (*_BIAS, "mlp_bias")),
    "mistral": Family(
        "Mistral", "llama", {}, dict(_LLAMA_DEFAULTS, sliding_window=None), ("sliding_window",),
    ),
    "qwen2": Family("Qwen2", "qwen2", {"qkv_bias": True}, _LLAMA_DEFAULTS, _WINDOWS),
    "qwen3": Family(
        "Qwen3", "qwen3", {"qk_norm": True}, dict(_LLAMA_DEFAULTS, head_dim=128),
        (*_BIAS, *_WINDOWS),
    ),
    "smollm3": Family(
        "SmolLM3", "smollm3", {},
        dict(
            _LLAMA_DEFAULTS, tie_word_embeddings=True, num_key_value_heads=4, rope_theta=2e6,
            no_rope_layer_interval=4,
        ),
        (*_BIAS, "mlp_bias", *_WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
    ),
    "olmo2": Family(
        "Olmo2", "olmo2",
        {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True},
        dict(_LLAMA_DEFAULTS, rms_norm_eps=1e-5), _BIAS,
    ),
    "gemma": Family(
        "Gemma", "gemma", _GEMMA, _GEMMA_DEFAULTS, (*_BIAS, "hidden_activation"),
    ),
    "gemma2": Family(
        "Gemma2",
        "gemma2",
        {**_GEMMA, "post_norms": True},
        dict(
            _GEMMA_DEFAULTS, query_pre_attn_scalar=256, sliding_window=4096,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window_pattern=2,
        ),
        _GEMMA2_KEYS,
    ),
    "gemma3_text": _GEMMA3,
}  # fmt: skip

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_SPELLING = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_REFUSED = {  # config.json key -> what a value other than these asks for
    "num_experts": ((None, 0), "mixture of experts"),
    "num_local_experts": ((None, 0), "mixture of experts"),
    "quantization_config": ((None,), "a quantised checkpoint"),
    "partial_rotary_factor": ((None, 1, 1.0), "rotating only a part of each head"),
    "use_bidirectional_attention": ((None, False), "attention to later tokens"),
}
# Keys that `from_hf` reads, of all families; `Family.reads` has those of one.
_READ = {
    *_REFUSED, "model_type", "architectures", "text_config", "num_labels", "id2label",
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
    "hidden_act", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings", "bos_token_id", "eos_token_id",
    "layer_types",
    "max_window_layers",  # without use_sliding_window it means nothing
}  # fmt: skip
# Keys that do not change what the decoder computes: other token ids, how a model is stored
# and run, its training, settings of sampling, classification, the vision tower of Gemma 3,
# and marks of tools.
_HARMLESS = {
    "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "mask_token_id",
    "prefix", "tokenizer_class", "image_token_id", "image_token_index", "boi_token_index",
    "eoi_token_index", "video_token_id", "mm_tokens_per_image", "vision_config",
    "special_tokens_map", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "auto_map", "dtype", "torch_dtype", "use_cache", "use_bfloat16",
    "torchscript", "tf_legacy_loss", "is_decoder", "tie_encoder_decoder",
    "tie_last_hidden_states", "chunk_size_feed_forward", "pretraining_tp",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_experts_implementation_internal",
    "experts_implementation", "_flash_attn_2_enabled", "use_flash_attn",
    "use_flash_attention", "use_flash_attention_2", "gradient_checkpointing",
    "cache_implementation", "max_sequence_length", "max_seq_len", "model_max_length",
    "seq_length", "tokenizer_model_max_length", "return_dict", "output_hidden_states",
    "output_attentions", "output_scores", "return_dict_in_generate", "initializer_range",
    "initializer_std", "attention_dropout", "hidden_dropout", "resid_dropout",
    "embd_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "router_aux_loss_coef",
    "output_router_logits", "label2id", "problem_type", "finetuning_task",
    "task_specific_params", "classifier_dropout", "sentence_transformers", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "max_length", "min_length", "max_new_tokens", "min_new_tokens",
    "early_stopping", "max_time", "num_beams", "num_beam_groups", "diversity_penalty",
    "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
    "exponential_decay_length_penalty", "decoder_start_token_id", "penalty_alpha",
    "guidance_scale", "renormalize_logits", "sequence_bias",
    "assistant_confidence_threshold", "assistant_lookbehind", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "target_lookbehind", "transformers.js_config",
    "keys_to_ignore_at_inference", "loss_type", "output_past", "trust_remote_code",
    "n_positions", "n_ctx", "bos_token", "eos_token", "pad_token", "unk_token",
    "is_llama_config", "unsloth_version", "unsloth_fixed", "unsloth_tokenizer_class",
}  # fmt: skip

# config.json key -> the type of its value, where it is there and not null
_TYPES: dict[str, Any] = {
    "model_type": str, "architectures": list, "text_config": dict, "rope_parameters": dict,
    "rope_scaling": dict, "layer_types": list, "id2label": dict, "hidden_act": str,
    "hidden_activation": str, "full_attention": dict, "sliding_attention": dict,
    "rope_type": str, "type": str,
}  # fmt: skip
_LAYER_TYPES = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")  # they read it
_COUNTS = ("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern")
_NAMES = {  # field of ModelConfig -> what messages call it
    "width": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size", "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
    "rope_theta_local": "rope_local_base_freq", "query_scale": "query_pre_attn_scalar",
    "attn_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping",
    "qkv_bias": "attention_bias", "o_bias": "attention_bias",
    "window": "sliding_window", "bos_id": "bos_token_id", "eos_ids": "eos_token_id",
}  # fmt: skip

_BLOCK = "model.layers.{}."
HF_NAMES = {  # path in our tree -> name in a Hugging Face checkpoint
    "embed": "model.embed_tokens.weight",
    "blocks/attn_norm/scale": _BLOCK + "input_layernorm.weight",
    **{
        f"blocks/attn/{p}/{kind}": f"{_BLOCK}self_attn.{p}_proj.{name}"
        for p in "qkvo"
        for kind, name in (("kernel", "weight"), ("bias", "bias"))
    },
    "blocks/attn/q_norm/scale": _BLOCK + "self_attn.q_norm.weight",
    "blocks/attn/k_norm/scale": _BLOCK + "self_attn.k_norm.weight",
    "blocks/mlp_norm/scale": _BLOCK + "post_attention_layernorm.weight",
    **{
        f"blocks/mlp/{p}/{kind}": f"{_BLOCK}mlp.{p}_proj.{name}"
        for p in ("gate", "up", "down")
        for kind, name in (("kernel", "weight"), ("bias", "bias"))
    },
    "norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
    "value_head/kernel": "score.weight",
}
HF_POST_NORMS = {  # Gemma 2 and 3 and OLMo 2 give Llama's second norm another place
    "blocks/post_attn_norm/scale": _BLOCK + "post_attention_layernorm.weight",
    "blocks/mlp_norm/scale": _BLOCK + "pre_feedforward_layernorm.weight",
    "blocks/post_mlp_norm/scale": _BLOCK + "post_feedforward_layernorm.weight",
}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Path in our tree -> tensor name; `{}` stands for the layer."""
    return {**HF_NAMES, **HF_POST_NORMS} if config.post_norms else HF_NAMES


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which both file formats hold our parameter of one layer.

    Linear maps are stored as [out, in] with head axes merged, everything else as a vector;
    the embedding is [V, D] in the files and in our tree.

    Args:
      path: path in our tree, e.g. 'blocks/attn/q/kernel'.
      shape: shape in our tree without the layer axis.
    """
    if path == "embed":
        return shape
    if is_linear(path):
        split = input_axes(path)
        return (math.prod(shape[split:]), math.prod(shape[:split]))
    return (math.prod(shape),)


def input_axes(path: str) -> int:
    """Of the parameter of one layer: how many axes come in. `o` maps [H, K] to [D]."""
    return 2 if path == "blocks/attn/o/kernel" else 1


def is_linear(path: str) -> bool:
    """Whether the parameter is stored transposed, as [out, in]."""
    return path == "head" or path.endswith("/kernel")


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Reads a Hugging Face config.json.

    Args:
      hf: the parsed file; a multimodal Gemma 3 gives its `text_config`.

    Returns:
      The config of the decoder, float32.

    Raises:
      ValueError: an architecture or a feature that is not supported, a missing key, or an
        unknown key that has a value other than null, false, 0 or an empty one.
    """
    name, hf, value_head = _checked(hf)

    def need(key):
        if hf.get(key) is None:
            raise ValueError(f"config.json of a {name} model lacks {key!r}")
        return hf[key]

    layers, heads = need("num_hidden_layers"), need("num_attention_heads")
    known = {"num_layers": layers, "num_heads": heads, "width": need("hidden_size")}
    sizes.check(known, _NAMES)
    theta, theta_local, scaling = rope.from_hf(hf)
    turned = _rope_layers(name, hf, layers)
    local = _local_layers(name, hf, turned)
    eos = hf.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    fields = dict(
        vocab_size=need("vocab_size"),
        width=need("hidden_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or need("hidden_size") // heads,
        mlp_width=need("intermediate_size"),
        max_length=need("max_position_embeddings"),
        activation=_activation(name, hf),
        norm_eps=need("rms_norm_eps"),
        tied=False if hf["tie_word_embeddings"] is None else hf["tie_word_embeddings"],
        qkv_bias=hf.get("attention_bias") or False,
        o_bias=hf.get("attention_bias") or False,
        mlp_bias=hf.get("mlp_bias") or False,
        rope_theta=theta,
        rope_theta_local=theta_local,
        rope_scaling=scaling,
        rope_layers=() if all(turned) else turned,
        query_scale=hf.get("query_pre_attn_scalar"),
        attn_softcap=hf.get("attn_logit_softcapping"),
        final_softcap=hf.get("final_logit_softcapping"),
        window=need("sliding_window") if any(local) else None,
        local_layers=local if any(local) else (),
        value_head=value_head,
        bos_id=hf.get("bos_token_id"),
        eos_ids=tuple(eos),
    )
    sizes.check(fields, _NAMES)
    for key in ("norm_eps", "query_scale", "attn_softcap", "final_softcap"):
        fields[key] = None if fields[key] is None else float(fields[key])
    fields |= FAMILIES[name].fixed
    return ModelConfig(family=name, **fields)


def _checked(hf: dict[str, Any]) -> tuple[str, dict[str, Any], bool]:
    """(family, config.json of the decoder with defaults, whether it has a value head)."""
    _check_types(hf)
    name = hf.get("model_type")
    architectures = hf.get("architectures") or []
    value_head = any("SequenceClassification" in str(a) for a in architectures)
    if name == "gemma3" and hf.get("text_config"):
        eos = hf.get("eos_token_id", hf["text_config"].get("eos_token_id"))
        hf = {**hf, **hf["text_config"], "eos_token_id": eos}
        _check_types(hf)
        name = "gemma3_text"
    if name not in FAMILIES:
        raise ValueError(
            f"unknown architecture {sizes.brief(name)} (architectures={sizes.brief(architectures)}); "
            f"known: {', '.join(FAMILIES)}"
        )
    hf = {"rms_norm_eps": 1e-6, **FAMILIES[name].defaults, **hf}
    for key in _COUNTS:  # other families have other things under these names
        if hf.get(key) is not None:
            sizes.number(
                key,
                hf[key],
                0 if key == "max_window_layers" else 1,
                sizes.MOST,
                whole=True,
            )
    for key, (accepted, meaning) in _REFUSED.items():
        if hf.get(key) not in accepted:
            raise ValueError(
                f"config.json has {key}={sizes.brief(hf[key])}: {meaning} is not supported"
            )
    if value_head and hf.get("num_labels", len(hf.get("id2label") or "1")) != 1:
        raise ValueError("config.json has more than one label; a value head has one")
    if hf.get("sliding_window_size", hf.get("sliding_window")) != hf.get(
        "sliding_window"
    ):
        raise ValueError(  # the first files of Gemma 2 have both keys
            f"config.json has sliding_window_size={sizes.brief(hf['sliding_window_size'])} "
            f"and sliding_window={sizes.brief(hf.get('sliding_window'))}"
        )
    return name, _only_read(name, hf), value_head


def _only_read(name: str, hf: dict[str, Any]) -> dict[str, Any]:
    """The keys that a family reads; ValueError for another one that has a value."""
    read = _READ | {*FAMILIES[name].reads, *FAMILIES[name].defaults}
    for key, value in hf.items():
        if value and key not in read | _HARMLESS:
            raise ValueError(
                f"config.json has {key}={sizes.brief(value)}, which is not known for a "
                f"{name} model and may change what it computes. If it does not, remove it "
                "from config.json"
            )
    return {key: value for key, value in hf.items() if key in read}


def _check_types(hf: dict[str, Any]) -> None:
    """Raises ValueError for a value of another type than its key has."""
    names = {dict: "an object", list: "a list", str: "a text"}
    for key, value in hf.items():
        kind = _TYPES.get(key)
        if kind and value is not None and not isinstance(value, kind):
            raise ValueError(f"{key} is {sizes.brief(value)}, expected {names[kind]}")
        if kind is dict and value:
            _check_types(value)
        elif kind is list and not all(isinstance(x, str) for x in value or ()):
            raise ValueError(f"{key} is {sizes.brief(value)}, expected texts")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Writes a config.json that transformers v4 and v5 both read.

    Args:
      config: of a known family.

    Returns:
      A dict ready for json.

    Raises:
      ValueError: the family is unknown, or cannot express the config; names the fields.
    """
    c = config
    if c.family not in FAMILIES:
        raise ValueError(f"unknown family {c.family!r}; known: {', '.join(FAMILIES)}")
    family, activation = FAMILIES[c.family], _SPELLING[c.activation]
    eos: int | list[int] | None = list(c.eos_ids) or None
    if len(c.eos_ids) == 1:
        eos = c.eos_ids[0]
    if c.value_head:
        # transformers names its text-only Gemma 3 classifier after the text model
        prefix = "Gemma3Text" if c.family == "gemma3_text" else family.architecture
        architecture = f"{prefix}ForSequenceClassification"
    else:
        architecture = f"{family.architecture}ForCausalLM"
    local = _canonical(c)["local_layers"]
    rope_dict, theta_local = (
        rope.to_hf(c.rope_theta, c.rope_scaling),
        c.rope_theta_local,
    )
    if theta_local is None and c.family == "gemma3_text" and c.rope_scaling is None:
        theta_local = c.rope_theta
    hf = {
        "model_type": c.family,
        "architectures": [architecture],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_length,
        "hidden_act": activation,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope_dict if c.rope_scaling else None,
        "rope_parameters": rope_dict,
        "bos_token_id": c.bos_id,
        "eos_token_id": eos,
    }
    if c.value_head:
        hf.update(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    if "attention_bias" in family.reads:
        hf["attention_bias"] = c.o_bias
    if "mlp_bias" in family.reads:
        hf["mlp_bias"] = c.mlp_bias
    if c.family == "smollm3":
        # transformers' default pad id, which its embedding checks, may be out of range
        if c.vocab_size <= 128_004:
            hf["pad_token_id"] = None
        hf["no_rope_layers"] = [int(x) for x in c.rope_layers or (1,) * c.num_layers]
    if "sliding_window" in family.reads:
        hf["sliding_window"] = c.window
    if "use_sliding_window" in family.reads:
        hf["use_sliding_window"] = any(local)
    if c.family in ("qwen2", "qwen3"):
        hf["max_window_layers"] = local.index(True) if any(local) else c.num_layers
    if c.family in _LAYER_TYPES:
        hf["layer_types"] = [("full_attention", "sliding_attention")[x] for x in local]
    if c.family == "gemma3_text":  # for versions of transformers before layer_types
        pattern = (*local, False).index(False) + 1
        if local == tuple((i + 1) % pattern != 0 for i in range(c.num_layers)):
            hf["sliding_window_pattern"] = pattern
    if c.norm_offset:
        hf["hidden_activation"] = activation
    if c.family in ("gemma2", "gemma3_text"):
        hf.update(
            query_pre_attn_scalar=int(c.query_scale or c.head_dim),  # v5 insists
            attn_logit_softcapping=c.attn_softcap, final_logit_softcapping=c.final_softcap,
        )  # fmt: skip
    if theta_local is not None:
        inner = rope.to_hf(theta_local, None)
        hf["rope_parameters"] = {
            "full_attention": rope_dict,
            "sliding_attention": inner,
        }
        hf["rope_local_base_freq"] = theta_local
    _check_expressed(c, from_hf(hf))
    return hf


def _check_expressed(config: ModelConfig, read: ModelConfig) -> None:
    want, got = _canonical(config), _canonical(read)
    lost = [
        f"{k}={want[k]!r} (would be read as {got[k]!r})"
        for k in want
        if want[k] != got[k]
    ]
    if lost:
        raise ValueError(
            f"a {config.family} config.json cannot express {', '.join(lost)}; "
            f"families: {', '.join(FAMILIES)}"
        )


def _canonical(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what is computed, with one value for each meaning."""
    c = dataclasses.asdict(config)
    for runtime in HOW:
        del c[runtime]
    local = config.local_layers or (config.window is not None,) * config.num_layers
    c["local_layers"] = tuple(map(bool, local))
    if not any(local):
        c["window"] = c["rope_theta_local"] = None
    elif config.rope_theta_local is None and config.rope_scaling is None:
        c["rope_theta_local"] = config.rope_theta
    c["query_scale"] = float(config.query_scale or config.head_dim)
    c["rope_layers"] = () if all(config.rope_layers) else config.rope_layers
    return c


def _activation(name: str, hf: dict[str, Any]) -> str:
    value = hf.get("hidden_activation") or hf["hidden_act"]
    if value not in _ACTIVATIONS:
        raise ValueError(
            f"unknown activation {sizes.brief(value)}; known: {', '.join(_ACTIVATIONS)}"
        )
    if name.startswith("gemma") and value == "gelu":
        return "gelu_tanh"  # early Gemma files say gelu and mean its tanh form
    return _ACTIVATIONS[value]


def _rope_layers(name: str, hf: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers have RoPE: a 1 in no_rope_layers, or all but every n-th."""
    flags = hf.get("no_rope_layers")
    if name != "smollm3":
        return (True,) * layers
    if flags is None:
        every = hf["no_rope_layer_interval"]
        sizes.number("no_rope_layer_interval", every, 1, sizes.MOST, whole=True)
        return tuple((i + 1) % every != 0 for i in range(layers))
    if not isinstance(flags, list) or not all(x in (0, 1) for x in flags):
        raise ValueError(
            f"no_rope_layers is {sizes.brief(flags)}, expected a list of 0 and 1"
        )
    if len(flags) < layers:
        raise ValueError(f"no_rope_layers has {len(flags)} entries for {layers} layers")
    return tuple(map(bool, flags[:layers]))


def _local_layers(
    name: str, hf: dict[str, Any], turned: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Which layers see only a window.

    Args:
      name: of the family.
      hf: config.json with defaults.
      turned: which layers have RoPE.
    """
    layers, types = len(turned), hf.get("layer_types")
    if types is None:
        return _windows(name, hf, turned)
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"config.json has layer_types {sizes.brief(sorted(unknown))}: not supported"
        )
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for {layers} layers")
    local = tuple(t == "sliding_attention" for t in types)
    if name not in _LAYER_TYPES and local != _windows(name, hf, turned):
        raise ValueError(
            f"config.json has layer_types {sizes.brief(types)}, which a {name} model does "
            "not read: remove them to load it without"
        )
    return local


def _windows(
    name: str, hf: dict[str, Any], turned: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Which layers see only a window, where layer_types does not say it."""
    layers = len(turned)
    if name == "smollm3" and hf.get("use_sliding_window") and hf.get("sliding_window"):
        return tuple(not x for x in turned)
    if name == "mistral":
        return (hf["sliding_window"] is not None,) * layers
    if name in ("qwen2", "qwen3") and hf.get("use_sliding_window"):
        first = hf.get("max_window_layers", 28)
        return tuple(i >= first for i in range(layers))
    if name in ("gemma2", "gemma3_text"):  # every pattern-th layer is global
        pattern = hf.get("_sliding_window_pattern", hf["sliding_window_pattern"])
        return tuple((i + 1) % pattern != 0 for i in range(layers))
    return (False,) * layers
