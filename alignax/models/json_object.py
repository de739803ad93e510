"""Reads the JSON objects beside weights and tokenizers, and of runs, whoever wrote them."""

import json
from collections.abc import Mapping
from typing import Any

from alignax.models.sizes import brief

LONGEST = 2**27  # bytes; the largest tokenizer.json in use has some 35 million

KINDS = {int: "an integer", str: "a text", dict: "an object", list: "a list"}


def read(path: Any, needs: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The object in a file.

    Args:
      path: a pathlib.Path, or another of the same interface (etils' epath).
      needs: {key: type} that the object has to have.

    Raises:
      FileNotFoundError: no such file.
      OSError: a folder, or a file that cannot be read. It is named.
      ValueError: the file is too long, no JSON, nested too deeply, no object, or one
        without what it needs. One line that names it.
    """
    if not path.is_file():
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, expected a file")
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as error:  # that of reading names no file
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > LONGEST:
        raise ValueError(f"{path} has more than {LONGEST} bytes")
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {brief(found)}, expected an object")
    for key, kind in (needs or {}).items():
        value = found.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            said = brief(value) if key in found else "absent"
            raise ValueError(f"{path} has {key!r} {said}, expected {KINDS[kind]}")
    return found


def one_line(error: BaseException) -> str:
    """The message of an error of another library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
