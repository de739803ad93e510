"""CTRL: calibrate the reward under the reference, transform it for the procedure.

  Ĉ(x, y) = 1/K Σ_i [1{r(x,y) > r(x,z_i)} + 1/2 1{r(x,y) = r(x,z_i)}],   z_i ~ π_ref(·|x)
  r ← Φ(Ĉ(x, y))

KL-regularised RL on Φ(Ĉ) maximises the win rate after an inference-time procedure, if Φ
is the procedure's (theory/infalign.py). The quantile is that of the prompt's own reference
samples: it does not change under any increasing transform of the raw reward, and its mean
under the reference is 1/2, ties included.

Source: Balashankar et al. 2024, https://arxiv.org/abs/2412.19792
Differs from the paper: estimates of the quantile beside the plain one, the correction of
e^{tĈ}, and the 'best_of', 'optimal' and 'top' transforms.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Number
from alignax.theory import infalign

STAGE = "reward"
BASELINE = "reference"
RANGES = {"floor": "[0, 1)", "tau": "(0, 1)", "beta": "(0, inf)"}
CALIBRATIONS = (
    "ecdf",
    "laplace",
    "interpolated",
    "leave_one_out",
    "gaussian",
    "global",
)
TRANSFORMS = ("identity", "log", "exp", "best_of", "optimal", "top")
PROCEDURES = {"best_of": infalign.best_of, "worst_of": infalign.worst_of}


def shape(
    batch: Batch,
    baseline: Float[Array, "B K"],
    *,
    calibration: str = "ecdf",
    transform: str = "exp",
    t: Number = 10.0,
    debias: bool = False,
    floor: Number = 0.01,
    n: int = 4,
    procedure: str = "best_of",
    beta: float = 0.2,
    tau: Number = 0.5,
) -> Float[Array, "B G T"]:
    """The transformed quantile, earned by the last scored token.

    Args:
      batch: feedback [B, G], raw rewards; valid [B, G].
      baseline: rewards of K reference samples of each prompt.
      calibration: 'ecdf' (mid-ranks), 'laplace' (never 0 or 1), 'interpolated' (between
        order statistics), 'leave_one_out' (the response is one of the K), 'gaussian' (the
        CDF of a normal law with the K samples' moments), 'global' (quantile in the whole
        step's reference rewards).
      transform: 'identity', 'log' (at least log `floor`), 'exp' (e^{t(u-1)} for t > 0,
        -e^{tu} for t < 0, so within ±1), 'best_of' ((n-1) log u: the best-of-n policy at
        a KL strength of 1), 'optimal' (the table of `procedure`, `n` and `beta`), 'top'
        (1 where u >= `tau`).
      t: exponent of 'exp', not 0; 10 for best-of-4, -10 for worst-of-4.
      debias: divide 'exp' by what its mean over the K samples is too large.
      floor: smallest quantile of 'log' and 'best_of'.
      n: samples of the procedure.
      procedure: of 'optimal': 'best_of' or 'worst_of'.
      beta: KL strength that 'optimal' is tabulated for, the one of the run.
      tau: of 'top'.

    Returns:
      [B, G, T] rewards of tokens.

    Raises:
      ValueError: an unknown name.
    """
    u = calibrate(batch.feedback, baseline, calibration)
    if transform == "identity":
        phi = u
    elif transform == "log":
        phi = jnp.log(jnp.maximum(u, floor))
    elif transform == "best_of":
        phi = (n - 1) * jnp.log(jnp.maximum(u, floor))
    elif transform == "exp":
        phi = exponential(u, t)
        if debias:
            phi = phi / bias(u, t, baseline.shape[1])
    elif transform == "optimal":
        table = optimal(procedure, int(n), float(beta))
        phi = jnp.interp(u, infalign.GRID, table)
    elif transform == "top":
        phi = (u >= tau).astype(u.dtype)
    else:
        raise ValueError(
            f"transform {transform!r} is not one of {', '.join(TRANSFORMS)}"
        )
    return masked.earned(batch, phi)


def calibrate(
    reward: Float[Array, "B G"], baseline: Float[Array, "B K"], kind: str = "ecdf"
) -> Float[Array, "B G"]:
    """Quantiles in [0, 1] of rewards among those of reference samples; see `shape`."""
    k = baseline.shape[1]
    if kind not in CALIBRATIONS:
        raise ValueError(
            f"calibration {kind!r} is not one of {', '.join(CALIBRATIONS)}"
        )
    if kind == "gaussian":
        mean, std = baseline.mean(1, keepdims=True), baseline.std(1, keepdims=True)
        z = (reward - mean) / jnp.maximum(std, 1e-12)
        return jnp.where(
            std > 0, jax.scipy.stats.norm.cdf(z), _rank(reward, baseline) / k
        )
    if kind == "global":
        everyone = jnp.broadcast_to(
            baseline.reshape(1, -1), (len(reward), baseline.size)
        )
        return _rank(reward, everyone) / baseline.size
    rank = _rank(reward, baseline)
    if kind == "interpolated":
        places = (jnp.arange(k) + 0.5) / k
        between = jax.vmap(lambda r, z: jnp.interp(r, z, places, left=0.0, right=1.0))
        tied = (reward[..., None] == baseline[:, None]).any(-1)
        return jnp.where(tied, rank / k, between(reward, jnp.sort(baseline, 1)))
    if kind == "laplace":
        return (rank + 0.5) / (k + 1)
    if kind == "leave_one_out":
        return (rank - 0.5) / max(k - 1, 1)
    return rank / k


def exponential(u: Float[Array, "*S"], t: Number) -> Float[Array, "*S"]:
    """e^{t(u-1)} for t > 0, -e^{tu} for t < 0: increasing, within ±1."""
    return jnp.where(t > 0, jnp.exp(t * (u - (t > 0))), -jnp.exp(t * u))


def bias(u: Float[Array, "*S"], t: Number, k: int) -> Float[Array, "*S"]:
    """E[e^{tĈ}] / e^{tC} for K samples at C = u, as in `theory.infalign.exp_bias`."""
    return jnp.exp(k * jnp.log1p(u * jnp.expm1(t / k)) - t * u)


def optimal(procedure: str, n: int, beta: float) -> np.ndarray:
    """Φ* on `infalign.GRID`."""
    if procedure not in PROCEDURES:
        raise ValueError(
            f"procedure {procedure!r} is not one of {', '.join(PROCEDURES)}"
        )
    return infalign.optimal(PROCEDURES[procedure](n), beta)[0].astype(np.float32)


def _rank(reward: Float[Array, "B G"], baseline: Float[Array, "B K"]):
    """How many of K are below, ties counting half."""
    above = reward[..., None] > baseline[:, None]
    equal = reward[..., None] == baseline[:, None]
    return above.sum(-1) + 0.5 * equal.sum(-1)
