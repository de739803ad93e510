"""Single labelled responses, made of a data set whose responses have labels.

Each response becomes a row of its own. Slot 1 may hold a mismatched response, which answers
another prompt: KTO estimates the KL from the reference on those.

Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4
"""

import array
import collections
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from alignax.batch import Example, Message, form
from alignax.data import Examples, wrapped


def examples(
    *, split: str, source: Mapping[str, Any], mismatched: bool = True
) -> Examples:
    """The responses of an inner data set one by one, such as the two sides of pairs.

    The partner of a row is another row's response: the rows are sorted by prompt and
    rotated by the number of rows that the commonest prompt has. So every response is a
    partner once, no partner answers the prompt of its row, and the partners never change.

    Args:
      split: of the inner data set.
      source: the inner data set, {'name': ..., its own parameters}; its feedback holds
        labels, > 0.5 is desirable (pairs are labelled 1 and 0, whatever their scores).
      mismatched: puts the partner into slot 1, with a feedback of 0; False leaves one
        response per row, as BCO expects.

    Returns:
      One row per response, in the order of the inner data set; `report` of the inner data.

    Raises:
      ValueError: a response without a label, or a prompt that has more than half of all
        rows, so that they cannot all be mismatched.
    """
    inner = wrapped(source, split)
    if not len(inner):  # a split that is to have no rows
        return inner
    rows, slots = array.array("q"), array.array("q")
    prompts: list[bytes] = []
    for i, example in enumerate(inner):
        labels = _labels(example)
        if not example.responses or len(labels) != len(example.responses):
            raise ValueError(
                f"{example.id}: {len(example.responses)} responses with "
                f"{len(labels)} labels; unpaired needs a label for each (pairs "
                "have them: kind='pairs')"
            )
        many = len(example.responses)
        rows.extend([i] * many)
        slots.extend(range(many))
        # Texts are not held. Two that have one digest would not be partners, that is all.
        prompts += [_digest(example.prompt)] * many
    places = np.stack([np.array(rows), np.array(slots)], 1)
    partners = None
    if mismatched:
        partners = np.array(
            rotation(prompts, lambda row: _key(inner[rows[row]].prompt))
        )
    convert = functools.partial(_example, inner, places, partners)
    return inner.over(range(len(places)), convert)


def rotation(
    prompts: Sequence[Hashable], text: Callable[[int], str] | None = None
) -> list[int]:
    """For every row the index of another with a different prompt, each used once.

    Args:
      prompts: of the rows, as text or digests.
      text: of the prompt of a row, for a message; by default the prompt itself.

    Raises:
      ValueError: more than half of the rows have the same prompt.
    """
    counts = collections.Counter(prompts)
    prompt, shift = counts.most_common(1)[0]
    if 2 * shift > len(prompts):
        prompt = text(prompts.index(prompt)) if text else str(prompt)
        raise ValueError(
            f"{shift} of {len(prompts)} rows have the prompt {prompt[:60]!r}: there are "
            "not enough other prompts to mismatch them with; use more data, or "
            "mismatched=False"
        )
    first = {p: n for n, p in enumerate(counts)}
    order = sorted(range(len(prompts)), key=lambda row: first[prompts[row]])
    # A block of equal prompts is no longer than the shift, so it maps beyond itself; and
    # it does not wrap around to itself, because block + shift <= rows.
    partners = [0] * len(order)
    for place, row in enumerate(order):
        partners[row] = order[(place + shift) % len(order)]
    return partners


def _example(inner, places, partners, row: int) -> Example:
    i, j = places[row].tolist()
    example = inner[i]
    responses, feedback = [example.responses[j]], [float(_labels(example)[j])]
    if partners is not None:
        other, slot = places[partners[row]].tolist()
        responses.append(inner[other].responses[slot])
        feedback.append(0.0)
    return example._replace(
        id=f"{example.id}/{j}", responses=responses, feedback=tuple(feedback),
        form="labelled" if partners is None else "mismatched",
    )  # fmt: skip


def _labels(example: Example) -> Sequence[float]:
    """The labels of the responses; scores of a pair say no more than which is better."""
    return (1.0, 0.0) if form(example) == "pairs" else example.feedback


def _digest(prompt: str | Sequence[Message]) -> bytes:
    return hashlib.blake2b(_key(prompt).encode(), digest_size=16).digest()


def _key(prompt: str | Sequence[Message]) -> str:
    """Equal for a string and for the user turn that it stands for."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps([dict(turn) for turn in turns], sort_keys=True)
