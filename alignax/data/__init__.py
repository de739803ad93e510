"""Where examples come from: one file per data set, each with `examples(*, split, ...)`.

`examples` returns a random-access sequence of `Example`. What was malformed or dropped
on the way is in its `report`, by kind, one line each with file and line number.

Reading order: jsonl (your own files), hub, hh_rlhf, gsm8k, synthetic (made here), prompts, pairing and
unpaired (pairs from scored responses, and single responses from pairs); then the data of
single papers: forget_retain, tofu, honesty, recovery, urial, short_long, long_context, density_ratio. The
forms that rows of a file may have are in README.md, the code that reads them in `records/`.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from alignax import plugin
from alignax.batch import FORMS, Example, form

KINDS = ("pairs", "sft", "prompts", "groups")


class Examples(Sequence):
    """A random-access sequence of Example over any random-access source of rows.

    Attributes:
      report: lines that say what was left out and why, by kind: 'malformed', 'dropped'.
      files: paths of the files that the rows were read from.
      carried: names of the columns that are numbers for a batch (`Batch.extra`); others
        travel with the example only. None stands for all numbers.
    """

    def __init__(
        self,
        rows: Any,
        convert: Callable[[Any], Example] | None = None,
        report: dict[str, list[str]] | None = None,
        *,
        files: Sequence[str] = (),
        carried: Sequence[str] | None = None,
    ):
        self._rows, self._convert = rows, convert
        self.report = report or {}
        self.files = tuple(files)
        self.carried = None if carried is None else tuple(carried)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.over(range(len(self))[index], self.__getitem__)
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = self._rows[index % len(self)]
        return row if self._convert is None else self._convert(row)

    def __iter__(self) -> Iterator[Example]:
        """The examples in order, which for a file is faster than one by one."""
        return iter(
            self._rows if self._convert is None else map(self._convert, self._rows)
        )

    def place(self, index: int) -> str:
        """The id of an example, with its file and line where these are known."""
        row, own = self._rows[index], self[index].id
        inner = getattr(self._convert, "__self__", None)
        if isinstance(inner, Examples):
            return inner.place(row)
        line = getattr(row, "number", None)
        if line is None or not self.files:
            return own
        where = f"{os.path.basename(self.files[0])}:{line}"
        return own if where in own else f"{where} ({own})"

    def checked(self) -> "Examples":
        """These examples, after each was made once, so that a bad one is an error now."""
        for _ in self:
            pass
        return self

    def over(
        self,
        rows: Any,
        convert: Callable[[Any], Example] | None = None,
        report: dict[str, list[str]] | None = None,
        carried: Sequence[str] = (),
    ) -> "Examples":
        """Other examples made of these, with their files, columns and report.

        Args:
          rows: a random-access source, such as indices of these examples.
          convert: from a row to an example.
          report: what was left out further.
          carried: columns for a batch that the new examples have in addition.
        """
        lines = {k: [*v] for k, v in self.report.items()}
        for kind, more in (report or {}).items():
            lines[kind] = [*lines.get(kind, []), *more]
        both = self.carried
        if both is not None:
            both = tuple(dict.fromkeys((*both, *carried)))
        return Examples(rows, convert, lines, files=self.files, carried=both)


def as_kind(example: Example, kind: str) -> Example:
    """An example as a pair, a group, a response to imitate ('sft'), or its prompt.

    'pairs' takes pairs as they are, and orders two scored responses, the better one first;
    their scores stay the feedback. 'sft' takes the chosen or the best response (the first
    of equally good ones), a labelled one whose label is above 0.5, and all of those that
    have no scores. 'groups' takes any number of responses that have an order: pairs, or
    more with scores.

    Raises:
      ValueError: another kind, or an example that cannot be so read; says why.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    if kind == "prompts":
        return example._replace(responses=example.responses[:0], feedback=(), form="")
    convert = {"pairs": _as_pair, "groups": _as_group, "sft": _as_demonstration}
    return convert[kind](example, form(example))


def best_first(example: Example) -> Example:
    """A scored group with its best response first; any other example as it is."""
    many = len(example.responses)
    if form(example) != "groups" or len(example.feedback) != many:
        return example
    order = sorted(range(many), key=lambda i: -example.feedback[i])
    return example._replace(
        responses=[example.responses[i] for i in order],
        feedback=tuple(example.feedback[i] for i in order),
    )


def _as_pair(example: Example, found: str) -> Example:
    if found == "pairs":
        return example
    if found == "unscored":
        raise ValueError(
            f"{len(example.responses)} responses without 'scores': which one is better is "
            "not said"
        )
    if found != "groups":
        raise ValueError(f"no pair, but {FORMS.get(found, found)}")
    scores = example.feedback
    if len(scores) != 2 or len(example.responses) != 2:
        raise ValueError(
            f"{len(example.responses)} responses with {len(scores)} scores are no pair: "
            "data.pairing makes pairs of them"
        )
    if scores[0] == scores[1]:
        raise ValueError(
            f"both responses have the score {scores[0]:g}: a tie is no pair (data.pairing "
            "leaves ties out)"
        )
    order = (0, 1) if scores[0] > scores[1] else (1, 0)
    return example._replace(
        responses=tuple(example.responses[i] for i in order),
        feedback=tuple(scores[i] for i in order),
        form="pairs",
    )


def _as_group(example: Example, found: str) -> Example:
    if len(example.responses) < 2:
        raise ValueError(
            f"a group of {len(example.responses)}, expected two responses or more"
        )
    if found == "mismatched":
        raise ValueError(f"no group, but {FORMS[found]}")
    if not example.feedback:
        raise ValueError("a group whose responses have no 'scores'")
    return example


def _as_demonstration(example: Example, found: str) -> Example:
    if found in ("labelled", "mismatched") and example.feedback[0] <= 0.5:
        raise ValueError(
            f"the label is {example.feedback[0]:g}, not above 0.5: no response to imitate"
        )
    if found == "unscored":
        return example
    kept = best_first(example).responses[:1]
    return example._replace(responses=kept, feedback=(), form="")


def wrapped(source: Mapping[str, Any], split: str) -> Examples:
    """The data set inside another: {'name': ..., its own parameters}, of a split."""
    parameters = {"split": split, **source}
    if "name" not in parameters:
        raise ValueError(f"source has no 'name': {dict(source)}")
    inner = plugin.load("data", parameters.pop("name"), parameters)()
    if isinstance(inner, Examples):
        return inner
    return Examples(inner, report=getattr(inner, "report", None))


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several files one after another; at least one file."""
    first = parts[0]
    if len(parts) == 1:
        return first
    ends = np.cumsum([len(part) for part in parts])

    def convert(i: int) -> Example:
        k = int(np.searchsorted(ends, i, side="right"))
        return parts[k][i - int(ends[k]) + len(parts[k])]

    rows = first.over(range(int(ends[-1])), convert)
    for part in parts[1:]:
        for kind, lines in part.report.items():
            rows.report.setdefault(kind, []).extend(lines)
    rows.files = tuple(name for part in parts for name in part.files)
    return rows


def held_out(text: str, fraction: float) -> bool:
    """Whether `text` is in the held-out part: a stable property of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def share(test_fraction: float | None, split: str) -> float:
    """The share of a file that is held out.

    Args:
      test_fraction: None if the file is not divided, 0 if there is to be no test.
      split: 'train', 'test' or 'all'.

    Raises:
      ValueError: another split, a share outside [0, 1], or the test split of a file that
        is not divided.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}, expected 'train', 'test' or 'all'")
    if test_fraction is None:
        if split == "test":
            raise ValueError(
                "no part of the file is held out as split 'test': set test_fraction (0 "
                "for no test), or put '{split}' in the path"
            )
        return 0.0
    number = isinstance(test_fraction, int | float)
    if isinstance(test_fraction, bool) or not number or not 0 <= test_fraction <= 1:
        raise ValueError(f"test_fraction is {test_fraction!r}, expected 0 to 1")
    return float(test_fraction)


def none_left(path: Any, split: str, fraction: float, rows: int) -> str:
    """What to set where a split of `rows` rows has none, as a message."""
    what = "a larger" if split == "test" else "a smaller"
    return (
        f"{path} has no usable row for split {split!r} among {rows} rows: the hash of the "
        f"prompt puts none of them there at test_fraction={fraction:g}; set {what} one, "
        "test_fraction=0 for no test, or put '{split}' in the path of two files"
    )
