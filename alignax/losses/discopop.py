"""DiscoPOP: the log-ratio modulated loss, which a language model proposed.

  z = β [log-ratio(y⁺) - log-ratio(y⁻)], each Σ_t log π/π_ref;  m = σ(z/τ)
  L = (1-m) · -log σ(z) + m · e⁻ᶻ

The loss is not convex: it has a local maximum near z = 0, between the logistic loss on the
left and the exponential loss on the right.

Source: Lu et al. 2024, https://arxiv.org/abs/2406.08414
Differs from the paper: m e⁻ᶻ is computed as one exponential, whose exponent is clipped at
80; it can exceed 80 for τ > 1 alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "tau": "(0, inf)"}
CEILING = 80.0  # float32 overflows at e^88


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.05, tau: Number = 0.05
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic and exponential loss, mixed by the sign of the margin.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      tau: scale of the margin over which the mixture weight changes, > 0.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    margin = beta * (chosen - rejected)
    # e⁻ᶻ alone overflows where m is tiny.
    exponent = jax.nn.log_sigmoid(margin / tau) - margin
    logistic = -jax.nn.log_sigmoid(margin) * jax.nn.sigmoid(-margin / tau)
    value = logistic + jnp.exp(jnp.minimum(exponent, CEILING))
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
