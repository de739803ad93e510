"""Tensors of weight files, read a few rows at a time.

They are read by their offset in the file. A memory map would count the whole file as memory
of the process, beside the arrays that are made from it.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from alignax.models.json_object import one_line

FLOATS = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}  # fmt: skip
CHUNK = 2**23  # bytes that are read at once


class Tensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      shape: as stored.
      dtype: its name in the file's format.
      rows: rows(a, b) reads rows a to b - 1 of its first axis.
    """

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], np.ndarray]

    def __call__(self) -> np.ndarray:
        """All of it."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)[0]

    def chunks(
        self, first: int, last: int, unit: int = 1
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(row, rows from there on) from row `first` to `last` - 1.

        Args:
          first: a multiple of `unit`.
          last: another one.
          unit: rows that are not parted. As many units are read at once as make CHUNK
            bytes in float32, but at least one.
        """
        many = max(1, CHUNK // (4 * unit * math.prod(self.shape[1:]) or 1)) * unit
        for a in range(first, last, many):
            yield a, self.rows(a, min(a + many, last))


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A local path whose '~' is the home folder.

    Raises:
      FileNotFoundError: there is no such user, or the user has no home folder.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{path}: there is no home folder for its ~") from None


def read_at(path: pathlib.Path, offset: int, many: int) -> np.ndarray:
    """`many` bytes of a file, from byte `offset` on: uint8[many].

    Raises:
      ValueError: the file ends before.
    """
    out = np.empty(many, np.uint8)
    view, done = out.data, 0
    with open(path, "rb", buffering=0) as file:
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], offset + done)
            if not got:
                raise ValueError(f"{path} ends before byte {offset + len(view)}")
            done += got
    return out


def safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged; or, when a tensor is read, that it holds another type than
        float64, float32, float16 or bfloat16.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:  # it checks the header
            names = list(file.keys())
        begin = struct.unpack("<Q", read_at(path, 0, 8).tobytes())[0]
        header = json.loads(read_at(path, 8, begin).tobytes())
        return {name: _tensor(path, name, 8 + begin, header[name]) for name in names}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{path} is damaged or not safetensors: {one_line(e)}") from e


def check_dtype(name: str, dtype: str, path: pathlib.Path) -> None:
    """Raises ValueError for a dtype of safetensors that is not read; says what to do."""
    if dtype in FLOATS:
        return
    quantised = dtype.startswith(("F4", "F6", "F8", "I", "U"))
    raise ValueError(
        f"tensor {name} in {path} has dtype {dtype} "
        f"({'a quantised checkpoint' if quantised else 'not a weight'}), which is not read; "
        f"known: {', '.join(FLOATS)}. Dequantise the checkpoint to bfloat16 with the library "
        "that made it, save it as safetensors, and load that"
    )


def _tensor(path: pathlib.Path, name: str, base: int, entry: dict) -> Tensor:
    shape, dtype = tuple(entry["shape"]), str(entry["dtype"])
    begin, each = base + entry["data_offsets"][0], math.prod(shape[1:])

    def rows(a: int, b: int) -> np.ndarray:
        check_dtype(name, dtype, path)
        row = each * FLOATS[dtype].itemsize
        raw = read_at(path, begin + a * row, (b - a) * row)
        return raw.view(FLOATS[dtype]).reshape(b - a, *shape[1:])

    return Tensor(shape, dtype, rows)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
