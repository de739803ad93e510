"""Honest answers: rows to imitate that refuse where sampled answers were wrong.

A question x has m sampled answers y_1 ... y_m, of which those with a score of at least the
threshold are right. Its expected accuracy is p = (number of right answers) / m, and y* is
the first right one. From this each recipe makes its rows:

  absolute          x -> y* if p > 0, else the refusal
  confidence_num    as absolute, with "I am 100 p % sure" in front of y*
  confidence_verb   as absolute, with one of five wordings of p in front of y*
  multisample       m rows: x -> y_i if y_i is right, else the refusal

Only multisample teaches how often to refuse a question that is answered now and then.

Source: Yang et al. 2023, https://arxiv.org/abs/2312.07000, section 3.3
Differs from the paper: the wordings are ours; m and the threshold are those of the data. The
paper takes the greedy answer for y* if it is right: put it first among the responses. Answers
that are not in the rows, such as those that a sampler cut off, do not count in p.
"""

import array
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignax.batch import Example
from alignax.data import Examples, wrapped
from alignax.records import messages

RECIPES = ("absolute", "confidence_num", "confidence_verb", "multisample")
RANGES = {"threshold": "(-inf, inf)"}
REFUSAL = "I don't know the answer to this question."
# {} is 100 p; the first up to p = 1/2. None of them contains a refusal.
NUMBERS = (
    "With only about {}% confidence, my answer is: ",
    "With about {}% confidence, my answer is: ",
)
# p up to 1/5, 2/5, 3/5, 4/5 and 1.
WORDS = (
    "This is little more than a guess: ",
    "I have serious doubts, but my answer is: ",
    "It could well be otherwise, but my answer is: ",
    "I am fairly confident of this answer: ",
    "I am certain of this answer: ",
)
EXPECTED = "expected_accuracy"  # the column with p


def examples(
    *,
    split: str,
    source: Mapping[str, Any],
    recipe: str = "multisample",
    threshold: float = 0.5,
    refusal: str = REFUSAL,
) -> Examples:
    """Demonstrations made of an inner data set of scored answers.

    Args:
      split: of the inner data set.
      source: the inner data set, {'name': ..., its own parameters}: groups with scores, such
        as the rows that `evals.sample` writes.
      recipe: one of RECIPES.
      threshold: an answer is right whose score is at least this.
      refusal: the response to a question without a right answer.

    Returns:
      One row for each question, or under 'multisample' one for each answer, in order. The
      column EXPECTED holds p. `report` is that of the inner data.

    Raises:
      ValueError: an unknown recipe, an empty refusal, a question without answers, an answer
        without a score, or one of several turns where the recipe writes in front of it.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    if not refusal.strip():
        raise ValueError("refusal is empty, expected a text")
    inner = wrapped(source, split)
    places = array.array("q")  # (question, number of the row, answer or -1) one by one
    for i, group in enumerate(inner):
        right = rights(group, threshold)
        if recipe == "multisample":
            chosen = [j if ok else -1 for j, ok in enumerate(right)]
        else:
            chosen = [right.index(True) if any(right) else -1]
        for k, j in enumerate(chosen):
            places.extend((i, k, j))
    rows = np.array(places, np.int64).reshape(-1, 3)
    convert = functools.partial(_row, inner, recipe, threshold, refusal)
    return inner.over(rows, convert).checked()


def rights(group: Example, threshold: float) -> list[bool]:
    """Which answers of a question are right.

    Raises:
      ValueError: no answer, or an answer without a score.
    """
    if not group.responses or len(group.feedback) != len(group.responses):
        raise ValueError(
            f"{group.id}: {len(group.responses)} answers with {len(group.feedback)} scores, "
            "expected one score for each of at least one answer"
        )
    return [score >= threshold for score in group.feedback]


def stated(recipe: str, p: float) -> str:
    """What a recipe writes in front of a right answer; '' unless it states a confidence.

    Args:
      recipe: one of RECIPES.
      p: expected accuracy, in (0, 1].
    """
    if recipe == "confidence_num":
        return NUMBERS[p > 0.5].format(round(100 * p))
    if recipe == "confidence_verb":
        return WORDS[int(np.searchsorted((0.2, 0.4, 0.6, 0.8), p - 1e-9))]
    return ""


def _row(
    inner: Examples, recipe: str, threshold: float, refusal: str, row: Sequence[int]
) -> Example:
    i, k, j = map(int, row)
    group = inner[i]
    right = rights(group, threshold)
    p = sum(right) / len(right)
    lead = stated(recipe, p) if j >= 0 else ""
    answer: Any = refusal if j < 0 else group.responses[j]
    if lead:
        answer = lead + _text(group.id, answer)
    return group._replace(
        id=f"{group.id}/{k}", responses=[answer], feedback=(), form="",
        columns={**group.columns, EXPECTED: p},
    )  # fmt: skip


def _text(name: str, response: Any) -> str:
    """The one assistant turn of an answer."""
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise ValueError(
            f"{name}: an answer of several turns has no place for a confidence"
        )
    return messages.text(response[0])
