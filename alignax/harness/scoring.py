"""Log-likelihoods of many rows: in batches of few shapes, each context computed once.

Rows with one context (the answers of a multiple-choice question) are a group, whose context
a packed row holds once. A batch has B groups of G rows; B, G and its width L take few values,
because each combination is a program to compile. What fills a batch up changes no result.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from alignax import logprob
from alignax.batch import LM, from_groups
from alignax.harness.encoding import Row
from alignax.inputs import layout
from alignax.models import sharding
from alignax.training import parallel

SHORTEST = 32  # tokens: the smallest width of a batch


class Likelihood(NamedTuple):
    """What the harness asks of a row."""

    logp: float  # nats, of the whole continuation
    greedy: bool  # whether each of its tokens is the most likely one


class Chunk(NamedTuple):
    """Rows of one batch.

    Attributes:
      groups: indices of rows with one context each.
      size: G, rows that a group has room for.
      places: B, groups that the batch has room for.
      width: L, tokens that a packed row has room for.
    """

    groups: list[list[int]]
    size: int
    places: int
    width: int


def likelihoods(
    lm: LM, rows: Sequence[Row], *, batch_size: int, mesh: Mesh
) -> Iterator[tuple[int, Likelihood]]:
    """Scores rows.

    Args:
      lm: the model, placed on the mesh.
      rows: contexts and continuations; the model reads all tokens of a row but the last.
      batch_size: most rows of a batch and shard of the mesh.
      mesh: devices.

    Yields:
      (index of a row, its result), batch by batch, the longest rows first.

    Raises:
      ValueError: an id beyond the vocabulary of the model.
    """
    shards = sharding.num_shards(mesh)
    run = parallel.compiled_score(mesh, ("best",))
    spread = NamedSharding(mesh, sharding.BATCH)
    longest = lm.config.max_length + 1
    for chunk in chunks(rows, batch_size=batch_size, shards=shards, longest=longest):
        batch = from_groups(
            [rows[group[0]].context for group in chunk.groups],
            [[rows[i].continuation for i in group] for group in chunk.groups],
            length=chunk.width,
        )
        logprob.check_ids(lm, batch)
        batch = _filled(batch, chunk)
        if chunk.size > 1:
            rows_of_shard = chunk.places // shards
            laid = layout.build(
                batch, length=chunk.width, shards=shards, rows=rows_of_shard
            )
            batch = batch._replace(layout=laid)
        out = jax.device_get(run(lm, jax.device_put(batch, spread)))
        for b, group in enumerate(chunk.groups):
            for g, i in enumerate(group):
                mask = batch.mask[b, g]
                logps, best = out.logps[b, g][mask], out.best[b, g][mask]
                total = float(logps.astype(np.float64).sum())
                yield i, Likelihood(total, bool((logps >= best).all()))


def chunks(
    rows: Sequence[Row], *, batch_size: int, shards: int = 1, longest: int = 0
) -> list[Chunk]:
    """Rows by batches, those of a similar length together.

    Args:
      rows: contexts and continuations.
      batch_size: most rows of a batch and shard.
      shards: that divide a batch.
      longest: tokens of the longest row that there can be; its width is no larger than
        this needs.
    """
    by_context: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for i, row in enumerate(rows):
        by_context[tuple(row.context)].append(i)
    alike: dict[int, list[tuple[int, list[int]]]] = collections.defaultdict(list)
    for context, members in by_context.items():
        for start in range(0, len(members), batch_size):
            group = members[start : start + batch_size]
            tokens = len(context) + sum(len(rows[i].continuation) for i in group)
            alike[min(layout.steps(len(group)), batch_size)].append((tokens, group))
    found = []
    for size, sized in sorted(alike.items()):
        sized.sort(key=lambda item: (-item[0], item[1]))
        places = max(1, batch_size // size) * shards
        for start in range(0, len(sized), places):
            part = sized[start : start + places]
            groups = [group for _, group in part]
            found.append(Chunk(groups, size, places, width(part[0][0], longest)))
    return sorted(found, key=lambda chunk: -chunk.width)


def width(tokens: int, longest: int = 0) -> int:
    """The width of a batch whose fullest row has so many tokens.

    One of 32, 48, 64, 96, 128, ...; or what rows of `longest` tokens need, if that is less.
    """
    usual = max(SHORTEST, layout.steps(tokens))
    most = -(-longest // 8) * 8
    return min(usual, most) if tokens <= most else usual


def _filled(batch: Any, chunk: Chunk) -> Any:
    """A batch with all places taken: by its first group, and by rows without a token."""
    b, g = batch.tokens.shape[:2]
    at = np.r_[:b, np.zeros(chunk.places - b, int)]
    batch = jax.tree.map(lambda x: np.asarray(x)[at], batch)
    more = chunk.size - g

    def grow(x):
        return np.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(grow, batch) if more else batch
