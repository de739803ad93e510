"""LongPO: preferences under a short context are transferred to the long context around it.

  h = [log π(y⁺|x_L) - log π_ref(y⁺|x_S)] - [log π(y⁻|x_L) - log π_ref(y⁻|x_S)]
  L = -λ log σ(βh) - 1/|y⁺| Σ_t log π(y⁺|x_L)

x_S is the part of the long context x_L that the question is about. y⁺ was sampled given
x_S, y⁻ given x_L. The batch holds the responses after x_L. `config.reference_data` names
the same examples after x_S, on which the reference's log-probabilities are computed.

Source: Chen et al. 2025, https://arxiv.org/abs/2502.13922
Differs from the paper: the likelihood term is a mean over the response's tokens; the
context is not scored.
"""

import jax
from jaxtyping import Array, Float

from alignax import pairs
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "ref_logps")
FORMS = ("pairs",)
RANGES = {"beta": "(0, inf)", "lam": "[0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 0.01,
    lam: Number = 0.01,
) -> tuple[Float[Array, " B"], Metrics]:
    """DPO with a reference given the short context, plus the NLL of the chosen response.

    Args:
      policy: logps [B, 2, T] under the long context; slot 0 chosen, slot 1 rejected.
      batch: mask [B, 2, T], valid [B, 2]; ref_logps [B, 2, T] of the same responses under
        the short context.
      beta: KL strength, > 0.
      lam: λ, weight of the logistic term, >= 0; the likelihood has weight 1.

    Returns:
      As `pairs.outcome`, of implicit rewards; 'nll' (of chosen, nats per token).

    Raises:
      ValueError: the batch does not hold two responses per prompt.
    """
    chosen, rejected = pairs.log_ratios(policy, batch)
    nll = pairs.chosen_nll(policy, batch)
    value = -lam * jax.nn.log_sigmoid(beta * (chosen - rejected)) + nll
    return pairs.outcome(batch, value, beta * chosen, beta * rejected, nll=nll)
