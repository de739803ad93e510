"""Settings of sampling that the rows of `config.prompts` bring: `config.generate.per_row`.

A row with {"prompt": ..., "temperature": 0.2, "max_new": 40} is answered at its own
temperature, with at most 40 tokens, where config.generate.per_row = ("temperature",
"max_new"). Every row needs all of the settings that are named there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alignax import plugin
from alignax.batch import Example
from alignax.training import ranges

NAMES = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "min_new", "max_new",
)  # fmt: skip
ARGUMENTS = {"max_new": "limits"}  # of `decode.generate`, where it has another name


def check(config, decoder: plugin.Bound | None) -> None:
    """Raises ValueError for a name that is no setting of a row, or beside a search.

    A search draws all of its responses with the same settings.
    """
    names = config.generate.per_row
    if names and decoder is not None and decoder.role == "search":
        raise ValueError(
            f"decoder {decoder.name} has the same settings for all prompts: "
            "config.generate.per_row is for sampling, guides and drafts"
        )
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"config.generate.per_row has {name!r}; a row may bring {', '.join(NAMES)}"
            )


def read(
    config,
    examples: Sequence[Example],
    forced: Sequence[int],
    place: Callable[[int], str],
) -> dict[str, np.ndarray]:
    """The settings of each prompt as arguments of `decode.generate`, [M] for M prompts.

    Args:
      config: a ConfigDict.
      examples: the prompts; their columns are read.
      forced: tokens of forced text of each.
      place: index -> where a prompt comes from, for messages.

    Raises:
      ValueError: a row without a setting, with one out of its range, or with a max_new
        that is less than its min_new or its forced text.
    """
    found: dict[str, np.ndarray] = {}
    for name in config.generate.per_row:
        key, default = f"generate.{name}", config.generate[name]
        whole = isinstance(default, int)
        values: list[Any] = []
        for i, example in enumerate(examples):
            value = example.columns.get(name)
            if whole and isinstance(value, float) and value.is_integer():
                value = int(value)  # a column of a table with gaps
            try:
                ranges.check_number(key, value, whole=whole, within=ranges.RANGES[key])
            except ValueError as error:
                told = str(error).replace(f"config.{key}", f"the row's {name}")
                raise ValueError(
                    f"{place(i)}: {told}, as generate.per_row says"
                ) from error
            if name == "max_new" and value > default:
                raise ValueError(
                    f"{place(i)}: the row's max_new is {value}, more than "
                    f"config.generate.max_new={default}"
                )
            values.append(value)
        kind = np.int32 if whole else np.float32
        found[ARGUMENTS.get(name, name)] = np.array(values, kind)
    many = len(examples)
    most = found.get("limits", np.full(many, config.generate.max_new))
    least = found.get("min_new", np.full(many, config.generate.min_new))
    wrong = np.flatnonzero(np.maximum(least, forced) > most).tolist() if found else []
    for i in wrong[:1]:
        raise ValueError(
            f"{place(i)}: max_new is {most[i]}, but min_new is {least[i]} and the "
            f"forced text has {forced[i]} tokens"
        )
    return found
