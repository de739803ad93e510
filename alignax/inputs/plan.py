"""Which examples share a batch, in which order and at which T: pure functions of a step.

Positions 0, 1, ... count through the data epoch after epoch. A plan gives random access
to the batches of all steps, so that a source can stop anywhere and resume there.
"""

import bisect
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
LAST = 8  # batches over which the remainder of an epoch is divided


class Order:
    """Which examples make up batch k: a pure function of k.

    Positions 0, 1, ... count through epoch after epoch, in Grain's order; batch k takes
    positions kb..(k+1)b-1. Within one epoch windows of batches are sorted by length; a
    batch of two epochs is in no window, or copies of one example could share a batch.
    """

    def __init__(self, lengths: list[int], share: int, *, window, seed, shuffle, limit):
        self.lengths, self.share, self.limit = lengths, share, limit
        self.window, self.seed, self.shuffle = window, seed, shuffle
        order = grain.MapDataset.range(len(lengths)).seed(seed)
        self.order = (order.shuffle() if shuffle else order).repeat()
        self._sorted = functools.lru_cache(maxsize=2)(self._sort)

    def batch(self, k: int) -> list[int | None]:
        """Indices of the examples in batch k; None fills up after the last epoch."""
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


class Packing(NamedTuple):
    """The devices and micro-batches that rows are packed for, and their usual shape."""

    shards: int  # over all hosts
    accumulate: int  # micro-batches
    rows: int = 0  # R of each of shards * accumulate blocks; 0 = chosen by the batch
    length: int = 0  # L

    @property
    def blocks(self) -> int:
        return self.shards * self.accumulate


class Filled:
    """Which examples make up batch k, as many as fill its rows: a pure function of k.

    Every epoch is cut into batches separately (see `layout.fill`), in Grain's order. The
    last batches of an epoch get equal shares of the rest, because a step gives the mean
    over its prompts however few they are. The batches do not depend on the number of
    devices and micro-batches.
    """

    def __init__(self, sizes: list[int], prompts: int, *, window, seed, shuffle):
        order = grain.MapDataset.range(len(sizes)).seed(seed)
        self.order = (order.shuffle() if shuffle else order).repeat()
        self.sizes, self.prompts = sizes, prompts
        self.rows, self.length = layout.shape(sizes, prompts)
        self.window = window * prompts if shuffle else 1
        self.ends = [0]  # of the epochs so far, in batches
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def batch(self, k: int) -> list[int | None]:
        """Indices of the examples in batch k; None is an empty place."""
        while self.ends[-1] <= k:
            self.ends.append(self.ends[-1] + len(self.epoch(len(self.ends) - 1)))
        number = bisect.bisect_right(self.ends, k) - 1
        return self.epoch(number)[k - self.ends[number]]

    def steps(self, epochs: int) -> int:
        """Number of batches of `epochs` epochs."""
        return sum(len(self.epoch(number)) for number in range(epochs))

    def packing(self, shards: int, accumulate: int, some: int = 256) -> Packing:
        """The shape of rows over devices and micro-batches that the first batches need."""
        if (blocks := shards * accumulate) == 1:
            return Packing(1, 1, self.rows, self.length)
        found = []
        for batch in self.epoch(0)[:some]:
            sizes = [0 if i is None else self.sizes[i] for i in batch]
            parts = layout.spread(sizes, blocks)
            found += [[sizes[i] for i in part] for part in parts]
        return Packing(shards, accumulate, *layout.fitted(found, max(self.sizes)))

    def _epoch(self, number: int) -> list[list[int | None]]:
        n = len(self.sizes)
        out = layout.fill(
            self.sizes, [self.order[i] for i in range(number * n, (number + 1) * n)],
            prompts=self.prompts, rows=self.rows, length=self.length, window=self.window,
        )  # fmt: skip
        return out if self.window == 1 else out[:-LAST] + self._even(out[-LAST:])

    def _even(self, batches: list[list[int | None]]) -> list[list[int | None]]:
        """As many batches of the same items, all with about as many tokens."""
        items = [i for batch in batches for i in batch if i is not None]
        sizes = [self.sizes[i] for i in items]
        sizes += [0] * (len(batches) * self.prompts - len(items))
        out = [[items[j] for j in part] for part in layout.spread(sizes, len(batches))]
        rows = (layout.pack([self.sizes[i] for i in b], self.length) for b in out)
        if max(map(len, rows)) > self.rows:
            return batches
        return [batch + [None] * (self.prompts - len(batch)) for batch in out]


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
        need = max(len(layout.pack(block, self.packing.length)) for block in blocks)
        usual = self.packing.rows
        return usual if need <= usual else layout.steps(need), self.packing.length

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
