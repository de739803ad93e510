"""The policy's entropy, negative: a bonus for exploration, as a part of a sum of losses.

  L = -Σ_t w_t H(π(· | x, y_<t)),   H in nats, exact over the vocabulary

  config.loss = {"name": "sum", "parts": {"policy_gradient": {}, "entropy": {"weight": 0.01}}}

A negative weight makes the policy more certain.

Source: Mnih et al. 2016, https://arxiv.org/abs/1602.01783, section 4 (the bonus)
Differs from the paper: the weight is that of the sum; the reduction is explicit.
"""

from jaxtyping import Array, Float

from alignax import batch as rows
from alignax import masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("entropy",)
FORMS = tuple(rows.FORMS)  # it is a part of losses on all of them
RANGES = {"weight": "(-inf, inf)"}  # of this part of a sum


def loss(
    policy: Scores, batch: Batch, *, reduction: str = "token"
) -> tuple[Float[Array, " B"], Metrics]:
    """Negative entropy of the distribution of every scored token.

    Args:
      policy: entropy [B, G, T], nats.
      batch: mask [B, G, T], valid [B, G].
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and the metric 'entropy' (mean nats per scored token).
    """
    assert policy.entropy is not None
    metrics = {"entropy": masked.per_prompt(policy.entropy, masked.scored(batch))}
    return -masked.reduce_tokens(policy.entropy, batch, reduction), metrics
