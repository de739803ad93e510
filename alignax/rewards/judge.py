"""A language model as a judge: is this response better than another one?

  s(y, y') = ½ [log P(A)/P(B) where A is y and B is y'  -  log P(A)/P(B) where A is y']
  r(x, y)  = mean over y' of s(y, y')

The letter that a model prefers whatever stands behind it cancels between the two orders, as
far as it is additive in log-odds. The others are the rest of the group, so that the reward is
a tournament, or a response of the row. Nothing is sampled: the odds are exact.

With `pine` the judge reads both responses by PINE, which knows no order, and s is how much
rather it repeats y than y', per token.

Source: Zheng et al. 2023, https://arxiv.org/abs/2306.05685 (pairwise judges, position bias);
Wang et al. 2024, https://arxiv.org/abs/2407.01100 (PINE)
Differs from the papers: log-odds of two letters, or of the two responses, instead of a
written verdict.
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
BEFORE = "Someone asked an assistant:\n\n{prompt}\n\nThere are two answers:\n\n"
BEHIND = "\n\n{rubric} Repeat that answer, and nothing else."


def reward(
    batch: Batch, texts: list[list[str]], lms: Mapping[str, LM],
    prompts: Sequence[str | Sequence[Message]],
    rows: Sequence[Mapping[str, Any]] | None = None, tokenizer=None,
    score: Callable | None = None, *, model: str = "judge", rubric: str = RUBRIC,
    against: str = "", letters: tuple[str, str] = ("A", "B"), pine: bool = False,
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
      letters: what the judge says for the first and for the second; not read with `pine`.
      pine: whether the judge reads the responses by PINE, as documents without an order,
        and repeats one of them; names of control tokens in them do not count. A response
        that is empty then gets the lowest value of its group, 0 at most, and is no opponent.

    Returns:
      [B, G] mean log-odds in nats; with `pine` differences of mean log-probabilities per
      token. Those of a group sum to 0 without `against` and without an empty response.

    Raises:
      ValueError: no such LM, or a row without the column. With `pine`: a model with local
        layers, or responses that are too long for it.
    """
    lm, own = questions.reader(lms, model, tokenizer, who="rewards.judge")
    valid = np.asarray(batch.valid)
    if pine:
        texts = [[questions.plain(t, own) for t in group] for group in texts]
    # (b, g, other g or None, response, its opponent)
    pairs: list[tuple[int, int, int | None, str, str]] = []
    for b, group in enumerate(texts):
        mine = [
            g for g in range(len(group)) if valid[b, g] and not (pine and not group[g])
        ]
        if against:
            other = _opponent(rows, b, against)
            other = questions.plain(other, own) if pine else other
            mine = mine if other or not pine else []
            pairs += [(b, g, None, group[g], other) for g in mine]
        else:
            both = itertools.combinations(mine, 2)
            pairs += [(b, g, h, group[g], group[h]) for g, h in both]
    said = [questions.transcript(p) for p in prompts]
    if pine:
        said = [questions.plain(text, own) for text in said]
        behind = BEHIND.format(rubric=rubric)
        better = questions.quoted_difference(
            lm, [(BEFORE.format(prompt=said[b]), x, y, behind) for b, _, _, x, y in pairs],
            tokenizer=own,
        )  # fmt: skip
    else:
        asked = [
            QUESTION.format(prompt=said[b], first=first, second=second, rubric=rubric)
            for b, _, _, one, other in pairs
            for first, second in ((one, other), (other, one))
        ]
        odds = questions.log_odds(lm, asked, letters, tokenizer=own, score=score)
        better = (odds[0::2] - odds[1::2]) / 2
    total, many = np.zeros(valid.shape), np.zeros(valid.shape)
    for (b, g, h, _, _), s in zip(pairs, better, strict=True):
        total[b, g] += s
        many[b, g] += 1
        if h is not None:
            total[b, h] -= s
            many[b, h] += 1
    out = total / np.maximum(many, 1)
    if pine:
        empty = np.array([[not text for text in group] for group in texts]) & valid
        lowest = np.where(many > 0, out, 0.0).min(1, keepdims=True)
        out = np.where(empty, np.minimum(lowest, 0.0), out)
    return out.astype(np.float32)


def _opponent(rows: Sequence[Mapping[str, Any]] | None, index: int, column: str) -> str:
    if rows is None or column not in rows[index]:
        there = sorted(rows[index]) if rows else []
        raise ValueError(
            f"rewards.judge: row {index} has no column {column!r}; it has {there}"
        )
    return str(rows[index][column])
