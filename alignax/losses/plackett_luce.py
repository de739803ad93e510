"""DPO on rankings: the Plackett-Luce likelihood of an order under implicit rewards.

  r_k = β Σ_t log π(y_k)/π_ref(y_k)
  L   = Σ_k log [1 + Σ_{i below k} exp(r_i - r_k)]

Source: Rafailov et al. 2023, appendix A.3, https://arxiv.org/abs/2305.18290
Differs from the paper: a response is compared with those of strictly lower feedback
only. Without ties that is the paper's likelihood; tied responses are never compared.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1
) -> tuple[Float[Array, " B"], Metrics]:
    """Negative log-likelihood of the order that the feedback gives.

    Args:
      policy: logps [B, G, T], G >= 2.
      batch: ref_logps [B, G, T], feedback [B, G] (higher is better), valid [B, G].
      beta: KL strength, > 0.

    Returns:
      [B] values in nats, 0 where nothing is ordered, and metrics 'accuracy' (share of
      ordered pairs ranked right, ties count half; 0.5 where there are none) and
      'margin' (mean gap of implicit rewards in an ordered pair).

    Raises:
      ValueError: a single response to each prompt.
    """
    if batch.tokens.shape[1] < 2:
        raise ValueError(
            "plackett_luce orders responses, but the batch holds one a prompt: use data "
            "with two or more (for pairs from a file set config.data.kind='pairs')"
        )
    reward = beta * (policy.logps - masked.reference(batch)).sum(-1)
    below = batch.feedback[:, None, :] < batch.feedback[:, :, None]  # [b, k, i]
    below &= batch.valid[:, None, :] & batch.valid[:, :, None]
    gap = reward[:, None, :] - reward[:, :, None]
    # log(1 + Σ exp) around its largest term, so that nothing overflows
    term = jnp.where(below, gap, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.maximum(term.max(-1), 0.0))
    value = top + jnp.log(jnp.exp(-top) + jnp.exp(term - top[..., None]).sum(-1))
    ahead = jnp.where(below, -gap, 0.0)
    compared = jnp.maximum(below.sum((1, 2)), 1)
    return value.sum(-1), {
        "accuracy": (jnp.sign(ahead).sum((1, 2)) / compared + 1) / 2,
        "margin": ahead.sum((1, 2)) / compared,
    }
