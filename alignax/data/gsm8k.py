"""GSM8K: word problems of grade school, with worked solutions and a number as the answer.

  {"question": "...", "answer": "He has 2+3=<<2+3=5>>5 apples.\\n#### 5"}

The user's own copy is read, in a form that `data.jsonl` reads. The question is the prompt.
The columns `answer` (the number behind "####", without thousands separators) and `solution`
(the whole text) go to rewards such as `rewards.final_answer`.

Source: Cobbe et al. 2021, https://arxiv.org/abs/2110.14168
"""

import functools
import re

from alignax.batch import Example
from alignax.data import Examples, jsonl

KINDS = ("prompts", "sft")
INSTRUCTION = "Think step by step. Write the answer on the last line as #### followed by the number."
_KEYS = {"question": "prompt", "answer": "response"}
_ANSWER = re.compile(r"####[ \t]*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*\Z")
_MARK = re.compile(r"<<[^<>]*>>")


def examples(
    *,
    split: str,
    path: str,
    kind: str = "prompts",
    test_fraction: float | None = None,
    instruction: str = INSTRUCTION,
    system: str = "",
    marks: bool = False,
    size: int = 0,
    strict: bool = False,
) -> Examples:
    """Reads the problems of a file.

    Args:
      split: 'train', 'test' or 'all' of the file; or, where `path` holds '{split}', the
        text that replaces it: GSM8K comes as train.jsonl and test.jsonl.
      path: a file with the keys 'question' and 'answer', such as JSON lines or Parquet.
      kind: 'prompts', or 'sft': the solution is the response.
      test_fraction: share of problems held out as 'test', by a hash of the question.
      instruction: text that follows the question, behind an empty line; '' for none.
      system: text of a system turn; '' for none.
      marks: keeps the calculator's marks such as <<2+3=5>> in responses.
      size: number of problems to use, from the start of the split; 0 uses all.
      strict: raises at the first row that cannot be used instead of counting it.

    Returns:
      The problems in the order of the file; `report` names the rows that are 'malformed',
      also for a solution that does not end in "#### " and a number.

    Raises:
      FileNotFoundError: no such file; names the files beside it.
      ValueError: another kind, a negative size, or as for `data.jsonl`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if not str(path):
        raise ValueError(
            "path is empty, expected a file of GSM8K, such as train.jsonl or "
            "'gsm8k/{split}.jsonl' (https://github.com/openai/grade-school-math has them)"
        )
    rows = jsonl.examples(
        split=split,
        path=path,
        test_fraction=test_fraction,
        strict=strict,
        columns=_KEYS,
    )
    found, report = jsonl.usable(rows, answer, size=size, strict=strict)
    text = f"\n\n{instruction}" if instruction else ""
    convert = functools.partial(_example, rows, kind, text, system, marks)
    return rows.over(found, convert, report)


def answer(example: Example) -> str:
    """The final number of a row as `data.jsonl` reads it, without thousands separators.

    Raises:
      ValueError: the solution does not end in "#### " and a number.
    """
    solution = example.responses[0] if len(example.responses) == 1 else None
    found = _ANSWER.search(solution) if isinstance(solution, str) else None
    if found is None:
        raise ValueError("'answer' does not end in #### and a number")
    return found[1].replace(",", "")


def _example(
    rows: Examples, kind: str, text: str, system: str, marks: bool, index: int
) -> Example:
    example = rows[index]
    solution = str(example.responses[0])
    columns = {**example.columns, "answer": answer(example), "solution": solution}
    prompt = f"{example.prompt}{text}"
    turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    response = solution if marks else _MARK.sub("", solution)
    return Example(
        example.id, turns if system else prompt, [response] if kind == "sft" else [],
        (), columns, template=example.template,
    )  # fmt: skip
