"""Rewards: `reward(batch, texts, lms, *, ...) -> f32[B, G]`, one file per judge.

A dotted name may also point to any function from a response's text to a number.
"""

import inspect

import numpy as np

from alignax.plugin import Bound


def call(reward: Bound, batch, texts: list[list[str]], lms) -> np.ndarray:
    """Scores B groups of G responses with a reward file or a function of text."""
    if "batch" in inspect.signature(reward.function).parameters:
        return np.asarray(reward(batch, texts, lms), np.float32)
    return np.array([[float(reward(t)) for t in group] for group in texts], np.float32)
