"""TensorBoard event files, written without TensorFlow or protobuf.

A file is a run of TFRecords: length u64, masked crc32c of the length u32, payload, masked
crc32c of the payload u32, all little-endian. Each payload is one `Event` message, of
which only the four fields that scalars need are encoded here.
https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

import numpy as np


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum of `data`, the one that the record format asks for."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def record(payload: bytes) -> bytes:
    """One TFRecord holding `payload`."""

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
        return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field: a string or a message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(step: int, body: bytes) -> bytes:
    wall_time = b"\x09" + struct.pack("<d", time.time())
    return record(wall_time + b"\x10" + _varint(step) + body)


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """One record with every scalar of a step: tag -> number, infinite beyond float32."""
    with np.errstate(over="ignore"):
        floats = {
            tag: np.array(value, "<f4").tobytes() for tag, value in values.items()
        }
    summary = b"".join(
        _field(1, _field(1, tag.encode()) + b"\x15" + value)
        for tag, value in floats.items()
    )
    return _event(step, _field(5, summary))


def create(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Starts a new event file of a run that continues from `step`.

    Because of its header TensorBoard drops what an earlier process logged past `step`.
    """
    stamp = f"{time.time_ns() / 1e9:.6f}"  # the name TensorBoard sorts files by
    path = folder / f"events.out.tfevents.{stamp}.{socket.gethostname()}"
    version = _event(0, _field(3, b"brain.Event:2"))
    session_start = _field(7, b"\x08\x01")
    path.write_bytes(version + _event(step + 1, session_start))
    return path
