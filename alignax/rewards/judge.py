"""A language model as a judge: is this response better than another one?

  s(y, y') = ½ [log P(A)/P(B) where A is y and B is y'  -  log P(A)/P(B) where A is y']
  r(x, y)  = mean over y' of s(y, y')

The letter that a model prefers whatever stands behind it cancels between the two orders, as
far as it is additive in log-odds. The others are the rest of the group, so that the reward is
a tournament, or a response of the row. Nothing is sampled: the odds are exact.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685 (pairwise judges, position bias)
Differs from the paper: log-odds of two letters instead of a written verdict.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignax.batch import LM, Batch, Message
from alignax.reward_functions import questions

RUBRIC = "Which answer is more helpful, correct and to the point?"
QUESTION = """Someone asked an assistant:

{prompt}

Answer A:

{first}

Answer B:

{second}

{rubric} Reply with the letter A or B."""


def reward(
    batch: Batch, texts: list[list[str]], lms: Mapping[str, LM],
    prompts: Sequence[str | Sequence[Message]],
    rows: Sequence[Mapping[str, Any]] | None = None, tokenizer=None,
    score: Callable | None = None, *, model: str = "judge", rubric: str = RUBRIC,
    against: str = "", letters: tuple[str, str] = ("A", "B"),
) -> np.ndarray:  # fmt: skip
    """Compares each response with others.

    Args:
      batch: valid [B, G].
      texts: B groups of G responses.
      lms: holds the judge.
      prompts: B of them.
      rows: B rows; read with `against`.
      tokenizer: of the run.
      score: `logprob.score` over the run's devices; one device by default.
      model: name of the judge in `lms`.
      rubric: the question, whose answer is one of the two.
      against: name of the column with the response to beat; '' compares each response with
        all others of its group, and one that is alone gets 0.
      letters: what the judge says for the first and for the second.

    Returns:
      [B, G] mean log-odds in nats; those of a group sum to 0 without `against`.

    Raises:
      ValueError: no such LM, or a row without the column.
    """
    lm, own = questions.reader(lms, model, tokenizer, who="rewards.judge")
    valid = np.asarray(batch.valid)
    # (b, g, other g or None, response, its opponent)
    pairs: list[tuple[int, int, int | None, str, str]] = []
    for b, group in enumerate(texts):
        mine = [g for g in range(len(group)) if valid[b, g]]
        if against:
            other = _opponent(rows, b, against)
            pairs += [(b, g, None, group[g], other) for g in mine]
        else:
            both = itertools.combinations(mine, 2)
            pairs += [(b, g, h, group[g], group[h]) for g, h in both]
    asked = []
    for b, _, _, one, other in pairs:
        said = questions.transcript(prompts[b])
        for first, second in ((one, other), (other, one)):
            asked.append(
                QUESTION.format(prompt=said, first=first, second=second, rubric=rubric)
            )
    first, second = letters
    odds = questions.log_odds(lm, asked, (first, second), tokenizer=own, score=score)
    better = (odds[0::2] - odds[1::2]) / 2
    total, many = np.zeros(valid.shape), np.zeros(valid.shape)
    for (b, g, h, _, _), s in zip(pairs, better, strict=True):
        total[b, g] += s
        many[b, g] += 1
        if h is not None:
            total[b, h] -= s
            many[b, h] += 1
    return (total / np.maximum(many, 1)).astype(np.float32)


def _opponent(rows: Sequence[Mapping[str, Any]] | None, index: int, column: str) -> str:
    if rows is None or column not in rows[index]:
        there = sorted(rows[index]) if rows else []
        raise ValueError(
            f"rewards.judge: row {index} has no column {column!r}; it has {there}"
        )
    return str(rows[index][column])
