"""A batch as text: its responses, one prompt with the mask marked, or another's ids."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from alignax.batch import Batch, Example, Message, from_groups
from alignax.records import messages
from alignax.text.tokenizer import Tokenizer

BUCKET = 64  # T of `retokenize` is a multiple of it, for few compilations


def texts(batch: Batch, tokenizer: Tokenizer) -> list[list[str]]:
    """The scored tokens of every response as text: B lists of G.

    Turns between which something is not scored are on lines of their own.
    """
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)

    def one(ids: np.ndarray, scored: np.ndarray) -> str:
        at = np.flatnonzero(scored)
        turns = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        return "\n".join(tokenizer.decode(ids[turn].tolist()) for turn in turns)

    return [
        [one(t, m) for t, m in zip(*group, strict=True)]
        for group in zip(tokens, mask, strict=True)
    ]


def begun(prompt: str | Sequence[Message]) -> str:
    """What a prompt gives of the response: the text of a last turn that is the assistant's."""
    last: Message = {} if isinstance(prompt, str) or not prompt else prompt[-1]
    if last.get("role") != "assistant":
        return ""
    return messages.text({"content": None, **last})


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


def retokenize(
    prompts: Sequence[str | Sequence[Message]], texts: Sequence[Sequence[str]],
    valid: Bool[np.ndarray, "B G"], tokenizer: Tokenizer, *, length: int,
) -> Batch:  # fmt: skip
    """Prompts and responses as text, rendered and tokenised for another LM.

    Args:
      prompts: B prompts.
      texts: B lists of G responses.
      valid: responses that count; the ids of the others have no meaning.
      tokenizer: of the LM that is to read them. Its EOS in the text of a response is
        left out: it would end the turn.
      length: most tokens of a row. A longer one loses the left of its prompt, then the
        right of its response.

    Returns:
      A Batch [B, G, T] of host arrays, where `valid` only as given.
    """
    ends = [tokenizer.decode([i], keep_specials=True) for i in tokenizer.eos_ids]
    asked, answers, scored = [], [], []
    for prompt, group in zip(prompts, texts, strict=True):
        example = Example("", prompt, tuple(_without(t, ends) for t in group))
        ids, responses, marks = tokenizer.tokenize(example)
        room = max(1, length - max(map(len, responses)))
        asked.append(ids[-room:])
        left = length - len(asked[-1])
        answers.append([r[:left] for r in responses])
        scored.append([m[:left] for m in marks])
    longest = max(
        len(p) + len(r) for p, g in zip(asked, answers, strict=True) for r in g
    )
    batch = from_groups(
        asked, answers, scored=scored, length=-(-longest // BUCKET) * BUCKET
    )
    counts: Any = np.asarray(batch.valid) & valid
    return batch._replace(valid=counts)


def _without(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.replace(end, "") if end else text
    return text
