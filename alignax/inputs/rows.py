"""Rows: examples as token ids, cut to a length, with a count of what was cut or left out.

An example that is too long is cut in this order: the prompt loses tokens on its left (BOS
stays) down to one; then the response loses its right end and, with it, its EOS; an example
with a response that has no scored token left is dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.batch import Example
from alignax.inputs import forms, layout
from alignax.inputs.tokenizer import Tokenized, Tokenizer

LISTED = 20  # how many dropped or malformed ids a report lists


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
      examples: their attribute `report`, if any, has the lines that were not readable.
      tokenizer: from `tokenizer.load`.
      length: tokens of a row, at least 2.
      vocab_size: V of the model, or None for no check.
      counts: from `no_counts`; updated in place.

    Raises:
      ValueError: no usable example; examples with different columns; an id at or beyond
        `vocab_size`.
    """
    if length < 2:
        raise ValueError(f"length is {length}, expected at least 2")
    refused = getattr(examples, "report", None) or {}
    for kind, lines in refused.items():
        name = "malformed" if kind == "malformed" else "dropped"
        _note(counts, name, *lines)
        counts["read"] += len(lines)
    rows: list[Row] = []
    for i in range(len(examples)):
        row = _row(examples[i], tokenizer, length, counts)
        if row is None:
            continue
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


def no_counts() -> dict[str, Any]:
    """The counts that `read` adds to, all zero."""
    zeros = dict.fromkeys(("read", "used", "cut", "dropped", "malformed"), 0)
    return {**zeros, "dropped_ids": [], "malformed_ids": []}


def _row(
    example: Example, tokenizer: Tokenizer, length: int, counts: dict[str, Any]
) -> Row | None:
    """One example as a row; None if it is malformed or dropped, which is counted."""
    counts["read"] += 1
    try:
        whole = tokenize(example, tokenizer)
    except ValueError as e:
        _note(counts, "malformed", f"{example.id}: {e}")
        return None
    part, was_cut = cut(whole, length, tokenizer.bos_id)
    # A scored token needs a prefix, which the prompt always gives.
    if not all(any(s) for s in part.scored):
        _note(counts, "dropped", f"{example.id}: no response left at length {length}")
        return None
    counts["cut"] += was_cut
    counts["used"] += 1
    responses = [np.array(r, np.int32) for r in part.responses]
    scored = [np.array(s, bool) for s in part.scored]
    return Row(
        example.id,
        np.array(part.prompt_ids, np.int32),
        responses,
        scored,
        forms.feedback(example),
        {k: float(v) for k, v in example.columns.items()},
        len(part.prompt_ids) + layout.group(responses, scored).size(),
    )


def tokenize(example: Example, tokenizer: Tokenizer) -> Tokenized:
    """An example as ids, not yet cut.

    Raises:
      ValueError: no response, feedback that its form does not have (see
        `forms.feedback`), or a conversation that the tokenizer refuses.
    """
    if not example.responses:
        raise ValueError("no response")
    forms.feedback(example)
    return tokenizer.tokenize(example)


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


def _note(counts: dict[str, Any], name: str, *lines: str) -> None:
    counts[name] += len(lines)
    listed = counts[f"{name}_ids"]
    listed += lines[: LISTED - len(listed)]


def cut(
    tokenized: Tokenized, length: int, bos_id: int | None
) -> tuple[Tokenized, bool]:
    """Cuts an example to `length` tokens: the prompt's left, then the responses' right.

    Args:
      tokenized: a prompt and its G responses; they keep one common prompt.
      length: at least 2.
      bos_id: kept if the prompt starts with it; None if there is none.

    Returns:
      The example, in which a response may have lost all of its scored tokens, and
      whether anything was cut.
    """
    prompt, responses, scored = tokenized
    longest = max(map(len, responses))
    if len(prompt) + longest <= length:
        return tokenized, False
    prompt = cut_prompt(prompt, max(1, length - longest), bos_id)
    room = length - len(prompt)
    return Tokenized(
        prompt, [r[:room] for r in responses], [s[:room] for s in scored]
    ), True


def cut_prompt(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """The last `room` (at least 1) ids of a prompt; a BOS at its start stays."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos_id:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[-room:]
