"""A data set as batches of training: a source is (next, state, restore, report).

`dataset_source` turns examples into batches by a plan that is a pure function of the
step: which examples share a batch, in which order, at which T. Grain draws the order
(one permutation per epoch) and iterates over the plan; the state of a source is that of
Grain's iterator. Every host plans the whole batch and builds its own rows of it, so that
all hosts agree on shapes and on when the data end, and a run can resume on another number
of hosts. Examples that are too long are cut or dropped, and counted (see `rows`).
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np

from alignax.batch import Batch, Example
from alignax.inputs.plan import (
    ENDLESS,
    Order,
    Packing,
    Plan,
    bucket_sizes,
    fit,
    packing,
)
from alignax.inputs.plan import identity as plan_identity
from alignax.inputs.rows import Rows, merged, read
from alignax.text.tokenizer import Tokenizer

BALANCED = 1024  # examples at least over which tokens are divided evenly

log = logging.getLogger(__name__)
Data = Sequence[Example] | Rows  # rows that were read before are taken as they are


class Source(NamedTuple):
    """Batches in order, from any saved position.

    Attributes:
      next: (params, step, average) -> Batch of this host's rows; `average` is that of the
        parameters, None where the run keeps none. Offline sources ignore all three.
        Raises StopIteration when the epochs are over.
      state: () -> a JSON-serialisable dict.
      restore: takes the dict of `state`; the batches that follow are bit-identical.
      report: () -> counts over the data ('read', 'used', 'cut', 'dropped',
        'malformed'), over one epoch 'padding' (share of tokens) and 'useful' (share of
        distinct tokens, a common prefix counted once), the first 'dropped_ids' and
        'malformed_ids' with their reasons; 'ids' of the last batch, and 'metrics' of it.
    """

    next: Callable[..., Batch]
    state: Callable[[], dict[str, Any]]
    restore: Callable[[dict[str, Any]], None]
    report: Callable[[], dict[str, Any]]


def dataset_source(
    examples: Data | Mapping[str, tuple[Data, float]],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    buckets: Sequence[int] = (),
    shuffle: bool = True,
    epochs: int | None = None,
    host: tuple[int, int] = (0, 1),
    vocab_size: int | None = None,
    window: int = 16,
    grid: tuple[int, int] | None = None,
    balanced: bool = True,
) -> Source:
    """Batches of a data set, or of a mixture with a fixed ratio in every step.

    Every example occurs once an epoch. Plain batches hold examples of like length: within
    a window of shuffled batches rows are sorted by length, cut into batches, and the
    batches shuffled again. A batch may hold the end of one epoch and the start of the
    next; the last batch of all is filled up with invalid rows.

    Packed batches (see `layout`) hold `batch_size` prompts too, and mostly have one shape:
    the examples of a window are divided over its batches so that each has about as many
    tokens. That works well where a batch holds several prompts of every length. With
    `balanced=False`, and in a mixture, batches are those of plain rows, and each is packed
    into one of sixteen shapes.

    An example that cannot be tokenised (its prompt's ids are no prefix of the whole, a
    turn holds two EOS, ...) counts as malformed and is named with its reason.

    Args:
      examples: random-access examples or rows, or {name: (they, ratio)}. In a mixture each
        step holds exactly that ratio, in blocks of rows in the order of the names, and
        `extra['source']` (int32 [B]) is the index of the name.
      tokenizer: from `tokenizer.load`.
      batch_size: B, prompts per step over all hosts.
      length: most tokens per row; longer examples are cut.
      seed: of the order.
      buckets: the values of T that occur, at most `length`; by default 1, 2, 3, 4,
        6 and 8 eighths of it. Each value that occurs is compiled once.
      shuffle: False keeps the order of `examples`.
      epochs: passes over the data, None for no end. In a mixture the part that takes
        the most steps is passed this often, and the others repeat.
      host: (process index, process count).
      vocab_size: V of the model, to refuse ids beyond it; None does not check.
      window: number of batches over which rows are sorted by length, or over which
        tokens are divided evenly (then as many as hold BALANCED examples, at least).
      grid: (shards over all hosts, micro-batches) that batches are laid out for; None
        leaves one row per response.
      balanced: packed batches of about as many tokens each; False packs batches of
        examples of like length.

    Returns:
      A Source of host batches [B / process count, G, T], G the largest group.

    Raises:
      ValueError: no usable example; a ratio that `batch_size` cannot hold exactly; a
        batch that the hosts, or shards and micro-batches, cannot share evenly; a bucket
        beyond `length`; an id at or beyond `vocab_size`.
    """
    mixture = isinstance(examples, Mapping)
    parts = examples if isinstance(examples, Mapping) else {"data": (examples, 1)}
    shares = _shares({k: ratio for k, (_, ratio) in parts.items()}, batch_size)
    _check_division(batch_size, host, grid)
    data = [read_rows(d, tokenizer, length) for d, _ in parts.values()]
    if vocab_size is not None:
        for part in data:
            part.check_ids(vocab_size, tokenizer)
    counts = merged([part.counts for part in data])
    _check_columns(dict(zip(parts, data, strict=True)))
    schedule = Schedule(batch_size, shares, seed, window, shuffle, epochs)
    build = functools.partial(
        Plan, data, host=host, pad=tokenizer.pad_id, mixture=mixture,
        buckets=_buckets(data, bucket_sizes(buckets, length), packed=grid is not None),
    )  # fmt: skip
    plan, report = plan_by_length(build, data, schedule, grid)
    even = grid is not None and balanced and not mixture
    if grid is not None and even:
        grouped = report
        plan, report = plan_balanced(build, data[0], schedule, grid)
        _warn_if_emptier(report, grouped)
    # A position is only valid for the same data and the same batch layout.
    settings: tuple[Any, ...] = (tokenizer.fingerprint, batch_size, length, seed)
    settings += (plan.buckets, shuffle, epochs, window, shares)
    if grid is None:
        return _iterate(plan, plan_identity(data, settings), {**counts, **report})
    # Until 2026-12 packed batches held as many prompts as filled their rows.
    before = plan_identity(data, (*settings, "packed", balanced))
    own = plan_identity(data, (*settings, "packed", "balanced")) if even else before
    return _iterate(plan, own, {**counts, **report}, before=before)


class Schedule(NamedTuple):
    """How often, in which order and how many at a time examples come."""

    batch_size: int  # B over all hosts
    shares: list[int]  # rows of each part of a mixture in one batch
    seed: int
    window: int  # batches that are sorted by length, or filled, together
    shuffle: bool
    epochs: int | None  # None for no end


def plan_by_length(
    build: Callable[..., Plan], data: Sequence[Rows], schedule: Schedule,
    grid: tuple[int, int] | None,
) -> tuple[Plan, dict[str, float]]:  # fmt: skip
    """Batches of a fixed number of examples of like length, plain or packed.

    Args:
      build: `Plan`, with everything bound but orders, steps and packing.
      data: rows of each part of a mixture.
      schedule: their order.
      grid: (shards, micro-batches) that batches are packed for, None for plain rows.

    Returns:
      The plan and the shares of tokens over one epoch.
    """
    passes = 1 if schedule.epochs is None else schedule.epochs
    need = [
        -(-len(rows) * passes // share)
        for rows, share in zip(data, schedule.shares, strict=True)
    ]
    steps = ENDLESS if schedule.epochs is None else max(need)
    orders = [
        Order(
            (rows.lengths if grid is None else rows.distinct).tolist(),
            share,
            window=schedule.window,
            seed=schedule.seed + i,
            shuffle=schedule.shuffle,
            limit=None if n < steps else len(rows) * passes,
        )
        for i, (rows, share, n) in enumerate(
            zip(data, schedule.shares, need, strict=True)
        )
    ]
    plan = build(orders, steps, packing=None if grid is None else Packing(*grid))
    return plan, plan.shares(min(steps, max(need)))


def plan_balanced(
    build: Callable[..., Plan], rows: Rows, schedule: Schedule,
    grid: tuple[int, int],
) -> tuple[Plan, dict[str, float]]:  # fmt: skip
    """Packed batches of about as many tokens each; as `plan_by_length`."""
    many, size, epochs = len(rows), schedule.batch_size, schedule.epochs
    order = Order(
        rows.distinct.tolist(), size,
        window=max(schedule.window, -(-BALANCED // size)), seed=schedule.seed,
        shuffle=schedule.shuffle, limit=None if epochs is None else many * epochs,
        balanced=True,
    )  # fmt: skip
    steps = ENDLESS if epochs is None else -(-many * epochs // size)
    plan = build([order], steps, packing=packing(order, *grid))
    return plan, plan.shares(min(steps, -(-many // size)))


def _iterate(
    plan: Plan, identity: str, counts: dict[str, Any], *, before: str = ""
) -> Source:
    """The batches of a plan, one after another, as a Source.

    Args:
      plan: random access to them.
      identity: of the data and of what decides the batches.
      counts: for the report.
      before: the identity that earlier versions gave to other batches of the same data.
    """
    batches = iter(
        grain.MapDataset.source(plan).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
    )
    last: dict[str, Any] = {"ids": [], "metrics": {}}

    def next_batch(params: Any = None, step: int = 0, average: Any = None) -> Batch:
        del params, step, average
        batch, last["ids"], last["metrics"] = next(batches)
        return batch

    def state() -> dict[str, Any]:
        return {"grain": batches.get_state(), "data": identity}

    def restore(saved: dict[str, Any]) -> None:
        if saved.get("data") == before != identity:
            log.warning(
                "this run was begun by a version whose packed batches held fewer prompts "
                "where these are long: it goes on at the same step with batches of equally "
                "many, so that in this epoch some rows come twice and some not at all"
            )
        elif saved.get("data") != identity:
            raise ValueError(
                "the saved data position belongs to other data, another tokenizer or "
                "another batch layout: undo the change of the data file (or of what reads "
                "and cuts its rows), or take another workdir (digest of the data: saved "
                f"{saved.get('data')}, here {identity})"
            )
        batches.set_state(saved["grain"])

    return Source(next_batch, state, restore, lambda: {**counts, **last})


class EvalBatches:
    """Every example once, at known places: `batches[i]` holds the examples `ids(i)`."""

    def __init__(self, plan: "Plan", report: dict[str, Any]):
        self._plan, self.report = plan, report

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self._plan[index % len(self)][0]

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def ids(self, index: int) -> list[str]:
        """Ids of the valid rows of batch `index`, in order."""
        return self._plan.ids(index % len(self))


def eval_batches(
    examples: Data,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int] = (),
    host: tuple[int, int] = (0, 1),
    vocab_size: int | None = None,
) -> EvalBatches:
    """Every example exactly once, shortest first, the last batch filled up.

    Args: as for `dataset_source`.

    Returns:
      A sequence of host batches with `ids(i)` and the counts in `report`.

    Raises:
      ValueError: as for `dataset_source`.
    """
    if batch_size % host[1]:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {host[1]} hosts"
        )
    rows = read_rows(examples, tokenizer, length)
    if vocab_size is not None:
        rows.check_ids(vocab_size, tokenizer)
    counts = dict(rows.counts)
    order = ByLength(rows.lengths, batch_size)
    plan = Plan(
        [rows], [order], -(-len(rows) // batch_size),
        buckets=bucket_sizes(buckets, length), host=host, pad=tokenizer.pad_id, mixture=False,
    )  # fmt: skip
    counts |= plan.shares(len(plan))
    return EvalBatches(plan, counts)


def _check_division(
    batch_size: int, host: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    """Raises ValueError for a batch that hosts or shards cannot share evenly."""
    index, count = host
    if not 0 <= index < count:
        raise ValueError(
            f"host is {host}, expected (index, count) with 0 <= index < count"
        )
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} does not divide over {count} hosts")
    if grid is not None and batch_size % (grid[0] * grid[1]):
        raise ValueError(
            f"batch_size {batch_size} does not divide over {grid[0]} shards x "
            f"{grid[1]} micro-batches"
        )


def read_rows(
    examples: Sequence[Example] | Rows, tokenizer: Tokenizer, length: int
) -> Rows:
    """The usable rows of examples, or rows that were read before."""
    if isinstance(examples, Rows):
        return examples
    return read(examples, tokenizer, length=length)


class ByLength:
    """Which examples make up batch k of an evaluation: the shortest first."""

    def __init__(self, lengths: np.ndarray, batch_size: int):
        self._order = np.argsort(lengths, kind="stable")
        self._size = batch_size

    def batch(self, k: int) -> list[int | None]:
        """Indices of the examples in batch k; None fills up the last one."""
        found = self._order[k * self._size : (k + 1) * self._size].tolist()
        return found + [None] * (self._size - len(found))


def _check_columns(parts: dict[str, Rows]) -> None:
    named = {k: list(rows.columns) for k, rows in parts.items()}
    if len({tuple(names) for names in named.values()}) > 1:
        raise ValueError(f"the parts of a mixture have different columns: {named}")


def _buckets(
    data: Sequence[Rows], sizes: tuple[int, ...], *, packed: bool
) -> tuple[int, ...]:
    """The values of T that occur: one where rows are packed, for there T is cheap."""
    if not packed:
        return sizes
    return (fit(max(int(rows.lengths.max()) for rows in data), sizes),)


def _warn_if_emptier(even: dict[str, float], grouped: dict[str, float]) -> None:
    """Logs that balanced batches have more padding than those of like length would."""
    if even["useful"] < grouped["useful"] - 0.02:
        log.warning(
            "%.0f %% of what packed rows compute is useful, %.0f %% where batches are "
            "of like length: with few prompts per device, or a few very long ones, use "
            "config.layout = 'grouped'",
            100 * even["useful"], 100 * grouped["useful"],
        )  # fmt: skip


def _shares(ratios: dict[str, float], batch_size: int) -> list[int]:
    """Rows of each part of a mixture in one batch."""
    exact = {k: Fraction(r).limit_denominator(10**6) for k, r in ratios.items()}
    if not exact or any(r <= 0 for r in exact.values()):
        raise ValueError(f"a mixture needs positive ratios, got {ratios}")
    rows = [batch_size * r / sum(exact.values()) for r in exact.values()]
    if batch_size < 1 or any(r.denominator != 1 for r in rows):
        base = np.lcm.reduce(
            [(r / sum(exact.values())).denominator for r in exact.values()]
        )
        raise ValueError(
            f"batch_size {batch_size} cannot hold the ratio {ratios} exactly; "
            f"use a multiple of {base}"
        )
    return [int(r) for r in rows]
