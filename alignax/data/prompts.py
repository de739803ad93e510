"""Prompts to respond to: a text file with one per line, or rows that `data.jsonl` reads.

Every line becomes a prompt or is an error, so that no prompt is skipped silently.

Source: the user's own files; rows are as in https://jsonlines.org
"""

from alignax.batch import Example
from alignax.data import Examples, jsonl
from alignax.records.files import existing


def examples(*, split: str = "all", path: str, size: int = 0) -> Examples:
    """Reads prompts, in order.

    Args:
      split: only 'all'.
      path: a .txt file, or another that `data.jsonl` reads, whose rows have a 'prompt'
        (text or messages); other keys are columns of the example.
      size: prompts to take, from the start; 0 takes all.

    Raises:
      FileNotFoundError: no such file; names the files beside it.
      ValueError: an empty line, a row without a prompt, no prompt at all; says where.
    """
    if split != "all":
        raise ValueError(f"split is {split!r}, expected 'all': prompts are not split")
    if size < 0:
        raise ValueError(f"size is {size}, expected at least 0")
    if not str(path):
        raise ValueError("path is empty, expected a file of prompts")
    if not str(path).endswith(".txt"):
        rows = jsonl.examples(split="all", path=path, kind="prompts", strict=True)
        return rows[:size] if size else rows
    file = existing(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} holds text that is not UTF-8: {error}") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    found = []
    for number, line in enumerate(lines[: size or None], 1):
        if not line.strip():
            raise ValueError(f"{file.name}:{number}: the prompt is empty")
        found.append(Example(f"{file.name}:{number}", line.removesuffix("\r"), []))
    if not found:
        raise ValueError(f"{file} has no prompt")
    return Examples(found, files=(str(file),))
