"""Plackett-Luce reward model: the likelihood of a whole ranking under scalar rewards.

  L = Σ_k log [1 + Σ_{i below k} exp(r_i - r_k)]

Source: Zhu et al. 2023 (K-wise comparisons), https://arxiv.org/abs/2301.11270; with two
responses it is the pairwise loss of `reward_model`
Differs from the paper: a response is only compared with those of strictly lower feedback.
Without ties this is the paper's likelihood; tied responses are never compared.
"""

from jaxtyping import Array, Float

from alignax import lists, masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("values",)
FORMS = ("groups", "pairs")


def loss(policy: Scores, batch: Batch) -> tuple[Float[Array, " B"], Metrics]:
    """Negative log-likelihood of the order that the feedback gives.

    Args:
      policy: values [B, G, T], G >= 2; the reward is that of the last scored token.
      batch: mask [B, G, T], feedback [B, G] (higher is better), valid [B, G].

    Returns:
      As `lists.outcome`, of rewards; values in nats, 0 where nothing is ordered.

    Raises:
      ValueError: a single response per prompt.
    """
    lists.check(batch, "reward_plackett_luce orders", "or losses.reward_regression")
    return lists.plackett_luce(batch, masked.last(policy.values, batch.mask))
