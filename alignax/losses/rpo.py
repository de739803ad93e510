"""RPO: DPO plus the likelihood of the chosen response.

  h = log-ratio(y⁺) - log-ratio(y⁻), each Σ_t log π/π_ref
  L = -log σ(βh) - α log π(y⁺) / |y⁺|

Source: Pang et al. 2024 (iterative RPO), https://arxiv.org/abs/2404.19733, with α = 1; Liu
et al. 2024, https://arxiv.org/abs/2405.16436, derive it from pessimism, with α = 0.005
Differs from the paper: the loss of one iteration, on the pairs of the data.
Differs from TRL: loss_type=['sigmoid', 'sft'] averages the likelihood over the tokens of
a micro-batch, so accumulation changes the loss; here each response has the same weight.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "alpha": "[0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 0.1, alpha: Number = 1.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Logistic loss on implicit rewards plus the chosen response's NLL per token.

    Args:
      policy: logps [B, 2, T]; slot 0 chosen, slot 1 rejected.
      batch: ref_logps [B, 2, T], mask [B, 2, T], valid [B, 2].
      beta: KL strength, > 0.
      alpha: weight of the negative log-likelihood, >= 0; 0 is DPO.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'log_ratio_chosen', 'log_ratio_rejected'
      (nats) and 'nll' (nats per scored token of the chosen response).
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    nll = pairs.chosen_nll(policy, batch)
    value = -jax.nn.log_sigmoid(beta * (chosen - rejected)) + alpha * nll
    return pairs.implicit_outcome(batch, value, chosen, rejected, beta, nll=nll)
