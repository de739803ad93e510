"""Clipped policy gradient with the KL to the reference in the loss, as in GRPO.

  L = Σ_t w_t [β k(l_t) - min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t)]
  l_t = log π(y_t) - log π_ref(y_t)

The estimator k must be chosen, because the estimators have gradients of different
quantities: see `ratios.kl`. k1 is refused. No estimator in a loss has the gradient of
KL(π ‖ π_ref) between distributions of responses: the loss is the KL of next-token
distributions at the sampled prefixes, and the effect of a token on later prefixes is
missing. A method that depends on the exact KL strength (a tabulated optimum) needs the
penalty of shaping/kl.py.

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300 (k3)
Differs from the paper: the default is k3+, the value of k3 with the gradient of the
next token's KL(π ‖ π_ref).
"""

from jaxtyping import Array, Float

from alignax import masked, ratios
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "old_logps", "advantages", "ref_logps")
FORMS = ("prompts",)
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
      clip_low, clip_high: ε, clipping range of a ratio below and above 1.
      estimator: of the KL: 'k2', 'k3' or 'k3+'.
      reduction: 'token', 'sequence' or 'constant', as in `masked.token_weights`.

    Returns:
      [B] values, and metrics 'ratio', 'clipped' (share of tokens), 'approx_kl' (nats per
      token, to the behaviour policy), 'kl' (nats per token, to the reference).

    Raises:
      ValueError: k1 or an unknown estimator, or no ref_logps.
    """
    gain, metrics = ratios.clipped_surrogate(policy, batch, clip_low, clip_high)
    k = ratios.kl(policy, batch, estimator)
    metrics["kl"] = masked.per_prompt(k, masked.scored(batch))
    return masked.reduce_tokens(beta * k - gain, batch, reduction), metrics
