"""PoFT: fine-tuning that asks to be more likely than aligned models find the same data.

  L = -log σ(β [m_π(y) - 1/M Σ_j m_j(y)] + γ),   m = 1/|y| Σ_t log p(y)

Its gradient is that of fine-tuning, weighed by σ(-·): data that the aligned models find
unlikely are soon outdone and stop counting.

Source: Fan et al. 2024, https://arxiv.org/abs/2412.12865
Differs from the paper: only response tokens are scored, by the policy and by the M aligned
models alike, and these share the policy's tokenizer.
"""

import fnmatch

import jax
from jaxtyping import Array, Float

from alignax import masked
from alignax.batch import Batch, Metrics, Number, Scores

NEEDS = ("logps", "aligned*_logps")  # of every frozen LM whose name begins so
RANGES = {"beta": "(0, inf)"}


def loss(
    policy: Scores, batch: Batch, *, beta: Number = 1.0, gamma: Number = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """Bradley-Terry between the policy and the mean of M frozen models.

    Args:
      policy: logps [B, G, T]; every response is data to learn from (usually G=1).
      batch: mask [B, G, T], valid [B, G]; extra [B, G, T] of each of the M >= 1 models:
        'aligned_logps', or any other column called 'aligned*_logps'.
      beta: scale of the difference of mean log-probabilities, > 0.
      gamma: added to the logit; below 0 it asks for more than the aligned models.

    Returns:
      [B] values in nats, means over a prompt's responses, and metrics 'gradient_weight'
      (factor of the fine-tuning gradient, in (0, 1)), 'margin' (policy - aligned, nats
      per token) and 'nll' (nats per token).

    Raises:
      ValueError: no column of an aligned model.
    """
    names = sorted(fnmatch.filter(batch.extra or (), NEEDS[1]))
    if not names:
        raise ValueError(
            f"poft compares with aligned models, but the batch has no {NEEDS[1]!r}"
        )
    score = masked.token_mean(policy.logps, batch)
    each = [masked.token_mean(batch.extra[name], batch) for name in names]
    aligned = sum(each) / len(each)
    logit = beta * (score - aligned) + gamma

    def mean(x):
        return masked.response_mean(x, batch.valid)

    return mean(-jax.nn.log_sigmoid(logit)), {
        "gradient_weight": mean(jax.nn.sigmoid(-logit)),
        "margin": mean(score - aligned),
        "nll": mean(-score),
    }
