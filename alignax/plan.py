"""Which examples share a batch, in which order and at which T: pure functions of a step.

Positions 0, 1, ... run through the data epoch after epoch. A plan gives random access to
the batches of all steps, so that a source can stop anywhere and go on from there.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import grain
import numpy as np

from alignax.batch import Batch, from_groups

ENDLESS = 2**62  # steps


class Row(NamedTuple):
    """One example, cut to length: int32 ids and bools."""

    id: str
    prompt: np.ndarray
    responses: list[np.ndarray]
    scored: list[np.ndarray]
    feedback: Sequence[float]
    columns: Mapping[str, float] = MappingProxyType({})

    def length(self) -> int:
        return len(self.prompt) + max(len(r) for r in self.responses)


class Order:
    """Which examples make up batch k: a pure function of k.

    Positions 0, 1, ... run through epoch after epoch, in Grain's order; batch k takes
    positions kb..(k+1)b-1. Batches within one epoch are sorted by length in windows; a
    batch that straddles two epochs stands alone, or copies of one example would meet.
    """

    def __init__(self, lengths: list[int], share: int, *, window, seed, shuffle, limit):
        self.lengths, self.share, self.limit = lengths, share, limit
        self.window, self.seed, self.shuffle = window, seed, shuffle
        order = grain.MapDataset.range(len(lengths)).seed(seed)
        self.order = (order.shuffle() if shuffle else order).repeat()
        self._sorted = functools.lru_cache(maxsize=2)(self._sort)

    def batch(self, k: int) -> list[int | None]:
        """Indices of the examples in batch k; None fills up behind the last epoch."""
        n, b = len(self.lengths), self.share
        epoch = k * b // n
        first, stop = (
            -(-epoch * n // b),
            (epoch + 1) * n // b,
        )  # batches within the epoch
        if not self.shuffle or not first <= k < stop:
            end = ENDLESS if self.limit is None else self.limit
            return [
                self.order[p] if p < end else None for p in range(k * b, (k + 1) * b)
            ]
        start = k - (k - first) % self.window
        return self._sorted(start, min(start + self.window, stop))[k - start]

    def _sort(self, start: int, stop: int) -> list[list[int]]:
        b = self.share
        rows = [self.order[p] for p in range(start * b, stop * b)]
        rows.sort(key=self.lengths.__getitem__)
        shuffled = np.random.default_rng([self.seed, start]).permutation(stop - start)
        return [rows[i * b : (i + 1) * b] for i in shuffled.tolist()]


class Plan:
    """Random access to the batches of all steps: what Grain iterates over."""

    def __init__(self, data, orders, steps, *, buckets, host, pad, mixture):
        self.data, self.orders, self.steps = data, orders, steps
        self.buckets, self.host, self.pad, self.mixture = buckets, host, pad, mixture
        self.group = max(len(row.responses) for rows in data for row in rows)

    def __len__(self) -> int:
        return self.steps

    def rows(self, k: int) -> list[tuple[int, Row | None]]:
        """(which part of the mixture, example or None) of all hosts' rows."""
        return [
            (part, None if i is None else self.data[part][i])
            for part, order in enumerate(self.orders)
            for i in order.batch(k)
        ]

    def ids(self, k: int) -> list[str]:
        return [row.id for _, row in self.rows(k) if row is not None]

    def __getitem__(self, k: int) -> tuple[Batch, list[str]]:
        rows = self.rows(k)
        size = fit(
            max(row.length() for _, row in rows if row is not None), self.buckets
        )
        index, count = self.host
        each = len(rows) // count
        mine = rows[index * each : (index + 1) * each]
        batch = build([row for _, row in mine], self.group, size, self.pad)
        if self.mixture:
            parts: Any = np.array([part for part, _ in mine], np.int32)
            batch = batch._replace(extra={**(batch.extra or {}), "source": parts})
        return batch, [row.id for _, row in rows if row is not None]

    def padding(self, steps: int) -> float:
        """Share of padding among all tokens of the first `steps` batches."""
        real = total = 0
        for k in range(steps):
            rows = self.rows(k)
            used = [row for _, row in rows if row is not None]
            size = fit(max(row.length() for row in used), self.buckets)
            total += len(rows) * self.group * size
            real += sum(len(r.prompt) + len(a) for r in used for a in r.responses)
        return 1.0 - real / total


def build(rows: list[Row | None], group: int, size: int, pad: int) -> Batch:
    """A batch [len(rows), group, size]; None makes an invalid row."""
    used = [row for row in rows if row is not None]
    zeros = [[0.0] * len(r.responses) for r in used]
    packed = from_groups(
        [r.prompt for r in used],
        [r.responses for r in used],
        length=size,
        pad=pad,
        feedback=[r.feedback or z for r, z in zip(used, zeros, strict=True)],
        scored=[r.scored for r in used],
    )
    at = [i for i, row in enumerate(rows) if row is not None]

    def spread(field, fill):
        out = np.full((len(rows), group, *field.shape[2:]), fill, field.dtype)
        out[at, : field.shape[1]] = field
        return out

    fills = (pad, False, 0, 0.0, False)
    batch = Batch(*(spread(x, fill) for x, fill in zip(packed[:5], fills, strict=True)))
    if not used or not used[0].columns:
        return batch
    extra: dict[str, Any] = {}
    for name in used[0].columns:
        extra[name] = np.zeros(len(rows), np.float32)
        extra[name][at] = [row.columns[name] for row in used]
    return batch._replace(extra=extra)


def bucket_sizes(buckets: Sequence[int], length: int) -> tuple[int, ...]:
    sizes = sorted(set(buckets) or {-(-length * k // 8) for k in (1, 2, 3, 4, 6, 8)})
    if sizes[0] < 1 or sizes[-1] > length:
        raise ValueError(f"buckets {sizes} must lie between 1 and length={length}")
    return tuple(sizes) if sizes[-1] == length else (*sizes, length)


def fit(tokens: int, buckets: tuple[int, ...]) -> int:
    return next(b for b in buckets if b >= tokens)


def identity(data: list[list[Row]], settings: tuple) -> str:
    digest = hashlib.sha256(json.dumps([str(s) for s in settings]).encode())
    for rows in data:
        for row in rows:
            for ids in (row.prompt, *row.responses, *row.scored):
                digest.update(len(ids).to_bytes(4, "big") + ids.tobytes())
            digest.update(repr((row.feedback, sorted(row.columns.items()))).encode())
    return digest.hexdigest()[:16]
