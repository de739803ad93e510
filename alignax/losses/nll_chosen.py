"""The likelihood of the chosen response of a pair: imitation as a part of a sum of losses.

  L = -1/|y⁺| log π(y⁺ | x)

Source: the generation loss of MPO, Wang et al. 2024, https://arxiv.org/abs/2411.10442
Differs from the paper: nothing; `rpo` adds it to DPO by itself.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("logps",)
FORMS = ("pairs",)


def loss(policy: Scores, batch: Batch) -> tuple[Float[Array, " B"], Metrics]:
    """Mean negative log-likelihood per token of the chosen response.

    Args:
      policy: logps [B, 2, T], nats; slot 0 chosen.
      batch: mask [B, 2, T], valid [B, 2].

    Returns:
      [B] values, and the metric 'nll_chosen' (the same).
    """
    nll = -masked.token_mean(policy.logps, batch)[:, 0]
    nll = jnp.where(batch.valid[:, 0], nll, 0.0)
    return nll, {"nll_chosen": nll}
