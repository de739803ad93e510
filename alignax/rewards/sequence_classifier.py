"""A reward model that was trained with transformers: its score of the rendered dialogue.

  r(x, y) = score at the last token of the chat template's rendering of x and y

A sequence classifier of transformers reads its last token that is no padding. That is what
the chat template writes behind the end of the last turn, if it writes something there: ChatML
has a line break. `rewards.model`, for models that were trained here, reads the end of turn.

Source: `...ForSequenceClassification` of https://github.com/huggingface/transformers; the
models are those of Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignax.batch import LM, Batch, Message
from alignax.inputs.detokenize import BUCKET, retokenize
from alignax.reward_functions import questions
from alignax.text.tokenizer import Tokenizer


def reward(
    batch: Batch, texts: list[list[str]], lms: Mapping[str, LM],
    prompts: Sequence[str | Sequence[Message]], tokenizer=None,
    score: Callable | None = None, *, model: str = "reward",
) -> np.ndarray:  # fmt: skip
    """Scores responses with a sequence classifier of one label.

    Args:
      batch: valid [B, G].
      texts: B groups of G responses.
      lms: holds the classifier.
      prompts: B of them; with the responses they are rendered by the classifier's own chat
        template, and tokenised by its own tokenizer.
      tokenizer: of the run, which is that of a classifier without one of its own.
      score: `logprob.score` over the run's devices; one device by default.
      model: name of the classifier in `lms`.

    Returns:
      [B, G] scores; 0 on invalid responses.

    Raises:
      ValueError: no such LM, or it has no head with one label.
    """
    lm, own = questions.reader(lms, model, tokenizer, who="rewards.sequence_classifier")
    valid = np.asarray(batch.valid)
    behind = after_turn(own)
    room = lm.config.max_length - len(behind)
    mine = retokenize(prompts, texts, valid, own, length=room)
    mine, last = appended(mine, behind)
    values = np.asarray(
        (score or questions.one_device)(lm, mine, needs=("values",)).values
    )
    found = np.take_along_axis(values, last[..., None], -1)[..., 0]
    return np.where(valid, found, 0.0).astype(np.float32)


def after_turn(tokenizer: Tokenizer) -> list[int]:
    """Ids that the chat template writes behind the end of turn of the last response."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    ids = tokenizer.encode(tokenizer.render(turns))
    ends = [i for i, token in enumerate(ids) if token in tokenizer.eos_ids]
    return ids[ends[-1] + 1 :] if ends else []


def appended(batch: Batch, ids: Sequence[int]) -> tuple[Batch, np.ndarray]:
    """A batch with these ids behind every row, and the index [B, G] of its last token.

    The mask is True there and at no other place, so that the kernel reads this token.
    """
    lengths = np.asarray(batch.lengths)
    b, g, t = batch.tokens.shape
    width = -(-(t + len(ids)) // BUCKET) * BUCKET
    tokens = np.zeros((b, g, width), np.int32)
    tokens[..., :t] = batch.tokens
    for k, token in enumerate(ids):
        np.put_along_axis(tokens, lengths[..., None] + k, token, -1)
    ends = lengths + len(ids)
    last = np.maximum(ends - 1, 0)
    mask = np.zeros(tokens.shape, bool)
    np.put_along_axis(mask, last[..., None], np.asarray(batch.valid)[..., None], -1)
    fields: dict[str, Any] = {"tokens": tokens, "mask": mask, "lengths": ends}
    return batch._replace(**fields), last
