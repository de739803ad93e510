"""Ranking accuracy of preference learning: of an ideal policy, and at a given loss.

  R  = 1[π(y₊) ≥ π(y₋)]                       ranking accuracy of a pair
  c  = log π_ref(y₋) / π_ref(y₊)              difficulty of the pair under the reference
  DPO:  R = 1  ⇔  L ≤ -log σ(βc)
  π*(y₊)/π*(y₋) = π_ref(y₊)/π_ref(y₋) · (α/(1-α))^{1/β},   α = P(y₊ ≻ y₋)
  R* = 1[-c + logit(α)/β > 0]                 of the ideal policy
  IPO:  at zero loss the log-ratio has moved by 1/(2β), so R = 1  ⇔  c ≤ 1/(2β)

Source: Chen et al. 2024, https://arxiv.org/abs/2405.19534 (the line on IPO is derived
here from its loss, Azar et al. 2023, https://arxiv.org/abs/2310.12036)
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reals = NDArray | np.float64  # numpy turns a 0-dimensional array into a scalar

CERTAIN = 1e-3  # error rate assumed for an annotator who never errs


def accuracy(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Share of pairs with π(y₊) ≥ π(y₋).

    Args:
      chosen, rejected: log-probabilities, nats; sums, or means over tokens for the
        length-normalised R̃.
    """
    return float(np.mean(np.asarray(chosen) >= np.asarray(rejected)))


def difficulty(ref_chosen: ArrayLike, ref_rejected: ArrayLike) -> Reals:
    """c in nats: by how much the reference prefers the rejected response."""
    return np.asarray(ref_rejected, float) - np.asarray(ref_chosen, float)


def dpo_loss(log_ratio: ArrayLike, beta: float) -> Reals:
    """-log σ(βh) for the difference h of the two log-ratios, nats."""
    return np.logaddexp(0, -beta * np.asarray(log_ratio, float))


def dpo_loss_that_ranks(c: ArrayLike, beta: float) -> Reals:
    """The largest DPO loss at which a pair of difficulty c is ranked right."""
    return np.logaddexp(0, -beta * np.asarray(c, float))


def ideal_log_ratio(c: ArrayLike, alpha: ArrayLike, beta: float) -> Reals:
    """log π*(y₊)/π*(y₋) of the population optimum, nats.

    Args:
      c: difficulty, nats.
      alpha: probability that y₊ is preferred, in [0, 1]; clipped to CERTAIN..1 - CERTAIN.
      beta: KL strength, > 0.
    """
    a = np.clip(np.asarray(alpha, float), CERTAIN, 1 - CERTAIN)
    return np.log(a / (1 - a)) / beta - np.asarray(c, float)


def ideal_accuracy(c: ArrayLike, alpha: ArrayLike, beta: float) -> float:
    """R*: the share of pairs that the ideal policy ranks right. Args as above."""
    return float(np.mean(ideal_log_ratio(c, alpha, beta) > 0))


def ipo_ranks(c: ArrayLike, beta: float) -> NDArray | np.bool_:
    """Whether a pair of difficulty c is ranked right at zero IPO loss."""
    return np.asarray(c, float) <= 1 / (2 * beta)
