"""Pairs from groups of scored responses: which two of them are compared.

Source: best against worst and against random, as in WildFeedback and CodeUltraFeedback
(Shi et al. 2024, https://arxiv.org/abs/2408.15549; Weyssow et al. 2024,
https://arxiv.org/abs/2403.09032)
"""

import array
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignax.batch import Example
from alignax.data import Examples, wrapped

STRATEGIES = ("best_worst", "best_random", "all")


def examples(
    *,
    split: str,
    source: Mapping[str, Any],
    strategy: str = "best_worst",
    margin: float = 0.0,
    seed: int = 0,
) -> Examples:
    """Preference pairs of an inner data set whose responses have scores as feedback.

    Args:
      split: of the inner data set.
      source: the inner data set, {'name': ..., its own parameters}.
      strategy: 'best_worst', 'best_random' (the best against one drawn among the worse),
        or 'all' (every ordered pair).
      margin: a pair whose scores differ by no more than this is a tie, >= 0.
      seed: of the draws.

    Returns:
      The pairs, chosen first, with their scores as feedback. Prompts without one are in
      `report['dropped']`, beside what the inner data set reports.

    Raises:
      ValueError: unknown strategy, negative margin, a response without a score, or no
        pair at all.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, expected one of {STRATEGIES}")
    if margin < 0:
        raise ValueError(f"margin is {margin}, expected at least 0")
    inner = wrapped(source, split)
    if not len(inner):  # a split that is to have no rows
        return inner
    dropped: list[str] = []
    places = array.array("q")  # (group, number within it, better, worse) after another
    for i, group in enumerate(inner):
        if len(group.feedback) != len(group.responses):
            raise ValueError(
                f"{group.id}: {len(group.responses)} responses, but "
                f"{len(group.feedback)} scores"
            )
        found = _pairs(group, strategy, margin, np.random.default_rng([seed, i]))
        if not found:
            dropped.append(
                f"{group.id}: no two responses differ by more than {margin:g}"
            )
        for k, (a, b) in enumerate(found):
            places.extend((i, k, a, b))
    if not places:
        raise ValueError(f"no pair among {len(inner)} groups; first: {dropped[:1]}")
    rows = np.array(places).reshape(-1, 4)
    convert = functools.partial(_pair, inner)
    return inner.over(rows, convert, {"dropped": dropped} if dropped else None)


def _pair(inner: Examples, row: np.ndarray) -> Example:
    i, k, a, b = row.tolist()
    group = inner[i]
    return group._replace(
        id=f"{group.id}/{k}",
        responses=(group.responses[a], group.responses[b]),
        feedback=(group.feedback[a], group.feedback[b]),
        form="pairs",
    )


def _pairs(group: Example, strategy: str, margin: float, rng) -> list[tuple[int, int]]:
    """(better, worse) indices, no tie and no response against its own copy."""
    score = group.feedback
    order = sorted(range(len(score)), key=lambda i: -score[i])
    better = [
        (a, b)
        for k, a in enumerate(order)
        for b in order[k + 1 :]
        if score[a] - score[b] > margin and group.responses[a] != group.responses[b]
    ]
    if strategy == "all" or not better:
        return better
    best = [pair for pair in better if pair[0] == better[0][0]]
    return [best[-1] if strategy == "best_worst" else best[rng.integers(len(best))]]
