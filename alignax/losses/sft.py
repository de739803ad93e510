"""Supervised fine-tuning: negative log-likelihood of the scored tokens.

  L = -Σ_t w_t log π(y_t | x, y_<t)

Source: the maximum-likelihood step of InstructGPT (Ouyang et al. 2022),
https://arxiv.org/abs/2203.02155
Differs from the paper: only response tokens are scored; the reduction is explicit.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("logps",)
FORMS = ("demonstrations", "unscored")


def loss(
    policy: Scores, batch: Batch, *, reduction: str = "token"
) -> tuple[Float[Array, " B"], Metrics]:
    """Weighted negative log-likelihood of every valid response, in nats.

    Args:
      policy: logps [B, G, T].
      batch: mask, valid; SFT is usually G=1.
      reduction: 'token' (all scored tokens of a step equal), 'sequence' or 'constant'.

    Returns:
      [B] values and metrics 'nll' (mean nats per scored token of the prompt's
      responses), 'log_prob' (nats per response).
    """
    scored = masked.scored(batch)
    total = jnp.where(scored, policy.logps, 0.0).sum((1, 2))
    metrics = {
        "nll": -masked.per_prompt(policy.logps, scored),
        "log_prob": total / jnp.maximum(batch.valid.sum(-1), 1),
    }
    return -masked.reduce_tokens(policy.logps, batch, reduction), metrics
