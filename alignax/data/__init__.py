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
from alignax.batch import Example

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
    """A pair as it is ('pairs'), its chosen side ('sft'), or its prompt ('prompts').

    'groups' takes any number of responses that have an order: pairs, or more with scores.

    Raises:
      ValueError: another kind; a group of one, or without a score for each response.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {KINDS}")
    if kind == "pairs":
        return example
    if kind == "groups":
        if len(example.responses) < 2:
            raise ValueError(
                f"a group of {len(example.responses)}, expected two responses or more"
            )
        if not example.feedback:
            raise ValueError("a group whose responses have no 'scores'")
        return example
    n = 1 if kind == "sft" else 0
    return example._replace(responses=example.responses[:n], feedback=())


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
