"""CD-Q: a scalar head predicts its own next value, and the reward at the last token.

  L = Σ_t w_t ½ (V(x, y_≤t) - sg[u_t])²,   u_t = V(x, y_≤t+1),   u_T = r

Source: Mudgal et al. 2023, https://arxiv.org/abs/2310.17022
Differs from the paper: u_t there is the mean of V over all next tokens under p. A scalar
head gives V of one prefix per forward pass, so that mean would take one pass per token of
the vocabulary. On rollouts of p, V after the sampled token has the same mean. As u_t has no
gradient (sg) and L is quadratic, the expected gradient is the same too. The head is its own
target: there is no target network.

On rollouts of p the expected gradient vanishes at V(s) = E[r | s], as for
losses/value_mean. The gradient has less variance, and a bias while later values are wrong.
"""

import jax
from jaxtyping import Array, Float

from alignax import masked, value_heads
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("values",)
FORMS = ("labelled", "groups")
REQUIRES = {  # of rollouts: all samples of one frozen p; a policy that moves has no fixed V
    "rollout.keep": "all",
    "rollout.policy": ...,
}
RANGES = {"radius": "(0, inf]", "centre": "(-inf, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    centre: Number = 0.0,
    radius: Number = float("inf"),
    reduction: str = "sequence",
) -> tuple[Float[Array, " B"], Metrics]:
    """Half the squared one-step error of the value at every scored token.

    Args:
      policy: values [B, G, T], on the prefix that ends with each token.
      batch: feedback [B, G], the reward of the whole response; mask [B, G, T]; valid
        [B, G]. The responses are samples of the distribution that will be guided.
      centre: V = centre + radius tanh(head / radius), in the unit of the reward.
      radius: above 0; inf applies no bound.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'value' (mean), 'step_error' (mean square of V - u) and
      'value_error' (of V - r).
    """
    v = value_heads.squash(policy.values, centre, radius)
    error = (v - jax.lax.stop_gradient(value_heads.following(v, batch))) ** 2
    keep = masked.scored(batch)
    return 0.5 * masked.reduce_tokens(error, batch, reduction), {
        "value": masked.per_prompt(v, keep),
        "step_error": masked.per_prompt(error, keep),
        "value_error": masked.per_prompt((v - batch.feedback[..., None]) ** 2, keep),
    }
