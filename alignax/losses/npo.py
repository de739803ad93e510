"""Negative preference optimisation: unlearning whose gradient vanishes as it succeeds.

  forget: L = 2/β log [1 + (π(y)/π_ref(y))^β]
  retain: L = -c/|y| Σ_t log π(y)

The gradient on a forget row is that of gradient ascent times 2σ(β log π/π_ref), which is 1
at the reference and vanishes as the row is forgotten; small β is gradient ascent.

Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868
Differs from the paper: every response has the same weight, so the share of forget rows in a
step (config.mixture; 1:1 in the paper) also weighs the two terms. The retain term is NLL;
losses.npo_kl has the variant with a KL term.
"""

import jax
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("labelled",)
RANGES = {"beta": "(0, inf)", "retain_weight": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, retain_weight: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """DPO without the chosen side on forget rows, NLL on retain rows.

    Args:
      policy: logps [B, G, T].
      batch: ref_logps, mask [B, G, T]; feedback [B, G], <= 0.5 on forget rows and > 0.5
        on retain rows; valid [B, G].
      beta: inverse temperature, > 0.
      retain_weight: weight c of a retain row's mean nats per token, >= 0.

    Returns:
      [B] values, means over a prompt's responses, and metrics 'forget_weight' (of the
      gradient, 2σ(β log-ratio)), 'forget_log_ratio' (nats) and 'retain_nll' (nats per
      token): means over a prompt's forget or retain rows, 0 without any.
    """
    log_ratio = masked.log_ratios(policy, batch)
    nll = -masked.token_mean(policy.logps, batch)
    value = 2 / beta * jax.nn.softplus(beta * log_ratio)
    weight = 2 * jax.nn.sigmoid(beta * log_ratio)
    return masked.forget_retain(
        batch, value, retain_weight * nll,
        forget={"forget_weight": weight, "forget_log_ratio": log_ratio},
        retain={"retain_nll": nll},
    )  # fmt: skip
