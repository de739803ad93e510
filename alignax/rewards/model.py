"""A trained reward model as a reward: its scalar head on the last scored token.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from alignax import logprob, masked
from alignax.batch import LM, Batch

_one_device = jax.jit(logprob.score, static_argnames=("needs",))


def reward(
    batch: Batch, texts: list[list[str]], lms: dict[str, LM], *,
    model: str = "reward", score: Callable | None = None,
) -> np.ndarray:  # fmt: skip
    """Scores responses with a Bradley-Terry reward model.

    Args:
      batch: tokens of prompts and responses, made with the model's own tokenizer.
      texts: not read.
      lms: holds the reward model.
      model: its name in `lms`.
      score: `logprob.score` over the run's devices and hosts; one device by default.

    Returns:
      [B, G] unnormalised rewards (differences are log-odds); 0 on invalid responses.

    Raises:
      ValueError: no such LM, or it has no value head.
    """
    if model not in lms:
        raise ValueError(
            f"rewards.model needs an LM {model!r}; there are {sorted(lms)}"
        )
    values = (score or _one_device)(lms[model], batch, needs=("values",)).values
    last = masked.last(jnp.asarray(values), jnp.asarray(batch.mask))
    return np.where(np.asarray(batch.valid), np.asarray(last), np.float32(0))
