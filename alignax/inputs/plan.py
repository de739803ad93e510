"""Which examples share a batch, in which order and at which T: pure functions of a step.

Positions 0, 1, ... count through the data epoch after epoch. A plan gives random access
to the batches of all steps, so that a source can stop anywhere and resume there.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from alignax.batch import Batch, from_groups
from alignax.inputs import layout
from alignax.inputs.rows import Row, Rows

ENDLESS = 2**62  # steps


@functools.lru_cache(maxsize=64)
def _order(many: int, seed: int, shuffle: bool) -> grain.MapDataset:
    order = grain.MapDataset.range(many).seed(seed)
    return (order.shuffle() if shuffle else order).repeat()


@functools.lru_cache(maxsize=2**16)
def example_at(position: int, many: int, seed: int, shuffle: bool) -> int:
    """Which of so many examples is at a position, in Grain's order.

    Kept: Grain takes a millisecond for each where there are few examples.
    """
    return _order(many, seed, shuffle)[position]


class Order:
    """Which examples make up batch k: a pure function of k.

    Positions 0, 1, ... count through epoch after epoch, in Grain's order; batch k takes
    positions kb..(k+1)b-1. Within one epoch the examples of a window of batches are
    divided over these by length: each batch gets examples of like length or, `balanced`,
    about as many tokens as others. A batch of two epochs is in no window, or copies of one
    example could share a batch.

    Every batch holds the same number of examples, for a step gives the mean over its
    examples: were they fewer where they are long, long ones would weigh more.
    """

    def __init__(
        self, lengths: list[int], share: int, *, window, seed, shuffle, limit,
        balanced: bool = False,
    ):  # fmt: skip
        self.lengths, self.share, self.limit = lengths, share, limit
        self.balanced = balanced
        self.window, self.seed, self.shuffle = window, seed, shuffle
        self._sorted = functools.lru_cache(maxsize=2)(self._sort)

    def batch(self, k: int) -> list[int | None]:
        """Indices of the examples in batch k; None fills up after the last epoch."""
        b, found = self.share, self.around(k)
        if found is None:
            end = ENDLESS if self.limit is None else self.limit
            return [self.at(p) if p < end else None for p in range(k * b, (k + 1) * b)]
        return [*self._sorted(*found)[k - found[0]]]

    def at(self, position: int) -> int:
        return example_at(position, len(self.lengths), self.seed, self.shuffle)

    def around(self, k: int) -> tuple[int, int] | None:
        """First batch of the window of batch k, and the one behind it; None without one."""
        n, b = len(self.lengths), self.share
        epoch = k * b // n
        first, stop = -(-epoch * n // b), (epoch + 1) * n // b  # within the epoch
        if not self.shuffle or not first <= k < stop:
            return None
        start = k - (k - first) % self.window
        return start, min(start + self.window, stop)

    def _sort(self, start: int, stop: int) -> list[list[int]]:
        b = self.share
        rows = [self.at(p) for p in range(start * b, stop * b)]
        if self.balanced:
            parts = layout.spread([self.lengths[i] for i in rows], stop - start)
            batches = [[rows[i] for i in part] for part in parts]
        else:
            rows.sort(key=self.lengths.__getitem__)
            batches = [rows[i : i + b] for i in range(0, len(rows), b)]
        shuffled = np.random.default_rng([self.seed, start]).permutation(stop - start)
        return [batches[i] for i in shuffled.tolist()]


class Packing(NamedTuple):
    """The devices and micro-batches that rows are packed for, and their usual shape."""

    shards: int  # over all hosts
    accumulate: int  # micro-batches
    rows: int = 0  # R of each of shards * accumulate blocks; 0 = chosen by the batch
    length: int = 0  # L

    @property
    def blocks(self) -> int:
        return self.shards * self.accumulate


def packing(order: Order, shards: int, accumulate: int, some: int = 256) -> Packing:
    """The shape of rows over devices and micro-batches that the first batches need.

    Some room is left, so that few others need more. The batches of two epochs, which are
    not balanced, are not among the first ones.
    """
    found = []
    many = max(len(order.lengths) // order.share, 1)
    for k in range(some if order.shuffle else min(some, many)):
        if order.shuffle and k and order.around(k) is None:
            continue
        sizes = [0 if i is None else order.lengths[i] for i in order.batch(k)]
        parts = layout.spread(sizes, shards * accumulate)
        found += [[sizes[i] for i in part] for part in parts]
    shape = layout.fitted(found, max(order.lengths), spare=0.01)
    return Packing(shards, accumulate, *shape)


class Place(NamedTuple):
    """An example of a plan."""

    part: int  # of the mixture
    row: int


class Plan:
    """Random access to the batches of all steps, over which Grain iterates."""

    def __init__(
        self, data, orders, steps, *, buckets, host, pad, mixture, packing=None
    ):
        self.data, self.orders, self.steps = data, orders, steps
        self.buckets, self.host, self.pad, self.mixture = buckets, host, pad, mixture
        self.group = max(rows.group for rows in data)
        self.packing: Packing | None = packing

    def __len__(self) -> int:
        return self.steps

    def places(self, k: int) -> list[Place | None]:
        """Which example is in each row of a batch of all hosts; None is an empty row."""
        rows = [
            None if i is None else Place(part, i)
            for part, order in enumerate(self.orders)
            for i in order.batch(k)
        ]
        if self.packing is None or self.mixture:
            return rows
        each = len(rows) // self.packing.blocks
        out: list[Place | None] = []
        for block in layout.spread(self._distinct(rows), self.packing.blocks):
            out += [rows[i] for i in block] + [None] * (each - len(block))
        return out

    def ids(self, k: int) -> list[str]:
        return [self.data[p.part][p.row].id for p in self.places(k) if p is not None]

    def __getitem__(self, k: int) -> tuple[Batch, list[str], dict[str, float]]:
        """(this host's rows, ids of all hosts' examples, shares of all hosts' tokens)."""
        places = self.places(k)
        index, count = self.host
        each = len(places) // count
        mine = slice(index * each, (index + 1) * each)
        read = [None if p is None else self.data[p.part][p.row] for p in places]
        batch = build(read[mine], self.group, self.size(places), self.pad)
        if self.mixture:
            starts = [
                part for part, order in enumerate(self.orders) for _ in order.batch(k)
            ]
            parts: Any = np.array(starts[mine], np.int32)
            batch = batch._replace(extra={**(batch.extra or {}), "source": parts})
        if self.packing is not None:
            p, (many, long) = self.packing, self.packed_shape(places)
            batch = batch._replace(
                layout=layout.build(
                    batch, shards=p.shards // count, accumulate=p.accumulate,
                    rows=many, length=long,
                )
            )  # fmt: skip
        real, distinct, total = self.tokens(places)
        shares = {"padding": 1 - real / total, "useful_tokens": distinct / total}
        return batch, [row.id for row in read if row is not None], shares

    def size(self, places: Sequence[Place | None]) -> int:
        """T of a batch."""
        lengths = [int(self.data[p.part].lengths[p.row]) for p in places if p]
        return fit(max(lengths), self.buckets)

    def packed_shape(self, places: Sequence[Place | None]) -> tuple[int, int]:
        """(R, L) of a batch, the same on all hosts; few batches need more than usual."""
        assert self.packing is not None
        each = len(places) // self.packing.blocks
        sizes = self._distinct(places)
        blocks = [sizes[i : i + each] for i in range(0, len(places), each)]
        if not self.packing.rows:
            return layout.choose(blocks, each, self.group * self.size(places))
        rows, usual = self.packing.rows, self.packing.length
        for length in (usual, *(-(-usual * k // 32) * 8 for k in (5, 6, 8))):
            need = max(len(layout.pack(block, length)) for block in blocks)
            if need <= rows:
                return rows, length
        return layout.steps(need), length

    def tokens(self, places: Sequence[Place | None]) -> tuple[int, int, int]:
        """Tokens of a batch: real ones, distinct real ones, and computed ones."""
        distinct = sum(self._distinct(places))
        if self.packing is None:
            real = sum(int(self.data[p.part].tokens[p.row]) for p in places if p)
            return real, distinct, len(places) * self.group * self.size(places)
        many, long = self.packed_shape(places)
        return distinct, distinct, self.packing.blocks * many * long

    def shares(self, steps: int) -> dict[str, float]:
        """Of the first `steps` batches: share of padding, and of distinct real tokens.

        Tokens that are computed again, such as a prompt in each plain row, are neither.
        """
        found = np.sum([self.tokens(self.places(k)) for k in range(steps)], 0)
        real, distinct, total = found.tolist()
        return {"padding": 1.0 - real / total, "useful": distinct / total}

    def _distinct(self, places: Sequence[Place | None]) -> list[int]:
        return [
            0 if p is None else int(self.data[p.part].distinct[p.row]) for p in places
        ]


def build(rows: list[Row | None], group: int, size: int, pad: int) -> Batch:
    """A batch [len(rows), group, size]; None makes an invalid row.

    Rows of a form without feedback get zeros, which no loss that reads them reads; a label
    that is missing from a row was an error before (`forms.feedback`, `forms.check`).
    """
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


def identity(data: Sequence[Rows], settings: tuple) -> str:
    digest = hashlib.sha256(json.dumps([str(s) for s in settings]).encode())
    for rows in data:
        for content in rows.contents():
            digest.update(content)
    return digest.hexdigest()[:16]
