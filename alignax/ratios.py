"""What policy-gradient losses share: ratios to the law that sampled, and KL estimators.

log ρ = log π(y_t) - log π_old(y_t),   l = log π(y_t) - log π_ref(y_t)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

LARGEST = 20.0  # nats: e^20 is a ratio that only a broken run sees
ESTIMATORS = ("k2", "k3", "k3+")


def log_ratio(policy: Scores, batch: Batch) -> Float[Array, "B G T"]:
    """log ρ in nats; 0 where nothing is scored.

    Raises:
      ValueError: the batch is not of a rollout.
    """
    if batch.old_logps is None or batch.advantages is None:
        raise ValueError(
            "Batch.old_logps or Batch.advantages is None: rollouts bring them "
            "(config.rollout.reward, config.shaping)"
        )
    keep = batch.mask & batch.valid[..., None]
    return jnp.where(keep, policy.logps - batch.old_logps, 0.0)


def bounded(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x within ±LARGEST, with the slope of x: an exponent that stays finite.

    A clipped exponent would have no slope: the token that is furthest off, and should be
    pushed hardest, would not be pushed at all.
    """
    return x + jax.lax.stop_gradient(jnp.clip(x, -LARGEST, LARGEST) - x)


def surrogate(
    log_rho: Float[Array, "*S"], advantage: Float[Array, "*S"], low: Number,
    high: Number, cap: Number,
) -> Float[Array, "*S"]:  # fmt: skip
    """min(ρ A, clip(ρ, 1 - low, 1 + high) A), and at least cap · A where A < 0."""
    rho = jnp.exp(bounded(log_rho))
    gain = jnp.minimum(rho * advantage, jnp.clip(rho, 1 - low, 1 + high) * advantage)
    # 0 · inf is not a number, and an advantage of 0 is capped by nothing
    bound = jnp.where(advantage < 0, cap, 1.0) * advantage
    return jnp.where(advantage < 0, jnp.maximum(gain, bound), gain)


def report(
    log_rho: Float[Array, "B G T"], batch: Batch, low: Number, high: Number
) -> Metrics:
    """'ratio', 'clipped' (share of tokens beyond) and 'approx_kl' (k3, nats a token)."""
    keep = batch.mask & batch.valid[..., None]
    rho = jnp.exp(bounded(log_rho))
    beyond = (rho > 1 + high) | (rho < 1 - low)
    return {
        "ratio": masked.per_prompt(rho, keep),
        "clipped": masked.per_prompt(beyond.astype(rho.dtype), keep),
        "approx_kl": masked.per_prompt(jnp.expm1(bounded(log_rho)) - log_rho, keep),
    }


def kl(policy: Scores, batch: Batch, estimator: str) -> Float[Array, "B G T"]:
    """An estimate of the next token's KL(π ‖ π_ref) at each sampled prefix, for a loss.

    On samples of π, of the law of the next token: 'k2' = l²/2 has a biased value and the
    gradient of KL(π ‖ π_ref); 'k3' = e^{-l} - 1 + l has an unbiased value and the gradient
    of KL(π_ref ‖ π), another one; 'k3+' has the value of k3 and the gradient of k2. The
    prefixes are not differentiated: summed over a response, the value is that of the
    responses' KL, the gradient is not, because how a token changes what comes after it is
    missing. 'k1' = l is refused: its expected gradient is zero; it belongs into the
    reward (shaping/kl.py), which alone has the gradient of the responses' KL.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html

    Raises:
      ValueError: an unknown estimator, or no ref_logps.
    """
    if estimator not in ESTIMATORS:
        why = " (its expected gradient is zero: use shaping.kl)"
        raise ValueError(
            f"KL estimator {estimator!r}{why if estimator == 'k1' else ''} is not one of "
            f"{', '.join(ESTIMATORS)}"
        )
    keep = batch.mask & batch.valid[..., None]
    log_ref = jnp.where(keep, policy.logps - masked.reference(batch), 0.0)
    k2, k3 = log_ref**2 / 2, jnp.expm1(bounded(-log_ref)) + log_ref
    straight = jax.lax.stop_gradient(k3 - k2) + k2
    return {"k2": k2, "k3": k3, "k3+": straight}[estimator]
