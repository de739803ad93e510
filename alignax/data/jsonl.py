"""Data sets of the user's own: JSON lines (.jsonl, .jsonl.gz) and Parquet.

A row is one object; its keys decide what it is:

  prompt, chosen, rejected        a preference pair; each a string or a list of messages
  chosen, rejected (messages)     a pair whose common first turns are the prompt
  prompt, response | completion   one response (with `label`, a number, as its feedback)
  messages                        a dialogue: every assistant turn is scored
  prompt, responses, scores       a group of responses, each with a number as feedback
  prompt                          a prompt alone, to generate from

A row's own `id`, a string, is kept; no two rows may have the same one. A message is
{"role": ..., "content": text}. A row that is none of these, or a pair of identical
responses, is malformed: it is reported with its file and line, and left out.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

from alignax.batch import Example, Message
from alignax.data import Examples, as_kind, existing, held_out, read_json_lines

Turns = str | list[Message]


def examples(
    *,
    split: str,
    path: str,
    kind: str | None = None,
    test_fraction: float = 0.0,
    strict: bool = False,
) -> Examples:
    """Reads a file of examples.

    Args:
      split: 'train', 'test' or 'all' of the file; or, where `path` holds '{split}',
        the text that replaces it.
      path: a .jsonl, .jsonl.gz or .parquet file.
      kind: None takes rows as they are; 'sft' takes the chosen side of pairs, 'prompts'
        the prompts alone; to 'groups' a row without two scored responses is malformed.
      test_fraction: share of prompts held out as 'test', by a hash of the prompt: rows
        with the same prompt are in the same split, in every file and every order.
      strict: raises at the first malformed row instead of counting it.

    Returns:
      The usable rows in order, with `report['malformed']` naming the others.

    Raises:
      FileNotFoundError: no such file; names the files beside it.
      ValueError: an unknown file type, a damaged file, no usable row at all, a split
        that this file does not have, two rows with one id, or (strict) a malformed row.
    """
    if "{split}" in str(path):
        path, part = str(path).replace("{split}", split), "all"
    else:
        part = split
    if part not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}, expected 'train', 'test' or 'all'")
    if part == "test" and not test_fraction:
        raise ValueError(
            f"{path} has no held-out part: set test_fraction, or put '{{split}}' in the path"
        )
    rows: list[Example] = []
    malformed: list[str] = []
    places: dict[str, str] = {}  # id -> file and line
    total = 0
    for name, value in _rows(existing(path)):
        total += 1
        try:
            if isinstance(value, ValueError):
                raise value
            example = parse(name, value)
            if isinstance(value.get("id"), str):
                example = example._replace(id=value["id"])
            if kind is not None:
                example = as_kind(example, kind)
        except ValueError as e:
            if strict:
                raise ValueError(f"{name}: {e}") from e
            malformed.append(f"{name}: {e}")
            continue
        if (other := places.setdefault(example.id, name)) != name:
            raise ValueError(f"{name} has the id of {other}, {example.id!r}")
        if part == "all" or held_out(_key(example), test_fraction) == (part == "test"):
            rows.append(example)
    if not rows:
        why = f"; first malformed row {malformed[0]}" if malformed else ""
        raise ValueError(
            f"{path} has no usable row for split {split!r} among {total} rows{why}"
        )
    return Examples(rows, report={"malformed": malformed} if malformed else {})


def parse(name: str, row: Any) -> Example:
    """One row as an Example.

    Args:
      name: the id it gets, e.g. 'train.jsonl:17'.
      row: what the file holds.

    Raises:
      ValueError: says what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {type(row).__name__}")
    if row.get("messages") is not None:
        turns = _turns(row, "messages")
        if isinstance(turns, str):
            raise ValueError("'messages' is a string, expected a list of messages")
        at = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
        if not at:
            raise ValueError("'messages' has no assistant turn")
        if at[0] == 0:
            raise ValueError(
                "'messages' starts with an assistant turn, so it has no prompt"
            )
        return Example(name, turns[: at[0]], [turns[at[0] : at[-1] + 1]])
    if "chosen" in row or "rejected" in row:
        return _pair(name, row)
    prompt = _turns(row, "prompt")
    if "responses" in row:
        return _group(name, prompt, row)
    for key in ("response", "completion"):
        if key in row:
            label = row.get("label")
            number = isinstance(label, int | float) and math.isfinite(label)
            if label is not None and not number:
                raise ValueError(
                    f"'label' is {label!r}, expected a finite number or a boolean"
                )
            feedback = () if label is None else (float(label),)
            return Example(name, prompt, [_answer(row, key, prompt)], feedback)
    return Example(name, prompt, [])


def _group(name: str, prompt: Turns, row: dict[str, Any]) -> Example:
    responses, scores = row["responses"], row.get("scores")
    if not isinstance(responses, list) or not responses:
        raise ValueError("'responses' is empty, or no list")
    answers = [_answer({"response": r}, "response", prompt) for r in responses]
    if scores is None:
        return Example(name, prompt, answers)
    numbers = isinstance(scores, list) and all(
        type(x) in (int, float) and math.isfinite(x) for x in scores
    )
    if not numbers or len(scores) != len(answers):
        raise ValueError(f"'scores' is {scores!r:.40}, expected {len(answers)} numbers")
    return Example(name, prompt, answers, tuple(map(float, scores)))


def _pair(name: str, row: dict[str, Any]) -> Example:
    if row.get("prompt") is None:
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise ValueError(
                "'prompt' is missing (dialogues in one string, '\\n\\nHuman: ...', are "
                "what data.hh_rlhf reads)"
            )
        both = zip(chosen, rejected, strict=False)
        n = next((i for i, (a, b) in enumerate(both) if a != b), None)
        if n is None:
            raise ValueError(
                "chosen and rejected are identical, or one begins the other"
            )
        prompt: Turns = chosen[:n]
        if not prompt:
            raise ValueError(
                "'prompt' is missing and chosen and rejected share no turn"
            )
        row = {"chosen": chosen[n:], "rejected": rejected[n:]}
    else:
        prompt = _turns(row, "prompt")
    sides = [_answer(row, "chosen", prompt), _answer(row, "rejected", prompt)]
    if _text(sides[0]) == _text(sides[1]):
        raise ValueError("chosen and rejected are identical")
    return Example(name, prompt, sides, (1.0, 0.0))


def _answer(row: dict[str, Any], key: str, prompt: Turns) -> Turns:
    """A response, without the prompt where the file repeats it in front."""
    turns = _turns(row, key)
    if isinstance(turns, str):
        return turns
    before = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    )
    if turns[: len(before)] == before:
        turns = turns[len(before) :]
    if not any(m["role"] == "assistant" for m in turns):
        raise ValueError(f"'{key}' has no assistant turn")
    return turns


def _turns(row: dict[str, Any], key: str) -> Turns:
    value = row.get(key)
    if value is None:
        raise ValueError(f"'{key}' is missing; the row has {sorted(map(str, row))}")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"'{key}' is empty")
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"'{key}' is {value!r:.40}, expected text or a list of messages"
        )
    for m in value:
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            raise ValueError(f"'{key}' holds {m!r:.40}, expected role and content")
        if not isinstance(m.get("content"), str):
            raise ValueError(
                f"'{key}' has a {m['role']} turn whose content is not text"
            )
        if m["role"] == "assistant" and not m["content"].strip():
            raise ValueError(f"'{key}' has an empty assistant turn")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _text(turns: Turns) -> str:
    """The text by which responses are compared: a string is one assistant turn."""
    if isinstance(turns, str):
        return f"assistant: {turns}".strip()
    return "\n".join(f"{m['role']}: {m['content']}" for m in turns).strip()


def _key(example: Example) -> str:
    prompt = example.prompt
    return prompt if isinstance(prompt, str) else _text(list(prompt))


def _rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, value in read_json_lines(path):
            yield f"{path.name}:{number}", value
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            number = 0
            for chunk in file.iter_batches():
                for row in chunk.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} holds text that is not UTF-8: {e}") from e
        except (pyarrow.ArrowException, OSError) as e:
            raise ValueError(f"{path} is damaged or not Parquet: {e}") from e
    else:
        raise ValueError(f"{path.name} is none of .jsonl, .jsonl.gz, .parquet")
