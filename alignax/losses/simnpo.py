"""SimNPO: NPO on mean log-probabilities, without a reference.

  forget: L = 2/β log [1 + exp(β m + γ)],   m = 1/|y| Σ_t log π(y)
  retain: L = -c m

Source: Fan et al. 2024, https://arxiv.org/abs/2410.07163
Differs from the paper: the forget term has weight 1 and the retain term c, so their ratio
is as there for c = 1/0.1375 on the 5 % forget set of TOFU; every response has the same
weight, so the share of forget rows in a step (config.mixture) also weighs the two terms.
"""

import jax
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("labelled",)
RANGES = {"beta": "(0, inf)", "gamma": "[0, inf)", "retain_weight": "[0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 2.5,
    gamma: Number = 0.0,
    retain_weight: Number = 1.0,
) -> tuple[Float[Array, " B"], Metrics]:
    """Softplus of the mean log-probability on forget rows, NLL on retain rows.

    Args:
      policy: logps [B, G, T].
      batch: mask [B, G, T]; feedback [B, G], <= 0.5 on forget rows and > 0.5 on retain
        rows; valid [B, G].
      beta: inverse temperature of the mean log-probability, > 0.
      gamma: γ, added to the logit of a forget row, >= 0.
      retain_weight: weight c of a retain row's mean nats per token, >= 0.

    Returns:
      [B] values, means over a prompt's responses, and metrics 'forget_nll' and
      'retain_nll' (nats per token): means over a prompt's forget or retain rows, 0
      without any.
    """
    nll = -masked.token_mean(policy.logps, batch)
    value = 2 / beta * jax.nn.softplus(gamma - beta * nll)
    return masked.forget_retain(
        batch, value, retain_weight * nll,
        forget={"forget_nll": nll}, retain={"retain_nll": nll},
    )  # fmt: skip
