"""The score at which AFT's boundary constraint keeps a negative.

  L_A  = log(1 + Σ_p Σ_n e^{s_n - s_p})
  L_BC = log(1 + Σ_p Σ_n [e^{s_n - s_p} + e^{T_p - s_n}]),   T_p = 2B - s_p
  B    = min_p s_p - β_b   (a constant for the gradient)

L_A has no minimum: gradient descent lowers every negative without bound. Under L_BC,
∂L/∂s_n = 0 is equivalent to e^{2s_n} Σ_p e^{-s_p} = e^{2B} Σ_p e^{-s_p}: the minimum is at
s_n = B, for any scores of the positives.

Source: Wang et al. 2023, https://arxiv.org/abs/2309.02144
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def boundary(positive: ArrayLike, margin: float) -> float:
    """B = min_p s_p - β_b; scores s are mean log-probabilities, nats per token."""
    return float(np.min(np.asarray(positive, float)) - margin)


def slope(
    positive: ArrayLike, negative: ArrayLike, margin: float | None = None
) -> NDArray:
    """∂L/∂s_n for every negative.

    Args:
      positive: [P] scores of right answers, P >= 1.
      negative: [N] scores of wrong answers.
      margin: β_b of the boundary; None is L_A, without a constraint.

    Returns:
      [N] derivatives: positive where gradient descent lowers a negative's score.
    """
    p, n = np.asarray(positive, float)[:, None], np.asarray(negative, float)[None]
    push = np.exp(n - p)
    pull = np.zeros_like(push)
    if margin is not None:
        pull = np.exp(2 * boundary(positive, margin) - p - n)
    return (push - pull).sum(0) / (1 + (push + pull).sum())
