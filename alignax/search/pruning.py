"""Pruning of candidates: the best ones by log p + h, without computing every h.

log p is known, h costs a look-ahead. If h has known bounds, so has every score. The best
candidates are known as soon as no other candidate can still have a better score.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from alignax.search import hypotheses
from alignax.search.hypotheses import Hypotheses


def settle(
    logps: np.ndarray,
    candidates: Hypotheses,
    look: Callable[[Hypotheses, np.ndarray], tuple[Any, Any]],
    winners: int,
    many: int,
    bounds: tuple[float, float] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best candidates of every set. *Exact*: true bounds do not change the result.

    Ties go to the more likely candidate. One with the score -inf is among the best only if
    all have that score.

    Args:
      logps: [B, S, C] float64, of S sets per prompt with C candidates each, most likely
        first; -inf where there is none.
      candidates: [B, S * C].
      look: the look-ahead, of (hypotheses [B, K], where [B, K]): h [B, K], and the `many`
        tokens that follow.
      winners: W, how many of each set.
      many: see `look`.
      bounds: of h, finite. None: h of every candidate is computed; otherwise of
        `winners` candidates at a time, most likely first.

    Returns:
      Indices [B, S, W] of C, in order; which of them exist, [B, S, W]; the tokens that
      follow them, [B, S, W, many], -1 without a look-ahead.
    """
    n, s, c = logps.shape
    winners = min(winners, c)
    real = np.isfinite(logps)
    low, high = (
        np.full(logps.shape, x)
        for x in ((-np.inf, np.inf) if bounds is None else bounds)
    )
    follow = np.full((n, s, c, many), -1)
    seen = ~real
    while True:
        lower = np.where(real, logps + low, -np.inf)
        best = np.argsort(-lower, 2, kind="stable")[..., :winners]
        todo = ~seen
        if bounds is not None:
            upper = np.where(real, logps + high, -np.inf)
            todo &= ~_settled(lower, upper, best)
        if not todo.any():
            break
        index = np.argsort(~todo, 2, kind="stable")
        index = index[..., : c if bounds is None else winners]
        mine = np.take_along_axis(todo, index, 2)
        flat = (index + c * np.arange(s)[:, None]).reshape(n, -1)
        h, tokens = look(hypotheses.take(candidates, flat), mine.reshape(n, -1))
        at = (*np.nonzero(mine)[:2], index[mine])
        seen[at] = True
        low[at] = high[at] = h.reshape(mine.shape)[mine]
        follow[at] = tokens.reshape(*mine.shape, many)[mine]
    best = np.sort(best, 2)
    score = np.take_along_axis(lower, best, 2)
    hopeless = np.isneginf(score) & np.isfinite(lower).any(2, keepdims=True)
    exist = np.take_along_axis(real, best, 2) & ~hopeless
    return best, exist, np.take_along_axis(follow, best[..., None], 2)


def _settled(lower, upper, best):
    """[B, S, 1] whether `best` are the best for all values within the bounds."""
    wins = np.zeros(lower.shape, bool)
    np.put_along_axis(wins, best, True, 2)
    # of a tie the more likely one is evaluated first, and is among `best`
    beats = lower[..., :, None] >= upper[..., None, :]
    loses = ~wins[..., None, :]
    return (beats | ~(wins[..., :, None] & loses)).all((2, 3))[..., None]
