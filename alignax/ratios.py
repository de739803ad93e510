"""What policy-gradient losses share: importance ratios, surrogates, KL estimators.

π_old is the behaviour policy, which sampled the responses.

log ρ = log π(y_t) - log π_old(y_t),   l = log π(y_t) - log π_ref(y_t)

Where a rollout is used for one step alone, π_old is π itself, and ρ is 1 with the gradient
of log π. Stored log-probabilities are of another compiled program: in bfloat16 the two
differ by more than GSPO's clip range, so that half of its responses had no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

LARGEST = 20.0  # nats; a ratio of e^20 occurs only in a run that has diverged
ESTIMATORS = ("k2", "k3", "k3+")


def behaviour(policy: Scores, batch: Batch) -> Float[Array, "B G T"]:
    """log π_old in nats, without a gradient: of the batch, or else that of the policy."""
    if batch.old_logps is None:
        return jax.lax.stop_gradient(policy.logps)
    return batch.old_logps


def log_ratio(policy: Scores, batch: Batch) -> Float[Array, "B G T"]:
    """log ρ in nats; 0 on tokens that are not scored.

    Raises:
      ValueError: the batch is not of a rollout.
    """
    if batch.advantages is None:
        raise ValueError(
            "Batch.advantages is None: rollouts bring them (config.rollout.reward, "
            "config.shaping)"
        )
    old = behaviour(policy, batch)
    return jnp.where(masked.scored(batch), policy.logps - old, 0.0)


def bounded(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """x clipped to ±LARGEST, with the gradient of x: an exponent that stays finite.

    A clipped exponent alone would have gradient 0, so that the tokens with the largest
    ratios would not be corrected.
    """
    return x + jax.lax.stop_gradient(jnp.clip(x, -LARGEST, LARGEST) - x)


def surrogate(
    log_rho: Float[Array, "*S"], advantage: Float[Array, "*S"], low: Number,
    high: Number, cap: Number,
) -> Float[Array, "*S"]:  # fmt: skip
    """min(ρ A, clip(ρ, 1 - low, 1 + high) A), and at least cap · A where A < 0."""
    rho = jnp.exp(bounded(log_rho))
    gain = jnp.minimum(rho * advantage, jnp.clip(rho, 1 - low, 1 + high) * advantage)
    # 0 · inf is NaN, so that an advantage of 0 must not meet an infinite cap
    bound = jnp.where(advantage < 0, cap, 1.0) * advantage
    return jnp.where(advantage < 0, jnp.maximum(gain, bound), gain)


def clipped_surrogate(
    policy: Scores,
    batch: Batch,
    low: Number,
    high: Number,
    cap: Number = float("inf"),
) -> tuple[Float[Array, "B G T"], Metrics]:
    """`surrogate` of every token, and the metrics of `report`.

    Args:
      policy: logps [B, G, T].
      batch: advantages, mask [B, G, T], old_logps (or None, see above); valid [B, G].
      low, high: ε, bounds of a ratio below and above 1.
      cap: c of dual clipping: where A < 0, a ratio counts as at most c.

    Raises:
      ValueError: the batch is not of a rollout.
    """
    log_rho, advantages = log_ratio(policy, batch), batch.advantages
    assert advantages is not None  # log_ratio has raised otherwise
    gain = surrogate(log_rho, advantages, low, high, cap)
    return gain, report(log_rho, batch, low, high)


def report(
    log_rho: Float[Array, "B G T"], batch: Batch, low: Number, high: Number
) -> Metrics:
    """Metrics of log ρ, means over a prompt's scored tokens.

    They are 'ratio', 'clipped' (share of tokens with a ratio outside 1 - low .. 1 + high)
    and 'approx_kl' (k3, nats per token). Where the ratio is not 1 by construction, also
    'range_used', |log ρ| as a share of the narrower side of the clip range, and
    'range_used_max', the largest of a prompt. On the first step of a rollout, where only
    rounding moves ratios, they say how much of the range is lost to it.
    """
    keep = masked.scored(batch)
    rho = jnp.exp(bounded(log_rho))
    beyond = (rho > 1 + high) | (rho < 1 - low)
    found = {
        "ratio": masked.per_prompt(rho, keep),
        "clipped": masked.per_prompt(beyond.astype(rho.dtype), keep),
        "approx_kl": masked.per_prompt(jnp.expm1(bounded(log_rho)) - log_rho, keep),
    }
    if batch.old_logps is None:
        return found
    width = jnp.minimum(jnp.log1p(high), -jnp.log1p(-low))
    moved = jnp.abs(log_rho)  # a ratio of 1 is within a range of no width
    share = jnp.where(moved > 0, moved / jnp.where(width > 0, width, 1e-30), 0.0)
    found["range_used"] = masked.per_prompt(share, keep)
    return found | {"range_used_max": jnp.where(keep, share, 0.0).max((1, 2))}


def kl(policy: Scores, batch: Batch, estimator: str) -> Float[Array, "B G T"]:
    """An estimate of the next token's KL(π ‖ π_ref) at each sampled prefix, for a loss.

    In expectation over tokens sampled from π: 'k2' = l²/2 has a biased value and the
    gradient of KL(π ‖ π_ref). 'k3' = e^{-l} - 1 + l has an unbiased value, but the gradient
    of the other divergence, KL(π_ref ‖ π). 'k3+' has the value of k3 and the gradient of
    k2. Prefixes are not differentiated. Summed over a response, the value is that of the
    KL between distributions of responses. The gradient is not: it lacks the effect of a
    token on the distributions of later tokens. 'k1' = l is refused, because its expected
    gradient is zero. As a part of the reward (shaping/kl.py), k1 does give the gradient of
    the KL between distributions of responses.

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
    keep = masked.scored(batch)
    log_ref = jnp.where(keep, policy.logps - masked.reference(batch), 0.0)
    k2, k3 = log_ref**2 / 2, jnp.expm1(bounded(-log_ref)) + log_ref
    straight = jax.lax.stop_gradient(k3 - k2) + k2
    return {"k2": k2, "k3": k3, "k3+": straight}[estimator]
