"""What the settings of a model may be: types and ranges, before anything is made of them."""

from collections.abc import Mapping
from typing import Any

MOST = 2**31 - 1  # int32 on the devices
# field of ModelConfig -> (whole number, lowest, highest); far beyond any known model
RANGES = {
    "vocab_size": (True, 1, 2**24), "width": (True, 1, 2**17), "num_layers": (True, 1, 1024),
    "num_heads": (True, 1, 4096), "num_kv_heads": (True, 1, 4096),
    "head_dim": (True, 1, 2**14), "mlp_width": (True, 1, 2**20),
    "max_length": (True, 1, MOST), "norm_eps": (False, 1e-30, 1.0),
    "rope_theta": (False, 1e-3, 1e15), "rope_theta_local": (False, 1e-3, 1e15),
    "query_scale": (False, 1e-6, 1e9), "attn_softcap": (False, 1e-6, 1e9),
    "final_softcap": (False, 1e-6, 1e9), "window": (True, 1, MOST),
    "bos_id": (True, 0, MOST), "attn_tile": (True, 0, MOST),
}  # fmt: skip
OPTIONAL = (
    "rope_theta_local", "query_scale", "attn_softcap", "final_softcap", "window", "bos_id",
)  # fmt: skip
SWITCHES = (
    "norm_offset", "embed_scale", "tied", "qkv_bias", "o_bias", "mlp_bias", "qk_norm",
    "qk_norm_whole", "pre_norms", "post_norms", "value_head",
)  # fmt: skip


def check(fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Checks fields of a ModelConfig, given by their names.

    Args:
      fields: values by field.
      names: what the fields are called where they come from, for messages.

    Raises:
      ValueError: a value of another type or out of its range; the field is named.
    """
    called = names or {}
    for field, value in fields.items():
        name = called.get(field, field)
        if field in RANGES and not (value is None and field in OPTIONAL):
            whole, low, high = RANGES[field]
            number(name, value, low, high, whole=whole)
        elif field in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name} is {brief(value)}, expected true or false")
        elif field == "eos_ids":
            for one in value if isinstance(value, list | tuple) else [value]:
                number(name, one, 0, MOST, whole=True)
    if (fields.get("head_dim") or 0) % 2:
        raise ValueError(f"{called.get('head_dim', 'head_dim')} is {fields['head_dim']}, expected an even number")  # fmt: skip


def number(
    name: str, value: Any, low: float, high: float, *, whole: bool = False
) -> None:
    """Raises ValueError for what is no number of low..high; names it."""
    kinds = int if whole else int | float
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ValueError(
            f"{name} is {brief(value)}, expected {kind} from {low} to {high}"
        )


def brief(value: Any) -> str:
    """A value in one short line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
