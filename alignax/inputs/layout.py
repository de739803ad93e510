"""Packed rows: a prefix that responses share is computed once, and little padding.

A group is the responses to one prompt. Their common prefix is stored once, the rest of each
response follows, and several groups share a row. Everything here is numpy on the host, and
a pure function of the batch; shapes depend on lengths alone and take few values, because
each shape is a program to compile. `logprob.score` gives the same numbers for a batch with
a layout as without.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.batch import Batch, Layout

LARGEST = 256  # items of a block among which exchanges are looked for: all pairs
TARGET = 1024  # tokens of a row, where the longest group allows


class Group(NamedTuple):
    """The responses to one prompt, in tokens; those without a scored token are left out."""

    shared: int  # tokens of the common prefix
    own: dict[int, int]  # response -> tokens after it, up to its last scored token

    def size(self) -> int:
        """Distinct tokens."""
        return self.shared + sum(self.own.values())


def group(rows: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> Group:
    """The common prefix of responses, and what each has after it.

    Args:
      rows: ids, prompt and response, of one response each.
      masks: True on the tokens that are scored.
    """
    ends = {g: len(m) - int(np.argmax(m[::-1])) for g, m in enumerate(masks) if m.any()}
    if not ends:
        return Group(0, {})
    shared = min(ends.values())
    first, *others = (row for g, row in enumerate(rows) if g in ends)
    for other in others:
        differ = other[:shared] != first[:shared]
        if differ.any():
            shared = int(differ.argmax())
    return Group(shared, {g: end - shared for g, end in ends.items()})


def pieces(group: Group, length: int) -> list[list[int]]:
    """The responses of a group by the rows that they are placed in, mostly one.

    Each piece repeats the common prefix.

    Raises:
      ValueError: a response that is longer than a row.
    """
    if group.size() <= length:
        return [list(group.own)] if group.own else []
    out: list[list[int]] = []
    left: list[int] = []
    for g, own in group.own.items():
        if group.shared + own > length:
            raise ValueError(
                f"a response of {group.shared + own} tokens is longer than a packed row "
                f"of {length}"
            )
        at = next((i for i, room in enumerate(left) if room >= own), len(left))
        if at == len(left):
            out.append([])
            left.append(length - group.shared)
        out[at].append(g)
        left[at] -= own
    return out


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Items by rows of `length`: best fit, longest first, or in order if that is fewer.

    In order never takes more rows than any way to cut the items, in their order, into
    rows.
    """
    best: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(rooms, (sizes[i], -1))
        room, row = rooms.pop(at) if at < len(rooms) else (length, len(best))
        if row == len(best):
            best.append([])
        best[row].append(i)
        bisect.insort(rooms, (room - sizes[i], row))
    straight: list[list[int]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            straight.append([])
            room = length
        straight[-1].append(i)
        room -= size
    return straight if len(straight) < len(best) else best


def steps(many: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `many`."""
    power = 1 << max(many - 1, 0).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= many and power > 2 else power


def _grain(length: int) -> int:
    """The divisor of row lengths: a power of two, at most a 16th of it, at least 8."""
    return max(8, 1 << max(length // 32, 1).bit_length() - 1)


def build(
    batch: Batch, *, length: int, shards: int = 1, accumulate: int = 1,
    rows: int | None = None,
) -> Layout:  # fmt: skip
    """Lays the tokens of a batch out in packed rows.

    Args:
      batch: host arrays; every response with a scored token is placed, valid or not.
      length: L, tokens per row.
      shards: of this process, over which the batch is split in order.
      accumulate: micro-batches, likewise within a shard (see `step.make_train_step`).
      rows: R, rows of each of the shards * accumulate blocks; None takes as many as the
        fullest block needs, rounded up by `steps`.

    Raises:
      ValueError: prompts that do not divide over the blocks, more rows than `rows`, or a
        response longer than a row.
    """
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    many, blocks = len(tokens), shards * accumulate
    if many % blocks:
        raise ValueError(
            f"{many} prompts do not divide over {shards} shards x {accumulate} micro-batches"
        )
    groups = [group(*x) for x in zip(tokens, mask, strict=True)]
    places = []  # of each block: (prompt, responses) by rows
    for s in range(blocks):
        mine = range(s * many // blocks, (s + 1) * many // blocks)
        items = [(i, p) for i in mine for p in pieces(groups[i], length)]
        sizes = [groups[i].shared + sum(groups[i].own[g] for g in p) for i, p in items]
        places.append([[items[j] for j in row] for row in pack(sizes, length)])
    need = max(map(len, places))
    rows = rows or steps(max(need, 1))
    if need > rows:
        raise ValueError(f"the batch needs {need} rows of {length}, there are {rows}")
    fields: Any = [np.zeros((blocks, rows, length), np.int32) for _ in range(5)]
    fields += [np.zeros((blocks, rows, length), bool), np.zeros(tokens.shape, np.int32)]
    out = Layout(*fields)
    for s, block in enumerate(places):
        for r, row in enumerate(block):
            start = 0
            for k, (i, piece) in enumerate(row):
                start = _place(
                    out, (s, r), start, k + 1, i, groups[i], piece, tokens, mask
                )
    return out


def _place(out: Any, at, start, number, i, group, piece, tokens, mask) -> int:
    """Writes one piece of a group from column `start` on; returns where it ends."""

    def write(first, last, branch, before, responses):
        """Writes tokens [first, last) of `responses` behind the one in column `before`."""
        nonlocal start
        end = start + last - first
        span = (*at, slice(start, end))
        out.tokens[span] = tokens[i, responses[0], first:last]
        out.positions[span] = np.arange(first, last)
        out.group[span], out.branch[span] = number, branch
        out.previous[span] = np.arange(start - 1, end - 1)
        if last > first:
            out.previous[(*at, start)] = max(before, 0)
        out.scored[span] = mask[i, responses, first:last].any(0)
        base = at[1] * out.tokens.shape[2]
        out.places[i, responses, first:last] = base + np.arange(start, end)
        start = end

    write(0, group.shared, 0, start, piece)
    common = start - 1
    for g in piece:
        end = group.shared + group.own[g]
        write(group.shared, end, g + 1, common if group.shared else start, [g])
    return start


def choose(blocks: Sequence[Sequence[int]], places: int, most: int) -> tuple[int, int]:
    """(R, L) for a batch with given groups, one of sixteen shapes.

    Each is a program to compile; a batch holds many responses, so that few occur in a run.

    Args:
      blocks: distinct tokens of the groups of every block.
      places: prompts that a block could hold.
      most: tokens that a group could have, G * T.
    """
    rows = max(1, places * most // max(2 * TARGET, 4 * most))
    rows = math.gcd(places, 1 << rows.bit_length() - 1)
    for part in range(1, 17):
        length = -(-places * most * part // (16 * rows * 8)) * 8
        fits = length >= max(map(max, blocks))
        if fits and all(len(pack(block, length)) <= rows for block in blocks):
            break
    return rows, length


def lay(
    batch: Batch, *, shards: int, accumulate: int = 1, host: tuple[int, int] = (0, 1)
) -> tuple[Batch, float]:
    """This host's rows of a batch, with a layout of the shape that all hosts choose.

    Args:
      batch: the rows of all hosts.
      shards: over all hosts.
      accumulate: micro-batches.
      host: (process index, process count).

    Returns:
      The rows, and the share of distinct tokens in what all hosts compute.
    """
    many, (index, count) = len(batch.tokens), host
    blocks = shards * accumulate
    sizes = [
        group(*x).size()
        for x in zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)
    ]
    each = many // blocks
    parts = [sizes[i : i + each] for i in range(0, each * blocks, each)]
    rows, length = choose(parts, each, math.prod(np.shape(batch.tokens)[1:]))
    own = slice(index * many // count, (index + 1) * many // count)
    mine: Batch = jax.tree.map(lambda x: np.asarray(x)[own], batch)
    out = build(
        mine, length=length, shards=shards // count, accumulate=accumulate, rows=rows
    )
    return mine._replace(layout=out), sum(sizes) / (blocks * rows * length)


def distinct(batch: Batch) -> int:
    """Tokens of a batch, the common prefix of a prompt's responses counted once."""
    pairs = zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)
    return sum(group(*x).size() for x in pairs)


def spread(sizes: Sequence[int], blocks: int) -> list[list[int]]:
    """Divides items over blocks of equally many places and about as many tokens each.

    The largest first, each to the block that has the fewest tokens and a place; then the
    fullest block exchanges items with others as long as that helps.

    Returns:
      Of each block indices into `sizes`, in order; those of size 0 are left out.
    """
    out: list[list[int]] = [[] for _ in range(blocks)]
    total = [0] * blocks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        free = (s for s in range(blocks) if len(out[s]) < len(sizes) // blocks)
        s = min(free, key=lambda s: (total[s], s))
        out[s].append(i)
        total[s] += sizes[i]
    if len(sizes) > blocks > 1 and len(sizes) <= LARGEST * blocks:
        _exchange(out, np.asarray(sizes), 4 * blocks)
    return [sorted(i for i in block if sizes[i]) for block in out]


def _exchange(out: list[list[int]], sizes: np.ndarray, most: int) -> None:
    """Exchanges items between the fullest block and others, while that makes it less full.

    Args:
      out: equally many items of every block.
      sizes: of the items.
      most: exchanges.
    """
    items = np.array(out)
    held = sizes[items]
    total = held.sum(1)
    for _ in range(most):
        top = int(total.argmax())
        less = held[top][None, :, None] - held[:, None, :]  # [blocks, of top, of other]
        gap = total[top] - total
        worst = np.maximum(total[top] - less, total[:, None, None] + less)
        worst = np.where((less > 0) & (less < gap[:, None, None]), worst, total[top])
        s, a, b = map(int, np.unravel_index(worst.argmin(), worst.shape))
        if worst[s, a, b] == total[top]:
            break
        for x in (items, held):
            x[top, a], x[s, b] = x[s, b], x[top, a]
        total[top] -= less[s, a, b]
        total[s] += less[s, a, b]
    out[:] = items.tolist()


def fitted(
    blocks: Sequence[Sequence[int]], longest: int, *, spare: float = 0.0
) -> tuple[int, int]:
    """The least (R, L) whose rows hold each of the given blocks of items.

    Rows have about TARGET tokens, or twice those of the longest item.

    Args:
      blocks: distinct tokens of the groups of each.
      longest: tokens of a group that a row must hold.
      spare: share of the fullest block that is left empty.
    """
    full = max(map(sum, blocks))
    budget = max(full + int(spare * full), longest)
    about = max(1, round(budget / max(TARGET, 2 * longest)))
    found = []
    for rows in range(max(1, about - 1), about + 2):
        grain = _grain(budget // rows)
        length = -(-max(-(-budget // rows), longest) // grain) * grain
        while any(len(pack(block, length)) > rows for block in blocks):
            length += grain
        found.append((rows * length, rows, length))
    return min(found)[1:]
