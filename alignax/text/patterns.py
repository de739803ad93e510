"""Regular expressions whose search takes linear time, whatever the text.

  compile(r"(a+)+b").search("a" * 100_000)      False, at once; re.search would never end

Python's backtracking takes exponential time for some patterns, and a policy that is trained
against one may find such a text. Here all ways through the pattern are followed at once,
character by character. Whether there is a match is as with `re.search`: characters and
positions are judged by `re` itself.

Source: the construction of Thompson 1968, https://doi.org/10.1145/363347.363387
Differs from re: where the match is, is not told; lookarounds, references to groups, atomic
groups and possessive repeats are refused, as are patterns of more than LIMIT steps.
"""

import functools
import re
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

LIMIT = 2000  # steps; x{50} has 50
_KEPT = re.IGNORECASE | re.DOTALL | re.MULTILINE | re.ASCII
_AT = {
    ops.AT_BEGINNING: "^", ops.AT_BEGINNING_STRING: r"\A", ops.AT_END: "$",
    ops.AT_END_STRING: r"\Z", ops.AT_BOUNDARY: r"\b", ops.AT_NON_BOUNDARY: r"\B",
}  # fmt: skip
_CATEGORY = {
    ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_NOT_DIGIT: r"\D", ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_WORD: r"\w", ops.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
_REFUSED = {
    ops.ASSERT: "a lookahead or lookbehind", ops.ASSERT_NOT: "a lookahead or lookbehind",
    ops.GROUPREF: "a reference to a group", ops.GROUPREF_EXISTS: "a reference to a group",
    ops.ATOMIC_GROUP: "an atomic group", ops.POSSESSIVE_REPEAT: "a possessive repeat",
}  # fmt: skip

# A step: (kind, test, next steps). A 'character' is read if it passes the test; a 'place'
# is passed if the position does; 'free' goes on to all next steps; 'end' is a match.
Step = tuple[str, re.Pattern[str] | None, tuple[int, ...]]


class Pattern:
    """A compiled pattern: see `compile`."""

    def __init__(self, steps: list[Step], start: int):
        self.steps, self.start = steps, start

    def search(self, text: str) -> bool:
        """Whether some part of the text matches, as `re.search` says."""

        @functools.cache
        def passes(step: int, c: str) -> bool:
            test = self.steps[step][1]
            return test is not None and test.fullmatch(c) is not None

        reading: set[int] = set()
        for place in range(len(text) + 1):
            found, ended = self._reached({*reading, self.start}, text, place)
            if ended:
                return True
            if place < len(text):
                c = text[place]
                reading = {self.steps[s][2][0] for s in found if passes(s, c)}
        return False

    def _reached(self, begun: set[int], text: str, place: int) -> tuple[set[int], bool]:
        """Steps that read a character at a place, and whether a match ends there."""
        left, seen = list(begun), set(begun)
        reading: set[int] = set()
        while left:
            step = left.pop()
            kind, test, following = self.steps[step]
            if kind == "end":
                return reading, True
            if kind == "character":
                reading.add(step)
                continue
            if test is not None and not test.match(text, place):
                continue
            fresh = [s for s in following if s not in seen]
            seen.update(fresh)
            left += fresh
        return reading, False


@functools.lru_cache(maxsize=256)
def compile(pattern: str) -> Pattern:
    """A regular expression in Python's syntax.

    Raises:
      ValueError: no regular expression, one with a part that has no linear time, or one of
        more than LIMIT steps.
    """
    try:
        tree = _parser.parse(pattern)
    except (re.error, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    steps: list[Step] = [("end", None, ())]
    try:
        start = _sequence(list(tree), tree.state.flags, 0, steps)
    except ValueError as error:
        raise ValueError(
            f"the pattern {pattern!r} {error}; write a reward function of your own for it"
        ) from None
    return Pattern(steps, start)


def _sequence(nodes: list[Any], flags: int, after: int, steps: list[Step]) -> int:
    """Adds the steps of a sequence that goes on to `after`; returns its first one."""
    for op, value in reversed(nodes):
        after = _node(op, value, flags, after, steps)
    return after


def _node(op: Any, value: Any, flags: int, after: int, steps: list[Step]) -> int:
    """As `_sequence`, of one node of the syntax tree."""
    if op in _REFUSED:
        raise ValueError(f"has {_REFUSED[op]}, which cannot be matched in linear time")
    if op is ops.AT:
        return _add(steps, "place", _test(_AT[value], flags), (after,))
    if op is ops.SUBPATTERN:
        _, more, less, nodes = value
        return _sequence(list(nodes), (flags | more) & ~less, after, steps)
    if op is ops.BRANCH:
        ways = [_sequence(list(way), flags, after, steps) for way in value[1]]
        return _add(steps, "free", None, tuple(ways))
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
        least, most, nodes = value
        return _repeat(least, most, nodes, flags, after, steps)
    return _add(steps, "character", _test(_character(op, value), flags), (after,))


def _repeat(
    least: int, most: int, nodes: Any, flags: int, after: int, steps: list[Step]
) -> int:
    if least > LIMIT:  # also of nothing, which adds no step
        raise ValueError(f"has more than {LIMIT} steps")
    if most is ops.MAXREPEAT:
        again = _add(steps, "free", None, ())  # its next steps are known below
        first = _sequence(list(nodes), flags, again, steps)
        steps[again] = ("free", None, (first, after))
        after = again
    else:
        end = after
        for _ in range(int(most) - int(least)):
            first = _sequence(list(nodes), flags, after, steps)
            after = _add(steps, "free", None, (first, end))
    for _ in range(int(least)):
        after = _sequence(list(nodes), flags, after, steps)
    return after


def _character(op: Any, value: Any) -> str:
    """One character's test, as a regular expression."""
    if op is ops.ANY:
        return "."
    if op is ops.LITERAL:
        return _escaped(value)
    if op is ops.NOT_LITERAL:
        return f"[^{_escaped(value)}]"
    if op is not ops.IN:
        raise ValueError(f"has a part that is not known here ({op})")
    parts = ""
    for kind, item in value:
        if kind is ops.NEGATE:
            parts += "^"
        elif kind is ops.LITERAL:
            parts += _escaped(item)
        elif kind is ops.RANGE:
            parts += "-".join(map(_escaped, item))
        else:
            parts += _CATEGORY[item]
    return f"[{parts}]"


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"


@functools.lru_cache(maxsize=4096)
def _test(pattern: str, flags: int) -> re.Pattern[str]:
    return re.compile(pattern, flags & _KEPT)


def _add(
    steps: list[Step],
    kind: str,
    test: re.Pattern[str] | None,
    following: tuple[int, ...],
) -> int:
    if len(steps) > LIMIT:
        raise ValueError(f"has more than {LIMIT} steps")
    steps.append((kind, test, following))
    return len(steps) - 1
