"""Kahneman-Tversky optimisation: single responses with a binary label each.

  ρ = Σ_t log π(y)/π_ref(y),   z = max(0, mean over prompts of ρ of a mismatched response)
  L = λ_D σ(-β (ρ - z)) if y is desirable,   λ_U σ(β (ρ - z)) if it is not

z estimates the KL to the reference, from answers to other prompts; it has no gradient.

Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306
Differs from the paper: nothing.
Differs from TRL: z is that of the whole optimiser step, also under accumulation, and the
mismatched response is another row of the data set (data.unpaired), not of the micro-batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("mismatched",)
RANGES = {
    "beta": "(0, inf)",
    "desirable_weight": "[0, inf)",
    "undesirable_weight": "[0, inf)",
}
COUPLED = True  # z is a mean over the prompts of the step


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> tuple[Float[Array, " B"], Metrics]:
    """Sigmoid of β times the distance of the log-ratio from z, on the wrong side of z.

    Args:
      policy: logps [B, 2, T]; slot 0 the labelled response, slot 1 a mismatched one,
        which answers another prompt.
      batch: ref_logps [B, 2, T], feedback [B, 2] (slot 0 > 0.5 is desirable; slot 1 is
        not read), valid [B, 2].
      beta: KL strength, > 0.
      desirable_weight: λ_D, >= 0. Ethayarajh et al. ask for λ_D n_D / (λ_U n_U) in
        [1, 4/3], n the numbers of examples.
      undesirable_weight: λ_U, >= 0.

    Returns:
      [B] values, 0 where slot 0 is invalid, and metrics 'accuracy' (share of responses on
      the right side of z, ties count half), 'margin' (β (ρ - z), negated for undesirable
      responses), 'log_ratio' (ρ, nats) and 'kl' (z, nats).

    Raises:
      ValueError: the batch does not hold two responses per prompt.
    """
    group = batch.tokens.shape[1]
    if group != 2:
        raise ValueError(
            f"kto got {group} responses per prompt, expected a labelled and a mismatched "
            "one: wrap the data in config.data.name='unpaired' with mismatched=True"
        )
    log_ratio = masked.log_ratios(policy, batch)
    own, mismatched = log_ratio[:, 0], log_ratio[:, 1]
    z = jnp.maximum(masked.mean(mismatched, batch.valid[:, 1]), 0.0)
    z = jax.lax.stop_gradient(z)
    desirable = batch.feedback[:, 0] > 0.5
    margin = beta * jnp.where(desirable, own - z, z - own)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    value = weight * jax.nn.sigmoid(-margin)
    return jnp.where(batch.valid[:, 0], value, 0.0), {
        "accuracy": masked.accuracy(margin),
        "margin": margin,
        "log_ratio": own,
        "kl": jnp.broadcast_to(z, own.shape),
    }
