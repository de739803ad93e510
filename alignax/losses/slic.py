"""SLiC-HF: sequence likelihood calibration, a hinge on log-probs plus NLL.

  Δ = log π(y⁺) - log π(y⁻)
  L = max(0, δ - Δ) - λ log π(y⁺) / |y⁺|

Source: Zhao et al. 2023, https://arxiv.org/abs/2305.10425
Differs from the paper: the likelihood is that of the chosen response and a mean over its
tokens; the paper has a separate target of supervised fine-tuning.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("pairs",)
RANGES = {"delta": "[0, inf)", "lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, delta: Number = 1.0, lam: Number = 0.5
) -> tuple[Float[Array, " B"], Metrics]:
    """Hinge on the difference of log-probs at margin δ, plus the chosen response's NLL.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2].
      delta: δ, the target margin, nats, >= 0.
      lam: λ, weight of the negative log-likelihood, >= 0.

    Returns:
      As `pairs.outcome`, of log-probs (nats); 'nll' (nats per scored token of the chosen
      response).
    """
    chosen, rejected = pairs.log_probs(policy, batch)
    nll = pairs.chosen_nll(policy, batch)
    value = jax.nn.relu(delta - (chosen - rejected)) + lam * nll
    return pairs.outcome(batch, value, chosen, rejected, nll=nll)
