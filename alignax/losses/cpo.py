"""CPO: contrastive preference optimisation, DPO under a uniform reference, plus NLL.

  Δ = log π(y⁺) - log π(y⁻)
  L = -log σ(βΔ) - λ log π(y⁺) / |y⁺|

Source: Xu et al. 2024, https://arxiv.org/abs/2401.08417
Differs from the paper: the likelihood is a mean over the tokens of the response.
Differs from TRL: TRL averages it over the tokens of a micro-batch, so that accumulation
changes the loss; here each response has the same weight.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps",)
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "lam": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, lam: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on the difference of log-probs plus the chosen response's NLL.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2].
      beta: reward per nat, > 0.
      lam: λ, weight of the negative log-likelihood, >= 0.

    Returns:
      As `pairs.outcome`, of β times log-probs; 'nll' (nats per scored token of the
      chosen response).
    """
    chosen, rejected = pairs.log_probs(policy, batch)
    nll = pairs.chosen_nll(policy, batch)
    value = -jax.nn.log_sigmoid(beta * (chosen - rejected)) + lam * nll
    return pairs.outcome(batch, value, beta * chosen, beta * rejected, nll=nll)
