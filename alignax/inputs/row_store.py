"""Rows on the disk: what tokenising a data set gave, for the next start and without memory.

An entry is a folder with the rows (ArrayRecord), their sizes and a description. Its name is a
digest of what the rows depend on: the data section, the tokenizer, how rows are read, the
length, and the code. The description has digests of the files that the data were read from:
if one of them differs, the rows are made again. Data without files, and few rows, stay in
memory.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from alignax import batch, plugin
from alignax.batch import Example
from alignax.inputs import rows
from alignax.inputs.rows import Row, Rows, Sizes
from alignax.models import fallback
from alignax.records.files import cache
from alignax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OFF = "off"  # instead of a folder: nothing is kept
SMALL = 2000  # rows that are not worth a file
OPTIONS = "group_size:16,zstd:1"
AT_ONCE = 1024  # rows that are read together where all are read
CODE = (
    "alignax.text",
    "alignax.inputs",
    "alignax.records",
    "alignax.data",
)  # that makes the rows


def read(
    section: Mapping[str, Any], tokenizer: Tokenizer, *, length: int, folder: str = "",
    check: Callable[[dict[str, Any]], None] = lambda counts: None,
) -> Rows:  # fmt: skip
    """The usable rows of a data section, from the disk where they are there.

    Args:
      section: of a config, as plain dicts: 'name', the data set's own parameters and those
        of `plugin.READING`.
      tokenizer: from `tokenizer.load`; its `reading` says how rows are read and cut.
      length: tokens of a row, at least 2.
      folder: of the entries; '' is `default_folder()`, 'off' keeps none.
      check: raises ValueError for counts (`rows.no_counts`) of data that are refused.

    Raises:
      ValueError: no usable row, or what the data set refuses.
    """
    entry = None
    kept_in = None if folder == OFF else folder or default_folder()
    if kept_in is not None:
        entry = pathlib.Path(kept_in, key(section, tokenizer, length))
        if (found := _load(entry)) is not None:
            check(found.counts)
            return found
    examples = plugin.load_examples(section, ("ratio",))
    return _make(entry, examples, tokenizer, length, check)


def default_folder() -> pathlib.Path | None:
    """`rows` in the folder of `files.cache`; None, with a warning, where there is none."""
    try:
        return cache() / "rows"
    except OSError as error:
        fallback.say_once(f"token ids stay in memory: {error}")
        return None


def key(section: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> str:
    """The name of an entry: a digest of what its rows depend on, but for the files."""
    used = {k: v for k, v in section.items() if k != "ratio"}
    parts = (
        json.dumps(used, sort_keys=True, default=repr),
        json.dumps(tokenizer.reading._asdict(), sort_keys=True, default=repr),
        tokenizer.fingerprint, length, _code(), *sorted(_own_code(used)),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _load(entry: pathlib.Path) -> Rows | None:
    """The rows of an entry; None where there is none, or where its files have changed."""
    described = entry / "entry.json"
    if not described.is_file():
        return None
    try:
        entry_of = json.loads(described.read_text(encoding="utf-8"))
        changed = [f for f, digest in entry_of["files"].items() if _digest(f) != digest]
        if changed:
            log.info("%s has changed: its rows are tokenised again", changed[0])
            return None
        stored = StoredRows(entry / "rows.array_record", entry_of["digest"])
        sizes = Sizes.loaded(entry / "sizes.npz", entry_of)
        if len(stored) != len(sizes):
            raise ValueError(f"{len(stored)} rows, expected {len(sizes)}")
        return Kept(stored, sizes, entry_of["counts"])
    except (
        OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        log.warning("%s does not read back (%s): tokenised again", entry, error)
        return None


def _make(
    entry: pathlib.Path | None, examples: Sequence[Example], tokenizer: Tokenizer,
    length: int, check: Callable[[dict[str, Any]], None],
) -> Rows:  # fmt: skip
    """Tokenises examples; many rows of files are written to an entry while they come."""
    counts, sizes = rows.no_counts(), Sizes()
    stream = rows.stream(examples, tokenizer, length=length, counts=counts)
    files = {str(f): _digest(f) for f in getattr(examples, "files", ())}
    first: list[Row] = []
    scratch = None
    for row in stream:
        sizes.add(row)
        first.append(row)
        if len(first) == SMALL and files and entry is not None:
            check(counts)  # before the rest is read
            if (scratch := _scratch(entry)) is not None:
                break
    if scratch is None or entry is None:
        check(counts)
        rows.check_any(len(first), counts)
        return Rows(first, sizes, counts)
    try:
        digest = _write(scratch / "rows.array_record", first, stream, sizes)
        check(counts)
        sizes.save(scratch / "sizes.npz")
        described = {"files": files, "counts": counts, "digest": digest}
        text = json.dumps({**described, **sizes.described()})
        (scratch / "entry.json").write_text(text, encoding="utf-8")
        return _placed(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(entry: pathlib.Path) -> pathlib.Path | None:
    """A new folder beside an entry; None, with a warning, where none can be made."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(tempfile.mkdtemp(dir=entry.parent, prefix="."))
    except OSError as error:
        log.warning(
            "%s: token ids cannot be kept there and stay in memory (config.row_cache = "
            "%r leaves this out)", error, OFF,
        )  # fmt: skip
        return None


def _placed(scratch: pathlib.Path, entry: pathlib.Path) -> Rows:
    """Renames a finished folder to its entry, unless another process was faster.

    Raises:
      ValueError: the entry does not read back.
    """
    try:
        scratch.rename(entry)
    except OSError:  # there is one: of another process, of other files, or damaged
        found = _load(entry)
        if found is not None:
            return found
        shutil.rmtree(entry, ignore_errors=True)
        scratch.rename(entry)
    found = _load(entry)
    if found is None:
        raise ValueError(f"{entry} does not read back: set config.row_cache = {OFF!r}")
    return found


class Kept(Rows):
    """Rows that stay on the disk."""

    _rows: "StoredRows"

    def contents(self) -> Iterator[bytes]:
        return self._rows.contents()


class StoredRows(Sequence[Row]):
    """Random access to the rows of a file.

    Args:
      path: of the ArrayRecord file.
      digest: of what all rows hold.
    """

    def __init__(self, path: pathlib.Path, digest: str):
        self._path, self._digest = path, digest
        self._readers: dict[int, Any] = {}  # by process: a fork needs its own
        self._many = self._reader.num_records()

    def __len__(self) -> int:
        return self._many

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        (record,) = self._reader.read([int(index) % len(self)])
        return unpack(record)

    def __iter__(self) -> Iterator[Row]:
        return map(unpack, self._records())

    def contents(self) -> Iterator[bytes]:
        """What every row holds, as `rows.content`.

        Raises:
          ValueError: at the end, if the file is damaged.
        """
        digest = hashlib.sha256()
        for record in self._records():
            held = record[4 + int.from_bytes(record[:4], "big") :]
            digest.update(held)
            yield held
        if digest.hexdigest() != self._digest:
            raise ValueError(f"{self._path} is damaged: delete {self._path.parent}")

    def _records(self) -> Iterator[bytes]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._reader.read(
                [*range(start, min(start + AT_ONCE, len(self)))]
            )

    @property
    def _reader(self) -> Any:
        reader = self._readers.get(os.getpid())
        if reader is None:
            reader = array_record_module.ArrayRecordReader(str(self._path))
            self._readers[os.getpid()] = reader
        return reader


def pack(row: Row) -> bytes:
    """A row as a record: the length of a header, the header, and `rows.content`."""
    header = json.dumps(
        [row.id, len(row.responses), row.feedback, dict(row.columns), row.distinct]
    ).encode()
    return len(header).to_bytes(4, "big") + header + rows.content(row)


def unpack(record: bytes) -> Row:
    """The row that `pack` wrote."""
    at = 4 + int.from_bytes(record[:4], "big")
    name, many, feedback, columns, distinct = json.loads(record[4:at])

    def array(dtype: type, start: int) -> tuple[np.ndarray, int]:
        size = int.from_bytes(record[start : start + 4], "big")
        found: np.ndarray = np.frombuffer(record, dtype, size, start + 4)
        return found, start + 4 + found.nbytes

    prompt, at = array(np.int32, at)
    responses, scored = [], []
    for _ in range(many):
        ids, at = array(np.int32, at)
        responses.append(ids)
    for _ in range(many):
        mark, at = array(np.bool_, at)
        scored.append(mark)
    return Row(name, prompt, responses, scored, tuple(feedback), columns, distinct)


def _write(
    path: pathlib.Path, first: Iterable[Row], rest: Iterator[Row], sizes: Sizes
) -> str:
    """Writes rows, of which the first ones are in `sizes` already; their digest."""
    digest = hashlib.sha256()
    writer = array_record_module.ArrayRecordWriter(str(path), OPTIONS)
    for row in first:
        writer.write(pack(row))
        digest.update(rows.content(row))
    for row in rest:
        sizes.add(row)
        writer.write(pack(row))
        digest.update(rows.content(row))
    writer.close()
    return digest.hexdigest()


def _digest(path: str | pathlib.Path) -> str:
    """Of what a file holds; '' where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


@functools.cache
def _code() -> str:
    """A digest of the code that makes rows of files."""
    digest = hashlib.sha256()
    for name in CODE:
        folder = pathlib.Path(str(importlib.import_module(name).__file__)).parent
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    for module in (batch, plugin):
        digest.update(pathlib.Path(str(module.__file__)).read_bytes())
    for package in ("jinja2", "tokenizers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


def _own_code(section: Any) -> Iterator[str]:
    """The source of data sets outside this package that a section names."""
    if not isinstance(section, Mapping):
        return
    name = section.get("name")
    if isinstance(name, str) and "." in name:
        function = plugin.find("data", name)
        yield inspect.getsource(inspect.getmodule(function) or function)
    for value in section.values():
        yield from _own_code(value)
