"""Prompts as arrays to generate from, without their responses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from alignax.batch import Example
from alignax.inputs.plan import bucket_sizes, fit
from alignax.inputs.rows import cut_prompt
from alignax.inputs.tokenizer import Tokenizer


class PromptBatch(NamedTuple):
    """Prompts to generate from."""

    tokens: Int[np.ndarray, "B P"]  # right-padded
    lengths: Int[np.ndarray, " B"]  # at least 1, also where a row is filler
    valid: Bool[np.ndarray, " B"]  # False on rows that fill up the last batch
    texts: list[str]  # the prompts as the model reads them
    ids: list[str]
    columns: dict[str, Float[np.ndarray, " B"]]  # of the examples


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
      length: most tokens per prompt; longer ones lose their left end, BOS stays.
      buckets: the values of P that occur; as for `dataset_source`.

    Raises:
      ValueError: no examples, or examples with different columns.
    """
    if not len(examples):
        raise ValueError("no prompts: the data set is empty")
    names = column_names(examples)
    sizes = bucket_sizes(buckets, length)
    out = []
    for start in range(0, len(examples), batch_size):
        some = [
            examples[i] for i in range(start, min(start + batch_size, len(examples)))
        ]
        ids = [cut_prompt(tokenizer.prompt(e), length, tokenizer.bos_id) for e in some]
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
            )
        )
    return out


def column_names(examples: Sequence[Example]) -> list[str]:
    """The columns that all examples have.

    Raises:
      ValueError: two examples have different ones.
    """
    first = examples[0]
    names = sorted(first.columns)
    for i in range(len(examples)):
        e = examples[i]
        if sorted(e.columns) != names:
            raise ValueError(
                f"{e.id} has columns {sorted(e.columns)}, {first.id} has {names}"
            )
    return names
