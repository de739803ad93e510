"""A soft value: token-level tilts by it give the distribution tilted by the whole reward.

  L = Σ_t w_t β² (e^δ - δ - 1),   δ = (r - V(x, y_≤t)) / β

On rollouts of p the minimum is V(s) = β log E[e^{r/β} | s], and then the product over t of
p(y_t | s) e^{V(s y_t)/β} / Z(s) is p(y) e^{r(y)/β} / Z. L is the Itakura-Saito divergence
between e^{r/β} and e^{V/β}. Like every Bregman divergence it is least at the mean. Unlike
the squared difference of these exponentials, its gradient does not vanish where V is far
below the best reward.

Source: Garg et al. 2023 (Gumbel regression), https://arxiv.org/abs/2301.02328; use of the
value: Zhao et al. 2024, https://arxiv.org/abs/2404.17546
Differs from the paper: the target is the reward of the rollout, not a value of the next
state; beyond `limit` the exponential is replaced by its tangent. The factor β² keeps the
scale: for β → ∞ this is losses/value_mean. The logarithm of a mean has no unbiased
one-token target, so there is no bootstrapped form with V inside a logarithm.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignax import masked, value_heads
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("values",)
FORMS = ("labelled", "groups")
REQUIRES = {  # of rollouts: all samples of one frozen p; a policy that moves has no fixed V
    "rollout.keep": "all",
    "rollout.policy": ...,
}
RANGES = {
    "beta": "(0, inf)",
    "radius": "(0, inf]",
    "limit": "(0, inf)",
    "centre": "(-inf, inf)",
}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 0.1,
    limit: Number = 10.0,
    centre: Number = 0.0,
    radius: Number = float("inf"),
    reduction: str = "sequence",
) -> tuple[Float[Array, " B"], Metrics]:
    """The exponential error of the value at every scored token.

    Args:
      policy: values [B, G, T], on the prefix that ends with each token.
      batch: feedback [B, G], the reward of the whole response; mask [B, G, T]; valid
        [B, G]. The responses are samples of the distribution that will be guided.
      beta: β, above 0, in the unit of the reward; the same as in guided decoding.
      limit: value of δ, nats, above which e^δ is replaced by its tangent. At the minimum it
        is exceeded only by responses with a probability below e^-limit given their prefix.
      centre: V = centre + radius tanh(head / radius), in the unit of the reward.
      radius: above 0; inf applies no bound.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'value' (mean), 'value_error' (mean square of V - r) and
      'limited' (share of tokens above the limit).
    """
    v = value_heads.squash(policy.values, centre, radius)
    gap = batch.feedback[..., None] - v
    delta = gap / beta
    near = jnp.minimum(delta, limit)
    error = jnp.exp(near) * (1 + delta - near) - delta - 1
    keep = masked.scored(batch)
    return beta**2 * masked.reduce_tokens(error, batch, reduction), {
        "value": masked.per_prompt(v, keep),
        "value_error": masked.per_prompt(gap**2, keep),
        "limited": masked.per_prompt(jnp.where(delta > limit, 1.0, 0.0), keep),
    }
