"""Rows: examples as token ids, cut to a length, with a count of all that was not used whole.

How an example that is too long is cut is in `truncation`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax import batch
from alignax.batch import Example
from alignax.inputs import forms, layout, truncation
from alignax.inputs.dialogues import Rendered, Tokens
from alignax.inputs.tokenizer import Tokenizer
from alignax.inputs.truncation import Fitted, TooLong

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


def read(
    examples: Sequence[Example], tokenizer: Tokenizer, *, length: int,
    vocab_size: int | None, counts: dict[str, Any],
) -> list[Row]:  # fmt: skip
    """Tokenises and cuts all examples.

    Args:
      examples: their attribute `report`, if any, has the lines that were not readable;
        `carried`, the names of the columns that go into a Batch (all numbers by default).
      tokenizer: from `tokenizer.load`; its `reading` says how rows are read and cut.
      length: tokens of a row, at least 2.
      vocab_size: V of the model, or None for no check.
      counts: from `no_counts`; updated in place.

    Raises:
      ValueError: no usable example; examples with different columns; an id at or beyond
        `vocab_size`.
    """
    if length < 2:
        raise ValueError(f"length is {length}, expected at least 2")
    truncation.check(tokenizer.reading, length)
    tokenizer = tokenizer.for_data(examples)
    note_report(counts, examples)
    carried = getattr(examples, "carried", None)
    rows: list[Row] = []
    for example, fitted in _fitted(examples, tokenizer, length, counts):
        row = _row(example, fitted, carried)
        if rows and row.columns.keys() != rows[0].columns.keys():
            raise ValueError(
                f"{row.id} has columns {sorted(row.columns)}, {rows[0].id} has "
                f"{sorted(rows[0].columns)}"
            )
        _check_ids(row, tokenizer, vocab_size)
        rows.append(row)
    if not rows:
        reasons = counts["malformed_ids"] + counts["dropped_ids"]
        why = "; first: " + reasons[0] if reasons else ": the data set is empty"
        raise ValueError(f"no usable example among {counts['read']} read{why}")
    return rows


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
    """(example, its ids) of all that are usable; the others are counted."""
    dialogues, encoder = tokenizer.dialogues, tokenizer.encoder
    for start in range(0, len(examples), CHUNK):
        some: list[tuple[Example, Rendered]] = []
        for i in range(start, min(start + CHUNK, len(examples))):
            example = examples[i]
            counts["read"] += 1
            _add(counts["forms"], batch.form(example), example.id)
            try:
                some.append((example, render(example, tokenizer)))
            except ValueError as e:
                note(counts, "malformed", f"{example.id}: {e}")
        with contextlib.suppress(ValueError):  # of one of them, which says so below
            encoder.prefetch(k for _, rendered in some for k in rendered.wanted())
        for example, rendered in some:
            try:
                tokens = dialogues.ids(rendered)
                yield (
                    example,
                    _fit(example, rendered, tokens, tokenizer, length, counts),
                )
            except TooLong as e:
                note(counts, "dropped", f"{example.id}: {e}")
            except ValueError as e:
                note(counts, "malformed", f"{example.id}: {e}")


def _fit(
    example: Example, rendered: Rendered, tokens: Tokens, tokenizer: Tokenizer,
    length: int, counts: dict[str, Any],
) -> Fitted:  # fmt: skip
    """The ids of one usable example; what is remarkable is counted."""
    fitted = cut(example, rendered, tokens, tokenizer, length)
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
    for name, details in tokens.notes.items():
        explain(counts, example.id, name, details)
        _add(counts["notes"], name, f"{example.id}: {details}")
    return fitted


def render(example: Example, tokenizer: Tokenizer) -> Rendered:
    """An example as text.

    Raises:
      ValueError: no response, feedback that its form does not have (see
        `forms.feedback`), or a conversation that the tokenizer refuses.
    """
    if not example.responses:
        raise ValueError("no response")
    forms.feedback(example)
    return tokenizer.dialogues.render(example)


def cut(
    example: Example, rendered: Rendered, tokens: Tokens, tokenizer: Tokenizer,
    length: int,
) -> Fitted:  # fmt: skip
    """An example in at most `length` tokens, as the tokenizer's `reading` has it.

    Raises:
      TooLong: nothing usable is left.
    """
    return truncation.fit(
        example, rendered, tokens, tokenizer.dialogues, length=length,
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


def _check_ids(row: Row, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    top = max(int(x.max()) for x in (row.prompt, *row.responses))
    if top >= vocab_size:
        raise ValueError(
            f"{row.id}: token id {top} "
            f"({tokenizer.decode([top], keep_specials=True)!r}) is beyond the "
            f"model's vocabulary of {vocab_size}"
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


def note(counts: dict[str, Any], name: str, *lines: str) -> None:
    """Counts rows that are not used, of which the first reasons are kept."""
    counts[name] += len(lines)
    for line in lines:
        place, _, reason = line.partition(": ")
        explain(counts, place, name, reason)
    listed = counts[f"{name}_ids"]
    listed += lines[: LISTED - len(listed)]
