"""BoNBoN: likelihood of the best of n, and its mean margin over the worst of n.

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref;  y⁺, y⁻ the best, worst of n
  L = -α log π(y⁺) + (1 - α) (h - 1/(2β_n))²,   1/(2β_n) = (n - 1) H_{n-1}

The n responses are drawn from the reference, and H_k = 1 + 1/2 + ... + 1/k. Under the
best-of-n distribution, log π/π_ref = log n + (n - 1) log u at quantile u, and the mean of h
is (n - 1) H_{n-1}: 1, 5.5 and 18.15 for n = 2, 4 and 8. The minimum of the squared distance
is near the best-of-n distribution, but not equal to it: with 256 equally likely responses
their total variation distance is .06, .10 and .31 (that of the reference is .25, .47 and
.65). The likelihood alone, α = 1, has its minimum at the best-of-n distribution.

Source: Gui et al. 2024, https://arxiv.org/abs/2406.00832
Differs from the paper: groups whose rewards are all equal have no best response and are
left out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
REQUIRES = {  # of rollouts: the pair is the best and the worst of n reference samples
    "rollout.group": "loss.n",
    "rollout.policy": "ref",
    "rollout.temperature": 1.0,
    "rollout.truncated": ("keep", "punish"),  # a dropped response would not count in n
}
RANGES = {"n": "[2, inf)", "alpha": "[0, 1]"}


def loss(
    policy: Scores, batch: Batch, *, n: Number = 8.0, alpha: Number = 0.005
) -> tuple[Float[Array, " B"], Metrics]:
    """Likelihood of the best of n, and squared distance of the margin from its mean.

    Args:
      policy: logps [B, 2, T]; slot 0 the best, slot 1 the worst of n responses.
      batch: ref_logps [B, 2, T], valid [B, 2].
      n: number of reference responses that the pair was selected from, at least 2; equal
        to the run's rollout.group.
      alpha: weight of the likelihood, in [0, 1].

    Returns:
      As `pairs.outcome`, of log-ratios (nats); 'nll' (nats, of the best response) and
      'target', the mean margin under the best-of-n distribution.
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
