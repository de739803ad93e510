"""Makes the golden logits: tiny random checkpoints, run by transformers on CPU in float32.

    python -m pip install torch transformers gguf
    python tests/golden/make_transformers.py

    python tests/golden/make_transformers.py olmo2 rope   # these alone

Each case becomes a directory `tests/golden/<name>/` as transformers saves it
(config.json, safetensors) with `golden.npz` (ids int32[N,T], logits float32[N,T,V]) and, for
`llama_gguf`, a `.gguf` file. `rope.json` holds frequencies and factors of RoPE scalings. The
tests only read these: they need neither torch nor a network.

The models are tiny but nothing in them is at its default: head_dim is not D/H, norm weights
are random (initial ones or zeros would hide an offset), biases are not zero, windows are
shorter than T, soft-caps bite, the norm's epsilon and the RoPE bases are visible in the fourth
digit of the logits.
"""

import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = pathlib.Path(__file__).parent
ROWS, LENGTH, VOCAB = 2, 24, 96
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-3,
    "max_position_embeddings": 256, "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def rope(theta, **scaling):
    return {"rope_theta": theta, "rope_type": "default", **scaling}


LLAMA3 = rope(
    500.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip

CASES = {
    "llama_tied": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": rope(1000.0)},
    ),
    "llama_untied": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": False, "rope_parameters": rope(10000.0), "eos_token_id": [2, 3]},
    ),
    "llama3_rope": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    ),
    "mistral": (
        transformers.MistralConfig,
        {"tie_word_embeddings": False, "rope_parameters": rope(1000.0), "sliding_window": 6},
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {"tie_word_embeddings": True, "rope_parameters": rope(1000.0)},
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {"tie_word_embeddings": False, "rope_parameters": rope(1000.0)},
    ),
    "gemma": (
        transformers.GemmaConfig,
        {
            "tie_word_embeddings": True, "rope_parameters": rope(1000.0),
            "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1,
        },
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "tie_word_embeddings": True, "rope_parameters": rope(1000.0), "sliding_window": 6,
            "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0,
            "num_hidden_layers": 3,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 20,
            "num_hidden_layers": 4, "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": rope(2000.0, rope_type="linear", factor=4.0),
                "sliding_attention": rope(100.0),
            },
        },
    ),
    "llama_biases": (  # up to its context, dynamic RoPE is plain
        transformers.LlamaConfig,
        {
            "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
            "rope_parameters": rope(1000.0, rope_type="dynamic", factor=4.0),
        },
    ),
    "yarn": (
        transformers.LlamaConfig,
        {
            "tie_word_embeddings": False,
            "rope_parameters": rope(
                500.0, rope_type="yarn", factor=8.0, original_max_position_embeddings=32,
                attention_factor=1.3, beta_fast=4.0, beta_slow=0.5, truncate=False,
            ),
        },
    ),
    "olmo2": (
        transformers.Olmo2Config,
        {"tie_word_embeddings": False, "rope_parameters": rope(1000.0)},
    ),
    "smollm3": (  # all four combinations of RoPE and window
        transformers.SmolLM3Config,
        {
            "tie_word_embeddings": True, "num_hidden_layers": 4, "pad_token_id": 0,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True, "sliding_window": 6, "rope_parameters": rope(1000.0),
            "layer_types": [
                "full_attention", "sliding_attention", "sliding_attention", "full_attention",
            ],
        },
    ),
}  # fmt: skip
SHARDED = "llama_untied"
ROPES = [  # theta, head size, scaling; max_position_embeddings is 256
    (10_000.0, 64, {"rope_type": "yarn", "factor": 4.0}),
    (1e6, 128, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    (500.0, 12, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4}),
    (500.0, 12, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "truncate": False}),
    (1e4, 32, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.2}),
    (1e4, 32, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7}),
    (1e4, 32, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0}),
    (1e4, 32, {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "beta_fast": 0, "beta_slow": None}),
    (1e4, 32, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4, "attention_factor": 0.9}),
    (1e4, 32, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 3, "beta_slow": 3, "truncate": False}),
    (1e4, 32, {"rope_type": "dynamic", "factor": 2.0}),
    (1e4, 32, {"rope_type": "linear", "factor": 3.0}),
    (5e5, 64, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
]  # fmt: skip


def randomise(model, seed):
    """Overwrites every parameter: spread-out norms, biases, and logits of order 1 to 5."""
    generator = torch.Generator().manual_seed(seed)
    offset = "gemma" in model.config.model_type  # these models store w and apply 1 + w
    for name, p in model.named_parameters():
        z = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            value = 0.3 * z + (0.0 if offset else 1.0)
        elif name.endswith("bias"):
            value = 0.5 * z
        elif "embed" in name or "lm_head" in name:
            value = 0.35 * z
        elif "score" in name:
            value = 0.3 * z
        else:
            gain = 2.0 if ("q_proj" in name or "k_proj" in name) else 1.0
            value = gain * z / p.shape[1] ** 0.5
        p.data.copy_(value)
    return model.eval()


def save(model, path, **kwargs):
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, **kwargs)
    (path / "generation_config.json").unlink(missing_ok=True)


def golden(model, path, seed):
    ids = torch.randint(
        0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        logits = model(ids).logits.float().numpy()
    np.savez_compressed(
        path / "golden.npz", ids=ids.numpy().astype(np.int32), logits=logits
    )
    print(
        f"{path.name:14s} logits std {logits.std():.2f} max {np.abs(logits).max():.2f}"
    )
    return logits


def make_hf(names):
    for seed, (name, (config_type, changes)) in enumerate(CASES.items()):
        if name not in names:
            continue
        model = transformers.AutoModelForCausalLM.from_config(
            config_type(**{**COMMON, **changes}), attn_implementation="eager"
        )
        model = randomise(model.float(), seed)
        save(model, HERE / name, max_shard_size="40KB" if name == SHARDED else "1GB")
        golden(model, HERE / name, 100 + seed)


def make_ropes():
    """Frequencies (float32) and the factor of cos and sin of each of ROPES."""
    found = []
    for theta, size, scaling in ROPES:
        asked = rope(theta, **scaling)
        config = transformers.LlamaConfig(
            **{**COMMON, "head_dim": size}, rope_parameters=dict(asked)
        )
        freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
        found.append(
            {"rope_parameters": asked, "head_dim": size, "factor": factor, "frequencies": freq.tolist()}
        )  # fmt: skip
    text = ",\n".join(json.dumps(x) for x in found)
    (HERE / "rope.json").write_text(f"[\n{text}\n]\n")


def permute(weight, heads):
    """llama.cpp's row order of q and k: the two RoPE halves interleaved in each head."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def make_gguf():
    """A llama in .gguf: F32 norms, F16, Q8_0 and Q4_1 matrices. Logits by transformers."""
    config = transformers.LlamaConfig(
        **{**COMMON, "intermediate_size": 64},
        tie_word_embeddings=True,
        rope_parameters=rope(1000.0),
    )
    model = randomise(transformers.LlamaForCausalLM(config).float(), 77)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    path = HERE / "llama_gguf"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    w = gguf.GGUFWriter(path / "model.gguf", "llama")
    w.add_name("tiny")
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(config.head_dim)
    w.add_value_length(config.head_dim)
    w.add_rope_dimension_count(config.head_dim)
    w.add_rope_freq_base(1000.0)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_vocab_size(config.vocab_size)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    kinds = gguf.GGMLQuantizationType
    kind_of = {
        "embed_tokens": ("token_embd", kinds.Q8_0),
        "norm": ("output_norm", kinds.F32),
        "input_layernorm": ("attn_norm", kinds.F32),
        "post_attention_layernorm": ("ffn_norm", kinds.F32),
        "self_attn.q_proj": ("attn_q", kinds.Q8_0),
        "self_attn.k_proj": ("attn_k", kinds.Q4_1),
        "self_attn.v_proj": ("attn_v", kinds.F16),
        "self_attn.o_proj": ("attn_output", kinds.F16),
        "mlp.gate_proj": ("ffn_gate", kinds.Q4_1),
        "mlp.up_proj": ("ffn_up", kinds.Q8_0),
        "mlp.down_proj": ("ffn_down", kinds.Q4_1),
    }
    for name, value in weights.items():
        if name == "lm_head.weight":  # tied
            continue
        name = name.removeprefix("model.").removesuffix(".weight")
        layer = None
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
        short, kind = kind_of[name]
        if short == "attn_q":
            value = permute(value, config.num_attention_heads)
        if short == "attn_k":
            value = permute(value, config.num_key_value_heads)
        full = f"blk.{layer}.{short}.weight" if layer else f"{short}.weight"
        value = np.ascontiguousarray(value, np.float32)
        w.add_tensor(full, gguf.quants.quantize(value, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()

    # transformers' own reader of the same file is the oracle: it permutes back by itself.
    read = transformers.AutoModelForCausalLM.from_pretrained(
        path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = np.asarray(read.model.layers[0].self_attn.q_proj.weight.detach())
    error = np.abs(ours - weights["model.layers.0.self_attn.q_proj.weight"]).max()
    assert error < 0.02, f"q was not permuted back: {error}"
    golden(read, path, 177)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*CASES, "llama_gguf", "rope"]
    make_hf(names)
    if "llama_gguf" in names:
        make_gguf()
    if "rope" in names:
        make_ropes()
