r"""The final answer of a response, compared with that of the row: a verifiable reward.

  r = correct · 1[answer = reference] + format · 1[the answer is marked, and readable]

The answer is what follows the last "####", else what is in the last \boxed{}, else the last
number of the text; `accept` names those that count. Numbers are compared exactly, as
rationals: 1,234 = 1234.00, \frac{1}{2} = 0.5 = 50%, and 0.333 is not 1/3. A mark with two
numbers or an expression is wrong. A reference that is no number is compared as text, with
marked answers only. Everything takes linear time, whatever a policy writes.

Source: Cobbe et al. 2021, https://arxiv.org/abs/2110.14168 (the mark "####"); Hendrycks et
al. 2021, https://arxiv.org/abs/2103.03874 (\boxed{})
"""

import collections
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

RANGES = {"correct": "[0, inf)", "format": "(-inf, inf)"}
KINDS = ("hash", "boxed", "last")
LIMIT = 400  # digits of a number; a longer one is no answer

_COMMA = ",\u2009\u202f\u00a0"  # between groups of three digits
_DIGITS = rf"[0-9]+(?:[.{_COMMA}][0-9]+)*"  # one number, if it is well-formed
_GROUPS = re.compile(
    rf"(?:[1-9][0-9]{{0,2}}(?:[{_COMMA}][0-9]{{3}})+|[0-9]+)(\.[0-9]+)?|\.[0-9]+"
)
# No part can match in two ways, and no text is scanned from two starts: linear time.
_NUMBER = re.compile(
    rf"""
    (?:(?<![\w)\]%.])(?P<sign>[-+]))?
    (?<![A-Za-z0-9_^])
    (?P<number>(?:(?<![\w.])\.)?{_DIGITS})
    (?:[eE](?P<e>[-+]?[0-9]{{1,3}})(?!\w))?
    (?:[ ]?(?:×|x|\*|\\times|\\cdot)[ ]?10\^(?P<power>-?[0-9]{{1,3}})(?![0-9]))?
    (?:(?:[ ](?P<part>[0-9]{{1,9}}))?[ ]?/[ ]?(?P<under>{_DIGITS}))?
    (?P<percent>[ ]?%|[ ]per[ ]?cent\b)?
    """,
    re.VERBOSE,
)
_HASH = re.compile(r"(?<!#)####(?!#)[ \t:]*\n?([^\n#]*)")
_TAGS = re.compile(r"<<[^<>]*>>|</?[A-Za-z][^<>]*>")  # of GSM8K's calculator; <answer>
_FRACTION = re.compile(
    rf"([0-9])?\\[dtc]?frac ?(?:\{{ ?(-?{_DIGITS}) ?\}}|([0-9])) ?"
    rf"(?:\{{ ?({_DIGITS}) ?\}}|([0-9]))"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname) ?\{([^{}]*)\}")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\^(?:[0-9]|\{[0-9]\})")
_SIGNED_CURRENCY = re.compile(r"([-+]) ?[$€£¥₹] ?")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("$€£¥₹°\t\r", " "),
        **{chr(0xFF10 + i): str(i) for i in range(10)},
        "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4",
        "−": "-", "‐": "-", "‑": "-", "⁄": "/", "÷": "/", "²": "^2", "³": "^3",
    }
)  # fmt: skip
_LATEX = (
    (r"\$", "$"), (r"\%", "%"), (r"\!", ""), ("{,}", ","), (r"\,", "\u2009"), (r"\ ", " "),
    (r"\;", " "), (r"\:", " "), (r"\(", " "), (r"\)", " "), (r"\[", " "), (r"\]", " "),
    (r"\approx", " "), (r"^\circ", " "), (r"^{\circ}", " "), (r"\left", ""),
    (r"\right", ""), ("**", ""),
)  # fmt: skip
# What may not stand beside the number of a mark: it would be an expression.
_OPERATORS = re.compile(r"[\\^+*×±√π<>]|\bpi\b|\bsqrt\b|- ?\Z|/ ?\Z|\A ?/ ?[^A-Za-z ]")


class Number(NamedTuple):
    """A number as it was read."""

    value: Fraction  # 50% is 1/2
    percent: bool


def reward(
    texts: list[list[str]], rows: Sequence[Mapping[str, Any]], *,
    column: str = "answer", accept: tuple[str, ...] = KINDS, correct: float = 1.0,
    format: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Rewards responses whose final answer equals the row's.

    Args:
      texts: B groups of G responses.
      rows: B rows; each has the reference in its column, as a number or as text, which may
        be a whole solution with a mark.
      column: the name of it.
      accept: forms of an answer that count, some of KINDS. The first of KINDS that a
        response has decides: where digits follow "####", its last number is not looked at.
      correct: what the right answer is worth.
      format: what an answer in a marked form ('hash' or 'boxed') is worth in addition,
        right or wrong, if it can be read: as a number where the reference is one.

    Returns:
      [B, G] rewards.

    Raises:
      ValueError: an unknown form or none, a row without the column or with nothing in it.
    """
    if not accept or set(accept) - set(KINDS):
        raise ValueError(
            f"accept is {tuple(accept)}, expected some of {', '.join(KINDS)}"
        )
    out = np.zeros((len(texts), len(texts[0]) if texts else 0), np.float32)
    for b, (group, row) in enumerate(zip(texts, rows, strict=True)):
        wanted = reference(row, column, b)
        number = read(wanted)
        for g, text in enumerate(group):
            form, found = marked(text, accept, number is not None)
            if number is None:
                right, readable = plain(found) == plain(wanted), bool(plain(found))
            else:
                mine = last(text) if form == "last" else read(found)
                right = mine is not None and equal(mine, number)
                readable = mine is not None
            formatted = readable and form in ("hash", "boxed")
            out[b, g] = correct * right + format * formatted
    return out


def reference(row: Mapping[str, Any], column: str, index: int) -> str:
    """The reference answer of a row as text, without the solution around it.

    Args:
      row: its columns.
      column: which of them.
      index: of the row, for the message.

    Raises:
      ValueError: no such column, or nothing in it.
    """
    if column not in row:
        raise ValueError(
            f"rewards.final_answer: row {index} has no column {column!r}; it has "
            f"{sorted(row)}: set reward.column to the one that holds the answer"
        )
    text = "" if row[column] is None else str(row[column])
    form, found = marked(text, ("hash", "boxed"), False)
    wanted = found if form else text
    if not plain(wanted).strip("#"):
        raise ValueError(
            f"rewards.final_answer: the column {column!r} of row {index} is empty"
        )
    return wanted


def answer(
    text: str, accept: Sequence[str] = KINDS, *, numeric: bool = True
) -> str | None:
    """The final answer of a response as text, the same for equal answers; None without one.

    Args:
      text: the response.
      accept: forms of an answer that count, some of KINDS.
      numeric: the answer is a number, written as '5' or '1/2'; else text, as in `plain`.
    """
    form, found = marked(text, accept, numeric)
    if not numeric:
        return plain(found) or None
    number = last(text) if form == "last" else read(found)
    return None if number is None else str(number.value)


def marked(text: str, accept: Sequence[str], numeric: bool) -> tuple[str, str]:
    """The first form of KINDS that a response has, and the text of the answer.

    Args:
      text: the response.
      accept: forms that count.
      numeric: marks without a digit do not count, as in a heading "#### Solution".

    Returns:
      ('hash' or 'boxed', the marked text), ('last', '') or, if there is none, ('', '').
    """
    for form, find in (("hash", _hashed), ("boxed", _boxed)):
        found = find(text) if form in accept else ""
        if _has_digit(found.translate(_CHARACTERS)) if numeric else found.strip():
            return form, found
    return ("last", "") if numeric and "last" in accept else ("", "")


def read(text: str) -> Number | None:
    """The number in the text of a mark, if it holds one number and no expression.

    Behind the last '=' only. Words, units and currencies beside it do not count; the same
    number twice, with words between, counts once.
    """
    if len(text) > 10 * LIMIT:
        return None
    text = _normalised(text).rpartition("=")[2]
    text = text.strip(" \n*_`~").rstrip(" \n.*_`~")
    if text.startswith("- "):
        text = "-" + text[2:]
    found, rest, end = [], [], 0
    for match in _NUMBER.finditer(text):
        found.append(_value(match))
        rest.append(text[end : match.start()])
        end = match.end()
    rest.append(text[end:])
    if not found or any(_OPERATORS.search(part) or _has_digit(part) for part in rest):
        return None  # such as 2^5 and x5
    if not all(any(c.isalpha() for c in part) for part in rest[1:-1]):
        return None  # such as 2(2)
    return found[0] if len(set(found)) == 1 else None


def last(text: str) -> Number | None:
    """The last number of a text; None if there is none, or it is not well-formed."""
    match = _final(_NUMBER, _normalised(text))
    return None if match is None else _value(match)


def equal(mine: Number, reference: Number) -> bool:
    """Whether two numbers are equal; 50% equals 50 and 1/2 where the other has no %."""
    if mine.percent == reference.percent:
        return mine.value == reference.value
    other, percent = (reference, mine) if mine.percent else (mine, reference)
    return other.value in (percent.value, 100 * percent.value)


def plain(text: str) -> str:
    """An answer that is no number, as it is compared: without blanks, case and \\text{}."""
    text = _TEXT.sub(r"\1", text.replace(r"\dfrac", r"\frac").replace("$", ""))
    return "".join(text.split()).strip(".*_`").casefold()


def _final(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match."""
    matches = collections.deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


def _has_digit(text: str) -> bool:
    return any(c in "0123456789" for c in text)


def _hashed(text: str) -> str:
    """What follows the last '####' in its line, or in the next if its own is empty."""
    match = _final(_HASH, text)
    return match[1] if match else ""


def _boxed(text: str) -> str:
    """What is in the last \\boxed{...}; '' if it is not closed."""
    start = text.rfind(r"\boxed{") + len(r"\boxed{")
    depth = 1 if start >= len(r"\boxed{") else 0
    for place in range(start, len(text) if depth else 0):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[start:place]
    return ""


def _normalised(text: str) -> str:
    """LaTeX, currencies and Unicode as plain digits, signs and slashes."""
    text = _TAGS.sub(" ", text)
    for before, after in _LATEX:
        text = text.replace(before, after)
    text = _SIGNED_CURRENCY.sub(r"\1", _TEXT.sub(r" \1 ", text)).translate(_CHARACTERS)
    text = _UNIT_POWER.sub("", _FRACTION.sub(_as_fraction, text))
    text = text.replace("^{", "^").replace("_{", "_").replace("{", " ")
    return re.sub(" +", " ", text.replace("}", " "))


def _as_fraction(match: re.Match[str]) -> str:
    """\\frac{1}{2} as 1/2, and 3\\frac{1}{2} as 3 1/2."""
    before = f"{match[1]} " if match[1] else ""
    return f"{before}{match[2] or match[3]}/{match[4] or match[5]}"


def _value(match: re.Match[str]) -> Number | None:
    """The number of a match of _NUMBER; None if it is not well-formed."""
    value = _decimal(match["number"])
    if value is None:
        return None
    for exponent in (match["e"], match["power"]):
        if exponent:
            value *= Fraction(10) ** int(exponent)
    if match["under"]:
        under = _decimal(match["under"])
        if not under:
            return None
        if match["part"]:
            value += int(match["part"]) / under
        else:
            value /= under
    if match["sign"] == "-":
        value = -value
    percent = bool(match["percent"])
    return Number(value / 100 if percent else value, percent)


def _decimal(text: str) -> Fraction | None:
    """A number of digits, with thousands separators or without, and a decimal point."""
    if len(text) > LIMIT or not _GROUPS.fullmatch(text):
        return None
    return Fraction("".join(c for c in text if c in "0123456789."))
