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
    if not len(under_long):  # a split that is to have no rows
        return under_long
    places = _places(answered, "short")
    _places(under_long, "long")
    rows, dropped = [], []
    for i, example in enumerate(under_long):
        j = places.get(example.id)
        other = None if j is None else answered[j]
        if other is None or not (other.responses and example.responses):
            dropped.append(f"{example.id}: no answer under one of the two contexts")
        elif other.responses[0] == example.responses[0]:
            dropped.append(f"{example.id}: the same answer under both contexts")
        else:
            rows.append((j, i))
    if not rows:
        raise ValueError(f"no pair among {len(under_long)} answers; {dropped[:1]}")
    report = {k: [*v] for k, v in answered.report.items()}
    report["dropped"] = [*report.get("dropped", []), *dropped]

    def convert(row: tuple[int, int]) -> Example:
        other, example = answered[row[0]], under_long[row[1]]
        sides = (other.responses[0], example.responses[0])
        return example._replace(responses=sides, feedback=(1.0, 0.0), form="")

    found = under_long.over(rows, convert, report, carried=answered.carried or ())
    found.files = tuple(dict.fromkeys((*found.files, *answered.files)))
    return found


def _places(data: Examples, name: str) -> dict[str, int]:
    """The index of every id; raises ValueError if two examples have the same one."""
    places: dict[str, int] = {}
    for i, example in enumerate(data):
        if (other := places.setdefault(example.id, i)) != i:
            raise ValueError(
                f"examples {other} and {i} of {name} have the same id, {example.id!r}"
            )
    return places
