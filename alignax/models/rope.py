"""Rotary position embeddings (RoPE): frequencies of every scaling, and their keys in config.json.

RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864. YaRN: Peng et al. 2023,
https://arxiv.org/abs/2309.00071. Linear and dynamic scaling have no paper; they are defined
by transformers' modeling_rope_utils.py, which is also the reference for YaRN's rounding.

A scaling is a tuple (kind, *numbers), so that a config stays hashable:

  ('linear', factor)
  ('dynamic', factor)
  ('llama3', factor, low_freq_factor, high_freq_factor, length)
  ('yarn', factor, length, attention_factor, beta_fast, beta_slow, truncate)

where `length` is the context of pretraining, original_max_position_embeddings.

`dynamic` raises the base for texts beyond max_position_embeddings, by the length of the text
that is read so far. The keys of a cache keep the base of the moment when they were written,
so that a position has one value in a prefill, another one in decoding, and a third one in
training. Up to max_position_embeddings it is plain RoPE. That is what is computed here, and
`check_length` refuses more.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from alignax.models import sizes

KEYS = {  # kind -> its keys in config.json, in the order of the tuple
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
        "beta_slow", "truncate",
    ),
}  # fmt: skip
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # defaults
# Keys of a rope dict that are read, or have no effect: 'finetuned' is a note of YaRN's
# authors, and linear and dynamic scaling do not read the context of pretraining.
_READ = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned",
         "original_max_position_embeddings"}  # fmt: skip


def check(scaling: Any, theta: float) -> None:
    """Checks a scaling and the base that it is used with.

    Raises:
      ValueError: an unknown kind, or numbers that it does not take.
    """
    if not scaling:
        return
    kind, *values = scaling
    if kind not in KEYS:
        raise ValueError(f"unknown rope_scaling {kind!r}; known: {', '.join(KEYS)}")
    keys = KEYS[kind]
    if len(values) != len(keys):
        raise ValueError(
            f"rope_scaling {kind!r} has {len(values)} numbers, expected {len(keys)}: "
            f"{', '.join(keys)}"
        )
    for key, value in zip(keys, values, strict=True):
        if key != "truncate":
            sizes.number(f"rope_scaling's {key}", value, 1e-6, 1e9)
        elif not isinstance(value, bool):
            raise ValueError(f"{key} is {sizes.brief(value)}, expected true or false")
    if kind == "llama3" and values[1] >= values[2]:
        raise ValueError("rope_scaling has low_freq_factor >= high_freq_factor")
    if kind == "yarn" and (values[3] < values[4] or theta <= 1):
        raise ValueError(
            f"rope type 'yarn' needs beta_fast >= beta_slow and rope_theta > 1, got "
            f"{values[3]}, {values[4]} and {theta}"
        )


def frequencies(head_dim: int, theta: float, scaling: tuple | None):
    """Radians per token of each pair of coordinates, and a factor of cos and sin.

    Args:
      head_dim: E, even.
      theta: the base.
      scaling: one of the tuples above, or None.

    Returns:
      float64 [E/2], and a number.
    """
    freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind, *values = scaling or ("default",)
    if kind == "linear":
        return freq / values[0], 1.0
    if kind == "llama3":  # low frequencies slowed by `factor`, high ones kept
        factor, low, high, length = values
        turns = length * freq / (2 * np.pi)  # rotations within the original context
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return freq * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":
        factor, length, attention_factor, fast, slow, truncate = values

        def pair(turns):  # the pair that turns so often within the original context
            return head_dim * math.log(length / (turns * 2 * math.pi)) / 2 / math.log(theta)  # fmt: skip

        low, high = pair(fast), pair(slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        kept = 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
        return freq * (kept + (1 - kept) / factor), attention_factor
    return freq, 1.0


def rotary(positions, head_dim: int, theta: float, scaling: tuple | None):
    """(cos, sin) of RoPE, each [N, T, head_dim / 2] float32."""
    freq, factor = frequencies(head_dim, theta, scaling)
    angle = positions[..., None].astype(jnp.float32) * freq.astype(np.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x, rope):
    """Applies RoPE to head vectors [N, T, H, K]; the first half pairs with the second."""
    cos, sin = (r[:, :, None, None, :] for r in rope)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    # `flip` transposes to itself; slices of the halves would be padded in the backward.
    sign = np.array([[-1.0], [1.0]], np.float32)
    y = halves * cos + jnp.flip(halves, -2) * (sign[None, None, None] * sin)
    return y.reshape(x.shape).astype(x.dtype)


def check_length(scaling: tuple | None, tokens: int, max_length: int) -> None:
    """Raises ValueError for rows of more tokens than a scaling is defined for."""
    if scaling and scaling[0] == "dynamic" and tokens > max_length:
        raise ValueError(
            f"rows of {tokens} tokens, but rope type 'dynamic' is supported up to "
            f"max_position_embeddings={max_length}: beyond it a position would have other "
            "values in a prefill, in decoding with a cache, and in training. Use shorter "
            "rows, or a checkpoint with rope type 'yarn' or 'linear'"
        )


def from_hf(hf: dict[str, Any]) -> tuple[float, float | None, tuple | None]:
    """Reads the RoPE keys of a config.json.

    Args:
      hf: the parsed file, in the form of transformers 4 (rope_theta, rope_scaling) or 5
        (rope_parameters), of one decoder.

    Returns:
      Base, base of the local layers (None: the same), scaling of the other layers.

    Raises:
      ValueError: a kind that is not supported, or a key that is missing or unknown.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local = None
    if "rope_local_base_freq" in hf:
        local = _positive("rope_local_base_freq", hf["rope_local_base_freq"])
    if "full_attention" in rope or "sliding_attention" in rope:
        inner = rope.get("sliding_attention") or {}
        if _kind(inner) != "default":
            raise ValueError(
                f"rope type {sizes.brief(_kind(inner))} on local layers is not supported"
            )
        _check_keys(inner, "default")
        base = inner.get("rope_theta", hf.get("rope_local_base_freq", 10_000.0))
        local = _positive("rope_theta of local layers", base)
        if "truncate" in {*rope, *(rope.get("full_attention") or {})}:
            raise ValueError("truncate with RoPE by layer type is not supported")
        rope = rope.get("full_attention") or {}
    theta = _positive(
        "rope_theta", rope.get("rope_theta", hf.get("rope_theta", 10_000.0))
    )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters has partial_rotary_factor: not supported")
    kind = _kind(rope)
    if kind != "default" and kind not in KEYS:
        known = ", ".join(("default", *KEYS))
        raise ValueError(
            f"rope type {sizes.brief(kind)} is not supported; known: {known}"
        )
    _check_keys(rope, kind)
    if kind == "default":
        return theta, local, None
    if hf.get("original_max_position_embeddings") is not None:
        length = hf["original_max_position_embeddings"]  # it wins in transformers
        rope = {**rope, "original_max_position_embeddings": length}
    if kind == "yarn":
        rope = _yarn(rope, hf)
    lacking = [k for k in KEYS[kind] if rope.get(k) is None]
    if lacking:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(lacking)}")
    values = (
        rope[k] if isinstance(rope[k], bool) else _positive(k, rope[k])
        for k in KEYS[kind]
    )  # fmt: skip
    scaling = (kind, *values)
    check(scaling, theta)
    return theta, local, scaling


def _yarn(rope: dict[str, Any], hf: dict[str, Any]) -> dict[str, Any]:
    """The keys of YaRN with the defaults of transformers filled in."""
    rope = {**rope, **{k: rope.get(k) or _YARN[k] for k in ("beta_fast", "beta_slow")}}
    rope["truncate"] = rope.get("truncate", True)
    if rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    if rope.get("attention_factor") is None and rope.get("factor") is not None:
        factor, above, below = _positive("factor", rope["factor"]), 1.0, 0.0
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            above, below = (_positive(k, rope[k]) for k in ("mscale", "mscale_all_dim"))
        rope["attention_factor"] = _mscale(factor, above) / _mscale(factor, below)
    return rope


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _check_keys(rope: dict[str, Any], kind: str) -> None:
    """Raises ValueError for a key that has a value and is not read."""
    read = {*_READ, *KEYS.get(kind, ())}
    if kind == "yarn":
        read |= {"mscale", "mscale_all_dim"}
    for key, value in rope.items():
        if key not in read and value and (key, value) != ("factor", 1):
            raise ValueError(
                f"the RoPE settings of config.json have {key}={sizes.brief(value)}, which "
                f"rope type {sizes.brief(kind)} is not known to read: remove it if it does "
                "not change what the model computes"
            )


def _kind(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def to_hf(theta: float, scaling: tuple | None) -> dict[str, Any]:
    """The rope_parameters of config.json; defaults of YaRN are left out."""
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if scaling:
        kind, *values = scaling
        rope |= {"rope_type": kind, **dict(zip(KEYS[kind], values, strict=True))}
        if kind == "yarn":
            usual = {**_YARN, "attention_factor": _mscale(values[0], 1.0)}
            rope = {k: v for k, v in rope.items() if k not in usual or v != usual[k]}
        if "original_max_position_embeddings" in rope:  # v5 insists on int
            length = int(rope["original_max_position_embeddings"])
            rope["original_max_position_embeddings"] = length
    return rope


def _positive(name: str, value: Any) -> float:
    """A number of a config.json that is divided by; ValueError names another value."""
    sizes.number(name, value, 1e-6, 1e15)
    return float(value)
