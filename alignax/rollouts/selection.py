"""Which prompts a rollout has, and which of its groups and responses it keeps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from alignax.batch import Batch, Example
from alignax.inputs.prompts import subset
from alignax.rollouts.sampler import Drawn

PROMPTS = 1  # stream of numpy's generator under the seed of a run


def order(size: int, many: int, seed: int) -> Callable[[int], list[int]]:
    """From a place in the order to the indices of its `many` prompts.

    Each pass over the prompts has a permutation of its own.

    Raises:
      ValueError: no prompts.
    """
    if not size:
        raise ValueError("no prompts: the data set is empty")

    @functools.lru_cache(maxsize=4)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng([PROMPTS, seed, number]).permutation(size)

    def pick(number: int) -> list[int]:
        places = range(number * many, (number + 1) * many)
        return [int(epoch(at // size)[at % size]) for at in places]

    return pick


def visited(examples: Sequence[Example], many: int, seed: int, places: int):
    """The examples of the first `places` places, each once."""
    pick = order(len(examples), many, seed)
    met = {i for number in range(places) for i in pick(number)}
    return subset(examples, sorted(met))


def differing(answer: Callable[[int], Drawn], many: int, most: int):
    """Dynamic sampling: draws until enough groups have a difference in their rewards.

    Source: Yu et al. 2025, https://arxiv.org/abs/2503.14476

    Args:
      answer: i -> the responses to the i-th batch of B prompts from here on.
      many: groups wanted.
      most: largest number of calls of `answer`.

    Returns:
      (indices of the groups that are taken, these groups, counts): the first groups with a
      difference, in order; where they are too few, some without one, which are not valid.
    """
    chunks: list[Drawn] = []
    found = total = 0
    while found < many and len(chunks) < most:
        chunks.append(answer(len(chunks)))
        found += int(chunks[-1].differs.sum())
        total += len(chunks[-1].differs)
    drawn = joined(chunks)
    rows = np.argsort(~drawn.differs, kind="stable")[:many]
    drawn = at(rows, drawn)
    batch = drawn.batch
    valid = batch.valid & drawn.differs[:, None]
    unfilled = int((~drawn.differs).sum())
    tally = {
        "prompts": total, "ties_dropped": total - found - unfilled,
        "surplus": found + unfilled - many, "unfilled": unfilled,
    }  # fmt: skip
    return rows, drawn._replace(batch=batch._replace(valid=valid)), tally


def select(batch: Batch, keep: str) -> Batch:
    """All of a group, its best, or its best and worst: chosen and rejected.

    A group whose best and worst have the same reward is as a pair not valid. Of equally
    good responses the first is the best.
    """
    if keep == "all":
        return batch
    valid, feedback = np.asarray(batch.valid), np.asarray(batch.feedback)
    best = np.where(valid, feedback, -np.inf).argmax(1)
    worst = np.where(valid, feedback, np.inf).argmin(1)
    slots = np.stack([best] if keep == "best" else [best, worst], 1)
    b, g = valid.shape

    def take(x):
        if np.ndim(x) < 2 or np.shape(x)[:2] != (b, g):
            return x
        index = slots.reshape(*slots.shape, *[1] * (np.ndim(x) - 2))
        return np.take_along_axis(np.asarray(x), index, 1)

    out = jax.tree.map(take, batch)
    if keep == "best_worst":
        gap = np.asarray(out.feedback)[:, :1] > np.asarray(out.feedback)[:, 1:]
        out = out._replace(valid=out.valid & gap)
    return out


def at(rows: Any, tree: Any) -> Any:
    """The given rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def joined(trees: Sequence[Any]) -> Any:
    """The rows of all trees, one after another."""
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def slots(batch: Batch, which: slice) -> Batch:
    """The given responses of every group."""
    return jax.tree.map(lambda x: x[:, which] if x.ndim > 1 else x, batch)


def beside(batch: Batch, more: Batch) -> Batch:
    """The responses of both batches in one group; arrays [B] stay those of the first."""

    def both(a, b):
        return np.concatenate([a, b], 1) if a.ndim > 1 else a

    return jax.tree.map(both, batch, more)
