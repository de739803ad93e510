"""Rewards: `reward(batch, texts, lms, *, ...) -> f32[B, G]`, one file per judge.

A dotted name may also point to any function from a response's text to a number.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignax import plugin
from alignax.plugin import Bound


def load(reward: str | Mapping[str, Any]) -> Bound:
    """A reward by its name, or by {'name': ..., its hyper-parameters}."""
    spec = {"name": reward} if isinstance(reward, str) else dict(reward)
    if "name" not in spec:
        raise ValueError(f"reward has no 'name': {spec}")
    return plugin.load("rewards", spec.pop("name"), spec)


def call(reward: Bound, batch, texts: list[list[str]], lms) -> np.ndarray:
    """Scores B groups of G responses with a reward file or a function of text.

    Returns:
      [B, G] float32, finite on valid responses and 0 on the others.

    Raises:
      ValueError: the reward raised, gave another shape or a number that is not finite;
        the text that caused it is shown.
    """
    if "batch" in inspect.signature(reward.function).parameters:
        try:
            values = np.asarray(reward(batch, texts, lms), np.float32)
        except Exception as error:
            raise ValueError(
                f"reward {reward.name} raised {error!r} on a batch that begins with "
                f"{texts[0][0]!r}"
            ) from error
    else:
        values = np.array([[_one(reward, t) for t in group] for group in texts])
    values = values.astype(np.float32)
    shape = (len(texts), len(texts[0]))
    if values.shape != shape:
        raise ValueError(
            f"reward {reward.name} gave shape {values.shape} for {shape} responses, the "
            f"first being {texts[0][0]!r}"
        )
    valid = np.asarray(batch.valid)
    bad = np.argwhere(valid & ~np.isfinite(values))
    if len(bad):
        b, g = bad[0]
        raise ValueError(
            f"reward {reward.name} gave {values[b, g]} for the response {texts[b][g]!r}"
        )
    return np.where(valid, values, 0.0).astype(np.float32)


def _one(reward: Bound, text: str) -> float:
    try:
        return float(reward(text))
    except Exception as error:
        raise ValueError(
            f"reward {reward.name} raised {error!r} on the response {text!r}"
        ) from error
