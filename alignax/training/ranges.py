"""The range of every number in a config, checked before anything is read.

Numbers of methods have theirs beside them: `plugin.bind`.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from alignax import plugin
from alignax.models.sizes import brief
from alignax.training import defaults

COUNT, WHOLE = "[1, 2147483647]", "[0, 2147483647]"  # int32 on the devices
FROM_0, SHARE = "[0, inf)", "[0, 1]"
# keys of `defaults.get_config`; those of its sections with dots
RANGES = {
    "seed": "[0, 4294967295]",
    "num_steps": WHOLE, "num_epochs": FROM_0, "batch_size": COUNT, "accumulate": COUNT, "length": COUNT,
    "average": "[0, 1)", "average_every": COUNT, "min_response": WHOLE,
    "lora.rank": WHOLE, "lora.alpha": "(0, inf)",
    "rollout.group": COUNT, "rollout.max_new": COUNT, "rollout.temperature": "(0, inf)",
    "rollout.turns": WHOLE, "rollout.batches": COUNT, "rollout.epochs": COUNT,
    "rollout.punishment": "(-inf, inf)", "rollout.overlong_buffer": WHOLE,
    "rollout.overlong_penalty": FROM_0, "rollout.max_draws": COUNT,
    "rollout.anchor_samples": COUNT, "rollout.reward_seconds": FROM_0,
    "rollout.invalid_rewards": SHARE, "rollout.show": WHOLE,
    "rollout.show_every": COUNT, "rollout.reference_samples": COUNT,
    "generate.group": COUNT, "generate.max_new": COUNT, "generate.temperature": FROM_0,
    "generate.top_k": WHOLE, "generate.top_p": "(0, 1]", "generate.min_p": SHARE,
    "generate.repetition_penalty": "(0, inf)",
    "generate.frequency_penalty": "(-inf, inf)",
    "generate.presence_penalty": "(-inf, inf)", "generate.min_new": WHOLE,
    "generate.candidates": COUNT, "generate.draft_length": COUNT,
    "optim.lr": FROM_0, "optim.critic_lr": FROM_0, "optim.warmup": WHOLE,
    "optim.schedule_steps": WHOLE,
    "optim.final": SHARE, "optim.clip": FROM_0, "optim.weight_decay": FROM_0,
    "optim.b1": "[0, 1)", "optim.b2": "[0, 1)",
    "eval_every": WHOLE, "eval_batch_size": WHOLE, "patience": WHOLE,
    "checkpoint.every": WHOLE, "checkpoint.minutes": FROM_0, "checkpoint.keep": COUNT,
    "watchdog.minutes": FROM_0, "watchdog.starts": WHOLE, "log_every": COUNT,
}  # fmt: skip
# of sequences of whole numbers
ITEMS = {
    "buckets": COUNT, "mesh": "[-1, 2147483647]", "profile": WHOLE, "lora.layers": WHOLE,
}  # fmt: skip


def check(config) -> None:
    """Every key has a value of its default's kind, and every number is in its range.

    Raises:
      ValueError: the key, its value and what is expected.
    """
    for key, default in keys(defaults.get_config()):
        value = config
        for name in key.split("."):
            if name not in value:
                section = key.removesuffix(f".{name}")
                raise ValueError(
                    f"config.{key} is missing: give the keys of {section} one by one "
                    f"(config.{section}.NAME = ...), so that the others keep their defaults"
                )
            value = value[name]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise ValueError(f"config.{key} is {brief(value)}, expected a section")
        elif isinstance(default, tuple):
            check_items(key, value)
        elif isinstance(default, bool | str):
            if not isinstance(value, type(default)):
                kind = "a text" if isinstance(default, str) else "True or False"
                raise ValueError(f"config.{key} is {brief(value)}, expected {kind}")
        else:
            check_number(key, value, whole=isinstance(default, int), within=RANGES[key])


def check_number(key: str, value: Any, *, whole: bool, within: str) -> None:
    """Raises ValueError for what is no number, or outside of a range such as '[0, 1)'."""
    kinds = int if whole else int | float
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not plugin.is_inside(value, within):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"config.{key} is {brief(value)}, expected {kind} in {within}")


def check_items(key: str, value: Any) -> None:
    """Raises ValueError for what is no sequence, or for an item out of its range."""
    if not isinstance(value, tuple | list):
        raise ValueError(f"config.{key} is {brief(value)}, expected several values")
    for item in value if key in ITEMS else ():
        check_number(key, item, whole=True, within=ITEMS[key])


def keys(section: ConfigDict, above: str = "") -> Iterator[tuple[str, Any]]:
    """(key with dots, value) of a config and of its sections."""
    for name, value in section.items():
        yield f"{above}{name}", value
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{above}{name}.")
