"""Numbers and text of a row: what is none of both is an error that names its key."""

import codecs
import difflib
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

LIMIT = 400  # digits; a float has fewer in front of its point
# What a line has that holds half of a surrogate pair; so has one with a whole pair.
_LOWER, _UPPER = b"\\ud", b"\\uD"
_LONE = re.compile("[\ud800-\udfff]")


def read(line: bytes | ValueError) -> Any:
    """The object in a line, or the ValueError that says why there is none."""
    if isinstance(line, ValueError):
        return line
    try:
        return decode(line)
    except ValueError as e:
        return e


def decode(line: bytes) -> Any:
    """The object in a line of JSON, in UTF-8.

    Raises:
      ValueError: bytes that are no UTF-8, text that is no JSON, a key that an object has
        twice, an integer of too many digits, or half of a surrogate pair, which no
        encoding can write.
    """
    try:
        value = _decode(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: {e.reason} at byte {e.start}") from e
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}") from e
    if _LOWER in line or _UPPER in line:
        _check_text(value)
    return value


def number(key: str, value: Any) -> float:
    """A finite number; True is 1 and False is 0.

    Raises:
      ValueError: names the key and what it holds.
    """
    if isinstance(value, bool | int | float):
        try:
            found = float(value)
        except OverflowError:
            raise ValueError(
                f"'{key}' is an integer that no float can hold: {brief(value)}"
            ) from None
        if math.isfinite(found):
            return found
    raise ValueError(
        f"'{key}' is {brief(value)}, expected a finite number or a boolean"
    )


def columns(row: Mapping[str, Any]) -> dict[str, float | str]:
    """All keys of a row as numbers or text; lists and objects as their JSON.

    Raises:
      ValueError: a number that is not finite.
    """
    found: dict[str, float | str] = {}
    for key, value in row.items():
        if isinstance(value, str):
            found[key] = value
        elif isinstance(value, bool):
            found[key] = float(value)
        elif isinstance(value, int | float):
            number(key, value)
            found[key] = value
        else:
            found[key] = json.dumps(value, ensure_ascii=False)
    return found


def present(names: Mapping[str, str], seen: Collection[str]) -> None:
    """Raises ValueError for a key of a file that none of its rows has.

    Args:
      names: key in the file -> key that is read.
      seen: all keys of the rows.
    """
    for key, ours in names.items():
        if key not in seen:
            near = difflib.get_close_matches(key, list(seen), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"they have {sorted(seen)}"
            raise ValueError(
                f"columns: no row has the key {key!r}, to be read as {ours!r} ({hint})"
            )


def brief(value: Any) -> str:
    """The beginning of a value, for an error message."""
    if isinstance(value, int) and not -(10**LIMIT) < value < 10**LIMIT:
        return f"an integer of more than {LIMIT} digits"
    return f"{value!r:.40}"


def _integer(text: str) -> int:
    if len(text) > LIMIT:
        raise ValueError(f"an integer of {len(text)} digits, which no float can hold")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"an object has the key {twice!r:.40} twice")
    return found


_decode = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object).decode


def _check_text(row: Any) -> None:
    if not isinstance(row, dict):
        row = {"the row": row}
    for key, value in row.items():
        if _has_lone(key) or _has_lone(value):
            raise ValueError(
                f"{key!a:.40} holds half of a surrogate pair, which is no text"
            )


def _has_lone(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and _LONE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_lone(k) or _has_lone(v) for k, v in value.items())
    return isinstance(value, list) and any(map(_has_lone, value))
