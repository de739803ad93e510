"""Where responses stop: at strings, at special tokens (by their text), and at ids.

A string stops wherever it is in the text, inside tokens or across them. Special tokens are
no part of a text: a stop that names some of them sees those, and no others. So '</s>' stops
at the token and at the same characters, and '\\n</s>' at the token behind a line's end.
"""

import bisect
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.sampling import automaton
from alignax.sampling.automaton import Automaton
from alignax.text.tokenizer import Tokenizer

MARK = 0x100000  # private characters from here on stand for tokens in a pattern


class Group(NamedTuple):
    """Stops that see the same tokens; any of the patterns stops."""

    marks: dict[int, str]  # id -> the character that stands for this token
    patterns: tuple[str, ...]


def parse(stops: Any, text: Tokenizer, *, name: str = "stops") -> list[Group]:
    """Stops as patterns, grouped by the tokens that they see beside the text.

    Args:
      stops: a string, an id, or a sequence of these.
      text: the tokenizer.
      name: of the setting, for the error.

    Raises:
      ValueError: an empty string, an id outside the vocabulary, or something else.
    """
    one = isinstance(stops, str | int | np.integer)
    several = (stops,) if one else tuple(stops)
    for stop in several:
        is_id = isinstance(stop, int | np.integer) and not isinstance(stop, bool)
        fits = 0 <= stop < text.vocab_size if is_id else isinstance(stop, str) and stop
        if not fits:
            raise ValueError(
                f"{name} has {stop!r}, expected strings that are not empty, or ids "
                f"0..{text.vocab_size - 1}"
            )
    ids = [int(stop) for stop in several if not isinstance(stop, str)]
    marks = _marks(ids)
    groups = [Group(marks, tuple(marks.values()))] if ids else []
    named: dict[tuple[int, ...], list[str]] = {}
    for stop in several:
        if isinstance(stop, str):
            found = {text.hidden[n] for n in _names(text).findall(stop)}
            named.setdefault(tuple(sorted(found)), []).append(stop)
    for tokens, strings in named.items():
        marks = _marks(tokens)

        def mark(match: re.Match[str], marks: Mapping[int, str] = marks) -> str:
            return marks[text.hidden[match.group()]]

        seen = [_names(text).sub(mark, s) for s in strings] if tokens else []
        groups.append(Group(marks, tuple(dict.fromkeys((*strings, *seen)))))
    return groups


def table(groups: Sequence[Group], pieces: Sequence[bytes]) -> Automaton:
    """The stops as an automaton over V tokens.

    Args:
      groups: from `parse`, at least one.
      pieces: the bytes that each of V ids adds to a text; b'' for special tokens.
    """
    tables = []
    for marks, patterns in groups:
        symbols = {c: 256 + k for k, c in enumerate(marks.values())}
        seen: list[Sequence[int]] = list(pieces)
        for i, c in marks.items():
            if i < len(seen):
                seen[i] = (symbols[c],)
        wanted = [
            [x for c in p for x in ([symbols[c]] if c in symbols else c.encode())]
            for p in patterns
        ]
        tables.append(automaton.stop_symbols(wanted, seen, 256 + len(symbols)))
    return functools.reduce(automaton.union, tables)


def pieces(text: Tokenizer, size: int) -> list[bytes]:
    """The bytes that each of `size` ids adds to a text; b'' for specials and unknown ids.

    An id that is a part of a character gets a byte that occurs in no text: a stop string
    across such ids is not found while decoding, only in the finished text.
    """
    known = [_added(text, i) for i in range(min(size, text.vocab_size))]
    return known + [b""] * (size - len(known))


def _added(text: Tokenizer, i: int) -> bytes:
    anchor, before = _anchor(text)
    added = text.decode([*anchor, i]).removeprefix(before)
    return added.encode().replace("\ufffd".encode(), b"\xff")


_piece = functools.lru_cache(maxsize=1 << 16)(_added)


@functools.lru_cache(maxsize=8)
def _anchor(text: Tokenizer) -> tuple[tuple[int, ...], str]:
    """Ids in front of a response and their text: some tokenizers drop a first blank."""
    ids = text.encode("a")
    return tuple(ids), text.decode(ids)


def end(
    groups: Sequence[Group], text: Tokenizer, ids: Sequence[int], *, min_new: int
) -> int:
    """Tokens of a response up to the one at which sampling with `table` ends; 0 if none.

    Args:
      groups: from `parse`.
      text: the tokenizer.
      ids: of the response.
      min_new: a stop that ends before this number of tokens does not count.
    """
    found = len(ids) + 1
    for marks, patterns in groups:
        seen, ends = "", []
        for i in ids:
            known = 0 <= i < text.vocab_size
            added = _piece(text, i).decode("latin-1") if known else ""
            seen += marks.get(i, added)
            ends.append(len(seen))
        symbols = set(marks.values())
        for pattern in patterns:
            wanted = "".join(
                c if c in symbols else c.encode().decode("latin-1") for c in pattern
            )
            early = ends[min_new - 2] if 2 <= min_new <= len(ends) + 1 else 0
            at = seen.find(wanted, max(0, early - len(wanted) + 1))
            if at >= 0:
                found = min(found, bisect.bisect_left(ends, at + len(wanted)) + 1)
    return found if max(1, min_new) <= found <= len(ids) else 0


def places(
    groups: Sequence[Group], text: Tokenizer, given: Sequence[int], ids: Sequence[int],
    *, begin: int, min_new: int,
) -> list[int]:  # fmt: skip
    """Where stops begin in the text of a response: at most one place for each pattern.

    A blank that the tokenizer drops at the beginning of a text is a part of stops.

    Args:
      groups: from `parse`.
      text: the tokenizer.
      given: ids in front of the response.
      ids: of the response.
      begin: characters of the text of given and ids, in front of which no stop begins.
      min_new: a stop that ends before this number of tokens does not count.

    Returns:
      Characters of the text of given and ids.
    """
    shown, first = len(text.decode([*given, *ids])), begin
    if not given:
        given, before = _anchor(text)
        first += len(before)
    out = []
    early = [*given, *ids[: max(0, min_new - 1)]]
    for marks, patterns in groups:
        seen, at = _seen(text, [*given, *ids], marks)
        more = len(seen) - len(at) - shown  # the anchor, and a blank
        after = first + len(_at(given, marks))
        least = len(_seen(text, early, marks)[0])
        for pattern in patterns:
            start = max(after, least - len(pattern) + 1)
            if (place := seen.find(pattern, start)) >= 0:
                place -= sum(mark < place for mark in at)
                out.append(max(begin, place - more))
    return out


def _seen(
    text: Tokenizer, ids: Sequence[int], marks: Mapping[int, str]
) -> tuple[str, list[int]]:
    """The text with characters for some tokens, and the places of these characters."""
    whole, out, at, last = text.decode(ids), "", [], 0
    for k in _at(ids, marks):
        end = len(text.decode(ids[:k]))
        out += whole[last:end]
        at.append(len(out))
        out, last = out + marks[ids[k]], end
    return out + whole[last:], at


def _at(ids: Sequence[int], marks: Mapping[int, str]) -> list[int]:
    return [k for k, i in enumerate(ids) if i in marks]


def _marks(ids: Sequence[int]) -> dict[int, str]:
    return {i: chr(MARK + k) for k, i in enumerate(dict.fromkeys(ids))}


@functools.lru_cache(maxsize=8)
def _names(text: Tokenizer) -> re.Pattern[str]:
    """Finds the names of special tokens, the longest at each place."""
    names = sorted(text.hidden, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
