"""Where the assistant's turns are in one rendering of a whole dialogue.

A turn is found by the origin of its characters (see `tracked_text`), never by comparing
renderings of parts, so that templates may rewrite old turns. Not scored is what a generation
prompt writes in front of a turn, and an empty thought there. All other text is, up to the
first end token: at inference nobody but the model writes it. Where the template has
`{% generation %}` marks, they replace this rule.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alignax.batch import Message
from alignax.text import tracked_text
from alignax.text.chat_template import MARK, THOUGHTS
from alignax.text.skeleton import Skeleton, build, fill

Span = tuple[int, int]

# A thought with nothing in it, as templates write one in front of an answer.
EMPTY_THOUGHT = re.compile(
    r"\s*(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\]|<\|START_(\w+)\|>\s*<\|END_\3\|>)\s*"
)
# Keys of a message that are no text of the turn.
SETTINGS = ("role", "weight", "train", "prefill")
NAMES = ("name", "tool_call_id")
TRUSTED = ("assistant", "system", "developer")  # roles whose control tokens are tokens
TAGS = len("<think></think>")  # characters of a thought that a template may write anew
KINDS: dict[str, tuple[type, ...]] = {  # of the values of a message
    "role": (str,),
    "content": (str, list, type(None)),
    "prefill": (str, type(None)),
}


class Turn(NamedTuple):
    """An assistant's turn: places are of characters of the rendering."""

    message: int  # its index
    opened: int  # where it begins to be scored
    closed: int  # behind its own text, where its end token is looked for
    after: int  # where the text of the next message begins
    trained: bool  # False: read, not scored


class Rendering(NamedTuple):
    """The text of a dialogue, and where it is from."""

    text: str
    own: list[Span | None]  # the place of every message; None: it is left out
    pieces: list[list[Span]]  # what came from each message, span by span
    given: list[int]  # of every message: where its 'prefill' ends, or -1
    marks: list[Span]  # what {% generation %} marks
    protected: list[Span]  # what users and tools wrote
    left_out: list[str]  # 'role: key' of what is not in the text


class Reader:
    """Renders dialogues by one template with one set of variables, and finds their turns.

    Args:
      render: (messages, add_generation_prompt) -> the rendering, a str with spans.
      ends: the texts of the tokens that end a turn.
      end: the one of them by which the template closes old turns; None if it closes none.
      control: the texts of all control tokens.
      merge_system: under a template without system turns, they go in front of the first
        user turn; otherwise they are refused.
      followed: whether all reading of texts by the template is counted as an inspection
        (`chat_template.is_followed`).
    """

    def __init__(
        self, render: Callable[[Sequence[Message], bool], str], ends: Iterable[str],
        end: str | None, *, control: Iterable[str] = (), merge_system: bool = False,
        followed: bool = False,
    ):  # fmt: skip
        self._control = tuple(control)
        self._render, self._end, self._merge_system = render, end, merge_system
        self._followed = followed
        self._skeletons: dict[tuple[bool, tuple[str, ...]], Skeleton | None] = {}
        self._ends = tuple(ends)
        self._tails: dict[str | None, dict[str, None]] = {}  # by the role in front
        self._gaps: set[tuple[str | None, str]] = set()

    def adapted(self, messages: list[Message]) -> list[Message]:
        """Messages as this template takes them.

        Content in parts becomes one text where the template does not read parts.

        Raises:
          ValueError: a system turn that the template cannot show; content of no kind that
            messages have.
        """
        for m in messages:
            _check(m)
        parts = any(isinstance(m.get("content"), list) for m in messages)
        if parts and not self._takes_parts:
            messages = [{**m, "content": text_of(m)} for m in messages]
        system = any(m["role"] == "system" for m in messages)
        if system and self._lacks_system:
            return self._without_system(messages)
        return messages

    def read(self, messages: Sequence[Message], *, open_turn: bool) -> Rendering:
        """Renders messages and finds the text of each.

        Args:
          messages: the dialogue.
          open_turn: whether an assistant turn is opened at the end.

        Raises:
          ValueError: the template refuses the messages.
        """
        if found := self._filled(messages, open_turn):
            return found
        tracked = self._render_any(messages, open_turn)
        text = tracked_text.plain(tracked)
        own: list[list[tuple[int, int, str]]] = [[] for _ in messages]
        names: list[set[str]] = [set() for _ in messages]
        marks, protected = [], []
        given = [-1] * len(messages)
        for a, b, source in tracked_text.spans(tracked):
            if source == MARK:
                marks.append((a, b))
                continue
            i, key = source
            message = messages[i]
            a, b = _narrowed(text, a, b, message, key)
            if message["role"] not in TRUSTED:
                protected += self._written(text, a, b, message, key)
            if key == "prefill":
                given[i] = b
            if key in NAMES:
                names[i].add(key)
            else:
                own[i].append((a, b, key))
        places = [self._extent(text, found) for found in own]
        left_out: list[str] = []
        for i, message in enumerate(messages):
            if places[i] is None:
                places[i] = self._place(text, messages, places, i)
                if place := places[i]:
                    own[i].append((*place, "content"))
                    if message["role"] not in TRUSTED:
                        protected.append(place)
            left_out += _left_out(message, own[i], names[i], text)
        pieces = [[(a, b) for a, b, _ in found] for found in own]
        protected.sort()
        return Rendering(text, places, pieces, given, marks, protected, left_out)

    def _written(
        self, text: str, a: int, b: int, message: Message, key: str
    ) -> list[Span]:  # fmt: skip
        """What of a span a user or a tool wrote.

        A span that is as a whole from a message (`'...' | format(content)`, JSON) holds text of
        the template, too: then it is what control tokens occur in the message itself.
        """
        said = _texts(message.get(key))
        if any(text[a:b] in each for each in said):
            return [(a, b)]
        out = []
        for token in self._control:
            if not any(token in each for each in said):
                continue
            at = text.find(token, a, b)
            while at >= 0:
                out.append((at, at + len(token)))
                at = text.find(token, at + 1, b)
        return out

    def is_filled(self, messages: Sequence[Message], open_turn: bool) -> bool:
        """Whether the template does not read the texts of these messages."""
        return self._filled(messages, open_turn) is not None

    def _filled(self, messages: Sequence[Message], open_turn: bool) -> Rendering | None:
        """The rendering of texts that the template does not read; None of others."""
        if not self._followed:
            return None
        for m in messages:
            if len(m) != 2 or type(m.get("content")) is not str:
                return None
        shape = open_turn, tuple([m["role"] for m in messages])
        try:
            skeleton = self._skeletons[shape]
        except KeyError:
            skeleton = build(self._render, shape[1], open_turn)
            self._skeletons[shape] = skeleton
        if skeleton is None:
            return None
        text, places = fill(skeleton, [m["content"] for m in messages])
        protected = [
            place
            for place, m in zip(places, messages, strict=True)
            if m["role"] not in TRUSTED
        ]
        protected.sort()
        pieces = [[place] for place in places]
        return Rendering(
            text, list(places), pieces, [-1] * len(messages), [], protected, []
        )

    def turns(
        self, messages: Sequence[Message], whole: Rendering, first: int,
        tail: str | None = None,
    ) -> list[Turn]:  # fmt: skip
        """The assistant turns of a dialogue that its template shows.

        Args:
          messages: of `whole`.
          whole: from `read`.
          first: index of the first message of the response; turns before it are not
            scored, so that where they begin does not matter.
          tail: what the prompt to generate from has behind the message before `first`.
        """
        out = []
        for i, message in enumerate(messages):
            place = whole.own[i]
            if message["role"] != "assistant" or place is None:
                continue
            behind = (p[0] for p in whole.own[i + 1 :] if p)
            after = next(behind, len(whole.text))
            opened = place[0]
            if i >= first:
                known = tail if i == first else None
                opened = self._opened(messages, whole, i, after, known)
            trained = all(message.get(k) in (None, 1) for k in ("weight", "train"))
            out.append(Turn(i, opened, place[1], after, bool(trained)))
        return out

    def closing(self, whole: Rendering, turns: Sequence[Turn]) -> list[int]:
        """Places where an end token has to be put into the text.

        Raises:
          ValueError: a turn that the template does not close, although it closes others.
        """
        out = []
        for turn in turns:
            behind = whole.text[turn.closed : turn.after]
            if any(end in behind for end in self._ends):
                continue
            last = turn.after == len(whole.text)
            if self._end is not None and not last:
                raise ValueError(
                    f"the template writes {behind!r} behind turn {turn.message}, which "
                    f"holds none of the end tokens {list(self._ends)}"
                )
            out.append(turn.after if last else turn.closed)
        return out

    def _render_any(self, messages: Sequence[Message], open_turn: bool) -> str:
        """The rendering; a content of None is empty text where a template refuses it."""
        try:
            return self._render(messages, open_turn)
        except ValueError:
            if all(m.get("content") is not None for m in messages):
                raise
        return self._render([{**m, "content": text_of(m)} for m in messages], open_turn)

    @functools.cached_property
    def _takes_parts(self) -> bool:
        said = {"role": "user", "content": [{"type": "text", "text": "qx"}]}
        try:
            text = self._render([said], False)
        except ValueError:
            return False
        found = [(a, b) for a, b, _ in tracked_text.spans(text)]
        return len(found) == 1 and text[slice(*found[0])] == "qx"

    @functools.cached_property
    def _lacks_system(self) -> bool:
        """The template refuses a system turn in front of a user turn, or drops it."""
        said = [{"role": "system", "content": "sx"}, {"role": "user", "content": "qx"}]
        try:
            self._render(said[1:], True)
            text = self._render(said, True)
        except ValueError as error:
            return "'system'" in str(error)
        return "sx" not in text

    def _without_system(self, messages: list[Message]) -> list[Message]:
        if not self._merge_system:
            raise ValueError(
                "the chat template has no system turn: config.template_system = 'user' "
                "puts its text in front of the first user turn"
            )
        system = [text_of(m) for m in messages if m["role"] == "system"]
        rest = [dict(m) for m in messages if m["role"] != "system"]
        user = next((m for m in rest if m["role"] == "user"), None)
        if user is None:
            raise ValueError("there is no user turn to put the system turn in front of")
        user["content"] = "\n\n".join([*system, text_of(user)])
        return rest

    def _extent(self, text: str, spans: list[tuple[int, int, str]]) -> Span | None:
        """The text of a message: its spans up to where a template writes it again."""
        if not spans:
            return None
        # A blank thought in front of an answer is not where its text begins.
        spans = [s for s in spans if text[s[0] : s[1]].strip()] or spans
        if len(spans) == 1:
            return spans[0][:2]
        start, stop, seen = spans[0][0], spans[0][1], {spans[0][2]}
        for a, b, key in spans[1:]:
            if key in seen and any(end in text[stop:a] for end in self._ends):
                break  # the name of a tool, say, that its result shows again
            stop = max(stop, b)
            seen.add(key)
        return start, stop

    def _place(
        self, text: str, messages: Sequence[Message], places: list[Span | None], i: int
    ) -> Span | None:  # fmt: skip
        """Where a message is whose characters left no span."""
        content = messages[i].get("content")
        before = max((p[1] for p in places[:i] if p), default=0)
        after = min((p[0] for p in places[i + 1 :] if p), default=len(text))
        if isinstance(content, str) and content.strip():
            shown = content.strip()
            if text.count(shown, before, after) != 1:
                return None
            at = text.index(shown, before, after)
            return at, at + len(shown)
        if messages[i]["role"] != "assistant":
            return None
        # A turn without text: its place is where a letter in it would be.
        marked = [*messages[:i], {**messages[i], "content": "x"}, *messages[i + 1 :]]
        try:
            other = self._render_any(marked, False)
        except ValueError:
            return None
        found = [a for a, _, source in tracked_text.spans(other) if source[0] == i]
        whole = tracked_text.plain(other)
        if found and whole[: found[0]] + whole[found[0] + 1 :] == text:
            return found[0], found[0]
        return None

    def _opened(
        self, messages: Sequence[Message], whole: Rendering, i: int, after: int,
        tail: str | None,
    ) -> int:  # fmt: skip
        """Where turn i begins to be scored.

        Args:
          messages: the dialogue.
          whole: its rendering.
          i: index of the turn.
          after: where the text of the next message begins.
          tail: what the generation prompt has in front of it, where that is known.
        """
        place = whole.own[i]
        assert place is not None
        k = next((k for k in range(i - 1, -1, -1) if whole.own[k]), None)
        located = None if k is None else whole.own[k]
        before = located[1] if located else 0
        role = None if k is None else messages[k]["role"]
        inside = [a for a, _ in whole.marks if before <= a < after]
        if inside:
            return max(min(inside), whole.given[i])
        rest, gap = whole.text[before:after], place[0] - before
        fits = self._fitting(messages[:i], role, rest, rest[:gap], tail)
        if fits is None:
            return max(place[0], whole.given[i])
        thought = EMPTY_THOUGHT.match(rest, fits, max(fits, gap))
        return max(before + (thought.end() if thought else fits), whole.given[i])

    def _fitting(
        self, before: Sequence[Message], role: str | None, rest: str, gap: str,
        tail: str | None,
    ) -> int | None:  # fmt: skip
        """How much of the text behind a message a generation prompt writes there, too."""
        known = self._tails.setdefault(role, {})
        if tail is not None:
            if rest.startswith(tail):
                return len(tail)
        elif before and (role, gap) not in self._gaps:
            self._gaps.add((role, gap))
            try:
                asked = self.read(before, open_turn=True)
                done = max((p[1] for p in asked.own if p), default=0)
                known.setdefault(asked.text[done:])
            except ValueError:
                pass
        fits = [len(t) for t in known if rest.startswith(t)]
        if not fits:  # then as a bare turn begins
            fits = [len(t) for t in self._bare_gaps if gap.startswith(t)]
        return max(fits, default=None)

    @functools.cached_property
    def _bare_gaps(self) -> tuple[str, ...]:
        """What the template writes in front of the turns of a bare dialogue."""
        try:
            text, own = probe(self._render)
        except ValueError:
            return ()
        gaps = text[own[0][1] : own[1][0]], text[own[2][1] : own[3][0]]
        return tuple(dict.fromkeys(gaps))


def probe(
    render: Callable[[Sequence[Message], bool], str],
) -> tuple[str, list[Span]]:
    """The rendering of two bare exchanges, and the places of their four texts.

    Raises:
      ValueError: the template refuses them or leaves one out.
    """
    roles = ("user", "assistant", "user", "assistant")
    said = [
        {"role": role, "content": text}
        for role, text in zip(roles, "qrst", strict=True)
    ]
    tracked = render(said, False)
    places: dict[int, Span] = {}
    for a, b, (i, _) in tracked_text.spans(tracked):
        if i >= 0:
            places.setdefault(i, (a, b))
    if len(places) < 4:
        raise ValueError("the template leaves out turns of a bare dialogue")
    return tracked_text.plain(tracked), [places[i] for i in range(4)]


def end_of_turn(
    render: Callable[[Sequence[Message], bool], str], ends: Iterable[str],
    control: Iterable[str],
) -> tuple[str | None, str | None]:  # fmt: skip
    """(the token that ends old assistant turns, the one that ends the last turn).

    It is the first EOS behind an old turn; else the EOS behind the last one, unless old
    and last turns, or turns of both roles, have a control token of their own in common.

    Args:
      render: as for `Reader`.
      ends: the texts of EOS tokens.
      control: those of all control tokens.

    Returns:
      None for a token that the template does not write.
    """
    try:
        text, own = probe(render)
    except ValueError:
        return None, None
    old, last = text[own[1][1] : own[2][0]], text[own[3][1] :]
    user = text[own[0][1] : own[1][0]]
    found = first_of(ends, old)
    if found is None:
        shared = (_common(old, last), _common(old, user))
        of_all = [token for part in shared if (token := first_of(control, part))]
        found = of_all[0] if of_all else first_of(ends, last)
    if found is None:
        return None, None
    return found, first_of((*ends, found), last)


def text_of(message: Message) -> str:
    """The content of a message as one text; parts are joined, None is empty.

    Raises:
      ValueError: a part that is no text.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return content or ""
    texts = [p.get("text") if isinstance(p, Mapping) else p for p in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"the chat template reads no parts of content that are no text: {part!r}"
            )
    return "".join(map(str, texts))


def _check(message: Message) -> None:
    """Raises ValueError for a message whose keys have values of another kind."""
    for key, kinds in KINDS.items():
        if not isinstance(message.get(key), kinds):
            raise ValueError(
                f"the {key!r} of a message is {message.get(key)!r}, expected "
                + " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            )
    for key, values in (("weight", "0 or 1"), ("train", "true or false")):
        if message.get(key) not in (None, 0, 1):
            raise ValueError(
                f"the {key!r} of a message is {message[key]!r}, expected {values}"
            )


def first_of(tokens: Iterable[str], text: str) -> str | None:
    """The token that comes first in a text, the longest of those at one place."""
    found = [(text.index(t), -len(t), t) for t in tokens if t in text]
    return min(found)[2] if found else None


def _common(a: str, b: str) -> str:
    n = next(
        (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
    return a[:n]


def _narrowed(
    text: str, a: int, b: int, message: Message, key: str
) -> Span:  # fmt: skip
    """A span that holds more than the content of its message: the content alone."""
    content = message.get(key)
    if key != "content" or not isinstance(content, str):
        return a, b
    shown, said = text[a:b], content.strip()
    if len(shown) <= len(content) or not said or shown.count(said) != 1:
        return a, b
    at = text.index(said, a, b)
    return at, at + len(said)


def _left_out(
    message: Message, own: list[tuple[int, int, str]], names: set[str], text: str
) -> list[str]:
    """'role: key' of the texts of a message that are not in the rendering."""
    role, shown = message["role"], {key for _, _, key in own} | names
    if shown & {*THOUGHTS}:
        shown |= {*THOUGHTS}
    if "prefill" in shown:
        shown.add("content")
    out = [
        f"{role}: {key}"
        for key, value in message.items()
        if key not in SETTINGS and key not in shown and _has_text(value)
    ]
    if role == "assistant" and not own:
        return out or ["assistant: a turn without text"]
    content = message.get("content")
    if isinstance(content, str) and "content" in shown and "prefill" not in shown:
        lost = _letters(content) - sum(
            _letters(text[a:b]) for a, b, key in own if key in ("content", *THOUGHTS)
        )
        if lost > TAGS:
            out.append(f"{role}: a part of content")
    return out


def _letters(text: str) -> int:
    return len("".join(text.split()))


def _texts(value: Any) -> list[str]:
    """All texts in a value, also keys."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [t for pair in value.items() for item in pair for t in _texts(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _texts(item)]
    return []


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(_has_text(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_has_text(v) for v in value)
    return False
