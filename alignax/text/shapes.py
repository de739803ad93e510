"""Rows whose renderings differ only in their texts, encoded without rendering them again.

Where a template does not read the texts of a dialogue (see `skeleton`), all rows with the
same roles have the same segments, but for these texts; so have their turns. A `Shape` is
found once, by rendering and encoding a row in the usual way, and then filled. It holds for
texts without control tokens and for responses of one assistant turn; other rows, and those
that do not encode as expected (a token straddles prompt and response), take the usual way.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from alignax.text.encoder import Encoder, Key, Segment
from alignax.text.skeleton import LEFT, RIGHT

MARK = re.compile(f"(.?){re.escape(LEFT[-1])}(\\d+){re.escape(RIGHT[0])}(.?)", re.S)


class Piece(NamedTuple):
    """A segment: a control token, a text with one hole, and which text fills it."""

    lead: str
    before: str
    hole: int  # index of the text, -1 for none
    strip: tuple[bool, bool]  # blanks on the left and on the right are taken off
    after: str

    def key(self, texts: Sequence[str]) -> Key:
        if self.hole < 0:
            return Key(self.lead, self.before, False)
        text, (left, right) = texts[self.hole], self.strip
        if left:
            text = text.lstrip()
        if right:
            text = text.rstrip()
        return Key(self.lead, f"{self.before}{text}{self.after}", False)


class Shape(NamedTuple):
    """The segments of rows with certain roles."""

    prompt: list[Piece]  # the last one is the header of the answer's turn
    answer: Piece  # begins with that header
    end: Key  # the end token alone

    def keys(self, texts: Sequence[str], answers: Sequence[str]) -> "Filled":
        """The segments of a row.

        Args:
          texts: of the messages of the prompt.
          answers: the responses.
        """
        return Filled(
            [piece.key(texts) for piece in self.prompt],
            [self.answer.key([*texts, answer]) for answer in answers],
            self.end,
        )


class Filled(NamedTuple):
    """The segments of one row."""

    prompt: list[Key]
    answers: list[Key]
    end: Key

    def wanted(self) -> list[Key]:
        """What has to be encoded."""
        return [*self.prompt, *self.answers, self.end]

    def ids(self, encoder: Encoder) -> tuple[list[int], list[list[int]]] | None:
        """(prompt, responses); None if a token straddles the prompt and a response."""
        header = encoder.ids(self.prompt[-1])
        many = len(header)
        (end, *_) = encoder.ids(self.end)
        responses = []
        for key in self.answers:
            ids = encoder.ids(key)
            if ids[:many] != header:
                return None
            responses.append([*ids[many:], end])
        prompt: list[int] = []
        for key in self.prompt:
            prompt += encoder.ids(key)
        return prompt, responses


def piece(segment: Segment) -> Piece | None:
    """A segment of a rendering with marks instead of texts; None with several of them."""
    lead, body, shadowed = segment.key
    found = list(MARK.finditer(body))
    if shadowed or len(found) > 1:
        return None
    if not found:
        return Piece(lead, body, -1, (False, False), "")
    (mark,) = found
    left, hole, right = mark.groups()
    a = mark.start() + (0 if left == " " else len(left))
    b = mark.end() - (0 if right == " " else len(right))
    return Piece(lead, body[:a], int(hole), (left != " ", right != " "), body[b:])


def shape(
    prompt: Sequence[Segment], side: Sequence[Segment], ends: Sequence[str],
    texts: int,
) -> Shape | None:  # fmt: skip
    """The shape of a row whose texts are marks.

    Args:
      prompt: segments of the prompt to generate from.
      side: those of the prompt and a response; they begin with the former, but for the
        last one.
      ends: the texts of the tokens that end a turn.
      texts: messages of the prompt; the mark of the response has this number.

    Returns:
      None where the answer is not one segment, from the header to the end token.
    """
    pieces = [piece(segment) for segment in prompt]
    shared = len(prompt) - 1
    if len(side) < shared + 2:
        return None
    answer, end = piece(side[shared]), side[shared + 1]
    header = pieces[-1]
    if answer is None or header is None or answer.hole != texts or answer.after:
        return None
    if answer[:2] != header[:2] or header.hole >= 0 or end.key.lead not in ends:
        return None
    if (
        any(p is None for p in pieces)
        or len({p.hole for p in pieces if p} - {-1}) < texts
    ):
        return None
    known = [p for p in pieces if p is not None]
    return Shape(known, answer, Key(end.key.lead, "", False))
