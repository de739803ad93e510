"""A trained reward model as a reward: its scalar head on the last scored token.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import logprob, masked
from alignax.batch import LM, Batch


@jax.jit
def _values(lm: LM, batch: Batch) -> Array:
    values = logprob.score(lm, batch, needs=("values",)).values
    assert values is not None
    return jnp.where(batch.valid, masked.last(values, batch.mask), 0.0)


def reward(
    batch: Batch, texts: list[list[str]], lms: dict[str, LM], *, model: str = "reward"
) -> Float[Array, "B G"]:
    """Scores responses with a Bradley-Terry reward model.

    Args:
      batch: tokens of prompts and responses, made with the model's own tokenizer.
      texts: not read.
      lms: holds the reward model.
      model: its name in `lms`.

    Returns:
      Unnormalised rewards (differences are log-odds); 0 on invalid responses.

    Raises:
      ValueError: no such LM, or it has no value head.
    """
    if model not in lms:
        raise ValueError(
            f"rewards.model needs an LM {model!r}; there are {sorted(lms)}"
        )
    return _values(lms[model], batch)
