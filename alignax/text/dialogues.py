"""From an example to ids: a prompt, its responses, and which of their tokens are scored.

Every response is rendered together with its prompt, as one dialogue, and encoded whole. The
prompt to train on is what all responses of the row and the prompt to generate from have in
common; a token that straddles prompt and response belongs to the response.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from alignax.batch import Example, Message
from alignax.text.encoder import Encoded, Encoder, Key, Segment
from alignax.text.shapes import Filled, Shape, shape
from alignax.text.skeleton import LEFT, RIGHT
from alignax.text.turns import Reader, Rendering, Span, Turn, text_of

SYSTEMS = ("refuse", "user")  # what happens to a system turn that a template lacks
SPECIALS = ("text", "tokens")  # what control tokens in users' text are
PLAIN = (
    "plain strings are turns of the chat template (raw = True in the data section leaves "
    "the template out)"
)
READERS = 256  # sets of template variables that are kept


class Reading(NamedTuple):
    """How the rows of a data set become ids.

    Attributes:
      variables: what the chat template gets besides messages and special tokens.
      system: of a system turn under a template without one: 'refuse' (the row is
        malformed) or 'user' (its text goes in front of the first user turn, with an empty
        line between).
      specials: what control tokens in the text of user and tool turns are: 'text' or
        'tokens'. Markers that are plain text ('[INST]') are always what they are.
      raw: strings are no turns: the chat template is left out.
      truncate: what rows lose that are too long, one of `truncation.RULES`.
      min_response: scored tokens of a response that a prompt leaves room for; 0 is a
        quarter of the length.
      truncate_prompts: what prompts to generate from lose, one of `truncation.PROMPT_RULES`.
    """

    variables: Mapping[str, Any] = MappingProxyType({})
    system: str = "refuse"
    specials: str = "text"
    raw: bool = False
    truncate: str = "response"
    min_response: int = 0
    truncate_prompts: str = "drop"

    def identity(self) -> tuple[Any, ...]:
        """What ids depend on before anything is cut; () by default."""
        how = (dict(self.variables), self.system, self.specials, self.raw)
        return () if how == ({}, "refuse", "text", False) else how


class Side(NamedTuple):
    """One response with its prompt in front, as text."""

    text: str
    segments: list[Segment]
    turns: list[Turn]  # those of the response
    marks: list[Span] | None  # of the template; None: it is not a template that marks
    beside: bool = False  # it begins with the segments of the prompt, but for the last
    begun: bool = False  # its first turn has a prefill, which is given and not scored


class Asked(NamedTuple):
    """A prompt to generate from."""

    text: str
    inserts: list[tuple[int, str]]  # end tokens that were put into it
    segments: list[Segment]

    def begins(self, text: str, inserts: list[tuple[int, str]]) -> bool:
        """Whether a text begins with all segments of this one but the last."""
        last = self.segments[-1]
        many = last.start + (0 if last.inserted else len(last.key.lead))
        here = [x for x in inserts if x[0] <= last.start]
        return here == self.inserts and text.startswith(self.text[:many])


class Rendered(NamedTuple):
    """An example as text. Its segments can be encoded together with those of others."""

    prompt: list[Segment]
    prompt_text: str
    sides: list[Side]
    given: int  # ids in front of the text: BOS
    opened: bool  # the responses begin with an assistant turn
    user: Span | None  # the text of the last user turn in the prompt's text
    notes: dict[str, str]  # what is remarkable: name -> details

    def wanted(self) -> Iterator[Key]:
        """What has to be encoded."""
        yield from (s.key for s in self.prompt)
        for side in self.sides:
            shared = len(self.prompt) - 1 if side.beside else 0
            yield from (s.key for s in side.segments[shared:])


class Tokens(NamedTuple):
    """An example as ids, nothing cut yet."""

    prompt: list[int]
    responses: list[list[int]]  # G lists of ids, each ends in its last scored token
    scored: list[list[bool]]  # G lists, True on assistant turns including their EOS
    notes: dict[str, str]


class Prepared:
    """An example of which the texts are known that have to be encoded.

    Args:
      dialogues: that prepare it.
      example: which one.

    Raises:
      ValueError: as `Dialogues.render`.
    """

    def __init__(self, dialogues: "Dialogues", example: Example):
        self._dialogues, self._example = dialogues, example
        self._rendered: Rendered | None = None
        self._filled = dialogues.filled(example)
        if self._filled is None:
            self._rendered = dialogues.render(example)

    @property
    def rendered(self) -> Rendered:
        """The example as text."""
        if self._rendered is None:
            self._rendered = self._dialogues.render(self._example)
        return self._rendered

    def wanted(self) -> Iterable[Key]:
        """What has to be encoded."""
        return self._filled.wanted() if self._filled else self.rendered.wanted()

    def tokens(self) -> Tokens:
        """The ids.

        Raises:
          ValueError: as `Dialogues.ids`.
        """
        if self._filled is not None:
            found = self._dialogues.quick(self._filled)
            if found is not None:
                return found
        return self._dialogues.ids(self.rendered)


class Dialogues:
    """Renders and encodes the examples of one tokenizer, read in one way.

    Args:
      encoder: of the tokenizer.
      render: (messages, add_generation_prompt, variables) -> the rendering, with spans.
      reading: how rows are read.
      templated: whether there is a chat template.
      eos_ids: every id that ends a turn.
      eos_id: the one that is put where the text has none.
      bos_id: of BOS, or None.
      add_bos: whether text without a template starts with BOS.
      end_of_turn: the token by which the template closes old turns, or None.
      followed: as for `turns.Reader`.
      marked: whether the template marks what the assistant writes.
      variables: names that the template reads.
    """

    def __init__(
        self, encoder: Encoder, render, reading: Reading, *, templated: bool,
        eos_ids: Iterable[int], eos_id: int, bos_id: int | None, add_bos: bool,
        end_of_turn: str | None, followed: bool, marked: bool,
        variables: Collection[str],
    ):  # fmt: skip
        self._encoder, self._render, self._reading = encoder, render, reading
        self._templated, self._end, self._followed = templated, end_of_turn, followed
        self._ends = {encoder.name_of(i): i for i in sorted(eos_ids)}
        self._end_ids = set(eos_ids)
        if end_of_turn:
            self._ends[end_of_turn] = encoder.control[end_of_turn]
            self._end_ids.add(encoder.control[end_of_turn])
        self._eos = encoder.name_of(eos_id)
        self._bos = None if bos_id is None else encoder.name_of(bos_id)
        self._bos_id, self._add_bos = bos_id, add_bos
        self._readers: dict[str, Reader] = {}
        self._variables, self._marked = variables, marked
        self._shapes: dict[tuple[str, ...], Shape | None] = {}

    def filled(self, example: Example) -> Filled | None:
        """The segments of an example whose shape is known; None of others."""
        if example.template or not example.responses or isinstance(example.prompt, str):
            return None
        texts = _only_texts(example.prompt)
        answers: list[str] = []
        for response in example.responses:
            if isinstance(response, str):
                answers.append(response)
                continue
            said = _only_texts(response)
            if not said or len(said) > 1 or response[0]["role"] != "assistant":
                return None
            answers += said
        if texts is None:
            return None
        roles = tuple([m["role"] for m in example.prompt])
        try:
            shape = self._shapes[roles]
        except KeyError:
            shape = self._shapes[roles] = self._shape(roles)
        if shape is None:
            return None
        for text in (*texts, *answers):
            if self._encoder.holds_control(text):
                return None
        return shape.keys(texts, answers)

    def quick(self, filled: Filled) -> Tokens | None:
        """The ids of segments; None where a token straddles prompt and response."""
        found = filled.ids(self._encoder)
        if found is None or found[0][:2] == [self._bos_id] * 2:
            return None
        prompt, responses = found
        return Tokens(prompt, responses, [[True] * len(r) for r in responses], {})

    def _shape(self, roles: tuple[str, ...]) -> Shape | None:
        """What rows with these roles and an answer have in common; None if too little."""
        usual = (
            self._followed and self._encoder.separate and roles[-1:] != ("assistant",)
        )
        if not usual:
            return None
        marks = [f"{LEFT}{i}{RIGHT}" for i in range(len(roles) + 1)]
        said = [
            {"role": role, "content": text}
            for role, text in zip((*roles, "assistant"), marks, strict=True)
        ]
        try:
            rendered = self._chat(Example("", said[:-1], [said[-1:]]))
        except ValueError:
            return None
        (side,) = rendered.sides
        (turn,) = side.turns
        reader = self._reader(self._reading.variables)
        plain = reader.is_filled(said[:-1], True) and reader.is_filled(said, False)
        if not plain or rendered.notes or side.marks or not side.beside:
            return None
        if turn.opened != len(rendered.prompt_text):
            return None
        return shape(rendered.prompt, side.segments, [*self._ends], len(roles))

    def render(self, example: Example, prefill: str = "") -> Rendered:
        """An example as text.

        Args:
          example: a prompt and its responses.
          prefill: text behind the prompt of an example without responses, with which the
            response begins.

        Raises:
          ValueError: messages that the template refuses, a response without an assistant
            turn, an assistant turn that holds an EOS of its own, or an empty prompt.
        """
        texts = [_raw_text(r) for r in example.responses]
        plain = not self._templated or self._reading.raw
        if plain and isinstance(example.prompt, str) and None not in texts:
            given = [t for t in texts if t is not None]
            return self._raw(example.prompt, given, prefill)
        rendered = self._chat(example, prefill)
        if self._templated and isinstance(example.prompt, str):
            rendered.notes["plain_strings"] = PLAIN
        return rendered

    def ids(self, rendered: Rendered) -> Tokens:
        """The ids of a rendered example.

        Raises:
          ValueError: a prompt that starts with two BOS or differs between responses, or
            whose first token is already part of the response.
        """
        notes = dict(rendered.notes)
        prompt = Encoded(self._encoder, rendered.prompt)
        self._check_start(prompt)
        wholes = [
            Encoded(self._encoder, side.segments, prompt if side.beside else None)
            for side in rendered.sides
        ]
        found = [
            self._scored(side, whole, rendered.given)
            for side, whole in zip(rendered.sides, wholes, strict=True)
        ]
        if not found:
            return Tokens(prompt.ids, [], [], notes)
        marks, firsts = [mark for mark, _ in found], [first for _, first in found]
        shared = min(common(prompt.ids, w.ids) for w in wholes)
        straddle = differs = False
        if shared < len(prompt.ids):
            straddle = all(
                s.text.startswith(rendered.prompt_text) for s in rendered.sides
            )
            differs = not straddle
        if differs:
            notes["prompt_differs"] = self._window(prompt.ids, wholes[0].ids)
        if not differs:  # nothing of the prompt is scored, whatever the template marks
            firsts = [max(first, shared) for first in firsts]
        n = min(firsts if differs else (shared, *firsts))
        if any(w.ids[:n] != wholes[0].ids[:n] for w in wholes):
            raise ValueError("the responses of the row have different prompts")
        if n < 1:
            raise ValueError("the first token of the prompt is part of the response")
        alike = [
            (mark, first)
            for mark, first, side in zip(marks, firsts, rendered.sides, strict=True)
            if rendered.opened and not side.begun
        ]
        if straddle or any(first == n for _, first in alike):
            # All responses of a row are scored from the same place on.
            for mark, first in alike:
                mark[n:first] = [mark[first]] * (first - n)
        stops = [len(mark) - mark[::-1].index(True) for mark in marks]
        return Tokens(
            wholes[0].ids[:n],
            [w.ids[n:stop] for w, stop in zip(wholes, stops, strict=True)],
            [mark[n:stop] for mark, stop in zip(marks, stops, strict=True)],
            notes,
        )

    def joint(self, rendered: Rendered, g: int) -> Callable[[int], bool]:
        """Index of an id of side g -> whether a character ends with it."""
        return Encoded(self._encoder, rendered.sides[g].segments).joint

    def loose(self, rendered: Rendered) -> list[list[int]]:
        """Indices of ids of the prompt that are only text of its last user turn.

        They are in order, and in lists of whole characters.
        """
        if rendered.user is None:
            return []
        start, stop = rendered.user
        places = Encoded(self._encoder, rendered.prompt).places()
        out: list[list[int]] = []
        for k, (a, b) in enumerate(places):
            if not start <= a < b <= stop:
                continue
            if out and a < places[k - 1][1]:  # a character of several ids
                out[-1].append(k)
            else:
                out.append([k])
        return out

    def _scored(
        self, side: Side, whole: Encoded, given: int
    ) -> tuple[list[bool], int]:  # fmt: skip
        """(which ids are scored, index of the first one of the response)."""
        mark = [False] * len(whole.ids)
        opens = [max(given, whole.index(turn.opened)) for turn in side.turns]
        for turn, first in zip(side.turns, opens, strict=True):
            if not turn.trained:
                continue
            last = turn.after >= len(side.text)
            stop = len(mark) if last else whole.index(turn.after)
            behind = range(whole.index(turn.closed), stop)
            end = next((k for k in behind if whole.ids[k] in self._end_ids), None)
            if end is None:
                raise ValueError("the end of a turn is no token of its own")
            marks = side.marks or []
            inside = [m for m in marks if turn.opened < m[1] and m[0] < turn.after]
            if side.marks is not None and not inside:
                continue  # the template marks other turns
            if not inside or any(
                a <= turn.opened and turn.closed <= b for a, b in inside
            ):
                mark[first : end + 1] = [True] * (end + 1 - first)
                continue
            places = whole.places()
            for k in range(first, end):
                a, b = places[k]
                mark[k] = any(x < b and a < y for x, y in inside)
            mark[end] = True
        if not any(mark):
            raise ValueError("the template marks no turn of the response as generated")
        return mark, opens[0]

    def _check_start(self, encoded: Encoded) -> None:
        if self._bos_id is not None and encoded.ids[:2] == [self._bos_id] * 2:
            raise ValueError("the text starts with two BOS tokens")

    def _window(self, prompt: list[int], whole: list[int]) -> str:
        at = common(prompt, whole)
        window = slice(max(0, at - 8), at + 8)
        return f"from token {at} on: {prompt[window]} to generate from, {whole[window]}"

    # -- text without a template

    def _raw(
        self, prompt: str, responses: Sequence[tuple[str, str]], begun: str
    ) -> Rendered:
        front = self._front(prompt)
        if not prompt and not front:
            raise ValueError(
                "the prompt is empty and the tokenizer has no BOS to start from"
            )
        sides = []
        for text, prefill in responses:
            if not text.startswith(prefill):
                raise ValueError(f"prefill {prefill!r} does not begin {text!r}")
            whole = prompt + text
            end = next((e for e in self._ends if text.endswith(e)), "")
            closed = len(whole) - len(end)
            self._check_ends(whole[len(prompt) : closed])
            inserts = () if end else ((len(whole), self._eos),)
            segments = self._encoder.split(whole, inserts=inserts)
            turn = Turn(0, len(prompt) + len(prefill), closed, len(whole), True)
            sides.append(
                Side(whole, front + segments, [turn], None, begun=bool(prefill))
            )
        segments = self._encoder.split(prompt + begun)
        own = (0, len(prompt))
        return Rendered(front + segments, prompt, sides, len(front), True, own, {})

    def _front(self, prompt: str) -> list[Segment]:
        """BOS, where text without a template starts with it."""
        if self._bos is None or not (self._add_bos or not prompt):
            return []
        if prompt.startswith(self._bos):
            return []
        return [Segment(0, True, Key(self._bos, "", False))]

    def _check_ends(self, text: str) -> None:
        found = [end for end in self._ends if end in text]
        if found:
            raise ValueError(
                f"an assistant turn holds 2 EOS tokens, {found} in its text and the one "
                f"at its end; expected exactly one: {text[-80:]!r}"
            )

    # -- dialogues

    def _chat(self, example: Example, prefill: str = "") -> Rendered:
        reader = self._reader({**self._reading.variables, **example.template})
        prompt = reader.adapted(as_messages(example.prompt, "user"))
        answers = [
            reader.adapted(as_messages(r, "assistant")) for r in example.responses
        ]
        if not all(answers):
            raise ValueError("a response has no turn")
        opened = all(t[0]["role"] == "assistant" for t in answers)
        begun = opened and bool(prompt) and prompt[-1]["role"] == "assistant"
        rendering = reader.read(prompt, open_turn=opened and not begun)
        asked = self._asked(reader, prompt, rendering, begun, prefill)
        done = rendering.own[:-1] if begun else rendering.own
        tail = None
        if opened:
            tail = asked.text[max((p[1] for p in done if p), default=0) :]
        sides, left_out = [], set(rendering.left_out if not answers else ())
        for answer in answers:
            side, missing = self._side(reader, prompt, answer, asked, tail, begun)
            sides.append(side)
            left_out.update(missing)
        left_out |= {f"variable {name}" for name in self._unread(example.template)}
        notes = {f"left_out {k}": "the template does not show it" for k in left_out}
        whole = [asked.segments, *(side.segments for side in sides)]
        if any(s.key.shadowed for segments in whole for s in segments):
            notes["specials_as_text"] = "control tokens in the text of a user or tool"
        places = zip(rendering.own, prompt, strict=True)
        user = [place for place, m in places if m["role"] == "user"]
        last = user[-1] if user else None
        return Rendered(asked.segments, asked.text, sides, 0, opened, last, notes)

    def _asked(
        self, reader: Reader, prompt: list[Message], rendering: Rendering, begun: bool,
        prefill: str,
    ) -> Asked:  # fmt: skip
        """The prompt to generate from; a begun turn is open at the end of its text."""
        text = rendering.text
        if begun and (place := rendering.own[-1]):
            text = text[: place[1]]
        turns = reader.turns(prompt, rendering, len(prompt))
        inserts = [
            (at, self._eos)
            for at in reader.closing(rendering, turns)
            if not begun or at < len(text)
        ]
        segments = self._encoder.split(
            text + prefill, self._protected(rendering), inserts
        )
        if not segments:
            raise ValueError("the prompt is empty")
        return Asked(text, inserts, segments)

    def _side(
        self, reader: Reader, prompt: list[Message], answer: list[Message],
        asked: Asked, tail: str | None, begun: bool,
    ) -> tuple[Side, list[str]]:  # fmt: skip
        """(a response with its prompt, what of it the template does not show)."""
        first, given = len(prompt) - begun, bool(answer[0].get("prefill"))
        if begun:
            text, more = text_of(prompt[-1]), text_of(answer[0])
            said = {**prompt[-1], **answer[0], "content": text + more}
            text += answer[0].get("prefill") or ""
            answer = [{**said, "prefill": text}, *answer[1:]]
        messages = [*prompt[:first], *answer]
        for m in answer:
            if not text_of(m).startswith(m.get("prefill") or ""):
                raise ValueError(
                    f"prefill {m['prefill']!r} does not begin {m.get('content')!r}"
                )
        whole = reader.read(messages, open_turn=False)
        turns = reader.turns(messages, whole, first, tail)
        mine = [turn for turn in turns if turn.message >= first]
        if not mine:
            raise ValueError("the response has no assistant turn in the rendering")
        if not any(turn.trained for turn in mine):
            raise ValueError("the response has no turn that is trained (weight, train)")
        for turn in mine:
            for a, b in whole.pieces[turn.message]:
                self._check_ends(whole.text[a:b])
        inserts = [(at, self._eos) for at in reader.closing(whole, turns)]
        head = asked.segments if asked.begins(whole.text, inserts) else []
        segments = self._encoder.split(
            whole.text, self._protected(whole), inserts, head
        )
        side = Side(
            whole.text,
            segments,
            mine,
            whole.marks if self._marked else None,
            bool(head),
            given,
        )
        return side, whole.left_out

    def _unread(self, own: Mapping[str, Any]) -> list[str]:
        """Variables of the config or of a row that the template has no use for."""
        given = {**self._reading.variables, **own}
        return [k for k, v in given.items() if k not in self._variables and v]

    def _protected(self, rendering: Rendering) -> Sequence[Span]:
        return () if self._reading.specials == "tokens" else rendering.protected

    def _reader(self, variables: Mapping[str, Any]) -> Reader:
        key = json.dumps(variables, sort_keys=True, default=repr) if variables else ""
        reader = self._readers.get(key)
        if reader is None:
            if len(self._readers) >= READERS:
                self._readers.clear()

            def render(messages: Sequence[Message], open_turn: bool) -> str:
                return self._render(messages, open_turn, variables)

            reader = Reader(
                render, self._ends, self._end, control=self._encoder.control,
                followed=self._followed,
                merge_system=self._reading.system == "user",
            )  # fmt: skip
            self._readers[key] = reader
        return reader


def as_messages(turns: str | Sequence[Message], role: str) -> list[Message]:
    """Turns as messages; a string is one turn of `role`."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else list(turns)


def _only_texts(messages: Sequence[Message]) -> list[str] | None:
    """The contents of messages that have a role and a text and nothing else."""
    out = []
    for message in messages:
        text = message.get("content")
        if len(message) != 2 or type(text) is not str:
            return None
        out.append(text)
    return out


def _raw_text(response: str | Sequence[Message]) -> tuple[str, str] | None:
    """(text, prefill) of a response that needs no template; None of one that does."""
    if isinstance(response, str):
        return response, ""
    if len(response) == 1 and "prefill" in response[0]:
        text, prefill = response[0].get("content"), response[0]["prefill"]
        return (text, prefill) if isinstance(text, str) else None
    return None


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning of two lists of ids."""
    if b[: len(a)] == a:
        return len(a)
    pairs = zip(a, b, strict=False)
    return next((k for k, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
