"""Direct preference optimisation.

  h = Σ_t [log π(y⁺)/π_ref(y⁺)] - Σ_t [log π(y⁻)/π_ref(y⁻)]
  L = -(1-ε) log σ(βh) - ε log σ(-βh)

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; ε > 0 is the
conservative variant of Mitchell 2023, https://ericmitchell.ai/cdpo.pdf
Differs from the paper: nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, label_smoothing: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of implicit rewards.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      label_smoothing: probability that a label is flipped, in [0, 0.5).

    Returns:
      [B] values (0 where either response is invalid) and metrics 'accuracy' (share of
      pairs ranked right, ties count half), 'margin' (β h), 'log_ratio_chosen' and
      'log_ratio_rejected' (nats).
    """
    log_ratio = (policy.logps - batch.ref_logps).sum(-1)
    chosen, rejected = log_ratio[:, 0], log_ratio[:, 1]
    margin = beta * (chosen - rejected)
    value = -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - label_smoothing * jax.nn.log_sigmoid(-margin)
    metrics = {
        "accuracy": (jnp.sign(margin) + 1) / 2,
        "margin": margin,
        "log_ratio_chosen": chosen,
        "log_ratio_rejected": rejected,
    }
    valid = batch.valid[:, :2].all(-1)
    return jnp.where(valid, value, 0.0), metrics
