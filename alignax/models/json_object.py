"""Reads the JSON objects beside weights and tokenizers, and of runs, whoever wrote them."""

import json
from typing import Any

from alignax.models.sizes import brief

LONGEST = 2**27  # bytes; the largest tokenizer.json in use has some 35 million


def read(path: Any) -> dict[str, Any]:
    """The object in a file.

    Args:
      path: a pathlib.Path, or another of the same interface (etils' epath).

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is too long, no JSON, nested too deeply, or no object. One line
        that names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"{path} has more than {LONGEST} bytes")
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {brief(found)}, expected an object")
    return found


def one_line(error: BaseException) -> str:
    """The message of an error of another library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
