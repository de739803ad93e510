"""Text to ids, segment by segment, with the place of each id and control tokens on demand.

A control token is an added token that is special, ends a turn, or that the chat template
writes. A text is cut in front of each of its control tokens; the segments are encoded one
by one, which gives the ids of the whole text, and equal segments are encoded once. (It is
not cut where a tokenizer is found to give other ids then.) Control
tokens in a protected part of the text (what a user wrote) are no control tokens: their
segment is encoded by a shadow of the tokenizer, in which every control token has another
name, a private character.
"""

import bisect
import contextlib
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from alignax.models.json_object import one_line

PRIVATE = 0xF0000  # the first character that names a control token in a shadow
KEPT = 10_000  # segments whose ids are remembered; twice as many for a while


class Key(NamedTuple):
    """What the ids of a segment depend on."""

    lead: str  # the control token that it begins with, with blanks that belong to it
    body: str  # the text behind the lead
    shadowed: bool  # the body holds control tokens that are text


class Segment(NamedTuple):
    """A piece of a text that is encoded by itself."""

    start: int  # its place in the text
    inserted: bool  # the lead is not in the text
    key: Key


class Encoded:
    """The ids of a text and their places in it.

    Args:
      encoder: that has the ids of segments.
      segments: of the text.
      head: a text with whose segments this one begins, but for its last one.
    """

    def __init__(
        self, encoder: "Encoder", segments: list[Segment], head: "Encoded | None" = None
    ):
        self._encoder, self._segments = encoder, segments
        self.ids: list[int] = []
        self._first: list[int] = []  # index of the first id of each segment
        if head is not None and head._segments:
            shared = len(head._segments) - 1
            self._first = head._first[:shared]
            self.ids = head.ids[: head._first[shared]]
            segments = segments[shared:]
        first, ids = self._first, self.ids
        for segment in segments:
            first.append(len(ids))
            ids += encoder.ids(segment.key)

    def index(self, place: int) -> int:
        """Index of the first id that ends behind `place`, or is inserted there.

        Args:
          place: of a character, 0 to the length of the text.
        """
        k = bisect.bisect_left(self._segments, place, key=lambda s: s.start)
        if k < len(self._segments) and self._segments[k].start == place:
            return self._first[k]
        if k == 0:
            return 0
        segment, first = self._segments[k - 1], self._first[k - 1]
        lead, body, shadowed = segment.key
        header = place - segment.start - (0 if segment.inserted else len(lead))
        if 0 <= header <= len(body):
            # Most often the text up to the place is a header, whose ids are known.
            shadowed = shadowed and header > 0
            ids = self._encoder.ids(Key(lead, body[:header], shadowed))
            if self._starts(k - 1, ids):
                return first + len(ids)
        ends = [end for _, end in self._encoder.places(segment)]
        return first + bisect.bisect_right(ends, place - segment.start)

    def joint(self, k: int) -> bool:
        """Whether a character ends with id k: the next one does not begin inside it."""
        number = bisect.bisect_right(self._first, k) - 1
        places = self._encoder.places(self._segments[number])
        at = k - self._first[number]
        return at + 1 >= len(places) or places[at + 1][0] >= places[at][1]

    def places(self) -> list[tuple[int, int]]:
        """(start, end) in the text of every id; those of one character share its place."""
        return [
            (segment.start + a, segment.start + b)
            for segment in self._segments
            for a, b in self._encoder.places(segment)
        ]

    def _starts(self, k: int, ids: list[int]) -> bool:
        """Whether segment k starts with these ids."""
        first = self._first[k]
        stop = self._first[k + 1] if k + 1 < len(self._first) else len(self.ids)
        return first + len(ids) <= stop and self.ids[first : first + len(ids)] == ids


class Encoder:
    """Encodes texts with a `tokenizers.Tokenizer`.

    Attributes:
      control: ids of the control tokens by their text.
    """

    def __init__(
        self, core: Any, template: str | None, ends: Iterable[int], bos: int | None
    ):
        import tokenizers

        self._core = core
        # Its trim of offsets would hide blanks; specials are never added anyway.
        core.post_processor = tokenizers.processors.Sequence([])
        always = {*ends, *([] if bos is None else [bos])}
        added = core.get_added_tokens_decoder()
        if missing := [core.id_to_token(i) for i in sorted(always - set(added))]:
            core.add_special_tokens(missing)
            added = core.get_added_tokens_decoder()
        written = template or ""
        self.control = {
            token.content: i
            for i, token in added.items()
            if i in always
            or token.special
            or (token.content.strip() and token.content in written)
        }
        self._names = {i: token for token, i in self.control.items()}
        tokens = [added[i] for i in self.control.values()]
        self._find = _pattern(tokens)
        self._words = {t.content for t in tokens if t.single_word}
        self._uncut = {t.content for t in tokens if not _cuts(core, t.content)}
        # Other texts may become one of these tokens by the normaliser.
        self._loose = core.normalizer is not None and any(t.normalized for t in tokens)
        starts = {token.content[0] for token in tokens}
        # Whether a control token begins only where its first character is, whatever is
        # in front of it.
        self.separate = not (self._uncut or self._loose) and not any(
            t.lstrip or t.single_word or starts & {*t.content[1:]} for t in tokens
        )
        self._memo: dict[Key, list[int]] = {}
        self._older: dict[Key, list[int]] = {}
        self._shadow: Shadow | None = None

    def name_of(self, token: int) -> str:
        """The text of a control token."""
        return self._names[token]

    def plain(self, text: str) -> list[int]:
        """The ids of a whole text, in which every control token is one."""
        with _refused():
            return self._core.encode(text, add_special_tokens=False).ids

    def holds_control(self, text: str) -> bool:
        """Whether a text holds a control token."""
        return self._find is not None and self._find.search(text) is not None

    def split(
        self, text: str, protected: Sequence[tuple[int, int]] = (),
        inserts: Sequence[tuple[int, str]] = (), head: Sequence[Segment] = (),
    ) -> list[Segment]:  # fmt: skip
        """The segments of a text.

        Args:
          text: what is encoded.
          protected: [start, end) of what users wrote, where no text is a control token;
            in order.
          inserts: (place, control token) of tokens that are put into the text; in order.
          head: segments of a text with which this one begins up to the start of the last
            one; they begin with that one's, too.
        """
        begin = head[-1].start if head else 0
        leads: list[tuple[int, int, str, bool]] = []  # start, end, token, inserted
        hidden: list[int] = []
        if self._find is not None:
            k, many = 0, len(protected)
            for match in self._find.finditer(text, begin):
                a, b = match.span()
                token = match.group().lstrip()
                a = b - len(token)  # blanks in front may be a user's
                if token in self._words and _in_word(text, a, b):
                    continue
                while k < many and protected[k][1] <= a:
                    k += 1
                if k < many and protected[k][0] < b:
                    hidden.append(a)
                else:
                    leads.append((*match.span(), match.group(), False))
        if self._uncut and not hidden:
            leads = [lead for lead in leads if lead[2].strip() not in self._uncut]
        if inserts:
            leads += [(at, at, token, True) for at, token in inserts if at >= begin]
            leads.sort(key=lambda lead: lead[:2])
        if not leads or leads[0][0] > begin:
            leads.insert(0, (begin, begin, "", False))
        out, stop = list(head[:-1]), len(text)
        for k, (a, b, token, inserted) in enumerate(leads):
            stop = leads[k + 1][0] if k + 1 < len(leads) else len(text)
            shadowed = bool(hidden) and any(b <= at < stop for at in hidden)
            if stop > a or inserted:
                key = Key(token, text[b:stop], shadowed)
                if self._loose and any(x < stop and b < y for x, y in protected):
                    key = key._replace(shadowed=shadowed or self._hides(key))
                out.append(Segment(a, inserted, key))
        return out

    def _hides(self, key: Key) -> bool:
        """Whether the body of a segment, which has no control token, has the id of one."""
        return any(i in self._names for i in self.ids(key)[bool(key.lead) :])

    def prefetch(self, wanted: Iterable[Key]) -> None:
        """Encodes in one batch what is not known yet."""
        if len(self._memo) > KEPT:
            self._older, self._memo = self._memo, {}
        missing = [k for k in dict.fromkeys(wanted) if self._known(k) is None]
        for shadowed in (False, True):
            keys = [k for k in missing if k.shadowed is shadowed]
            if keys:
                with _refused():
                    found = self._encode(keys, shadowed)
                self._memo.update(zip(keys, found, strict=True))

    def encode(
        self, text: str, protected: Sequence[tuple[int, int]] = (),
        inserts: Sequence[tuple[int, str]] = (),
    ) -> Encoded:  # fmt: skip
        """The ids of a text and their places; arguments as for `split`."""
        return Encoded(self, self.split(text, protected, inserts))

    def ids(self, key: Key) -> list[int]:
        """The ids of a segment."""
        found = self._known(key)
        if found is None:
            self.prefetch([key])
            found = self._known(key)
            assert found is not None
        return found

    def _known(self, key: Key) -> list[int] | None:
        found = self._memo.get(key)
        return self._older.get(key) if found is None else found

    def places(self, segment: Segment) -> list[tuple[int, int]]:
        """(start, end) of the ids of a segment, counted from its start in the text."""
        lead, body, shadowed = segment.key
        if shadowed:
            name = self._shadowed.name(lead)
            core, lead_in = self._shadowed.core, name
        else:
            core, lead_in = self._core, lead
        size = len(lead_in)
        with _refused():
            offsets = core.encode(lead_in + body, add_special_tokens=False).offsets
        width = 0 if segment.inserted else len(lead)

        def moved(at: int) -> int:
            return at - size + width if at >= size else min(at, width)

        out, last = [], 0
        for a, b in offsets:
            # A piece of a character without a place of its own is where the last one is.
            last = moved(b) if b > a else last
            out.append((moved(a) if b > a else last, last))
        return out

    def _encode(self, keys: list[Key], shadowed: bool) -> list[list[int]]:
        if shadowed:
            return self._shadowed.encode(keys)
        texts = [lead + body for lead, body, _ in keys]
        found = self._core.encode_batch_fast(texts, add_special_tokens=False)
        return [e.ids for e in found]

    @property
    def _shadowed(self) -> "Shadow":
        if self._shadow is None:
            self._shadow = Shadow(self._core.to_str(), self.control)
        return self._shadow


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """Turns what the tokenizers library raises for a text into a ValueError.

    Its regular expressions give up after some ten million steps, within a second. That is
    a panic of the library, which is no Exception.
    """
    try:
        yield
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"a text that is not Unicode: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"a text that the tokenizer does not finish: {one_line(error)}"
        ) from error


class Shadow:
    """A tokenizer whose control tokens are private characters: their texts are text."""

    def __init__(self, definition: str, control: dict[str, int]):
        import tokenizers

        made = json.loads(definition)
        names = {token: chr(PRIVATE + k) for k, token in enumerate(control)}
        made["post_processor"] = None
        ids = {}  # of added tokens, by their names in the shadow
        for token in made["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
            ids[token["content"]] = token["id"]
        vocabulary = made["model"].get("vocab")  # may hold control tokens too
        if isinstance(vocabulary, dict):
            made["model"]["vocab"] = {names.get(k, k): i for k, i in vocabulary.items()}
        elif isinstance(vocabulary, list):
            made["model"]["vocab"] = [[names.get(k, k), x] for k, x in vocabulary]
        self.core = tokenizers.Tokenizer.from_str(json.dumps(made))
        self._names = names
        self._back = {self.core.token_to_id(name): i for name, i in ids.items()}

    def name(self, lead: str) -> str:
        """The private character of a control token; blanks around it stay."""
        token = lead.strip() if lead not in self._names else lead
        return lead.replace(token, self._names[token]) if token else lead

    def encode(self, keys: Sequence[Key]) -> list[list[int]]:
        """The ids of segments.

        Raises:
          ValueError: a text that holds a private character of the shadow.
        """
        last = PRIVATE + len(self._names)
        for _, body, _ in keys:
            if any(PRIVATE <= ord(c) < last for c in body):
                raise ValueError(
                    "a text with control tokens also holds private characters "
                    f"(U+{PRIVATE:X} and following)"
                )
        texts = [self.name(lead) + body for lead, body, _ in keys]
        found = self.core.encode_batch(texts, add_special_tokens=False)
        return [[self._back.get(i, i) for i in e.ids] for e in found]


class FunctionEncoder(Encoder):
    """Encodes texts with a function, in which control tokens are never found.

    Args:
      encode: text -> ids; those of a text are those of its characters. (Only the places of
        ids, by which rows are cut, depend on that.)
      control: ids of the control tokens by their names, which occur in no text.
    """

    def __init__(self, encode: Callable[[str], list[int]], control: dict[str, int]):
        self._function = encode
        self.control = control
        self._names = {i: token for token, i in control.items()}
        self._find = None
        self.separate = True
        self._uncut, self._words, self._loose = set(), set(), False
        self._memo, self._older = {}, {}

    def plain(self, text: str) -> list[int]:
        return self._function(text)

    def places(self, segment: Segment) -> list[tuple[int, int]]:
        out = [(0, 0)] if segment.inserted else []
        for k, c in enumerate(segment.key.body):
            out += [(k, k + 1)] * len(self.plain(c))
        return out

    def _encode(self, keys: list[Key], shadowed: bool) -> list[list[int]]:
        return [
            [*([self.control[lead]] if lead else []), *self.plain(body)]
            for lead, body, _ in keys
        ]


def _cuts(core: Any, token: str) -> bool:
    """Whether a text may be cut in front of a token: both parts have the ids of the whole.

    It may not where a normaliser puts a blank in front of texts and finds the token after it.
    """

    def ids(text: str) -> list[int]:
        return core.encode(text, add_special_tokens=False).ids

    pairs = itertools.product(("a", "1 "), ("", "b", " b"))
    return all(ids(a + token + b) == ids(a) + ids(token + b) for a, b in pairs)


def _pattern(tokens: list[Any]) -> re.Pattern[str] | None:
    """Finds added tokens as `tokenizers` does: the longest at the first place."""
    parts = []
    for token in sorted(tokens, key=lambda t: -len(t.content)):
        part = re.escape(token.content)
        if token.lstrip:
            part = rf"\s*{part}"
        parts.append(part)
    return re.compile("|".join(parts)) if parts else None


def _in_word(text: str, start: int, stop: int) -> bool:
    """Whether a letter is beside text[start:stop], as `tokenizers` counts letters."""
    beside = text[start - 1 : start] + text[stop : stop + 1]
    return any(unicodedata.category(c) in WORD or c in JOINERS for c in beside)


WORD = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc")
JOINERS = "\u200c\u200d"
