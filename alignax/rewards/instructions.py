"""Instructions of the row that a program verifies, as in IFEval.

  r(x, y) = share of the row's instructions that y follows, or 1 if it follows all of them

A row names its instructions in a column as a JSON list such as ["punctuation:no_comma"], and
in another their arguments as a list of objects. Loose: a response also follows an instruction
if it does so without its first line, its last line, both, or its asterisks.

Source: Zhou et al. 2023, https://arxiv.org/abs/2311.07911
Differs from the paper: sentences end in . ! or ? before a blank, and words are runs between
blanks; the language of a response is not told (unknown = 'skip' leaves it out).
"""

import collections
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RULES = ("share", "all")
UNKNOWNS = ("refuse", "skip")

Check = Callable[..., bool]


def reward(
    texts: list[list[str]], rows: Sequence[Mapping[str, Any]], *,
    ids: str = "instruction_id_list", kwargs: str = "kwargs", loose: bool = False,
    rule: str = "share", unknown: str = "refuse",
) -> np.ndarray:  # fmt: skip
    """Rewards responses that follow the instructions of their row.

    Args:
      texts: B groups of G responses; a blank one follows no instruction.
      rows: B rows.
      ids: name of the column with the list of instructions.
      kwargs: name of the column with the list of their arguments; keys that are null or
        of no use to an instruction are not read.
      loose: whether a response without its first line, last line or asterisks may do.
      rule: one of RULES.
      unknown: what is done with an instruction that is none of CHECKS: one of UNKNOWNS.

    Returns:
      [B, G] rewards in [0, 1]; where every instruction is skipped, 1.

    Raises:
      ValueError: a row without the columns, with lists of different lengths, an unknown
        instruction, or arguments that are missing or of the wrong type.
    """
    if rule not in RULES or unknown not in UNKNOWNS:
        raise ValueError(
            f"rule is {rule!r}, one of {', '.join(RULES)}; unknown is {unknown!r}, one of "
            f"{', '.join(UNKNOWNS)}"
        )
    out = np.zeros((len(texts), len(texts[0]) if texts else 0), np.float32)
    for b, (group, row) in enumerate(zip(texts, rows, strict=True)):
        asked = instructions(row, b, ids, kwargs, unknown)
        for g, text in enumerate(group):
            met = [follows(text, name, given, loose=loose) for name, given in asked]
            out[b, g] = np.mean(met) if rule == "share" and met else all(met)
    return out


def instructions(
    row: Mapping[str, Any], index: int, ids: str, kwargs: str, unknown: str
) -> list[tuple[str, dict[str, Any]]]:
    """The (instruction, its arguments) of a row; arguments as for `reward`."""
    where = f"rewards.instructions: row {index}"
    names, given = (_listed(row, key, where) for key in (ids, kwargs))
    if len(names) != len(given):
        raise ValueError(
            f"{where} has {len(names)} instructions in {ids!r} and {len(given)} sets of "
            f"arguments in {kwargs!r}"
        )
    found = []
    for name, values in zip(names, given, strict=True):
        if name not in CHECKS:
            if unknown == "skip":
                continue
            raise ValueError(
                f"{where} has the instruction {name!r}, which is none of "
                f"{', '.join(CHECKS)}; set reward.unknown='skip' to leave it out"
            )
        found.append((name, _arguments(name, values, where)))
    return found


def follows(
    text: str, name: str, given: Mapping[str, Any], *, loose: bool = False
) -> bool:
    """Whether a response follows an instruction.

    Args:
      text: the response.
      name: one of CHECKS.
      given: its arguments, those that the check takes.
      loose: as for `reward`.
    """
    check, _ = CHECKS[name]
    forms = relaxed(text) if loose else [text]
    return any(bool(form.strip()) and check(form, **given) for form in forms)


def relaxed(text: str) -> list[str]:
    """A response with and without its first line, its last line, and its asterisks."""
    lines = text.split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    forms = ["\n".join(part).strip() for part in parts]
    return [text, *forms, *(form.replace("*", "") for form in forms)]


def _listed(row: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list that a column holds as JSON."""
    if key not in row:
        raise ValueError(f"{where} has no column {key!r}; it has {sorted(row)}")
    try:
        value = json.loads(row[key]) if isinstance(row[key], str) else row[key]
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{where} has {row[key]!r:.60} in {key!r}, expected a list")
    return value


def _arguments(name: str, values: Any, where: str) -> dict[str, Any]:
    """What the check takes of the arguments of a row."""
    _, takes = CHECKS[name]
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: arguments of {name} are {values!r}, not an object")
    found = {}
    for key, kind in takes.items():
        value = values.get(key)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, list):
            right = right and all(isinstance(x, str) for x in value)
        if not right:
            raise ValueError(
                f"{where}: {name} needs {key!r} as {kind.__name__}, and has {value!r}"
            )
        if key.endswith("relation") and value not in ("at least", "less than"):
            raise ValueError(
                f"{where}: {key} is {value!r}, expected 'at least' or 'less than'"
            )
        found[key] = value
    return found


# -- the checks: of a response that is not blank, with the arguments that IFEval gives them


def words(text: str, word: str) -> int:
    """How often a word or a phrase occurs, in any case, not within a longer word."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def related(count: int, relation: str, wanted: int) -> bool:
    """Whether a count is 'at least' or 'less than' the wanted one."""
    return count >= wanted if relation == "at least" else count < wanted


def sentences(text: str) -> int:
    """How many sentences there are; text behind the last full stop is one too."""
    parts = re.split(r"[.!?][\"')\]]*(?=\s|\Z)", text)
    return sum(any(c.isalnum() for c in part) for part in parts)


def paragraphs(text: str, separator: str) -> list[str]:
    """The parts between separators, stripped; blank ones in front and behind are none."""
    parts = [part.strip() for part in text.split(separator)]
    return parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]


def _highlights(text: str, num_highlights: int) -> bool:
    plain = text.replace("**", "\0")
    bold = sum(bool(part.strip()) for part in plain.split("\0")[1:-1:2])
    light = re.findall(r"\*([^*\n\0]+)\*", plain)
    return bold + sum(bool(part.strip()) for part in light) >= num_highlights


def _nth_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    parts = paragraphs(re.sub(r"\n(?:[ \t]*\n)+", "\n\n", text), "\n\n")
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    begun = parts[nth_paragraph - 1].split()
    return bool(begun) and begun[0].strip("\"'.,:;!?()").lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = "".join(postscript_marker.lower().split())
    lines = ("".join(line.lower().split()) for line in text.split("\n"))
    return any(line.startswith(marker) for line in lines)


def _json(text: str) -> bool:
    fenced = re.fullmatch(
        r"```(?:json)?(.*)```", text.strip(), re.DOTALL | re.IGNORECASE
    )
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = paragraphs(text, "******")
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[^\W\d_]+", text))
    return related(count, capital_relation, capital_frequency)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    count = collections.Counter(text.lower())[letter.lower()]
    return related(count, let_relation, let_frequency)


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    found = re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)
    return len(found) >= num_sections


# instruction -> (check, {argument: type}); the names are the data's
CHECKS: dict[str, tuple[Check, dict[str, type]]] = {
    "keywords:existence": (
        lambda text, keywords: all(words(text, w) for w in keywords), {"keywords": list},
    ),
    "keywords:forbidden_words": (
        lambda text, forbidden_words: not any(words(text, w) for w in forbidden_words),
        {"forbidden_words": list},
    ),
    "keywords:frequency": (
        lambda text, keyword, frequency, relation: related(
            words(text, keyword), relation, frequency
        ),
        {"keyword": str, "frequency": int, "relation": str},
    ),
    "keywords:letter_frequency": (
        _letters, {"letter": str, "let_frequency": int, "let_relation": str},
    ),
    "length_constraints:number_words": (
        lambda text, num_words, relation: related(len(text.split()), relation, num_words),
        {"num_words": int, "relation": str},
    ),
    "length_constraints:number_sentences": (
        lambda text, num_sentences, relation: related(
            sentences(text), relation, num_sentences
        ),
        {"num_sentences": int, "relation": str},
    ),
    "length_constraints:number_paragraphs": (
        lambda text, num_paragraphs: (
            all(paragraphs(text, "***")) and len(paragraphs(text, "***")) == num_paragraphs
        ),
        {"num_paragraphs": int},
    ),
    "length_constraints:nth_paragraph_first_word": (
        _nth_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
    ),
    "detectable_content:number_placeholders": (
        lambda text, num_placeholders: (
            len(re.findall(r"\[[^\[\]]*\]", text)) >= num_placeholders
        ),
        {"num_placeholders": int},
    ),
    "detectable_content:postscript": (_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": (
        lambda text, num_bullets: (
            len(re.findall(r"^[ \t]*(?:\*(?!\*)|-)[ \t]*[^\s*-]", text, re.MULTILINE))
            == num_bullets
        ),
        {"num_bullets": int},
    ),
    "detectable_format:number_highlighted_sections": (
        _highlights, {"num_highlights": int},
    ),
    "detectable_format:multiple_sections": (
        _sections, {"section_spliter": str, "num_sections": int},
    ),
    "detectable_format:title": (
        lambda text: any(part.strip() for part in re.findall(r"<<([^\n<>]*)>>", text)), {},
    ),
    "detectable_format:json_format": (_json, {}),
    "combination:two_responses": (_two_responses, {}),
    "combination:repeat_prompt": (
        lambda text, prompt_to_repeat: (
            text.strip().lower().startswith(prompt_to_repeat.strip().lower())
        ),
        {"prompt_to_repeat": str},
    ),
    "startend:end_checker": (_ends, {"end_phrase": str}),
    "startend:quotation": (
        lambda text: (
            len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'
        ),
        {},
    ),
    "change_case:english_capital": (lambda text: text.isupper(), {}),
    "change_case:english_lowercase": (lambda text: text.islower(), {}),
    "change_case:capital_word_frequency": (
        _capital_words, {"capital_frequency": int, "capital_relation": str},
    ),
    "punctuation:no_comma": (lambda text: "," not in text, {}),
}  # fmt: skip
