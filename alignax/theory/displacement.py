"""Likelihood displacement, the change of probabilities when a pair is learned, and CHES.

With h_k the state from which token k of a response is predicted (k = 1 is the last
prompt token; the state at the last token predicts none of them and is left out) and
S_y = Σ_k h_k, the centred hidden embedding similarity is

  CHES = ⟨S₊, S₋⟩ - ‖S₊‖²        its length-normalised form divides S by |y|

A high CHES predicts that learning y₊ ≻ y₋ makes y₊ less likely. For single tokens, a
gradient step on both h and the output rows W, and up to a common rate,

  d log π(z) = ⟨W_z - W̄, W₊ - W₋⟩ + ‖h‖² (1[z=+] - 1[z=-] - π₊ + π₋),   W̄ = Σ_v π_v W_v

With W frozen only the first term is left: any loss on the margin moves h along W₊ - W₋,
and probability moves to the tokens whose rows lie in that direction.

Source: Razin et al. 2024, https://arxiv.org/abs/2410.08847
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def ches(chosen: ArrayLike, rejected: ArrayLike, *, normalised: bool = False) -> float:
    """CHES of one pair.

    Args:
      chosen: [|y₊|, D], the states that predict the chosen response's tokens.
      rejected: [|y₋|, D].
      normalised: mean states instead of sums.

    Raises:
      ValueError: states that are not two matrices of one width.
    """
    plus, minus = _states(chosen), _states(rejected)
    if plus.shape[1] != minus.shape[1]:
        raise ValueError(f"states of width {plus.shape[1]} and {minus.shape[1]}")
    reduce = np.mean if normalised else np.sum
    plus, minus = reduce(plus, 0), reduce(minus, 0)
    return float(plus @ minus - plus @ plus)


def last_inner(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """⟨h_{|y₊|}, h_{|y₋|}⟩, which does not predict displacement according to the paper."""
    return float(_states(chosen)[-1] @ _states(rejected)[-1])


def drift(
    weights: ArrayLike, state: ArrayLike, chosen: int, rejected: int, *,
    frozen: bool = False,
) -> NDArray:  # fmt: skip
    """d log π(z) of every token z at the first step on a single-token pair.

    Args:
      weights: W, [V, D] output rows.
      state: h, [D].
      chosen, rejected: ids of the two tokens.
      frozen: only h is trained.

    Returns:
      [V] rates in units of the loss's derivative by the margin.
    """
    w, h = np.asarray(weights, float), np.asarray(state, float)
    pi = _softmax(w @ h)
    rate = (w - pi @ w) @ (w[chosen] - w[rejected])
    if frozen:
        return rate
    own = -np.full(len(w), pi[chosen] - pi[rejected])
    own[chosen] += 1
    own[rejected] -= 1
    return rate + (h @ h) * own


def after_margin(
    weights: ArrayLike, probs: ArrayLike, chosen: int, rejected: int, margin: float
) -> NDArray:
    """The next-token distribution after training h alone until the margin grew by `margin`.

    Args:
      weights: W, [V, D], frozen.
      probs: [V], the distribution before.
      chosen, rejected: ids of the two tokens, with different rows.
      margin: nats gained by log π(chosen) - log π(rejected).

    Returns:
      [V] probabilities; they are the same for every loss on the margin, which moves h along
      W₊ - W₋.
    """
    w = np.asarray(weights, float)
    way = w[chosen] - w[rejected]
    return _softmax(np.log(np.asarray(probs, float)) + margin * (w @ way) / (way @ way))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation of two samples without ties."""
    first, second = (np.argsort(np.argsort(np.asarray(a))) for a in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def _states(x: ArrayLike) -> NDArray:
    x = np.asarray(x, float)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"states have shape {x.shape}, expected [tokens, width]")
    return x


def _softmax(x: NDArray) -> NDArray:
    x = np.exp(x - x.max())
    return x / x.sum()
