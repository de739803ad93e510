"""Prompts as arrays to generate from, without their responses."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from alignax.batch import Example
from alignax.inputs import rows
from alignax.inputs.plan import bucket_sizes, fit
from alignax.text import truncation
from alignax.text.tokenizer import Tokenizer


class PromptBatch(NamedTuple):
    """Prompts to generate from."""

    tokens: Int[np.ndarray, "B P"]  # right-padded
    lengths: Int[np.ndarray, " B"]  # at least 1, also where a row is filler
    valid: Bool[np.ndarray, " B"]  # False on rows that fill up the last batch
    texts: list[str]  # the prompts as the model reads them
    ids: list[str]
    columns: dict[str, Float[np.ndarray, " B"]]  # of the examples
    cut: int = 0  # how many valid rows lost a part of their prompt
    # what they were made of, and the place of each in it; filler repeats a place
    examples: Sequence[Example] = ()
    places: Int[np.ndarray, " B"] | None = None

    @property
    def extra(self) -> dict[str, np.ndarray]:
        """Columns of a Batch of responses: numbers, and 'row', a place in `examples`."""
        row = {} if self.places is None else {"row": self.places}
        return {**self.columns, **row}


class Usable(Sequence):
    """Examples whose prompts can be generated from.

    Attributes:
      counts: of all examples, as `rows.no_counts`.
      carried: names of the columns that go into a Batch; None is all numbers.
      reading: how these rows are read, as in `plugin.ReadAs`.
    """

    def __init__(
        self, examples: Sequence[Example], places: list[int], counts: dict[str, Any]
    ):
        self._examples, self._places, self.counts = examples, places, counts
        self.carried = getattr(examples, "carried", None)
        self.reading = getattr(examples, "reading", {})

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Usable(self._examples, self._places[index], self.counts)
        return self._examples[self._places[index]]


def usable(
    examples: Sequence[Example], tokenizer: Tokenizer, *, length: int,
    counts: dict[str, Any] | None = None,
) -> Usable:  # fmt: skip
    """The examples whose prompts can be generated from, found before a run begins.

    A prompt that the template refuses is malformed; one that is too long is dropped, or
    counted as cut, by the `truncate_prompts` of the tokenizer's `reading`.

    Args:
      examples: only their prompts are read; `report` as for `rows.read`.
      tokenizer: from `tokenizer.load`.
      length: most tokens per prompt.
      counts: from `rows.no_counts`, to be added to.

    Raises:
      ValueError: no usable prompt.
    """
    tokenizer = tokenizer.for_data(examples)
    counts = rows.no_counts() if counts is None else counts
    rows.note_report(counts, examples)
    places = []
    for i in range(len(examples)):
        example = examples[i]
        counts["read"] += 1
        try:
            _, cut, notes = _ids(
                example, tokenizer, length, tokenizer.reading.truncate_prompts
            )
        except truncation.TooLong as e:
            rows.note(counts, "dropped", f"{example.id}: {e}")
            continue
        except ValueError as e:
            rows.note(counts, "malformed", f"{example.id}: {e}")
            continue
        counts["used"] += 1
        rows.note_all(counts, example.id, notes)
        counts["cut"] += cut
        counts["cut_prompt"] += cut
        if cut:
            rows.explain(counts, example.id, "cut_prompt", f"at {length} tokens")
        places.append(i)
    if not places:
        reasons = [*counts["malformed_ids"], *counts["dropped_ids"]]
        why = f"; first: {reasons[0]}" if reasons else ": the data set is empty"
        raise ValueError(f"no usable prompt among {counts['read']} read{why}")
    return Usable(examples, places, counts)


def subset(examples: Sequence[Example], places: Iterable[int]) -> Usable:
    """The examples at some places, with all that `examples` says of them."""
    return Usable(examples, [int(i) for i in places], {})


def prompt_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int] = (),
) -> list[PromptBatch]:
    """The prompts of `examples` in their order, ready to generate from.

    Args:
      examples: only their prompts are read.
      tokenizer: from `tokenizer.load`.
      batch_size: B; the last batch is filled up with copies that are not valid.
      length: most tokens per prompt; longer ones are cut as the tokenizer's `reading` has
        it. (Where that drops them, `usable` has; what is too long here loses its oldest
        exchanges.)
      buckets: the values of P that occur; as for `dataset_source`.

    Raises:
      ValueError: no examples, or examples with different columns; a prompt that the
        template refuses, or that cannot be cut to `length`.
    """
    if not len(examples):
        raise ValueError("no prompts: the data set is empty")
    tokenizer = tokenizer.for_data(examples)
    names = column_names(examples)
    sizes = bucket_sizes(buckets, length)
    rule = tokenizer.reading.truncate_prompts
    rule = "exchanges" if rule == "drop" else rule
    out = []
    for start in range(0, len(examples), batch_size):
        places = [*range(start, min(start + batch_size, len(examples)))]
        some = [examples[i] for i in places]
        found = [_ids(e, tokenizer, length, rule) for e in some]
        ids, cut = [i for i, _, _ in found], sum(cut for _, cut, _ in found)
        fill = batch_size - len(some)
        ids, some = ids + ids[:1] * fill, some + some[:1] * fill
        tokens = np.full((batch_size, fit(max(map(len, ids)), sizes)), tokenizer.pad_id)
        for row, prompt in zip(tokens, ids, strict=True):
            row[: len(prompt)] = prompt
        out.append(
            PromptBatch(
                tokens.astype(np.int32),
                np.array([len(i) for i in ids], np.int32),
                np.arange(batch_size) < batch_size - fill,
                [tokenizer.decode(i, keep_specials=True) for i in ids],
                [e.id for e in some[: batch_size - fill]],
                {k: np.array([e.columns[k] for e in some], np.float32) for k in names},
                cut,
                examples,
                np.array(places + places[:1] * fill, np.int32),
            )
        )
    return out


def _ids(
    example: Example, tokenizer: Tokenizer, length: int, rule: str
) -> tuple[list[int], bool, dict[str, str]]:
    return truncation.fit_prompt(
        example, tokenizer.dialogues, room=length, rule=rule, bos_id=tokenizer.bos_id
    )


def column_names(examples: Sequence[Example]) -> list[str]:
    """The columns of all examples that go into a Batch.

    Raises:
      ValueError: two examples have different ones.
    """
    carried = getattr(examples, "carried", None)
    first = examples[0]
    names = rows.carried_columns(first, carried)
    for i in range(len(examples)):
        e = examples[i]
        if (found := rows.carried_columns(e, carried)) != names:
            raise ValueError(f"{e.id} has columns {found}, {first.id} has {names}")
    return names
