"""Negative preference optimisation beside gradient ascent, in closed form.

  ρ = log π(y) / π_ref(y)
  gradient ascent   L = log π(y)
  NPO               L = -(2/β) log σ(-βρ),   dL/dρ = 2σ(βρ) = 2π^β / (π^β + π_ref^β)

NPO's weight is 1 at the reference and vanishes as the answer is forgotten; as β → 0,
L - (2/β) log 2 → ρ and NPO is gradient ascent. On one logistic example, π = σ(z),
gradient ascent moves z by η per step without bound, NPO by (log t) / β in t steps.

Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868 (equations 3 and 4 and
theorem 2; the gradients printed in the paper have a wrong sign)
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reals = NDArray | np.float64  # numpy turns a 0-dimensional array into a scalar


def npo(log_ratio: ArrayLike, beta: float) -> Reals:
    """NPO's loss of an answer, in nats.

    Args:
      log_ratio: log π/π_ref, any shape, nats.
      beta: inverse temperature, > 0.

    Raises:
      ValueError: beta <= 0.
    """
    return 2 / _positive(beta) * np.logaddexp(0, beta * np.asarray(log_ratio, float))


def npo_weight(log_ratio: ArrayLike, beta: float) -> Reals:
    """dL/dρ, in (0, 2): NPO's factor on the gradient of gradient ascent.

    Args, Raises: as `npo`.
    """
    x = _positive(beta) * np.asarray(log_ratio, float)
    return 2 * np.exp(-np.logaddexp(0, -x))


def displacement(
    num_steps: int, *, beta: float | None = None, lr: float = 1.0, start: float = 1.0
) -> NDArray:
    """How far unlearning has moved the logit of one example after each step.

    Descent in z on the loss of π = σ(z), with π_ref = σ(start).

    Args:
      num_steps: steps of gradient descent.
      beta: NPO's; None is gradient ascent.
      lr: η, > 0.
      start: z before the first step.

    Returns:
      [num_steps + 1] distances start - z, the first of them 0.
    """
    out = np.zeros(num_steps + 1)
    z, before = start, _log_sigmoid(start)
    for step in range(num_steps):
        gradient = math.exp(_log_sigmoid(-z))  # d log σ(z) / dz
        if beta is not None:
            gradient *= float(npo_weight(_log_sigmoid(z) - before, beta))
        z -= lr * gradient
        out[step + 1] = start - z
    return out


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def _positive(beta: float) -> float:
    if beta <= 0:
        raise ValueError(f"beta={beta!r}, expected a number > 0")
    return beta
