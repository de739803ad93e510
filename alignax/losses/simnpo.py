"""SimNPO: NPO on mean log-probabilities, without a reference.

  forget: L = 2/β log [1 + exp(β m + γ)],   m = 1/|y| Σ_t log π(y)
  retain: L = -c m

Source: Fan et al. 2024, https://arxiv.org/abs/2410.07163
Differs from the paper: the forget term has weight 1 and the retain term c, so their ratio
is as there for c = 1/0.1375 on the 5 % forget set of TOFU; every response counts the same,
so the share of forget rows in a step (config.mixture) also weighs the two terms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
RANGES = {"beta": "(0, inf)", "gamma": "[0, inf)", "retain_weight": "[0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 2.5,
    gamma: Number = 0.0,
    retain_weight: Number = 1.0,
) -> tuple[Float[Array, " B"], Metrics]:
    """A bounded push on forget rows, likelihood on retain rows.

    Args:
      policy: logps [B, G, T].
      batch: mask [B, G, T]; feedback [B, G], <= 0.5 on forget rows and > 0.5 on retain
        rows; valid [B, G].
      beta: inverse temperature of the mean log-probability, > 0.
      gamma: how much further a forget row is pushed, >= 0.
      retain_weight: weight c of a retain row's mean nats per token, >= 0.

    Returns:
      [B] values, means over a prompt's responses, and metrics 'forget_nll' and
      'retain_nll' (nats per token): means over a prompt's forget or retain rows, 0
      without any.
    """
    score = policy.logps.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)
    forget = batch.valid & (batch.feedback <= 0.5)
    retain = batch.valid & ~forget
    value = jnp.where(
        forget, 2 / beta * jax.nn.softplus(beta * score + gamma), -retain_weight * score
    )

    def mean(x, rows):
        return masked.per_prompt(x[..., None], rows[..., None])

    return mean(value, batch.valid), {
        "forget_nll": mean(-score, forget),
        "retain_nll": mean(-score, retain),
    }
