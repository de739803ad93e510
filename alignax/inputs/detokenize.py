"""A batch as readable text: its responses, or one prompt with the mask marked."""

import itertools
from collections.abc import Sequence

import numpy as np

from alignax.batch import Batch
from alignax.inputs.tokenizer import Tokenizer


def texts(batch: Batch, tokenizer: Tokenizer) -> list[list[str]]:
    """The scored tokens of every response as text: B lists of G."""
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    return [
        [tokenizer.decode(t[m].tolist()) for t, m in zip(*group, strict=True)]
        for group in zip(tokens, mask, strict=True)
    ]


def describe(batch: Batch, tokenizer: Tokenizer, row: int = 0) -> str:
    """One prompt of a batch as text, with what is scored between ⟦ and ⟧.

    Args:
      batch: host or addressable arrays.
      tokenizer: the one that made it.
      row: index into B.
    """
    lines = []
    for g in range(batch.tokens.shape[1]):
        tokens, mask = np.asarray(batch.tokens)[row, g], np.asarray(batch.mask)[row, g]
        n = int(np.asarray(batch.lengths)[row, g])
        text = marked(tokens[:n], mask[:n], tokenizer)
        valid = "" if np.asarray(batch.valid)[row, g] else ", not valid"
        lines.append(
            f"[{row}, {g}] {n} tokens, {int(mask.sum())} scored, {len(tokens) - n} padding, "
            f"feedback {float(np.asarray(batch.feedback)[row, g]):g}{valid}\n{text}"
        )
    return "\n".join(lines)


def marked(
    ids: Sequence[int] | np.ndarray,
    mask: Sequence[bool] | np.ndarray,
    tokenizer: Tokenizer,
) -> str:
    """Token ids as text, with what is scored between ⟦ and ⟧.

    Args:
      ids: of one row, without padding.
      mask: True on scored tokens.
      tokenizer: the one that made the ids.
    """
    tokens, scored = np.asarray(ids, int), np.asarray(mask, bool)
    # Runs of equal mask are decoded whole: a character may span several tokens.
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(tokens)]
    text = ""
    for a, b in itertools.pairwise(edges):
        run = tokenizer.decode(tokens[a:b].tolist(), keep_specials=True)
        text += f"⟦{run}⟧" if a < b and scored[a] else run
    return text
