"""Rows: examples as token ids, cut to a length, with a count of all that was not used whole.

How an example that is too long is cut is in `truncation`.
"""

import array
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax import batch
from alignax.batch import Example
from alignax.inputs import forms, layout
from alignax.text import truncation
from alignax.text.dialogues import Prepared, Tokens
from alignax.text.tokenizer import Tokenizer
from alignax.text.truncation import Fitted, TooLong

LISTED = 20  # how many ids of each kind a report lists
CHUNK = 256  # examples that are encoded together
ZEROS = ("read", "used", "cut", "cut_prompt", "cut_response", "dropped", "malformed")


class Row(NamedTuple):
    """One example, cut to length: int32 ids and bools."""

    id: str
    prompt: np.ndarray
    responses: list[np.ndarray]
    scored: list[np.ndarray]
    feedback: Sequence[float]
    columns: Mapping[str, float]
    distinct: int  # tokens, a shared prefix counted once: see `layout.group`

    def length(self) -> int:
        return len(self.prompt) + max(len(r) for r in self.responses)


class Rows(Sequence[Row]):
    """The usable rows of a data set, random access.

    Attributes:
      lengths: int32, tokens of each row.
      distinct: int32, tokens of each row, a shared prefix counted once.
      tokens: int32, tokens of each row, the prompt counted with every response.
      group: the most responses of a row.
      columns: names of those that go into a Batch.
      top: the largest id.
      counts: of all examples that were read, from `no_counts`.
    """

    def __init__(self, rows: Sequence[Row], sizes: "Sizes", counts: dict[str, Any]):
        self._rows = rows
        self.lengths, self.distinct, self.tokens = sizes.arrays()
        self.group, self.columns, self.top = sizes.group, sizes.columns or (), sizes.top
        self.counts = counts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def contents(self) -> Iterator[bytes]:
        """What every row holds, as bytes: for digests."""
        return (content(row) for row in self._rows)

    def check_ids(self, vocab_size: int, tokenizer: Tokenizer) -> None:
        """Raises ValueError for an id at or beyond the vocabulary of a model."""
        if self.top < vocab_size:
            return
        for row in self:
            found = max(int(x.max()) for x in (row.prompt, *row.responses))
            if found >= vocab_size:
                raise ValueError(
                    f"{row.id}: token id {found} "
                    f"({tokenizer.decode([found], keep_specials=True)!r}) is beyond the "
                    f"model's vocabulary of {vocab_size}"
                )


class Sizes:
    """What a plan has to know of all rows, gathered one by one."""

    def __init__(self) -> None:
        self._sizes = [array.array("i") for _ in range(3)]
        self.group, self.top, self.first = 0, 0, ""
        self.columns: tuple[str, ...] | None = None

    def add(self, row: Row) -> None:
        """Adds a row.

        Raises:
          ValueError: it has other columns than the first one.
        """
        names = tuple(sorted(row.columns))
        if self.columns is None:
            self.columns, self.first = names, row.id
        elif names != self.columns:
            raise ValueError(
                f"{row.id} has columns {list(names)}, {self.first} has "
                f"{list(self.columns)}"
            )
        many = sum(len(row.prompt) + len(r) for r in row.responses)
        numbers = (row.length(), row.distinct, many)
        for sizes, number in zip(self._sizes, numbers, strict=True):
            sizes.append(number)
        self.group = max(self.group, len(row.responses))
        self.top = max(self.top, *(int(x.max()) for x in (row.prompt, *row.responses)))

    def __len__(self) -> int:
        return len(self._sizes[0])

    def described(self) -> dict[str, Any]:
        """What is known of all rows together."""
        return {
            "group": self.group, "top": self.top, "columns": list(self.columns or ()),
            "first": self.first,
        }  # fmt: skip

    def save(self, path: pathlib.Path) -> None:
        """Writes the sizes of the rows."""
        np.savez(path, sizes=np.stack(self.arrays()))

    @classmethod
    def loaded(cls, path: pathlib.Path, described: Mapping[str, Any]) -> "Sizes":
        """What `save` wrote, beside `described`."""
        out = cls()
        with np.load(path) as saved:
            out._sizes = [array.array("i", row.tobytes()) for row in saved["sizes"]]
        out.group, out.top = described["group"], described["top"]
        out.columns, out.first = tuple(described["columns"]), described["first"]
        return out

    def arrays(self) -> list[np.ndarray]:
        """Lengths, distinct tokens and all tokens of the rows, int32."""
        return [np.array(sizes, np.int32) for sizes in self._sizes]


def content(row: Row) -> bytes:
    """What a row holds, as bytes; not its id."""
    parts = []
    for ids in (row.prompt, *row.responses, *row.scored):
        parts += [len(ids).to_bytes(4, "big"), ids.tobytes()]
    parts.append(repr((row.feedback, sorted(row.columns.items()))).encode())
    return b"".join(parts)


def read(
    examples: Sequence[Example], tokenizer: Tokenizer, *, length: int,
    counts: dict[str, Any] | None = None,
) -> Rows:  # fmt: skip
    """Tokenises and cuts all examples.

    Args: as for `stream`.

    Raises:
      ValueError: no usable example; examples with different columns.
    """
    counts = no_counts() if counts is None else counts
    rows, sizes = [], Sizes()
    for row in stream(examples, tokenizer, length=length, counts=counts):
        sizes.add(row)
        rows.append(row)
    check_any(len(rows), counts)
    return Rows(rows, sizes, counts)


def stream(
    examples: Sequence[Example], tokenizer: Tokenizer, *, length: int,
    counts: dict[str, Any],
) -> Iterator[Row]:  # fmt: skip
    """The usable rows one after another.

    Args:
      examples: their attribute `report`, if any, has the lines that were not readable;
        `carried`, the names of the columns that go into a Batch (all numbers by default).
      tokenizer: from `tokenizer.load`; its `reading` says how rows are read and cut.
      length: tokens of a row, at least 2.
      counts: from `no_counts`; updated in place.

    Raises:
      ValueError: a length that is too small.
    """
    if length < 2:
        raise ValueError(f"length is {length}, expected at least 2")
    tokenizer = tokenizer.for_data(examples)
    truncation.check(tokenizer.reading, length)
    note_report(counts, examples)
    carried = getattr(examples, "carried", None)
    for example, fitted in _fitted(examples, tokenizer, length, counts):
        yield _row(example, fitted, carried)


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several data sets together."""
    out = no_counts(reasons=any("reasons" in part for part in parts))
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                for kind, (many, first) in value.items():
                    known = out[name].setdefault(kind, [0, first])
                    known[0] += many
            else:
                out[name] = out[name] + value
    for name in ("dropped_ids", "malformed_ids"):
        out[name] = out[name][:LISTED]
    return out


def check_any(used: int, counts: dict[str, Any]) -> None:
    """Raises ValueError if no row is usable, with the first reason."""
    if not used:
        reasons = counts["malformed_ids"] + counts["dropped_ids"]
        why = "; first: " + reasons[0] if reasons else ": the data set is empty"
        raise ValueError(f"no usable example among {counts['read']} read{why}")


def no_counts(*, reasons: bool = False) -> dict[str, Any]:
    """The counts that `read` adds to, all zero.

    'cut' rows lost some of their prompt ('cut_prompt'), of a response ('cut_response'), or
    of both. 'notes' is {what is remarkable: [rows, the first one's id and details]};
    'forms' {form of a row: [rows, the first one's id]}. With `reasons` there is also a
    list of {id, kind, reason} of every row that was not used whole or has a note.
    """
    lists: dict[str, Any] = {"dropped_ids": [], "malformed_ids": []}
    if reasons:
        lists["reasons"] = []
    return {**dict.fromkeys(ZEROS, 0), **lists, "notes": {}, "forms": {}}


def _fitted(
    examples: Sequence[Example], tokenizer: Tokenizer, length: int,
    counts: dict[str, Any],
) -> Iterator[tuple[Example, Fitted]]:  # fmt: skip
    """(example, its ids) of all that are usable; the others are counted.

    While a chunk of texts is encoded, which needs no Python, the next one is rendered.
    """
    waiting: tuple[list[tuple[Example, Prepared]], Any] | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for some in _prepared(examples, tokenizer, counts):
            keys = [key for _, prepared in some for key in prepared.wanted()]
            encoding = pool.submit(tokenizer.encoder.prefetch, keys)
            if waiting is not None:
                yield from _finished(*waiting, tokenizer, length, counts)
            waiting = some, encoding
        if waiting is not None:
            yield from _finished(*waiting, tokenizer, length, counts)


def _prepared(
    examples: Sequence[Example], tokenizer: Tokenizer, counts: dict[str, Any]
) -> Iterator[list[tuple[Example, Prepared]]]:
    """Chunks of examples as text; what the template refuses is counted."""
    some: list[tuple[Example, Prepared]] = []
    for example in examples:
        counts["read"] += 1
        _add(counts["forms"], batch.form(example), example.id)
        try:
            check(example)
            some.append((example, Prepared(tokenizer.dialogues, example)))
        except ValueError as e:
            note(counts, "malformed", f"{example.id}: {e}")
        if len(some) == CHUNK:
            yield some
            some = []
    yield some


def _finished(
    some: list[tuple[Example, Prepared]], encoding: Any, tokenizer: Tokenizer,
    length: int, counts: dict[str, Any],
) -> Iterator[tuple[Example, Fitted]]:  # fmt: skip
    with contextlib.suppress(ValueError):  # of one of them, which says so below
        encoding.result()
    for example, prepared in some:
        try:
            fitted = _fit(example, prepared, tokenizer, length, counts)
        except TooLong as e:
            note(counts, "dropped", f"{example.id}: {e}")
        except ValueError as e:
            note(counts, "malformed", f"{example.id}: {e}")
        else:
            yield example, fitted


def _fit(
    example: Example, prepared: Prepared, tokenizer: Tokenizer, length: int,
    counts: dict[str, Any],
) -> Fitted:  # fmt: skip
    """The ids of one usable example; what is remarkable is counted."""
    tokens = prepared.tokens()
    fitted = cut(example, prepared, tokens, tokenizer, length)
    own = fitted.scored[: own_responses(example)]
    # A scored token needs a prefix, which the prompt always gives.
    if not all(any(s) for s in own):
        raise TooLong(f"no room for a scored token at length {length}")
    counts["cut_prompt"] += fitted.cut_prompt
    counts["cut_response"] += fitted.cut_response
    counts["cut"] += fitted.cut_prompt or fitted.cut_response
    counts["used"] += 1
    for kind, was in (("prompt", fitted.cut_prompt), ("response", fitted.cut_response)):
        if was:
            explain(counts, example.id, f"cut_{kind}", f"at length {length}")
    note_all(counts, example.id, tokens.notes)
    return fitted


def check(example: Example) -> None:
    """Raises ValueError for an example without a response, or with other feedback."""
    if not example.responses:
        raise ValueError("no response")
    forms.feedback(example)


def cut(
    example: Example, prepared: Prepared, tokens: Tokens, tokenizer: Tokenizer,
    length: int,
) -> Fitted:  # fmt: skip
    """An example in at most `length` tokens, as the tokenizer's `reading` has it.

    Raises:
      TooLong: nothing usable is left.
    """
    whole = Fitted(tokens.prompt, tokens.responses, tokens.scored, False, False)
    if len(tokens.prompt) + max(map(len, tokens.responses)) <= length:
        return whole
    return truncation.fit(
        example, prepared.rendered, tokens, tokenizer.dialogues, length=length,
        reading=tokenizer.reading, bos_id=tokenizer.bos_id, own=own_responses(example),
    )  # fmt: skip


def own_responses(example: Example) -> int:
    """How many responses answer the prompt: not the second one of a mismatched row."""
    return 1 if batch.form(example) == "mismatched" else len(example.responses)


def _row(example: Example, fitted: Fitted, carried: Sequence[str] | None) -> Row:
    responses = [np.array(r, np.int32) for r in fitted.responses]
    scored = [np.array(s, bool) for s in fitted.scored]
    names = carried_columns(example, carried)
    return Row(
        example.id,
        np.array(fitted.prompt, np.int32),
        responses,
        scored,
        forms.feedback(example),
        {k: float(example.columns[k]) for k in names},
        len(fitted.prompt) + layout.group(responses, scored).size(),
    )


def _add(found: dict[str, list], name: str, example: str) -> None:
    """Counts one more of a kind, of which the first is kept."""
    if name in found:
        found[name][0] += 1
    else:
        found[name] = [1, example]


def carried_columns(example: Example, carried: Sequence[str] | None) -> list[str]:
    """Names of the columns that go into a Batch: all numbers, or those in `carried`."""
    return sorted(
        k
        for k, v in example.columns.items()
        if (k in carried if carried is not None else not isinstance(v, str))
    )


def note_report(counts: dict[str, Any], examples: Sequence[Example]) -> None:
    """Counts what the reader of the data left out."""
    for kind, lines in (getattr(examples, "report", None) or {}).items():
        note(counts, "malformed" if kind == "malformed" else "dropped", *lines)
        counts["read"] += len(lines)


def explain(counts: dict[str, Any], example: str, kind: str, reason: str) -> None:
    """Notes what happened to a row, where all reasons are wanted."""
    if "reasons" in counts:
        counts["reasons"].append({"id": example, "kind": kind, "reason": reason})


def note_all(counts: dict[str, Any], example: str, notes: Mapping[str, str]) -> None:
    """Counts what is remarkable about a row that is used."""
    for name, details in notes.items():
        if name != "plain_strings":  # said once, of all rows
            explain(counts, example, name, details)
        _add(counts["notes"], name, f"{example}: {details}")


def note(counts: dict[str, Any], name: str, *lines: str) -> None:
    """Counts rows that are not used, of which the first reasons are kept."""
    counts[name] += len(lines)
    for line in lines:
        place, _, reason = line.partition(": ")
        explain(counts, place, name, reason)
    listed = counts[f"{name}_ids"]
    listed += lines[: LISTED - len(listed)]
