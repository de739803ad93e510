"""NPO whose retain term is the KL to the reference instead of the likelihood.

  forget: L = 2/β log [1 + (π(y)/π_ref(y))^β]
  retain: L = c/|y| Σ_t KL(π_ref(·|x, y_<t) ‖ π(·|x, y_<t))

For small β it is gradient ascent with the same retain term (GA + KL).

Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868
Differs from the paper: as losses.npo; the KL is a mean over each response's scored
tokens, where the authors' code also counts padding.
"""

import jax
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps", "forward_kl")
FORMS = ("labelled",)
RANGES = {"beta": "(0, inf)", "retain_weight": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, retain_weight: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """DPO without the chosen side on forget rows, KL to the reference on retain rows.

    Args:
      policy: logps and forward_kl [B, G, T], nats.
      batch: ref_logps, mask [B, G, T]; feedback [B, G], <= 0.5 on forget rows and > 0.5
        on retain rows; valid [B, G].
      beta: inverse temperature, > 0.
      retain_weight: weight c of a retain row's mean KL per token, >= 0.

    Returns:
      [B] values, means over a prompt's responses, and metrics 'forget_weight' (of the
      gradient, 2σ(β log-ratio)), 'forget_log_ratio' (nats) and 'retain_kl' (nats per
      token): means over a prompt's forget or retain rows, 0 without any.
    """
    log_ratio = masked.log_ratios(policy, batch)
    kl = masked.token_mean(policy.forward_kl, batch)
    value = 2 / beta * jax.nn.softplus(beta * log_ratio)
    weight = 2 * jax.nn.sigmoid(beta * log_ratio)
    return masked.forget_retain(
        batch, value, retain_weight * kl,
        forget={"forget_weight": weight, "forget_log_ratio": log_ratio},
        retain={"retain_kl": kl},
    )  # fmt: skip
