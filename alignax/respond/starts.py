"""The given beginnings of responses, as ids: a prefill, and forced text, which is scored.

Prompt and beginning are encoded as one text. A token that straddles prompt and prefill is
read as a whole; one that straddles these and the forced text belongs to the response.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.batch import Example
from alignax.text.dialogues import common
from alignax.text.tokenizer import Tokenizer


class Start(NamedTuple):
    """A prompt and how its responses begin: what the model gets is all of these ids."""

    prompt: list[int]  # at least one id
    prefill: list[int] = []  # given and not scored  # noqa: RUF012
    forced: list[int] = []  # given and scored  # noqa: RUF012
    guide: list[int] = []  # what a guide reads instead of both; [] reads both  # noqa: RUF012


def start(
    text: Tokenizer, prompt: Example | Sequence[int], prefill: str = "", forced: str = ""
) -> Start:  # fmt: skip
    """A prompt and the beginning of its responses, as ids.

    Args:
      text: the tokenizer.
      prompt: an example, of which only the prompt and the template variables are read; or
        ids, which stay as they are.
      prefill: how the responses begin.
      forced: how they go on.

    Raises:
      ValueError: the template refuses the prompt, or it is empty, or it is only a part of
        the first token of the forced text.
    """
    if not isinstance(prompt, Example):
        ids = list(prompt)
        given = _behind(text, ids, prefill)
        return Start(ids, given, _behind(text, [*ids, *given], forced))
    ids = text.prompt(prompt)
    begun = text.prompt(prompt, prefill) if prefill else ids
    scored: list[int] = []
    if forced:
        whole = text.prompt(prompt, prefill + forced)
        n = common(begun, whole)
        begun, scored = whole[:n], whole[n:]
        if not n:
            raise ValueError(f"the prompt is a part of the first token of {forced!r}")
    n = max(1, common(ids, begun))
    return Start(begun[:n], begun[n:], scored)


def guide_prompt(
    text: Tokenizer, example: Example, how: str, prefill: str
) -> list[int]:
    """Ids that a guide reads in place of a prompt and its prefill.

    Args:
      text: the tokenizer.
      example: the prompt.
      how: 'no_system', the prompt without its system messages; 'column:NAME', the text in a
        column of the row; 'text:TEXT', this text for every prompt.
      prefill: how the responses begin.

    Raises:
      ValueError: another `how`; a prompt without a system message, or a row without that
        column.
    """
    kind, _, rest = how.partition(":")
    if how == "no_system":
        given = [] if isinstance(example.prompt, str) else [*example.prompt]
        other: Any = [m for m in given if m["role"] != "system"]
        if len(other) == len(given):
            raise ValueError(
                "generate.guide_prompt is 'no_system', but the prompt has no system message"
            )
    elif kind == "column" and rest:
        other = example.columns.get(rest)
        if not isinstance(other, str) or not other.strip():
            raise ValueError(
                f"generate.guide_prompt is {how!r}, but the row's {rest!r} is {other!r}, "
                "expected a text"
            )
    elif kind == "text" and rest.strip():
        other = rest
    else:
        raise ValueError(
            f"generate.guide_prompt is {how!r}, expected 'no_system', 'column:NAME' or "
            "'text:TEXT'"
        )
    return text.prompt(example._replace(prompt=other), prefill)


def arrays(starts: Sequence[Start], widest: Sequence[Start]) -> dict[str, Any]:
    """The beginnings as arguments of `decode.generate`.

    Args:
      starts: of B prompts.
      widest: those of all batches, so that the arrays of all have one shape.

    Returns:
      'prefill' [B, F], 'prefill_lengths' [B] where they differ, 'forced' [B, F] with -1 on
      padding, 'guide_prompts' [B, P], 'guide_lengths' [B]; without those that are empty.
    """
    out: dict[str, Any] = {}
    if width := max(len(s.prefill) for s in widest):
        out["prefill"] = _padded([s.prefill for s in starts], width, 0)
        sizes = [len(s.prefill) for s in starts]
        if min(len(s.prefill) for s in widest) < width:
            out["prefill_lengths"] = np.array(sizes, np.int32)
    if width := max(len(s.forced) for s in widest):
        out["forced"] = _padded([s.forced for s in starts], width, -1)
    if width := max(len(s.guide) for s in widest):
        out["guide_prompts"] = _padded([s.guide for s in starts], width, 0)
        out["guide_lengths"] = np.array([len(s.guide) for s in starts], np.int32)
    return out


def _padded(rows: Sequence[list[int]], width: int, fill: int) -> np.ndarray:
    return np.array([row + [fill] * (width - len(row)) for row in rows], np.int32)


def _behind(text: Tokenizer, ids: list[int], more: str) -> list[int]:
    """The ids of a text behind other ids, without what begins a text."""
    if not more:
        return []
    for known in (text.decode(ids, keep_specials=True), "a"):
        front, whole = text.encode(known), text.encode(known + more)
        if whole[: len(front)] == front and (known == "a" or front == ids):
            return whole[len(front) :]
    return text.encode(more)
