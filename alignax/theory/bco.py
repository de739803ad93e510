"""Binary classifier optimisation: a bound on the DPO loss, tightest at one shift.

With implicit rewards a of the chosen and b of the rejected response and any shift δ,

  (1 + e^{-(a-δ)}) (1 + e^{b-δ}) = 1 + e^{-(a-b)} + [e^{-(a-δ)} + e^{b-δ}]
  BCE = -log σ(a-δ) - log σ(-(b-δ))  >  -log σ(a-b) = DPO

and the excess in brackets is least at δ = (a + b)/2, where it is 2e^{-(a-b)/2}.
If p₊ and p₋ are the densities of desirable and undesirable responses, BCE is least at

  r(y) - δ = log p₊(y)/p₋(y)

Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reals = NDArray | np.float64  # numpy turns a 0-dimensional array into a scalar


def bce(chosen: ArrayLike, rejected: ArrayLike, shift: ArrayLike) -> Reals:
    """The classifier's loss on a pair of implicit rewards, nats."""
    a, b, d = (np.asarray(x, float) for x in (chosen, rejected, shift))
    return np.logaddexp(0, -(a - d)) + np.logaddexp(0, b - d)


def dpo(chosen: ArrayLike, rejected: ArrayLike) -> Reals:
    """-log σ(a - b)."""
    return np.logaddexp(0, np.asarray(rejected, float) - np.asarray(chosen, float))


def excess(chosen: ArrayLike, rejected: ArrayLike, shift: ArrayLike) -> Reals:
    """e^BCE - e^DPO = e^{-(a-δ)} + e^{b-δ} > 0."""
    a, b, d = (np.asarray(x, float) for x in (chosen, rejected, shift))
    return np.exp(d - a) + np.exp(b - d)


def best_shift(chosen: ArrayLike, rejected: ArrayLike) -> Reals:
    """The δ of least excess for one pair: (a + b)/2."""
    return (np.asarray(chosen, float) + np.asarray(rejected, float)) / 2


def optimum(liked: ArrayLike, disliked: ArrayLike) -> Reals:
    """r(y) - δ at the population's optimum: log p₊(y)/p₋(y)."""
    return np.log(np.asarray(liked, float)) - np.log(np.asarray(disliked, float))
