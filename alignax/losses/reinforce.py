"""REINFORCE: the policy gradient without ratios and without clipping.

  L = -Σ_t w_t A_t log π(y_t | x, y_<t)

Its gradient is that of the expected advantage on responses of the policy as it is. With
several steps on a rollout it is biased: `policy_gradient` has the ratios for that.

Source: Williams 1992, https://doi.org/10.1007/BF00992696; for language models Ahmadian et al.
2024, https://arxiv.org/abs/2402.14740
Differs from the papers: nothing; the baseline is a shaping (`constant` for none, `rloo`).
"""

from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Scores

NEEDS = ("logps", "advantages")
FORMS = ("prompts",)
REQUIRES = {
    "rollout.batches": 1, "rollout.epochs": 1, "rollout.policy": "",
    "rollout.source": ("", "policy"),
}  # fmt: skip


def loss(
    policy: Scores, batch: Batch, *, reduction: str = "token"
) -> tuple[Float[Array, " B"], Metrics]:
    """Negative log-likelihood of every response, weighted by its advantage.

    Args:
      policy: logps [B, G, T], nats.
      batch: advantages, mask [B, G, T]; valid [B, G].
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and the metric 'nll' (mean nats per scored token).
    """
    assert batch.advantages is not None
    gain = batch.advantages * policy.logps
    metrics = {"nll": -masked.per_prompt(policy.logps, masked.scored(batch))}
    return -masked.reduce_tokens(gain, batch, reduction), metrics
