"""CTRL: calibrates the reward under the reference, transforms it for a decoding procedure.

  Ĉ(x, y) = 1/K Σ_i [1{r(x,y) > r(x,z_i)} + 1/2 1{r(x,y) = r(x,z_i)}],   z_i ~ π_ref(·|x)
  r ← Φ(Ĉ(x, y))

KL-regularised RL on Φ(Ĉ) maximises the win rate after an inference-time procedure, if Φ
is the procedure's transform (theory/infalign.py). The quantile is relative to the prompt's
own reference samples. Increasing transforms of the raw reward do not change it, its mean
under the reference is 1/2, ties included, and its standard deviation is at most 1/(2√K).
It is 1 for every response above all K samples, so K should be well above |t|.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792
Differs from the paper: estimates of the quantile beside the plain one, the correction of
e^{tĈ}, and the 'best_of', 'optimal' and 'top' transforms.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch
from alignax.theory import infalign

STAGE = "reward"
RANGES = {
    "floor": "[0, 1)",
    "n": "[2, inf)",
    "beta": "(0, inf)",
    "tau": "(0, 1)",
    "t": "(-inf, inf)",
}
CALIBRATIONS = (
    "ecdf",
    "laplace",
    "interpolated",
    "leave_one_out",
    "gaussian",
    "global",
)
TRANSFORMS = ("identity", "log", "exp", "best_of", "optimal", "top")
PROCEDURES = ("best_of", "worst_of")
STEEPEST = 1.25  # |t|/K up to which the correction of e^{tĈ} keeps its order


def BASELINE(hyper: Mapping[str, Any]) -> str:
    """Source of the rewards that `hyper` compares with."""
    return "pool" if hyper["calibration"] == "global" else "reference"


def check(*, transform: str, beta: float, **_) -> None:
    """Raises ValueError for transform 'optimal' in a run without a KL strength."""
    if transform == "optimal" and not beta > 0:
        raise ValueError(
            "transform 'optimal' is tabulated for a KL strength of whole responses, which "
            "only a penalty in the reward has (config.shaping.kl), and no loss beside it"
        )


def shape(
    batch: Batch,
    baseline: Float[Array, "R K"],
    *,
    calibration: str = "ecdf",
    transform: str = "exp",
    t: float = 10.0,
    debias: bool = False,
    floor: float = 0.01,
    n: int = 4,
    procedure: str = "best_of",
    beta: float = 0.2,
    tau: float = 0.5,
) -> Float[Array, "B G T"]:
    """The transformed quantile, as the reward of the last scored token.

    Args:
      batch: feedback [B, G], raw rewards; valid [B, G].
      baseline: rewards of K reference samples per prompt; one row of all samples where
        calibration is 'global'.
      calibration: how the quantile is estimated, see `calibrate`.
      transform: Φ. 'identity'; 'log', of at least `floor`; 'exp', e^{t(u-1)} for t > 0
        and -e^{tu} for t < 0; 'best_of', (n-1) log u, whose optimum at a KL strength of 1
        is the best-of-n distribution; 'optimal', the best for `procedure`, `n` and `beta`;
        'top', 1 where u >= `tau`.
      t: exponent of 'exp', not 0; 10 for best-of-4, -10 for worst-of-4.
      debias: divide 'exp' by the factor by which its mean over the K samples is too large
        (13 % at t = 10, K = 100 and u = 1/2).
      floor: smallest quantile of 'log' and 'best_of'.
      n: samples of the procedure, at least 2.
      procedure: of 'optimal': 'best_of' or 'worst_of'.
      beta: KL strength that 'optimal' is tabulated for; a run sets it to its own.
      tau: of 'top'.

    Returns:
      [B, G, T] rewards of tokens.

    Raises:
      ValueError: an unknown name; t = 0; n that is not a whole number above 1; an
        earlier shaping, whose output would be lost; as `calibrate` and `debiased`.
    """
    _known("transform", transform, TRANSFORMS)
    _known("procedure", procedure, PROCEDURES)
    if batch.advantages is not None:
        raise ValueError(
            "ctrl compares raw rewards with raw rewards of the reference: nothing may "
            "shape them before"
        )
    if t == 0:
        raise ValueError("t is 0: the limit is transform='identity'")
    if n != int(n) or n < 2:
        raise ValueError(f"n is {n}, expected a whole number above 1")
    u = calibrate(batch.feedback, baseline, calibration)
    if transform == "identity":
        phi = u
    elif transform == "top":
        phi = (u >= tau).astype(u.dtype)
    elif transform == "optimal":
        phi = jnp.interp(u, infalign.GRID, optimal(procedure, n, beta))
    elif transform == "exp":
        phi = exponential(u, t)
        if debias:
            phi = debiased(phi, u, t, baseline.shape[1], calibration)
    else:
        if floor == 0 and calibration != "laplace":
            raise ValueError(
                f"floor is 0: calibration {calibration!r} may be 0, whose logarithm is "
                "not finite; 'laplace' is not"
            )
        phi = (n - 1 if transform == "best_of" else 1) * jnp.log(jnp.maximum(u, floor))
    return masked.earned(batch, phi)


def calibrate(
    reward: Float[Array, "B G"], baseline: Float[Array, "R K"], kind: str = "ecdf"
) -> Float[Array, "B G"]:
    """Quantiles of rewards among those of reference samples.

    Args:
      reward: raw, finite.
      baseline: rewards of K reference samples of each prompt, [B, K]; for 'global' in any
        shape.
      kind: with m the samples below, ties counting half,
        'ecdf': m/K.
        'laplace': (m + 1/2)/(K + 1), never 0 or 1.
        'leave_one_out': (m - 1/2)/(K - 1), for responses that are among the K samples; a
          response that ties with no sample is not among them, and has m/K.
        'interpolated': linear between neighbouring samples, 0 below and 1 above all.
        'gaussian': the CDF of a normal distribution with the samples' moments; this and
          'interpolated' are not invariant to nonlinear transforms of the reward.
        'global': m/R among the R samples of all prompts together, one table for a whole
          run; responses of different prompts are compared, so that easier prompts have
          higher quantiles.

    Returns:
      [B, G], within [0, 1].

    Raises:
      ValueError: an unknown kind; 'leave_one_out' or 'gaussian' of one sample.
    """
    _known("calibration", kind, CALIBRATIONS)
    k = baseline.shape[1]
    if k < 2 and kind in ("leave_one_out", "gaussian"):
        raise ValueError(f"calibration {kind!r} needs 2 reference samples, there is 1")
    if kind == "global":
        flat = _below(reward.reshape(1, -1), baseline.reshape(1, -1))
        return flat.reshape(reward.shape) / baseline.size
    below = _below(reward, baseline)
    if kind == "laplace":
        return (below + 0.5) / (k + 1)
    if kind == "ecdf":
        return below / k
    if kind == "gaussian":
        # relative to one sample, so that equal samples have a deviation of exactly 0
        origin = baseline[:, :1]
        mean = (baseline - origin).mean(1, keepdims=True)
        std = (baseline - origin).std(1, keepdims=True)
        z = (reward - origin - mean) / jnp.where(std > 0, std, 1.0)
        return jnp.where(std > 0, jax.scipy.stats.norm.cdf(z), below / k)
    tied = (reward[..., None] == baseline[:, None]).any(-1)
    if kind == "leave_one_out":
        return jnp.where(tied, (below - 0.5) / (k - 1), below / k)
    between = jax.vmap(functools.partial(jnp.interp, left=0.0, right=1.0), (0, 0, None))
    line = between(reward, jnp.sort(baseline, 1), (jnp.arange(k) + 0.5) / k)
    return jnp.where(tied, below / k, line)


def exponential(u: Float[Array, "*S"], t: float) -> Float[Array, "*S"]:
    """e^{t(u-1)} for t > 0, -e^{tu} for t < 0: increasing, within ±1."""
    return jnp.exp(t * (u - 1)) if t > 0 else -jnp.exp(t * u)


def debiased(
    phi: Float[Array, "*S"], u: Float[Array, "*S"], t: float, k: int, kind: str = "ecdf"
) -> Float[Array, "*S"]:
    """Φ without its bias: divided by E[e^{tĈ}]/e^{tC} for K samples, with Ĉ for C.

    Args:
      phi: 'exp' of u.
      u: quantiles, the share of k samples below.
      t: its exponent.
      k: K.
      kind: the calibration that gave u.

    Raises:
      ValueError: u is not such a share; t/K is so large that a higher quantile would have a
        lower reward.
    """
    if kind != "ecdf":
        raise ValueError(f"debias is for calibration 'ecdf', not {kind!r}")
    if abs(t) > STEEPEST * k:
        raise ValueError(
            f"debias at t = {t} needs at least {math.ceil(abs(t) / STEEPEST)} reference samples, "
            f"there are {k}"
        )
    return phi * jnp.exp(t * u - k * jnp.log1p(u * np.expm1(t / k)))


def optimal(procedure: str, n: int, beta: float) -> np.ndarray:
    """Φ* of a procedure on `infalign.GRID`."""
    of = infalign.best_of if procedure == "best_of" else infalign.worst_of
    return infalign.optimal(of(n), beta)[0].astype(np.float32)


def _below(reward: Float[Array, "B G"], baseline: Float[Array, "B K"]):
    """Number of the K samples below each reward, ties counting half."""
    ordered = jnp.sort(baseline, 1)
    left, right = (
        jax.vmap(functools.partial(jnp.searchsorted, side=side))(ordered, reward)
        for side in ("left", "right")
    )
    return (left + right) / 2


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(names)}")
