"""What a chat template writes around the texts of a dialogue that it does not read.

Many templates write the content of a message, perhaps without the blanks around it, and
never look at it. Then dialogues with the same roles have the same rendering but for these
texts: it is made once, with holes. That a template looks at no text is counted while it is
rendered (`tracked_text.inspections`), and is not assumed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from alignax.batch import Message
from alignax.text import tracked_text

# Blanks and private characters round a number: no template can know them.
LEFT, RIGHT = " \ue000", "\ue001 "


class Hole(NamedTuple):
    """Where the content of a message is."""

    message: int
    left: bool  # blanks on its left are taken off
    right: bool


Skeleton = tuple[str | Hole, ...]
Span = tuple[int, int]


def build(
    render: Callable[[Sequence[Message], bool], str], roles: Sequence[str],
    open_turn: bool,
) -> Skeleton | None:  # fmt: skip
    """The rendering of messages with these roles and any texts.

    Args:
      render: (messages, add_generation_prompt) -> the rendering, a str with spans.
      roles: of the messages, which have no other keys than 'role' and 'content'.
      open_turn: whether an assistant turn is opened at the end.

    Returns:
      None where the template reads a text, leaves one out, writes one twice, marks
      generated text, or refuses the dialogue.
    """
    said = [
        {"role": role, "content": f"{LEFT}{i}{RIGHT}"} for i, role in enumerate(roles)
    ]
    before = tracked_text.inspections()
    try:
        tracked = render(said, open_turn)
    except ValueError:
        return None
    if tracked_text.inspections() != before:
        return None
    text, at = tracked_text.plain(tracked), 0
    out: list[str | Hole] = []
    met = set()
    for a, b, (i, key) in tracked_text.spans(tracked):
        if key != "content" or i in met or a < at:
            return None
        shown = text[a:b]
        if shown.strip() != said[i]["content"].strip():
            return None
        met.add(i)
        out += [text[at:a], Hole(i, shown[0] != " ", shown[-1] != " ")]
        at = b
    written = "".join(x for x in (*out, text[at:]) if isinstance(x, str))
    if len(met) < len(roles) or LEFT[-1] in written or RIGHT[0] in written:
        return None
    return tuple(piece for piece in (*out, text[at:]) if piece != "")


def fill(skeleton: Skeleton, contents: Sequence[str]) -> tuple[str, list[Span]]:
    """(the rendering with these texts, the place of each)."""
    out, places, at = [], [(0, 0)] * len(contents), 0
    for piece in skeleton:
        if isinstance(piece, Hole):
            text = contents[piece.message]
            if piece.left:
                text = text.lstrip()
            if piece.right:
                text = text.rstrip()
            places[piece.message] = (at, at + len(text))
        else:
            text = piece
        out.append(text)
        at += len(text)
    return "".join(out), places
