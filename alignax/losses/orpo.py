"""ORPO: likelihood of the chosen response plus an odds-ratio penalty; no reference.

  p = exp(log π(y) / |y|);  o = log p - log(1 - p)
  L = -log π(y⁺)/|y⁺| - λ log σ(o⁺ - o⁻)

Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691
Differs from the paper: the likelihood is that of the response alone; the authors' code
scores the prompt too. A mean log-probability is at most CERTAIN, where the odds are still
finite.
Differs from TRL: likewise, and TRL averages the likelihood over the tokens of a
micro-batch, so that accumulation changes the loss; here each response has the same weight.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("pairs",)
RANGES = {"lam": "[0, inf)"}
CERTAIN = -1.2e-7  # nats; in float32, exp of a number closer to 0 is 1


def loss(
    policy: Scores, batch: Batch, *, lam: Number = 0.1
) -> tuple[Float[Array, " B"], Metrics]:
    """NLL per token of the chosen response plus a logistic loss on the log odds ratio.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2].
      lam: λ, weight of the odds ratio, >= 0; 0 is SFT on the chosen response.

    Returns:
      As `pairs.outcome`, of log odds o; 'nll' (nats per scored token of the chosen
      response).
    """

    def log_odds(mean):
        mean = jnp.minimum(mean, CERTAIN)
        return mean - jax.nn.log1mexp(-mean)

    means = pairs.per_token(*pairs.log_probs(policy, batch), batch)
    chosen, rejected = log_odds(means[0]), log_odds(means[1])
    value = -means[0] - lam * jax.nn.log_sigmoid(chosen - rejected)
    return pairs.outcome(batch, value, chosen, rejected, nll=-means[0])
