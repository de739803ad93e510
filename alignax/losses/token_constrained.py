"""Constrained fine-tuning: keeps an aligned model's distribution of the first tokens.

  L   = Σ_t w_t 2/β_t log [1 + (π_ref(y_t)/π(y_t))^β_t]
  β_t = 0.5 for t = 1,   2 for t = 2..5,   0.1 for t > 5

π_ref is the aligned model that the run starts from; t counts scored tokens from 1. The
gradient is that of fine-tuning times 2σ(β_t log π_ref/π), which is 1 at the start and
vanishes once y_t is more likely under the policy than under the aligned model. Small β_t is
fine-tuning; large β_t keeps the policy at the aligned model.

Source: Qi et al. 2024, https://arxiv.org/abs/2406.05946
Differs from the paper: the loss itself is differentiated; the authors' code multiplies the
token's NLL by the gradient's factor, detached and at least 1e-3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("demonstrations", "unscored")
RANGES = {
    "beta_first": "(0, inf)",
    "beta_early": "(0, inf)",
    "beta_late": "(0, inf)",
    "early": "[1, inf)",
}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta_first: Number = 0.5,
    beta_early: Number = 2.0,
    beta_late: Number = 0.1,
    early: int | Int[Array, ""] = 5,
    reduction: str = "token",
) -> tuple[Float[Array, " B"], Metrics]:
    """Fine-tuning with a constraint on every token, by its place in the response.

    Args:
      policy: logps [B, G, T].
      batch: ref_logps [B, G, T] of the aligned model (config.lms.ref), mask, valid.
      beta_first: strength on the first scored token, > 0.
      beta_early: on tokens 2 to `early`, > 0.
      beta_late: on all later ones, > 0.
      early: number of tokens that are early, >= 1.
      reduction: 'token' (all scored tokens of a step equal), 'sequence' or 'constant'.

    Returns:
      [B] values, and metrics 'nll' (nats per token) and 'gradient_weight' (factor of
      the fine-tuning gradient, in (0, 2)), means over a prompt's scored tokens.
    """
    weights = masked.token_weights(batch, reduction)
    position = jnp.cumsum(batch.mask, -1)
    beta = jnp.where(position <= early, beta_early, beta_late)
    beta = jnp.where(position <= 1, beta_first, beta)
    behind = beta * (masked.reference(batch) - policy.logps)
    value = weights * 2 / beta * jax.nn.softplus(behind)
    scored = masked.scored(batch)
    return value.sum((1, 2)), {
        "nll": -masked.per_prompt(policy.logps, scored),
        "gradient_weight": masked.per_prompt(2 * jax.nn.sigmoid(behind), scored),
    }
