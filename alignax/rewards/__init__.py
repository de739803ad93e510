"""Rewards: `reward(batch, texts, lms, *, ...) -> f32[B, G]`, one file per judge.

A dotted name may also point to any function from a response's text to a number. A file
that takes the keywords `tokenizer` or `score` is handed the run's own.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alignax import plugin
from alignax.plugin import Bound


def load(reward: str | Mapping[str, Any]) -> Bound:
    """A reward by its name, or by {'name': ..., its hyper-parameters}.

    The `members` of a reward that is made of others are loaded too, for their mistakes.
    """
    spec = {"name": reward} if isinstance(reward, str) else dict(reward)
    if "name" not in spec:
        raise ValueError(f"reward has no 'name': {spec}")
    name = spec.pop("name")
    bound = plugin.load("rewards", name, spec)
    for label, member in bound.hyper.get("members", {}).items():
        try:
            load(member if isinstance(member, str) else dict(member))
        except (ValueError, TypeError) as error:
            raise ValueError(f"member {label!r} of {bound.name}: {error}") from error
    return bound


def call(
    reward: Bound, batch, texts: list[list[str]], lms, *, tokenizer=None,
    score: Callable | None = None,
) -> np.ndarray:  # fmt: skip
    """Scores B groups of G responses with a reward file or a function of text.

    Args:
      reward: from `load`.
      batch: prompts and responses.
      texts: the responses as text, B lists of G.
      lms: frozen LMs by name.
      tokenizer: the one that made the batch; for rewards that read the prompt's text.
      score: `logprob.score` of host batches, spread over the run's devices (see
        `build.scorer`); for rewards that read an LM, which otherwise use one device.

    Returns:
      [B, G] float32, finite on valid responses and 0 on the others.

    Raises:
      ValueError: the reward raised, gave another shape or a number that is not finite;
        the text that caused it is shown. It needs what was not handed in.
    """
    parameters = inspect.signature(reward.function).parameters
    if "batch" in parameters:
        handed = {"tokenizer": tokenizer, "score": score}
        handed = {k: v for k, v in handed.items() if k in parameters and v is not None}
        for name, p in parameters.items():
            if name in plugin.HANDED and p.default is p.empty and name not in handed:
                raise ValueError(
                    f"reward {reward.name} reads the {name}, which is not handed in here"
                )
        try:
            values = np.asarray(reward(batch, texts, lms, **handed), np.float32)
        except Exception as error:
            raise ValueError(
                f"reward {reward.name} raised {_told(error)} on a batch that begins with "
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
            f"reward {reward.name} raised {_told(error)} on the response {text!r}"
        ) from error


def _told(error: Exception) -> str:
    """As repr has it, but a message within a message keeps its quotes."""
    return f"{type(error).__name__}({error})"
