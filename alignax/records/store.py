"""Random access to the rows of a file that are in use, which stay on the disk.

Lines of UTF-8 are read where they stand. The rows of other files (compressed, Parquet, an
array) are copied to a temporary file, which the system deletes with the last process that
has it open.
"""

import array
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np

from alignax.records import files

BLOCK = 1 << 20  # bytes that are read at a time where rows are read in order


class Line(NamedTuple):
    """A row of a file: its number from 1, a mark that the reader gave it, its JSON."""

    number: int
    mark: int
    text: bytes


class Store(Sequence[Line]):
    """The rows of a file that were kept, in order.

    All threads, and processes that were forked, may read at the same time.

    Args:
      path: of one of `files.TYPES`.

    Raises:
      ValueError: a file of another type, or a damaged one.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._in_place = files.in_place(path)
        self._file: IO[bytes]
        if self._in_place:
            self._file = path.open("rb")
        else:
            self._file = tempfile.TemporaryFile(prefix="alignax_rows_")  # noqa: SIM115
        self._state = self._signature()
        self._kept = {name: array.array("q") for name in ("start", "size", "number")}
        self._marks = array.array("B")

    def scan(self) -> Iterator[tuple[int, int, bytes | ValueError]]:
        """The rows of the file, for `keep`: see `files.lines`."""
        yield from files.lines(self.path)

    def keep(self, number: int, offset: int, text: bytes, mark: int) -> None:
        """Adds a row that `scan` gave."""
        if not self._in_place:
            text = text.rstrip(b"\n") + b"\n"
            offset = self._file.tell()
            self._file.write(text)
        for name, value in (("start", offset), ("size", len(text)), ("number", number)):
            self._kept[name].append(value)
        self._marks.append(mark)

    def close(self) -> None:
        """Ends the adding of rows."""
        self._file.flush()
        self._arrays = {k: np.array(v, np.int64) for k, v in self._kept.items()}
        self._arrays["mark"] = np.array(self._marks, np.uint8)
        self._kept.clear()
        if self._in_place:
            self._check()

    def __len__(self) -> int:
        return len(self._arrays["start"])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        self._check()
        start, size, number, mark = (
            int(self._arrays[k][index]) for k in ("start", "size", "number", "mark")
        )
        return Line(number, mark, self._read(start, size))

    def __iter__(self) -> Iterator[Line]:
        names = ("start", "size", "number", "mark")
        for first in range(0, len(self), 4096):
            some = slice(first, first + 4096)
            rows = [*zip(*(self._arrays[k][some].tolist() for k in names), strict=True)]
            self._check()
            block, begin = b"", 0
            for i, (start, size, number, mark) in enumerate(rows):
                if not begin <= start <= start + size <= begin + len(block):
                    end = max(BLOCK, size)
                    last = rows[min(i + 4096, len(rows) - 1)]
                    begin = start
                    block = self._read(start, min(end, last[0] + last[1] - start))
                at = start - begin
                yield Line(number, mark, block[at : at + size])

    def __getstate__(self):
        if not self._in_place:
            raise TypeError(f"the rows of {self.path.name} cannot be sent to a process")
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def __setstate__(self, state) -> None:
        self.__dict__ |= state
        self._file = self.path.open("rb")

    def _read(self, start: int, size: int) -> bytes:
        found = os.pread(self._file.fileno(), size, start)
        while len(found) < size:
            more = os.pread(self._file.fileno(), size - len(found), start + len(found))
            if not more:
                raise ValueError(f"{self.path} is shorter than when it was opened")
            found += more
        return found

    def _signature(self) -> tuple[int, ...]:
        if not self._in_place:
            return ()
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _check(self) -> None:
        if self._in_place and self._signature() != self._state:
            raise ValueError(
                f"{self.path} has changed while it was being read: start again, or write "
                "changed data to another file"
            )
