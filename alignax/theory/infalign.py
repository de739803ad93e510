"""InfAlign: alignment for the win rate after an inference-time procedure.

All functions are of quantiles. u in [0, 1] is the calibrated reward of a response under the
reference, f(u) the density of the aligned policy's responses at u (1 for the reference),
F its distribution function. For a procedure that reweights a policy by its own quantiles,
T(π) ∝ π q(C_π) with Q = ∫ q, the win rate of f against the reference under T is W:

  W(f)  = 1 - ∫ Q(F(v)) q(v) dv,      KL(f) = ∫ f log f
  f*    ∝ exp(Φ*/β),   Φ*(u) = ∫₀ᵘ q(F*(v)) q(v) dv          the optimum, a fixed point

Φ* and f* depend neither on the reward nor on the model or the prompt: Φ* is tabulated once.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792; the order-statistic and
keep-top procedures are ours. KL(best-of-N) is Beirami et al.'s bound,
https://arxiv.org/abs/2401.01879.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Grid = np.ndarray  # values at GRID
GRID = np.linspace(0.0, 1.0, 6001)


class Procedure(NamedTuple):
    """A reweighting by quantiles: density q and distribution function Q on [0, 1]."""

    name: str
    density: Callable[[np.ndarray], np.ndarray]
    mass: Callable[[np.ndarray], np.ndarray]


@functools.cache
def standard() -> Procedure:
    """One sample."""
    return Procedure("standard", np.ones_like, lambda p: p)


@functools.cache
def best_of(n: int) -> Procedure:
    """The best of n samples, n >= 1."""
    _whole("n", n)
    return Procedure(f"best-of-{n}", lambda p: n * p ** (n - 1), lambda p: p**n)


@functools.cache
def worst_of(n: int) -> Procedure:
    """The worst of n samples, n >= 1: a jailbreak by n attempts."""
    _whole("n", n)
    return Procedure(
        f"worst-of-{n}",
        lambda p: n * (1 - p) ** (n - 1),
        lambda p: 1 - (1 - p) ** n,
    )


@functools.cache
def order_statistic(j: int, n: int) -> Procedure:
    """The j-th smallest of n samples, 1 <= j <= n."""
    _whole("n", n)
    if not 1 <= j <= n:
        raise ValueError(f"j is {j}, expected 1 to n={n}")

    def density(p):
        return n * math.comb(n - 1, j - 1) * p ** (j - 1) * (1 - p) ** (n - j)

    def mass(p):
        # P(at least j of n uniforms are below p): all terms are >= 0, so none cancel
        terms = (math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(j, n + 1))
        return np.minimum(sum(terms), 1.0)

    return Procedure(f"{j}-of-{n}", density, mass)


@functools.cache
def keep_top(tau: float) -> Procedure:
    """A sample from the top 1 - tau of the policy's own responses, 0 <= tau < 1."""
    if not 0 <= tau < 1:
        raise ValueError(f"tau is {tau}, expected [0, 1)")
    return Procedure(
        f"keep-top-{1 - tau:g}",
        lambda p: (np.asarray(p) >= tau) / (1 - tau),
        lambda p: np.maximum(0.0, (p - tau) / (1 - tau)),
    )


# -- transforms of the calibrated reward, nondecreasing on [0, 1]


def identity(u: np.ndarray) -> np.ndarray:
    """Φ(u) = u: the optimum for the standard win rate."""
    return np.asarray(u, float)


def log(u: np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """Φ(u) = log max(u, floor), 0 <= floor < 1; with β = 1/(N-1) the policy is best-of-N."""
    if not 0 <= floor < 1:
        raise ValueError(f"floor is {floor}, expected [0, 1)")
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(u, floor))


def exponential(u: np.ndarray, *, t: float) -> np.ndarray:
    """Φ(u) = e^{t(u-1)} for t > 0, -e^{tu} for t < 0: within [-1, 1], always increasing.

    t > 0 is for best-of-N, t < 0 for worst-of-N; the factor that bounds Φ only rescales β.
    """
    if t == 0:
        raise ValueError("t is 0, expected another number (the limit is the identity)")
    u = np.asarray(u, float)
    return np.exp(t * (u - 1)) if t > 0 else -np.exp(t * u)


def top_quantile(u: np.ndarray, *, tau: float) -> np.ndarray:
    """Φ(u) = 1[u >= tau], 0 < tau < 1."""
    if not 0 < tau < 1:
        raise ValueError(f"tau is {tau}, expected (0, 1)")
    return (np.asarray(u) >= tau).astype(float)


# -- policies as densities on GRID


def tilt(phi: Grid, beta: float) -> Grid:
    """f ∝ exp(Φ/β), normalised on GRID; the optimum of E Φ - β KL.

    Args:
      phi: Φ on GRID; -inf is a density of 0.
      beta: KL strength, > 0.
    """
    _positive("beta", beta)
    exponent = np.asarray(phi, float) / beta
    f = np.exp(exponent - exponent.max())
    return f / _integral(f)


def win_rate(f: Grid, procedure: Procedure) -> float:
    """P that a response of T(policy) beats one of T(reference), ties impossible."""
    # midpoints of cells in F, differences of Q: second order, and exact where q jumps
    cdf = _cdf(f)
    middle = procedure.mass((cdf[1:] + cdf[:-1]) / 2)
    ends = (procedure.mass(cdf[1:]) + procedure.mass(cdf[:-1])) / 2
    return float(1 - np.sum((2 * middle + ends) / 3 * np.diff(procedure.mass(GRID))))


def kl(f: Grid) -> float:
    """KL(policy ‖ reference) in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(f > 0, f * np.log(f), 0.0)
    return float(_integral(terms))


ITERATIONS = 20_000


def optimal(procedure: Procedure, beta: float) -> tuple[Grid, Grid]:
    """(Φ*, f*) on GRID: the optimal transform and its policy.

    For best-of-N the objective is strictly concave and the optimum unique; for
    worst-of-N uniqueness is not proved. The plain iteration oscillates at small β. This
    one is damped in log f, and the damping grows where the iteration does not contract.

    Raises:
      ValueError: beta <= 0.
      RuntimeError: the iteration did not converge; the optimum is too sharp for GRID.
    """
    _positive("beta", beta)
    log_f = _optimal(procedure, float(beta))
    phi = _transform(procedure, _cdf(np.exp(log_f)))
    return phi, np.exp(log_f)


@functools.lru_cache(maxsize=256)
def _optimal(procedure: Procedure, beta: float) -> Grid:
    """log f* on GRID."""
    x = np.zeros_like(GRID)
    damping, before, left = 0.5, np.inf, 4
    for _ in range(ITERATIONS):
        y = _transform(procedure, _cdf(np.exp(x))) / beta
        y -= y.max()
        y -= np.log(_integral(np.exp(y)))
        apart = np.abs(np.exp(y) - np.exp(x)).max() / np.exp(y.max())
        if apart < 1e-10:
            return y
        left -= 1
        if not left:  # after as many iterations as a contraction needs for a factor e⁻²
            damping = damping / 2 if apart > before / 2 else damping
            before, left = apart, int(np.ceil(2 / damping))
        x = x + damping * (y - x)
        x -= x.max()
        x -= np.log(_integral(np.exp(x)))
    raise RuntimeError(
        f"{procedure.name} at beta={beta}: no fixed point on {len(GRID)} points"
    )


def _transform(procedure: Procedure, cdf: Grid) -> Grid:
    """Φ(u) = ∫₀ᵘ q(F(v)) q(v) dv; q(F) is its mean over each cell, so q may jump."""
    rise = np.diff(cdf)
    middle = procedure.density((cdf[1:] + cdf[:-1]) / 2)
    mean = np.diff(procedure.mass(cdf)) / np.maximum(rise, 1e-7)
    steps = np.where(rise > 1e-7, mean, middle) * np.diff(procedure.mass(GRID))
    return np.concatenate([[0.0], np.cumsum(steps)])


def at_kl(policy: Callable[[float], Grid], target: float) -> tuple[float, Grid]:
    """(β, f) of a family of policies whose KL is `target` nats, by bisection of log β.

    Args:
      policy: β -> density on GRID; its KL falls with β.
      target: KL in nats, > 0.

    Raises:
      ValueError: no β in [2^-10, 2^10] reaches it.
    """
    _positive("target", target)
    low, high = 0.0, 0.0  # log2 β
    while kl(policy(2.0**low)) < target:
        high, low = low, low - 1
        if low < -10:
            raise ValueError(f"no beta in [2^-10, 2^10] gives a KL of {target}")
    while kl(policy(2.0**high)) > target:
        low, high = high, high + 1
        if high > 10:
            raise ValueError(f"no beta in [2^-10, 2^10] gives a KL of {target}")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if kl(policy(2.0**middle)) > target else (low, middle)
        )
    return 2.0**high, policy(2.0**high)


# -- closed forms


def kl_best_of(n: int) -> float:
    """KL(best-of-n ‖ reference) without ties; with atoms an upper bound."""
    _whole("n", n)
    return float(np.log(n) - (n - 1) / n)


def identity_closed(beta: float) -> tuple[float, float]:
    """(standard win rate, KL) of Φ(u) = u."""
    _positive("beta", beta)
    a = 1 / beta
    wins = float(1 / -np.expm1(-a) - 1 / a)
    return wins, float(a * wins - (a + np.log(-np.expm1(-a)) - np.log(a)))


def log_closed(beta: float) -> tuple[float, float]:
    """(win rate under best-of-N, the same for every N; KL) of Φ(u) = log u."""
    _positive("beta", beta)
    a = 1 / beta
    return (a + 1) / (a + 2), float(np.log1p(a) - a / (1 + a))


# -- language models with finitely many responses: ties count half


def discrete_win_rate(
    policy: np.ndarray, reference: np.ndarray, n: int, *, best: bool
) -> float:
    """Best-of-n (or worst-of-n) win rate of two distributions of outcomes.

    Args:
      policy, reference: probabilities [K] of outcomes, lowest reward first; equal rewards
        are one outcome.
      n: samples on each side.
      best: best-of-n, else worst-of-n.
    """
    _whole("n", n)
    if not best:  # a loss in best-of-n under the negated reward
        return 1 - discrete_win_rate(policy[::-1], reference[::-1], n, best=True)
    g, h = (np.concatenate([[0.0], np.cumsum(p)]) ** n for p in (policy, reference))
    return float(np.sum(np.diff(g) * (h[1:] + h[:-1]) / 2))


def discrete_reward(policy: np.ndarray, reference: np.ndarray, n: int) -> np.ndarray:
    """∂W/∂π of the best-of-n win rate, [K], up to a constant: the fixed point's reward."""
    _whole("n", n)
    g = np.cumsum(policy)
    h = np.concatenate([[0.0], np.cumsum(reference)]) ** n
    c = (h[1:] + h[:-1]) / 2
    lost = n * g[:-1] ** (n - 1) * np.diff(c)
    return n * c[-1] - np.concatenate([np.cumsum(lost[::-1])[::-1], [0.0]])


def discrete_optimal(reference: np.ndarray, n: int, beta: float) -> np.ndarray:
    """The distribution [K] with the largest best-of-n win rate less β KL."""
    _positive("beta", beta)
    reference = np.asarray(reference, float)
    policy, damping, before = reference, 0.3, np.inf
    for _ in range(50_000):
        exponent = np.log(reference) + discrete_reward(policy, reference, n) / beta
        fresh = np.exp(exponent - exponent.max())
        fresh /= fresh.sum()
        change = float(np.abs(fresh - policy).max())
        if change < 1e-13:
            return fresh
        if change > before:
            damping = max(damping * 0.7, 0.005)
        before = change
        policy = (1 - damping) * policy + damping * fresh
    raise RuntimeError(f"best-of-{n} at beta={beta}: no fixed point found")


# -- calibration from K samples


def exp_bias(t: float, k: int, quantile: np.ndarray) -> np.ndarray:
    """E[e^{tĈ}] / e^{tC}, where Ĉ is the share of k reference samples below.

    Args:
      t: exponent.
      k: reference samples per prompt.
      quantile: C, the true calibrated reward, in [0, 1].
    """
    _whole("k", k)
    c = np.asarray(quantile, float)
    return np.asarray((1 - c + c * np.exp(t / k)) ** k * np.exp(-t * c))


def _integral(y: Grid) -> float:
    return float(np.trapezoid(y, GRID))


def _cumulative(y: Grid) -> Grid:
    steps = (y[1:] + y[:-1]) / 2 * np.diff(GRID)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _cdf(f: Grid) -> Grid:
    total = _cumulative(f)
    return np.clip(total / total[-1], 0.0, 1.0)


def _whole(name: str, value: int) -> None:
    if value != int(value) or value < 1:
        raise ValueError(f"{name} is {value}, expected a whole number >= 1")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected > 0")
