"""RRHF: responses are ranked by their mean log-probability, the best one is imitated.

  s_i = 1/|y_i| Σ_t log π(y_i)
  L   = Σ_{f_i > f_j} max(0, s_j - s_i) - λ s_best

Source: Yuan et al. 2023, https://arxiv.org/abs/2304.05302 (λ = 1)
Differs from the paper: the imitation term is a mean over the best response's tokens, so
that its weight does not depend on length or padding; of several best responses the first
is imitated, and ties are never compared.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
RANGES = {"lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, lam: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Hinge on every pair in the wrong order, and the likelihood of the best response.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      lam: λ, weight of the best response's mean nats per token, >= 0.

    Returns:
      [B] values, and metrics 'accuracy' (share of ordered pairs ranked right, ties count
      half; 0.5 where there are none), 'margin' (mean gap of an ordered pair, nats per
      token) and 'nll' (of the best response, nats per token).

    Raises:
      ValueError: a single response to each prompt.
    """
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "rrhf ranks responses, but the batch holds one a prompt: use data with two or "
            "more (for pairs from a file set config.data.kind='pairs'), or losses.sft"
        )
    score = policy.logps.sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)
    above = batch.feedback[:, :, None] > batch.feedback[:, None, :]  # [b, i, j]
    above &= batch.valid[:, :, None] & batch.valid[:, None, :]
    ahead = jnp.where(above, score[:, :, None] - score[:, None, :], 0.0)
    best = jnp.argmax(jnp.where(batch.valid, batch.feedback, -jnp.inf), -1)
    nll = -jnp.take_along_axis(score, best[:, None], -1)[:, 0]
    value = jax.nn.relu(-ahead).sum((1, 2)) + lam * nll
    compared = jnp.maximum(above.sum((1, 2)), 1)
    return jnp.where(batch.valid.any(-1), value, 0.0), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
        "nll": nll,
    }
