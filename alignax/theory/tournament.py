"""Tournaments: rankings of M contestants from pairwise judgements of their responses.

  bracket       left and right half play their own brackets, then the winners each other
  P(i beats j) = p_i / (p_i + p_j) = σ(θ_i - θ_j)        Bradley-Terry, θ = log p
  θ*           = argmax Σ_{i,j} w_ij log σ(θ_i - θ_j),   Σ θ = 0
  R            = 1000 + 400 log10 p

w_ij are the points of i against j, a tie being half a point for each, plus a pseudo-win of
0.1 / (M - 1) for every ordered pair: a contestant without a loss stays finite. Of a prompt, a
bracket has M - 1 matches; all pairs are M (M - 1) / 2. If M is no power of two, some
contestants enter one match later.

The fit is one of maximum likelihood, because online Elo depends on the order of the matches.
Matches of one prompt depend on one another, so intervals resample prompts.

Source: Son et al. 2024, https://arxiv.org/abs/2411.01281; Bradley and Terry 1952,
https://doi.org/10.2307/2334029
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# (first [N], second [N]), contestants of N prompts -> points of the first, [N] in [0, 1]
Judge = Callable[[Ints, Ints], ArrayLike]

PRIOR = 0.1  # pseudo-wins of a contestant, over all others together


def bracket(m: int, start: int = 0) -> list[tuple[int, int]]:
    """Matches between the places of a bracket, in their order; the winner takes the first."""
    if m < 2:
        return []
    half = m // 2
    left, right = bracket(half, start), bracket(m - half, start + half)
    return [*left, *right, (start, start + half)]


def single_elimination(
    judge: Judge, n: int, m: int, rng: np.random.Generator
) -> Floats:
    """Points of one shuffled bracket a prompt.

    Args:
      judge: compares the responses of two contestants to every prompt.
      n: prompts.
      m: contestants.
      rng: shuffles brackets and the order of presentation, and draws who goes on after a
        tie.

    Returns:
      [N, M, M]: what i got against j on each prompt.
    """
    place = rng.permuted(np.tile(np.arange(m), (n, 1)), axis=1)
    points = np.zeros((n, m, m))
    for i, j in bracket(m):
        a, b = place[:, i], place[:, j]
        got = _play(judge, a, b, points, rng)
        wins = np.where(got == 0.5, rng.random(n) < 0.5, got > 0.5)
        place[:, i] = np.where(wins, a, b)
    return points


def all_pairs(judge: Judge, n: int, m: int, rng: np.random.Generator) -> Floats:
    """Points of all pairs on every prompt; as `single_elimination`."""
    points = np.zeros((n, m, m))
    for i in range(m):
        for j in range(i):
            _play(judge, np.full(n, i), np.full(n, j), points, rng)
    return points


def _play(
    judge: Judge, a: Ints, b: Ints, points: Floats, rng: np.random.Generator
) -> Floats:
    """Points of a against b, in a random order of presentation, added to [N, M, M]."""
    swap = rng.random(len(a)) < 0.5
    got = np.asarray(judge(np.where(swap, b, a), np.where(swap, a, b)), float)
    if not ((got >= 0) & (got <= 1)).all():
        raise ValueError(
            f"a match gave {got.min():g} to {got.max():g} points, expected [0, 1]"
        )
    got = np.where(swap, 1 - got, got)
    rows = np.arange(len(a))
    points[rows, a, b] += got
    points[rows, b, a] += 1 - got
    return got


def bradley_terry(
    points: ArrayLike, *, prior: float = PRIOR, steps: int = 200
) -> Floats:
    """θ of maximum likelihood, by Newton's method.

    Args:
      points: [..., M, M], what i got against j; the diagonal is not read.
      prior: pseudo-wins of a contestant, > 0, spread over the others.
      steps: most steps.

    Returns:
      [..., M] log-strengths in nats with mean 0.

    Raises:
      ValueError: fewer than two contestants, a negative or infinite number, or no prior.
      FloatingPointError: no maximum after `steps`.
    """
    w = np.array(points, float)
    m = w.shape[-1]
    if m < 2 or w.shape[-2] != m or not np.isfinite(w).all() or (w < 0).any():
        raise ValueError(f"points {w.shape} are no [..., M, M] of numbers >= 0, M >= 2")
    if not prior > 0:
        raise ValueError(f"prior is {prior}, expected a number above 0")
    w += prior / (m - 1)
    w[..., np.arange(m), np.arange(m)] = 0
    n = w + w.swapaxes(-1, -2)
    theta = np.zeros(w.shape[:-1])
    for _ in range(steps):
        chance = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        gradient = (w - n * chance).sum(-1)  # Σ_j w_ij - n_ij σ(θ_i - θ_j)
        if (np.abs(gradient) <= 1e-10 * n.sum((-1, -2))[..., None]).all():
            return theta - theta.mean(-1, keepdims=True)
        curvature = -n * chance * (1 - chance)
        curvature -= np.eye(m) * curvature.sum(-1)[..., None]
        # θ is free up to a constant, and the gradient has no part in that direction
        step = np.linalg.solve(curvature + 1 / m, gradient[..., None])[..., 0]
        # no strength moves by more than a nat: on sparse tables Newton overshoots
        theta += step / np.maximum(1, np.abs(step).max(-1, keepdims=True))
    raise FloatingPointError(f"Bradley-Terry found no maximum in {steps} steps")


def ratings(theta: ArrayLike) -> Floats:
    """R of log-strengths."""
    return 1000 + 400 * np.asarray(theta) / np.log(10)


def ranks(values: ArrayLike) -> Floats:
    """Ranks of [..., M] ratings, 1 the highest; equal ones share the mean of theirs."""
    r = np.asarray(values)
    above = (r[..., None, :] > r[..., :, None]).sum(-1)
    equal = (r[..., None, :] == r[..., :, None]).sum(-1)
    return above + (equal + 1) / 2


class Standings(NamedTuple):
    """Ratings and ranks of M contestants, with their 95 % intervals in rows lo and hi."""

    ratings: Floats  # [M]
    ranks: Floats  # [M]
    rating_interval: Floats  # [2, M]
    rank_interval: Floats  # [2, M]


def standings(
    points: ArrayLike, *, seed: int = 0, num_resamples: int = 1000
) -> Standings:
    """Fits the points of all prompts, and those of resampled prompts.

    Of a contestant without a loss, or without a win, the distance to the others is decided by
    the prior, in every resample too: read its rating and interval as a bound.

    Args:
      points: [N, M, M] of `single_elimination` or `all_pairs`.
      seed: of the bootstrap.
      num_resamples: how often N prompts are drawn with replacement.
    """
    w = np.asarray(points, float)
    n, m, _ = w.shape
    found = ratings(bradley_terry(w.sum(0)))
    rng = np.random.default_rng(seed)
    times = rng.multinomial(n, np.full(n, 1 / n), num_resamples)  # of each prompt
    drawn = ratings(bradley_terry((times @ w.reshape(n, m * m)).reshape(-1, m, m)))
    intervals = (np.quantile(x, (0.025, 0.975), 0) for x in (drawn, ranks(drawn)))
    return Standings(found, ranks(found), *intervals)
