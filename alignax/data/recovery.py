"""Safety recovery: refusals that also follow the beginning of a harmful answer.

From a pair (refusal r, harmful answer h) to the prompt x comes one example: r is scored
as the answer to x, or as the continuation of the first k words of h.

Source: Qi et al. 2024, https://arxiv.org/abs/2406.05946, section 3
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignax.batch import Example, form
from alignax.data import Examples, as_kind, wrapped
from alignax.records import messages


def examples(
    *,
    split: str,
    source: Mapping[str, Any],
    plain: float = 0.5,
    longest: int = 100,
    seed: int = 0,
) -> Examples:
    """Examples that begin with part of the rejected answer, then have the chosen one.

    Args:
      split: of the inner data set.
      source: the inner data set of pairs, {'name': ..., its own parameters}; two responses
        without scores are (refusal, harmful).
      plain: probability that no word of the harmful answer is given, in [0, 1].
      longest: most words of it that are given; k is uniform up to that, or up to all.
      seed: of the draws; the same arguments give the same examples.

    Returns:
      One example per pair, in which the words of h are not scored; `report` of the inner
      data.

    Raises:
      ValueError: an inner example that is no pair of single answers, `plain` outside
        [0, 1], or `longest` < 1.
    """
    if not 0 <= plain <= 1:
        raise ValueError(f"plain is {plain}, expected a probability")
    if longest < 1:
        raise ValueError(f"longest is {longest}, expected at least 1")
    inner = wrapped(source, split)

    def convert(i: int) -> Example:
        pair = inner[i]
        if len(pair.responses) != 2:
            raise ValueError(
                f"{pair.id}: recovery needs pairs, found {len(pair.responses)} responses"
            )
        if form(pair) != "unscored":  # those are in order
            try:
                pair = as_kind(pair, "pairs")
            except ValueError as error:
                raise ValueError(f"{pair.id}: recovery needs pairs: {error}") from error
        refusal, harmful = (_text(pair.id, r) for r in pair.responses)
        rng = np.random.default_rng([seed, i])
        words = harmful.split()
        given = ""
        if words and rng.random() >= plain:
            given = " ".join(words[: rng.integers(1, min(longest, len(words)) + 1)])
        answer: Any = refusal
        if given:
            turn = {"role": "assistant", "content": f"{given} {refusal}"}
            answer = [{**turn, "prefill": given}]
        return Example(
            f"{pair.id}/recovery", pair.prompt, [answer], columns=pair.columns,
            template=pair.template,
        )  # fmt: skip

    return inner.over(range(len(inner)), convert).checked()


def _text(name: str, response) -> str:
    """The one assistant turn of a response."""
    if isinstance(response, str):
        return response.strip()
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise ValueError(f"{name}: recovery needs answers of one assistant turn")
    return messages.text(response[0]).strip()
