"""Pairs for long prompts: the answer under the short prompt is chosen over the other.

Source: Chen et al. 2025 (LongPO), https://arxiv.org/abs/2502.13922
"""

from collections.abc import Mapping
from typing import Any

from alignax.batch import Example
from alignax.data import Examples, wrapped


def examples(
    *, split: str, short: Mapping[str, Any], long: Mapping[str, Any]
) -> Examples:
    """Chosen is the first response under the short prompt, rejected under the long one.

    Args:
      split: of both inner data sets.
      short: the data set of answers under short prompts, {'name': ..., its parameters}.
      long: likewise under long prompts; its prompts are kept.

    Returns:
      A pair for every id that both have; ids without an answer on one side, or with the
      same on both, are in `report['dropped']`.

    Raises:
      ValueError: no pair at all, or two examples of one data set with the same id.
    """
    answered, under_long = wrapped(short, split), wrapped(long, split)
    under_short = {x.id: x for x in _distinct(answered, "short")}
    _distinct(under_long, "long")
    rows, dropped = [], []
    for i in range(len(under_long)):
        example = under_long[i]
        other = under_short.get(example.id)
        if other is None or not (other.responses and example.responses):
            dropped.append(f"{example.id}: no answer under one of the two contexts")
            continue
        sides = (other.responses[0], example.responses[0])
        if sides[0] == sides[1]:
            dropped.append(f"{example.id}: the same answer under both contexts")
            continue
        rows.append(
            Example(
                example.id, example.prompt, sides, (1.0, 0.0),
                template=example.template,
            )
        )  # fmt: skip
    if not rows:
        raise ValueError(f"no pair among {len(under_long)} answers; {dropped[:1]}")
    report = {k: [*v] for k, v in under_long.report.items()}
    for kind, lines in (*answered.report.items(), ("dropped", dropped)):
        report[kind] = [*report.get(kind, []), *lines]
    return Examples(rows, report=report)


def _distinct(data: Examples, name: str) -> list[Example]:
    """The examples; raises ValueError if two have the same id."""
    places: dict[str, int] = {}
    for i, example in enumerate(data):
        if (other := places.setdefault(example.id, i)) != i:
            raise ValueError(
                f"examples {other} and {i} of {name} have the same id, {example.id!r}"
            )
    return [*data]
