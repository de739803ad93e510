"""Clipped policy gradient with the KL to the reference in the loss, as GRPO has it.

  L = Σ_t w_t [β k(l_t) - min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t)]
  l_t = log π(y_t) - log π_ref(y_t)

The estimator k is explicit, because their gradients are not those of one quantity: see
`ratios.kl`. k1 is refused. None has the gradient of the responses' KL(π ‖ π_ref): a token
does not pay for where it leads, only for its own law at the prefixes that were sampled.
What is exact at a KL strength (a tabulated optimum) needs the penalty of shaping/kl.py.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300 (k3)
Differs from the paper: the default is k3+, the value of k3 with the gradient of the
next token's KL(π ‖ π_ref).
"""

from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "advantages", "ref_logps")
ESTIMATORS = ratios.ESTIMATORS  # another is refused before anything compiles
RANGES = {"clip_low": "(0, 1]", "clip_high": "(0, inf]", "beta": "(0, inf)"}


def loss(
    policy: Scores,
    batch: Batch,
    *,
    beta: Number = 0.04,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    estimator: str = "k3+",
    reduction: str = "sequence",
) -> tuple[Float[Array, " B"], Metrics]:
    """Surrogate of the expected advantage, less the KL to the reference.

    Args:
      policy: logps [B, G, T].
      batch: old_logps, advantages, ref_logps, mask [B, G, T]; valid [B, G].
      beta: strength of the KL, > 0.
      clip_low, clip_high: ε, how far a ratio is followed below and above 1.
      estimator: of the KL: 'k2', 'k3' or 'k3+'.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'ratio', 'clipped' (share of tokens), 'approx_kl' (nats a
      token, to the law that sampled), 'kl' (nats a token, to the reference).

    Raises:
      ValueError: an unknown estimator, k1 among them, or no ref_logps.
    """
    gain, metrics = ratios.clipped_surrogate(policy, batch, clip_low, clip_high)
    k = ratios.kl(policy, batch, estimator)
    metrics["kl"] = masked.per_prompt(k, masked.scored(batch))
    return masked.reduce_tokens(beta * k - gain, batch, reduction), metrics
