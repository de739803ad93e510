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
    """Scores B groups of G responses with a reward file or a function of text."""
    if "batch" in inspect.signature(reward.function).parameters:
        return np.asarray(reward(batch, texts, lms), np.float32)
    return np.array([[float(reward(t)) for t in group] for group in texts], np.float32)
