"""CD-FUDGE: at every token of a response, a scalar head predicts the response's reward.

  L = Σ_t w_t ½ (V(x, y_≤t) - r)²

Source: Mudgal et al. 2023, https://arxiv.org/abs/2310.17022; earlier Yang and Klein 2021
(FUDGE), https://arxiv.org/abs/2104.05218
Differs from the paper: the value may be bounded by a tanh, which also bounds the tilt in
guided decoding; the loss may be a mean over tokens or responses instead of a sum.

On rollouts of p, the minimum is V(s) = E[r | s], by which decoders/controlled.py tilts p.
"""

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
    """Half the squared error of the value at every scored token.

    Args:
      policy: values [B, G, T], on the prefix that ends with each token.
      batch: feedback [B, G], the reward of the whole response; mask [B, G, T]; valid
        [B, G]. The responses are samples of the distribution that will be guided.
      centre: V = centre + radius tanh(head / radius), in the unit of the reward.
      radius: above 0; inf applies no bound.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'value' (mean) and 'value_error' (mean square).
    """
    v = value_heads.squash(policy.values, centre, radius)
    error = (v - batch.feedback[..., None]) ** 2
    keep = masked.scored(batch)
    return 0.5 * masked.reduce_tokens(error, batch, reduction), {
        "value": masked.per_prompt(v, keep),
        "value_error": masked.per_prompt(error, keep),
    }
