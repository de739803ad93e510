"""Files as lines of JSON: JSON lines, one JSON array, and Parquet, compressed or not.

Every reader yields one row after another as the bytes of its JSON, in UTF-8, so that one row
that cannot be read is an error of this row alone: see `values.decode`.

Source: the user's own files; https://jsonlines.org, https://parquet.apache.org
"""

import codecs
import datetime
import decimal
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from alignax.records import values

TYPES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
HEAD = 1 << 16  # bytes by which the kind of a file is told
CHUNK = 1 << 20  # characters of an array that are read at a time
LONGEST = 1 << 28  # characters of an element
ROWS = 1024  # of Parquet that are converted at a time
BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
UNMARKED = (  # of text that begins with an ASCII character: which of its bytes are zero
    ((1, 1, 1, 0), "utf-32-be"),
    ((0, 1, 1, 1), "utf-32-le"),
    ((1, 0), "utf-16-be"),
    ((0, 1), "utf-16-le"),
)


def cache() -> pathlib.Path:
    """$ALIGNAX_CACHE, or alignax in the user's cache folder.

    Raises:
      FileNotFoundError: the user has no home folder, as in some containers.
    """
    if own := os.environ.get("ALIGNAX_CACHE"):
        return pathlib.Path(own)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:
        raise FileNotFoundError(
            "this user has no home folder: set ALIGNAX_CACHE to a folder for what is kept"
        ) from None
    return pathlib.Path(home, "alignax")


def existing(path: str | pathlib.Path) -> pathlib.Path:
    """`path`, if it is a file.

    Raises:
      FileNotFoundError: names the path and the files beside it.
    """
    try:
        path = pathlib.Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"no data file {path}: there is no home folder for its ~"
        ) from None
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob("*") if p.is_file())
    found = (
        f"files beside it: {beside[:20]}" if path.parent.is_dir() else "no such folder"
    )
    raise FileNotFoundError(f"no data file {path}; {found}")


def in_place(path: pathlib.Path) -> bool:
    """Whether the rows are lines of UTF-8, so that they can be read where they stand."""
    return path.suffix == ".jsonl" and _encoding(path) == "utf-8" and not _array(path)


def lines(path: pathlib.Path) -> Iterator[tuple[int, int, bytes | ValueError]]:
    """The rows of a file in order.

    Args:
      path: of one of TYPES.

    Yields:
      (number, offset, row): the line of the row, or its place in an array or in Parquet,
      from 1; the bytes before it, which mean something where the file is `in_place`; its
      JSON, or the error that says why there is none. Blank lines are no rows.

    Raises:
      ValueError: a file of another type, or a damaged one.
    """
    if not path.name.endswith(TYPES):
        raise ValueError(f"{path.name} is none of {', '.join(TYPES)}")
    if path.suffix == ".parquet":
        found = _parquet(path)
    elif _array(path):
        found = _elements(path)
    else:
        found = _lines(path)
    try:
        yield from found
    except (EOFError, OSError, zlib.error) as e:
        kind = "gzip" if path.suffix == ".gz" else "a file that can be read"
        raise ValueError(f"{path} is damaged or not {kind}: {e}") from e


def read_json_lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields (number from 1, object or ValueError) of every row of a file: see `lines`."""
    for number, _, line in lines(path):
        yield number, values.read(line)


def _open(path: pathlib.Path) -> Any:
    """A stream of bytes, which gzip's has no type of."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _head(path: pathlib.Path) -> bytes:
    try:
        with _open(path) as f:
            return f.read(HEAD)
    except (EOFError, OSError, zlib.error) as e:
        raise ValueError(f"{path} is damaged or not gzip: {e}") from e


def _encoding(path: pathlib.Path) -> str:
    head = _head(path)[:4]
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    zero = tuple(int(not byte) for byte in head)
    for pattern, name in UNMARKED:
        if zero[: len(pattern)] == pattern:
            return name
    return "utf-8"


def _array(path: pathlib.Path) -> bool:
    """Whether the file is one array, and not a list in every line."""
    text = _head(path).decode(_encoding(path), "ignore").lstrip("\ufeff \t\r\n")
    if not text.startswith("["):
        return False
    first, _, others = text.partition("\n")
    if path.name.endswith((".json", ".json.gz")) or first.strip() == "[":
        return True
    return first.startswith("[{") and not others.lstrip().startswith("[")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, int, bytes | ValueError]]:
    encoding = _encoding(path)
    if encoding != "utf-8":
        yield from _other_lines(path, encoding)
        return
    with _open(path) as f:
        offset = 0
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _other_lines(
    path: pathlib.Path, encoding: str
) -> Iterator[tuple[int, int, bytes | ValueError]]:
    """Lines of UTF-16 or UTF-32, which are not ended by a byte."""
    number = 0
    with _open(path) as f:
        text = io.TextIOWrapper(f, encoding, "surrogatepass", newline="\n")
        try:
            for number, line in enumerate(text, 1):
                if line.strip("\ufeff \t\r\n"):
                    line = line.removeprefix("\ufeff")
                    yield number, 0, line.encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as e:
            why = f"not {encoding} from here on: {e.reason}"
            yield number + 1, 0, ValueError(why)


def _elements(path: pathlib.Path) -> Iterator[tuple[int, int, bytes | ValueError]]:
    """The elements of one JSON array; no more of it is held than an element and a chunk."""
    # where an element ends does not depend on its numbers, and those may be too long
    scan = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
    number, chunk, started = 0, CHUNK, False
    with _open(path) as f:
        stream = io.TextIOWrapper(f, _encoding(path), "surrogatepass")
        text, at = stream.read(chunk).removeprefix("\ufeff"), 0
        while True:
            while at < len(text) and (
                text[at].isspace() or (started and text[at] == ",")
            ):
                at += 1
            if not started and at < len(text):  # the bracket
                started, at = True, at + 1
                continue
            if text[at : at + 1] == "]":
                return
            failure: Exception | None = None
            try:
                value, end = scan(text, at)
                whole = end < len(text)
            except (json.JSONDecodeError, RecursionError, StopIteration) as e:
                whole, failure = False, e
            if whole:
                number += 1
                element = text[at:end].encode("utf-8", "surrogatepass")
                del value
                yield number, 0, element
                at = end
                continue
            more = stream.read(chunk) if len(text) - at < LONGEST else ""
            if not more:
                why = failure or "it has no closing bracket"
                raise ValueError(
                    f"{path} is damaged or no JSON array, behind row {number}: {why}"
                )
            text, at = text[at:] + more, 0
            chunk = max(CHUNK, len(text))  # a long element is not scanned too often


def _parquet(path: pathlib.Path) -> Iterator[tuple[int, int, bytes | ValueError]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for chunk in file.iter_batches(batch_size=ROWS):
            try:
                found: list[Any] = chunk.to_pylist()
            except UnicodeDecodeError:
                found = [_parquet_row(chunk, i) for i in range(len(chunk))]
            for row in found:
                number += 1
                if isinstance(row, ValueError):
                    yield number, 0, row
                    continue
                text = json.dumps(_without_nulls(row), default=_plain)
                yield number, 0, text.encode()
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} is damaged or not Parquet: {e}") from e


def _parquet_row(chunk: Any, index: int) -> Any:
    try:
        return chunk.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as e:
        return ValueError(f"not UTF-8: {e.reason} at byte {e.start}")


def _without_nulls(value: Any) -> Any:
    """Parquet gives all objects of a column the same keys, and null where there is none.

    The null content of a message that calls tools means something, and stays.
    """
    if isinstance(value, dict):
        return {
            k: _without_nulls(v)
            for k, v in value.items()
            if v is not None or k == "content"
        }
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """What Parquet holds and JSON does not, as a number or text."""
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)
