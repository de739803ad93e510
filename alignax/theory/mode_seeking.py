"""On-policy sampling and negative gradients against maximum likelihood, on a bandit.

Maximum likelihood on filtered samples minimises the forward KL to a fixed distribution: its
optimum covers all modes and gives no action more probability than the target does. With
samples of the policy itself the target changes with the policy, and the reverse KL lowers
actions that are unlikely under the target. With logits as parameters,

  -∇ KL(q ‖ π) = q - π                 forward: slow where q is small
  -∇ KL(π ‖ q) = π (A - E_π A),   A = log q/π     reverse: relative, also negative

and the best of n samples of p, whose reward ranks a at level u = F(r(a)), has the
distribution p⁽ⁿ⁾ = F(r)ⁿ - F⁻(r)ⁿ, shared by the actions of one level in proportion to p.

Source: Tajwar et al. 2024, https://arxiv.org/abs/2404.14367
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def squashed_cauchy(
    num_actions: int = 100, *, loc: float = -0.7, scale: float = 0.4
) -> NDArray:
    """The bandit's data distribution: tanh of a Cauchy variable, binned over [-1, 1].

    Args:
      num_actions: equal bins of [-1, 1].
      loc, scale: of the Cauchy variable before the tanh.

    Returns:
      [num_actions] probabilities, exact.
    """
    with np.errstate(divide="ignore"):  # the outer edges are at infinity
        edges = np.arctanh(np.linspace(-1, 1, num_actions + 1))
    return np.diff(np.arctan((edges - loc) / scale) / np.pi)


def bump(num_actions: int = 100, *, peak: float = 70, width: float = 10) -> NDArray:
    """The bandit's reward exp(-((a - peak) / width)²) of actions 0, 1, ..., in (0, 1]."""
    return np.exp(-(((np.arange(num_actions) - peak) / width) ** 2))


def best_of_n(probs: ArrayLike, reward: ArrayLike, n: int) -> NDArray:
    """The exact distribution of the best of n independent samples, ties broken at random.

    Args:
      probs: [A].
      reward: [A].
      n: samples, >= 1.

    Raises:
      ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}, expected at least one sample")
    p, r = np.asarray(probs, float), np.asarray(reward, float)
    levels, level = np.unique(r, return_inverse=True)
    mass = np.bincount(level, p, len(levels))
    cdf = np.cumsum(mass)
    won = cdf**n - np.concatenate([[0.0], cdf[:-1]]) ** n
    share = np.divide(p, mass[level], out=np.zeros_like(p), where=mass[level] > 0)
    return share * won[level]


def tilted(reference: ArrayLike, reward: ArrayLike, beta: float) -> NDArray:
    """π_ref e^{r/β} / Z: what maximises E r - β KL(π ‖ π_ref)."""
    log = np.log(np.asarray(reference, float)) + np.asarray(reward, float) / beta
    log = np.exp(log - log.max())
    return log / log.sum()


def kl(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p ‖ q) in nats; actions of probability 0 under p add 0."""
    p, q = np.asarray(p, float), np.asarray(q, float)
    some = p > 0
    with np.errstate(divide="ignore"):
        return float(p[some] @ (np.log(p[some]) - np.log(q[some])))


def forward_direction(policy: ArrayLike, target: ArrayLike) -> NDArray:
    """-∇ KL(target ‖ policy) in the policy's logits: maximum likelihood."""
    return np.asarray(target, float) - np.asarray(policy, float)


def reverse_direction(policy: ArrayLike, target: ArrayLike) -> NDArray:
    """-∇ KL(policy ‖ target) in the policy's logits: the KL-regularised policy gradient."""
    p = np.asarray(policy, float)
    advantage = np.log(np.asarray(target, float)) - np.log(p)
    return p * (advantage - p @ advantage)
