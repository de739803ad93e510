"""Where examples come from: one file per data set, each with `examples(*, split, ...)`.

`examples` returns a random-access sequence of `Example`. What was malformed or dropped
on the way is in its `report`, by kind, one line each with file and line number.

Reading order: jsonl (your own files), hh_rlhf, synthetic (made here), prompts, pairing and
unpaired (pairs from scored responses, and single responses from pairs); then the data of
single papers: forget_retain, recovery, urial, short_long, long_context, density_ratio.
"""

import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alignax import plugin
from alignax.batch import FORMS, Example, form

KINDS = ("pairs", "sft", "prompts", "groups")


class Examples(Sequence):
    """A random-access sequence of Example over any random-access source of rows."""

    def __init__(
        self,
        rows: Any,
        convert: Callable[[Any], Example] | None = None,
        report: dict[str, list[str]] | None = None,
    ):
        self._rows, self._convert = rows, convert
        self.report = report or {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            picked = [self._rows[i] for i in range(len(self))[index]]
            return Examples(picked, self._convert, self.report)
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = self._rows[index % len(self)]
        return row if self._convert is None else self._convert(row)


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
    return Examples(inner, report=getattr(inner, "report", None))


def held_out(text: str, fraction: float) -> bool:
    """Whether `text` is in the held-out part: a stable property of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def existing(path: str | pathlib.Path) -> pathlib.Path:
    """`path`, if it is a file.

    Raises:
      FileNotFoundError: names the path and the files beside it.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob("*") if p.is_file())
    found = (
        f"files beside it: {beside[:20]}" if path.parent.is_dir() else "no such folder"
    )
    raise FileNotFoundError(f"no data file {path}; {found}")


def read_json_lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, object or ValueError) of a .jsonl or .jsonl.gz file.

    Blank lines are no data and are skipped. A line that cannot be read is yielded as
    the error that says why: the caller counts it.

    Raises:
      ValueError: the compressed file is damaged.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as f:
        lines = enumerate(f, 1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (EOFError, OSError, zlib.error) as e:
                raise ValueError(f"{path} is damaged or not gzip: {e}") from e
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as e:
                value = ValueError(f"not UTF-8: {e.reason} at byte {e.start}")
            except (json.JSONDecodeError, RecursionError) as e:
                value = ValueError(f"not JSON: {e}")
            yield number, value
