"""EXO on pairs: the reverse KL from the policy's preference to the smoothed label.

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref;  q = σ(βh)
  L = q log(q / (1-ε)) + (1-q) log((1-q) / ε)

DPO is the other KL divergence between the same two Bernoulli distributions.

Source: Ji et al. 2024, https://arxiv.org/abs/2402.00856, equation 16 with K = 2
Differs from the paper: nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "label_smoothing": "(0, 0.5)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, label_smoothing: Number = 1e-3
) -> tuple[Float[Array, " B"], Metrics]:
    """KL(Bernoulli(σ(βh)) ‖ Bernoulli(1-ε)), nats.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      label_smoothing: ε, the label's probability of being wrong, in (0, 0.5); at 0 the
        loss would be infinite.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    margin = beta * (chosen - rejected)
    right = jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing)
    wrong = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
    value = jax.nn.sigmoid(margin) * right + jax.nn.sigmoid(-margin) * wrong
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta)
