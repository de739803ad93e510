"""Checks the header of a .gguf file: every length that it states fits into the file.

The library that reads these files trusts them: an array of 2^60 entries would be read for
ever.
"""

import math
import mmap
import os
import pathlib
import struct

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes
STRING, ARRAY = 8, 9
DIMENSIONS = 4  # most axes of a tensor


def check(path: pathlib.Path) -> None:
    """Raises ValueError, which names the file, for a header that does not fit into it."""
    try:
        if not os.path.getsize(path):
            raise ValueError("it is empty")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _walk(data, len(data))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is damaged or not GGUF: {error}") from error


def _walk(data: mmap.mmap, size: int) -> None:
    magic, version, tensors, fields = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}")
    at = 24
    for _ in range(_fits(fields, 13, size - at, "fields")):
        at = _string(data, at, size)
        (kind,) = struct.unpack_from("<I", data, at)
        at = _value(data, at + 4, size, kind)
    for _ in range(_fits(tensors, 24, size - at, "tensors")):
        at = _string(data, at, size)
        (axes,) = struct.unpack_from("<I", data, at)
        if axes > DIMENSIONS:
            raise ValueError(f"a tensor has {axes} axes")
        *shape, _, place = struct.unpack_from(f"<{axes}QIQ", data, at + 4)
        at += 16 + 8 * axes
        _fits(math.prod(shape), 1 / 8, size, "numbers of a tensor")  # a bit at least
        _fits(place, 1, size, "bytes before a tensor")


def _value(data: mmap.mmap, at: int, size: int, kind: int) -> int:
    """The place behind a value."""
    if kind == STRING:
        return _string(data, at, size)
    if kind != ARRAY:
        return at + _size_of(kind)
    inner, many = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner == STRING:
        for _ in range(_fits(many, 8, size - at, "texts of an array")):
            at = _string(data, at, size)
        return at
    return at + _fits(many, _size_of(inner), size - at, "values of an array") * _size_of(inner)  # fmt: skip


def _string(data: mmap.mmap, at: int, size: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return at + 8 + _fits(length, 1, size - at - 8, "bytes of a text")


def _size_of(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"a field has the unknown type {kind}")
    return SIZES[kind]


def _fits(many: int, each: float, left: int, what: str) -> int:
    if many * each > left:
        raise ValueError(f"it states {many} {what}, and {max(left, 0)} bytes are left")
    return many
