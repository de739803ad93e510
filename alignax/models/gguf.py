"""Reads llama.cpp's .gguf files: metadata as a config.json, tensors dequantised.

Three conventions differ from transformers and are converted here. The architectures `llama`
and `smollm3` store the rows of q and k with the two RoPE halves interleaved. Gemma's norms are stored as
the factor instead of its offset from 1. Llama 3's RoPE scaling is stored as the resulting
divisors of the frequencies instead of its parameters. Metadata of the architecture that is not known is an error.
"""

import math
import mmap
import os
import pathlib
import struct
from functools import partial
from typing import Any

import numpy as np

from alignax.models import families, sizes
from alignax.models.json_object import one_line
from alignax.models.stored import Tensor, read_at

_INTERLEAVED = ("llama", "smollm3")  # architectures
# Metadata `<architecture>.<key>` that `_config` reads.
_READ = {
    "embedding_length", "block_count", "attention.head_count", "attention.head_count_kv",
    "feed_forward_length", "context_length", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.sliding_window", "attention.causal",
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "expert_count",
}  # fmt: skip
_READ_OF = {  # the same, of one architecture
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {"attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa"},
}  # fmt: skip
# Metadata that does not change what these decoders compute.
_HARMLESS = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count",
    "attention.layer_norm_epsilon", "pooling_type",
}  # fmt: skip
_NEUTRAL = {  # metadata that is not read -> the value that changes nothing
    "rope.scale_linear": 1.0, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip

# (factor, low, high, length) of Llama 3.1 and 3.2: llama.cpp keeps only what they result in
_LLAMA3_RULES = ((8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0))

# of a header: bytes of a value by its type, two other types, and most axes of a tensor
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4  # most axes of a tensor

NAMES = {  # path in our tree -> name in a .gguf file
    "embed": "token_embd.weight",
    "blocks/attn_norm/scale": "blk.{}.attn_norm.weight",
    **{
        f"blocks/attn/{p}/{kind}": f"blk.{{}}.attn_{name}.{suffix}"
        for p, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
        for kind, suffix in (("kernel", "weight"), ("bias", "bias"))
    },
    "blocks/attn/q_norm/scale": "blk.{}.attn_q_norm.weight",
    "blocks/attn/k_norm/scale": "blk.{}.attn_k_norm.weight",
    "blocks/post_attn_norm/scale": "blk.{}.post_attention_norm.weight",
    "blocks/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "blocks/post_mlp_norm/scale": "blk.{}.post_ffw_norm.weight",
    **{
        f"blocks/mlp/{p}/{kind}": f"blk.{{}}.ffn_{p}.{suffix}"
        for p in ("gate", "up", "down")
        for kind, suffix in (("kernel", "weight"), ("bias", "bias"))
    },
    "norm/scale": "output_norm.weight",
    "head": "output.weight",
}


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Opens a .gguf file.

    Returns:
      Its metadata under the keys of config.json, and tensors that are dequantised to
      float32 [out, in] where they are read.

    Raises:
      ImportError: the `gguf` package is not installed.
      ValueError: the file is damaged, metadata may change what the model computes and is
        not known, or a tensor has an unknown quantisation.
    """
    try:
        import gguf
    except ImportError as e:
        raise ImportError(
            f"reading {path} needs the gguf package: pip install gguf"
        ) from e
    check_header(path)
    try:
        file = gguf.GGUFReader(path)
        meta = {
            k: f.contents()
            for k, f in file.fields.items()
            if not k.startswith("tokenizer.")
        }
        tensors = {t.name: t for t in file.tensors}
        tokens = {
            k: file.fields[f"tokenizer.ggml.{k}_token_id"].contents()
            for k in ("bos", "eos", "eot")
            if f"tokenizer.ggml.{k}_token_id" in file.fields
        }
    except (ValueError, LookupError, OSError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged or not GGUF: {one_line(e)}") from e
    arch = meta.get("general.architecture")
    family = next((n for n, f in families.FAMILIES.items() if f.gguf == arch), arch)
    if arch == "llama" and f"{arch}.attention.sliding_window" in meta:
        family = "mistral"
    try:
        for k, value in tokens.items():
            name = f"tokenizer.ggml.{k}_token_id"
            sizes.number(name, value, -(2**31), 2**32 - 1, whole=True)
        hf = _config(family, arch, meta, tensors, tokens)
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ValueError(f"{path} is damaged: {one_line(e)}") from e
    if arch and family in families.FAMILIES:
        _check_metadata(meta, arch, hf["head_dim"], path)

    def tensor(name: str) -> Tensor:
        t, heads = tensors[name], 0
        if arch in _INTERLEAVED and (".attn_q." in name or ".attn_k." in name):
            key = "num_attention_heads" if "_q." in name else "num_key_value_heads"
            heads = hf[key]
        offset = arch in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight")
        shape = tuple(int(n) for n in reversed(t.shape))
        rows = partial(_rows, path, name, t, shape, heads, offset)
        return Tensor(shape, t.tensor_type.name, rows)

    if "rope_freqs.weight" in tensors:
        hf["rope_scaling"] = _llama3_scaling(tensor("rope_freqs.weight")(), hf, path)
        del tensors["rope_freqs.weight"]
    return hf, {name: tensor(name) for name in tensors}


def _rows(
    path: pathlib.Path, name: str, tensor: Any, shape: tuple[int, ...], heads: int,
    offset: bool, first: int, last: int,
) -> np.ndarray:  # fmt: skip
    """Some rows of a tensor in float32, as transformers has them.

    Args:
      path: the file.
      name: of the tensor.
      tensor: its description by `gguf`.
      shape: as [out, in].
      heads: whose rows are interleaved; 0 leaves the rows as they are.
      offset: whether it holds a factor of which transformers stores the offset from 1.
      first: row.
      last: row after the last.
    """
    import gguf

    per = shape[0] // heads if heads else 1  # whole heads are read
    a, b = first // per * per, -(-last // per) * per
    if len(shape) == 1:  # its quantised blocks are not parted
        a, b = 0, shape[0]
    each = int(tensor.n_bytes) // max(shape[0], 1)
    raw = read_at(path, int(tensor.data_offset) + a * each, (b - a) * each)
    raw = raw if len(shape) == 1 else raw.reshape(b - a, -1)
    try:
        value = gguf.quants.dequantize(raw, tensor.tensor_type)
    except (NotImplementedError, ValueError, LookupError, TypeError) as e:
        raise ValueError(
            f"tensor {name} in {path} is {tensor.tensor_type.name}: {e}"
        ) from e
    if heads:
        value = _unpermute(value, (b - a) // per)
    value = value[first - a : last - a]
    return value - 1 if offset else value


def _config(
    family: str | None,
    arch: str | None,
    meta: dict[str, Any],
    tensors: dict[str, Any],
    tokens: dict[str, int],
) -> dict[str, Any]:
    """llama.cpp's metadata as a config.json."""

    def get(key, default=None):
        return meta.get(f"{arch}.{key}", default)

    if "token_embd.weight" in tensors:  # ids that no token has are left out
        many = int(tensors["token_embd.weight"].shape[-1])
        tokens = {k: i for k, i in tokens.items() if 0 <= i < many}
    hf: dict[str, Any] = {"model_type": family}
    if family not in families.FAMILIES:
        return hf  # from_hf names it and lists what is known
    hf |= {
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get(
            "attention.head_count_kv", get("attention.head_count")
        ),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_experts": get("expert_count"),
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": list(
            dict.fromkeys(tokens[k] for k in ("eos", "eot") if k in tokens)
        ),
    }
    if "token_embd.weight" in tensors:
        hf["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    width, heads = hf["hidden_size"] or 0, hf["num_attention_heads"] or 1
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    hf["head_dim"] = head_dim
    hf["partial_rotary_factor"] = get("rope.dimension_count", head_dim) / head_dim
    if get("rope.scaling.type", "none") != "none":
        hf["rope_scaling"] = {
            "rope_type": get("rope.scaling.type"),
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get(
                "rope.scaling.original_context_length"
            ),
        }
        for key in ("beta_fast", "beta_slow"):
            hf["rope_scaling"][key] = get(f"rope.scaling.yarn_{key}")
    hf["use_bidirectional_attention"] = get("attention.causal") is False
    if "attention_bias" in families.FAMILIES[family].reads:
        hf["attention_bias"] = "blk.0.attn_output.bias" in tensors
    hf["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    if get("attention.sliding_window"):
        hf["sliding_window"] = get("attention.sliding_window")
    if family in ("gemma2", "gemma3_text"):
        # llama.cpp recognises the 27B models by their depth; their scores are scaled otherwise
        big = (arch, hf["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62))
        hf["query_pre_attn_scalar"] = width // heads if big else head_dim
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if get(key) is not None:
                hf[key] = get(key)
    if family == "gemma3_text":
        hf["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
    return hf


def _check_metadata(
    meta: dict[str, Any], arch: str, head_dim: int, path: pathlib.Path
) -> None:
    """Raises ValueError for metadata of the architecture that has a value and is not read."""
    known = _READ | _HARMLESS | _READ_OF.get(arch, set())
    sizes_of_heads = ("value_length", "key_length_swa", "value_length_swa")
    neutral = {**_NEUTRAL, **{f"attention.{k}": head_dim for k in sizes_of_heads}}
    neutral["rope.dimension_count_swa"] = head_dim
    for name, value in meta.items():
        key = name.removeprefix(f"{arch}.")
        if key == name or key in known or not value or value == neutral.get(key):
            continue
        raise ValueError(
            f"{path} has the metadata {name}={sizes.brief(value)}, which is not known and "
            "may change what the model computes; convert the Hugging Face checkpoint's "
            "own directory instead"
        )


def _unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the two RoPE halves of each head's rows."""
    half = value.shape[0] // heads // 2
    return value.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(value.shape)


def _llama3_scaling(
    factors: np.ndarray, hf: dict[str, Any], path: pathlib.Path
) -> dict[str, Any]:
    """The Llama 3 RoPE scaling that gives a file's rope_freqs.weight (divisors)."""
    freq = hf["rope_theta"] ** (-np.arange(0, hf["head_dim"], 2) / hf["head_dim"])
    for factor, low, high, length in _LLAMA3_RULES:
        turns = length * freq / (2 * np.pi)  # rotations within the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        expected = 1 / (smooth + (1 - smooth) / factor)
        same = factors.shape == expected.shape
        if same and np.allclose(factors, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise ValueError(
        f"tensor rope_freqs.weight in {path} is not Llama 3.1's or 3.2's: "
        "other frequency scalings are not supported"
    )


def check_header(path: pathlib.Path) -> None:
    """Checks that every length which the header of a file states fits into it.

    The library that reads these files trusts them: an array of 2^60 entries would be read
    for ever.

    Raises:
      ValueError: a length does not fit; the file is named.
    """
    try:
        if not os.path.getsize(path):
            raise ValueError("it is empty")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _walk(data, len(data))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is damaged or not GGUF: {error}") from error


def _walk(data: mmap.mmap, size: int) -> None:
    magic, version, tensors, fields = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}")
    at = 24
    for _ in range(_fits(fields, 13, size - at, "fields")):
        at = _string(data, at, size)
        (kind,) = struct.unpack_from("<I", data, at)
        at = _value(data, at + 4, size, kind)
    for _ in range(_fits(tensors, 24, size - at, "tensors")):
        at = _string(data, at, size)
        (axes,) = struct.unpack_from("<I", data, at)
        if axes > _DIMENSIONS:
            raise ValueError(f"a tensor has {axes} axes")
        *shape, _, place = struct.unpack_from(f"<{axes}QIQ", data, at + 4)
        at += 16 + 8 * axes
        _fits(math.prod(shape), 1 / 8, size, "numbers of a tensor")  # a bit at least
        _fits(place, 1, size, "bytes before a tensor")


def _value(data: mmap.mmap, at: int, size: int, kind: int) -> int:
    """The place behind a value."""
    if kind == _STRING:
        return _string(data, at, size)
    if kind != _ARRAY:
        return at + _size_of(kind)
    inner, many = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner == _STRING:
        for _ in range(_fits(many, 8, size - at, "texts of an array")):
            at = _string(data, at, size)
        return at
    return at + _fits(many, _size_of(inner), size - at, "values of an array") * _size_of(inner)  # fmt: skip


def _string(data: mmap.mmap, at: int, size: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return at + 8 + _fits(length, 1, size - at - 8, "bytes of a text")


def _size_of(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a field has the unknown type {kind}")
    return _SIZES[kind]


def _fits(many: int, each: float, left: int, what: str) -> int:
    if many * each > left:
        raise ValueError(f"it states {many} {what}, and {max(left, 0)} bytes are left")
    return many
