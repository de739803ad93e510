"""BoNBoN: the best of n is imitated, and kept as far ahead of the worst as the best-of-n
law has it.

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref;  y⁺, y⁻ the best, worst of n
  L = -α log π(y⁺) + (1 - α) (h - 1/(2β_n))²,   1/(2β_n) = (n - 1) H_{n-1}

y is drawn from the reference, and H_k = 1 + 1/2 + ... + 1/k. Under the law of the best of
n, log π/π_ref = log n + (n - 1) log u at quantile u, and the mean of h is (n - 1) H_{n-1}:
1, 5.5 and 18.15 for n = 2, 4 and 8. The squared distance is smallest near that law, not at
it: with 256 equally likely responses the two are .06, .10 and .31 apart in total variation
(the reference .25, .47 and .65); the likelihood alone, α = 1, leads to it.

Source: Gui et al. 2024, https://arxiv.org/abs/2406.00832
Differs from the paper: groups whose rewards are all equal have no best, and are left out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
REQUIRES = {  # of rollouts: the pair is the best and the worst of n of the reference
    "rollout.group": "loss.n",
    "rollout.policy": "ref",
    "rollout.temperature": 1.0,
    "rollout.truncated": ("keep", "punish"),  # what is dropped is none of the n
}
RANGES = {"n": "[2, inf)", "alpha": "[0, 1]"}


def loss(
    policy: Scores, batch: Batch, *, n: Number = 8.0, alpha: Number = 0.005
) -> tuple[Float[Array, " B"], Metrics]:
    """Likelihood of the best of n, and squared distance of the margin from its mean.

    Args:
      policy: logps [B, 2, T]; slot 0 the best, slot 1 the worst of n responses.
      batch: ref_logps [B, 2, T], valid [B, 2].
      n: responses of the reference that the pair was taken of, at least 2: the run's
        rollout.group.
      alpha: weight of the likelihood, in [0, 1].

    Returns:
      As `pairs.outcome`, of log-ratios (nats); 'nll' (nats, of the best response) and
      'target', what the margin should be.
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    nll = -pairs.log_probs(policy, batch)[0]
    goal = target(n)
    value = alpha * nll + (1 - alpha) * (chosen - rejected - goal) ** 2
    return pairs.outcome(
        batch, value, chosen, rejected, nll=nll, target=jnp.full_like(value, goal)
    )


def target(n: Number) -> Float[Array, ""]:
    """(n - 1) H_{n-1}: the mean of log-ratio(best) - log-ratio(worst), nats."""
    n = jnp.float32(n)
    harmonic = jax.scipy.special.digamma(n) + jnp.euler_gamma  # n may be traced
    return (n - 1) * harmonic
