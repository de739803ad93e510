"""What is left of an example that is too long.

A response gives way before its prompt does. The prompt is cut only if it leaves too little
room for the responses: the oldest exchange first, whole, and the dialogue is rendered
again; then the front of the last user's text; never a system turn or a header. Then the
responses are cut at their end, at a whole character, and end without an EOS.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from alignax.batch import Example, Message
from alignax.text.dialogues import Dialogues, Reading, Rendered, Tokens, as_messages

RULES = {
    "response": "the response before the prompt, and of the prompt the oldest exchanges",
    "prompt": "the left end of the prompt before the right end of the response",
    "drop": "nothing: rows that are too long are dropped",
}
PROMPT_RULES = {
    "drop": "nothing: prompts that are too long are dropped",
    "exchanges": "the oldest exchanges, then the front of the last user's text",
    "left": "their left end",
}


class TooLong(ValueError):
    """Nothing usable is left of an example at this length."""


class Fitted(NamedTuple):
    """An example of at most a given number of tokens."""

    prompt: list[int]
    responses: list[list[int]]  # G lists
    scored: list[list[bool]]  # G lists
    cut_prompt: bool
    cut_response: bool


def check(reading: Reading, length: int) -> None:
    """Raises ValueError for an unknown rule, or a response that leaves no prompt."""
    for key, rules in (("truncate", RULES), ("truncate_prompts", PROMPT_RULES)):
        if (rule := getattr(reading, key)) not in rules:
            raise ValueError(
                f"config.{key} is {rule!r}, expected one of {', '.join(rules)}"
            )
    if not 0 <= reading.min_response < length:
        raise ValueError(
            f"config.min_response is {reading.min_response}, expected 0 to {length - 1}: below "
            f"config.length = {length}"
        )


def fit(
    example: Example, rendered: Rendered, tokens: Tokens, dialogues: Dialogues, *,
    length: int, reading: Reading, bos_id: int | None, own: int | None = None,
) -> Fitted:  # fmt: skip
    """An example in at most `length` tokens.

    Args:
      example: it is rendered again where exchanges are left out.
      rendered: the example as text.
      tokens: its ids, nothing cut.
      dialogues: what rendered and encoded it.
      length: tokens of prompt and response, at least 2.
      reading: its `truncate` and `min_response`.
      bos_id: kept where the left end of a prompt is cut.
      own: how many responses, from the first on, keep `min_response` tokens; None is all.
        Others (a response to another prompt) take the room that is left.

    Raises:
      TooLong: nothing usable is left.
    """
    prompt, responses, scored = tokens.prompt, tokens.responses, tokens.scored
    if len(prompt) + max(map(len, responses)) <= length:
        return Fitted(prompt, responses, scored, False, False)
    if reading.truncate == "drop":
        longest = len(prompt) + max(map(len, responses))
        raise TooLong(f"{longest} tokens, more than length {length}")
    if reading.truncate == "prompt":
        return _from_the_left(tokens, length, bos_id)
    least = reading.min_response or max(1, length // 4)
    rendered, tokens, left = _shorter(
        example, rendered, tokens, dialogues, least=least, length=length, own=own
    )
    prompt, room = tokens.prompt, length - _need(tokens, least, own)
    if room < 1:
        raise TooLong(f"no room for a scored token at length {length}")
    if len(prompt) > room:
        prompt = _without_front(prompt, dialogues.loose(rendered), room)
    room = length - len(prompt)
    out = []
    for g, (ids, mark) in enumerate(zip(tokens.responses, tokens.scored, strict=True)):
        n = len(ids)
        if n > room:
            n = _usable(mark[:room], dialogues.joint(rendered, g), len(tokens.prompt))
        if not n and (own is None or g < own):
            raise TooLong(f"no whole character of response {g} fits into {room} tokens")
        out.append((ids[: n or room], mark[:n] or [False] * room))
    cut_prompt = left is not example or prompt is not tokens.prompt
    cut_response = any(len(r) > room for r in tokens.responses)
    responses, scored = [ids for ids, _ in out], [mark for _, mark in out]
    return Fitted(prompt, responses, scored, cut_prompt, cut_response)


def fit_prompt(
    example: Example, dialogues: Dialogues, *, room: int, rule: str, bos_id: int | None
) -> tuple[list[int], bool, dict[str, str]]:  # fmt: skip
    """(the ids of a prompt to generate from, whether it was cut, what is remarkable).

    Args:
      example: only its prompt is read.
      dialogues: what renders and encodes it.
      room: most tokens, at least 1.
      rule: one of PROMPT_RULES.
      bos_id: kept where the left end is cut.

    Raises:
      TooLong: the prompt is dropped.
      ValueError: the template refuses it.
    """
    asked = example._replace(responses=(), feedback=())
    rendered = dialogues.render(asked)
    tokens = dialogues.ids(rendered)
    size = len(tokens.prompt)
    if size <= room:
        return tokens.prompt, False, tokens.notes
    if rule == "left":
        return left_cut(tokens.prompt, room, bos_id), True, tokens.notes
    if rule == "drop":
        raise TooLong(
            f"the prompt has {size} tokens, there is room for {room} "
            "(config.truncate_prompts = 'exchanges' or 'left' cuts it)"
        )
    rendered, tokens, _ = _shorter(
        asked, rendered, tokens, dialogues, least=0, length=room, own=None
    )
    if len(tokens.prompt) <= room:
        return tokens.prompt, True, tokens.notes
    shorter = _without_front(tokens.prompt, dialogues.loose(rendered), room)
    return shorter, True, tokens.notes


def left_cut(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """The last `room` (at least 1) ids of a prompt; a BOS at its start stays."""
    if len(ids) <= room:
        return ids
    if ids[0] == bos_id:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[-room:]


def exchanges(
    messages: Sequence[Message],
) -> tuple[list[Message], list[list[Message]], list[Message]]:
    """(system turns in front, the exchanges between, the last one).

    An exchange begins with a user turn, or several in a row, and holds all that follows.
    """
    head = next(
        (i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")),
        len(messages),
    )
    groups: list[list[Message]] = []
    for m in messages[head:]:
        begins = m["role"] == "user" and not (
            groups and groups[-1][-1]["role"] == "user"
        )
        if begins or not groups:
            groups.append([m])
        else:
            groups[-1].append(m)
    return list(messages[:head]), groups[:-1], groups[-1] if groups else []


def _shorter(
    example: Example, rendered: Rendered, tokens: Tokens, dialogues: Dialogues, *,
    least: int, length: int, own: int | None,
) -> tuple[Rendered, Tokens, Example]:  # fmt: skip
    """The example without as many of its oldest exchanges as needed, or as there are."""
    if len(tokens.prompt) <= length - _need(tokens, least, own):
        return rendered, tokens, example
    found = rendered, tokens, example
    if isinstance(example.prompt, str):
        return found
    head, between, last = exchanges(as_messages(example.prompt, "user"))
    for k in range(1, len(between) + 1):
        rest = [m for group in between[k:] for m in group]
        some = example._replace(prompt=[*head, *rest, *last])
        try:
            rendered = dialogues.render(some)
            found = rendered, dialogues.ids(rendered), some
        except ValueError:
            continue  # the template wants more of the dialogue than that
        if len(found[1].prompt) <= length - _need(found[1], least, own):
            break
    return found


def _need(tokens: Tokens, least: int, own: int | None) -> int:
    """Tokens that the responses need to keep `least` scored ones.

    These are of the first turn, or all that it has: what a user says between turns of a
    response costs the prompt nothing.
    """
    needs = [0]
    for mark in tokens.scored[:own] if least else []:
        first = mark.index(True)
        turn = next((k for k in range(first, len(mark)) if not mark[k]), len(mark))
        needs.append(min(first + least, turn))
    return max(needs)


def _without_front(
    prompt: list[int], loose: list[list[int]], room: int
) -> list[int]:  # fmt: skip
    """A prompt without the first tokens of its last user's text."""
    gone: list[int] = []
    loose = [kept for ids in loose if (kept := [k for k in ids if k < len(prompt)])]
    for ids in loose[:-1]:
        gone += ids
        if len(prompt) - len(gone) <= room:
            left_out = set(gone)
            return [i for k, i in enumerate(prompt) if k not in left_out]
    fixed = len(prompt) - sum(map(len, loose))
    raise TooLong(
        f"the prompt does not fit: {fixed} tokens of it are no text of its last user "
        f"turn, there is room for {room}"
    )


def _usable(mark: list[bool], joint: Callable[[int], bool], start: int) -> int:
    """Ids of a response up to its last scored one with which a character ends.

    Args:
      mark: which ids are scored.
      joint: whether a character ends with an id, counted from `start`.
    """
    ends = (n for n in range(len(mark), 0, -1) if mark[n - 1] and joint(start + n - 1))
    return next(ends, 0)


def _from_the_left(tokens: Tokens, length: int, bos_id: int | None) -> Fitted:
    """The prompt's left end goes first, down to one token, then the responses' right."""
    longest = max(map(len, tokens.responses))
    prompt = left_cut(tokens.prompt, max(1, length - longest), bos_id)
    room = length - len(prompt)
    return Fitted(
        prompt, [r[:room] for r in tokens.responses], [s[:room] for s in tokens.scored],
        len(prompt) < len(tokens.prompt), longest > room,
    )  # fmt: skip
