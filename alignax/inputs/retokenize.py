"""Responses in the ids of another tokenizer, under its own chat template."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from alignax.batch import Batch, Example, Message, from_groups
from alignax.inputs.tokenizer import Tokenizer

BUCKET = 64  # T is a multiple of it, for few compilations


def retokenize(
    prompts: Sequence[str | Sequence[Message]], texts: Sequence[Sequence[str]],
    valid: Bool[np.ndarray, "B G"], tokenizer: Tokenizer, *, length: int,
) -> Batch:  # fmt: skip
    """Prompts and responses as text, rendered and tokenised for another LM.

    Args:
      prompts: B prompts.
      texts: B lists of G responses.
      valid: responses that count; the ids of the others have no meaning.
      tokenizer: of the LM that is to read them. Its EOS in the text of a response is
        left out: it would end the turn.
      length: most tokens of a row. A longer one loses the left of its prompt, then the
        right of its response.

    Returns:
      A Batch [B, G, T] of host arrays, where `valid` only as given.
    """
    ends = [tokenizer.decode([i], keep_specials=True) for i in tokenizer.eos_ids]
    asked, answers, scored = [], [], []
    for prompt, group in zip(prompts, texts, strict=True):
        example = Example("", prompt, tuple(_without(t, ends) for t in group))
        ids, responses, marks = tokenizer.tokenize(example)
        room = max(1, length - max(map(len, responses)))
        asked.append(ids[-room:])
        left = length - len(asked[-1])
        answers.append([r[:left] for r in responses])
        scored.append([m[:left] for m in marks])
    longest = max(
        len(p) + len(r) for p, g in zip(asked, answers, strict=True) for r in g
    )
    batch = from_groups(
        asked, answers, scored=scored, length=-(-longest // BUCKET) * BUCKET
    )
    counts: Any = np.asarray(batch.valid) & valid
    return batch._replace(valid=counts)


def _without(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.replace(end, "") if end else text
    return text
