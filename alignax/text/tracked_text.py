"""Strings that know where their characters come from, through one rendering of a template.

A `Tracked` is a str with spans. A span is (start, end, source): the characters from start to
end come from `source`, such as (3, 'content') for the content of message 3. Slicing,
stripping, splitting, replacing and joining keep the spans exactly; what cannot be followed
character by character (JSON, `%`) is as a whole from every source of its inputs. Spans of
no characters are kept where nothing else is left of their source, so that an empty text
has a place.

A template that never reads a text but only writes it treats all texts alike. So everything
that reads the characters of a `Tracked` is counted, see `inspections`.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Source = tuple[int, str]  # (index of the message, key), or (-1, name of a mark)
Span = tuple[int, int, Source]


_counter = itertools.count(1)
_seen = [0]


def inspections() -> int:
    """How often the characters of a `Tracked` were read so far, by anything but output."""
    return _seen[0]


def _inspect() -> None:
    _seen[0] = next(_counter)


class Tracked(str):
    """A str with spans; all of its methods are those of str."""

    __slots__ = ("_spans",)  # a template cannot read names that begin with '_'
    _spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span] = ()):
        self = super().__new__(cls, text)
        self._spans = tuple(spans)
        return self

    def __str__(self):
        return self

    def __reduce__(self):
        return str, (plain(self),)

    def __repr__(self):
        _inspect()  # it has no spans, although it holds the characters
        return str.__repr__(self)

    def __len__(self):
        _inspect()
        return size(self)

    def __hash__(self):
        _inspect()
        return str.__hash__(self)

    def __contains__(self, text):
        _inspect()
        return str.__contains__(self, text)

    def __add__(self, other):
        if type(other) is Tracked:
            return concat((self, other))
        if not isinstance(other, str):
            return NotImplemented
        return Tracked(str.__add__(self, other), self._spans)

    def __radd__(self, other):
        if not isinstance(other, str):
            return NotImplemented
        n = len(other)
        moved = [(a + n, b + n, source) for a, b, source in self._spans]
        return Tracked(str.__add__(other, self), moved)

    def __mul__(self, times):
        return concat([self] * times)

    __rmul__ = __mul__

    def __mod__(self, values):
        return as_whole(str.__mod__(self, values), self, values)

    def __rmod__(self, form):
        return as_whole(str.__mod__(form, (plain(self),)), self)

    def __format__(self, spec):
        return as_whole(str.__format__(self, spec), self)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        _inspect()
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            at = key if key >= 0 else size(self) + key
            return part(self, at, at + 1)
        start, stop, step = key.indices(size(self))
        return (
            part(self, start, max(start, stop)) if step == 1 else as_whole(text, self)
        )

    def lstrip(self, chars=None):
        self._stripped(chars)
        return part(self, size(self) - size(str.lstrip(self, chars)), size(self))

    def rstrip(self, chars=None):
        self._stripped(chars)
        return part(self, 0, size(str.rstrip(self, chars)))

    def strip(self, chars=None):
        self._stripped(chars)
        start = size(self) - size(str.lstrip(self, chars))
        return part(self, start, start + size(str.strip(self, chars)))

    def removeprefix(self, prefix):
        _inspect()
        if not str.startswith(self, prefix):
            return self
        return part(self, size(prefix), size(self))

    def removesuffix(self, suffix):
        _inspect()
        if not suffix or not str.endswith(self, suffix):
            return self
        return part(self, 0, size(self) - size(suffix))

    def split(self, sep=None, maxsplit=-1):
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends=False):
        return self._pieces(str.splitlines(self, keepends), None)

    def partition(self, sep):
        _inspect()
        at = str.find(self, sep)
        return (self, "", "") if at < 0 else self._around(at, sep)

    def rpartition(self, sep):
        _inspect()
        at = str.rfind(self, sep)
        return ("", "", self) if at < 0 else self._around(at, sep)

    def replace(self, old, new, count=-1):
        if not old:
            return as_whole(str.replace(self, old, new, count), self, new)
        pieces: list[str] = self.split(old, count)
        filled = new if type(new) is Tracked else as_whole(new, self)
        return join(filled, pieces)

    def join(self, texts):
        return join(self, texts)

    def _pieces(self, pieces: Sequence[str], sep: str | None) -> list["Tracked"]:
        """Parts of this text in their order, each found behind the one before."""
        _inspect()
        out, at = [], 0
        for piece in pieces:
            at = at if sep else str.index(self, piece, at)
            out.append(part(self, at, at + size(piece)))
            at += size(piece) + size(sep or "")
        return out

    def _around(self, at: int, sep: str):
        end = at + size(sep)
        return part(self, 0, at), part(self, at, end), part(self, end, size(self))

    def _stripped(self, chars: str | None) -> None:
        """Blanks around the whole of one text may go without its being read."""
        whole = len(self._spans) == 1 and self._spans[0][:2] == (0, size(self))
        if chars is not None or not whole:
            _inspect()


def size(text: str) -> int:
    """The length of a text; this is no inspection."""
    return str.__len__(text)


def _same_length(method: Callable) -> Callable:
    @functools.wraps(method)
    def changed(self, *args):
        out = method(self, *args)
        if size(out) != size(self):
            return as_whole(out, self)
        _inspect()
        return Tracked(out, self._spans)

    return changed


def _inspecting(method: Callable) -> Callable:
    @functools.wraps(method)
    def inspected(self, *args):
        _inspect()
        return method(self, *args)

    return inspected


def _whole(method: Callable) -> Callable:
    # A sandbox knows `format` by its name, and does not let it read any attribute.
    @functools.wraps(method)
    def changed(self, *args, **kwargs):
        return as_whole(method(self, *args, **kwargs), self, args, kwargs)

    return changed


for _name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
    setattr(Tracked, _name, _same_length(getattr(str, _name)))
for _name in (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "startswith", "endswith",
    "find", "rfind", "index", "rindex", "count", "encode", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
    "isspace", "istitle", "isupper",
):  # fmt: skip
    setattr(Tracked, _name, _inspecting(getattr(str, _name)))
for _name in (
    "center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate",
):  # fmt: skip
    setattr(Tracked, _name, _whole(getattr(str, _name)))


def plain(text: str) -> str:
    """The characters alone, as a str."""
    return "".join((text,)) if type(text) is Tracked else text


def spans(text: str) -> tuple[Span, ...]:
    """The spans of a text; a plain str has none."""
    return text._spans if type(text) is Tracked else ()


def part(text: Tracked, start: int, stop: int) -> Tracked:
    """text[start:stop] with its spans."""
    if start == 0 and stop >= size(text):
        return text
    kept, full = [], set()
    for a, b, source in text._spans:
        x, y = max(a, start), min(b, stop)
        if x < y:
            full.add(source)
        elif not (x == y and start <= x <= stop):
            continue
        kept.append((x - start, y - start, source))
    if full:
        kept = [s for s in kept if s[0] < s[1] or s[2] not in full]
    return Tracked(str.__getitem__(text, slice(start, stop)), kept)


def concat(texts: Iterable[Any]) -> str:
    """The texts one behind the other."""
    out: list[Span] = []
    pieces, many = [], 0
    for text in texts:
        if type(text) is Tracked:
            for a, b, source in text._spans:
                if out and out[-1][1] == many + a and out[-1][2] == source:
                    out[-1] = (out[-1][0], many + b, source)
                else:
                    out.append((many + a, many + b, source))
            many += size(text)
        else:
            many += len(text)
        pieces.append(text)
    whole = "".join(pieces)
    return Tracked(whole, out) if out else whole


def join(between: str, texts: Iterable[Any]) -> str:
    """As between.join(texts)."""
    out: list[str] = []
    for text in texts:
        if out:
            out.append(between)
        out.append(text)
    return concat(out)


def sources(*values: Any) -> list[Source]:
    """The sources of all texts in nested values, each once."""
    found: dict[Source, None] = {}

    def walk(value):
        if type(value) is Tracked:
            found.update(dict.fromkeys(source for _, _, source in value._spans))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(key)
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(values)
    return list(found)


def as_whole(text: str, *made_of: Any) -> str:
    """`text`, which was made of values in an unknown way: all of it is from each source."""
    found = sources(*made_of)
    if not found:
        return text
    _inspect()
    return Tracked(text, [(0, size(text), s) for s in found])


def track(value: Any, source: Source) -> Any:
    """A nested value, all texts of which (also keys) are from `source`."""
    if isinstance(value, str):
        return Tracked(value, ((0, len(value), source),))
    if isinstance(value, Mapping):
        return {track(k, source): track(v, source) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [track(v, source) for v in value]
    return value
