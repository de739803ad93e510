"""Limits of what a chat template may compute: templates come with downloaded models.

Loops and macros look at the time; operators, filters and methods at how large what they
are about to make is.
"""

import contextlib
import contextvars
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2.exceptions
from jinja2.runtime import Undefined

from alignax.text.tracked_text import size  # a length that does not count as reading

SECONDS = 8.0  # of the processor, for a rendering: not of the clock, which others slow
LONGEST = 2**24  # characters of a text, or items of a list, that a template makes
TOTAL = 2**28  # characters of all texts that one rendering makes
DIGITS = 10_000  # bits of an integer
SOURCE = 2**20  # characters of a template
OPERATORS = ("+", "*", "**", "%")
# A large or a computed width, of a field of % and of str.format.
WIDTH = re.compile(
    r"%(\([^)]*\))?[-+ #0]*(\d{6,}|\*|\d*\.(\d{6,}|\*))|\{[^{}]*:[^{}]*(\d{6,}|\{)"
)


class TooMuch(jinja2.exceptions.TemplateRuntimeError):
    """A template computes more than any conversation needs."""


class _Spent:
    """What a rendering has used."""

    def __init__(self):
        self.until = time.thread_time() + SECONDS
        self.made = 0


_SPENT: contextvars.ContextVar[_Spent] = contextvars.ContextVar("spent")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A rendering, to which the limits apply."""
    token = _SPENT.set(_Spent())
    try:
        yield
    finally:
        _SPENT.reset(token)


def tick() -> str:
    """Called in every round of a loop and every call of a macro.

    Raises:
      TooMuch: the time is over.
    """
    spent = _SPENT.get(None)
    if spent and time.thread_time() > spent.until:
        raise TooMuch(f"it takes longer than {SECONDS:g} seconds")
    return ""


def ticking(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, with a tick for each."""
    for value in values:
        tick()
        yield value


def made(value: Any) -> Any:
    """A value that a template made; TooMuch if it is too large."""
    if isinstance(value, str | list | tuple | dict):
        check(_size(value))
        if isinstance(value, str) and (spent := _SPENT.get(None)):
            spent.made += size(value)
            if spent.made > TOTAL:
                raise TooMuch(f"it makes more than {TOTAL} characters")
    elif isinstance(value, int) and value.bit_length() > DIGITS:
        raise TooMuch("it makes an integer of thousands of digits")
    return value


def check(many: float) -> None:
    """Raises TooMuch for the size of what is about to be made."""
    if many > LONGEST:
        raise TooMuch(f"it makes a text or list of more than {LONGEST} places")


def operands(operator: str, left: Any, right: Any) -> None:
    """Raises TooMuch for an operation whose result would be too large."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and numbers and abs(left) > 1 and right > 0:
        if left.bit_length() * right > DIGITS:
            raise TooMuch("it makes an integer of thousands of digits")
    elif operator == "*" and numbers:
        if left.bit_length() + right.bit_length() > DIGITS:
            raise TooMuch("it makes an integer of thousands of digits")
    elif operator == "*":
        check(_size(left) * _size(right))
    elif operator == "%" and isinstance(left, str):
        formatted(left)
    elif operator == "+" and not numbers:
        check(_size(left) + _size(right))


def formatted(form: str) -> None:
    """Raises TooMuch for a format string with a field of a large or computed width."""
    if WIDTH.search(form):
        raise TooMuch("a format string has a field of a large width")


# Filters and methods of texts that make more than they are given -> the size of that.
GROWING: dict[str, Callable[..., float]] = {
    "replace": lambda s, old, new, *_: size(s) + str.count(s, old) * size(new),
    "indent": lambda s, width=4, *_: size(s) + (str.count(s, "\n") + 1) * _size(width),
    "wordwrap": lambda s, *rest: size(s) * (1 + sum(map(_length, rest))),
    "tojson": lambda value, *rest: 2**18 * max((r for r in rest if _is_int(r)), default=0),
    "batch": lambda value, count, *_: count, "slice": lambda value, count, *_: count,
    "expandtabs": lambda s, count=8: size(s) * count,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda s, n=80, *_: n),
}  # fmt: skip
ITERATING = ("map", "select", "reject", "selectattr", "rejectattr")
ABSENT = ("random",)  # the ids of a row would not be the same twice


def growing(name: str, *args: Any, **kwargs: Any) -> None:
    """Raises TooMuch for a filter or a method whose result would be too large."""
    if name in GROWING:
        try:
            many = GROWING[name](*args, *kwargs.values())
        except (TypeError, AttributeError):  # the call itself says what is wrong
            return
        check(many)
    elif name in ("format", "format_map"):
        formatted(args[0])


def limit_filters(filters: dict[str, Callable]) -> None:
    """Gives the filters of an environment their limits, in place."""
    for name in ABSENT:
        del filters[name]
    for name, function in filters.items():
        filters[name] = _limited(name, function)


def _limited(name: str, function: Callable) -> Callable:
    handed = hasattr(function, "jinja_pass_arg")  # a context in front of the value

    def filtered(*args: Any, **kwargs: Any) -> Any:
        tick()
        before, (value, *rest) = args[:handed], args[handed:]
        if name in ITERATING and not isinstance(value, str | Mapping | Undefined):
            value = ticking(value)
        growing(name, value, *rest, **kwargs)
        return made(function(*before, value, *rest, **kwargs))

    filtered.__dict__.update(
        vars(function) if handed else {}
    )  # what jinja2 is to hand to it
    return filtered


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _length(value: Any) -> int:
    return size(value) if isinstance(value, str) else 0


def _size(value: Any) -> float:
    if isinstance(value, str):
        return size(value)
    if isinstance(value, list | tuple | dict):
        return len(value)
    return abs(value) if _is_int(value) else 1
