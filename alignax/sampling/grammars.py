"""Grammars of responses, from regular expressions and JSON schemas.

  regex:(yes|no), because [^.]{1,80}\\.     the whole response matches, as `re.fullmatch` says
  json_schema:answer.json                  the response is JSON of the schema in that file

A grammar says which tokens may come next, so that every response that ends is in it; one that
`max_new` cuts off begins as such a response does. The distribution over these tokens is the
model's, renormalised; it is not the model's distribution of whole responses given that they
are in the grammar.

  characters -> classes that the pattern does not tell apart -> deterministic automaton over
  classes (subset construction) -> the same with the fewest states -> over tokens

A token that is a part of a character is not allowed, nor a special token besides EOS. Source
of the last step: Willard & Louf 2023, https://arxiv.org/abs/2307.09702
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from alignax import plugin
from alignax.models.stored import expanded
from alignax.sampling.automaton import Automaton
from alignax.text import patterns

CELLS = 2**26  # most entries of a table, states times tokens; one has 5 bytes
STATES = 4096  # most states over characters
KINDS = ("regex", "json_schema")
_BEGIN, _END = ("^", r"\A"), ("$", r"\Z")


class Grammar(NamedTuple):
    """A grammar that a config names: see `load`."""

    build: Callable[
        [Sequence[bytes], Sequence[int]], Automaton
    ]  # of pieces and EOS ids
    identity: str  # differs if other texts are in the grammar; of a function, its name


def load(text: str, name: str = "grammar") -> Grammar:
    """The grammar that a setting of a config names.

    Args:
      text: 'regex:PATTERN', 'json_schema:FILE', or the dotted name of a function
        (pieces, eos_ids) -> Automaton.
      name: of the setting, for errors.

    Raises:
      ValueError: a pattern or a schema that is none, or has parts that are not supported;
        no such function.
      OSError: a file that cannot be read.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        return Grammar(plugin.function(text, name), text)
    pattern = rest if kind == "regex" else _from_file(rest, name)
    try:
        _steps(patterns.compile(pattern))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    own = f" {hashlib.sha256(pattern.encode()).hexdigest()[:16]}" * (kind != "regex")
    return Grammar(functools.partial(regex, pattern, name=name), text + own)


def _from_file(path: str, name: str) -> str:
    """The regular expression of the JSON schema in a file."""
    try:
        schema = json.loads(expanded(path).read_text(encoding="utf-8"))
        return json_schema(schema)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: {path} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path}: {error}") from None
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: cannot read {path or 'a file without a name'}: {error}"
        ) from None


def regex(
    pattern: str, pieces: Sequence[bytes], eos_ids: Sequence[int], name: str = "grammar"
) -> Automaton:
    """The grammar of the texts that a regular expression matches from end to end.

    Args:
      pattern: in Python's syntax; see `patterns` for what it may have. ^ and $ may stand
        at its begin and its end.
      pieces: the bytes of each id of the vocabulary, from `stops.pieces`.
      eos_ids: allowed where the text is complete.
      name: of the setting, for errors.

    Returns:
      Automaton of S states over V tokens. From every state that a response can reach there
      is a way to its end.

    Raises:
      ValueError: no regular expression; one that no text of these tokens matches; too
        many states.
    """
    texts = [_text(piece) for piece in pieces]
    characters = sorted({c for t in texts for c in t})
    try:
        steps, start = _steps(patterns.compile(pattern))
        of, passes = _classes(steps, characters)
        many = int(of.max(initial=-1)) + 1
        delta, final = _fewest(*_subsets(steps, start, passes, many))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if len(delta) * len(texts) > CELLS:
        raise ValueError(
            f"{name}: {pattern!r} has {len(delta)} states, of which each needs a row of "
            f"{len(texts)} tokens: at most {CELLS // len(texts)} fit; shorten the repeats"
        )
    number = dict(zip(characters, of.tolist(), strict=True))
    following = _over_tokens(delta, [[number[c] for c in t] for t in texts])
    following[:, [not t for t in texts]] = len(delta) - 1
    ends = sorted(eos_ids)
    following[:, ends] = len(delta) - 1  # an EOS is no text
    # a state lives if EOS may follow, or a token that leads to one that lives
    leads = np.zeros((len(delta), len(delta)), bool)
    leads[np.arange(len(delta))[:, None], following] = True
    live, before = final.copy(), -1
    while before != live.sum():
        before = live.sum()
        live |= leads[:, live].any(1)
    if not live[0]:
        raise ValueError(
            f"{name}: no text of the tokenizer's tokens matches {pattern!r}"
        )
    flag = live[following]
    flag[:, ends] = final[:, None]
    return Automaton(following.astype(np.int32), flag)


def _text(piece: bytes) -> str:
    """A token's text; '' if it is no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return ""


def _steps(pattern: patterns.Pattern) -> tuple[Sequence[patterns.Step], int]:
    """The pattern's steps, if all places in it are its begin or its end."""
    for kind, test, _ in pattern.steps:
        if kind != "place" or test is None:
            continue
        if test.pattern not in (*_BEGIN, *_END) or test.flags & re.MULTILINE:
            raise ValueError(
                f"a grammar has no {test.pattern!r}, besides ^ and $ of the whole text"
            )
    return pattern.steps, pattern.start


def _classes(
    steps: Sequence[patterns.Step], characters: Sequence[str]
) -> tuple[Int[np.ndarray, " characters"], dict[re.Pattern[str], np.ndarray]]:
    """The class of each character, and by test which classes pass it.

    Two characters are in one class if every step reads both or neither.
    """
    text = "".join(characters)
    tests = {
        test for kind, test, _ in steps if kind == "character" and test is not None
    }
    place = {c: i for i, c in enumerate(characters)}
    passed = np.zeros((len(tests) + 1, len(characters)), bool)
    for row, test in zip(passed, tests, strict=False):
        row[[place[c] for c in test.findall(text)]] = True
    kinds, of = np.unique(passed, axis=1, return_inverse=True)
    return of.reshape(-1), dict(zip(tests, kinds, strict=False))


def _subsets(
    steps: Sequence[patterns.Step],
    start: int,
    passes: Mapping[Any, Any],
    many: int,
) -> tuple[Int[np.ndarray, "S C"], np.ndarray]:
    """A deterministic automaton over `many` classes: transitions, and which states are final.

    A state is a set of steps; that of no step is the last.
    """
    first = _reached(steps, {start}, _BEGIN)
    number: dict[frozenset[int], int] = {first: 0, frozenset(): -1}
    rows: list[list[int]] = []
    for state in (queue := [first]):  # grows while it is read
        reads = [
            (passes[steps[s][1]], steps[s][2])
            for s in state
            if steps[s][0] == "character"
        ]
        row = []
        for c in range(many):
            after = {s for passed, following in reads if passed[c] for s in following}
            found = _reached(steps, after, ())
            if found not in number:
                number[found] = len(queue)
                queue.append(found)
            row.append(number[found])
        rows.append(row)
        if len(queue) > STATES:
            raise ValueError(f"the pattern has more than {STATES} states")
    final = [*(_is_end(steps, state) for state in queue), False]
    delta = np.array([*rows, [-1] * many], np.int32).reshape(-1, many)
    return np.where(delta < 0, len(rows), delta), np.array(final)


def _reached(
    steps: Sequence[patterns.Step], begun: set[int], places: Sequence[str]
) -> frozenset[int]:
    """The steps that are reached from some without a character, through these places."""
    left, seen = list(begun), set(begun)
    while left:
        kind, test, following = steps[left.pop()]
        free = kind == "free" or (
            kind == "place" and test is not None and test.pattern in places
        )
        fresh = [s for s in following if free and s not in seen]
        seen.update(fresh)
        left += fresh
    return frozenset(s for s in seen if steps[s][0] != "free")


def _is_end(steps: Sequence[patterns.Step], state: frozenset[int]) -> bool:
    """Whether the pattern matches what was read when the text ends here."""
    last = _reached(steps, {*state}, _END)
    return any(steps[s][0] == "end" for s in last)


def _fewest(
    delta: Int[np.ndarray, "S C"], final: np.ndarray
) -> tuple[Int[np.ndarray, "M C"], np.ndarray]:
    """The automaton with one state for those that no text tells apart (Moore).

    State 0 stays 0, and the last one is dead.
    """
    block = final.astype(np.int64)
    while True:
        key = np.concatenate([block[:, None], block[delta]], 1)
        now = np.unique(key, axis=0, return_inverse=True)[1].reshape(-1)
        if now.max() == block.max():
            break
        block = now
    dead = block[-1]
    order = [block[0], *sorted({*block.tolist()} - {block[0], dead}), dead]
    if block[0] == dead:  # nothing is matched
        order = [dead]
    number = {b: i for i, b in enumerate(order)}
    one_of = [int(np.argmax(block == b)) for b in order]
    table = np.array([[number[block[t]] for t in delta[s]] for s in one_of], np.int32)
    return table.reshape(len(order), -1), final[one_of]


def _over_tokens(delta: Int[np.ndarray, "S C"], tokens: Sequence[Sequence[int]]) -> Any:
    """The state [S, V] after each token, which is a sequence of classes.

    What several tokens begin with is followed once.
    """
    number: dict[
        tuple[int, int], int
    ] = {}  # (a beginning, the next class) -> a beginning
    levels: list[
        list[tuple[int, int, int]]
    ] = []  # (it, all but its last class, the last)
    whole = []
    for token in tokens:
        node = 0
        for i, symbol in enumerate(token):
            if (node, symbol) not in number:
                number[node, symbol] = len(number) + 1
                if i == len(levels):
                    levels.append([])
                levels[i].append((number[node, symbol], node, symbol))
            node = number[node, symbol]
        whole.append(node)
    state = np.zeros((len(delta), len(number) + 1), np.int32)
    state[:, 0] = np.arange(len(delta))
    for level in levels:
        now, before, symbols = np.array(level).T
        state[:, now] = delta[state[:, before], symbols]
    return state[:, whole]


# -- JSON schemas

_SPACE = "[ ]?"  # json.dumps writes one after : and , and some models none
_STRING = r'(?:[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt])'  # a character of a string
_ATOMS = {
    "integer": r"-?(?:0|[1-9][0-9]*)",
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    "boolean": "(?:true|false)",
    "null": "null",
}
_NOTES = (
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$comment", "$defs", "definitions",
)  # fmt: skip


def json_schema(schema: Any) -> str:
    """A regular expression whose matches are JSON of a schema, in one line.

    Supported: type (one or several), enum, const, anyOf, $ref within the schema, unless it
    contains itself; properties and required of an object, which come in the order of the
    schema, without others; items, minItems and maxItems of an array; minLength and
    maxLength of a string. A string has no character that JSON escapes by its number.

    Args:
      schema: a JSON schema as Python has it after `json.load`.

    Raises:
      ValueError: a part that is not supported, by its name; what is no schema.
    """
    return _value(schema, schema, ())


_OF_TYPE = {  # keys of a schema that mean something for one type alone
    "string": ("minLength", "maxLength"), "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}  # fmt: skip
_IS = {
    "string": str, "integer": int, "number": int | float, "boolean": bool,
    "null": type(None), "array": list, "object": dict,
}  # fmt: skip


def _value(schema: Any, root: Any, inside: tuple[str, ...]) -> str:
    """The regular expression of a schema within `root`, inside of these references."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{schema!r} is no schema: expected an object")
    asked = {k: v for k, v in schema.items() if k not in _NOTES}
    if "$ref" in asked:
        _only(asked, ("$ref",))
        where = asked["$ref"]
        if where in inside:
            raise ValueError(
                f"{where} contains itself: its texts follow no regular expression"
            )
        return _value(_resolved(where, root), root, (*inside, where))
    if "anyOf" in asked:
        _only(asked, ("anyOf",))
        return _either([_value(x, root, inside) for x in _list(asked, "anyOf")])
    kinds = asked.get("type", "object" if "properties" in asked else None)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "enum" in asked or "const" in asked:
        return _constants(asked, kinds)
    known = [*_ATOMS, *_OF_TYPE]
    if wrong := [k for k in kinds if not isinstance(k, str) or k not in known]:
        raise ValueError(
            f"the type {wrong[0]!r} is not supported; expected one of {known}"
        )
    _only(asked, ("type", *(key for k in kinds for key in _OF_TYPE.get(k, ()))))
    ways = []
    for kind in kinds:
        if kind in _ATOMS:
            ways.append(_ATOMS[kind])
        elif kind == "string":
            ways.append(f'"{_STRING}{_times(asked, "minLength", "maxLength")}"')
        elif kind == "array":
            ways.append(_array(asked, lambda x: _value(x, root, inside)))
        else:
            ways.append(_object(asked, lambda x: _value(x, root, inside)))
    return ways[0] if len(ways) == 1 else _either(ways)


def _constants(schema: Mapping[str, Any], kinds: list[Any]) -> str:
    """The values of `enum` or `const` that have one of the types."""
    key = "enum" if "enum" in schema else "const"
    _only(schema, (key, "type"))
    values = _list(schema, "enum") if key == "enum" else [schema["const"]]

    def fits(value):
        asked = [k for k in kinds if k is not None]
        found = [
            isinstance(value, _IS.get(k, ()))
            and (k == "boolean") >= isinstance(value, bool)
            for k in asked
        ]
        return not asked or any(found)

    def text(value):
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise ValueError(f"{key} has {value!r}, which is no JSON") from None

    return _either([re.escape(text(v)) for v in values if fits(v)])


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key, [])
    if not isinstance(found, list):
        raise ValueError(f"`{key}` is {found!r}, expected a list")
    return found


def _array(schema: Mapping[str, Any], of: Callable[[Any], str]) -> str:
    if "items" not in schema:
        raise ValueError("an array needs `items`")
    item = of(schema["items"])
    least, most = _range(schema, "minItems", "maxItems")
    if most == 0:
        return r"\[\]"
    more = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
    some = f"{item}(?:,{_SPACE}{item}){{{more}}}"
    return rf"\[{some}\]" if least else rf"\[(?:{some})?\]"


def _object(schema: Mapping[str, Any], of: Callable[[Any], str]) -> str:
    properties, required = schema.get("properties", {}), _list(schema, "required")
    if not isinstance(properties, Mapping) or not properties:
        raise ValueError("an object needs `properties`")
    if unknown := [k for k in required if k not in properties]:
        raise ValueError(f"`required` has {unknown[0]!r}, which is not in `properties`")
    members = [
        (
            f"{re.escape(json.dumps(k, ensure_ascii=False))}:{_SPACE}{of(v)}",
            k in required,
        )
        for k, v in properties.items()
    ]
    rest = ""  # of the members behind, after one that is there
    whole = ""  # of them, before any is
    for text, needed in reversed(members):
        whole = f"{text}{rest}" if needed else f"(?:{text}{rest}|{whole})"
        after = f",{_SPACE}{text}"
        rest = f"{after}{rest}" if needed else f"(?:{after})?{rest}"
    return rf"\{{{whole}\}}"


def _either(ways: Sequence[str]) -> str:
    if not ways:
        raise ValueError("`enum` and `anyOf` need at least one value")
    return f"(?:{'|'.join(ways)})"


def _times(schema: Mapping[str, Any], low: str, high: str) -> str:
    least, most = _range(schema, low, high)
    return (
        "*"
        if not least and most is None
        else f"{{{least},{'' if most is None else most}}}"
    )


def _range(schema: Mapping[str, Any], low: str, high: str) -> tuple[int, int | None]:
    """Two numbers of a schema: how many at least and at most; None is any number."""
    least, most = schema.get(low, 0), schema.get(high)
    for key, value in ((low, least), (high, 0 if most is None else most)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{key} is {value!r}, expected a whole number from 0")
    if most is not None and most < least:
        raise ValueError(f"{low}={least} is above {high}={most}")
    return least, most


def _resolved(where: Any, root: Any) -> Any:
    """The part of a schema that a reference names, as '#/$defs/name'."""
    if not isinstance(where, str) or not (where == "#" or where.startswith("#/")):
        raise ValueError(f"$ref {where!r} is not within the schema")
    found = root
    for key in where[1:].split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or key not in found:
            raise ValueError(f"$ref {where!r}: there is no {key!r}")
        found = found[key]
    return found


def _only(schema: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(set(schema) - {*known}):
        raise ValueError(
            f"{unknown[0]!r} is not supported here; beside notes, known are {list(known)}"
        )
