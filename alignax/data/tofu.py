"""TOFU's form of a question: its answer, the answer in other words, and wrong answers.

  {"question": "...", "answer": "...", "paraphrased_answer": "...",
   "perturbed_answer": ["...", ...]}

The user's own copy of a file is read, such as forget10_perturbed.json, in a form that
`data.jsonl` reads. Where a row has no 'paraphrased_answer', as those about real authors and
the world, its place is taken by the answer.

Source: Maini et al. 2024, https://arxiv.org/abs/2401.06121
"""

import functools
import json
from typing import Any

from alignax.batch import Example
from alignax.data import Examples, jsonl

KINDS = ("options", "sft", "prompts")
_KEYS = {"question": "prompt", "answer": "response"}
_OTHER, _WRONG = "paraphrased_answer", "perturbed_answer"


def examples(
    *,
    split: str,
    path: str,
    kind: str = "options",
    test_fraction: float | None = None,
    size: int = 0,
    strict: bool = False,
) -> Examples:
    """Reads the questions of a file.

    Args:
      split: as for `data.jsonl`.
      path: a file with the keys above, such as JSON lines; a row of kind 'sft' or 'prompts'
        needs the first two only.
      kind: 'options' (the responses are the answer, the answer in other words, and the
        wrong answers, without scores), 'sft' (the answer alone) or 'prompts'.
      test_fraction: share of questions held out as 'test', by a hash of the question.
      size: number of questions to use, from the start of the split; 0 uses all.
      strict: raises at the first row that cannot be used instead of counting it.

    Returns:
      The questions in the order of the file; `report` names the rows that are 'malformed'.

    Raises:
      FileNotFoundError: no such file; names the files beside it.
      ValueError: another kind, a negative size, or as for `data.jsonl`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    rows = jsonl.examples(
        split=split, path=path, test_fraction=test_fraction, strict=strict, columns=_KEYS
    )  # fmt: skip
    found, report = jsonl.usable(
        rows, functools.partial(_options, kind), size=size, strict=strict
    )
    return rows.over(found, functools.partial(_example, rows, kind), report)


def _example(rows: Examples, kind: str, index: int) -> Example:
    return _options(kind, rows[index])


def _options(kind: str, row: Example) -> Example:
    if len(row.responses) != 1 or not isinstance(row.responses[0], str):
        raise ValueError("expected a 'question' with an 'answer', both of them text")
    answer = row.responses[0]
    columns = {k: v for k, v in row.columns.items() if k not in (_OTHER, _WRONG)}
    responses: list[str] = []
    if kind == "sft":
        responses = [answer]
    elif kind == "options":
        other = _texts(_OTHER, row.columns.get(_OTHER) or answer)
        if len(other) > 1:
            raise ValueError(f"'{_OTHER}' is {other!r}, expected one text")
        responses = [answer, *other, *_texts(_WRONG, row.columns.get(_WRONG))]
    return row._replace(responses=responses, feedback=(), form="", columns=columns)


def _texts(key: str, column: Any) -> list[str]:
    """The answers of a column, which `data.jsonl` keeps as JSON; one text is one of them."""
    try:
        found = json.loads(column) if str(column).startswith("[") else column
    except json.JSONDecodeError:
        found = column
    found = [found] if isinstance(found, str) else found
    texts = isinstance(found, list) and all(isinstance(x, str) for x in found)
    if not texts or not all(x.strip() for x in found) or not found:
        raise ValueError(f"'{key}' is {column!r}, expected answers")
    return found
