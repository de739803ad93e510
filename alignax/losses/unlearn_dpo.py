"""DPO for unlearning: "I don't know" is preferred to the answer to forget.

  forget: L = -2/β log σ(β [log π/π_ref (refusal) - log π/π_ref (answer)])
  retain: L = -c/|y| Σ_t log π(y)

Source: a baseline of Zhang et al. 2024, https://arxiv.org/abs/2404.05868
Differs from the paper: every prompt has the same weight, so the share of forget rows in a
step (config.mixture; 1:1 in the paper) also weighs the two terms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs", "demonstrations")
RANGES = {"beta": "(0, inf)", "retain_weight": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, retain_weight: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """DPO on forget prompts, NLL of slot 0 on retain prompts.

    Args:
      policy: logps [B, 2, T]. A forget prompt has a refusal in slot 0 and the answer to
        forget in slot 1; a retain prompt has its answer in slot 0.
      batch: ref_logps, mask [B, 2, T]; feedback, valid [B, 2]: a prompt is to be
        forgotten if slot 1 is valid and its feedback <= 0.5 or below that of slot 0.
      beta: inverse temperature, > 0.
      retain_weight: weight c of a retain answer's mean nats per token, >= 0.

    Returns:
      [B] values, 0 where slot 0 is invalid, and metrics 'accuracy' (ties count half) and
      'margin' (β times the difference of log-ratios), 0 on retain prompts, and
      'retain_nll' (nats per token), 0 on forget prompts.

    Raises:
      ValueError: the batch does not hold two responses per prompt.
    """
    refusal, answer = pairs.log_ratios(policy, batch)
    nll = pairs.chosen_nll(policy, batch)  # of slot 0
    first, second = batch.feedback[:, 0], batch.feedback[:, 1]
    forget = batch.valid[:, 1] & ((second <= 0.5) | (second < first))
    margin = beta * (refusal - answer)
    value = jnp.where(
        forget, -2 / beta * jax.nn.log_sigmoid(margin), retain_weight * nll
    )
    return jnp.where(batch.valid[:, 0], value, 0.0), {
        "accuracy": jnp.where(forget, masked.accuracy(margin), 0.0),
        "margin": jnp.where(forget, margin, 0.0),
        "retain_nll": jnp.where(forget, 0.0, nll),
    }
