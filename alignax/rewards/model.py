"""A trained reward model as a reward: its scalar head on the last scored token.

A model of another tokenizer than the run's gets the text: prompt and response are rendered
by its own chat template and tokenised by its own tokenizer. For a classifier that was trained
with transformers take `rewards.sequence_classifier`, which may read a token further behind.

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from alignax import masked
from alignax.batch import LM, Batch, Message
from alignax.inputs.detokenize import retokenize
from alignax.reward_functions import questions
from alignax.text.tokenizer import Tokenizer

_one_device = questions.one_device


def reward(
    batch: Batch, texts: list[list[str]], lms: dict[str, LM], tokenizer=None,
    score: Callable | None = None,
    prompts: Sequence[str | Sequence[Message]] | None = None, *, model: str = "reward",
) -> np.ndarray:  # fmt: skip
    """Scores responses with a Bradley-Terry reward model.

    Args:
      batch: tokens of prompts and responses.
      texts: B groups of G responses; read if the model's tokenizer is not the run's.
      lms: holds the reward model.
      tokenizer: the one that made the batch.
      score: `logprob.score` over the run's devices and hosts; one device by default.
      prompts: B of them; read if the model's tokenizer is not the run's.
      model: its name in `lms`.

    Returns:
      [B, G] unnormalised rewards (differences are log-odds); 0 on invalid responses.

    Raises:
      ValueError: no such LM, or it has no value head; a model of another tokenizer where
        the prompts are not known.
    """
    if model not in lms:
        raise ValueError(
            f"rewards.model needs an LM {model!r}; there are {sorted(lms)}"
        )
    lm = lms[model]
    if lm.config.tokenizer:
        lm, batch = _own_ids(lm, model, batch, texts, tokenizer, prompts)
    values = (score or _one_device)(lm, batch, needs=("values",)).values
    last = masked.last(jnp.asarray(values), jnp.asarray(batch.mask))
    return np.where(np.asarray(batch.valid), np.asarray(last), np.float32(0))


def _own_ids(
    lm: LM, name: str, batch: Batch, texts: list[list[str]], tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[Message]] | None,
) -> tuple[LM, Batch]:  # fmt: skip
    """The model as one that reads ids, and the batch in the ids of its tokenizer."""
    path = lm.config.tokenizer
    if prompts is None or tokenizer is None:
        raise ValueError(
            f"rewards.model: lms.{name} has another tokenizer than the run ({path}), so it "
            "needs the prompts as text, and here they are only known as ids"
        )
    lm, own = questions.reader({name: lm}, name, tokenizer, who="rewards.model")
    valid = np.asarray(batch.valid)
    batch = retokenize(prompts, texts, valid, own, length=lm.config.max_length)
    return lm, batch
