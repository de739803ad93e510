"""Data sets of the user's own: JSON lines, a JSON array, or Parquet.

A row is one object; its keys decide what it is. README.md of this folder has a table of all
forms with an example each; the most usual are

  prompt, chosen, rejected        a preference pair; each a string or a list of messages
  chosen, rejected (messages)     a pair whose common first turns are the prompt
  prompt, response | completion   one response (with `label`, a number, as its feedback)
  messages                        a dialogue: every assistant turn is scored
  prompt, responses, scores       a group of responses, each with a number as feedback
  prompt                          a prompt alone, to generate from

A row's own `id`, text or an integer, is kept; where two rows have the same one, the place in
the file is appended to the second. Other keys become the columns of the example. A row that
is none of these, or a pair of identical responses, is malformed: it is reported with its
file and line, and left out. Rows stay on the disk and are read again where they are used.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from alignax.batch import Example
from alignax.data import KINDS, Examples, as_kind, held_out, none_left, share
from alignax.records import messages, row_forms, store, values
from alignax.records.files import existing
from alignax.records.row_forms import parse

__all__ = ["examples", "parse"]


def examples(
    *,
    split: str,
    path: str,
    kind: str | None = None,
    test_fraction: float | None = None,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    numbers: tuple[str, ...] = (),
) -> Examples:
    """Reads a file of examples.

    Args:
      split: 'train', 'test' or 'all' of the file; or, where `path` holds '{split}',
        the text that replaces it.
      path: a .jsonl, .json or .parquet file; the first two may be compressed (.gz).
      kind: None takes rows as they are; 'sft' takes the chosen side of pairs, 'prompts'
        the prompts alone; to 'groups' a row without two scored responses is malformed.
      test_fraction: share of prompts held out as 'test', by a hash of the prompt: rows
        with the same prompt are in the same split, in every file and every order. At 0
        the test split is empty, and no evaluation is made of it.
      strict: raises at the first row that cannot be used instead of counting it.
      columns: key in the file -> the key above, such as {'question': 'prompt'}.
      numbers: keys that every row has as a number, for a loss or a reweighting that reads
        them in a batch, such as 'weight' or 'margin'.

    Returns:
      The usable rows in order; `report` names those that are 'malformed', and those that
      are 'dropped' (chosen is scored below rejected).

    Raises:
      FileNotFoundError: no such file; names the files beside it.
      ValueError: an unknown file type, a damaged file, no usable row at all, a split
        that this file does not have or that would be empty, a key of `columns` that is in
        no row, a row without a number of `numbers`, or (strict) an unusable row.
    """
    found = read(split, path, kind, test_fraction, strict, columns, set())
    for example in found if numbers else ():
        for key in numbers:
            if not isinstance(example.columns.get(key), int | float):
                raise ValueError(
                    f"{example.id}: {key!r} is {example.columns.get(key)!r}, expected a "
                    "number in every row, as data.numbers says"
                )
    found.carried = tuple(numbers)
    return found


def usable(
    rows: Examples, convert: Callable[[Example], Any], *, size: int, strict: bool
) -> tuple[list[int], dict[str, list[str]]]:
    """Which rows a further reader can use: (their indices, a report of the 'malformed').

    Args:
      rows: from `examples`.
      convert: raises ValueError for a row that it cannot use.
      size: of them to use, from the start; 0 uses all.
      strict: raises at the first row that cannot be used instead of counting it.

    Raises:
      ValueError: a negative size, no usable row, or (strict) an unusable one.
    """
    if size < 0:
        raise ValueError(f"size is {size}, expected at least 0")
    found: list[int] = []
    report: dict[str, list[str]] = {}
    for index, example in enumerate(rows):
        try:
            convert(example)
        except ValueError as error:
            message = f"{rows.place(index)}: {error}"
            if strict:
                raise ValueError(message) from None
            report.setdefault("malformed", []).append(message)
            continue
        found.append(index)
        if len(found) == size:
            break
    if len(rows) and not found:
        raise ValueError(f"no usable row; first: {report['malformed'][0]}")
    return found, report


def read(
    split: str, path: str, kind: str | None, test_fraction: float | None, strict: bool,
    columns: Mapping[str, str] | None, ids: set[int],
) -> Examples:  # fmt: skip
    """Reads one of several files: see `examples`.

    Args:
      split, path, kind, test_fraction, strict, columns: as for `examples`.
      ids: digests of the ids that rows of other files have; those of this one are added.
    """
    if "{split}" in str(path):
        path, part = str(path).replace("{split}", split), "all"
    else:
        part = split
    fraction = share(test_fraction, part)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"data.kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if not isinstance(columns or {}, Mapping):
        raise ValueError(
            f"data.columns is {columns!r}, expected {{key in the file: key that is read}}, "
            "such as {'question': 'prompt'}"
        )
    names = dict(columns or {})
    if odd := [x for pair in names.items() for x in pair if not isinstance(x, str)]:
        raise ValueError(f"data.columns holds {odd[0]!r}, expected names of keys")
    row_forms.known(names)
    file = existing(path)
    rows = store.Store(file)
    report: dict[str, list[str]] = {}
    total = usable = 0
    seen: set[str] = set()
    identify = _Ids(file.name, ids)
    for number, offset, line in rows.scan():
        total += 1
        name = f"{file.name}:{number}"
        try:
            if isinstance(line, ValueError):
                raise line
            row = values.decode(line)
            if names and isinstance(row, dict):
                seen |= row.keys()
            example = parse(name, row, names)
            if kind is not None:
                example = as_kind(example, kind)
        except ValueError as e:
            if strict:
                raise ValueError(f"{name}: {e}") from e
            reason = "dropped" if isinstance(e, row_forms.Dropped) else "malformed"
            report.setdefault(reason, []).append(f"{name}: {e}")
            continue
        usable += 1
        again = identify(example.id, number)
        if part == "all" or held_out(_key(example), fraction) == (part == "test"):
            rows.keep(number, offset, line, again)
    rows.close()
    values.present(names, seen)
    if not usable:
        why = "; first " + "; first ".join(f"{k} row {v[0]}" for k, v in report.items())
        raise ValueError(
            f"{path} has no usable row for split {split!r} among {total} rows"
            + (why if report else "")
        )
    if not len(rows) and (part == "train" or fraction):
        raise ValueError(none_left(path, split, fraction, usable))
    convert = functools.partial(_example, file.name, kind, names)
    return Examples(rows, convert, report, files=(str(file),), carried=())


def _example(file: str, kind: str | None, names: dict[str, str], line: store.Line):
    place = f"{file}:{line.number}"
    example = parse(place, values.decode(line.text), names)
    if line.mark:
        example = example._replace(id=example.id + f" ({place})" * line.mark)
    return example if kind is None else as_kind(example, kind)


class _Ids:
    """How often the place of a row is appended to its id, so that no two are the same.

    Only digests of ids are held, and none of ids that are the place themselves: such a
    one can be met again in a row's own id only.
    """

    def __init__(self, file: str, seen: set[int]):
        self._file, self._seen = file, seen
        self._places = re.compile(re.escape(file) + r":(\d+)")

    def __call__(self, id: str, number: int) -> int:
        place = f"{self._file}:{number}"
        if id == place and not self._seen:
            return 0
        again = 0
        while again < 255 and self._taken(id, number):
            id, again = f"{id} ({place})", again + 1
        if id != place:
            digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
            self._seen.add(int.from_bytes(digest, "big"))
        return again

    def _taken(self, id: str, number: int) -> bool:
        match = self._places.fullmatch(id)
        if match and int(match[1]) < number:
            return True
        digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") in self._seen


def _key(example: Example) -> str:
    prompt = example.prompt
    return prompt if isinstance(prompt, str) else messages.whole(prompt)
